"""`check_data` and `optsg check`: every finding has the right value, and one screen shows them."""

import json
import shutil

import datasets
import pytest
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from image_helpers import noise_image, png
from PIL import Image

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGProcessor, train_tag_tokenizer
from modeling_optsg.data.data_check import check_data
from modeling_optsg.data.file_check import Example, check_files
from modeling_optsg.data.tag_variants import TagVariants, find_tag_variants
from modeling_optsg.training import without_untrainable_tags
from optsg import main


def rows(examples):
    """Rows of `(id, title, tags)`."""
    ids, titles, tags = zip(*examples)
    features = datasets.Features(
        {"id": datasets.Value("string"), "title": datasets.Value("string"), "tags": [datasets.Value("string")]}
    )
    return Dataset.from_dict({"id": ids, "title": titles, "tags": tags}, features)


def check(tag_tokenizer=None, **splits):
    own = {split: rows(examples) for split, examples in splits.items()}
    return check_data(own, tag_tokenizer, max_tag_tokens=8, num_prompts=2, read_files=False)


def test_examples_and_tags_are_counted():
    report = check(
        train=[("a", "", ["x", "y"]), ("b", "", ["x"]), ("c", "", [])],
        validation=[("d", "", ["x", "new", "z"]), ("e", "", ["new"])],
    )
    train, validation = report.splits["train"], report.splits["validation"]
    assert (train.examples, train.untagged, train.tags, train.single_tags) == (3, 1, 2, 1)
    assert (train.mean_tags, train.min_tags, train.max_tags, train.novel_tags) == (1.0, 0, 2, None)
    assert (validation.examples, validation.untagged, validation.tags, validation.single_tags) == (2, 0, 3, 2)
    assert (validation.mean_tags, validation.min_tags, validation.max_tags, validation.novel_tags) == (2.0, 1, 3, 2)
    assert report.novel_tags == {"validation": {"new": 2, "z": 1}}


@pytest.mark.parametrize(
    "counts, kinds",
    [
        ({"sky": 4, "Sky": 1}, ["case"]),
        ({"caf\u00e9": 2, "cafe\u0301": 1}, ["Unicode"]),
        ({"wifi": 2, "\uff37\uff29\uff26\uff29": 1}, ["Unicode"]),
        ({"night sky": 3, "night  sky": 2, "nightsky": 1}, ["white space"]),
        ({"t-shirt": 3, "t_shirt": 2, "t shirt": 1}, ["punctuation"]),
        ({"sunset": 2, "#sunset": 1}, ["punctuation"]),
        ({"cat": 2, "cats": 1}, ["plural"]),
        ({"box": 2, "boxes": 1}, ["plural"]),
        ({"dogs": 3, "Dog": 2, "dog": 1}, ["case", "plural"]),
    ],
)
def test_spellings_of_one_tag_are_found(counts, kinds):
    others = {"c++": 9, "c": 9, "glass": 9, "glas": 9, "?": 9, "!": 9, "bus": 9, "bu": 9}
    assert find_tag_variants(others | counts) == [TagVariants(counts, kinds)]


def test_frequent_spellings_come_first_and_plurals_last():
    found = find_tag_variants({"cat": 50, "cats": 50, "Sky": 1, "sky": 2, "SEA": 5, "sea": 4})
    assert [list(variants.counts) for variants in found] == [["SEA", "sea"], ["sky", "Sky"], ["cat", "cats"]]


def test_spellings_are_counted_over_all_splits():
    report = check(train=[("a", "", ["sky"]), ("b", "", ["sky"])], test=[("c", "", ["Sky"]), ("d", "", ["sky"])])
    assert report.variants == [TagVariants({"sky": 3, "Sky": 1}, ["case"])]


def test_long_tags_are_those_that_a_training_leaves_out(tiny_processor):
    PartialState()
    tokenizer = train_tag_tokenizer(["ok", "fine", "also"], vocab_size=300)
    examples = [["日本の風景"], ["ok", "qzxj" * 5, "fine"], [], ["ok"], ["ok", "fine", "also", "xy"]]
    train = rows([(str(number), "", tags) for number, tags in enumerate(examples)])
    report = check_data({"train": train}, tokenizer, 8, 3, read_files=False)
    assert [(tag.tag, tag.examples, tag.tokens, tag.unknown_script) for tag in report.long_tags] == [
        ("qzxjqzxjqzxjqzxjqzxj", 1, 21, False),
        ("日本の風景", 1, 16, True),
    ]
    assert (report.untrainable_examples, report.oversized_examples) == (2, 1)
    parts = (tiny_processor.image_processor, tiny_processor.tokenizer, tokenizer)
    kept = without_untrainable_tags(train, OPTSGProcessor(*parts, num_prompts=3, max_tag_tokens=8))
    before, after = ({tag for tags in own["tags"] for tag in tags} for own in (train, kept))
    assert before - after == {tag.tag for tag in report.long_tags}
    assert len(train) - len(kept) == report.untrainable_examples


