"""Every command and every Python block of the pages under docs/ and of the README's first steps runs as it stands, in
a clone with a few files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub_client
import pytest
from hub_server import Account, HubServer
from PIL import Image

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# The commands of this page are run by test_sidecars.py.
ELSEWHERE = {"photo-libraries"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220), "green": (40, 190, 40), "grey": (128, 128, 128)}


def blocks(page: Path) -> list[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    if page == README:
        # The rest of it speaks of data and hours that a test has not.
        text = re.search(r"^## In three lines\n(.*?)^## ", text, re.M | re.S)[1]
    return BLOCK.findall(text)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the repository's entries and the files the pages speak of; what is written stays in it."""
    for entry in ("examples", "metrics", "dataset_scripts", "modeling_optsg", "space"):
        if (ROOT / entry).exists():
            (tmp_path / entry).symlink_to(ROOT / entry)
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    images = ROOT / "examples/images"
    shutil.copytree(images, tmp_path / "images")
    Image.open(images / "bus.png").convert("RGB").save(tmp_path / "photo.jpg")
    shutil.copy(images / "ship-wheel.mp4", tmp_path / "video.mp4")
    for split, count in {"train": 12, "validation": 4, "test": 4}.items():
        folder = tmp_path / "my_images" / split
        folder.mkdir(parents=True)
        rows = []
        for index in range(count):
            colour = list(COLOURS)[index % len(COLOURS)]
            Image.new("RGB", (64, 64), COLOURS[colour]).save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "title": f"a {colour} square", "tags": [colour, "colour", "square"]}
            rows.append(json.dumps(row))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shutil.copytree(ROOT / "checkpoints/optsg-icon-small", tmp_path / "runs/mine")
    # As a training leaves it.
    (tmp_path / "runs/mine/README.md").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of somebody who is logged in to a Hub, the one on loopback."""
    home = tmp_path_factory.mktemp("home")
    with HubServer(tmp_path_factory.mktemp("hub"), {"hf_writes": Account("ann", ("org",))}).running() as hub:
        yield hub_client.environment(hub.endpoint, home / "huggingface", "hf_writes") | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "ACCELERATE_USE_CPU": "true",
        }


def run(command: str, environment: dict) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ELSEWHERE], ids=lambda page: page.stem)
def test_everything_on_the_page_runs(page, clone, environment):
    python = []
    for language, block in blocks(page):
        if language == "sh":
            for command in commands(block):
                run(command, environment)
        elif language == "python":
            # A page's blocks are one program: later ones use what earlier ones made.
            python.append(block)
            Path("page.py").write_text("\n".join(python), encoding="utf-8")
        elif language == "json":
            json.loads(block.replace("…", '""'))
        else:
            raise AssertionError(f"a block of {language!r} is not run by anything")
    if python:
        run(f"{shlex.quote(sys.executable)} page.py", environment)


def test_links_of_the_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "MODEL_CARD.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
