"""Models whose parameters or optimizer states are sharded among processes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modeling_optsg.training import copy_without_text_tying, full_state_dict, make_accelerator, tie_tokens_to_text
from modeling_optsg.training.processes import prepare_model, shard_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_has_the_same_gradients_and_copies(process_group, make_model, tiny_processor):
    batch = tiny_processor(
        images=[Image.new("RGB", (32, 32), "red")] * 2, titles=["a red square"] * 2, tags=[["red"], ["blue", "square"]]
    )
    models = []
    for is_sharded in (False, True):
        model = make_model(dropout=0.0, attention_dropout=0.0)
        torch.manual_seed(0)
        tie_tokens_to_text(model, tiny_processor, 0.06)
        model = shard_model(model) if is_sharded else model
        model(**batch, decoding="parallel").loss.backward()
        models.append(model)
    whole, sharded = models
    layers = [module for module in sharded.modules() if isinstance(module, FSDPModule)]
    assert {type(layer).__name__.removeprefix("FSDP") for layer in layers} >= {"TransformerLayer", "ViTLayer"}
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    for (name, own), (other, expected) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other and (own.grad is None) == (expected.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad.full_tensor(), expected.grad, msg=name)
    copied = copy_without_text_tying(sharded, full_state_dict(sharded)).state_dict()
    expected = copy_without_text_tying(whole).state_dict()
    assert copied.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.items())


def test_scalar_parameters_cannot_be_sharded(make_model):
    model = make_model()
    model.odd = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="Scalar parameters cannot be sharded: odd"):
        shard_model(model)
    assert not [name for name, parameter in make_model(num_tag_classes=3).named_parameters() if not parameter.ndim]


def fake_accelerator(kind, **plugins):
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**plugins))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fsdp_version": 1}, "fsdp_version: 2"),
        ({"fsdp_version": 2, "activation_checkpointing": True}, "--gradient_checkpointing"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "ram_efficient_loading: false"),
    ],
)
def test_unsupported_settings_of_fsdp_are_refused(make_model, settings, message):
    plugin = FullyShardedDataParallelPlugin(**settings)
    with pytest.raises(ValueError, match=message):
        prepare_model(fake_accelerator(DistributedType.FSDP, fsdp_plugin=plugin), make_model())


def test_unsupported_settings_of_deepspeed_are_refused(make_model, monkeypatch):
    plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="up to stage 2"):
        prepare_model(fake_accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), make_model())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="fp16 with DeepSpeed"):
        make_accelerator("fp16")


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", 1), ("AVX512", 0)])
def test_slow_bfloat16_is_reported(monkeypatch, caplog, capability, expected):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    AcceleratorState._reset_state(True)
    make_accelerator("bf16", cpu=True)
    AcceleratorState._reset_state(True)
    assert caplog.text.count("give --mixed_precision no") == expected


@pytest.mark.slow
def test_two_processes_with_a_sharded_model_learn_like_one(tmp_path):
    program = ROOT / "benchmarks/distributed_strategies_on_cpu.py"
    command = [sys.executable, program, "--steps", "8", "--runs", "fsdp, two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert all(value < 1e-4 for value in found["largest_relative_difference"]["fsdp, two"].values())
    assert found["largest_difference_of_a_weight"]["fsdp, two"] < 1e-5
