r"""Tag a dataset with any number of processes or machines, and write the tags to Parquet files.

    accelerate launch examples/tag_dataset.py --checkpoint runs/mine --dataset my_images --output runs/tags
    python examples/tag_dataset.py --checkpoint runs/mine --dataset my_images --output runs/tags --ray 2

The examples are divided into shards. Each shard is written to a file such as `tags-00000-of-00042.parquet`. To resume
an interrupted run, run the same command again. Only missing shards are tagged. An output folder that was created with
another model, other settings or other examples is rejected. To detect changed images, videos or features, the program
compares one example per shard.

The columns are the `id` of an example, its `tags` (`tag`, `score` and `novel`, best first), and an `error` if the
example cannot be read.

With `--ray N`, a `ray.data` job with N workers tags the shards, on the Ray cluster at `RAY_ADDRESS` or on a local one.
All machines need access to the same files.
"""

import argparse
import json
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers import AutoConfig

from dataset_scripts import load_tagging_dataset
from dataset_scripts.column_names import add_column_arguments, column_arguments
from modeling_optsg import OPTSGProcessor
from modeling_optsg.baselines.registry import MODEL_TYPES, find_model_type
from modeling_optsg.data.atomic_files import write_json
from modeling_optsg.evaluation.dataset_tagging import (
    dataset_fingerprint,
    is_complete,
    model_fingerprint,
    shard_path,
    split_into_shards,
    write_shard,
)

# Arguments that do not change the tags.
FREE_ARGUMENTS = ("output", "dataset_dir", "ray", "batch_size")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the model")
    parser.add_argument("--dataset", required=True, help="benchmark, folder or Hub name of the dataset")
    add_column_arguments(parser)
    parser.add_argument("--dataset_dir", help="cache folder of the datasets library")
    parser.add_argument("--split", default="train", help="split to tag (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
    parser.add_argument(
        "--shard_size", type=int, default=1000, help="number of examples per file (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="number of examples per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--decoding", choices=("parallel", "sequential"), help="default: the decoding of the checkpoint"
    )
    parser.add_argument(
        "--threshold", type=float, help="minimum probability of a tag (default: those of the checkpoint)"
    )
    parser.add_argument(
        "--max_tags", type=int, help="maximum number of tags per example (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="precision (default: %(default)s)"
    )
    parser.add_argument("--ray", type=int, metavar="N", help="number of Ray workers (default: use accelerate)")
    arguments = parser.parse_args(argv)
    # Ray workers run in other folders.
    arguments.output = arguments.output.resolve()
    for name in ("checkpoint", "dataset", "dataset_dir"):
        if getattr(arguments, name) and Path(getattr(arguments, name)).exists():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    return arguments


class ShardTagger:
    """Tags shards of a dataset. The model and the dataset are loaded once per process."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        model_type = find_model_type(AutoConfig.from_pretrained(arguments.checkpoint))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = MODEL_TYPES[model_type].model.from_pretrained(arguments.checkpoint).to(device).eval()
        self.processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
        options = {"cache_dir": arguments.dataset_dir, **column_arguments(arguments)}
        self.dataset = load_tagging_dataset(arguments.dataset, split=arguments.split, **options)
        self.shards = split_into_shards(len(self.dataset), arguments.shard_size)

    def __call__(self, row: dict) -> dict:
        """Tag the shard with the index `row["shard"]`."""
        index = int(row["shard"])
        path = shard_path(self.arguments.output, index, len(self.shards))
        names = ("batch_size", "decoding", "threshold", "max_tags")
        settings = {name: getattr(self.arguments, name) for name in names}
        settings = {name: value for name, value in settings.items() if value is not None}
        dtype = DTYPES.get(self.arguments.mixed_precision)
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            write_shard(self.model, self.processor, self.dataset, path, self.shards[index], **settings)
        return {"shard": index, "examples": len(self.shards[index])}


def prepare_output(arguments: argparse.Namespace, tagger: ShardTagger) -> None:
    """Create the output folder and remove partial files from killed processes.

    Raises:
        ValueError: The folder was created with other arguments, another model or other examples.
    """
    made_with = {name: value for name, value in vars(arguments).items() if name not in FREE_ARGUMENTS}
    made_with |= {
        "shards": len(tagger.shards),
        "weights": model_fingerprint(tagger.model, tagger.processor),
        "examples": dataset_fingerprint(tagger.dataset, [shard[0] for shard in tagger.shards]),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for partial in arguments.output.glob(".tags-*.parquet.*"):
        partial.unlink()
    path = arguments.output / "arguments.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := sorted(name for name in made_with if before.get(name) != made_with[name]):
            raise ValueError(
                f"{arguments.output} was made with different {', '.join(changed)}; give another --output folder."
            )
    write_json(path, made_with)


def tag_with_accelerate(arguments: argparse.Namespace) -> None:
    """Tag the dataset with the processes of `accelerate launch`."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    with accelerator.main_process_first():
        tagger = ShardTagger(arguments)
        if accelerator.is_main_process:
            prepare_output(arguments, tagger)
    indices = range(accelerator.process_index, len(tagger.shards), accelerator.num_processes)
    for index in tqdm(indices, desc="Shards", disable=not accelerator.is_main_process):
        tagger({"shard": index})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(arguments, tagger.shards)
    accelerator.end_training()


def tag_with_ray(arguments: argparse.Namespace) -> None:
    """Tag the dataset with the workers of a Ray cluster."""
    import ray

    tagger = ShardTagger(arguments)
    prepare_output(arguments, tagger)
    shards = tagger.shards
    # Each worker loads its own model.
    del tagger
    if not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": arguments.ray}
        ray.init(log_to_driver=False, **local)
    if missing := find_missing(arguments.output, shards):
        rows = ray.data.from_items([{"shard": index} for index in missing], override_num_blocks=len(missing))
        done = rows.map(
            ShardTagger,
            fn_constructor_args=(arguments,),
            concurrency=arguments.ray,
            num_cpus=1,
            # Ray hides GPUs from workers that do not request one.
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            max_restarts=-1,
        )
        done.materialize()
    report(arguments, shards)


def find_missing(output: Path, shards: list[range]) -> list[int]:
    """Return the indices of shards that have no complete file."""
    paths = [shard_path(output, index, len(shards)) for index in range(len(shards))]
    return [index for index, (path, shard) in enumerate(zip(paths, shards)) if not is_complete(path, len(shard))]


def report(arguments: argparse.Namespace, shards: list[range]) -> None:
    """Check that all shards are complete, and print how many examples were tagged and why others were not."""
    paths = [shard_path(arguments.output, index, len(shards)) for index in range(len(shards))]
    if missing := find_missing(arguments.output, shards):
        raise RuntimeError(
            f"{len(missing)} shards are missing, such as {paths[missing[0]].name}; repeat the command to make them."
        )
    num_examples, errors = 0, Counter()
    for path in paths:
        with pq.ParquetFile(path) as file:
            reasons = file.read(columns=["error"])["error"].to_pylist()
        num_examples += len(reasons)
        errors.update(reason for reason in reasons if reason is not None)
    print(f"{num_examples:,} examples in {len(shards):,} files in {arguments.output}; {errors.total():,} unreadable")
    for reason, count in errors.most_common(5):
        print(f"  {count:,}: {reason}")


if __name__ == "__main__":
    parsed = parse_arguments()
    tag_with_ray(parsed) if parsed.ray else tag_with_accelerate(parsed)
