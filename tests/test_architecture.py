"""The package keeps its layers, its sizes and its words."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
# From below. A package imports only from packages of its own layer or of layers below it.
LAYERS = {
    "modeling_optsg": 0,
    "modeling_optsg.data": 1,
    "modeling_optsg.evaluation": 1,
    "modeling_optsg.baselines": 1,
    "modeling_optsg.book": 1,
    "modeling_optsg.onnx": 1,
    "modeling_optsg.training": 2,
    "modeling_optsg.hub": 2,
    "optsg": 3,
}
# The public names of the package come from every layer.
FACADE = "modeling_optsg/__init__.py"
OLD_WORDS = re.compile(
    r"\b(clips?|pictures?|presets?|rooms?|learned by heart|made-up|goes on|gone on|anew)\b", re.IGNORECASE
)
# Names of others: the CLIP models, functions of libraries, options of x264 and HTML.
PROPER_NAMES = re.compile(
    r"CLIP\b|clip-vit|clip_(grad_norm_|vision_model|text_model)|gradient_clipping|[\w)\]]\.clip\(|\bpreset\b.*veryfast"
)


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in listed if name and (ROOT / name).is_file()]


def package_of(module: str) -> str | None:
    """The layer's package that a module belongs to; `None` for modules of others."""
    parts = module.split(".")
    for length in (2, 1):
        if (name := ".".join(parts[:length])) in LAYERS or name == "dataset_scripts":
            return name
    return None


def imports(path: str) -> set[str]:
    """The modules that a file imports, also inside functions."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` imports the module too.
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [p for p in tracked("modeling_optsg/*.py", "optsg/*.py") if p != FACADE])
def test_no_import_goes_up_the_layers(path):
    own = LAYERS[package_of(path.removesuffix(".py").replace("/", "."))]
    used = {package_of(module) for module in imports(path)} - {None, "dataset_scripts"}
    if path.startswith("modeling_optsg/"):
        # The facade has names of every layer.
        assert "modeling_optsg" not in {module for module in imports(path) if module.count(".") == 0}
    assert {package for package in used if LAYERS[package] > own} == set()


def test_the_flat_model_files_travel_alone():
    flat = {Path(path).stem for path in tracked("modeling_optsg/*.py") if path.count("/") == 1} - {"__init__"}
    for name in flat:
        used = {module for module in imports(f"modeling_optsg/{name}.py") if package_of(module)}
        assert {module.split(".")[1] for module in used if "." in module} <= flat, name
        # transformers saves what is imported relatively, from the same folder.
        tree = ast.parse((ROOT / f"modeling_optsg/{name}.py").read_text(encoding="utf-8"))
        absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        absolute += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert [module for module in absolute if package_of(module)] == [], name


@pytest.mark.parametrize("path", tracked("dataset_scripts/*.py"))
def test_dataset_scripts_stand_alone(path):
    assert {package_of(module) for module in imports(path)} <= {None, "dataset_scripts"}


@pytest.mark.parametrize("path", tracked("*.py"))
def test_files_and_functions_fit_on_a_sitting_and_a_screen(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    assert [(name, lines) for name, lines in lengths if lines > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("path", tracked("tests/test_*.py"))
def test_test_names_are_short(path):
    names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), re.M)
    assert [name for name in names if len(name) > 70] == []


@pytest.mark.parametrize("path", tracked("*.py", "*.md", "*.html", "*.yaml", "*.toml", "Makefile"))
def test_old_words_are_gone(path):
    if path in ("CHANGELOG.md", "LICENSE", "tests/test_architecture.py"):
        pytest.skip("it names the old words")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if OLD_WORDS.search(PROPER_NAMES.sub("", line))] == []


def json_dumps_without_a_rule_for_nan(path: str) -> list[int]:
    """The lines of calls of `json.dumps` that do not say whether NaN is allowed, unless the result is only hashed."""
    tree, hashed, calls = ast.parse((ROOT / path).read_text(encoding="utf-8")), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("sha256", "update"):
                hashed |= set(ast.walk(node))
            if ast.unparse(node.func) in ("json.dump", "json.dumps"):
                calls.append(node)
    return [node.lineno for node in calls if node not in hashed and "allow_nan" not in {k.arg for k in node.keywords}]


@pytest.mark.parametrize("path", [path for path in tracked("*.py") if not path.startswith("tests/")])
def test_no_json_contains_nan(path):
    # NaN is not JSON, and most programs cannot read it. A metric over no tags is null.
    assert json_dumps_without_a_rule_for_nan(path) == []


def test_no_program_patches_the_module_path():
    for path in tracked("examples/*.py", "experiments/*.py", "benchmarks/*.py", "space/*.py"):
        assert "sys.path" not in (ROOT / path).read_text(encoding="utf-8"), path


def test_the_suffixes_of_images_and_videos_are_listed_once():
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in tracked("*.py") if "tests/" not in path}
    assert [path for path, source in sources.items() if ".mkv" in source] == ["dataset_scripts/media_suffixes.py"]
    assert [path for path, source in sources.items() if ".jp2" in source] == ["dataset_scripts/media_suffixes.py"]
