"""Programs of `experiments/icon_tagging` without checkpoints: rows, commands, committed results, second dataset."""

import argparse
import filecmp
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from experiments.icon_tagging import compare_page, recipe, runs, second_dataset  # noqa: E402
from modeling_optsg.training import OPTSGTrainingArguments, parse_arguments  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/icon_tagging/results"


def test_a_row_of_the_ladder_changes_one_thing():
    config = json.loads((ROOT / "examples/configs/optsg-icon-small.json").read_text(encoding="utf-8"))
    for name, row in json.loads(recipe.LADDER.read_text(encoding="utf-8")).items():
        assert set(row) <= {"what", "config_overrides", "arguments"} and row["what"]
        changed = {**row.get("config_overrides", {}), **row.get("arguments", {})}
        same = {key for key, value in changed.items() if {**config, **config["config_overrides"]}.get(key) == value}
        assert not same, f"{name} changes nothing by {same}"
        assert set(row.get("arguments", {})) <= set(OPTSGTrainingArguments.__dataclass_fields__)


@pytest.mark.parametrize("experiment", ["ladder", "curves", "time"])
def test_committed_results_are_those_of_the_program(experiment, tmp_path, monkeypatch):
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.chdir(ROOT)
    recipe.main([experiment, "--results_dir", str(tmp_path / "results")])
    assert filecmp.cmp(tmp_path / f"results/{experiment}.json", RESULTS / f"{experiment}.json", shallow=False)


def test_committed_commands_can_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for experiment in ("ladder", "curves", "time", "second"):
        rows = recipe.EXPERIMENTS[experiment](argparse.Namespace(config=recipe.CONFIG, dataset="data/glyphs"))
        for name, row in json.loads((RESULTS / f"{experiment}.json").read_text(encoding="utf-8")).items():
            for run in row["runs"]:
                assert run["command"] == recipe.training_command(rows[name], recipe.CONFIG, run["seed"])
                words = recipe.shlex.split(run["command"])[2:]
                arguments = parse_arguments([*words, "--output_dir", str(tmp_path)])
                assert arguments.seed == run["seed"] and arguments.num_train_epochs == run["num_train_epochs"]


def test_links_of_the_page_lead_somewhere():
    page = ROOT / "experiments/icon_tagging/README.md"
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert targets and all((page.parent / target).exists() for target in targets)


def test_unknown_rows_and_datasets_are_rejected(capsys):
    for words in (["ladder", "--rows", "nonsense"], ["second"], ["ladder", "--dataset", "data/glyphs"]):
        with pytest.raises(SystemExit):
            recipe.main(words)
    assert "--rows nonsense are unknown; expected some of recipe," in capsys.readouterr().err


def test_a_training_runs_the_training_program(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: called.append(command))
    row = {"arguments": {"model_type": "asy"}, "config_overrides": {"cosine_classifier": False}}
    config = ROOT / "examples/configs/optsg-icon-small.json"
    runs.train(recipe.training_arguments(row, config, 3), tmp_path / "asy-seed3", tmp_path / "cache")
    assert Path(called[0][1]) == ROOT / "examples/train.py"
    parsed = parse_arguments(called[0][2:])
    assert (parsed.model_type, parsed.seed, parsed.output_dir) == ("asy", 3, str(tmp_path / "asy-seed3"))
    overrides = json.loads(parsed.config_overrides)
    assert overrides["cosine_classifier"] is False and overrides["hidden_size"] == 256


def test_examples_are_sorted_into_the_cases_of_the_paper():
    training_tags = [["cat", "pet", "animal"], ["pet", "home", "house"], ["car", "road"]]
    references = [["cat", "pet", "animal"]] * 5 + [["cat", "felid"]]
    predictions = [
        ["cat", "pet", "animal", "home"],
        ["cat", "home"],
        ["cat", "car"],
        ["cat", "kitten"],
        ["cat"],
        ["pet", "felid"],
    ]
    assert compare_page.sort_into_cases(predictions, references, training_tags, 9) == {
        "complete": [0],
        "meaningful": [1],
        "meaningless": [2],
        "novel": [5, 3],
    }


def test_examples_of_a_case_are_evenly_spaced():
    assert compare_page.spread_out(range(10), 4) == [0, 2, 5, 7]
    assert compare_page.spread_out([3, 8], 4) == [3, 8]


def test_icon_sets_of_the_second_dataset_are_read(tmp_path):
    carbon, ionicons = tmp_path / "@carbon/icons", tmp_path / "ionicons/dist"
    emoji, twemoji = tmp_path / "emojilib/dist", tmp_path / "@twemoji/svg"
    for directory in (carbon, ionicons, emoji, twemoji):
        directory.mkdir(parents=True)
    assets = [{"size": 16, "filepath": "16/add.svg"}, {"size": 32, "filepath": "32/add.svg"}]
    entry = {"name": "add--alt", "friendlyName": "Add alt", "aliases": ["plus"], "assets": assets}
    (carbon / "metadata.json").write_text(json.dumps({"icons": [entry]}))
    icons = [{"name": name, "tags": ["plus"]} for name in ("add", "add-outline", "add-sharp", "cloud-outline")]
    (ionicons / "ionicons.json").write_text(json.dumps({"icons": icons}))
    keywords = {"\u2764\ufe0f": ["red_heart", "love"], "\U0001f600": ["grinning_face", "big_smile"]}
    (emoji / "emoji-en-US.json").write_text(json.dumps(keywords))
    (twemoji / "2764.svg").touch()
    assert [(icon.title, icon.tags, icon.svg) for icon in second_dataset.read_carbon(tmp_path)] == [
        ("add alt", ["plus"], carbon / "svg/32/add.svg")
    ]
    # Styles of one drawing are one example; a name that only looks like a style is not.
    assert [icon.name for icon in second_dataset.read_ionicons(tmp_path)] == ["add", "cloud-outline"]
    assert [(icon.title, icon.tags, icon.name) for icon in second_dataset.read_emoji(tmp_path)] == [
        ("red heart", ["love"], "2764")
    ]


def test_the_second_dataset_is_split_by_concept(tmp_path, monkeypatch):
    svg = tmp_path / "icon.svg"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8"/></svg>')

    def read(node_modules):
        for index in range(40):
            for style in ("", " outline"):
                yield second_dataset.Icon("set", f"{index}{style.strip()}", f"thing {index}{style}", ["Tag"], svg)
        yield second_dataset.Icon("set", "untagged", "nothing", [" "], svg)

    monkeypatch.setattr(second_dataset, "install", lambda folder: folder)
    for name in ("read_carbon", "read_ionicons", "read_emoji"):
        monkeypatch.setattr(second_dataset, name, read if name == "read_carbon" else lambda folder: iter(()))
    second_dataset.main(["--output", str(tmp_path / "glyphs")])
    concepts = {}
    for split in ("train", "validation", "test"):
        lines = (tmp_path / "glyphs" / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            assert row["tags"] == ["tag"] and (tmp_path / "glyphs" / split / row["file_name"]).is_file()
            concepts.setdefault(row["title"].removesuffix(" outline"), []).append(split)
    assert len(concepts) == 40 and all(len(own) == 2 and len(set(own)) == 1 for own in concepts.values())
