"""icon-tagging: the splits, the icon sets, the images and the export."""

import hashlib
import json
import logging
import stat
from pathlib import Path

import numpy as np
import pytest
from datasets import disable_progress_bars, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from dataset_scripts import load_tagging_dataset, parquet_export
from dataset_scripts.icon_tagging import IconTagging, npm_packages, split_of
from dataset_scripts.icon_tagging.icon_tagging import clean_tags
from dataset_scripts.icon_tagging.rendering import render_svg
from optsg import main

disable_progress_bars()

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill="currentColor" d="{}"/></svg>'
PHOSPHOR_ENTRY = """
  {{
    name: "{name}",
    pascal_name: "{pascal}",
    categories: [e.FINANCE],
    figma_category: a.WEATHER,
    tags: {tags},
    codepoint: 60314
  }},"""


def write(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def drawing(seed: str) -> str:
    """Returns another SVG for every seed."""
    width = 4 + int(hashlib.md5(seed.encode()).hexdigest(), 16) % 1000 / 100
    return SQUARE.format(f"M4 4h{width}v16h-{width}z")


@pytest.fixture
def node_modules(tmp_path) -> Path:
    """The six packages as npm would install them, with a handful of icons."""
    root = tmp_path / "node_modules"
    for package, version in npm_packages.locked_versions().items():
        write(root / package / "package.json", {"name": package, "version": version})

    def draw(package, folder, *names):
        for name in names:
            write(root / package / folder / f"{name}.svg", drawing(package + name))

    def tabler(tags, *styles):
        return {"tags": tags, "styles": dict.fromkeys(styles, {})}

    draw("@tabler/icons", "icons/outline", "arrow-left", "bell-off", "heart", "home", "a-b-2")
    draw("@tabler/icons", "icons/filled", "heart", "lens")
    icons = {
        "arrow-left": tabler([" Back ", "PREVIOUS", "", "back"], "outline"),
        "bell-off": tabler(["mute", 24], "outline"),
        "heart": tabler(["love"], "outline", "filled"),
        "home": tabler(["house"], "outline"),
        "a-b-2": tabler(["test"], "outline"),
        "lens": tabler(["camera"], "filled"),
    }
    write(root / "@tabler/icons/icons.json", icons)

    draw("lucide-static", "icons", "bell", "old-name")
    write(root / "lucide-static/tags.json", {"bell": ["alarm", "e-mail"]})

    draw("@mdi/svg", "svg", "heart-outline", "untagged")
    meta = [
        {"name": "heart-outline", "tags": ["Gaming / RPG"], "aliases": ["love-heart"]},
        {"name": "untagged", "tags": [], "aliases": []},
    ]
    write(root / "@mdi/svg/meta.json", meta)

    draw("@phosphor-icons/core", "assets/regular", "acorn", "home")
    draw("@phosphor-icons/core", "assets/bold", "acorn-bold")
    catalogue = PHOSPHOR_ENTRY.format(name="acorn", pascal="Acorn", tags='["*new*", "nut"]')
    catalogue += PHOSPHOR_ENTRY.format(name="home", pascal="Home", tags='[\n      "house",\n      "love"\n    ]')
    write(root / "@phosphor-icons/core/dist/index.mjs", f"const n = [{catalogue}\n];")

    draw("@fortawesome/fontawesome-free", "svgs-full/solid", "heart")
    draw("@fortawesome/fontawesome-free", "svgs-full/regular", "heart")
    draw("@fortawesome/fontawesome-free", "svgs-full/brands", "acme")
    families = {
        "heart": {"search": {"terms": ["Love"]}, "familyStylesByLicense": {"free": [{"style": "regular"}]}},
        "acme": {"search": {"terms": ["brand"]}, "familyStylesByLicense": {"free": [{"style": "brands"}]}},
        "pro-only": {"search": {"terms": ["paid"]}, "familyStylesByLicense": {"free": []}},
    }
    families["heart"]["familyStylesByLicense"]["free"].append({"style": "solid"})
    write(root / "@fortawesome/fontawesome-free/metadata/icon-families.json", families)

    draw("openmoji", "color/svg", "1F600", "1F44B-1F3FB")
    emoji = [
        {"hexcode": "1F600", "annotation": "grinning face", "tags": "face, grin", "openmoji_tags": "grin, happy"},
        {"hexcode": "1F44B-1F3FB", "annotation": "hand: light skin tone", "tags": "hand", "openmoji_tags": ""},
    ]
    write(root / "openmoji/data/openmoji.json", [{**emoji[0], "skintone": ""}, {**emoji[1], "skintone": 1}])
    return root


@pytest.fixture
def build(tmp_path, node_modules):
    def build(cache="hf", work="work"):
        builder = IconTagging(
            data_dir=node_modules, cache_dir=tmp_path / cache, work_dir=tmp_path / work, num_render_proc=1
        )
        builder.download_and_prepare()
        return builder.as_dataset()

    return build


def by_id(dataset):
    return {row["id"]: row for split in dataset.values() for row in split}


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("arrow left", "arrow left"),
        ("LEFT-arrow", "arrow left"),
        ("bell off", "bell"),
        ("Bell (outline), filled", "bell"),
        ("a b 2", "2 a b"),
        ("star star", "star"),
        ("home variant alt", "home"),
        ("piñata_box", "ata box pi"),
        ("off", ""),
    ],
)
def test_the_split_is_the_md5_of_the_sorted_words_modulo_twelve(title, key):
    remainder = int.from_bytes(hashlib.md5(key.encode()).digest(), "big") % 12
    assert split_of(title) == ["validation", "test", *["train"] * 10][remainder]


