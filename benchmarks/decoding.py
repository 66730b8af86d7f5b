r"""Measure how long generation takes, compared with a classifier and with autoregressive generation.

    python -m benchmarks.decoding --output results/speed/decoding.json \
        --asy runs/asy-seed0 --open_book runs/open-book-seed0

All models take turns with each batch of test examples of icon-tagging, and the median counts. On one thread it is the
median of processor time, so that other programs matter little; on several threads it is that of real time. Each model
runs as loaded ("plain") and after `prepare_for_inference` ("prepared"). Reading images is not timed.

- parallel, sequential: the shipped checkpoint with its settings; also parallel with an exact search, and greedy.
- asy, open-book: checkpoints of `examples/train.py`. Without them, models of the same sizes with random weights, and
  an open-book model that generates 25 tokens and retrieves nothing.
- transformers: `generate` of `BartForConditionalGeneration` with random weights and the sizes of the tag decoder, on
  the memory of the shipped checkpoint. It generates 25 tokens, which is an average tag sequence.

With `--before`, an earlier version of the code measures parallel decoding and ASY on the same batches, in a process of
its own, before and after this one.
"""

import argparse
import copy
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.folder_reading import in_tree, revision
from experiments.icon_tagging.runs import Benchmark, Run
from modeling_optsg import OPTSGDataCollator, OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.baselines.registry import MODEL_TYPES
from modeling_optsg.data.feature_cache import FEATURE_COLUMNS, CachedFeatures, cache_tower_features
from modeling_optsg.evaluation.reporting import environment
from modeling_optsg.prepared_weights import prepare_weights

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
BATCH_SIZE, NUM_BATCHES = 8, 4
SEQUENCE_TOKENS = 25
BATCH_SIZES, PROMPTS, FRAMES = (1, 8, 32, 128), (10, 20, 40, 80), (1, 2, 4, 8, 16, 32)
WITH_TOWERS, WITHOUT_TOWERS = "ms_with_towers", "ms_without_towers"
# Run with the code of an earlier version: times the models on saved batches as `measure` does, and prints medians.
BEFORE_PROGRAM = """
import json, statistics, sys, time, torch
from modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.baselines.registry import MODEL_TYPES
batches, asy, checkpoint, rounds = sys.argv[1:]
torch.set_num_threads(1)
models = {"parallel": OPTSGForTagGeneration.from_pretrained(checkpoint).eval()}
models["asy"] = MODEL_TYPES["asy"].model.from_pretrained(asy).eval()
seconds = {}
for number in range(int(rounds) + 1):
    for batch in torch.load(batches):
        for name, model in models.items():
            for part, inputs in batch.items():
                started = time.thread_time()
                model.generate(**inputs)
                if number:
                    seconds.setdefault(name, {}).setdefault(part, []).append(time.thread_time() - started)
medians = {name: {part: statistics.median(own) for part, own in parts.items()} for name, parts in seconds.items()}
print(json.dumps(medians, allow_nan=False))
"""
Inputs = dict[str, torch.Tensor]


