"""Fine-tuning a checkpoint: arguments that contradict it, and tags in another script."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, train_tag_tokenizer
from modeling_optsg.training import OPTSGTrainingArguments, build_model, copy_without_text_tying, parse_arguments
from modeling_optsg.training.data import without_untrainable_tags
from modeling_optsg.training.new_tag_tokenizer import TagCoverage, train_better_tag_tokenizer
from modeling_optsg.training.text_tied_embeddings import tie_tokens_to_text

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "checkpoints/optsg-icon-small"
CYRILLIC = ["закат", "море", "достопримечательность", "путешествие", "ночное небо", "собака", "автомобиль", "дерево"]
CHINESE = ["日落", "大海", "自然风光摄影", "旅行", "夜晚的星空", "狗", "红色的汽车", "家常菜做法教程"]
ENGLISH = ["sunset", "sea", "night sky", "dog", "red car", "tree", "travel", "café"]


def rows_of(tags):
    """Two examples with four tags each."""
    return Dataset.from_list([{"title": "a red square", "tags": tags[:4]}, {"title": "a dog", "tags": tags[4:]}])


@pytest.fixture
def fine_tune(tiny_checkpoint, tmp_path):
    PartialState()  # for the loggers

    def run(tags=("red", "blue", "colour", "square", "e-mail"), checkpoint=tiny_checkpoint, **more):
        arguments = OPTSGTrainingArguments(str(tmp_path), cache_dir=str(tmp_path), checkpoint=str(checkpoint), **more)
        rows = rows_of(list(tags))
        return build_model(arguments, rows, rows)

    return run


# Arguments


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("vision_tower", "google/vit", "--vision_tower google/vit (the checkpoint has its own)"),
        ("text_tower", "bert-base-uncased", "--text_tower bert-base-uncased (the checkpoint has its own)"),
        ("image_size", 48, "--image_size 48 (the checkpoint has 32)"),
        ("num_frames", 8, "--num_frames 8 (the checkpoint has 4)"),
        ("max_tag_tokens", 16, "--max_tag_tokens 16 (the checkpoint has 8)"),
        ("tag_vocab_size", 6000, "--tag_vocab_size 6000 (the checkpoint has 300)"),
        ("image_words", "auto", "--image_words auto (the checkpoint has none)"),
    ],
)
def test_an_argument_that_contradicts_the_checkpoint_is_refused(fine_tune, tiny_checkpoint, name, value, message):
    with pytest.raises(ValueError, match=re.escape(f"contradict --checkpoint {tiny_checkpoint}: {message}. Leave")):
        fine_tune(**{name: value})


def test_arguments_that_agree_with_the_checkpoint_are_accepted(fine_tune):
    same = {"image_size": 32, "num_frames": 4, "max_tag_tokens": 8, "tag_vocab_size": 300, "image_words": "none"}
    model, processor = fine_tune(**same)
    assert processor.num_frames == 4 and model.config.max_tag_tokens == 8


def test_all_contradictions_are_named(fine_tune):
    with pytest.raises(ValueError, match=r"--num_frames 2 .*, --image_size 64 .*, --vision_tower none"):
        fine_tune(num_frames=2, image_size=64, vision_tower="none")


def test_the_names_of_the_towers_are_those_of_the_training(fine_tune, tiny_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    recorded = {"vision_tower": "google/vit", "text_tower": "bert", "tag_vocab_size": 6000, "image_words": "auto"}
    (checkpoint / "training_summary.json").write_text(json.dumps({"arguments": recorded}))
    fine_tune(checkpoint=checkpoint, **recorded)
    with pytest.raises(ValueError, match=r"--vision_tower other \(the checkpoint has google/vit\)\. Leave"):
        fine_tune(checkpoint=checkpoint, **recorded | {"vision_tower": "other"})


def test_the_config_of_the_shipped_checkpoint_agrees_with_it(fine_tune):
    config = ROOT / "examples/configs/optsg-icon-small.json"
    command = ["--config", str(config), "--output_dir", "x", "--checkpoint", str(SHIPPED)]
    args = parse_arguments(command)
    names = ("vision_tower", "text_tower", "image_size", "tag_vocab_size", "num_frames", "max_tag_tokens")
    fine_tune(ENGLISH, SHIPPED, **{name: getattr(args, name) for name in names})
    assert args.num_frames is None, "not given"


def test_defaults_apply_only_without_a_checkpoint():
    new = OPTSGTrainingArguments("run")
    assert (new.vision_tower, new.text_tower, new.image_words) == ("efficientnet-lite0", "all-minilm-l6-v2", "auto")
    assert (new.num_frames, new.max_tag_tokens, new.tag_vocab_size, new.image_size) == (8, 16, 6000, None)
    tuned = OPTSGTrainingArguments("run", checkpoint="runs/a", num_frames=4)
    assert (tuned.vision_tower, tuned.max_tag_tokens, tuned.num_frames) == (None, None, 4)


def test_the_towers_of_a_checkpoint_are_run(fine_tune, tiny_checkpoint, tmp_path):
    checkpoint = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, checkpoint)
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 32}
    settings["image_processor"] |= {"do_center_crop": False, "image_processor_type": "CLIPImageProcessor"}
    (checkpoint / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match="vision tower of --checkpoint .*broken gives the shapes .* to a wide and a tall"
    ):
        fine_tune(checkpoint=checkpoint)


# Tags in another script


def test_the_coverage_of_a_tag_tokenizer_is_measured():
    tokenizer = train_tag_tokenizer(["sea", "night sky"] * 9, 300)
    assert TagCoverage.measure(tokenizer, ["sea", "night sky"], 16) == TagCoverage(0.0, 0.0)
    # "море" has 8 bytes, "é" has 2.
    assert TagCoverage.measure(tokenizer, ["sea", "море", "é", "night sky"], 8) == TagCoverage(0.25, 0.5)
    # Spelled letter by letter, but no letter is unknown.
    assert TagCoverage.measure(tokenizer, ["sea", "zebra zebra zebra"], 8) == TagCoverage(0.5, 0.0)


@pytest.mark.parametrize("tags", [CYRILLIC, CHINESE])
def test_tags_in_another_script_get_a_new_tag_tokenizer(fine_tune, tags, caplog):
    with caplog.at_level("INFO"):
        model, processor = fine_tune(tags, SHIPPED)
    assert f"does not fit {len(tags)} training tags" in caplog.text and "100% have characters" in caplog.text
    old = OPTSGProcessor.from_pretrained(SHIPPED)
    lost = sum(len(ids) > 16 for ids in old.tag_tokenizer(tags)["input_ids"])
    assert lost >= 2
    kept = without_untrainable_tags(rows_of(tags), processor)
    assert sorted(tag for own in kept["tags"] for tag in own) == sorted(tags)
    assert len(processor.tag_tokenizer) == model.config.tag_vocab_size == model.lm_head.out_features
    assert model.lm_head.in_features == 256 and model.config.num_tag_classes == len(tags)
    assert set(tags) == set(processor.label_vocabulary)
    # Tokens of the text tower's alphabet start at their text features.
    tie = model.tag_decoder.token_embeddings.parametrizations.weight
    assert tie[0].features.any(dim=1).any() and tie.original[~tie[0].features.any(dim=1)].std() > 0.01


@pytest.mark.parametrize("tags", [CYRILLIC, CHINESE])
def test_tags_in_another_script_can_be_generated(fine_tune, make_model, tiny_processor, tmp_path, tags):
    no_dropout = dict.fromkeys(("dropout", "modality_dropout", "pooled_title_ratio"), 0.0)
    wide = {"hidden_size": 48, "intermediate_size": 96, "use_tag_classifier": False, "parallel_ratio": 1.0}
    wide |= {"initializer_range": 0.1}
    make_model(**wide, **no_dropout).save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    model, processor = fine_tune(tags, tmp_path / "checkpoint", tag_vocab_size=400)
    titles = ["a red square", "a dog", "blue mail", "green e - mail"]
    batch = processor(titles=titles, tags=[tags[2 * number : 2 * number + 2] for number in range(4)])
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    copy_without_text_tying(model).save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    model = OPTSGForTagGeneration.from_pretrained(tmp_path / "tuned").eval()
    processor = OPTSGProcessor.from_pretrained(tmp_path / "tuned")
    predicted = processor.batch_decode(model.generate(**processor(titles=titles), pad_bias=-2.0))
    found = [{tag["tag"] for tag in own} & set(tags[2 * i : 2 * i + 2]) for i, own in enumerate(predicted)]
    # So few steps do not suffice for all of them.
    assert all(found) and sum(map(len, found)) >= 6, found
    assert not any(tag["novel"] for own in predicted for tag in own if tag["tag"] in tags)


def test_tags_in_the_same_script_keep_the_tag_tokenizer(fine_tune, caplog):
    model, processor = fine_tune(ENGLISH, SHIPPED)
    assert processor.tag_tokenizer.get_vocab() == OPTSGProcessor.from_pretrained(SHIPPED).tag_tokenizer.get_vocab()
    assert model.config.tag_vocab_size == 10000


def test_a_tag_tokenizer_that_is_not_better_is_not_used(tiny_processor):
    PartialState()
    # Whole sentences are too long for any tag tokenizer of this size.
    sentences = [f"{number} " + "abcdefghij klmnopqrst uvwxyz"[number:] * 3 for number in range(20)]
    coverage = TagCoverage.measure(tiny_processor.tag_tokenizer, sentences, 8)
    assert coverage.long == 1.0 and not coverage.is_sufficient
    assert train_better_tag_tokenizer(tiny_processor, sentences, 260) is None


@pytest.mark.parametrize("model_type", ["model-f", "sequence"])
def test_baselines_get_a_new_tag_tokenizer_as_well(fine_tune, tiny_checkpoint, tmp_path, model_type, towers):
    rows = rows_of(ENGLISH)
    small = '{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}'
    arguments = {"vision_tower": str(towers / "vision"), "text_tower": str(towers / "text"), "model_type": model_type}
    args = OPTSGTrainingArguments(
        str(tmp_path), cache_dir=str(tmp_path), config_overrides=small, embedding_init_std=0.0, **arguments
    )
    model, processor = build_model(args, rows, rows)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    tuned, processor = fine_tune(CHINESE, tmp_path / "checkpoint", model_type=model_type, embedding_init_std=0.0)
    assert tuned.lm_head.out_features == tuned.config.tag_vocab_size == len(processor.tag_tokenizer)
    assert tuned.lm_head.weight is tuned.tag_decoder.token_embeddings.weight
    batch = processor(titles=["a dog"], tags=[CHINESE[:3]])
    assert tuned(**{name: batch[name] for name in batch}).loss.isfinite()


def test_tokens_without_a_known_text_start_at_random(make_model, tiny_processor):
    # The text tower knows none of these letters.
    PartialState()
    processor = OPTSGProcessor(
        tiny_processor.image_processor, tiny_processor.tokenizer, train_tag_tokenizer(CYRILLIC * 9, 300)
    )
    model = make_model(tag_vocab_size=len(processor.tag_tokenizer))
    tie_tokens_to_text(model, processor, 0.06)
    weight = model.tag_decoder.token_embeddings.weight
    ids = processor.tag_tokenizer("закат")["input_ids"]
    assert torch.cdist(weight[ids], weight).sort(dim=1).values[:, 1].min() > 0.05
    assert weight.isfinite().all() and Counter(ids).most_common(1)[0][1] == 1