# Remainders computed with md5sum and bc.
@pytest.mark.parametrize(
    ("title", "split"),
    [("arrow left", "train"), ("a b 2", "validation"), ("grinning face", "test"), ("heart outline", "test")],
)
def test_known_titles_stay_in_their_split(title, split):
    assert split_of(title) == split


def test_tags_are_lower_cased_and_stripped_but_not_changed_further():
    assert clean_tags([" E-Mail ", "", "  ", "e-mail", "Two  Words", "ÄRGER", "a/b, c"]) == [
        "e-mail",
        "two  words",
        "ärger",
        "a/b, c",
    ]


def test_the_names_and_tags_of_every_set_are_read(build):
    found = {example: (row["title"], row["tags"], row["source"]) for example, row in by_id(build()).items()}
    assert found == {
        "tabler/arrow-left": ("arrow left", ["back", "previous"], "tabler"),
        "tabler/bell-off": ("bell off", ["mute", "24"], "tabler"),
        "tabler/heart": ("heart", ["love"], "tabler"),
        "tabler/home": ("home", ["house"], "tabler"),
        "tabler/a-b-2": ("a b 2", ["test"], "tabler"),
        "lucide/bell": ("bell", ["alarm", "e-mail"], "lucide"),
        "mdi/heart-outline": ("heart outline", ["gaming / rpg", "love heart"], "mdi"),
        "phosphor/acorn": ("acorn", ["nut"], "phosphor"),
        "phosphor/home": ("home", ["house", "love"], "phosphor"),
        "fontawesome/heart": ("heart", ["love"], "fontawesome"),
        "fontawesome/acme": ("acme", ["brand"], "fontawesome"),
        "openmoji/1F600": ("grinning face", ["face", "grin", "happy"], "openmoji"),
    }


def test_examples_are_in_the_split_of_their_title(build):
    dataset = build()
    assert list(dataset) == ["train", "validation", "test"]
    for split, rows in dataset.items():
        assert all(split_of(title) == split for title in rows["title"])


def test_images_are_black_on_white_squares(build, node_modules):
    image = by_id(build())["lucide/bell"]["image"]
    assert (image.size, image.mode) == ((224, 224), "RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((56, 112)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("view_box", "black"), [("0 0 200 100", (0, 56, 224, 168)), ("0 0 100 200", (56, 0, 168, 224))]
)
def test_a_drawing_that_is_not_square_is_centred(tmp_path, view_box, black):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}"><rect width="200" height="200"/></svg>'
    (tmp_path / "drawn.png").write_bytes(render_svg(svg))
    is_black = np.asarray(Image.open(tmp_path / "drawn.png").convert("L")) < 128
    assert Image.fromarray(is_black).getbbox() == black
    assert is_black.mean() == 0.5


def test_a_second_build_reuses_the_images(tmp_path, build):
    build(cache="first")
    drawn = list((tmp_path / "work").rglob("*.png"))
    assert len(drawn) == 12
    for path in drawn:
        Image.new("RGB", (224, 224), "red").save(path)
    assert all(row["image"].getpixel((0, 0)) == (255, 0, 0) for row in by_id(build(cache="second")).values())


def test_changed_icons_are_not_served_from_the_cache(build, node_modules):
    build()
    write(node_modules / "lucide-static/tags.json", {"bell": ["ring"]})
    write(node_modules / "openmoji/color/svg/1F600.svg", SQUARE.format("M0 0h24v24H0z"))
    rows = by_id(build())
    assert rows["lucide/bell"]["tags"] == ["ring"]
    assert rows["openmoji/1F600"]["image"].getpixel((0, 0)) == (0, 0, 0)


def test_icons_that_are_left_out_are_counted(build, node_modules, caplog):
    write(node_modules / "@tabler/icons/icons/outline/home.svg", "no drawing")
    (node_modules / "lucide-static/icons/bell.svg").unlink()
    write(node_modules / "lucide-static/tags.json", {})
    (node_modules / "@phosphor-icons/core/assets/regular/home.svg").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        rows = by_id(build())
    assert {"tabler/home", "phosphor/home", "lucide/bell", "mdi/untagged"}.isdisjoint(rows)
    assert "left out 2 icons without tags: lucide 1, mdi 1" in caplog.text
    assert "left out 2 icons that could not be rendered" in caplog.text
    assert "home.svg" in caplog.text


def test_a_stream_gives_the_same_rows(tmp_path, node_modules, build):
    stream = load_tagging_dataset(
        "icon-tagging",
        split="test",
        streaming=True,
        data_dir=node_modules.parent,
        cache_dir=tmp_path / "hf",
        num_render_proc=1,
    )
    assert [row["id"] for row in stream] == build()["test"]["id"]


