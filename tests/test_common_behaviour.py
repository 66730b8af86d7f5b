"""Every model class behaves as a model of transformers does. The run ends with a matrix of classes and behaviours."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from torch import nn

from modeling_optsg import OPTSGDataCollator
from modeling_optsg.base_models import OPTSGModel
from modeling_optsg.baselines.configuration import KNNConfig
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.configuration_optsg import OPTSGConfig
from modeling_optsg.data.collator import TagTable
from modeling_optsg.layers import TransformerLayer

TAG_SETS = [["red", "square"], ["blue"], ["red", "colour", "e-mail"], ["创意美食"]]
ALL_TAGS = sorted({tag for tags in TAG_SETS for tag in tags})
TITLES = ["a red square", "blue", None, "dog e-mail"]
INPUTS = ("pixel_values", "frame_mask", "input_ids", "attention_mask", "book_input_ids", "book_mask")
NUM_BOOK_VALUES = 3
# Name of a class -> its model type, and its own settings.
CLASSES = {
    "OPTSGModel": (None, {}),
    "OP-TSG": ("op-tsg", {}),
    "OP-TSG, classifier": ("op-tsg", {"num_tag_classes": len(ALL_TAGS)}),
    "OP-TSG, book reader": ("op-tsg", {"num_tag_classes": len(ALL_TAGS), "book_evidence_size": NUM_BOOK_VALUES}),
    "OP-TSG, image words": (
        "op-tsg",
        {
            "num_tag_classes": len(ALL_TAGS),
            "image_word_labels": ["red", "a dog", "mail"],
            "image_word_feature_size": 16,
            "image_word_pooling": "mean",
            "num_image_words": 2,
        },
    ),
    "Model F": ("model-f", {"num_tag_classes": len(ALL_TAGS)}),
    "Model G": ("model-g", {"num_tag_classes": len(ALL_TAGS)}),
    "ASY": ("asy", {"num_tag_classes": len(ALL_TAGS)}),
    "Open-Book": ("open-book", {"num_book_examples": 2, "max_sequence_tokens": 16}),
    "sequence": ("sequence", {"max_sequence_tokens": 16}),
    "kNN": ("knn", {"num_tag_classes": len(ALL_TAGS), "num_examples": 4, "max_tags_per_example": 3}),
}
NO_LOSS = {name: "has no loss" for name in ("OPTSGModel", "kNN")}
NO_TOKENS = {name: "has no embeddings of tag tokens" for name in ("OPTSGModel", "Model G", "ASY", "kNN")}
BEHAVIOURS = {}


def behaviour(name, **not_applicable):
    """Register a check as a behaviour. `not_applicable` maps classes to reasons."""

    def register(check):
        BEHAVIOURS[name] = (check, not_applicable)
        return check

    return register


@pytest.fixture(scope="module")
def table(tag_tokenizer):
    ids = tag_tokenizer(ALL_TAGS, add_special_tokens=False)["input_ids"]
    return TagTable(ALL_TAGS, ids, torch.randn(len(ALL_TAGS), 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def batch(tiny_processor, table, tag_tokenizer):
    """A training batch: images with titles, a title, an image, and a video of two frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    seen = [{"image": images[0]}, {}, {"image": images[1]}, {"video": images[2:4]}]
    books = tag_tokenizer(["red blue", "blue red", "colour dog", "square mail"], add_special_tokens=False)["input_ids"]
    parts = zip(seen, TITLES, TAG_SETS, books, strict=True)
    rows = [part | {"title": title, "tags": tags, "book_input_ids": book} for part, title, tags, book in parts]
    return OPTSGDataCollator(tiny_processor, table)(rows)


