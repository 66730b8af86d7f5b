"""A training of seconds for what must be run many times: made-up frame features, Chinese titles, a tiny text tower."""

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


def make(folder: Path, examples: int = 240, most_tags: int = 6, seed: int = 0) -> None:
    """Writes `data` (Parquet; tags follow from the features) and `tower` (a BERT of one layer) below `folder`."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(len(TAGS), WIDTH))
    splits = {}
    for split, count in (("train", examples), ("validation", examples // 8)):
        rows = []
        for number in range(count):
            tags = random.choice(len(TAGS), size=random.integers(1, most_tags + 1), replace=False)
            frames = directions[tags].sum(axis=0) + 0.1 * random.normal(size=(3, WIDTH))
            title = "".join(TAGS[tag] for tag in tags[:1])
            rows.append(
                {"id": f"v{number}", "title": title, "tags": [TAGS[t] for t in tags], "frame_features": frames}
            )
        splits[split] = Dataset.from_list(rows)
    for split, rows in DatasetDict(splits).items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        # Row groups of a few examples, which a stream reads side by side.
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


def command(folder: Path, output: Path, launcher: tuple[str, ...] = (), config: dict | None = None, **arguments):
    """The command of a run on what [`make`] wrote; `config` and `arguments` change the model and the run."""
    own = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_prompts": 8}
    own |= {"num_encoder_layers": 1, "num_prompt_layers": 1, "num_decoder_layers": 1} | (config or {})
    given = {
        "dataset": folder / "data", "dataset_dir": folder / "hf", "cache_dir": folder / "cache", "output_dir": output,
        "vision_tower": "none", "text_tower": folder / "tower", "tag_vocab_size": 300, "train_batch_size": 16,
        "num_negatives": 0, "eval_steps": 0.5, "config_overrides": json.dumps(own),
    } | arguments  # fmt: skip
    program = [*(launcher or (sys.executable,)), TRAIN]
    return [*map(str, program), *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def environment() -> dict[str, str]:
    """One thread: sums are then made in one order."""
    paths = [str(TRAIN.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
