"""The config for CREATE-tagging learns Chinese tags from files in the released layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGFeatureProcessor, OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.training import trainer
from optsg import main as optsg

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "夏日凉面,清爽又开胃": ["美食", "凉面", "家常菜", "夏天"],
    "三分钟学会做红烧肉": ["美食", "红烧肉", "家常菜", "做菜教程"],
    "小猫第一次见到雪": ["萌宠", "猫咪", "雪景"],
    "狗狗和主人去海边": ["萌宠", "狗狗", "海边", "旅行vlog"],
    "一个人的西藏自驾游": ["旅行vlog", "西藏", "自驾游", "🏔️雪山"],
    "零基础吉他弹唱教学": ["音乐", "吉他", "弹唱", "零基础"],
    "广场舞《最炫民族风》": ["舞蹈", "广场舞", "音乐"],
    "NBA十佳球:绝杀时刻": ["篮球", "NBA", "十佳球"],
}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    """A tiny BERT with a token for each Chinese character, like Chinese BERTs."""
    folder = tmp_path_factory.mktemp("bert")
    characters = sorted(set("".join([*EXAMPLES, *(tag for tags in EXAMPLES.values() for tag in tags)]).lower()))
    vocabulary = [*SPECIAL.values(), *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **SPECIAL).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of files in the released layout."""
    folder = tmp_path_factory.mktemp("create")
    (folder / "features").mkdir()
    examples = []
    for number, (title, tags) in enumerate(EXAMPLES.items()):
        examples.append({"vid": f"v{number}", "ann_title": title, "raw_title": "", "tag": tags, "category": number})
        features = np.random.default_rng(number).normal(size=(18 + number, 12))
        np.save(folder / "features" / f"v{number}.npy", features.astype(np.float16))
    for split in ("train", "val", "test"):
        (folder / f"create_210k_{split}.json").write_text(json.dumps(examples, ensure_ascii=False), encoding="utf-8")
    arguments = ["--data-dir", folder, "--dataset-dir", folder / "cache"]
    assert optsg(["export", "create-tagging", str(folder / "parquet"), *map(str, arguments)]) == 0
    return folder / "parquet"


def test_the_create_config_learns_chinese_tag_sets_exactly(exported, text_tower, tmp_path):
    train = trainer
    path = ROOT / "examples/configs/optsg-create.json"
    # Only the size of the model and the length of the training differ from the config.
    config = json.loads(path.read_text())["config_overrides"] | {"hidden_size": 48, "intermediate_size": 96}
    config |= {"num_prompts": 6, "num_attention_heads": 2, "num_decoder_layers": 1, "dropout": 0.0}
    config |= {"modality_dropout": 0.0, "classifier_dropout": 0.0, "attention_dropout": 0.0}
    arguments = {
        "config": path, "dataset": exported, "dataset_dir": tmp_path / "hf", "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache", "text_tower": text_tower, "config_overrides": json.dumps(config),
        "num_train_epochs": 250, "train_batch_size": 8, "learning_rate": 3e-3, "eval_steps": 0.99,
        "mixed_precision": "no", "dataloader_num_workers": 0, "tag_vocab_size": 300,
    }  # fmt: skip
    train.main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])

    model = OPTSGForTagGeneration.from_pretrained(tmp_path / "run").eval()
    processor = OPTSGProcessor.from_pretrained(tmp_path / "run")
    assert isinstance(processor, OPTSGFeatureProcessor) and model.config.frame_feature_size == 12
    rows = load_tagging_dataset(exported, split="test", cache_dir=tmp_path / "hf")
    assert rows["title"] == list(EXAMPLES)
    for decoding in ("parallel", "sequential"):
        inputs = processor(frame_features=[np.array(f) for f in rows["frame_features"]], titles=rows["title"])
        predicted = processor.batch_decode(model.generate(**inputs, decoding=decoding))
        assert [{tag["tag"] for tag in tags} for tags in predicted] == [set(tags) for tags in EXAMPLES.values()]


def test_tags_of_any_script_are_tokenized_without_loss(tmp_path):
    from modeling_optsg import train_tag_tokenizer

    tokenizer = train_tag_tokenizer(tag for tags in EXAMPLES.values() for tag in tags)
    seen = [tag for tags in EXAMPLES.values() for tag in tags]
    for tag in [*seen, "從未見過的標籤", "ＮＢＡ", "é́", "👩‍👩‍👧", "한국어", "  "]:
        assert tokenizer.decode(tokenizer(tag)["input_ids"]) == tag
