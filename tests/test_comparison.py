"""The programs of `experiments/icon_tagging` that score checkpoints, on tiny checkpoints of every model type."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")

from experiments.icon_tagging import compare, diagnose, operating_point, recipe, tag_book, timing  # noqa: E402
from modeling_optsg.baselines.registry import MODEL_TYPES  # noqa: E402
from modeling_optsg.training import trainer

RESULTS = Path(__file__).parents[1] / "experiments/icon_tagging/results"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
ROWS = {"op-tsg, parallel", "op-tsg, sequential", "model-f, parallel", "model-f, sequential"}
ROWS |= {"model-g", "asy", "open-book", "sequence", "knn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour, titles and tags that a page must escape, and one novel tag in the validation split."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            colour = list(COLOURS)[index % 4]
            Image.new("RGB", (48, 48), COLOURS[colour]).save(root / split / f"{index}.png")
            tags = [colour, "<b>bold</b>"] + (["unseen"] if split == "validation" and index == 0 else [])
            title = f"<script>alert({index})</script> {colour} {split}{index}"
            rows.append({"file_name": f"{index}.png", "title": title, "tags": tags})
        lines = (json.dumps(row) + "\n" for row in rows)
        (root / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


class Programs:
    """Runs `recipe.py` with training runs in this process, and counts them."""

    def __init__(self, root):
        self.root, self.results, self.train, self.trained = root, root / "results", trainer, []

    def recipe(self, *words):
        def train(arguments, output_dir, cache_dir):
            self.trained.append(output_dir.name)
            words = [*arguments, "--output_dir", output_dir, "--cache_dir", cache_dir]
            # Models differ in precision. Outside the tests, each is trained in a process of its own.
            AcceleratorState._reset_state()
            self.train.main([str(word) for word in words])
            AcceleratorState._reset_state()

        words = [*words, "--config", self.root / "config.json", "--work_dir", self.root / "runs"]
        words += ["--results_dir", self.results, "--cache_dir", self.root / "cache"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "train", train)
            recipe.main([str(word) for word in words])

    def run(self, program, *words):
        program.main([str(word) for word in (*words, "--cache_dir", self.root / "cache")])

    def result(self, name):
        return json.loads((self.results / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def programs(folder, towers, tmp_path_factory):
    """Checkpoints of all model types, trained by `recipe.py`."""
    root = tmp_path_factory.mktemp("recipe")
    config = {
        "dataset": str(folder),
        "vision_tower": str(towers / "vision"),
        "text_tower": str(towers / "text"),
        "tag_vocab_size": 270,
        "max_tag_tokens": 16,
        "config_overrides": {"num_prompts": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        "num_train_epochs": 1,
        "train_batch_size": 8,
        "eval_steps": 0.99,
        "num_negatives": 0,
        "pad_biases": [-1.0],
    }
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    programs = Programs(root)
    programs.recipe("models")
    return programs


@pytest.fixture(scope="module")
def checkpoints(programs):
    """Folders of all checkpoints, OP-TSG first."""
    names = sorted(programs.trained, key=lambda name: name != "op-tsg-seed0")
    return [programs.root / "runs" / name for name in names]


def keys(value):
    """Return the keys of nested dicts, without values."""
    return {name: keys(child) for name, child in value.items()} if isinstance(value, dict) else None


def test_rows_have_the_keys_of_the_committed_results(programs):
    committed = json.loads((RESULTS / "models.json").read_text(encoding="utf-8"))
    found = programs.result("models.json")
    assert [name for name in found if name in committed] == list(committed)
    for name, row in committed.items():
        assert keys(found[name]["runs"][0]) == keys(row["runs"][0])


def test_every_model_type_is_trained_and_scored(programs, folder):
    assert set(programs.result("models.json")) == set(MODEL_TYPES)
    for row in programs.result("models.json").values():
        (run,) = row["runs"]
        assert run["examples"] == 16 and run["command"].startswith("python examples/train.py")
        assert all(0 <= score["micro_f1"] <= 100 for score in run["test"].values())


def test_runs_with_results_are_not_repeated(programs, folder):
    trained = list(programs.trained)
    programs.recipe("models")
    assert programs.trained == trained
    result = programs.result("models.json")
    without_knn = {name: row for name, row in result.items() if name != "knn"}
    (programs.results / "models.json").write_text(json.dumps(without_knn), encoding="utf-8")
    programs.recipe("models")
    assert programs.trained == trained, "a checkpoint without a result is scored, not trained"
    repeated = programs.result("models.json")
    assert json.dumps(repeated["knn"]["runs"][0]["test"]) == json.dumps(result["knn"]["runs"][0]["test"])
    assert json.dumps({**repeated, "knn": None}) == json.dumps({**without_knn, "knn": None})


def test_operating_point_has_the_keys_of_the_committed_results(programs, checkpoints, folder):
    words = ["--output", programs.root / "point.json", "--dataset", folder]
    # The second call adds to the file of the first.
    for name in ("op-tsg-seed0", "asy-seed0"):
        programs.run(operating_point, "--checkpoints", programs.root / "runs" / name, *words)
    found = json.loads((programs.root / "point.json").read_text(encoding="utf-8"))
    committed = json.loads((RESULTS / "operating_point.json").read_text(encoding="utf-8"))
    assert found.keys() == committed.keys()
    for name, run in found["runs"].items():
        assert keys(run) == keys(committed["runs"][name])
    assert found["runs"]["op-tsg-seed0"]["parts"]["classifier alone"]["settings"]["fusion_weights"][0] == 0
    with pytest.raises(SystemExit):
        programs.run(operating_point, "--checkpoints", *checkpoints, *words, "--metric_for_best_model", "micro_f1")


def test_books_are_scored(programs, folder, monkeypatch, capsys):
    monkeypatch.setattr("modeling_optsg.book.tag_book.MIN_FIT_EXAMPLES", 1)
    output = programs.root / "book.json"
    words = ["--checkpoints", programs.root / "runs/op-tsg-seed0", "--output", output, "--dataset", folder]
    programs.run(tag_book, *words, "--metrics", "micro_f1")
    rows = json.loads(output.read_text(encoding="utf-8"))["runs"]["op-tsg-seed0"]["micro_f1"]
    own = {"op-tsg-open-book", *(f"op-tsg-open-book, {ratio} of the book" for ratio in (0.5, 0.1))}
    assert rows.keys() == own | {"model", "book", "model and book", "op-tsg-open-book, sequential"}
    assert all(0 <= row["test"]["micro_f1"] <= 100 for row in rows.values())
    assert capsys.readouterr().out.count("op-tsg-seed0 micro_f1") == len(rows)
    programs.run(tag_book, *words, "--metrics", "micro_f1")
    assert not capsys.readouterr().out, "a checkpoint with results is skipped"

    words[3] = programs.root / "ablations.json"
    programs.run(tag_book, *words, "--metrics", "micro_f1", "--ablations")
    rows = json.loads(words[3].read_text(encoding="utf-8"))["runs"]["op-tsg-seed0"]["micro_f1"]
    assert {"model", "model and book, only words", "op-tsg-open-book, 5 neighbours", "reader without evidence"} < set(
        rows
    )
    assert all(set(row) == {"validation"} and row["validation"]["micro_f1"] >= 0 for row in rows.values())


@pytest.mark.slow
def test_all_model_types_are_timed(programs, checkpoints, folder):
    output = programs.root / "timing.json"
    words = ["--dataset", folder, "--num_batches", 1, "--num_rounds", 1, "--image_sizes", 32, "--output", output]
    programs.run(timing, "--checkpoints", *checkpoints, *words)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert set(result["rows"]) == ROWS and result["machine"].endswith("1 threads")
    for row in result["rows"].values():
        assert row["seconds_per_example"] > 0 and row["seconds_per_example_without_towers"] > 0
    assert result["vision_tower"]["32"] > 0
    with pytest.raises(ValueError, match="are both a op-tsg"):
        programs.run(timing, "--checkpoints", checkpoints[0], checkpoints[0], *words)
    with pytest.raises(ValueError, match="8 test examples are fewer than 2 batches"):
        programs.run(timing, "--checkpoints", checkpoints[0], *words, "--num_batches", 2)


def test_models_are_compared(programs, checkpoints, folder):
    # The second seed of a row is a copy of the first.
    again = programs.root / "runs/knn-seed1"
    again.symlink_to(programs.root / "runs/knn-seed0")
    output = programs.root / "comparison"
    programs.run(compare, "--checkpoints", *checkpoints, again, "--dataset", folder, "--output_dir", output)
    comparison = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    assert set(comparison["rows"]) == ROWS and str(folder) != comparison["dataset"]
    scores = programs.result("models.json")
    for model_type in ("knn", "sequence", "model-g"):
        (run,) = scores[model_type]["runs"]
        assert comparison["rows"][model_type]["full_f1"] == run["test"]["only"]["full_f1"]
    assert comparison["rows"]["knn"]["seeds"] == [0, 0]
    for entry in comparison["rows"].values():
        assert entry["modalities"]["image+title"]["full_f1"] == entry["full_f1"]
    with Image.open(output / "f1_by_frequency.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5
    page = (output / "examples.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>bold" not in page and "http" not in page
    assert "&lt;script&gt;" in page and "&lt;b&gt;bold" in page


def test_runs_with_different_arguments_are_not_compared():
    summaries = {
        "a": {"arguments": {"train_batch_size": 1, "model_type": "asy", "seed": 0, "dataloader_num_workers": 0}},
        "b": {"arguments": {"train_batch_size": 1, "model_type": "knn", "seed": 1, "num_train_epochs": 2}},
        "c": {"arguments": {"train_batch_size": 9, "model_type": "asy", "seed": 0}},
    }
    assert compare.check_same_arguments({name: summaries[name] for name in "ab"}) == {"train_batch_size": 1}
    with pytest.raises(ValueError, match="a and c were trained with different train_batch_size"):
        compare.check_same_arguments(summaries)
    # Only models of different types may have different phases.
    summaries["c"]["arguments"] |= {"train_batch_size": 1, "num_train_epochs": 2}
    with pytest.raises(ValueError, match="a and c were trained with different num_train_epochs"):
        compare.check_same_arguments(summaries)


def test_means_over_seeds_are_compared():
    def scores(f1):
        metrics = dict.fromkeys(compare.METRICS, f1) | {"novel": {"predicted": f1, "exact_hits": 0}}
        groups = [{"from": 1, "to": None, "tags": 3, "f1": f1}]
        return metrics | {"by_frequency": groups, "modalities": {"image": dict.fromkeys(compare.F1_METRICS, f1)}}

    mean = compare.average([scores(40), scores(41)])
    assert mean["full_f1"] == mean["by_frequency"][0]["f1"] == mean["modalities"]["image"]["micro_f1"] == 40.5
    assert mean["novel"] == {"predicted": 40.5, "exact_hits": 0} and mean["by_frequency"][0]["tags"] == 3


def test_a_diagnosis_accounts_for_every_tag(programs, checkpoints, folder):
    output = programs.root / "diagnosis.json"
    words = ["--dataset", folder, "--num_train_examples", 4]
    programs.run(diagnose, "--checkpoint", checkpoints[0], "--output", output, *words)
    found = json.loads(output.read_text(encoding="utf-8"))
    committed = json.loads((RESULTS / "diagnosis.json").read_text(encoding="utf-8"))
    varying = dict.fromkeys(("tags", "by_training_count", "by_tokens"))
    assert keys(found | varying) == keys(committed | varying)
    assert found["fates"] == committed["fates"] and set(committed["tags"]) <= set(committed["fates"])
    assert sum(found["tags"].values()) == 17 and found["tags"]["novel"] == 1
    for groups in (found["by_training_count"], found["by_tokens"]):
        assert sum(sum(group.values()) for group in groups.values()) == 17
    assert found["by_training_count"]["0"] == {"novel": 1}
    oracles = {name: metrics["full_f1"] for name, metrics in found["validation"].items()}
    assert oracles["oracle: every training tag"] == 100
    assert oracles["oracle: every correct candidate"] >= oracles["predictions"]
    output.with_suffix(".png").unlink()
    programs.run(diagnose, "--output", output)
    assert output.with_suffix(".png").stat().st_size > 1000
