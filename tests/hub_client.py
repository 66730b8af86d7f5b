"""Programs of this package in processes of their own, with empty caches, that know no Hub but the one on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CARD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n# A card\n"

# Where it is is read when the library is imported; and it would send large files by Xet.
SERVED = """
import contextlib, io, json, os, sys, time, traceback
# A client waits between its attempts, half a minute in all; what it does is the same without.
time.sleep = lambda seconds: None
from modeling_optsg.cli import main
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "code" in asked:
                exec(asked["code"], {"__name__": "served"})
                status = 0
            else:
                status = main(asked["arguments"])
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
            status = -1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
# Put before a program: it runs as where this package is not installed.
ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_optsg", "dataset_scripts"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
"""


def copy_with_card(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint that may be published, as a folder that a test may spoil."""
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text(CARD)
    return folder


def environment(endpoint: str, home: Path, token: str) -> dict[str, str]:
    """Of a process whose libraries keep everything below `home`, which may not be there yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def run_elsewhere(program: str, arguments: list, endpoint: str, home: Path, token: str):
    """What a program prints as JSON, run where this package is not installed."""
    variables = environment(endpoint, home, token)
    del variables["PYTHONPATH"]
    home.mkdir()
    command = [sys.executable, "-c", ELSEWHERE + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Client:
    """One process that runs `optsg` as often as it is asked to."""

    def __init__(self, endpoint: str, home: Path, token: str):
        self.token = token
        home.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env=environment(endpoint, home, token),
        )

    def __call__(self, *arguments, token: str | None = None) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of `optsg` with these arguments."""
        return self._ask(token, arguments=list(map(str, arguments)))

    def python(self, code: str, token: str | None = None) -> tuple[int, str, str]:
        """The same of Python code."""
        return self._ask(token, code=code)

    def _ask(self, token: str | None, **asked) -> tuple[int, str, str]:
        line = json.dumps(asked | {"token": self.token if token is None else token})
        print(line, file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
