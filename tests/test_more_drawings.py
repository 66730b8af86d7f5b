"""icon-tagging's further configurations: `more_drawings` for training and `unseen` for evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import disable_progress_bars
from huggingface_hub import DatasetCard
from PIL import Image

from dataset_scripts import load_tagging_dataset
from dataset_scripts.icon_tagging import IconTagging, more_drawings, npm_packages, split_of, unseen
from dataset_scripts.icon_tagging.icon_sets import Icon
from dataset_scripts.icon_tagging.iconify_sets import read_emoji, read_iconify, split_style, without_number, wrap_body
from dataset_scripts.icon_tagging.rendering import render_svg

disable_progress_bars()

SQUARE = '<path fill="currentColor" d="M4 4h16v16h-16z"/>'
FURTHER = ("more_drawings", "unseen")
# "heart" and "grinning face" are test concepts, "a b 2" is one of validation, and the other titles are in train.
assert [split_of(title) for title in ("heart", "grinning face", "a b 2")] == ["test", "test", "validation"]


def write(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def iconify(package: Path, names, suffixes=(), chars=None, **options):
    icons = {name: {"body": SQUARE} for name in names}
    write(package / "icons.json", {"prefix": package.name, "icons": icons, "width": 24, "height": 24, **options})
    write(package / "metadata.json", {"suffixes": dict.fromkeys(suffixes, "A style")})
    write(package / "chars.json", chars or {})


@pytest.fixture
def node_modules(tmp_path) -> Path:
    """All packages as npm would install them, with a handful of icons."""
    root = tmp_path / "node_modules"
    for sources in npm_packages.SOURCES.values():
        for package, version in npm_packages.locked_versions(sources).items():
            write(root / package / "package.json", {"name": package, "version": version})
            if package.startswith(more_drawings.ICONIFY):
                iconify(root / package, [])

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{SQUARE}</svg>'
    tags = {"boat": ["house"], "bell": ["alarm"], "bell-off": ["mute"], "heart": ["love"], "a-b-2": ["letters"]}
    icons = {name: {"tags": own, "styles": {"outline": {}}} for name, own in tags.items()}
    write(root / "@tabler/icons/icons.json", icons)
    for name in icons:
        write(root / f"@tabler/icons/icons/outline/{name}.svg", svg)
    write(root / "lucide-static/tags.json", {})
    write(root / "@mdi/svg/meta.json", [])
    catalogue = 'const n = [{name: "boat", pascal_name: "Boat", tags: ["roof"]}];'
    write(root / "@phosphor-icons/core/dist/index.mjs", catalogue)
    write(root / "@phosphor-icons/core/assets/regular/boat.svg", svg)
    write(root / "@fortawesome/fontawesome-free/metadata/icon-families.json", {})
    emoji = {"1F600": "grinning face", "1F343": "tree leaf", "2764-FE0F": "heart", "1F3FB": "light skin tone"}
    entries = [
        {"hexcode": code, "annotation": title, "tags": f"{title} tag", "openmoji_tags": "", "skintone": ""}
        for code, title in emoji.items()
    ]
    write(root / "openmoji/data/openmoji.json", entries)
    for code in emoji:
        write(root / f"openmoji/color/svg/{code}.svg", svg)

    health = root / "healthicons/public/icons"
    entries = [{"path": "places/boat", "title": "Boat", "tags": ["Shelter", "dhis2:boat"]}]
    write(health / "meta-data.json", entries)
    write(health / "svg/filled/places/boat.svg", svg)
    octicons = {"bell-fill": {"keywords": ["ring"], "heights": {"16": {}, "24": {}}}}
    write(root / "@primer/octicons/build/data.json", octicons)
    write(root / "@primer/octicons/build/svg/bell-fill-24.svg", svg)
    write(root / "@vscode/codicons/dist/metadata.json", {"heart": {"tags": ["like"]}, "bell": {"tags": ["notify"]}})
    for name in ("heart", "bell"):
        write(root / f"@vscode/codicons/src/icons/{name}.svg", svg)

    names = ["boat-bold", "boat-2-linear", "boat-broken", "heart-bold", "bell-off-bold", "a-b-2-bold", "untagged-bold"]
    iconify(root / "@iconify-json/solar", names, ["bold", "linear", "broken"])
    chars = {"1f600": "grinning", "1f343": "tree-leaf", "2764": "red-heart", "1f3fb": "light-skin-tone"}
    for name in ("fluent-emoji-flat", "noto"):
        iconify(root / f"@iconify-json/{name}", chars.values(), chars=chars)
    for name in ("emojione", "noto-v1"):
        iconify(root / f"@iconify-json/{name}", ["grinning-face", "treeleaf", "unknown"])
    return root


@pytest.fixture
def build(tmp_path, node_modules):
    def build(config_name):
        builder = IconTagging(
            config_name=config_name,
            data_dir=node_modules,
            cache_dir=tmp_path / "hf",
            work_dir=tmp_path / "work",
            num_render_proc=1,
        )
        builder.download_and_prepare()
        return builder.as_dataset()

    return build


def test_more_drawings_have_own_tags_and_those_of_training_examples(build):
    dataset = build("more_drawings")
    assert list(dataset) == ["train"]
    assert {row["id"]: (row["title"], row["tags"]) for row in dataset["train"]} == {
        "healthicons/places/boat-filled": ("boat", ["shelter", "house", "roof"]),
        "octicons/bell-fill": ("bell", ["ring", "alarm"]),
        "codicons/bell": ("bell", ["notify", "alarm"]),
        "solar/boat-bold": ("boat", ["house", "roof"]),
        "solar/boat-2-linear": ("boat", ["house", "roof"]),
        "solar/bell-off-bold": ("bell off", ["mute"]),
        "fluent-emoji-flat/tree-leaf": ("tree leaf", ["tree leaf tag"]),
        "emojione/treeleaf": ("tree leaf", ["tree leaf tag"]),
    }


def test_unseen_has_only_concepts_that_are_not_in_training(build):
    dataset = build("unseen")
    assert list(dataset) == ["test"]
    rows = {row["id"]: (row["title"], row["tags"], row["source"]) for row in dataset["test"]}
    # Noto's own name of its grinning face in this test, "grinning", is a training concept.
    assert rows == {
        "noto/red-heart": ("heart", ["heart tag"], "noto"),
        "noto-v1/grinning-face": ("grinning face", ["grinning face tag"], "noto-v1"),
    }


def test_tags_of_validation_and_test_examples_do_not_flow_into_training():
    default = [Icon("a", name, name, [f"{name} tag"], "") for name in ("heart", "a b 2", "boat", "bell", "bell off")]
    icons = [icon._replace(source="b", tags=[]) for icon in default]
    tags = [icon.tags for icon in more_drawings.add_training_tags(icons, default)]
    assert tags == [[], [], ["boat tag"], ["bell tag"], ["bell off tag"]]


def test_the_default_configuration_ignores_the_further_sets(build, node_modules):
    rows = build(None)
    assert {source for split in rows.values() for source in split["source"]} == {"tabler", "phosphor", "openmoji"}
    assert list(rows) == ["train", "validation", "test"]


def test_a_configuration_is_chosen_by_its_name(tmp_path, node_modules, build):
    options = {"data_dir": node_modules, "cache_dir": tmp_path / "hf", "work_dir": tmp_path / "work"}
    loaded = load_tagging_dataset("icon_tagging", config_name="unseen", num_render_proc=1, **options)
    assert loaded["test"]["id"] == build("unseen")["test"]["id"]
    with pytest.raises(ValueError, match="'drawings' is not one of default, more_drawings, unseen"):
        IconTagging(config_name="drawings", **options)


@pytest.mark.parametrize("config_name", FURTHER)
def test_a_missing_set_is_named(node_modules, tmp_path, config_name):
    (node_modules / "@iconify-json/noto").rename(tmp_path / "elsewhere")
    (node_modules / "@iconify-json/solar").rename(tmp_path / "elsewhere too")
    package = {"more_drawings": "solar", "unseen": "noto"}[config_name]
    with pytest.raises(FileNotFoundError, match=f"lacks @iconify-json/{package};"):
        IconTagging(config_name=config_name, data_dir=node_modules, cache_dir=tmp_path)


def test_metadata_in_another_layout_names_the_package(node_modules, tmp_path):
    write(node_modules / "@iconify-json/solar/icons.json", {"icons": []})
    with pytest.raises(ValueError, match="@iconify-json/solar"):
        IconTagging(config_name="more_drawings", data_dir=node_modules, cache_dir=tmp_path)


def test_hidden_icons_and_other_styles_are_skipped(tmp_path):
    package = tmp_path / "set"
    iconify(package, ["user", "user-fill", "user-02", "user-bold", "arrow-10"], ["bold"])
    icons = json.loads((package / "icons.json").read_text())
    icons["icons"]["former"] = {"body": SQUARE, "hidden": True}
    write(package / "icons.json", icons)
    titles = [(icon.name, icon.title) for icon in read_iconify(package, ("", "fill"))]
    assert titles == [("user", "user"), ("user-fill", "user"), ("user-02", "user"), ("arrow-10", "arrow 10")]


def test_the_longest_style_is_split_off():
    assert split_style("boat-bold-duotone", ("duotone", "bold-duotone", "")) == ("boat", "bold-duotone")
    assert split_style("fill", ("fill",)) == ("fill", "")


@pytest.mark.parametrize(
    ("name", "title"),
    [("boat-2", "boat"), ("boat-two", "boat"), ("road-01", "road"), ("area-51", "area-51"), ("level-0", "level-0")],
)
def test_the_number_of_a_variant_is_removed(name, title):
    assert without_number(name, {"boat", name}) == title


def test_emoji_are_found_by_code_points_or_by_letters(tmp_path):
    openmoji = [Icon("openmoji", "2764-FE0F", "red heart", ["love"], ""), Icon("openmoji", "1F3FB", "skin", ["a"], "")]
    iconify(tmp_path / "coded", ["red-heart", "skin"], chars={"2764": "red-heart", "1f3fb": "skin"})
    iconify(tmp_path / "named", ["redheart", "skin"])
    for name, emoji in (("coded", "red-heart"), ("named", "redheart")):
        icons = list(read_emoji(tmp_path / name, openmoji))
        assert all(icon[:4] == (name, emoji, "red heart", ["love"]) for icon in icons)
        assert len(icons) == (split_of("red heart") == split_of(emoji))


def test_the_body_of_an_icon_is_drawn_in_its_own_view_box(tmp_path):
    svg = wrap_body({"body": '<path fill="currentColor" d="M8 0h8v8h-8z"/>', "left": 8}, {"width": 8, "height": 8})
    (tmp_path / "drawn.png").write_bytes(render_svg(svg))
    assert np.asarray(Image.open(tmp_path / "drawn.png")).max() == 0


@pytest.mark.parametrize("config_name", FURTHER)
def test_lock_files_have_hashes_and_no_download_addresses(config_name):
    sources = npm_packages.SOURCES[config_name]
    lock, manifest = (json.loads((sources / name).read_text()) for name in ("package-lock.json", "package.json"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in packages.values())
    assert manifest["dependencies"] == lock["packages"][""]["dependencies"]
    assert manifest["dependencies"].items() <= npm_packages.locked_versions(sources).items()
    assert not manifest["dependencies"].keys() & npm_packages.locked_versions().keys()


def test_the_lock_files_have_the_sets_that_are_read():
    sets = {
        *more_drawings.READERS,
        *(f"@iconify-json/{name}" for name in (*more_drawings.STYLES, *more_drawings.EMOJI_SETS)),
    }
    for config_name, expected in (("more_drawings", sets), ("unseen", set(unseen.PACKAGES))):
        manifest = json.loads((npm_packages.SOURCES[config_name] / "package.json").read_text())
        assert manifest["dependencies"].keys() == expected


@pytest.mark.parametrize("config_name", FURTHER)
def test_the_card_names_every_set_and_their_total(config_name):
    card = DatasetCard.load(npm_packages.DEFAULT_SOURCES / "README.md")
    manifest = json.loads((npm_packages.SOURCES[config_name] / "package.json").read_text())
    for package, version in manifest["dependencies"].items():
        assert f"`{package}` | {version} |" in card.text
    section = card.text.split(f": `{config_name}`")[1].split("#")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| `") and "npm package" not in row]
    counts = [int(row[5].replace(",", "")) for row in rows]
    assert len(counts) == len(manifest["dependencies"])
    assert f"with {sum(counts):,} examples" in section