class Bart:
    """Generates a sequence with `transformers` on the memory of another model."""

    def __init__(self, model: OPTSGForTagGeneration, prepared: bool):
        config, self.encoder = model.config, model.model
        sizes = {"d_model": config.hidden_size, "vocab_size": config.tag_vocab_size, "encoder_layers": 0}
        sizes |= {"decoder_layers": config.num_decoder_layers, "decoder_attention_heads": config.num_attention_heads}
        sizes |= {"decoder_ffn_dim": config.intermediate_size, "encoder_attention_heads": config.num_attention_heads}
        tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}
        torch.manual_seed(0)
        self.bart = BartForConditionalGeneration(BartConfig(**sizes, **tokens, forced_eos_token_id=None)).eval()
        if prepared:
            prepare_weights(self.bart)
        length = {"min_new_tokens": SEQUENCE_TOKENS, "max_new_tokens": SEQUENCE_TOKENS}
        self.settings = length | {"num_beams": 1, "do_sample": False}

    @torch.no_grad()
    def generate(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Encode a batch and generate a sequence for each example."""
        outputs = self.encoder(**inputs)
        encoded = BaseModelOutput(last_hidden_state=outputs.memory)
        mask = outputs.memory_mask.long()
        return self.bart.generate(encoder_outputs=encoded, attention_mask=mask, **self.settings)


def load_baseline(name: str, folder: Path | None, config: object) -> tuple[object, object | None]:
    """Load a trained baseline and its book, or make one of the same sizes with random weights."""
    if folder is not None:
        run = Run.load(folder)
        return run.model, run.book
    spec = MODEL_TYPES[name]
    settings = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    settings |= dict(spec.config)
    if name == "open-book":
        settings |= {"max_sequence_tokens": SEQUENCE_TOKENS, "num_tag_classes": 0}
    torch.manual_seed(0)
    model = spec.model(spec.model.config_class(**settings)).eval()
    if name == "open-book":
        model.generation_config.pad_bias = -1e9
    else:
        model.set_label_vocabulary([[2 + index // 9000, 2 + index % 9000] for index in range(config.num_tag_classes)])
    return model, None


class Examples:
    """Batches of the test examples, as tower features and as pixels with title tokens."""

    def __init__(self, benchmark: Benchmark, model: OPTSGForTagGeneration, processor: OPTSGProcessor, number: int):
        self.rows = benchmark.splits["test"].select(range(number))
        self.processor, self.collate = processor, OPTSGDataCollator(processor)
        cache = benchmark.cache_dir / "features"
        self.features = CachedFeatures(cache_tower_features(self.rows, model.model, processor, cache))

    def feature_inputs(self, start: int, size: int) -> Inputs:
        """Return the tower features of `size` examples."""
        examples = [self.features[index] for index in range(start, start + size)]
        return self.collate([{key: row[key] for key in FEATURE_COLUMNS if key in row} for row in examples])

    def pixel_inputs(self, start: int, size: int) -> Inputs:
        """Return pixels and title tokens of `size` examples."""
        rows = self.rows.select(range(start, start + size))
        return dict(self.processor(images=rows["image"][:], titles=rows["title"][:]))


def measure(calls: dict[object, list[Callable[[], object]]], rounds: int) -> dict[object, float]:
    """Time every call once per round, all models with one batch before any with the next; return medians in ms."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = {key: [] for key in calls}
    for number in range(rounds + 1):
        for index in range(max(map(len, calls.values()))):
            for key, batches in calls.items():
                started = clock()
                batches[index]()
                if number:
                    seconds[key].append(clock() - started)
    return {key: 1000 * statistics.median(own) for key, own in seconds.items()}


def matrix_rate() -> float:
    """Return the rate of a large matrix product in GFLOP/s, the median of 15."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / measure({"product": [partial(F.linear, left, right)] * 5}, 3)["product"] / 1e6


def generate(model: object, settings: dict, book: tuple | None, inputs: Inputs) -> object:
    """Generate tags, after retrieval if the model has a book and the inputs are pixels."""
    if book is not None and "pixel_values" in inputs:
        inputs = book[0].look_up(model, book[1], **inputs)
    return model.generate(**inputs, **settings)


def make_sides(arguments: argparse.Namespace, prepared: bool) -> dict[str, tuple[object, dict, tuple | None]]:
    """Return every model with its settings and its book."""
    model = OPTSGForTagGeneration.from_pretrained(CHECKPOINT).eval()
    processor = OPTSGProcessor.from_pretrained(CHECKPOINT)
    asy, _ = load_baseline("asy", arguments.asy, model.config)
    open_book, book = load_baseline("open-book", arguments.open_book, model.config)
    if prepared:
        for own in (model, asy, open_book):
            own.prepare_for_inference()
    return {
        "parallel": (model, {"decoding": "parallel"}, None),
        "parallel, exact": (model, {"decoding": "parallel", "output_slots": True}, None),
        "parallel, greedy": (model, {"decoding": "parallel", "num_beams": 1, "num_return_sequences": 1}, None),
        "sequential": (model, {"decoding": "sequential"}, None),
        "asy": (asy, {}, None),
        "open-book": (open_book, {}, None if book is None else (book, processor)),
        "transformers": (Bart(model, prepared), {}, None),
    }


def compare(sides: dict[str, dict], examples: Examples, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure all models in batches of 8, prepared and plain, with and without towers."""
    calls = {}
    for kind, own in sides.items():
        for name, (model, settings, book) in own.items():
            for index in range(NUM_BATCHES):
                start = index * BATCH_SIZE
                features = examples.feature_inputs(start, BATCH_SIZE)
                if book is not None:
                    found = book[0].look_up(model, book[1], **examples.pixel_inputs(start, BATCH_SIZE))
                    features |= {key: value for key, value in found.items() if key.startswith("book")}
                for part, inputs in ((WITHOUT_TOWERS, features), (WITH_TOWERS, None)):
                    inputs = examples.pixel_inputs(start, BATCH_SIZE) if inputs is None else inputs
                    call = partial(generate, model, settings, book, inputs)
                    calls.setdefault((kind, name, part), []).append(call)
    rows = {kind: {} for kind in sides}
    for (kind, name, part), milliseconds in measure(calls, rounds).items():
        rows[kind].setdefault(name, {})[part] = round(milliseconds / BATCH_SIZE, 3)
    return rows


def measure_before(tree: Path, asy: Path, examples: Examples, rounds: int) -> dict[str, dict[str, float]]:
    """Measure parallel decoding and ASY with the code in another working tree."""
    batches = []
    for start in range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE):
        features, pixels = (dict(own(start, BATCH_SIZE)) for own in (examples.feature_inputs, examples.pixel_inputs))
        batches.append({WITHOUT_TOWERS: features, WITH_TOWERS: pixels})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batches, Path(folder, "batches.pt"))
        words = [str(Path(folder, "batches.pt")), str(asy.resolve()), str(CHECKPOINT), str(rounds)]
        command = [sys.executable, "-c", BEFORE_PROGRAM, *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **in_tree(tree))
    rows = json.loads(done.stdout.splitlines()[-1])
    for parts in rows.values():
        parts |= {part: round(1000 * seconds / BATCH_SIZE, 3) for part, seconds in parts.items()}
    return rows


