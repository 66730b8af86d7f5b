"""`benchmarks/onnx_runner.py`: what it measures, on a tiny checkpoint."""

import sys
from pathlib import Path

import pytest
from image_helpers import noise_image, png

pytest.importorskip("onnxruntime")

from benchmarks import onnx_runner  # noqa: E402

ROOT = Path(__file__).parents[1]


def test_pytorch_of_another_working_tree_tags_batches_in_turn(tiny_checkpoint):
    images, titles = [{"bytes": png(noise_image())}, {"bytes": png(noise_image(30))}], ["a red dog", None]
    here = onnx_runner.timed(onnx_runner.tag_with_pytorch(str(tiny_checkpoint)))
    with onnx_runner.tag_with_tree(ROOT, str(tiny_checkpoint)) as there:
        for size in (2, 1):
            found, seconds = there(images[:size], titles[:size])
            expected, own_seconds = here(images[:size], titles[:size])
            assert [[tag["tag"] for tag in tags] for tags in found] == [
                [tag["tag"] for tag in tags] for tags in expected
            ]
            assert any(found) and seconds > 0 and own_seconds > 0


def test_commands_run_with_the_code_of_their_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_runner, "STARTS", 3)
    (tmp_path / "optsg.py").write_text("open('starts.txt', 'a').write('x'); sum(range(9_000_000))", encoding="utf-8")
    commands = {"own": ([sys.executable, "-m", "optsg"], tmp_path), "nothing": ([sys.executable, "-c", ""], ROOT)}
    found = onnx_runner.cold_starts(commands)
    assert found["own"] > found["nothing"] > 0 and (tmp_path / "starts.txt").read_text(encoding="utf-8") == "xxx"
