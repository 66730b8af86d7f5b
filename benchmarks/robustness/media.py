"""Checks `optsg tag` on damaged images and videos, one by one and in a folder."""

import random
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np

from modeling_optsg.video_utils import read_frames

from . import images, videos
from .jobs import make, run
from .results import Result, Workplace, choose, read_tags, result

KINDS = {"images": images, "videos": videos}
FILES_PER_FOLDER = 24
FOLDER_SECONDS = 60.0


def make_file(kind: str, seed: int, folder: Path) -> tuple[str, Path]:
    """Write the damaged file of a seed; returns its damage and its path."""
    damage, name = make(lambda: _write_file(kind, seed, folder))
    return damage, folder / name


def seeded(kind: str, seed: int) -> random.Random:
    """Return the random generator of a seed."""
    return random.Random(f"{kind} {seed}")


def _write_file(kind: str, seed: int, folder: Path) -> tuple[str, str]:
    module = KINDS[kind]
    damage = choose(module.DAMAGES, seed, module.WEIGHTS)
    suffix, content = module.DAMAGES[damage](seeded(kind, seed))
    name = f"{kind}-{seed}{suffix}"
    (folder / name).write_bytes(content)
    return damage, name


def check_image(workplace: Workplace, seed: int) -> Result:
    """Tag the image of a seed."""
    return _check_file(workplace, "images", images, seed)


def check_video(workplace: Workplace, seed: int) -> Result:
    """Tag the video of a seed."""
    return _check_file(workplace, "videos", videos, seed)


def _check_file(workplace: Workplace, kind: str, module: ModuleType, seed: int) -> Result:
    damage, path = make_file(kind, seed, workplace.folder)
    job = workplace.tag("--json", path)
    if job.status == 0 and read_tags(job).get(str(path)) is not None:
        outcome = "tagged"
    elif job.status == 1 and path.name in job.errors:
        outcome = "wrongly refused" if damage in module.READABLE else "refused"
    else:
        outcome = "not named"
    jobs = [job]
    if damage == videos.PALETTE and outcome == "tagged":
        jobs.append(run(lambda: _compare_palette_frames(path, seed)))
        outcome = "wrong pixels" if jobs[1].status else outcome
    path.unlink()
    return result(kind, seed, damage, outcome, *jobs)


def _compare_palette_frames(path: Path, seed: int) -> int:
    _, expected = videos.palette_levels(seeded("videos", seed))
    levels = [np.asarray(frame.convert("L")).mean() for frame in read_frames(path, len(expected))]
    return 0 if np.allclose(levels, expected, atol=2) else 1


def check_folder(workplace: Workplace, seed: int) -> Result:
    """Tag a folder of damaged files among undamaged ones; each is tagged, or its error names it."""
    rng, folder = random.Random(f"folders {seed}"), workplace.folder / f"folder-{seed}"
    workplace.add_good_files(folder)
    for _ in range(FILES_PER_FOLDER):
        kind = rng.choice(("images", "images", "videos"))
        make_file(kind, rng.randrange(len(images.DAMAGES) * 100), folder)
    job = workplace.tag("--json", "--write", "json", folder, max_seconds=FOLDER_SECONDS)
    tags = read_tags(job)
    files = [path for path in folder.iterdir() if not path.name.endswith(".optsg.json")]
    written = {path.name for path in folder.glob("*.optsg.json")}
    silent = [
        path.name
        for path in files
        if (tags.get(str(path)) is None and path.name not in job.errors)
        or (tags.get(str(path)) and f"{path.name}.optsg.json" not in written)
    ]
    outcome = "lost neighbour" if workplace.lost_neighbours(tags) else "not named" if silent else "all reported"
    shutil.rmtree(folder)
    return result("folders", seed, f"{FILES_PER_FOLDER} damaged files", outcome, job)