def test_an_incomplete_node_modules_folder_is_refused(tmp_path, node_modules):
    (node_modules / "openmoji").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks openmoji"):
        IconTagging(data_dir=node_modules, cache_dir=tmp_path)


def test_another_version_of_a_package_is_reported(node_modules, caplog):
    write(node_modules / "@mdi/svg/package.json", {"version": "1.2.3"})
    npm_packages.check_installed(node_modules)
    assert "@mdi/svg" in caplog.text and "1.2.3" in caplog.text


@pytest.mark.parametrize(
    ("package", "file", "content"),
    [
        ("@tabler/icons", "icons.json", {"home": {}}),
        ("lucide-static", "tags.json", "{"),
        ("@phosphor-icons/core", "dist/index.mjs", "export const icons = [];"),
    ],
)
def test_metadata_in_another_layout_names_the_package(node_modules, tmp_path, package, file, content):
    write(node_modules / package / file, content)
    with pytest.raises(ValueError, match=package):
        IconTagging(data_dir=node_modules, cache_dir=tmp_path / "hf")


def test_a_missing_npm_gives_an_error_with_instructions(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    builder = IconTagging(cache_dir=tmp_path / "hf", work_dir=tmp_path / "work")
    with pytest.raises(FileNotFoundError, match=r"(?s)npm is not on the PATH.*Node\.js.*data_dir="):
        builder.download_and_prepare()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Replaces npm by a shell script."""

    def replace(script: str):
        path = tmp_path / "bin" / "npm"
        write(path, f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return replace


def test_npm_installs_from_the_lock_file_once(tmp_path, npm):
    npm('echo "$@" > arguments; ls > before; mkdir node_modules')
    installed = npm_packages.install(tmp_path / "work")
    assert installed.is_dir()
    assert (installed.parent / "arguments").read_text().split()[:2] == ["ci", "--ignore-scripts"]
    assert {"package.json", "package-lock.json"} <= set((installed.parent / "before").read_text().split())
    npm("exit 1")
    assert npm_packages.install(tmp_path / "work") == installed


def test_a_failed_install_is_removed_and_repeated(tmp_path, npm):
    npm("mkdir node_modules; echo no space left >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"(?s)status 3.*no space left"):
        npm_packages.install(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []
    npm("mkdir node_modules; touch node_modules/complete")
    assert (npm_packages.install(tmp_path / "work") / "complete").exists()


def test_the_lock_file_has_hashes_and_no_download_addresses():
    manifest = json.loads(npm_packages.PACKAGE_JSON.read_text())
    lock = json.loads(npm_packages.PACKAGE_LOCK.read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert all("resolved" not in entry for entry in packages.values())
    assert ".tgz" not in npm_packages.PACKAGE_LOCK.read_text()
    assert npm_packages.locked_versions() == manifest["dependencies"] == lock["packages"][""]["dependencies"]


def test_the_card_names_every_package_with_its_version():
    card = DatasetCard.load(Path(npm_packages.__file__).with_name("README.md"))
    for package, version in npm_packages.locked_versions().items():
        assert f"`{package}` | {version} |" in card.text
    assert card.data.license == ["mit", "isc", "apache-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0"]
    splits = {
        split["name"]: f"| {split['name']} examples | {split['num_examples']:,} |"
        for split in card.data.dataset_info["splits"]
    }
    assert list(splits) == ["train", "validation", "test"]
    assert all(row in card.text for row in splits.values())


def test_an_export_gives_the_same_dataset(tmp_path, node_modules, build, capsys):
    output = tmp_path / "parquet"
    arguments = ["export", "icon-tagging", output, "--data-dir", node_modules, "--dataset-dir", tmp_path / "hf"]
    assert main(list(map(str, arguments))) == 0
    assert "evaluated tags" in capsys.readouterr().out
    written, built = load_dataset(str(output), cache_dir=str(tmp_path / "other")), build()
    assert {split: rows.features for split, rows in written.items()} == {s: rows.features for s, rows in built.items()}
    assert {example: row["tags"] for example, row in by_id(written).items()} == {
        i: r["tags"] for i, r in by_id(built).items()
    }
    image, expected = (by_id(dataset)["lucide/bell"]["image"].tobytes() for dataset in (written, built))
    assert image == expected
    assert (output / "NOTICE").read_bytes() == Path(npm_packages.__file__).with_name("NOTICE").read_bytes()
    card = DatasetCard.load(output / "README.md")
    assert f"| examples | {len(by_id(built))} |" in card.text
    assert {split["name"]: split["num_examples"] for split in card.data.dataset_info["splits"]} == built.num_rows


def test_an_export_refuses_a_folder_with_other_parquet_files(tmp_path, build):
    write(tmp_path / "out/other.parquet", "")
    with pytest.raises(ValueError, match=r"other\.parquet"):
        parquet_export.write_parquet(build(), tmp_path / "out", Path(npm_packages.__file__).with_name("README.md"))