def test_examples_without_tags_are_left_out_whatever_the_tokenizer():
    report = check(train=[("a", "", []), ("b", "", ["x", "y", "z"])])
    assert (report.long_tags, report.untrainable_examples, report.oversized_examples) == (None, 1, 1)


def test_tags_with_unknown_tokens_are_found(text_tokenizer, tag_tokenizer):
    splits = {"train": rows([("a", "", ["red", "红色"]), ("b", "", ["purple", "red"]), ("c", "", ["purple"])])}
    report = check_data(splits, tag_tokenizer, 8, 4, text_tokenizer=text_tokenizer, read_files=False)
    assert report.unknown_tags == {"purple": 2}
    assert check_data(splits, tag_tokenizer, 8, 4, read_files=False).unknown_tags is None


def test_nothing_about_training_is_checked_without_a_train_split():
    report = check(test=[("a", "", ["x"])])
    assert report.long_tags is None and report.untrainable_examples is None and report.novel_tags == {}
    assert report.splits["test"].novel_tags is None
    assert not any("training" in line or "None" in line for line in report.lines())


def test_repeated_ids_are_found():
    report = check(
        train=[("a", "", []), ("b", "", []), ("b", "", []), ("c", "", [])], test=[("a", "", []), ("d", "", [])]
    )
    assert report.repeated_ids == {"a": ["train", "test"], "b": ["train", "train"]}
    assert any("2  repeated ids (1 in several splits): a (train, test)" in line for line in report.lines())


@pytest.mark.parametrize("ids", [("0.png", "1.png"), ("0", "1")])
def test_names_of_files_and_numbers_of_rows_may_repeat_in_other_splits(ids):
    own = [(name, "", ["x"]) for name in ids]
    assert check(train=own, test=own[:1]).repeated_ids == {}
    # Not in one split.
    assert check(train=[*own, own[0]]).repeated_ids == {ids[0]: ["train", "train"]}


def test_missing_ids_do_not_repeat():
    assert check(train=[(None, "", ["x"]), (None, "", ["y"])]).repeated_ids == {}


def test_titles_of_examples_without_a_common_tag_are_found():
    report = check(
        train=[
            ("a", "dusk", ["sea", "boat"]),
            ("b", "dusk", ["sea"]),
            ("c", "walk", ["dog"]),
            ("d", "", ["x"]),
            ("e", "", ["y"]),
            ("f", "walk", []),
        ],
        test=[("g", "dusk", ["car"]), ("h", "dusk", ["road"])],
    )
    assert [(own.title, own.tags) for own in report.title_conflicts] == [("dusk", [["sea", "boat"], ["car"]])]


def test_tags_of_nearly_every_training_example_are_found():
    tags = [["all", "most", "many"]] * 8 + [["all", "most"], ["all"]]
    examples = [(f"i{number}", "", own) for number, own in enumerate(tags)]
    assert check(train=[*examples, ("z", "", [])]).frequent_tags == {"all": 1.0, "most": 0.9}
    assert check(train=examples[:9]).frequent_tags == {}


def test_tags_that_are_numbers_or_names_of_files_are_found():
    report = check(
        train=[
            ("IMG_12.jpg", "", ["IMG_12", "2019", "sea", "3d"]),
            ("cat.jpg", "", ["cat", "1/2", "2019"]),
            ("x/DSC7.png", "", ["DSC7.png", "holiday.jpg", "7"]),
        ]
    )
    assert report.name_tags == {"2019": 2, "1/2": 1, "7": 1, "DSC7.png": 1, "IMG_12": 1, "holiday.jpg": 1}


def test_shuffled_rows_have_the_same_report():
    examples = [(f"i{number}", f"t{number % 5}", [f"x{number % 7}", "all"]) for number in range(50)]
    plain = check_data({"train": rows(examples)}, None, 8, 2, read_files=False)
    shuffled = check_data({"train": rows(examples).shuffle(seed=0)}, None, 8, 2, read_files=False)
    assert plain.splits == shuffled.splits and plain.frequent_tags == shuffled.frequent_tags == {"all": 1.0}


