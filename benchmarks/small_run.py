"""A training run of a few seconds on synthetic frame features, for benchmarks and tests that train many times."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TRAIN = Path(__file__).resolve().parent.parent / "examples" / "train.py"
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
TAGS = [f"标签{number}" for number in range(60)]
WIDTH = 16


def make(folder: Path, examples: int = 240, max_tags: int = 6, seed: int = 0) -> None:
    """Write a dataset and a text tower.

    Args:
        folder: Gets `data`, Parquet files with Chinese titles and with frame features that determine the tags, and
            `tower`, a BERT of one layer.
        examples: Number of training examples.
        max_tags: Maximum number of tags per example.
        seed: Seed of the data and of the tower's weights.
    """
    random = np.random.default_rng(seed)
    directions = random.normal(size=(len(TAGS), WIDTH))
    splits = {}
    for split, count in (("train", examples), ("validation", examples // 8)):
        rows = []
        for number in range(count):
            tags = random.choice(len(TAGS), size=random.integers(1, max_tags + 1), replace=False)
            frames = directions[tags].sum(axis=0) + 0.1 * random.normal(size=(3, WIDTH))
            title = "".join(TAGS[tag] for tag in tags[:1])
            rows.append(
                {"id": f"v{number}", "title": title, "tags": [TAGS[t] for t in tags], "frame_features": frames}
            )
        splits[split] = Dataset.from_list(rows)
    for split, rows in DatasetDict(splits).items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        # Small row groups, so that a stream has several shards.
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", batch_size=10)
    characters = sorted(set("".join(TAGS)))
    vocabulary = [*SPECIAL.values(), *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **SPECIAL).save_pretrained(
        folder / "tower"
    )
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=32)
    BertModel(config).save_pretrained(folder / "tower")


def command(
    folder: Path,
    output: Path,
    launcher: tuple[str, ...] = (),
    config_overrides: dict | None = None,
    **arguments: object,
) -> list[str]:
    """Return the command of a run on the files of [`make`].

    Args:
        folder: Folder of those files.
        output: Output folder of the run.
        launcher: Words before the program, instead of those that start Python.
        config_overrides: Fields of the model's configuration.
        arguments: Training arguments.
    """
    own = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 8}
    own |= {"num_encoder_layers": 1, "num_prompt_layers": 1, "num_decoder_layers": 1} | (config_overrides or {})
    given = {
        "dataset": folder / "data", "dataset_dir": folder / "hf", "cache_dir": folder / "cache", "output_dir": output,
        "vision_tower": "none", "text_tower": folder / "tower", "tag_vocab_size": 300, "train_batch_size": 16,
        "num_negatives": 0, "eval_steps": 0.5, "config_overrides": json.dumps(own, allow_nan=False),
    } | arguments  # fmt: skip
    program = [*(launcher or (sys.executable,)), TRAIN]
    return [*map(str, program), *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def environment() -> dict[str, str]:
    """Return environment variables for reproducible runs: with one thread, sums have a fixed order."""
    paths = [str(TRAIN.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
