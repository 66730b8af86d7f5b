"""The commands and Python blocks of README and docs/ run as printed, and print what the pages show.

Blocks of these languages are checked:

- `sh` and `python` are run in a clone that has a few images. The Python blocks of a page are one program.
- `text` is the output of the block before it. `...` stands for anything.
- `json` must parse; `...` in it stands for any value.
- `bash` is shown only: the command needs the network, a GPU, a data set or hours.
"""

import importlib.util
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
# test_sidecars.py runs the commands of this page.
ELSEWHERE = {"photo-libraries"}
# Packages that a page needs and that `make test` does not install.
PACKAGES = {"serving": ("bitsandbytes", "onnx", "onnxruntime", "onnxscript", "peft", "torchao")}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"sh", "python", "text", "json", "bash", "bibtex"}
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220), "green": (40, 190, 40), "grey": (128, 128, 128)}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


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
    # As a training run leaves it.
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


def run(command: str, environment: dict) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def commands(block: str) -> list[str]:
    """The commands of a block. The environment of the tests has what `pip` and `make` would install."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "pip install", "make "))]


def assert_printed(expected: str, output: str) -> None:
    """Checks that the output has the expected text, whatever the white space. Probabilities may differ by 0.01."""
    pattern = re.escape(" ".join(expected.split())).replace(re.escape("..."), ".*")
    pattern = re.sub(r"\d+\\\.\d+", r"(\\d+\\.\\d+)", pattern)
    found = re.search(pattern, " ".join(output.split()))
    assert found, f"expected\n{expected}\ngot\n{output}"
    # Encoders of JPEG files differ.
    assert [float(number) for number in found.groups()] == pytest.approx(
        [float(number) for number in re.findall(r"\d+\.\d+", expected)], abs=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ELSEWHERE], ids=lambda page: page.stem)
def test_everything_on_the_page_runs(page, clone, environment):
    if missing := [name for name in PACKAGES.get(page.stem, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    program, shown, output = [], [], ""
    previous = None
    for language, block in blocks(page):
        if language == "sh":
            output = "".join(run(command, environment) for command in commands(block))
        elif language == "python":
            program.append(block)
        elif language == "text" and previous == "sh":
            assert_printed(block, output)
        elif language == "text":
            shown.append(block)
        elif language == "json":
            json.loads(re.sub(r"\.\.\.|…", '""', block))
        previous = language
    if program:
        Path("page.py").write_text("\n".join(program), encoding="utf-8")
        printed = run(f"{shlex.quote(sys.executable)} page.py", environment)
        for block in shown:
            assert_printed(block, printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_has_a_known_language(page):
    assert {language for language, _ in blocks(page)} <= LANGUAGES


def test_links_of_the_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "MODEL_CARD.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
