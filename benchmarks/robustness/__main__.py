r"""Tag, load and train with damaged inputs, and count what happens.

    python -m benchmarks.robustness --output results/robustness.json
    python -m benchmarks.robustness --kinds images --seeds 17

Each input is made from its seed. It passes if it is read, or if an error of one line names it. It fails if there is a
Python traceback or a crash, if a command takes more than 10 s or 1.5 GB, or if an undamaged file next to it is not
tagged. `FAILURES` in results.py lists all failures. The program runs on Linux.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":
    # A forked process can use neither an accelerator nor the threads of its parent.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

from modeling_optsg.evaluation.reporting import environment  # noqa: E402

from . import features, media, metadata, models, sidecars, states  # noqa: E402
from .results import FAILURES, Result, Workplace  # noqa: E402

PACKAGES = ("pillow", "av", "pillow-heif", "h5py", "pyarrow", "safetensors")
# The check of each kind, and its number of inputs.
KINDS: dict[str, tuple[Callable[[Workplace, int], Result], int]] = {
    "images": (media.check_image, 700),
    "videos": (media.check_video, 300),
    "folders": (media.check_folder, 40),
    "metadata": (metadata.check_metadata, 160),
    "sidecars": (sidecars.check_sidecars, 108),
    "models": (models.check_model, 240),
    "features": (features.check_features, 108),
    "states": (states.check_state, 20),
}


def check(workplace: Workplace, kind: str, seeds: Sequence[int]) -> list[Result]:
    """Run the check of a kind for each seed, and print the failures."""
    results = []
    for seed in seeds:
        results.append(KINDS[kind][0](workplace, seed))
        if results[-1].outcome in FAILURES:
            print(f"{kind} {seed} ({results[-1].damage}): {results[-1].outcome}: {results[-1].error}", flush=True)
    return results


def summarize(results: Sequence[Result]) -> dict:
    """Count outcomes by kind and by damage, and list all failures."""
    kinds = {}
    for kind in dict.fromkeys(result.kind for result in results):
        own = [result for result in results if result.kind == kind]
        damages: dict[str, Counter] = {}
        for result in own:
            # After the colon there is the damaged file or value.
            damages.setdefault(result.damage.split(":")[0], Counter())[result.outcome] += 1
        kinds[kind] = {
            "inputs": len(own),
            "outcomes": dict(Counter(result.outcome for result in own).most_common()),
            "failures": sum(result.outcome in FAILURES for result in own),
            "max_seconds": round(max(result.seconds for result in own), 1),
            "max_megabytes": round(max(result.peak_bytes for result in own) / 1e6),
            "by_damage": {damage: dict(counts.most_common()) for damage, counts in sorted(damages.items())},
        }
    failures = [asdict(result) for result in results if result.outcome in FAILURES]
    return {"kinds": kinds, "failures": failures}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kinds and return the exit status, 1 if there are failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of each kind (default: 0, 1, 2 and so on)")
    parser.add_argument("--output", type=Path, help="result file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))
        for kind in args.kinds:
            results += check(workplace, kind, args.seeds or range(KINDS[kind][1]))
            found = summarize(results) | {"seeds": args.seeds or "0, 1, 2 and so on"}
            found |= {"seconds": round(time.monotonic() - start)} | environment()
            found["versions"] |= {name: _version(name) for name in PACKAGES}
            print(f"{kind}: {found['kinds'][kind]['outcomes']}", flush=True)
            if args.output:
                # After each kind, so that a stopped run has a result.
                args.output.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
                args.output.write_text(text + "\n", encoding="utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
