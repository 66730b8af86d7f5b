r"""Tags a dataset of any size, on as many processes or machines as there are, into Parquet files.

    accelerate launch examples/tag_dataset.py --checkpoint runs/mine --dataset my_images --output runs/tags
    python examples/tag_dataset.py --checkpoint runs/mine --dataset my_images --output runs/tags --ray 2

Examples are divided into shards; each is tagged by one process, written as `tags-00000-of-00042.parquet` and then done.
Started again with the same arguments, in either way, it makes the shards that are missing; other weights, settings or
examples under the same names are refused (of images, videos and features, those of one example a shard are looked at). Rows
are the examples' `id`, their `tags` (`tag`, `score`, `novel`; best first) and, where an example cannot be read, an `error`.
With `--ray N` shards are the input of a `ray.data` job with N workers, on the Ray cluster at `RAY_ADDRESS` or on one
made here; all must see the same files.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import AutoConfig

from dataset_scripts import load_tagging_dataset, undecoded
from modeling_optsg import OPTSGProcessor
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.atomic_files import write_json
from modeling_optsg.data.feature_cache import digest, tokenizer_settings
from modeling_optsg.evaluation.dataset_tagging import is_whole, shard_path, shards_of, write_shard


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a folder or a Hub name")
    parser.add_argument("--dataset", required=True, help="a benchmark, a folder or a Hub name")
    parser.add_argument("--dataset_dir", help="where datasets are built and looked for")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--shard_size", type=int, default=1000, help="examples of a shard")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--decoding", choices=("parallel", "sequential"), help="the checkpoint's own if not given")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--max_tags", type=int)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="on GPUs; no: 32 bits")
    parser.add_argument("--ray", type=int, metavar="N", help="so many workers of a Ray cluster")
    arguments = parser.parse_args(argv)
    # Workers of a cluster begin in other folders.
    arguments.output = arguments.output.resolve()
    for name in ("checkpoint", "dataset", "dataset_dir"):
        if getattr(arguments, name) and Path(getattr(arguments, name)).exists():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    return arguments


class ShardTagger:
    """Loads model and examples once, and makes shards."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        kind = AutoConfig.from_pretrained(arguments.checkpoint).model_type
        model = next(system.model for system in MODEL_TYPES.values() if system.model.config_class.model_type == kind)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = model.from_pretrained(arguments.checkpoint).to(device).eval()
        self.processor = OPTSGProcessor.from_pretrained(arguments.checkpoint)
        self.dataset = load_tagging_dataset(arguments.dataset, split=arguments.split, cache_dir=arguments.dataset_dir)
        self.shards = shards_of(len(self.dataset), arguments.shard_size)
        settings = {name: getattr(arguments, name) for name in ("decoding", "threshold", "max_tags")}
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.settings["batch_size"] = arguments.batch_size

    def weights(self) -> str:
        """Changes with whatever the model's answers depend on."""
        settings = self.model.generation_config.to_dict() | {"transformers_version": None}
        processor = self.processor
        images = getattr(processor, "image_processor", None)
        reading = [images and images.to_dict(), processor.num_frames, tokenizer_settings(processor.tokenizer)]
        return digest(
            self.model, settings, *reading, processor.tag_tokenizer.get_vocab(), sorted(processor.label_vocabulary)
        )

    def examples(self) -> str:
        """Changes with the examples and their order."""
        names = [name for name in ("id", "title") if name in self.dataset.column_names]
        hashed = hashlib.sha256()
        for rows in self.dataset.select_columns(names).with_format("arrow").iter(10_000):
            hashed.update(json.dumps(rows.to_pydict(), ensure_ascii=False).encode())
        # All images would be read for this alone; one of each shard notices most that can happen to them.
        for row in undecoded(self.dataset).select([shard[0] for shard in self.shards]):
            for name, value in row.items():
                if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
                    try:
                        with open(value["path"], "rb") as file:
                            value = file.read(2**20)
                    except OSError as error:
                        # Its row will say so.
                        value = type(error).__name__
                hashed.update(repr((name, value)).encode())
        return hashed.hexdigest()[:32]

    def __call__(self, row: dict) -> dict:
        index = int(row["shard"])
        examples = self.shards[index]
        place = (self.arguments.output, index, len(self.shards), examples)
        precision = self.arguments.mixed_precision
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        with torch.autocast(self.model.device.type, dtype, enabled=dtype is not None):
            write_shard(self.model, self.processor, self.dataset, *place, **self.settings)
        return {"shard": index, "examples": len(examples)}


def check_output(arguments: argparse.Namespace, tagger: ShardTagger) -> None:
    """Refuses to mix shards of other arguments, weights or examples into a folder, and takes away what killed processes
    have left there.

    Raises:
        ValueError: the folder's shards were made otherwise.
    """
    free = ("output", "dataset_dir", "ray", "batch_size")
    own = {name: value for name, value in vars(arguments).items() if name not in free}
    # Names stay the same when what they stand for changes.
    own |= {"shards": len(tagger.shards), "weights": tagger.weights(), "examples": tagger.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for left in arguments.output.glob(".tags-*.parquet.*"):
        left.unlink()
    path = arguments.output / "arguments.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if other := sorted(name for name in own if before.get(name) != own[name]):
            raise ValueError(
                f"{arguments.output} holds shards made with another {', '.join(other)}; give another folder."
            )
    write_json(path, own)


def with_accelerate(arguments: argparse.Namespace) -> None:
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    with accelerator.main_process_first():
        tagger = ShardTagger(arguments)
        if accelerator.is_main_process:
            check_output(arguments, tagger)
    mine = range(accelerator.process_index, len(tagger.shards), accelerator.num_processes)
    for index in tqdm(mine, desc="Shards", disable=not accelerator.is_main_process):
        tagger({"shard": index})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(arguments, tagger.shards)
    accelerator.end_training()


def with_ray(arguments: argparse.Namespace) -> None:
    import ray

    tagger = ShardTagger(arguments)
    check_output(arguments, tagger)
    shards = tagger.shards
    num_shards = len(shards)
    del tagger
    if not ray.is_initialized():
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": arguments.ray}
        ray.init(log_to_driver=False, **own)
    paths = [shard_path(arguments.output, index, num_shards) for index in range(num_shards)]
    missing = [{"shard": i} for i, (path, examples) in enumerate(zip(paths, shards)) if not is_whole(path, examples)]
    if missing:
        rows = ray.data.from_examples(missing, override_num_blocks=len(missing))
        done = rows.map(
            ShardTagger,
            fn_constructor_args=(arguments,),
            concurrency=arguments.ray,
            num_cpus=1,
            # Ray hides the GPUs that an actor did not ask for.
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            max_restarts=-1,
        )
        done.materialize()
    report(arguments, shards)


def report(arguments: argparse.Namespace, shards: list[range]) -> None:
    """Counts what is there; all of it must be."""
    num_shards = len(shards)
    files = [shard_path(arguments.output, index, num_shards) for index in range(num_shards)]
    if missing := [path.name for path, examples in zip(files, shards) if not is_whole(path, examples)]:
        raise RuntimeError(f"{len(missing)} shards are missing, such as {missing[0]}; the same command makes them.")
    rows = load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=True)
    count, failed = 0, Counter()
    for row in rows:
        count += 1
        failed[row["error"]] += row["error"] is not None
    print(f"{count:,} examples in {num_shards:,} files in {arguments.output}; {failed.total():,} could not be read")
    for reason, number in failed.most_common(5):
        if number:
            print(f"  {number:,}: {reason}")


if __name__ == "__main__":
    given = parse_arguments()
    with_ray(given) if given.ray else with_accelerate(given)
