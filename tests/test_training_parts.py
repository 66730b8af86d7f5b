"""A step's examples whatever the number of processes, and runs that go on where they were stopped."""

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
import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader

from modeling_optsg.training import (
    CollateReadable,
    GlobalBatches,
    Interrupted,
    RunState,
    RunStatus,
    SeededExamples,
    SlotChanges,
    TrainingLog,
    Unreadable,
    micro_batches,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import processes  # noqa: E402
import small_run  # noqa: E402


@pytest.mark.parametrize("processes, parts", [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_a_step_s_examples_do_not_depend_on_processes_and_parts(processes, parts):
    whole = list(GlobalBatches(23, 12, 8, seed=3))
    shares = [
        list(GlobalBatches(23, 12, 8, seed=3, process=process, num_processes=processes, parts=parts))
        for process in range(processes)
    ]
    for step, expected in enumerate(whole):
        found = [pair for own in shares for part in range(parts) for pair in own[step * parts + part]]
        assert found == expected
        assert all(own[step * parts + part] for own in shares for part in range(parts))


def test_every_example_is_seen_once_an_epoch_in_another_order_each_time():
    order = [example for batch in GlobalBatches(23, 5, 14, seed=0) for example, _ in batch]
    epochs = [order[:23], order[23:46], order[46:69]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [example for batch in GlobalBatches(23, 5, 14, seed=1) for example, _ in batch]


def test_going_on_gives_the_batches_that_were_left():
    whole = list(GlobalBatches(23, 5, 14, seed=0, parts=2))
    rest = GlobalBatches(23, 5, 14, seed=0, parts=2, start=6)
    assert list(rest) == whole[12:] and len(rest) == 16


def test_a_step_s_examples_may_be_of_like_length_and_none_is_lost():
    lengths = [1 + (7 * example) % 40 for example in range(400)]
    settings = {"lengths": lengths, "seed": 0}
    order = [[example for example, _ in batch] for batch in GlobalBatches(400, 10, 80, **settings)]
    first, second = ([example for batch in half for example in batch] for half in (order[:40], order[40:]))
    assert sorted(first) == sorted(second) == list(range(400)) and first != second
    spreads = [[lengths[example] for example in batch] for batch in order]
    # Of 40 lengths a random ten would span nearly all.
    assert sum(max(own) - min(own) for own in spreads) / len(spreads) < 8
    share = {"process": 1, "num_processes": 2, "start": 3}
    mine = [[example for example, _ in batch] for batch in GlobalBatches(400, 10, 80, **settings, **share)]
    assert mine == [batch[5:] for batch in order[3:]]


def test_groups_of_like_length_begin_anew_with_an_epoch():
    # An epoch ends in the middle of a step.
    lengths = [1 + example % 40 for example in range(405)]
    batches = [
        [lengths[example] for example, _ in batch] for batch in GlobalBatches(405, 10, 200, seed=0, lengths=lengths)
    ]
    wide = [step for step, own in enumerate(batches) if max(own) - min(own) > 25]
    assert len(wide) < 20
    order = [example for batch in GlobalBatches(405, 10, 81, seed=0, lengths=lengths) for example, _ in batch]
    assert sorted(order[:405]) == sorted(order[405:]) == list(range(405))


def test_examples_have_seeds_of_their_epoch():
    pairs = [pair for batch in GlobalBatches(4, 4, 2, seed=0) for pair in batch]
    assert len({seed for _, seed in pairs}) == 8
    assert SeededExamples([{"a": 1}])[(0, 17)] == {"a": 1, "example_index": 0, "example_seed": 17}


def test_examples_that_cannot_be_read_are_left_out_counted_and_limited():
    def collator(examples):
        if bad := [example["example_index"] for example in examples if example["example_index"] % 5 == 3]:
            raise ValueError(f"example {bad[0]} is broken")
        return {"size": len(examples)}

    collate = CollateReadable(collator, [{"example_index": index} for index in (3, 4)])
    found = collate([{"example_index": index} for index in range(5)])
    assert (found.examples, found.batch, found.unreadable) == ([0, 1, 2, 4], {"size": 4}, {3: "example 3 is broken"})
    # Nothing left: an example that could be read before stands in, and does not count.
    stand_in = collate([{"example_index": 3}, {"example_index": 8}])
    assert (stand_in.examples, stand_in.weight, len(stand_in.unreadable)) == ([], 0.0, 2)
    # The same one whatever came before, as for a run that has gone on.
    assert collate.stand_in == {"example_index": 4, "example_seed": 0}
    with pytest.raises(ValueError, match="None of the 2 examples"):
        CollateReadable(collator, [])([{"example_index": 3}, {"example_index": 8}])
    # The first batch of all may be one broken example: another is looked for, among so many.
    others = [{"example_index": index} for index in (3, 8, 13, 14)]
    found = CollateReadable(collator, others)([{"example_index": 8, "id": "v8"}])
    assert (found.examples, found.weight, found.unreadable) == ([], 0.0, {"v8": "example 8 is broken"})
    with pytest.raises(ValueError, match="None of the 1 examples"):
        CollateReadable(collator, others, max_tries=3)([{"example_index": 8}])


def test_each_broken_example_counts_once_and_after_going_on_too():
    counted = Unreadable(2)
    for _ in range(3):
        counted.note(counted.new({3: "example 3 is broken"}))
    counted.note(counted.new({8: "example 8 is broken"}))
    assert counted.reasons == {"3": "example 3 is broken", "8": "example 8 is broken"}
    again = Unreadable(2, json.loads(json.dumps(counted.reasons)))
    assert not again.new({3: "example 3 is broken"})
    with pytest.raises(ValueError, match="3 training examples could not be read, more than max_unreadable=2, such as"):
        again.note(again.new({9: "example 9 is broken"}))


def test_the_rest_of_a_process_s_share_follows():
    assert micro_batches(512, 8, None) == 1 and micro_batches(512, 8, 64) == 1
    assert micro_batches(512, 8, 30) == 3 and micro_batches(1024, 16, 64) == 1
    with pytest.raises(ValueError, match="4 examples cannot be shared by 8"):
        micro_batches(4, 8, None)
    with pytest.raises(ValueError, match="at least one example"):
        micro_batches(4, 2, 0)
    with pytest.raises(ValueError, match="5 examples cannot be shared by 4 processes in 2 parts"):
        micro_batches(5, 4, 1)
    with pytest.raises(ValueError, match="no examples"):
        GlobalBatches(0, 4, 2, seed=0)


def test_tags_that_change_slots_are_counted():
    moves, ids = SlotChanges(), torch.tensor([10, 20, 30])
    moves.note([0, 1], torch.tensor([[0, 1, -1], [2, -1, -1]]), ids)
    assert moves.share() is None
    moves.note([0, 1], torch.tensor([[0, -1, 1], [2, 0, -1]]), ids)
    assert moves.share() == pytest.approx(1 / 3)


def test_only_so_many_examples_are_followed():
    moves, ids = SlotChanges(max_examples=1), torch.tensor([10])
    for slots in ([[0, -1], [0, -1]], [[-1, 0], [0, -1]]):
        moves.note([7, 8], torch.tensor(slots), ids)
    assert moves.share() == 1.0 and list(moves.slots) == [7]


@pytest.fixture
def state(tmp_path):
    """A run of one linear layer, half of it frozen."""

    def make(arguments=None, keep=2):
        accelerator = Accelerator(cpu=True)
        accelerator.free_memory()
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(3, 3), "trained": torch.nn.Linear(3, 3)})
        model["frozen"].requires_grad_(False)
        optimizer = torch.optim.AdamW(model["trained"].parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        return RunState(accelerator, tmp_path / "state", arguments or {"seed": 0}, keep), model

    return make


def test_a_state_is_complete_or_not_there(state, tmp_path, monkeypatch):
    run, model = state()
    run.save(5, {"best": 1.5})
    with torch.no_grad():
        model["trained"].weight.fill_(7.0)
    (tmp_path / "state/step-00000010.partial").mkdir()
    (tmp_path / "state/step-00000011").mkdir()  # without its progress: not complete
    again, fresh = state()
    assert again.load("auto") == {"step": 5, "best": 1.5}
    assert not (fresh["trained"].weight == 7.0).any()
    saved = torch.load(tmp_path / "state/step-00000005/pytorch_model.bin", weights_only=True)
    assert set(saved) == {"trained.weight", "trained.bias"}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    (tmp_path / "state/step-00000010.partial").rmdir()
    with pytest.raises(OSError, match="state of step 15 could not be written.*No space.*MiB are free there"):
        again.save(15, {})
    assert [path.name for path in again.checkpoints()] == ["step-00000005"]
    assert not list((tmp_path / "state").glob("*.partial"))


def test_old_states_go_only_when_the_new_one_is_there(state):
    run, _ = state()
    for step in (1, 2, 3, 4):
        run.save(step, {})
    assert [path.name for path in run.checkpoints()] == ["step-00000003", "step-00000004"]
    # Going back to an earlier one gives up those after it.
    assert run.load(str(run.checkpoints()[0]))["step"] == 3
    run.save(3, {})
    assert [path.name for path in run.checkpoints()] == ["step-00000003"]
    run.clear()
    assert run.checkpoints() == [] and run.load("auto") is None


def test_a_state_of_another_run_or_model_is_refused(state, tmp_path):
    run, model = state({"seed": 0, "num_train_epochs": 3})
    run.save(1, {})
    other, _ = state({"seed": 0, "num_train_epochs": 4})
    with pytest.raises(ValueError, match=r"epochs 3 \(now 4\)"):
        other.load("auto")
    assert other.load("never") is None
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        other.load(str(tmp_path))
    path = tmp_path / "state/step-00000001/pytorch_model.bin"
    torch.save({"else": torch.zeros(1)}, path)
    same, _ = state({"seed": 0, "num_train_epochs": 3})
    with pytest.raises(ValueError, match="does not fit this model"):
        same.load(str(path.parent))


def test_rows_of_steps_that_are_done_again_are_forgotten(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = TrainingLog(Accelerator(cpu=True), path, start=2, total=3)
    log.write({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_run.make(folder, examples=96)
    return folder


def test_sigterm_saves_and_says_so_and_the_run_goes_on(small, tmp_path):
    command = small_run.command(
        small, tmp_path / "run", num_train_epochs=40, save_steps=1000, logging_steps=1, dataloader_num_workers=1
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env=small_run.environment(), **quiet)
    status, log = tmp_path / "run/state/status.json", tmp_path / "run/training_log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(status.read_text())["status"] == "running"
    # The whole group, its worker too, as schedulers do.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    told = json.loads(status.read_text())
    assert told["status"] == "interrupted" and 0 < told["step"] < 240
    assert (tmp_path / f"run/state/step-{told['step']:08d}/progress.json").exists()
    done = subprocess.run(command, env=small_run.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and f"Going on after step {told['step']} of 240" in done.stderr
    assert json.loads(status.read_text())["status"] == "finished"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 241))


@pytest.fixture
def launch():
    """`accelerate launch` with one process, which does not pass on the signals it gets."""
    return (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")  # fmt: skip


def test_a_run_whose_launcher_is_stopped_saves_and_stops(small, tmp_path, launch):
    command = small_run.command(
        small, tmp_path / "run", launch, num_train_epochs=400, save_steps=1000, logging_steps=1
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=small_run.environment(), **quiet)
    status, log = tmp_path / "run/state/status.json", tmp_path / "run/training_log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.wait(timeout=60)
    while json.loads(status.read_text())["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    told = json.loads(status.read_text())
    assert told["status"] == "interrupted" and 0 < told["step"] < 2400


def failing(command: list[str], **limits) -> str:
    """What a run says that is to fail; one that hangs fails the test."""
    environment = small_run.environment() | limits
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stderr


def test_kills_change_nothing(tmp_path):
    program = [sys.executable, BENCHMARKS / "kill_training.py", "--kills", "2", "--streamed_kills", "2"]
    program += ["--num_train_epochs", "12", "--longest", "0.3"]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert list(found) == ["map-style", "streamed"]
    for case in found.values():
        assert case["kills"] == 2 and case["equal"] == {"weights": True, "losses": True, "fits": True}
        assert case["left_in_state_folder"] == ["status.json"]


def test_two_processes_learn_as_one(tmp_path):
    program = [
        sys.executable,
        BENCHMARKS / "processes.py",
        "--steps",
        "12",
        "--runs",
        "streamed, two",
    ]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])["largest_relative_difference"]
    assert set(found) == {"streamed, two"}
    assert all(value < 1e-4 for run in found.values() for value in run.values())


def test_machines_that_share_no_folder_are_told(small, tmp_path):
    port, running = processes.free_port(), []
    for machine in range(2):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", processes.CONFIGURATION]
        launcher += ["--num_processes", 2, "--machine_rank", machine, "--main_process_ip", "127.0.0.1"]
        launcher += ["--main_process_port", port, "--mixed_precision", "no"]
        command = small_run.command(small, tmp_path / f"run-{machine}", tuple(map(str, launcher)))
        own = small_run.environment() | {"ACCELERATE_USE_CPU": "true"}
        running.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    for machine, process in enumerate(running):
        told = process.communicate(timeout=120)[1]
        assert process.returncode and "not the same folder on all machines" in told
        assert json.loads((tmp_path / f"run-{machine}/state/status.json").read_text())["status"] == "failed"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_state(small, tmp_path):
    settings = {
        "num_train_epochs": 20,
        "save_steps": 2,
        "learning_rate": 1e30,
        "max_grad_norm": 1e30,
        "warmup_ratio": 0.5,
    }
    # Workers, which ignore the signal that Python ends them with, must not keep the program from ending.
    command = small_run.command(small, tmp_path / "run", **settings, dataloader_num_workers=2)
    assert "give a lower learning rate with --resume_from_checkpoint never" in failing(command)
    told = json.loads((tmp_path / "run/state/status.json").read_text())
    assert told["status"] == "failed" and "FloatingPointError" in told["error"]


def test_a_lost_worker_stops_the_run(small, tmp_path):
    command = small_run.command(
        small, tmp_path / "run", num_train_epochs=400, logging_steps=1, dataloader_num_workers=2
    )
    process = subprocess.Popen(command, env=small_run.environment(), stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run/training_log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    psutil.Process(process.pid).children()[0].kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "DataLoader worker" in said
    told = json.loads((tmp_path / "run/state/status.json").read_text())
    assert told["status"] == "failed" and "DataLoader worker" in told["error"]


FULL_DISK = """
import resource, runpy, sys
from modeling_optsg.training import RunState

save = RunState.save

def save_on_a_full_disk(*arguments):
    # Files of more than a hundred kilobytes cannot be written: what a full disk does to the programs that write them.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(*arguments)

RunState.save = save_on_a_full_disk
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_disk_that_is_full_stops_the_run(small, tmp_path):
    program, *rest = small_run.command(small, tmp_path / "run", num_train_epochs=2, save_steps=4, eval_steps=0.99)
    said = failing([program, "-c", FULL_DISK, *rest])
    assert "the state of step 4 could not be written" in said and "MiB are free there" in said
    state = tmp_path / "run/state"
    told = json.loads((state / "status.json").read_text())
    assert told["status"] == "failed" and "could not be written" in told["error"]
    assert not list(state.glob("step-*")), "nothing half-written is left"


def test_other_examples_are_another_run(tmp_path):
    small_run.make(tmp_path, examples=64)
    settings = {"num_train_epochs": 4, "save_steps": 2, "train_batch_size": 16, "logging_steps": 1}
    command = small_run.command(tmp_path, tmp_path / "run", **settings)
    process = subprocess.Popen(command, env=small_run.environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run/state/step-00000002").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    small_run.make(tmp_path, examples=64, seed=1)
    assert "is of a run with other training or validation examples" in failing(command)


def test_an_error_in_a_loader_s_worker_is_told_without_its_traceback(tmp_path):
    def broken(rows):
        raise ValueError("example v7 is broken\nand so is v8")

    status = RunStatus(tmp_path / "status.json")
    with pytest.raises(ValueError, match="Original Traceback"), status.follow():
        next(iter(DataLoader([0], collate_fn=broken, dataloader_num_workers=1)))
    assert status.read() == {
        "status": "failed",
        "error": "ValueError: example v7 is broken\nand so is v8",
        "process": 0,
    }


def test_a_failed_process_is_not_forgotten_when_the_others_are_stopped(tmp_path):
    PartialState()
    status = RunStatus(tmp_path / "status.json")
    status.set("preparing")
    with pytest.raises(ValueError), status.follow():
        raise ValueError("a broken disk")
    with status.follow():
        raise Interrupted(3)
    assert status.read() == {"status": "failed", "error": "ValueError: a broken disk", "process": 0}
    status.set("preparing")
    with status.follow():
        raise Interrupted(3)
    assert status.read() == {"status": "interrupted", "step": 3}


def test_a_run_that_goes_on_in_another_folder_ends_with_a_checkpoint(small, tmp_path):
    settings = {"num_train_epochs": 2, "save_steps": 6, "eval_steps": 0.99}
    command = small_run.command(small, tmp_path / "run", **settings)
    state = tmp_path / "run/state/step-00000012"
    process = subprocess.Popen(command, env=small_run.environment(), stderr=subprocess.DEVNULL)
    # The last state, written before the last validation and taken away when the run is finished.
    while process.poll() is None and not state.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    (tmp_path / "kept").mkdir()
    shutil.copytree(state, tmp_path / "kept" / state.name)
    process.kill()
    process.wait()
    command = small_run.command(
        small, tmp_path / "other", **settings, resume_from_checkpoint=tmp_path / "kept" / state.name
    )
    done = subprocess.run(command, env=small_run.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Going on after step 12 of 12" in done.stderr
    summary = json.loads((tmp_path / "other/training_summary.json").read_text())
    assert [row["step"] for row in summary["history"]] == [12] and (tmp_path / "other/model.safetensors").exists()
