"""The programs behind results/icon_tagging/recipe: second data set, ladder and curves, diagnosis."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour; one tag of the validation examples is of no training example."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            colour = list(COLOURS)[index % 4]
            Image.new("RGB", (48, 48), COLOURS[colour]).save(root / split / f"{index}.png")
            tags = [colour, "plain"] + (["unseen"] if split == "validation" and index == 0 else [])
            rows.append({"file_name": f"{index}.png", "title": f"{colour} {split}{index}", "tags": tags})
        lines = (json.dumps(row) + "\n" for row in rows)
        (root / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def gathered(load_program, folder, towers, tmp_path_factory):
    """`recipe.py second` on the toy images, its trainings in this process."""
    root = tmp_path_factory.mktemp("recipe")
    preset = {
        "vision_tower": str(towers / "vision"),
        "text_tower": str(towers / "text"),
        "tag_vocab_size": 270,
        "config_overrides": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        "num_train_epochs": 1,
        "train_batch_size": 8,
        "eval_steps": 0.99,
        "num_negatives": 0,
        "pad_biases": [-1.0],
    }
    (root / "preset.json").write_text(json.dumps(preset), encoding="utf-8")
    recipe, train = load_program("recipe"), load_program("train")
    commands = []

    def run(command):
        commands.append(command)
        train.main(train.parse_arguments(command[2:]))

    def go(what, *more):
        arguments = [
            what,
            "--config",
            root / "preset.json",
            "--work_dir",
            root / "work",
            "--cache_dir",
            root / "cache",
        ]
        arguments += ["--results_dir", root / "results", *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "run", run)
            patch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
            recipe.main()

    go("second", "--dataset", folder)
    return root, commands, go


def test_each_row_says_how_it_was_trained_and_what_it_reached(gathered, folder):
    root, commands, go = gathered
    assert len(commands) == 2
    rows = json.loads((root / "results/second.json").read_text())
    assert list(rows) == ["second-op-tsg", "second-asy"]
    for row, decodings in (("second-op-tsg", {"parallel", "sequential"}), ("second-asy", {"only"})):
        (run,) = rows[row]["runs"]
        assert set(run["validation"]) == decodings
        assert set(run["test"]) - decodings == ({"parallel, example alone"} if row == "second-op-tsg" else set())
        assert (
            run["examples"] == 16 and run["seconds_per_epoch"] >= 0 and run["command"].startswith("python examples/")
        )
        # Where the images lay is nobody else's business.
        assert str(folder) not in run["command"] and folder.name in run["command"]
    fit = rows["second-op-tsg"]["runs"][0]["validation"]["parallel"]
    assert {"slots", "example", "unadjusted", "fusion_weights"} <= set(fit) and "tried" not in fit
    assert "| second-asy |" in (root / "results/second.md").read_text()
    go("second", "--dataset", folder)
    assert len(commands) == 2


def test_a_row_of_the_ladder_changes_one_thing(load_program, gathered):
    root, commands, go = gathered
    with pytest.raises(SystemExit, match="no rows"):
        go("ladder", "--rows", "nonsense")
    recipe, train = load_program("recipe"), load_program("train")
    preset = json.loads((EXAMPLES / "presets/optsg-icon-small.json").read_text())
    for name, row in json.loads(recipe.ROWS.read_text()).items():
        assert set(row) <= {"what", "config", "arguments"} and row["what"]
        changed = {**row.get("config", {}), **row.get("arguments", {})}
        same = {key for key, value in changed.items() if {**preset, **preset["config_overrides"]}.get(key) == value}
        assert not same, f"{name} changes nothing by {same}"
        assert set(row.get("arguments", {})) <= set(train.OPTSGTrainingArguments.__dataclass_fields__)


def test_a_diagnosis_accounts_for_every_tag(load_program, gathered, folder, monkeypatch):
    root, _, _ = gathered
    diagnose = load_program("diagnose")
    output = root / "diagnosis.json"
    arguments = ["--checkpoint", root / "work/second-op-tsg-seed0", "--dataset", folder, "--output", output]
    arguments += ["--cache_dir", root / "cache", "--train_examples", 4]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *map(str, arguments)])
    diagnose.main()
    found = json.loads(output.read_text())
    assert sum(found["tags"].values()) == 17 and found["tags"]["novel"] == 1
    for groups in (found["by_training_count"], found["by_tokens"]):
        assert sum(sum(group.values()) for group in groups.values()) == 17
    assert found["by_training_count"]["0"] == {"novel": 1}
    assert found["validation"]["oracle: every tag of the training examples"]["full_f1"] == 100
    reached = found["validation"]["oracle: all candidates that are right"]["full_f1"]
    assert reached >= found["validation"]["as it is"]["full_f1"]
    assert set(found["losses"]["training examples"]) == {"generation_loss", "alignment_loss", "classifier_loss"}
    assert output.with_suffix(".png").stat().st_size > 1000


def test_readers_of_the_second_data_set(load_program, tmp_path):
    second = load_program("second_dataset")
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
    assert [(i.title, i.tags, i.svg) for i in second.read_carbon(tmp_path)] == [
        ("add alt", ["plus"], carbon / "svg/32/add.svg")
    ]
    # Styles of one drawing are one example; what only looks like a style is not.
    assert [i.name for i in second.read_ionicons(tmp_path)] == ["add", "cloud-outline"]
    assert [(i.title, i.tags, i.name) for i in second.read_emoji(tmp_path)] == [("red heart", ["love"], "2764")]
