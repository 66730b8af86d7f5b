"""Runs of `examples/train.py` that are stopped, killed or fail, and their resumption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import processes  # noqa: E402
import small_run  # noqa: E402

# Far more than anything takes on a busy machine: a test that waits so long has failed.
TIMEOUT = 600


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_run.make(folder, examples=96)
    return folder


@pytest.fixture
def start():
    """Start a run; it is killed at the end of the test if it still runs."""
    running = []

    def start_run(command, **settings):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": small_run.environment()}
        process = subprocess.Popen(command, start_new_session=True, **quiet | settings)
        running.append(process)
        return process

    yield start_run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition, process):
    """Wait until a condition holds; fail if the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.002)


def has_log_row(output):
    log = output / "training_log.jsonl"
    return lambda: log.exists() and "\n" in log.read_text()


def read_status(output):
    return json.loads((output / "state/status.json").read_text())


def resume(command):
    return subprocess.run(command, env=small_run.environment(), capture_output=True, text=True, timeout=TIMEOUT)


def failed_run(command):
    """Return the error output of a run that must fail."""
    done = resume(command)
    assert done.returncode != 0
    return done.stderr


def test_sigterm_saves_the_state_and_the_run_can_be_resumed(small, tmp_path, start):
    output = tmp_path / "run"
    command = small_run.command(
        small, output, num_train_epochs=20, save_steps=1000, logging_steps=1, dataloader_num_workers=1
    )
    process = start(command)
    wait_until(has_log_row(output), process)
    assert read_status(output)["status"] == "running"
    # The whole process group, its worker too, as schedulers do.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT) == 0
    status = read_status(output)
    assert status["status"] == "interrupted" and 0 < status["step"] < 120
    assert (output / f"state/step-{status['step']:08d}/progress.json").exists()
    done = resume(command)
    assert done.returncode == 0 and f"Resuming after step {status['step']} of 120" in done.stderr
    assert read_status(output)["status"] == "finished"
    rows = (output / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 121))


def test_a_run_saves_its_state_when_its_launcher_is_stopped(small, tmp_path, start):
    output = tmp_path / "run"
    # With one process, `accelerate launch` does not pass on the signals it gets.
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")
    command = small_run.command(small, output, launcher, num_train_epochs=400, save_steps=1000, logging_steps=1)
    process = start(command)
    wait_until(has_log_row(output), process)
    (run,) = psutil.Process(process.pid).children()
    process.terminate()
    process.wait(timeout=TIMEOUT)
    psutil.wait_procs([run], timeout=TIMEOUT)
    status = read_status(output)
    assert status["status"] == "interrupted" and 0 < status["step"] < 2400