@pytest.fixture(scope="module")
def make(tower_configs, tag_tokenizer, table):
    """Makes a model of one of `CLASSES`."""

    def make(name):
        model_type, own = CLASSES[name]
        model_class = OPTSGModel if model_type is None else MODEL_TYPES[model_type].model
        config_class = OPTSGConfig if model_type is None else model_class.config_class
        settings = {"vision_config": tower_configs["vit"], "text_config": tower_configs["bert"], "hidden_size": 16}
        settings |= {"num_attention_heads": 2, "intermediate_size": 32, "num_encoder_layers": 1, "num_prompts": 4}
        settings |= {"num_prompt_layers": 1, "num_decoder_layers": 1, "max_frames": 4, "max_tag_tokens": 8}
        settings |= {"alignment_size": 8, "tag_vocab_size": len(tag_tokenizer), "initializer_range": 0.3}
        settings |= {} if model_type is None else dict(MODEL_TYPES[model_type].config)
        torch.manual_seed(0)
        model = model_class(config_class(**copy.deepcopy(settings | own))).eval()
        if model.config.num_tag_classes:
            model.set_label_vocabulary(table.input_ids, [9, 7, 6, 3, 1, 1])
        if model.config.image_word_labels:
            nn.init.normal_(model.model.image_words.text_features)
            # No image is familiar, so images without titles are tagged by their words.
            model.model.multimodal_encoder.evidence_pooler.standardizer.half_familiar_distance.fill_(1e-20)
        if isinstance(model.config, KNNConfig):
            classes = [[table.index[tag] for tag in tags] for tags in TAG_SETS]
            model.fit(torch.randn(4, 16), torch.randn(4, 16), classes)
        return model

    return make


def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name in INPUTS}


@torch.no_grad()
def results(model, inputs):
    """What a model computes: its order prompts, or its tags and the probability that it gives each."""
    if isinstance(model, OPTSGModel):
        outputs = model(**inputs)
        return {"order_prompts": outputs.order_prompts, "memory": outputs.memory * outputs.memory_mask[..., None]}
    more = {"output_evidence": True} if getattr(model, "book_reader", None) else {}
    outputs = model.generate(**inputs, **more)
    found = {"sequences": outputs.sequences, "tag_scores": outputs.tag_scores}
    if more:
        generator = torch.Generator().manual_seed(0)
        candidates = torch.randint(5, 300, (len(inputs["input_ids"]), 2, 3), generator=generator)
        evidence = torch.rand(*candidates.shape[:2], NUM_BOOK_VALUES, generator=generator)
        own = (outputs.order_prompts, outputs.memory, outputs.memory_mask, candidates, evidence)
        found["pointers"] = model.read_book(*own).exp()
    return found


def assert_same(found, expected, rtol=1e-3, atol=1e-4):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


def gradients(model, batch):
    model.zero_grad()
    model.train()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@behaviour("save and load")
def saves_and_loads(model, batch, folder):
    expected = results(model, inputs_of(batch))
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(results(loaded, inputs_of(batch)), expected, rtol=0, atol=0)


def computes_in(dtype, model, batch, folder):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=dtype).eval()
    assert loaded.dtype == dtype
    found = results(loaded, inputs_of(batch))
    assert all(tensor.isfinite().all() for tensor in found.values())
    if not isinstance(model, tuple(NO_LOSS_CLASSES)):
        assert loaded(**batch).loss.isfinite()


@behaviour("bfloat16")
def computes_in_bfloat16(model, batch, folder):
    computes_in(torch.bfloat16, model, batch, folder)


@behaviour("float16")
def computes_in_float16(model, batch, folder):
    computes_in(torch.float16, model, batch, folder)


@behaviour("sdpa = eager", kNN="has no attention of its own")
def sdpa_equals_eager(model, batch, folder):
    assert model.config._attn_implementation == "sdpa"
    expected = results(model, inputs_of(batch))
    model.set_attn_implementation("eager")
    assert_same(results(model, inputs_of(batch)), expected)


