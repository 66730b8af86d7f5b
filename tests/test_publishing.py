"""Which files of a checkpoint are published, and what is refused before anything is sent."""

import json
import os
import re
from pathlib import Path

import pytest
from hub_client import CARD, copy_with_card, run_without_package
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from modeling_optsg import hub
from modeling_optsg.baselines.asymmetric_classifier import ASYForTagClassification
from modeling_optsg.baselines.configuration import ASYConfig
from modeling_optsg.hub import checkpoint_checks
from modeling_optsg.hub.checkpoint_checks import file_problems
from modeling_optsg.hub.model_card import public_dataset_name, write_model_card
from modeling_optsg.hub.push_checkpoint import read_checkpoint
from optsg import main

SHIPPED = Path(__file__).parents[1] / "checkpoints/optsg-icon-small"
LOAD = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
# What the Hub shows on a model's page for `transformers` (model-libraries-snippets.ts of huggingface.js).
SNIPPETS = """
import json, sys
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor, pipeline

name, image = sys.argv[1:]
data = ModelCard.load(f"{name}/README.md").data
assert data.library_name == "transformers"
remote_code = {"trust_remote_code": True} if "custom_code" in data.tags else {}

pipe = pipeline(data.pipeline_tag, model=name, **remote_code)
found = [pipe(image)]
AutoModel.from_pretrained(name, **remote_code, dtype="auto")
processor = AutoProcessor.from_pretrained(name, **remote_code)
model = AutoModel.from_pretrained(name, **remote_code)
tags = processor.batch_decode(model.generate(**processor(images=image)))[0]
found.append([{"label": tag.pop("tag")} | tag for tag in tags])
print(json.dumps(found))
"""


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return copy_with_card(tiny_checkpoint, tmp_path / "tiny")


def published(folder):
    contents = {}
    for addition in read_checkpoint(folder).files.additions():
        with addition.as_file() as file:
            contents[addition.path_in_repo] = file.read()
    return contents


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
    ("spoil", "message"),
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
            )
        ),
        (cut("model.safetensors", -100), "model.safetensors is incomplete"),
        (cut("config.json", -3), "config.json is not JSON"),
        (with_setting("config.json", model_type="bert"), "model_type is 'bert'"),
        (with_setting("config.json", hidden_size=8), "do not fit"),
        (with_setting("config.json", came_from="/home/me/runs/1"), "contains /home/me/runs/1, a path of this machine"),
        (write("notes.md", "hf_" + 34 * "a"), "notes.md contains a Hub token"),
        (write("README.md", "# no metadata"), "does not begin with metadata"),
        (write("README.md", "---\nlicense: mit\nlicense: gpl\n---\n"), "license is repeated"),
        (write("README.md", "---\ntags: [a\n---\n"), "the metadata cannot be read"),
        (write("README.md", "---\nmodel-index:\n- results: 3\n---\n"), "the metadata cannot be read"),
        (
            write("README.md", "---\nwidget:\n- src: examples/a.png\n---\n"),
            "examples/a.png, an image of README.md, is missing",
        ),
        (cut("tag_tokenizer/tokenizer.json", 40), "tag_tokenizer/tokenizer.json is not JSON"),
    ],
)
def test_an_unusable_folder_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=f"cannot be published: .*{re.escape(message)}"):
        read_checkpoint(folder)


def test_files_that_are_not_part_of_the_model_are_left_out(folder):
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


def test_links_to_other_folders_are_not_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.json").write_text("{}")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.left_out == {"more/": "link to another folder"}
    assert not [name for name in checkpoint.files.paths if "secret" in name]


@pytest.mark.parametrize(
    "name", ["notes.md", "README.md", "model.safetensors", "images/a.png", "LICENSE", "handler.py"]
)
def test_links_to_files_are_refused(folder, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*secret; replace it with the file itself"):
        read_checkpoint(folder)


def test_a_pipe_is_refused_without_reading_it(folder):
    os.mkfifo(folder / "notes.md")
    with pytest.raises(ValueError, match=r"notes\.md is not a regular file"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["README.md", "examples", "README.md.bak"])
def test_a_card_is_not_written_through_a_link(folder, tmp_path, capsys, name):
    (tmp_path / "victim.md").write_text("victim")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "victim.md")
    (folder / "training_summary.json").write_text("{}")
    assert main(["push", str(folder), "org/name", "--license", "mit"]) == 2
    assert ("is a link" in capsys.readouterr().err) == (name != "README.md.bak")
    assert (tmp_path / "victim.md").read_text() == "victim"


