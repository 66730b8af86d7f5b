"""Programs of `experiments/icon_tagging` without checkpoints: rows, commands, committed results."""

import argparse
import filecmp
import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

pytest.importorskip("matplotlib")

from experiments.icon_tagging import compare_page, new_tags, recipe, runs  # noqa: E402
from modeling_optsg.training import OPTSGTrainingArguments, parse_arguments  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/icon_tagging/results"


def test_a_row_of_the_ladder_changes_one_thing():
    config = json.loads((ROOT / "examples/configs/optsg-icon-small.json").read_text(encoding="utf-8"))
    for name, row in json.loads(recipe.LADDER.read_text(encoding="utf-8")).items():
        assert set(row) <= {"what", "config_overrides", "arguments", "classifier_of"} and row["what"]
        changed = {**row.get("config_overrides", {}), **row.get("arguments", {})}
        base = {**config, **config["config_overrides"], **recipe.LADDER_ARGUMENTS}
        same = {key for key, value in changed.items() if base.get(key) == value}
        assert not same, f"{name} changes nothing by {same}"
        assert set(row.get("arguments", {})) <= set(OPTSGTrainingArguments.__dataclass_fields__)


@pytest.mark.parametrize("experiment", ["ladder", "models"])
def test_committed_results_are_those_of_the_program(experiment, tmp_path, monkeypatch):
    shutil.copytree(RESULTS, tmp_path / "results")
    rows = json.loads((RESULTS / f"{experiment}.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)
    # Results of other commands would be trained again, which takes hours.
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **kwargs: pytest.fail(f"{command} was run"))
    recipe.main([experiment, "--results_dir", str(tmp_path / "results"), "--rows", *rows])
    assert filecmp.cmp(tmp_path / f"results/{experiment}.json", RESULTS / f"{experiment}.json", shallow=False)


def test_committed_commands_can_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for experiment, make_rows in recipe.EXPERIMENTS.items():
        rows = make_rows()
        for name, row in json.loads((RESULTS / f"{experiment}.json").read_text(encoding="utf-8")).items():
            for run in row["runs"]:
                in_fp32 = rows[name] | {"arguments": recipe.in_fp32(rows[name]["arguments"])}
                possible = [recipe.training_command(row, recipe.CONFIG, run["seed"]) for row in (rows[name], in_fp32)]
                assert run["command"] in possible
                words = recipe.shlex.split(run["command"])[2:]
                arguments = parse_arguments([*words, "--output_dir", str(tmp_path)])
                assert arguments.seed == run["seed"] and arguments.num_train_epochs == run["num_train_epochs"]


def test_links_of_the_page_lead_somewhere():
    page = ROOT / "experiments/icon_tagging/README.md"
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert targets and all((page.parent / target).exists() for target in targets)


def test_unknown_rows_and_datasets_are_rejected(capsys):
    for words in (["ladder", "--dataset", "my_images"], ["ladder", "--rows", "nonsense"]):
        with pytest.raises(SystemExit):
            recipe.main(words)
    assert "--rows nonsense are unknown; expected some of recipe," in capsys.readouterr().err


def test_a_training_runs_the_training_program(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: called.append(command))
    row = {"arguments": {"model_type": "asy"}, "config_overrides": {"use_prompt_pooler": False}}
    config = ROOT / "examples/configs/optsg-icon-small.json"
    runs.train(recipe.training_arguments(row, config, tmp_path, 3), tmp_path / "asy-seed3", tmp_path / "cache")
    assert Path(called[0][1]) == ROOT / "examples/train.py"
    parsed = parse_arguments(called[0][2:])
    assert (parsed.model_type, parsed.seed, parsed.output_dir) == ("asy", 3, str(tmp_path / "asy-seed3"))
    overrides = json.loads(parsed.config_overrides)
    assert overrides["use_prompt_pooler"] is False and overrides["hidden_size"] == 256


def test_the_second_phase_loads_the_checkpoint_of_its_seed():
    rows = recipe.model_rows()
    assert next(iter(rows)) == "asy"
    two_phases = {name for name, row in rows.items() if "classifier_of" in row}
    assert two_phases == {"op-tsg", "model-f", "model-g", "sequence", "open-book"}
    for name in two_phases:
        words = recipe.shlex.split(recipe.training_command(rows[name], recipe.CONFIG, 2))
        assert words[-2:] == ["--classifier_checkpoint", "runs/recipe/asy-seed2"]
        assert parse_arguments([*words[2:], "--output_dir", "runs/x"]).train_text_layers == 0


@pytest.mark.parametrize(("is_fast", "precision"), [(True, "bf16"), (False, "no")])
def test_rows_are_trained_in_fp32_where_bf16_is_slow(is_fast, precision, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "is_bfloat16_fast", lambda device: is_fast)
    monkeypatch.setattr(recipe, "train", lambda words, *folders: trained.append(words))
    monkeypatch.setattr(recipe, "read_summary", lambda folder: {})
    monkeypatch.setattr(recipe, "describe_training", lambda summary: {"seed": 0})
    row = {"what": "", "arguments": {"mixed_precision": "bf16"}}
    names = {"experiment": "ladder", "config": ROOT / recipe.CONFIG, "seeds": [0], "cache_dir": tmp_path}
    found = {}
    folders = {"work_dir": tmp_path, "results_dir": tmp_path}
    recipe.run_missing({"row": row}, ["row"], found, argparse.Namespace(**names, **folders))
    assert trained[0][-2:] == ["--mixed_precision", precision]
    assert found["row", 0]["command"].endswith(f"--mixed_precision {precision}")


def test_experiments_do_not_share_checkpoints():
    assert not set(recipe.ladder_rows()) & set(recipe.model_rows())


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


def test_new_tags_are_in_no_training_example(tmp_path, monkeypatch):
    monkeypatch.setattr(new_tags, "NUM_NEW_TAGS", 3)
    monkeypatch.setattr(new_tags, "MIN_COUNT", 2)
    rows = [{"title": str(row), "tags": [f"tag {row % 5}", "all"]} for row in range(20)]
    splits = {"train": Dataset.from_list([*rows, {"title": "x", "tags": ["once"]}])}
    splits |= {"validation": Dataset.from_list(rows[:5]), "test": Dataset.from_list([*rows[:5], {"tags": ["once"]}])}
    monkeypatch.setattr(new_tags, "MAX_COUNT", 4)
    tags = [splits[name]["tags"][:] for name in ("train", "test")]
    new = set(new_tags.choose_new_tags(*tags, seed=0))
    assert len(new) == 3 and new <= {f"tag {row}" for row in range(5)}
    left_out = new_tags.write_dataset(splits, new, tmp_path)
    kept = {name: Dataset.from_parquet(str(tmp_path / f"{name}.parquet"))["tags"][:] for name in splits}
    assert len(left_out) == 12 and all(new & set(own) for own in left_out["tags"])
    assert len(kept["train"]) == 9 and not any(new & set(own) for own in kept["train"] + kept["validation"])
    # The test split keeps all tags.
    assert kept["test"] == tags[1]
