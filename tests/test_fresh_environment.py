"""A published checkpoint in an environment with torch and its `requirements.txt` only."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import hub_client
import pytest
from hub_server import Account, HubServer

PROGRAM = """
import importlib.util, json, sys
from transformers import AutoModel, AutoProcessor, pipeline

for package in ("modeling_optsg", "optsg", "datasets", "accelerate", "evaluate"):
    assert importlib.util.find_spec(package) is None, package
name, image, video = sys.argv[1:]
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)
inputs = processor(images=[image, None], videos=[None, video], titles=["bus", "ship wheel"])
tagger = pipeline("tag-generation", model=name, trust_remote_code=True)
examples = [{"image": image, "title": "bus"}, {"video": video, "title": "ship wheel"}]
print(json.dumps([processor.batch_decode(model.generate(**inputs)), tagger(examples, batch_size=2)]))
"""


def make_environment(folder: Path, requirements: Path) -> Path:
    """Make a virtual environment with torch and the requirements, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([python, "-m", "pip", "install", "--quiet", torch, "-r", requirements], check=True)
    return python


@pytest.mark.slow
def test_a_published_checkpoint_needs_only_its_requirements(tmp_path):
    images = hub_client.ROOT / "examples/images"
    with HubServer(tmp_path / "hub", {"hf_writes": Account("ann", ("org",))}).running() as hub:
        client = hub_client.Client(hub.endpoint, tmp_path / "client", "hf_writes")
        try:
            checkpoint = hub_client.ROOT / "checkpoints/optsg-icon-small"
            status, _, error = client("push", checkpoint, "org/optsg-icon-small")
        finally:
            client.close()
        assert status == 0, error
        requirements = tmp_path / "requirements.txt"
        requirements.write_bytes(hub.contents("org/optsg-icon-small")[requirements.name])
        python = make_environment(tmp_path / "venv", requirements)
        environment = hub_client.environment(hub.endpoint, tmp_path / "home", "")
        del environment["PYTHONPATH"]
        command = [python, "-c", PROGRAM, "org/optsg-icon-small", images / "bus.png", images / "ship-wheel.mp4"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    by_model, by_pipeline = json.loads(done.stdout.splitlines()[-1])
    assert all(by_model)
    for tags, others in zip(by_model, by_pipeline, strict=True):
        assert [tag["tag"] for tag in tags] == [tag["label"] for tag in others]
        assert [tag["score"] for tag in tags] == pytest.approx([tag["score"] for tag in others], abs=1e-4)