def run_benchmark(name, *arguments, cwd):
    """Return the result that a benchmark prints at its end."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path):
    arguments = ("--kills", 2, "--streamed_kills", 2, "--num_train_epochs", 12, "--max_seconds", 0.3)
    found = run_benchmark("kill_training", *arguments, cwd=tmp_path)
    assert list(found) == ["map-style", "streamed"]
    for case in found.values():
        assert case["kills"] == 2 and case["equal"] == {"weights": True, "losses": True, "fits": True}
        assert case["left_in_state_folder"] == ["status.json"]


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path):
    found = run_benchmark("processes", "--steps", 12, "--runs", "streamed, two", cwd=tmp_path)
    found = found["largest_relative_difference"]
    assert set(found) == {"streamed, two"}
    assert all(value < 1e-4 for run in found.values() for value in run.values())


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused(small, tmp_path, start):
    port, running = processes.free_port(), []
    for machine in range(2):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", processes.CONFIGURATION]
        launcher += ["--num_processes", 2, "--machine_rank", machine, "--main_process_ip", "127.0.0.1"]
        launcher += ["--main_process_port", port, "--mixed_precision", "no"]
        command = small_run.command(small, tmp_path / f"run-{machine}", tuple(map(str, launcher)))
        environment = small_run.environment() | {"ACCELERATE_USE_CPU": "true"}
        running.append(start(command, stderr=subprocess.PIPE, text=True, env=environment))
    for machine, process in enumerate(running):
        error = process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode and "not the same folder on all machines" in error
        assert read_status(tmp_path / f"run-{machine}")["status"] == "failed"


def test_an_infinite_loss_stops_the_run_and_keeps_its_state(small, tmp_path):
    output, settings = tmp_path / "run", {"num_train_epochs": 20, "save_steps": 2, "warmup_ratio": 0.5}
    # Workers ignore the signal that Python ends them with; they must not keep the program from ending.
    settings |= {"learning_rate": 1e30, "max_grad_norm": 1e30, "dataloader_num_workers": 2}
    error = failed_run(small_run.command(small, output, **settings))
    assert "give a lower --learning_rate with --resume_from_checkpoint never" in error
    status = read_status(output)
    assert status["status"] == "failed" and "FloatingPointError" in status["error"]
    assert list((output / "state").glob("step-*/progress.json"))


def test_a_lost_worker_stops_the_run(small, tmp_path, start):
    output = tmp_path / "run"
    command = small_run.command(small, output, num_train_epochs=400, logging_steps=1, dataloader_num_workers=2)
    process = start(command, stderr=subprocess.PIPE, text=True)
    wait_until(has_log_row(output), process)
    # The run is paused until all threads of the worker are gone. Otherwise it could read from a dying worker and
    # report the broken connection instead of the lost worker.
    process.send_signal(signal.SIGSTOP)
    worker = psutil.Process(process.pid).children()[0]
    worker.kill()
    wait_until(lambda: worker.status() == psutil.STATUS_ZOMBIE and worker.num_threads() <= 1, process)
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode != 0 and "DataLoader worker" in error
    status = read_status(output)
    assert status["status"] == "failed" and "DataLoader worker" in status["error"]


FULL_DISK = """
import resource, runpy, sys
from modeling_optsg.training import RunState

save = RunState.save

def save_on_a_full_disk(*arguments):
    # Files of more than 100 kB cannot be written, as on a disk that is nearly full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(*arguments)

RunState.save = save_on_a_full_disk
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_stops_the_run_and_leaves_no_partial_state(small, tmp_path):
    output = tmp_path / "run"
    program, *rest = small_run.command(small, output, num_train_epochs=2, save_steps=4, eval_steps=100)
    assert "the state of step 4" in failed_run([program, "-c", FULL_DISK, *rest])
    status = read_status(output)
    assert status["status"] == "failed" and "the state of step 4" in status["error"]
    assert not list((output / "state").glob("step-*"))


@pytest.mark.slow
def test_a_run_with_other_examples_is_not_resumed(tmp_path, start):
    small_run.make(tmp_path, examples=64)
    output = tmp_path / "run"
    settings = {"num_train_epochs": 40, "save_steps": 2, "train_batch_size": 16, "logging_steps": 1}
    command = small_run.command(tmp_path, output, **settings)
    process = start(command)
    wait_until((output / "state/step-00000002").exists, process)
    process.kill()
    process.wait()
    small_run.make(tmp_path, examples=64, seed=1)
    assert "belongs to a run with other training or validation examples" in failed_run(command)


@pytest.mark.slow
def test_a_run_resumed_in_another_folder_saves_a_checkpoint(small, tmp_path, start):
    settings = {"num_train_epochs": 2, "save_steps": 6, "eval_steps": 100}
    process = start(small_run.command(small, tmp_path / "run", **settings))
    # The last state is saved before the last validation, and deleted when the run is finished.
    state = tmp_path / "run/state/step-00000012"
    wait_until(state.exists, process)
    process.send_signal(signal.SIGSTOP)
    copy = tmp_path / "kept" / state.name
    shutil.copytree(state, copy)
    process.kill()
    process.wait()
    done = resume(small_run.command(small, tmp_path / "other", **settings, resume_from_checkpoint=copy))
    assert done.returncode == 0 and "Resuming after step 12 of 12" in done.stderr
    summary = json.loads((tmp_path / "other/training_summary.json").read_text())
    assert [row["step"] for row in summary["history"]] == [12] and (tmp_path / "other/model.safetensors").exists()
