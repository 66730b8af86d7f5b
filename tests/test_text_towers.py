"""Any text tower works, or is refused with its name and the reason when the model is built."""

import re

import pytest
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedTokenizerFast

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.training import OPTSGTrainingArguments, build_model, copy_without_text_tying
from modeling_optsg.training.model_building import freeze_text_layers

ROWS = [{"title": "a red square", "tags": ["red", "square"]}, {"title": "a dog", "tags": ["dog"]}]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
HALF = SHAPE | {"intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 32}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
TWO_TOWERS = {"text_config": HALF | IDS, "vision_config": SHAPE | {"intermediate_size": 32, "image_size": 32}}
GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "bos_token_id": 1}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
LLAMA = SHAPE | {"intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 64} | IDS
# Name: configuration, its arguments, class of the tower.
TOWERS = {
    "bert": ("BertConfig", HALF, "BertModel"),
    "roberta": ("RobertaConfig", HALF | {"max_position_embeddings": 64}, "RobertaModel"),
    "CLIP": ("CLIPConfig", TWO_TOWERS, "CLIPTextModel"),
    "siglip": ("SiglipConfig", TWO_TOWERS | {"text_config": HALF | IDS | {"projection_size": 16}}, "SiglipTextModel"),
    "siglip2": (
        "Siglip2Config",
        {
            "text_config": HALF | IDS | {"projection_size": 16},
            "vision_config": SHAPE | {"intermediate_size": 32, "num_patches": 16},
        },
        "Siglip2TextModel",
    ),
    "t5": ("T5Config", T5, "T5EncoderModel"),
    "gpt2": ("GPT2Config", GPT2 | {"eos_token_id": 1}, "GPT2Model"),
    "llama": ("LlamaConfig", LLAMA | {"num_key_value_heads": 2}, "LlamaModel"),
}
SMALL = '{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 4, "dropout": 0.0}'


def train_text_tokenizer(**settings):
    """A byte-level tokenizer, as that of GPT-2, with `<pad>` and `<end>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([row["title"] for row in ROWS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", **settings)


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    """Returns a function that saves a tiny tower and its tokenizer, and returns the folder."""

    def save(name, **settings):
        folder = tmp_path_factory.mktemp(name) / name
        config, values, _ = TOWERS[name]
        torch.manual_seed(0)
        AutoModel.from_config(getattr(transformers, config)(**values)).save_pretrained(folder)
        # Decoders have no padding token, and pad on the left.
        is_decoder = name in ("gpt2", "llama")
        settings = ({"padding_side": "left"} if is_decoder else {"pad_token": "<pad>"}) | settings
        train_text_tokenizer(**settings).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def build(towers, tmp_path):
    PartialState()  # for the loggers

    def run(folder, **more):
        more = {"image_words": "none", "config_overrides": SMALL, "tag_vocab_size": 260} | more
        arguments = OPTSGTrainingArguments(
            str(tmp_path), cache_dir=str(tmp_path), vision_tower=str(towers / "vision"), text_tower=str(folder), **more
        )
        return build_model(arguments, Dataset.from_list(ROWS), Dataset.from_list(ROWS))

    return run


@pytest.mark.parametrize("name", TOWERS)
def test_any_text_tower_works(build, text_tower, name, tmp_path):
    model, processor = build(text_tower(name))
    assert type(model.model.text_tower).__name__ == TOWERS[name][2]
    batch = processor(titles=["a red square", "a dog"], tags=[["red", "square"], ["dog"]])
    loss = model.train()(**batch).loss
    loss.backward()
    assert loss.isfinite() and processor.tokenizer.pad_token_id is not None
    # A saved model computes the same.
    saved = copy_without_text_tying(model).eval()
    saved.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = OPTSGForTagGeneration.from_pretrained(tmp_path / "saved").eval()
    again = OPTSGProcessor.from_pretrained(tmp_path / "saved")
    assert type(loaded.model.text_tower) is type(model.model.text_tower)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        found = loaded(**again(titles=["a red square", "a dog"], tags=[["red", "square"], ["dog"]])).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert loaded.generate(**again(titles=["a dog"]), max_tags=2).sequences.ndim == 3


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_padding_does_not_change_the_features(build, text_tower, name):
    model, processor = build(text_tower(name))
    towers, texts = model.model.eval(), ["a dog", "a red square, a red square and a dog"]
    # The last example has no title.
    batch = processor(images=[None, None, Image.new("RGB", (32, 32))], titles=[*texts, None])
    together = towers.encode_text(batch["input_ids"], batch["attention_mask"])
    assert together.isfinite().all()
    for row, text in enumerate(texts):
        alone = processor(titles=[text])
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(together[row]) - length)
        expected = towers.encode_text(alone["input_ids"])[0]
        torch.testing.assert_close(together[row, :length], expected, atol=1e-5, rtol=1e-4)
        pooled = towers.embed_tags(batch["input_ids"], batch["attention_mask"])[row]
        torch.testing.assert_close(pooled, expected.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TOWERS)
def test_the_upper_layers_of_any_text_tower_can_be_trained(build, text_tower, name):
    tower = build(text_tower(name))[0].model.text_tower
    freeze_text_layers(tower, 1)
    trained = [parameter_name for parameter_name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert trained and {re.search(r"\d", part)[0] for part in trained} == {"2"}


@pytest.mark.parametrize("name, limit", [("bert", 32), ("roberta", 62), ("gpt2", 32), ("llama", 64)])
def test_titles_are_truncated_to_the_positions_of_the_tower(build, text_tower, name, limit):
    model, processor = build(text_tower(name))
    assert processor(titles=["dog " * 200])["input_ids"].shape == (1, limit)
    assert build(text_tower(name, model_max_length=20))[1].tokenizer.model_max_length == 20


def test_t5_has_no_limit(build, text_tower):
    assert build(text_tower("t5"))[1](titles=["dog " * 200])["input_ids"].shape[1] > 200


def test_a_tokenizer_without_any_special_token_is_refused(build, text_tower):
    folder = text_tower("gpt2")
    tokenizer = train_text_tokenizer()
    tokenizer.eos_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"gpt2 has no padding token and no other special token. Set pad_token"):
        build(folder)


def test_a_padding_token_outside_the_vocabulary_is_refused(build, text_tower):
    folder = text_tower("gpt2")
    tokenizer = train_text_tokenizer()
    tokenizer.add_tokens([f"token{number}" for number in range(100)])
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match="The text tower .*gpt2 cannot be used: it cannot encode .* Check .*pad_token"
    ):
        build(folder)


def test_an_image_model_is_not_a_text_tower(towers):
    message = "The text tower .*vision cannot be used: it cannot encode a text .*Use a text encoder such as BERT"
    with pytest.raises(ValueError, match=message):
        OPTSGForTagGeneration.from_vision_text_pretrained(str(towers / "vision"), str(towers / "vision"))


def test_an_encoder_decoder_without_an_encoder_class_is_refused(tmp_path, towers):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
    config = transformers.PegasusConfig(**shape)
    AutoModel.from_config(config).save_pretrained(tmp_path / "pegasus")
    with pytest.raises(ValueError, match="The text tower .*pegasus cannot be used: it cannot encode a text"):
        OPTSGForTagGeneration.from_vision_text_pretrained(str(towers / "vision"), str(tmp_path / "pegasus"))
