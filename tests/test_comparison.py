"""`examples/compare.py`: every system on a folder of plain images, and what it writes about them."""

import json

import pytest
from PIL import Image

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compare(load_program):
    return load_program("compare")


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory):
    """Images of one colour; the titles hold what a page must not take for its own."""
    root = tmp_path_factory.mktemp("images")
    colours = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            colour = list(colours)[index % 4]
            Image.new("RGB", (48, 48), colours[colour]).save(root / split / f"{index}.png")
            title = f"<script>alert({index})</script> {colour} {split}{index}"
            rows.append({"file_name": f"{index}.png", "title": title, "tags": [colour, "<b>bold</b>"]})
        lines = (json.dumps(row) + "\n" for row in rows)
        (root / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def gathered(load_program, compare, benchmark_folder, towers, tmp_path_factory):
    """All systems with one seed, asy with two; trained in this process."""
    root = tmp_path_factory.mktemp("compare")
    preset = {
        "dataset": str(benchmark_folder),
        "vision_tower": str(towers / "vision"),
        "text_tower": str(towers / "text"),
        "tag_vocab_size": 270,
        "max_tag_tokens": 16,
        "config_overrides": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        "num_train_epochs": 1,
        "train_batch_size": 8,
        "eval_steps": 0.99,
        "num_negatives": 0,
        "pad_biases": [-1.0],
    }
    (root / "preset.json").write_text(json.dumps(preset), encoding="utf-8")
    program, trainings = load_program("train"), []

    def train(arguments, system, seed):
        trainings.append((system, seed))
        line = [
            "--config",
            arguments.preset,
            "--model_type",
            system,
            "--seed",
            seed,
            "--cache_dir",
            arguments.cache_dir,
        ]
        line += ["--output_dir", compare.checkpoint_folder(arguments, system, seed)]
        program.main(program.parse_arguments(list(map(str, line))))

    def run(*more):
        line = ["--config", root / "preset.json", "--work_dir", root / "work", "--results_dir", root / "results"]
        line += ["--cache_dir", root / "cache", "--timing_rounds", 1, "--timing_batches", 1, *more]
        compare.main(list(map(str, line)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", train)
        run("--seeds", 0)
        run("--seeds", 0, 1, "--systems", "asy", "knn")
        yield root / "results", trainings, run


def test_every_row_has_its_metrics(gathered, compare):
    comparison = json.loads((gathered[0] / "comparison.json").read_text())
    assert list(comparison["systems"]) == list(compare.ROWS) and comparison["missing"] == []
    for row, entry in comparison["systems"].items():
        for name in ("full_f1", "rare_f1", "tag_gain", "seconds_per_example", "seconds_per_example_without_towers"):
            assert isinstance(entry[name], float), (row, name)
        assert entry["seeds"] == ([0, 1] if row == "asy" else [0])
    asy = comparison["systems"]["asy"]
    assert asy["full_f1"] == pytest.approx(sum(asy["by_seed"]["full_f1"]) / 2, abs=0.01)
    assert 0 < comparison["systems"]["open-book"]["copy_gate"] < 1
    assert set(comparison["modalities"]) == set(compare.BY_MODALITY)
    difference = comparison["order"]["op-tsg-parallel above knn"]["full_f1"]
    systems = comparison["systems"]
    assert difference == pytest.approx(systems["op-tsg-parallel"]["full_f1"] - systems["knn"]["full_f1"], abs=0.01)
    table = (gathered[0] / "comparison.md").read_text()
    assert all(f"| {row} |" in table for row in compare.ROWS)


def test_what_is_done_is_not_done_again(gathered):
    results, trainings, run = gathered
    assert len(trainings) == len(set(trainings)) and ("knn", 1) not in trainings
    before = len(trainings)
    (results / "runs/knn-seed0.json").unlink()
    run("--seeds", 0, "--skip_timing")
    assert len(trainings) == before, "a checkpoint that is there is scored, not trained"
    assert (results / "runs/knn-seed0.json").exists()


def test_runs_of_another_configuration_are_refused(gathered, compare):
    path = gathered[0] / "runs/knn-seed0.json"
    run = json.loads(path.read_text())
    other = run | {"arguments": run["arguments"] | {"num_train_epochs": 9}, "model_type": "asy"}
    with pytest.raises(ValueError, match="different epochs"):
        compare.check_one_configuration([run, other])
    with pytest.raises(ValueError, match="no runs"):
        compare.check_one_configuration([])


def test_images_are_there(gathered):
    for name in ("f1_by_frequency", "time_and_f1", "tag_frequencies"):
        with Image.open(gathered[0] / f"{name}.png") as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_the_page_escapes_what_comes_from_data(gathered):
    page = (gathered[0] / "examples.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>bold" not in page
    assert "&lt;script&gt;" in page and "&lt;b&gt;bold" in page
    assert "http" not in page, "self-contained"


def test_examples_are_sorted_into_the_cases_of_the_paper(load_program):
    page = load_program("compare_page")
    label_vocabulary = [["cat", "pet", "animal"], ["pet", "home", "house"], ["car", "road"]]
    references = [["cat", "pet", "animal"]] * 6
    predicted = [
        ["cat", "pet", "animal", "home"],
        ["cat", "home"],
        ["cat", "car"],
        ["cat", "kitten"],
        ["cat"],
        ["pet", "felid"],
    ]
    references[5] = ["cat", "felid"]
    assert page.sort_into_cases(predicted, references, label_vocabulary, 9) == {
        "complete": [0],
        "meaningful": [1],
        "meaningless": [2],
        "novel": [5, 3],
    }


def test_the_command_of_a_training_can_be_run(load_program, tmp_path, monkeypatch):
    fresh, called = load_program("compare"), []
    monkeypatch.setattr(fresh.subprocess, "run", lambda command, check: called.append(command))
    line = ["--config", str(tmp_path / "p.json"), "--work_dir", str(tmp_path / "work")]
    (tmp_path / "p.json").write_text("{}")
    fresh.train(fresh.parse_arguments(line), "asy", 3)
    assert called[0][1:3] == ["-m", "accelerate.commands.launch"]
    parsed = load_program("train").parse_arguments(called[0][4:])
    assert parsed.system == "asy" and parsed.seed == 3 and parsed.output_dir.endswith("asy-seed3")
