"""The wheel and the sdist build, contain every module and data file, and install."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_optsg", "optsg", "dataset_scripts")
DATA_NAMES = {"package.json", "package-lock.json", "README.md", "NOTICE"}


def package_files():
    """Yield the modules and data files of the packages in the working tree."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            is_data = package == "dataset_scripts" and path.name in DATA_NAMES or path.parent.name == "hub"
            is_data = is_data and path.suffix != ".pyc" and path.is_file()
            if path.suffix == ".py" or is_data:
                yield path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build the sdist, and the wheel from it; their paths, the wheel's first."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    # A copy, because setuptools leaves a build folder behind, and the next wheel would contain its stale files.
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    names = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "Makefile")
    for name in (*names, "requirements-towers.txt"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [sdist] = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_every_module_and_data_file(distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assert set(package_files()) <= names
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == set(package_files()), "the wheel has no other files"


def test_the_sdist_also_has_the_tests_and_the_licence(distributions):
    with tarfile.open(distributions[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {*package_files(), "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py", "pyproject.toml"}
    assert expected <= names
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= names


def test_the_installed_wheel_runs_without_the_source_tree(distributions, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path]
    subprocess.run([*pip, distributions[0]], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, tmp_path / "bin" / "optsg", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"optsg \d+\.\d+\.\d+\n", done.stdout)


@pytest.fixture(scope="module")
def metadata(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return wheel.read(path).decode()


def test_the_requirements_allow_a_range_of_versions(metadata):
    requirements = re.findall(r"^Requires-Dist: ([A-Za-z0-9_.-]+)(.*)$", metadata, flags=re.MULTILINE)
    assert not [name for name, versions in requirements if "==" in versions.partition(";")[0]]
    assert not [name for name, versions in requirements if ";" not in versions and ">=" not in versions]
    assert dict(requirements)["transformers"].count(",") == 1, "a lower and an upper bound"
    assert "torchvision" not in dict(requirements) and "timm" not in dict(requirements)
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.parametrize("path", ["modeling_optsg/hub/requirements.txt", "space/requirements.txt"])
def test_other_requirement_files_have_the_same_bounds(metadata, path):
    declared = {Requirement(line.partition(";")[0]) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)}
    required = set(map(Requirement, (ROOT / path).read_text().splitlines()))
    assert required <= declared