TOKENS = {
    "a Hub token": "hf_" + 34 * "a",
    "a GitHub token": "ghp_" + 36 * "a",
    "an AWS key": "AKIA" + 16 * "A",
    "a Google API key": "AIza" + 35 * "a",
    "an API key": "sk-proj-" + 40 * "a",
    "a Slack token": "xoxb-" + 20 * "1",
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", ["NOTICE", "LICENSE", "merges.txt", "a.svg", "a.jinja", "a.model", "index/a.arrow"])
def test_tokens_are_found_in_every_file_with_text(folder, name, kind):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"key = '{TOKENS[kind]}'\n")
    assert file_problems({name: folder / name})[-1] == f"{name} contains {kind}"
    (folder / name).write_bytes(b"\0" * 3 + TOKENS[kind].encode("utf-16"))
    assert file_problems({name: folder / name})[-1] == f"{name} contains {kind}"


def test_tokens_are_found_at_the_border_of_two_pieces(folder):
    (folder / "NOTICE").write_bytes(b" " * (checkpoint_checks.PIECE - 10) + b"hf_" + 34 * b"a" + b" " * 5000)
    assert file_problems({"NOTICE": folder / "NOTICE"})[-1] == "NOTICE contains a Hub token"


def test_paths_in_the_training_summary_are_shortened(folder):
    summary = {"arguments": {"dataset": "/data/my_images", "config": "examples/configs/a.json", "text_tower": "org/b"}}
    summary["command"] = "train.py --dataset /data/my_images --cache_dir ~/.cache/optsg --page https://host/a/b"
    (folder / "training_summary.json").write_text(json.dumps(summary))
    checkpoint = read_checkpoint(folder)
    [published] = [a for a in checkpoint.files.additions() if a.path_in_repo == "training_summary.json"]
    assert json.loads(published.path_or_fileobj) == {
        "arguments": {"dataset": "my_images", "config": "examples/configs/a.json", "text_tower": "org/b"},
        "command": "train.py --dataset my_images --cache_dir optsg --page https://host/a/b",
    }
    assert checkpoint.shortened_paths == ["/data/my_images", "~/.cache/optsg"]


def test_the_endpoint_files_are_added_unless_the_folder_has_its_own(folder):
    packaged = {name: (Path(hub.__file__).parent / name).read_bytes() for name in ("handler.py", "requirements.txt")}
    assert packaged.items() <= published(folder).items()
    (folder / "handler.py").write_text("# my own\n")
    assert published(folder)["handler.py"] == b"# my own\n"


