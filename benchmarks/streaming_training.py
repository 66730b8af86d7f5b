r"""Measure the ratio of time that training waits for data when examples are streamed from Parquet files.

    python benchmarks/streaming_training.py --output results/create_tagging/streaming.json

Both cases read files written by `optsg export` with `load_tagging_dataset(folder, streaming=True)`, shuffle them in a
buffer and collate them in a `DataLoader`. In the first case both frozen towers run on the images and titles of
icon-tagging in every step. In the second case synthetic examples in CREATE's format have 16 frame features each. The
model is the shipped one. The time to the first batch is reported separately.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import create_scale
import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGConfig, OPTSGDataCollator, OPTSGFeatureProcessor, OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.evaluation.reporting import environment
from optsg import main as optsg

BATCH, FRAMES, WIDTH, BUFFER = 32, 16, 512, 500
WORKERS = (0, 1, 2)


def create_examples(folder: Path, examples: int) -> Path:
    """Write synthetic examples with frame features, and export them as Parquet files."""
    create_scale.make(folder, examples)
    (folder / "features").mkdir()
    random = np.random.default_rng(0)
    for number in range(examples):
        features = random.normal(size=(FRAMES, WIDTH)).astype(np.float16)
        np.save(folder / "features" / f"v{number:08d}.npy", features)
    return export("create-tagging", folder, "--data-dir", folder, "--config-name", "create_3m")


def export(name: str, folder: Path, *arguments: object) -> Path:
    """Export a benchmark as Parquet files, and return their folder."""
    if optsg(["export", name, str(folder / "parquet"), *map(str, arguments)]):
        raise SystemExit(f"{name} could not be exported.")
    return folder / "parquet"


def without_vision(model: OPTSGForTagGeneration) -> OPTSGForTagGeneration:
    """Return an untrained model of the same shape for frame features like those of CREATE."""
    config = model.config.to_dict() | {"vision_config": None, "frame_feature_size": WIDTH}
    return OPTSGForTagGeneration(OPTSGConfig.from_dict(config))


def measure(model: OPTSGForTagGeneration, processor: OPTSGProcessor, folder: Path, workers: int, steps: int) -> dict:
    """Train on a stream with some data loader workers, and return speed and waiting time."""
    rows = load_tagging_dataset(folder, split="train", streaming=True).shuffle(seed=0, buffer_size=BUFFER)
    model.requires_grad_(True)
    for tower in (model.model.vision_tower, model.model.text_tower):
        if tower is not None:
            tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.config.use_tag_classifier = False  # Its classes are the tags of the checkpoint.
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
    """Measure all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/optsg-icon-small"))
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    # More than are read: `datasets` sleeps for five seconds at the end of an epoch.
    examples = (arguments.steps + 16) * BATCH + 2 * BUFFER
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "images": lambda: export("icon-tagging", Path(folder, "icons")),
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
    arguments.output.write_text(json.dumps(result | environment(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def make_folder(*parts: str) -> Path:
    """Create a folder and return its path."""
    path = Path(*parts)
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    main()
