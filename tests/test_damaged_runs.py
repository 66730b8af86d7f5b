"""Training runs whose files were damaged after they were written, and two training runs in one folder."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from modeling_optsg.data.checksums import CHECKSUMS, is_cached, record_checksum
from modeling_optsg.training import OPTSGTrainer, OPTSGTrainingArguments, RunState
from modeling_optsg.training.checkpoints import delete_extra_files
from modeling_optsg.training.finishing import finished_summary
from modeling_optsg.training.interruption import RunStatus
from modeling_optsg.training.run_lock import lock_run
from modeling_optsg.training.training_log import TrainingLog


@pytest.fixture
def make_run(tmp_path):
    """Make the states of a model whose weights say in which step they were saved."""

    def make():
        accelerator = Accelerator(cpu=True)
        accelerator.free_memory()
        model = torch.nn.Linear(3, 3)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        return RunState(accelerator, tmp_path / "state", {"seed": 0}), model

    return make


@pytest.fixture
def saved(make_run, tmp_path):
    run, model = make_run()
    for step in (1, 2):
        with torch.no_grad():
            model.weight.fill_(float(step))
        run.save(step, {"best_metric": step / 2})
    return tmp_path / "state"


def flip_bit(path, position=-40):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = [
    *((name, change) for name in ("pytorch_model.bin", "optimizer.bin") for change in (flip_bit, cut, empty, remove)),
    *(("random_states_0.pkl", change) for change in (flip_bit, remove)),
    *(("progress.json", change) for change in (flip_bit, empty, remove, replace_by_folder)),
    *((CHECKSUMS, change) for change in (flip_bit, cut, empty, replace_by_folder)),
]


@pytest.mark.parametrize("name, change", DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_the_state_before_a_damaged_one_is_loaded(make_run, saved, caplog, name, change):
    change(saved / "step-00000002" / name)
    run, model = make_run()
    assert run.load("auto") == {"step": 1, "best_metric": 0.5}
    assert (model.weight == 1).all()
    damaged = name if name != CHECKSUMS or change in (empty, replace_by_folder, cut) else ""
    assert "The state step-00000002 is damaged" in caplog.text and damaged in caplog.text
    assert "resumes from step-00000001" in caplog.text


def test_a_state_of_an_earlier_version_is_loaded_with_a_warning(make_run, saved, caplog):
    remove(saved / "step-00000002" / CHECKSUMS)
    run, model = make_run()
    assert run.load("auto")["step"] == 2 and (model.weight == 2).all()
    assert "step-00000002 has no checksums.json" in caplog.text
    remove(saved / "step-00000002/progress.json")
    assert run.load("auto")["step"] == 1


def test_a_run_with_damaged_states_alone_does_not_start_over(make_run, saved):
    for step in (1, 2):
        flip_bit(saved / f"step-0000000{step}/optimizer.bin")
    run, _ = make_run()
    with pytest.raises(ValueError, match=r"step-00000001 is damaged: .*optimizer\.bin was changed.*There is no other"):
        run.load("auto")
    assert run.load("never") is None
    with pytest.raises(ValueError, match=r"optimizer\.bin was changed"):
        run.load(str(saved / "step-00000002"))


def test_a_damaged_log_is_rebuilt_from_the_state(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    rows = [b'{"step": 1, "loss": 3.0}', b'{"step": 2, "lo\xff', b"[]", b'{"step": "x"}', b"\0" * 20, b'{"step": 5}']
    path.write_bytes(b"\n".join(rows) + b"\n")
    history = [{"step": 2, "validation": {"full_f1": 1.0}}, {"step": 5, "validation": {}}]
    TrainingLog(Accelerator(cpu=True), path, start=6, total=9, history=history).close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"step": 1, "loss": 3.0}, history[0], {"step": 5}]
    assert f"{path}: 4 damaged rows are left out" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_status_is_reported_and_written_again(tmp_path, caplog, content):
    path = tmp_path / "status.json"
    path.write_bytes(content)
    status = RunStatus(path)
    assert status.read() == {"status": "damaged"} and f"{path} is damaged" in caplog.text
    status.set("running")
    assert status.read() == {"status": "running"}


def test_a_finished_run_with_a_damaged_status_is_not_repeated(tmp_path):
    args = OPTSGTrainingArguments(str(tmp_path))
    own = args.result_arguments()
    summary = {"arguments": own, "examples": {"train": 10**6}}
    (tmp_path / "training_summary.json").write_text(json.dumps(summary))
    (tmp_path / "state").mkdir()
    status = RunStatus(tmp_path / "state/status.json")
    status.path.write_text("{")
    assert finished_summary(args, status) == summary
    (tmp_path / "state/step-00000001").mkdir()
    assert finished_summary(args, status) is None
    (tmp_path / "state/step-00000001").rmdir()
    (tmp_path / "training_summary.json").write_text('{"arguments": {}')
    with pytest.raises(ValueError, match=r"training_summary\.json is damaged"):
        finished_summary(args, status)


@pytest.mark.parametrize("change", [flip_bit, cut, empty])
def test_a_damaged_cached_file_is_reported_and_deleted(tmp_path, caplog, change):
    path = tmp_path / "towers.arrow"
    path.write_bytes(b"features" * 20)
    assert not is_cached(path) and "it has no checksum" in caplog.text and not path.exists()
    path.write_bytes(b"features" * 20)
    record_checksum(path)
    assert is_cached(path)
    change(path)
    assert not is_cached(path) and "was changed after it was written" in caplog.text and not path.exists()
    assert not is_cached(path)


def test_a_new_run_deletes_only_what_a_run_left(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/chapter.txt").write_text("mine")
    delete_extra_files(tmp_path)
    assert (tmp_path / "book/chapter.txt").exists(), "there is no checkpoint"
    (tmp_path / "config.json").write_text("{}")
    delete_extra_files(tmp_path)
    assert not (tmp_path / "book").exists()


HOLD = """
import sys
from pathlib import Path
from accelerate import Accelerator
from modeling_optsg.training.run_lock import lock_run

with lock_run(Accelerator(cpu=True), Path(sys.argv[1]), "here"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_in_one_folder_is_refused(tmp_path):
    folder = tmp_path / "state"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        (folder / "status.json").write_text('{"status": "running"}')
        with pytest.raises(RuntimeError, match=f"Another process is training in {tmp_path}"):
            OPTSGTrainer(args=OPTSGTrainingArguments(str(tmp_path))).run()
        assert json.loads((folder / "status.json").read_text()) == {"status": "running"}
        process.send_signal(signal.SIGKILL)
    with lock_run(Accelerator(cpu=True), folder, "here"):  # the lock of a killed process does not block
        pass
    shutil.rmtree(folder)