def test_the_published_code_is_the_package_s_own(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    complete = published(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert read_checkpoint(folder).left_out == {}
    assert complete["tag_decoder.py"] == (folder / "tag_decoder.py").read_bytes()
    for path in folder.glob("*.py"):
        path.unlink()
    for name in ("config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        assert settings.pop("auto_map")
        settings.pop("custom_pipelines", None)
        (folder / name).write_text(json.dumps(settings))
    bare = published(folder)
    assert bare.keys() == complete.keys()
    for name in ("config.json", "processor_config.json"):
        assert json.loads(bare[name]) == json.loads(complete[name])
    for path in set(before) - {folder / "config.json", folder / "processor_config.json"}:
        assert bare[path.name if path.suffix == ".py" else path.relative_to(folder).as_posix()] == before[path]
    (folder / "tag_decoder.py").write_text("raise ImportError\n")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.left_out == {"tag_decoder.py": "the installed package's version is published"}
    assert published(folder)["tag_decoder.py"] == complete["tag_decoder.py"]


@pytest.mark.slow
def test_the_code_on_the_hub_page_runs_without_this_package(folder, tmp_path):
    (folder / "training_summary.json").write_bytes((SHIPPED / "training_summary.json").read_bytes())
    write_model_card(folder, name="org/mine", dataset_name="mine")
    for name, content in published(folder).items():
        (tmp_path / "page" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "page" / name).write_bytes(content)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    arguments = [tmp_path / "page", tmp_path / "red.png"]
    by_pipeline, by_model = run_without_package(SNIPPETS, arguments, "http://127.0.0.1:9", tmp_path / "home", "")
    assert by_pipeline and {"label", "score"} <= by_pipeline[0].keys()
    assert [tag["label"] for tag in by_pipeline] == [tag["label"] for tag in by_model]
    assert [tag["score"] for tag in by_pipeline] == pytest.approx([tag["score"] for tag in by_model], abs=1e-5)


@pytest.mark.slow
def test_a_baseline_is_published_with_code_that_needs_the_package(make_model, tiny_processor, tmp_path):
    settings = make_model().config.to_dict() | {"num_tag_classes": len(tiny_processor.label_vocabulary)}
    del settings["model_type"]
    model = ASYForTagClassification(ASYConfig(**settings))
    model.set_label_vocabulary(tiny_processor.encode_tags(list(tiny_processor.label_vocabulary))["tag_input_ids"])
    model.save_pretrained(tmp_path / "asy")
    tiny_processor.save_pretrained(tmp_path / "asy")
    (tmp_path / "asy/README.md").write_text(CARD)
    contents = published(tmp_path / "asy")
    assert json.loads(contents["config.json"])["auto_map"]["AutoModel"].startswith("asymmetric_classifier.")
    assert b"from modeling_optsg." in contents["asymmetric_classifier.py"]
    summary = json.loads((SHIPPED / "training_summary.json").read_text())
    summary["arguments"]["model_type"] = "asy"
    (tmp_path / "asy/training_summary.json").write_text(json.dumps(summary))
    # The Hub shows no code of transformers for a library that it does not know.
    assert write_model_card(tmp_path / "asy", name="org/asy", dataset_name="mine").data.library_name == "optsg"
    # The package registers the pipeline, so the folder does not name one and loads without `trust_remote_code`.
    assert "custom_pipelines" not in json.loads(contents["config.json"])
    assert isinstance(pipeline("tag-generation", model=tmp_path / "asy")({"title": "red"}), list)
    with pytest.raises(AssertionError, match="packages that were not found in your environment: modeling_optsg"):
        run_without_package(LOAD, [tmp_path / "asy"], "http://127.0.0.1:9", tmp_path / "home", "")


def test_a_missing_card_is_made_from_the_training_summary(folder, tmp_path, capsys):
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 2
    assert "has no README.md, and no training_summary.json to make one from" in capsys.readouterr().err
    summary = json.loads((SHIPPED / "training_summary.json").read_text())
    summary["arguments"]["dataset"] = str(tmp_path / "my_images")
    (folder / "training_summary.json").write_text(json.dumps(summary))
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "README.md from the training summary" in printed.err and "README.md" in printed.out
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["my_images"] and card.data.license is None
    assert 'model="org/mine"' in card.text and str(tmp_path) not in card.text
    # An existing card stays, unless options ask for another.
    (folder / "README.md").write_text(card.content.replace("Use and limits", "My own words"))
    assert main(["push", str(folder), "org/mine", "--dry-run"]) == 0
    assert "My own words" in (folder / "README.md").read_text()
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    options = ["--license", "mit", "--language", "en", "de", "--examples", str(tmp_path)]
    assert main(["push", str(folder), "org/mine", "--dry-run", *options]) == 0
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.widget[0]["src"]) == ("mit", ["en", "de"], "examples/red.png")
    assert "examples/red.png" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["push", str(folder), "org/mine", "--dry-run", "--examples", str(tmp_path / "empty")]) == 2
    # Suffixes in capitals are published, and hidden files are skipped.
    (tmp_path / "red.png").rename(tmp_path / "red.PNG")
    (tmp_path / "._red.png").write_bytes(b"not an image")
    capsys.readouterr()
    assert main(["push", str(folder), "org/mine", "--dry-run", "--examples", str(tmp_path)]) == 0
    assert "examples/red.PNG" in capsys.readouterr().out
    # Other formats are refused before anything is written.
    (tmp_path / "red.heic").touch()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["push", str(folder), "org/mine", "--dry-run", "--examples", str(tmp_path)]) == 2
    assert "--examples: red.heic cannot be shown on the Hub" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "results.json").write_text("{}")
    assert main(["push", str(folder), "org/mine", "--dry-run", "--results", str(tmp_path / "results.json")]) == 2
    assert "no card can be made from training_summary.json or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("icon_tagging", "icon-tagging"),
        ("org/my_data", "org/my_data"),
        ("/home/me/my_images", "my_images"),
        ("../data/mine/", "mine"),
    ],
)
def test_a_card_names_the_dataset_without_its_path(dataset, name):
    assert public_dataset_name(dataset) == name
