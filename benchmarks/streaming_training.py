r"""Measures how long training waits for data when examples are streamed from Parquet: the share of the time.

    python benchmarks/streaming_training.py --output results/create_tagging/streaming.json

Two cases, both read by `load_tagging_dataset(folder, streaming=True)` of what `optsg export` wrote, shuffled by a
buffer, collated by a `DataLoader` with so many workers: icon-tagging's images, which both frozen towers look at in
every step; and made-up examples in CREATE's format with 16 frame features each. The model is that of the shipped preset.
The time to the first batch is told apart.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import scale  # noqa: E402
from score import environment  # noqa: E402

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGConfig, OPTSGDataCollator, OPTSGFeatureProcessor, OPTSGForTagGeneration, OPTSGProcessor
from optsg.__main__ import main as optsg

BATCH, FRAMES, WIDTH, BUFFER = 32, 16, 512, 500
WORKERS = (0, 1, 2)


def create_examples(folder: Path, examples: int) -> Path:
    scale.make(folder, examples)
    (folder / "features").mkdir()
    random = np.random.default_rng(0)
    for number in range(examples):
        features = random.normal(size=(FRAMES, WIDTH)).astype(np.float16)
        np.save(folder / "features" / f"v{number:08d}.npy", features)
    return exported("create-tagging", folder, "--data-dir", folder, "--config-name", "create_3m")


def exported(name: str, folder: Path, *arguments) -> Path:
    if optsg(["export", name, str(folder / "parquet"), *map(str, arguments)]):
        raise SystemExit(f"{name} could not be exported.")
    return folder / "parquet"


def without_vision(model: OPTSGForTagGeneration) -> OPTSGForTagGeneration:
    """The same rooms for frame features of CREATE's kind, not trained."""
    config = model.config.to_dict() | {"vision_config": None, "frame_feature_size": WIDTH}
    return OPTSGForTagGeneration(OPTSGConfig.from_dict(config))


def measure(model, processor, folder: Path, workers: int, steps: int) -> dict:
    rows = load_tagging_dataset(folder, split="train", streaming=True).shuffle(seed=0, buffer_size=BUFFER)
    model.requires_grad_(True)
    for tower in (model.model.vision_tower, model.model.text_tower):
        if tower is not None:
            tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.config.use_tag_classifier = False  # It knows its own training tags only.
    loader = DataLoader(rows, BATCH, collate_fn=OPTSGDataCollator(processor), num_workers=workers)
    started = time.perf_counter()
    batches = iter(loader)
    batch = next(batches)
    first, waited, worked = time.perf_counter() - started, 0.0, 0.0
    model.train()
    for step in range(steps):
        before = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = time.perf_counter()
        batch = next(batches)
        # The first steps compile.
        if step >= 3:
            worked += after - before
            waited += time.perf_counter() - after
    counted = steps - 3
    return {
        "seconds_to_first_batch": round(first, 2),
        "examples_per_second": round(counted * BATCH / (worked + waited), 1),
        "waiting_ratio": round(waited / (worked + waited), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/optsg-icon-small"))
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    # More than are read: at the end of a pass `datasets` sleeps for five seconds, once an epoch.
    examples = (arguments.steps + 16) * BATCH + 2 * BUFFER
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "images": lambda: exported("icon-tagging", Path(folder, "icons")),
            "frame features": lambda: create_examples(make_folder(folder, "create"), examples),
        }
        for name, write in cases.items():
            parquet = write()
            model = OPTSGForTagGeneration.from_pretrained(arguments.checkpoint)
            processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
            if name == "frame features":
                model = without_vision(model)
                processor = OPTSGFeatureProcessor(processor.tokenizer, processor.tag_tokenizer, num_frames=FRAMES)
            found[name] = {}
            for workers in WORKERS:
                found[name][f"{workers} workers"] = measure(model, processor, parquet, workers, arguments.steps)
                print(name, workers, found[name][f"{workers} workers"], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"batch": BATCH, "steps": arguments.steps, "frames": FRAMES, "width": WIDTH, "cases": found}
    arguments.output.write_text(json.dumps(result | environment(), indent=1) + "\n", encoding="utf-8")


def make_folder(*parts) -> Path:
    path = Path(*parts)
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    main()
