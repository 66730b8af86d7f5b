"""A model whose parameters, or optimiser, are divided among processes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modeling_optsg.training import make_accelerator, prepare_model, shard_model, whole_state
from modeling_optsg.training.text_tied_embeddings import plain_copy, tie_tokens_to_text

ROOT = Path(__file__).parents[1]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_divided_model_learns_as_a_whole_one_and_is_copied_as_one(alone, make_model, tiny_processor):
    batch = tiny_processor(
        images=[Image.new("RGB", (32, 32), "red")] * 2, titles=["a red square"] * 2, tags=[["red"], ["blue", "square"]]
    )
    models = []
    for divided in (False, True):
        model = make_model(dropout=0.0, attention_dropout=0.0)
        torch.manual_seed(0)
        tie_tokens_to_text(model, tiny_processor, 0.06)
        model = shard_model(model) if divided else model
        model(**batch, decoding="parallel").loss.backward()
        models.append(model)
    whole, divided = models
    layers = [module for module in divided.modules() if isinstance(module, FSDPModule)]
    assert {type(layer).__name__.removeprefix("FSDP") for layer in layers} >= {"TransformerLayer", "ViTLayer"}
    assert all(isinstance(parameter, DTensor) for parameter in divided.parameters())
    for (name, own), (other, expected) in zip(divided.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other and (own.grad is None) == (expected.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad.full_tensor(), expected.grad, msg=name)
    copied, expected = plain_copy(divided, whole_state(divided)).state_dict(), plain_copy(whole).state_dict()
    assert copied.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.items())


def test_a_parameter_without_a_dimension_cannot_be_divided(make_model):
    model = make_model()
    model.odd = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="odd cannot be divided among processes"):
        shard_model(model)
    assert not [name for name, parameter in make_model(num_tag_classes=3).named_parameters() if not parameter.ndim]


def pretended(kind, **plugins):
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**plugins))


def test_what_is_not_supported_is_refused(make_model, monkeypatch):
    plugins = {
        "fsdp_version: 2": FullyShardedDataParallelPlugin(fsdp_version=1),
        "--gradient_checkpointing": FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True),
        "ram_efficient_loading: false": FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True),
    }
    for said, plugin in plugins.items():
        with pytest.raises(ValueError, match=said):
            prepare_model(pretended(DistributedType.FSDP, fsdp_plugin=plugin), make_model())
    with pytest.raises(ValueError, match="stages 0 to 2"):
        plugin = SimpleNamespace(zero_stage=3)
        prepare_model(pretended(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), make_model())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="fp16 with DeepSpeed"):
        make_accelerator("fp16")


def test_two_processes_with_a_half_each_learn_as_one(tmp_path):
    program = [
        sys.executable,
        ROOT / "benchmarks/distributed_strategies_on_cpu.py",
        "--steps",
        "8",
        "--runs",
        "fsdp, two",
    ]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert all(value < 1e-4 for value in found["largest_relative_difference"]["fsdp, two"].values())
    assert found["largest_difference_of_a_weight"]["fsdp, two"] < 1e-5