@behaviour("gradient checkpointing", **NO_LOSS)
def checkpoints_gradients(model, batch, folder):
    expected = gradients(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    assert all(layer.gradient_checkpointing for layer in layers)
    found = gradients(model, batch)
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


@behaviour("a batch = its examples")
def batches_equal_examples(model, batch, folder):
    inputs = inputs_of(batch)
    together = results(model, inputs)
    for index in range(len(TITLES)):
        alone = results(model, {name: value[index : index + 1] for name, value in inputs.items()})
        for name in alone.keys() - {"sequences", "pointers"}:
            own = together[name][index]
            length = alone[name].shape[1]
            torch.testing.assert_close(own[:length], alone[name][0], rtol=1e-3, atol=1e-4)
            assert own[length:].eq(0).all()


@behaviour("resize", **NO_TOKENS)
def resizes(model, batch, folder):
    size, text_size = model.config.tag_vocab_size, model.config.text_config.vocab_size
    before = copy.deepcopy(model)
    embeddings = model.resize_token_embeddings(size + 6, mean_resizing=False)
    assert model.config.tag_vocab_size == embeddings.num_embeddings == model.lm_head.out_features == size + 6
    assert embeddings is model.get_input_embeddings() and type(model.lm_head) is type(before.lm_head)
    assert model.config.text_config.vocab_size == text_size
    hidden_states = torch.randn(3, 16)
    torch.testing.assert_close(model.token_logits(hidden_states)[:, :size], before.token_logits(hidden_states))
    same = {name for name in before.state_dict() if "token_embeddings" not in name and "lm_head" not in name}
    assert all(torch.equal(model.state_dict()[name], before.state_dict()[name]) for name in same)
    model(**batch).loss.backward()
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert_same(results(loaded, inputs_of(batch)), results(model, inputs_of(batch)))
    assert model.resize_token_embeddings(size).num_embeddings == size
    assert_same(results(model, inputs_of(batch)), results(before, inputs_of(batch)))
    with pytest.raises(ValueError, match=r"new_num_tokens=1 would remove token \d+"):
        model.resize_token_embeddings(1)


@behaviour("tied weights", **NO_TOKENS)
def ties_weights(model, batch, folder):
    model.save_pretrained(folder)
    for own in (model, copy.deepcopy(model), type(model).from_pretrained(folder)):
        assert own.lm_head.weight is own.tag_decoder.token_embeddings.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tag_decoder.token_embeddings.weight" in names and "lm_head.weight" not in names


@behaviour("meta device")
def starts_on_the_meta_device(model, batch, folder):
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    fresh = type(model)(copy.deepcopy(model.config)).state_dict()
    buffers = {name for name, _ in model.named_buffers()} & fresh.keys()
    # Weights that a checkpoint lacks are initialised as those of a new model, not with what the memory contains.
    loaded = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict={})
    for name, tensor in loaded.state_dict().items():
        expected = fresh[name]
        assert tensor.shape == expected.shape and tensor.isfinite().all(), name
        if name in buffers or expected.unique().numel() == 1:
            assert torch.equal(tensor, expected), name
        else:
            assert 0.5 < tensor.std() / expected.std() < 2, name


@behaviour("determinism")
def is_deterministic(model, batch, folder):
    model.train()
    first, second = (results(model.eval(), inputs_of(batch)) for _ in range(2))
    assert_same(second, first, rtol=0, atol=0)
    if not isinstance(model, tuple(NO_LOSS_CLASSES)):
        assert torch.equal(model(**batch).loss, model(**batch).loss)


@behaviour("CPU offload")
def offloads_to_memory(model, batch, folder):
    expected = results(model, inputs_of(batch))
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(results(model, inputs_of(batch)), expected, rtol=1e-5, atol=1e-6)


