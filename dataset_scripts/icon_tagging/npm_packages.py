"""Installs the pinned icon sets with npm, or checks a folder where they are installed."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# A folder with package.json and package-lock.json. Each further configuration has its own.
DEFAULT_SOURCES = Path(__file__).parent
SOURCES = {
    "default": DEFAULT_SOURCES,
    "more_drawings": DEFAULT_SOURCES / "sources" / "more_drawings",
    "unseen": DEFAULT_SOURCES / "sources" / "unseen",
}
PACKAGE_JSON = DEFAULT_SOURCES / "package.json"
PACKAGE_LOCK = DEFAULT_SOURCES / "package-lock.json"


def lock_hash(sources: Path = DEFAULT_SOURCES) -> str:
    """Return a hash of `package-lock.json`."""
    return hashlib.sha256((sources / PACKAGE_LOCK.name).read_bytes()).hexdigest()[:16]


def locked_versions(sources: Path = DEFAULT_SOURCES) -> dict[str, str]:
    """Return the version of each package that `package-lock.json` pins."""
    packages = json.loads((sources / PACKAGE_LOCK.name).read_text(encoding="utf-8"))["packages"]
    return {path.removeprefix("node_modules/"): entry["version"] for path, entry in packages.items() if path}


def install(work_dir: Path, sources: Path = DEFAULT_SOURCES) -> Path:
    """Run `npm ci` in `work_dir` unless an earlier call did, and return the `node_modules` folder.

    Args:
        work_dir: Folder of the installed packages.
        sources: Folder with the `package.json` and `package-lock.json` to install from.

    Raises:
        FileNotFoundError: npm is not on the PATH.
        RuntimeError: npm failed; the message ends with npm's own.
    """
    installed = work_dir / f"npm-{lock_hash(sources)}"
    if installed.is_dir():
        return installed / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm is not on the PATH, and icon-tagging is built from npm packages. Install Node.js, which includes "
            f"npm; or run `npm ci --ignore-scripts` on another machine in a copy of {sources}, copy its "
            "node_modules folder to this machine and pass it as data_dir='path/to/node_modules'"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    # Only a complete install gets its final name, so that an interrupted one is not used.
    unfinished = Path(tempfile.mkdtemp(prefix=f"{installed.name}-unfinished-", dir=work_dir))
    try:
        for file in (PACKAGE_JSON, PACKAGE_LOCK):
            shutil.copy(sources / file.name, unfinished)
        logger.info("npm ci: installing %s in %s", ", ".join(locked_versions(sources)), installed)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        run = subprocess.run(command, cwd=unfinished, capture_output=True, text=True, errors="replace")
        if run.returncode:
            output = (run.stderr.strip() or run.stdout.strip())[-2000:]
            raise RuntimeError(f"`npm ci --ignore-scripts` failed with status {run.returncode}:\n{output}")
        try:
            os.rename(unfinished, installed)
        except OSError:
            # Another process may have finished the same install in the meantime.
            if not installed.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return installed / "node_modules"


def check_installed(folder: Path, sources: Path = DEFAULT_SOURCES) -> Path:
    """Check that every icon set is in `folder` or its `node_modules`, and return that `node_modules` folder.

    Other versions than the pinned ones are allowed and logged as warnings; examples and statistics then differ.

    Args:
        folder: The `node_modules` folder or its parent.
        sources: Folder with the `package-lock.json` that names the sets.

    Raises:
        FileNotFoundError: A set is missing.
    """
    node_modules = folder / "node_modules" if (folder / "node_modules").is_dir() else folder
    missing = [package for package in locked_versions(sources) if not (node_modules / package).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{node_modules} lacks {', '.join(missing)}; data_dir must be a node_modules folder (or its parent) that "
            f"`npm ci --ignore-scripts` made from {sources / PACKAGE_LOCK.name}"
        )
    for package, pinned in locked_versions(sources).items():
        manifest = node_modules / package / "package.json"
        found = json.loads(manifest.read_text(encoding="utf-8")).get("version") if manifest.is_file() else None
        if found != pinned:
            logger.warning(
                "%s in %s is version %s, not the pinned %s: the dataset will differ from its card",
                package, node_modules, found, pinned,
            )  # fmt: skip
    return node_modules
