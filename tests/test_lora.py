"""LoRA adapters of the towers: added, trained, merged into the checkpoint, saved, and resumed."""

import importlib.util
import json
import os
import signal

import pytest
import torch
from colour_folder import write_colour_folder
from transformers import ConvNextConfig, GPT2Config, ResNetConfig, TrainerCallback, ViTConfig

from modeling_optsg import OPTSGForTagGeneration, OPTSGTrainer, OPTSGTrainingArguments
from modeling_optsg.hub.model_card import write_training_card
from modeling_optsg.hub.push_checkpoint import read_checkpoint
from modeling_optsg.towers import HALVES, build_tower, load_tower
from modeling_optsg.training import copy_without_text_tying, lora
from modeling_optsg.training.interruption import Interrupted

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)
from peft import PeftModel

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 4}


def randomize_adapters(model):
    """Give the adapters weights that change the output."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


# Layers with adapters


TOWERS = {
    "vit": ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
}


@pytest.mark.parametrize("name", TOWERS)
def test_linear_layers_get_adapters_or_else_convolutions(name):
    tower = build_tower("vision", TOWERS[name])
    kinds = {type(tower.get_submodule(layer)) for layer in lora.adaptable_layers(tower)}
    assert kinds == {torch.nn.Conv2d if name == "resnet" else torch.nn.Linear}
    assert not any("pooler" in layer for layer in lora.adaptable_layers(tower))


def test_the_layers_of_gpt2_get_adapters():
    tower = build_tower("text", GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert lora.adaptable_layers(tower) == [f"h.0.{name}" for name in names]


def test_only_trained_layers_get_adapters(make_model):
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    lora.add_adapters(model, rank=2, seed=0)
    assert not hasattr(model.model.vision_tower, "peft_config")
    trained = {name for name, parameter in model.model.text_tower.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert any(parameter.requires_grad for parameter in model.tag_decoder.parameters()), "the rest is trained"


def test_towers_without_layers_to_adapt_are_refused(make_model):
    model = make_model()
    for name in ("vision_tower", "text_tower"):
        getattr(model.model, name).requires_grad_(False)
    with pytest.raises(ValueError, match="no tower is trained"):
        lora.check_adapters(model)
    model.model.vision_tower.embeddings.requires_grad_(True)
    for module in model.model.vision_tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.groups = 2
    with pytest.raises(ValueError, match=r"the vision tower \(vit\) has no layers to adapt"):
        lora.check_adapters(model)


def test_without_peft_a_message_says_what_to_install(make_model, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "optsg\[lora\]"'):
        lora.check_adapters(make_model())


# Merging


@pytest.mark.parametrize("vision", ["vit", "efficientnet_lite"])
def test_merged_weights_compute_what_the_adapters_compute(make_model, vision):
    model = make_model(vision)
    for module in model.model.vision_tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # A normalisation that changes its input: adapters must be inside.
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    pixels, ids = torch.rand(2, 1, 3, 32, 32), torch.tensor([[2, 5, 3], [2, 6, 3]])
    before = model.model.encode_frames(pixels).frame_features, model.model.encode_text(ids)
    names = set(model.state_dict())
    lora.add_adapters(model, rank=2, seed=0)
    torch.testing.assert_close(model.model.encode_frames(pixels).frame_features, before[0])
    randomize_adapters(model)
    expected = model.model.encode_frames(pixels).frame_features, model.model.encode_text(ids)
    state = torch.get_rng_state()
    copied = copy_without_text_tying(model)
    assert torch.equal(torch.get_rng_state(), state), "the training does not notice the copy"
    assert set(copied.state_dict()) == names and not lora.adapter_states(copied)
    found = copied.model.encode_frames(pixels).frame_features, copied.model.encode_text(ids)
    for own, wanted, first in zip(found, expected, before, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)
        assert (wanted - first).abs().max() > 0.01
    assert set(lora.adapter_states(model)) == {"vision_tower", "text_tower"}, "the model in training is not changed"


# Training


class StopAfterStep(TrainerCallback):
    """Asks the training to stop after a step, as a scheduler does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_lora_without_other_arguments_adapts_both_towers():
    args = OPTSGTrainingArguments("out", lora_rank=4)
    assert (args.train_vision_tower, args.train_text_layers, args.tower_learning_rate) == (True, -1, 2e-4)
    args = OPTSGTrainingArguments("out", lora_rank=4, train_text_layers=2, tower_learning_rate=1e-3)
    assert (args.train_vision_tower, args.train_text_layers, args.tower_learning_rate) == (False, 2, 1e-3)
    assert not OPTSGTrainingArguments("out", lora_rank=4, vision_tower="none").train_vision_tower
    assert OPTSGTrainingArguments("out").tower_learning_rate == 2e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": -1}, "must not be negative"),
        ({"save_adapter": True}, "--save_adapter needs --lora_rank"),
        ({"lora_rank": 4, "model_type": "knn"}, "knn needs frozen towers; it cannot be combined with --lora_rank"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OPTSGTrainingArguments("out", **arguments)


@pytest.fixture(scope="module")
def arguments(towers, tmp_path_factory):
    """Makes the arguments of a short training run with an output folder."""
    root = tmp_path_factory.mktemp("lora")
    write_colour_folder(root)
    more = {"vision_tower": str(towers / "vision"), "text_tower": str(towers / "text"), "image_words": "none"}
    more |= {"tag_vocab_size": 260, "max_tag_tokens": 12, "config_overrides": json.dumps(SMALL), "num_train_epochs": 3}
    more |= {"train_batch_size": 8, "eval_steps": 100, "num_negatives": 0, "lora_rank": 2, "tower_learning_rate": 1e-2}
    more |= {"dataset": str(root), "cache_dir": str(root / "cache"), "save_adapter": True, "save_steps": 1}
    return lambda output_dir, **others: OPTSGTrainingArguments(str(output_dir), **more | others)


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """The output folder of a finished training run with adapters."""
    folder = tmp_path_factory.mktemp("run")
    OPTSGTrainer(args=arguments(folder)).train()
    return folder


def test_the_checkpoint_needs_no_peft_and_contains_the_adapters(run, towers):
    model = OPTSGForTagGeneration.from_pretrained(run)
    assert not any("lora" in name for name in model.state_dict())
    for half in HALVES:
        base, adapted = load_tower(half, str(towers / half)), load_tower(half, str(towers / half))
        PeftModel.from_pretrained(adapted, run / "adapter" / f"{half}_tower").merge_and_unload()
        trained = getattr(model.model, f"{half}_tower").state_dict()
        for name, weight in adapted.state_dict().items():
            torch.testing.assert_close(trained[name], weight, msg=f"{half} {name}")
        assert any(not torch.equal(trained[name], weight) for name, weight in base.state_dict().items())
        text = (run / f"adapter/{half}_tower/adapter_config.json").read_text()
        assert json.loads(text)["base_model_name_or_path"] is None, "a local path would be published"


def test_adapters_are_published_with_the_checkpoint(run):
    write_training_card(run, "me/lora")
    assert "(trained with LoRA)" in (run / "README.md").read_text()
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {f"adapter/{half}_tower/{name}" for half in HALVES for name in names}
    assert files <= set(read_checkpoint(run).files.names)


def test_the_summary_counts_the_trained_parameters(run):
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["arguments"]["lora_rank"] == 2
    model = OPTSGForTagGeneration.from_pretrained(run)
    rest = sum(p.numel() for name, p in model.named_parameters() if "_tower." not in name)
    # The towers of one layer have more weights than their adapters.
    assert rest < summary["trained_parameters"] < summary["parameters"]


def test_a_resumed_run_ends_with_the_same_weights(run, arguments, tmp_path):
    output = tmp_path / "run"
    trainer = OPTSGTrainer(args=arguments(output))
    trainer.add_callback(StopAfterStep(3))
    with pytest.raises(Interrupted):
        trainer.train()
    state = torch.load(next((output / "state").glob("step-*/pytorch_model.bin")), weights_only=True)
    assert any(".lora_" in name for name in state) and not any("base_layer" in name for name in state)
    OPTSGTrainer(args=arguments(output)).train()
    expected, found = (OPTSGForTagGeneration.from_pretrained(folder).state_dict() for folder in (run, output))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