@behaviour("disk offload")
def offloads_to_disk(model, batch, folder):
    expected = results(model, inputs_of(batch))
    model.save_pretrained(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    settings = {"device_map": "auto", "max_memory": {"cpu": size // 3}, "offload_folder": folder / "offloaded"}
    loaded = type(model).from_pretrained(folder, **settings)
    assert "disk" in loaded.hf_device_map.values()
    assert_same(results(loaded, inputs_of(batch)), expected, rtol=1e-5, atol=1e-6)
    loaded = type(model).from_pretrained(folder, **settings, offload_buffers=True)
    if any(buffer.is_meta for buffer in loaded.buffers()):
        with pytest.raises(ValueError, match="offload_buffers=False"):
            results(loaded, inputs_of(batch))


@behaviour("dynamic quantisation")
def is_quantised_dynamically(model, batch, folder):
    model = quantised(model)
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in model.modules())
    found = results(model, inputs_of(batch))
    assert all(tensor.isfinite().all() for tensor in found.values())


def prepared(model):
    return copy.deepcopy(model).prepare_for_inference()


@behaviour("prepared")
def is_prepared_for_inference(model, batch, folder):
    inputs = inputs_of(batch)
    expected, state = results(model, inputs), model.state_dict()
    own = prepared(model)
    assert_same(results(own, inputs), expected)
    own.save_pretrained(folder)
    assert_same(type(model).from_pretrained(folder).state_dict(), state, rtol=0, atol=0)
    assert_same(results(copy.deepcopy(own), inputs), expected)
    offloaded = prepared(model)
    cpu_offload(offloaded, torch.device("cpu"))
    assert_same(results(offloaded, inputs), expected)
    assert_same(results(quantised(prepared(model)), inputs), results(quantised(copy.deepcopy(model)), inputs))
    if not isinstance(model, tuple(NO_LOSS_CLASSES)):
        assert_same(gradients(own, batch), gradients(model, batch), rtol=1e-4, atol=1e-5)


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@behaviour("export")
@torch.no_grad()
def exports(model, batch, folder):
    inputs = {name: batch[name] for name in INPUTS[:4]}
    # These two compute only a loss in `forward`.
    program = Program(model.model if "open_book" in model.config.model_type else model)
    sizes = {name: {0: torch.export.Dim("batch", max=64)} for name in inputs}
    exported = torch.export.export(program, (), inputs, dynamic_shapes=sizes).module()
    for size in (len(TITLES), 3):
        own = {name: tensor[:size] for name, tensor in inputs.items()}
        found, expected = exported(**own), program(**own)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            for own_tensor, other in zip(*map(tensors_of, (found[name], tensor)), strict=True):
                torch.testing.assert_close(own_tensor, other, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


class Program(nn.Module):
    """Names the inputs, which some classes accept as `**inputs`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, frame_mask, input_ids, attention_mask):
        return self.model(
            pixel_values=pixel_values, frame_mask=frame_mask, input_ids=input_ids, attention_mask=attention_mask
        )


def tensors_of(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@behaviour("LoRA", **NO_LOSS)
def trains_adapters(model, batch, folder):
    peft = pytest.importorskip("peft")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The book reader is trained by itself.
    own = [name for name in layers if not name.startswith(("model.", "book_reader."))]
    assert own
    adapted = peft.get_peft_model(prepared(model), peft.LoraConfig(r=2, target_modules=own))
    found = gradients(adapted, batch)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    # The first product is zero until the second one is trained.
    assert trained and {name for name in trained if "lora_B" in name} <= found.keys()
    without = [name for name in trained if "lora_B" in name and not found[name].any()]
    assert not without
    output_layers = [name for name in ("lm_head", "tag_classifier", "classifier") if getattr(model, name, None)]
    saved = peft.LoraConfig(r=2, target_modules=["out_proj"], modules_to_save=output_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapted = peft.get_peft_model(model, saved)
    found = gradients(adapted, batch)
    for name in output_layers:
        parts = {key for key in found if f"{name}.modules_to_save" in key}
        assert parts and all(found[key].ne(0).any() for key in parts), name


NO_LOSS_CLASSES = (OPTSGModel, MODEL_TYPES["knn"].model)
# The others take long and export a part of the program of OP-TSG, or a little more.
EXPORTED = ("OP-TSG", "kNN")
CASES = [
    pytest.param(
        name,
        behaviour,
        id=f"{behaviour}-{name}",
        marks=[pytest.mark.slow] if behaviour == "export" and name not in EXPORTED else [],
    )
    for behaviour in BEHAVIOURS
    for name in CLASSES
]


@pytest.mark.parametrize(("name", "behaviour"), CASES)
def test_a_class_behaves(make, batch, tmp_path, record_property, name, behaviour):
    record_property("matrix", [name, behaviour])
    check, not_applicable = BEHAVIOURS[behaviour]
    if name in not_applicable:
        pytest.skip(not_applicable[name])
    model = make(name)
    batch = dict(batch)
    if getattr(model, "copier", None) is None:
        del batch["book_input_ids"], batch["book_mask"]
    check(model, batch, tmp_path)