def peak_megabytes(call: Callable[[], object]) -> float:
    """Return the peak growth of this process's memory during a call, in MB. Linux only."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls left would be used again
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again
    before = status("VmRSS")
    call()
    return round((status("VmHWM") - before) / 1024, 1)


def ratios(rows: dict[str, dict], kind: str, other: str) -> dict[str, float]:
    """Divide the time of parallel decoding by that of the other models."""
    found = {}
    for name in ("asy", "open-book", "transformers", "sequential"):
        if name not in rows[other]:
            continue
        for part, suffix in ((WITHOUT_TOWERS, ""), (WITH_TOWERS, " with towers")):
            found[f"parallel/{name}{suffix}"] = round(rows[kind]["parallel"][part] / rows[other][name][part], 3)
    return found


def with_prompts(model: OPTSGForTagGeneration, number: int) -> OPTSGForTagGeneration:
    """Return a copy of a model with another number of order prompts: the first ones, or all repeatedly."""
    model = copy.deepcopy(model)
    queries = model.model.prompt_encoder.queries
    repeated = queries.detach().repeat(-(-number // len(queries)), 1)[:number]
    model.model.prompt_encoder.queries = torch.nn.Parameter(repeated)
    model.config.num_prompts = number
    return model


def vary(sides: dict, examples: Examples, rounds: int) -> dict[str, dict]:
    """Measure batches, numbers of prompts and frames, and the share of the machine's matrix rate."""
    model, asy = sides["parallel"][0], sides["asy"][0]
    found = {"batch": {}, "prompts": {}, "frames": {}, "peak_megabytes": {}}
    for size in BATCH_SIZES:
        found["peak_megabytes"][size] = peak_megabytes(partial(model.generate, **examples.pixel_inputs(0, size)))
    for size in BATCH_SIZES:
        inputs = examples.feature_inputs(0, size)
        calls = {"parallel": [partial(model.generate, **inputs)], "asy": [partial(asy.generate, **inputs)]}
        times = measure(calls, rounds)
        found["batch"][size] = {name: round(milliseconds / size, 3) for name, milliseconds in times.items()}
    inputs = examples.feature_inputs(0, BATCH_SIZE)
    calls = {number: [partial(with_prompts(model, number).generate, **inputs)] for number in PROMPTS}
    found["prompts"] = {number: round(value / BATCH_SIZE, 3) for number, value in measure(calls, rounds).items()}
    calls = {}
    for number in FRAMES:
        video = inputs | {"frame_features": inputs["frame_features"].repeat(1, number, 1, 1)}
        video["frame_mask"] = inputs["frame_mask"].repeat(1, number)
        calls[number] = [partial(model.generate, **video)]
    found["frames"] = {number: round(value / BATCH_SIZE, 3) for number, value in measure(calls, rounds).items()}
    # The counter follows gradients.
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.generate(**inputs)
    gflop, rate = counter.get_total_flops() / BATCH_SIZE / 1e9, matrix_rate()
    own = gflop / found["batch"][BATCH_SIZE]["parallel"] * 1000
    found["matrix_rate"] = {
        "gflop_per_example": round(gflop, 3),
        "gflop_per_second": round(own, 1),
        "machine_gflop_per_second": round(rate, 1),
        "share": round(own / rate, 3),
    }
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--asy", type=Path, help="folder of a trained ASY model")
    parser.add_argument("--open_book", type=Path, help="folder of a trained open-book model")
    parser.add_argument("--before", type=Path, help="working tree of an earlier version; needs --asy")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/optsg").expanduser())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.before and not arguments.asy:
        parser.error("--before needs --asy")
    torch.set_num_threads(1)
    sides = {"prepared": make_sides(arguments, True), "plain": make_sides(arguments, False)}
    model, processor = sides["plain"]["parallel"][0], OPTSGProcessor.from_pretrained(CHECKPOINT)
    examples = Examples(Benchmark("icon_tagging", arguments.cache_dir), model, processor, max(BATCH_SIZES))
    earlier = []
    if arguments.before:
        ask = partial(measure_before, arguments.before.resolve(), arguments.asy, examples, arguments.rounds)
        earlier.append(ask())
    rows = compare(sides, examples, arguments.rounds)
    if arguments.before:
        earlier.append(ask())
        rows["before"] = {
            name: {part: round(statistics.mean(own[name][part] for own in earlier), 3) for part in parts}
            for name, parts in earlier[0].items()
        }
    print(json.dumps(rows, indent=1, allow_nan=False), flush=True)
    result = {
        "batch_size": BATCH_SIZE,
        "batches": NUM_BATCHES,
        "rounds": arguments.rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "clock": "median processor time on one thread, real time on two",
        "random_weights": [name for name in ("asy", "open_book") if getattr(arguments, name) is None]
        + ["transformers"],
        "rows": rows,
        "ratios": ratios(rows, "prepared", "prepared"),
        "ratios_against_plain": ratios(rows, "prepared", "plain"),
    }
    if arguments.before:
        result["before"] = revision(arguments.before)
        result["ratios_against_before"] = ratios(rows, "prepared", "before")
    result["one_thread"] = vary(sides["prepared"], examples, arguments.rounds)
    result |= environment()
    torch.set_num_threads(2)
    both = {name: sides["prepared"][name] for name in ("parallel", "asy")}
    result["two_threads"] = compare({"prepared": both}, examples, arguments.rounds)["prepared"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio} (plain: {result['ratios_against_plain'][name]})")


if __name__ == "__main__":
    main()
