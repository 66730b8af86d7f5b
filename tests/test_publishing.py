"""What of a checkpoint's folder is published, and what is refused before the Hub is asked."""

import json
import re
from pathlib import Path

import pytest
from hub_client import copy_with_card
from huggingface_hub import ModelCard
from PIL import Image

from modeling_optsg import hub
from modeling_optsg.hub.push_checkpoint import read_checkpoint
from modeling_optsg.hub.push_trained import dataset_name
from optsg.__main__ import main


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return copy_with_card(tiny_checkpoint, tmp_path / "tiny")


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def with_setting(name, **settings):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        *(
            (lambda folder, name=name: (folder / name).unlink(), f"{name} is missing")
            for name in (
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "processor_config.json",
                "label_vocabulary.json",
                "README.md",
                "tokenizer.json",
                "tag_tokenizer/tokenizer.json",
                "tag_decoder.py",
                "modeling_optsg.py",
            )
        ),
        (cut("model.safetensors", -100), "model.safetensors is not whole"),
        (cut("tag_decoder.py", 900), "tag_decoder.py is not Python"),
        (cut("config.json", -3), "config.json is not JSON"),
        (with_setting("config.json", model_type="bert"), "model_type is 'bert'"),
        (with_setting("config.json", hidden_size=8), "do not fit"),
        (
            with_setting("config.json", auto_map={"AutoConfig": "configuration_optsg.OPTSGConfig"}),
            "AutoModel in auto_map",
        ),
        (with_setting("config.json", custom_pipelines={"a": {"impl": "gone.Pipe"}}), "gone.py is missing"),
        (with_setting("config.json", custom_pipelines={"a": {"impl": "alignment.Pipe"}}), "no class Pipe"),
        (with_setting("config.json", came_from="/home/me/runs/1"), "names /home/me/runs/1, a path of this computer"),
        (write("notes.md", "hf_" + 34 * "a"), "notes.md holds a token"),
        (write("README.md", "# no metadata"), "does not begin with metadata"),
        (write("README.md", "---\nlicense: mit\nlicense: gpl\n---\n"), "license is there twice"),
        (write("README.md", "---\ntags: [a\n---\n"), "metadata cannot be read"),
        (write("README.md", "---\nmodel-index:\n- results: 3\n---\n"), "metadata cannot be read"),
        (write("README.md", "---\nwidget:\n- src: examples/a.png\n---\n"), "examples/a.png is missing"),
        (cut("tag_tokenizer/tokenizer.json", 40), "tag_tokenizer/tokenizer.json is not JSON"),
    ],
)
def test_a_folder_that_nobody_could_use_is_refused(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=f"cannot be published: .*{re.escape(said)}"):
        read_checkpoint(folder)


def test_what_does_not_belong_to_the_model_is_left_out(folder):
    others = (
        "state/status.json state/step-1/optimizer.bin training_log.jsonl .git/config .env events.out.tfevents.1 "
        "best/config.json best/model.safetensors __pycache__/x.py notes.bak my_script.py pytorch_model.bin"
    )
    for name in others.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    own = ("handler.py", "LICENSE", "images/example.png")
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    checkpoint = read_checkpoint(folder)
    assert set(own) <= checkpoint.files.paths.keys()
    assert checkpoint.left_out.keys() == {name.partition("/")[0] + "/" * ("/" in name) for name in others.split()}


def test_a_link_to_another_folder_is_not_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.json").write_text("{}")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.left_out == {"more/": "link to another folder"}
    assert not [name for name in checkpoint.files.paths if "secret" in name]


def test_of_paths_in_the_summary_only_the_last_part_is_published(folder):
    summary = {"arguments": {"dataset": "/data/my_images", "config": "examples/configs/a.json", "text_tower": "org/b"}}
    summary["command"] = "train.py --dataset /data/my_images --cache_dir ~/.cache/optsg --page https://host/a/b"
    (folder / "training_summary.json").write_text(json.dumps(summary))
    checkpoint = read_checkpoint(folder)
    [published] = [a for a in checkpoint.files.additions() if a.path_in_repo == "training_summary.json"]
    assert json.loads(published.path_or_fileobj) == {
        "arguments": {"dataset": "my_images", "config": "examples/configs/a.json", "text_tower": "org/b"},
        "command": "train.py --dataset my_images --cache_dir optsg --page https://host/a/b",
    }
    assert checkpoint.shortened == ["/data/my_images", "~/.cache/optsg"]


def test_what_endpoints_need_is_published_with_any_card(folder):
    for name in ("handler.py", "requirements.txt"):
        (folder / name).unlink(missing_ok=True)
    contents = {addition.path_in_repo: addition for addition in read_checkpoint(folder).files.additions()}
    for name in ("handler.py", "requirements.txt"):
        with contents[name].as_file() as file:
            assert file.read() == (Path(hub.__file__).parent / name).read_bytes()


def test_without_a_card_one_is_made_of_what_the_training_left(folder, tmp_path, capsys):
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 2
    assert "has no README.md, and no training_summary.json to make one from" in capsys.readouterr().err
    shipped = Path(__file__).parents[1] / "checkpoints/optsg-icon-small/training_summary.json"
    summary = json.loads(shipped.read_text())
    summary["arguments"]["dataset"] = str(tmp_path / "my_images")
    (folder / "training_summary.json").write_text(json.dumps(summary))
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "README.md is made from what the training has left" in said.err and "README.md" in said.out
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["my_images"] and card.data.license is None
    assert 'model="org/mine"' in card.text and str(tmp_path) not in card.text
    # A card that is there is a person's, unless they ask for another.
    (folder / "README.md").write_text(card.content.replace("Use and limits", "My own words"))
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 0
    assert "My own words" in (folder / "README.md").read_text()
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    asked = ["--license", "mit", "--language", "en", "de", "--examples", str(tmp_path)]
    assert main(["push", str(folder), "org/mine", "--dry-run", *asked]) == 0
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.widget[0]["src"]) == ("mit", ["en", "de"], "examples/red.png")
    assert "examples/red.png" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["push", str(folder), "org/mine", "--dry-run", "--examples", str(tmp_path / "empty")]) == 2
    (tmp_path / "results.json").write_text("{}")
    assert main(["push", str(folder), "org/mine", "--dry-run", "--results", str(tmp_path / "results.json")]) == 2
    assert "no card can be made of training_summary.json or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("icon_tagging", "icon-tagging"),
        ("org/my_data", "org/my_data"),
        ("/home/me/my_images", "my_images"),
        ("../data/mine/", "mine"),
    ],
)
def test_a_dataset_is_called_by_its_name_and_not_by_where_it_lies(given, called):
    assert dataset_name(given) == called
