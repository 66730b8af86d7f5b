"""What of a checkpoint's folder is published, and what is refused before the Hub is asked."""

import json
import re
import shutil

import pytest
from hub_client import copy_with_card

from modeling_optsg.hub.publishing import read_checkpoint


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
                "train_tags.json",
                "README.md",
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
        (lambda folder: shutil.rmtree(folder / "tag_tokenizer"), "cannot be loaded"),
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
    own = ("handler.py", "LICENSE", "pictures/example.png")
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
    summary = {
        "arguments": {"dataset": "/data/my_pictures", "preset": "examples/presets/a.json", "text_tower": "org/b"}
    }
    summary["command"] = "train.py --dataset /data/my_pictures --cache_dir ~/.cache/optsg --page https://host/a/b"
    (folder / "training_summary.json").write_text(json.dumps(summary))
    checkpoint = read_checkpoint(folder)
    [published] = [a for a in checkpoint.files.additions() if a.path_in_repo == "training_summary.json"]
    assert json.loads(published.path_or_fileobj) == {
        "arguments": {"dataset": "my_pictures", "preset": "examples/presets/a.json", "text_tower": "org/b"},
        "command": "train.py --dataset my_pictures --cache_dir optsg --page https://host/a/b",
    }
    assert checkpoint.shortened == ["/data/my_pictures", "~/.cache/optsg"]
