"""Run this package in separate processes with empty caches, which reach no Hub except the local one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CARD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n# A card\n"

SERVER_LOOP = """
import contextlib, io, json, os, sys, time, traceback
# The Hub client waits half a minute in all between its attempts; it behaves the same without waiting.
time.sleep = lambda seconds: None
from optsg import main
for line in sys.stdin:
    request = json.loads(line)
    os.environ["HF_TOKEN"] = request["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "code" in request:
                exec(request["code"], {"__name__": "served"})
                status = 0
            else:
                status = main(request["arguments"])
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
            status = -1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
HIDE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_optsg", "optsg", "dataset_scripts"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def copy_with_card(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint to a folder that a test may change, with a model card."""
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text(CARD)
    return folder


def environment(endpoint: str, home: Path, token: str) -> dict[str, str]:
    """Return the environment of a process whose libraries keep all their files below `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # The libraries read these when they are imported. Without Xet, large files are uploaded by LFS.
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def run_without_package(program: str, arguments: list, endpoint: str, home: Path, token: str) -> Any:
    """Run a program that cannot import this package, and return the JSON value it prints."""
    variables = environment(endpoint, home, token)
    del variables["PYTHONPATH"]
    home.mkdir()
    command = [sys.executable, "-c", HIDE_PACKAGE + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Client:
    """A process that runs `optsg` commands and Python code, one after the other.

    Args:
        endpoint: address of the Hub.
        home: folder for caches and as working directory; it is created.
        token: used when a call gives no other token.
    """

    def __init__(self, endpoint: str, home: Path, token: str):
        self.token = token
        home.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER_LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env=environment(endpoint, home, token),
        )

    def __call__(self, *arguments: object, token: str | None = None) -> tuple[int, str, str]:
        """Run `optsg` and return exit status, standard output and standard error."""
        return self._request(token, arguments=list(map(str, arguments)))

    def python(self, code: str, token: str | None = None) -> tuple[int, str, str]:
        """Run Python code and return exit status, standard output and standard error."""
        return self._request(token, code=code)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _request(self, token: str | None, **request: Any) -> tuple[int, str, str]:
        line = json.dumps(request | {"token": self.token if token is None else token})
        print(line, file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))