@pytest.fixture
def folder(tmp_path):
    """A dataset folder with an image that is in two splits, copies, a truncated image and a text file."""
    root = tmp_path / "my_images"
    images = {
        "train": {"a.png": ("red", ["red"]), "b.png": ("blue", ["blue"]), "b2.png": ("blue", ["azure", "sky"])},
        "test": {"c.png": ("red", ["red"]), "d.png": ("green", ["green"])},
    }
    for split, files in images.items():
        (root / split).mkdir(parents=True)
        for name, (colour, _) in files.items():
            Image.new("RGB", (20, 20), colour).save(root / split / name)
        lines = [json.dumps({"file_name": name, "tags": tags}) for name, (_, tags) in files.items()]
        if split == "train":
            content = png(noise_image())
            (root / split / "cut.png").write_bytes(content[: len(content) // 2])
            # Unreadable files are not copies of each other.
            for name in ("empty.jpg", "empty2.jpg"):
                (root / split / name).write_bytes(b"")
            names = ("cut.png", "empty.jpg", "empty2.jpg")
            lines += [json.dumps({"file_name": name, "tags": ["x"]}) for name in names]
        (root / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def test_unreadable_files_and_copies_are_found(folder):
    found = check_files(load_tagging_dataset(folder))
    assert found.num_files == 8
    assert [own.example for own in found.unreadable] == [
        Example("train", name) for name in ("cut.png", "empty.jpg", "empty2.jpg")
    ]
    assert all(own.path == str(folder / "train" / own.example.id) for own in found.unreadable)
    assert found.unreadable[0].reason.startswith("cut.png is not an image that can be read: ")
    assert [(own.examples, own.same_tags) for own in found.copies] == [
        ([Example("train", "a.png"), Example("test", "c.png")], True),
        ([Example("train", "b.png"), Example("train", "b2.png")], False),
    ]


def test_files_that_are_gone_and_stored_bytes_are_read(folder):
    splits = load_tagging_dataset(folder)
    (folder / "test/d.png").unlink()
    content = (folder / "train/a.png").read_bytes()
    splits["validation"] = Dataset.from_list(
        [
            {"id": "v", "image": {"bytes": content, "path": None}, "title": "", "tags": ["red"]},
            {"id": "w", "image": None, "title": "t", "tags": []},
        ],
        features=splits["train"].features,
    )
    found = check_files(splits)
    assert found.num_files == 9 and found.unreadable[-1].example == Example("test", "d.png")
    assert "No such file" in found.unreadable[-1].reason
    assert [own.splits for own in found.copies] == [["train", "test", "validation"], ["train"]]


def test_videos_are_opened_and_compared(tmp_path):
    pytest.importorskip("av")
    from numbered_videos import write_video

    write_video(tmp_path / "a.mp4", 5)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    Image.new("RGB", (20, 20), "red").save(tmp_path / "d.png")
    names = ("a.mp4", "b.mp4", "c.mp4", "d.png")
    lines = [json.dumps({"file_name": name, "tags": ["x"]}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = check_files(load_tagging_dataset(tmp_path))
    assert found.num_files == 4 and [own.example.id for own in found.unreadable] == ["c.mp4"]
    assert found.unreadable[0].reason.startswith("c.mp4 is not a video that can be read")
    assert [[example.id for example in own.examples] for own in found.copies] == [["a.mp4", "b.mp4"]]


def test_datasets_without_files_have_none_to_read():
    assert check_files({"train": rows([("a", "", ["x"])])}).num_files == 0


@pytest.fixture
def full_report(text_tokenizer):
    """A report with every finding that needs no files."""
    tokenizer = train_tag_tokenizer(["red"], vocab_size=300)
    train = [("0x", "t", ["red", "Red", "2019", "red\nsquare", "日" * 30]), ("0x", "t", ["blue"]), ("c", "", [])]
    train += [(f"i{number}", "", ["everywhere"]) for number in range(30)]
    splits = {"train": rows(train), "validation": rows([("0x", "", ["v"])]), "test": rows([("d", "", ["w"])])}
    return check_data(splits, tokenizer, 16, 2, text_tokenizer=text_tokenizer, read_files=False)


def test_the_text_without_files_has_at_most_ten_lines(full_report):
    short = full_report.lines()
    # A header, three splits and eleven findings, of which five are shown.
    assert len(short) == 10 and short[-1] == "       6  more lines, which `optsg check` shows"
    full_report.files = check_files({})
    complete = full_report.lines()
    assert complete[:9] == short[:9] and len(complete) <= 30
    labels = [line[10:] for line in complete[4:15]]
    expected = [
        "repeated ids (1 in several splits): ",
        "tags of more than 16 tokens (left out of training; 1 in a script that the tag tokenizer does not know): ",
        "training examples without a usable tag (left out of training)",
        "training examples with more than 2 tags (a random selection is used each time)",
        "tags with characters that the text tower does not know: ",
        "tags in several spellings (case 1): ",
        "titles of examples without a common tag: ",
        "tags of nearly all training examples: ",
        "tags that are numbers or names of files: ",
        "tags of validation that are not in train: ",
        "tags of test that are not in train: ",
    ]
    assert [label for label, start in zip(labels, expected, strict=True) if not label.startswith(start)] == []
    assert len(complete) == 15


def test_the_text_says_that_there_are_no_problems(folder):
    report = check_data({"train": load_tagging_dataset(folder)["train"].select([0])}, None, 16, 20)
    assert report.lines()[2:] == ["No problems found. Files read: 1."]
    report = check_data({"train": load_tagging_dataset(folder)["train"].select([0])}, None, 16, 20, read_files=False)
    assert len(report.lines()) == 2


def test_copies_are_found_without_reading_all_files(folder):
    report = check_data(load_tagging_dataset(folder), None, 16, 20, read_files=False)
    assert report.files.unreadable is None
    assert "       1  files with copies that have other tags: b.png (train) = b2.png (train)" in report.lines()


def test_frames_of_a_video_are_read():
    frames = datasets.Features(
        {
            "id": datasets.Value("string"),
            "tags": [datasets.Value("string")],
            "video": datasets.List(datasets.Image(decode=False)),
        }
    )
    good, bad = png(noise_image()), b"nothing"
    columns = {"id": ["a", "b", "c"], "tags": [["x"]] * 3, "video": [[good, bad], [good, good], [good, good]]}
    found = check_files({"train": Dataset.from_dict(columns, frames)})
    assert [own.reason for own in found.unreadable] == ["a, frame 1 is not an image that can be read"]
    assert [[example.id for example in own.examples] for own in found.copies] == [["b", "c"]]


def test_control_characters_and_unicode_forms_are_escaped():
    report = check(train=[("a\x1b", "a\nb", ["caf\u00e9", "\u202ex"]), ("c", "a\nb", ["cafe\u0301"])])
    text = "\n".join(report.lines())
    assert "cafe\\u0301 (1) = café (1)" in text
    assert "a\\nb (café, \\u202ex | cafe\\u0301)" in text and "\u202e" not in text


def test_the_report_is_json_data(full_report, folder):
    report = check_data(load_tagging_dataset(folder), None, 16, 20)
    for own in (full_report, report):
        found = json.loads(json.dumps(own.to_dict(), allow_nan=False))
        assert found == own.to_dict()
    empty = check_data({"train": rows([("a", "", ["x"])]).select([])}, None, 16, 20)
    assert json.loads(json.dumps(empty.to_dict(), allow_nan=False))["splits"]["train"]["mean_tags"] is None
    assert empty.lines()[1].split() == ["train", "0", "0", "0", "0"]


def test_the_command_prints_one_screen(folder, capsys):
    assert main(["check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "examples untagged tags tags once novel tags tags per example".split()
    assert lines[1].split() == ["train", "6", "0", "5", "4", "1.2", "(1", "to", "2)"]
    assert lines[2].split() == ["test", "2", "0", "2", "2", "1", "1.0", "(1", "to", "1)"]
    assert lines[3].startswith("       3  unreadable files of 8: cut.png is not an image that can be read: ")
    assert lines[4:7] == [
        "       1  files in several splits (metrics are too good; train and test 1): a.png (train) = c.png (test)",
        "       1  files with copies that have other tags: b.png (train) = b2.png (train)",
        "       1  files with copies in the same split: b.png (train) = b2.png (train)",
    ]
    assert "       1  tags of test that are not in train: green (1)" in lines
    assert len(lines) <= 30 and max(map(len, lines[4:])) <= 119


def test_the_command_prints_json_for_a_checkpoint(folder, tiny_checkpoint, capsys):
    assert main(["check", str(folder), "--model", str(tiny_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["max_tag_tokens"], found["num_prompts"]) == (8, 4)
    assert found["unknown_tags"] == {"azure": 1, "sky": 1, "x": 3}
    assert found["files"]["copies"][0] == {
        "examples": [{"split": "train", "id": "a.png"}, {"split": "test", "id": "c.png"}],
        "same_tags": True,
    }


def test_a_dataset_or_model_that_cannot_be_loaded_is_an_error(tmp_path, folder, capsys):
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "optsg check: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(folder), "--model", str(tmp_path)])
    assert stopped.value.code == 2 and "has no config.json" in capsys.readouterr().err


def test_warnings_of_the_loader_are_printed(folder, capsys):
    (folder / "test/more.png").write_bytes(b"")
    assert main(["check", str(folder)]) == 0
    assert "optsg check: " in (err := capsys.readouterr().err) and "no metadata file names" in err


def test_a_parquet_export_has_the_same_report(folder, tmp_path, capsys):
    dataset = load_tagging_dataset(folder)
    kept = DatasetDict({split: own.select([0, 1]) for split, own in dataset.items()})
    before = check_data(kept, None, 16, 20).to_dict()
    for split, own in kept.items():
        own.to_parquet(tmp_path / "export" / f"{split}.parquet")
    exported = load_tagging_dataset(tmp_path / "export", cache_dir=tmp_path / "cache")
    after = check_data(exported, None, 16, 20).to_dict()
    assert after == before and after["files"]["num_files"] == 4
