"""Datasets whose columns have other names, tags as text, and one-hot columns."""

import io

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from test_folder_tagging import draw, write_metadata

from dataset_scripts import load_tagging_dataset
from dataset_scripts.column_names import ColumnNames, is_one
from dataset_scripts.tagging_folder import load_tagging_folder
from modeling_optsg.training import OPTSGTrainingArguments
from modeling_optsg.training.data import load_splits, load_streams
from optsg import main
from optsg.metadata_files import FileMetadata, read_metadata

datasets.disable_progress_bars()

MODES = ["map", "stream", "texts"]


def image_bytes(colour):
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def load(tmp_path):
    """Writes columns to a Parquet file and loads it."""

    def write_and_load(columns, mode="map", features=None, **options):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features).to_parquet(str(folder / "train.parquet"))
        options |= {"streaming": mode != "map", "texts_only": mode == "texts", "cache_dir": tmp_path / "cache"}
        return load_tagging_dataset(folder, split="train", **options)

    return write_and_load


@pytest.mark.parametrize("mode", MODES)
def test_named_columns_of_parquet_are_used(load, mode, caplog):
    columns = {
        "image": [image_bytes("red")] * 2,
        "photo": [image_bytes("blue")] * 2,
        "title": ["wrong", "wrong"],
        "caption": ["a", None],
        "keywords": [["x", " y"], None],
        "views": [1, 2],
    }
    features = Features(
        image=Image(),
        photo=Image(),
        title=Value("string"),
        caption=Value("string"),
        keywords=List(Value("string")),
        views=Value("int64"),
    )
    names = {"image_column": "photo", "title_column": "caption", "tags_column": "keywords"}
    rows = list(load(columns, mode, features, **names))
    assert [(row["id"], row["title"], row["tags"]) for row in rows] == [
        (None if mode == "texts" else "0", "a", ["x", "y"]),
        (None if mode == "texts" else "1", "", []),
    ]
    assert "columns not used, because others are named: image, title" in caplog.text
    if mode != "texts":
        assert rows[0].keys() == {"id", "image", "title", "tags", "views"}
        assert rows[0]["image"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", MODES)
def test_named_class_labels_become_tags(load, mode):
    features = Features(title=Value("string"), kind=ClassLabel(names=["cat", "dog"]), tags=List(Value("string")))
    columns = {"title": ["a", "b"], "kind": [1, 0], "tags": [["other"], ["other"]]}
    assert [row["tags"] for row in load(columns, mode, features, tags_column="kind")] == [["dog"], ["cat"]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "texts, separator, tags, message",
    [
        (["sea, sky", "one", None], None, [["sea", "sky"], ["one"], []], "tags are split at ','"),
        (["sea; salt, pepper", "a;b", ""], None, [["sea", "salt, pepper"], ["a", "b"], []], "tags are split at ';'"),
        (
            ["sea|salt, pepper", "a; b", "c"],
            None,
            [["sea", "salt, pepper"], ["a; b"], ["c"]],
            "1 text is one tag, because it has another separator",
        ),
        (
            ["red, car", "rock | pop", "a, b"],
            None,
            [["red", "car"], ["rock | pop"], ["a", "b"]],
            "such as 'rock | pop'",
        ),
        (
            ["sky, sea", "AT&amp;T, foo", "x"],
            None,
            [["sky", "sea"], ["AT&amp;T", "foo"], ["x"]],
            "split at ','; if it",
        ),
        (["sea/sky", "one, two", "a/b"], "/", [["sea", "sky"], ["one, two"], ["a", "b"]], None),
        (["sea sky", "one", "a b"], None, [["sea sky"], ["one"], ["a b"]], "each text is one tag, such as 'sea sky'"),
        (["sea", "sky", "boat"], None, [["sea"], ["sky"], ["boat"]], None),
    ],
)
def test_text_is_split_into_tags(load, mode, texts, separator, tags, message, caplog):
    for column in ("tags", "words"):
        names = {"tags_column": column} if column == "words" else {}
        rows = load({"title": ["x", "y", "z"], column: texts}, mode, tag_separator=separator, **names)
        assert [row["tags"] for row in rows] == tags
    assert (message or "") in caplog.text
    reported = [record for record in caplog.records if record.name.endswith("generic_datasets")]
    assert bool(reported) == (message is not None)


def test_one_separator_is_used_for_all_splits(tmp_path):
    for split, text in (("train", "a;b"), ("test", "c, d")):
        Dataset.from_dict({"title": ["x"], "tags": [text]}).to_parquet(str(tmp_path / f"data/{split}.parquet"))
    for streaming in (False, True):
        splits = load_tagging_dataset(tmp_path / "data", streaming=streaming, cache_dir=tmp_path / "cache")
        assert {part: next(iter(rows))["tags"] for part, rows in splits.items()} == {
            "train": ["a", "b"],
            "test": ["c, d"],
        }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "pattern, tags",
    [
        ("tag_*", [["red", "big"], []]),
        ("tag_red,old", [["tag_red"], ["old"]]),
        ("tag_*, old", [["red", "big"], ["old"]]),
    ],
)
def test_one_hot_columns_become_tags(load, mode, pattern, tags):
    columns = {"title": ["a", "b"], "tag_red": [True, False], "tag_big": [1, 0], "old": [0.0, 1.0]}
    rows = list(load(columns, mode, tags_column=pattern))
    assert [row["tags"] for row in rows] == tags
    assert "tag_red" not in rows[0]


@pytest.mark.parametrize(
    "value, shown", [(2, "2"), (-1, "-1"), (None, "None"), (0.5, "0.5"), ("yes", "'yes'"), ([1], r"array\(|\[1\]")]
)
def test_other_values_of_one_hot_columns_are_refused(load, value, shown):
    with pytest.raises(ValueError, match=f"a value of the column tag_b is (nan|{shown}).*only 0 and 1"):
        load({"title": ["a", "b"], "tag_a": [1, 0], "tag_b": [value, value]}, tags_column="tag_*")


def test_texts_of_one_hot_columns_are_read():
    assert [is_one(text, "x") for text in ("1", "0", "1.0", "True", " false ")] == [True, False, True, True, False]


@pytest.mark.parametrize(
    "names, message",
    [
        ({"image_column": "nope"}, "has no column 'nope', which image_column names; its columns are title, tags"),
        ({"video_column": "nope"}, "which video_column names"),
        ({"title_column": "nope"}, "which title_column names"),
        ({"tags_column": "nope"}, "which tags_column names"),
        ({"tags_column": "title,nope"}, "has no column 'nope', which tags_column names"),
        ({"tags_column": "no_*"}, "no column matches tags_column='no_\\*'; its columns are title, tags"),
        ({"tag_separator": ","}, "tag_separator is for a column of tags that are text, and there is none"),
        ({"tag_separator": ""}, "tag_separator is empty"),
        ({"title_column": "tags", "tags_column": "tags"}, "'tags' is named for two purposes"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_column_is_reported(load, mode, names, message):
    with pytest.raises(ValueError, match=message):
        load({"title": ["x"], "tags": [["a"]]}, mode, **names)


def test_a_column_may_contain_a_comma_or_an_asterisk():
    names = ColumnNames(tags_column="a,b")
    assert names.one_hot_columns(["a,b"], "x") is None
    assert names.one_hot_columns(["a", "b"], "x") == {"a": "a", "b": "b"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_named_columns_of_metadata_are_used(tmp_path, kind, streaming, caplog):
    draw(tmp_path / "one.png", "red")
    rows = [{"photo": "one.png", "caption": "a", "keywords": "x; y", "title": "wrong", "tags": ["z"], "author": "me"}]
    write_metadata(tmp_path, rows, kind)
    names = {"image_column": "photo", "title_column": "caption", "tags_column": "keywords"}
    (row,) = load_tagging_dataset(tmp_path, split="train", streaming=streaming, **names)
    assert (row["id"], row["title"], row["tags"]) == ("one.png", "a", ["x", "y"])
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)
    assert "columns not used, because others are named: tags, title" in caplog.text
    assert "tags are split at ';'" in caplog.text and "columns not used: author" in caplog.text
    with pytest.raises(ValueError, match=f"metadata.{kind} has no column 'nope'.*its columns are photo, caption"):
        load_tagging_dataset(tmp_path, title_column="nope")


def test_metadata_may_name_images_and_videos_in_two_columns(tmp_path):
    draw(tmp_path / "one.png")
    (tmp_path / "two.mp4").write_bytes(b"anything")
    write_metadata(tmp_path, [{"photo": "one.png"}, {"film": "two.mp4", "photo": ""}])
    names = {"image_column": "photo", "video_column": "film"}
    first, second = load_tagging_dataset(tmp_path, split="train", **names)
    assert first["video"] is None and second["image"] is None
    assert first["image"].size == (8, 8) and second["video"]["path"].endswith("two.mp4")
    write_metadata(tmp_path, [{"film": "two.mp4", "photo": "one.png"}])
    with pytest.raises(ValueError, match="line 1: there are paths of an image and of a video"):
        load_tagging_dataset(tmp_path, **names)


def test_text_in_json_metadata_is_split(tmp_path, caplog):
    for name in ("one.png", "two.png"):
        draw(tmp_path / name)
    rows = [{"file_name": "one.png", "tags": "red, warm colour"}, {"file_name": "two.png", "tags": ["a, b"]}]
    write_metadata(tmp_path, rows)
    assert load_tagging_dataset(tmp_path, split="train")["tags"] == [["red", "warm colour"], ["a, b"]]
    assert "metadata.jsonl: tags are split at ','" in caplog.text
    caplog.clear()
    assert load_tagging_dataset(tmp_path, split="train", tag_separator=" ")["tags"][0] == ["red,", "warm", "colour"]
    assert "split at" not in caplog.text
    write_metadata(tmp_path, [{"file_name": "one.png", "tags": "['a', 'b']"}])
    with pytest.raises(ValueError, match="line 1: tags are a printed list"):
        load_tagging_dataset(tmp_path)
    write_metadata(tmp_path, [{"file_name": "one.png", "tags": ["a"]}])
    with pytest.raises(ValueError, match="tag_separator is for tags that are text"):
        load_tagging_dataset(tmp_path, tag_separator=",")


def test_one_separator_is_used_for_all_metadata_files(tmp_path, caplog):
    for split, texts in (("train", ["a; b", "c;d"]), ("test", ["e, f;g", "h, i"])):
        for name in ("one.png", "two.png"):
            draw(tmp_path / split / name)
        rows = [{"file_name": f"{n}.png", "tags": text} for n, text in zip(("one", "two"), texts)]
        write_metadata(tmp_path / split, rows)
    found = load_tagging_dataset(tmp_path)
    assert found["train"]["tags"] == [["a", "b"], ["c", "d"]] and found["test"]["tags"] == [["e, f", "g"], ["h, i"]]
    assert caplog.text.count("tags are split at ';'") == 1 and "such as 'h, i'" in caplog.text


def test_labels_of_metadata_are_tags(tmp_path, caplog):
    draw(tmp_path / "one.png")
    write_metadata(tmp_path, [{"file_name": "one.png", "labels": "red|big"}])
    assert load_tagging_dataset(tmp_path, split="train")["tags"] == [["red", "big"]]
    assert "has no column tags, so tags are read from the column labels" in caplog.text
    caplog.clear()
    # Numbers of classes are not tags.
    write_metadata(tmp_path, [{"file_name": "one.png", "label": 3}])
    assert load_tagging_dataset(tmp_path, split="train")["tags"] == [[]]
    assert "columns not used: label. There is no column tags" in caplog.text and "--tags_column" in caplog.text
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("image,label\none.png,red\n")
    with pytest.raises(ValueError, match="only the columns image, label. .*--image_column .*--tags_column"):
        load_tagging_dataset(tmp_path)
    rows = load_tagging_dataset(tmp_path, split="train", image_column="image", tags_column="label")
    assert rows["tags"] == [["red"]] and rows["id"] == ["one.png"]


def test_one_hot_columns_of_metadata_become_tags(tmp_path):
    for name in ("one.png", "two.png"):
        draw(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,tag_red,tag_big\none.png,1,True\ntwo.png,0,False\n")
    assert load_tagging_dataset(tmp_path, split="train", tags_column="tag_*")["tags"] == [["red", "big"], []]
    (tmp_path / "metadata.csv").write_text("file_name,tag_red\none.png,1\ntwo.png,\n")
    with pytest.raises(ValueError, match="line 3: tag_red is ''; one-hot columns contain only 0 and 1"):
        load_tagging_dataset(tmp_path, tags_column="tag_*")


def test_captions_can_have_another_separator(tmp_path):
    draw(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("salt, pepper; sea")
    assert load_tagging_dataset(tmp_path, split="train", tag_separator=";")["tags"] == [["salt, pepper", "sea"]]
    with pytest.raises(ValueError, match="title_column: .* has no columns. Describe the files"):
        load_tagging_dataset(tmp_path, title_column="caption")
    (tmp_path / "one.txt").unlink()
    with pytest.raises(ValueError, match="tag_separator: .* has no captions"):
        load_tagging_dataset(tmp_path, tag_separator=";")


def test_benchmarks_have_fixed_columns():
    with pytest.raises(ValueError, match="icon_tagging has fixed columns and takes no title_column"):
        load_tagging_dataset("icon_tagging", title_column="caption")


def test_training_reads_the_named_columns(tmp_path):
    columns = {
        "id": ["a", "b", "c", "d"],
        "caption": ["w", "x", "y", "z"],
        "words": ["red,big", "red", "blue", "blue"],
    }
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"data/{split}.parquet"))
    options = {"dataset": str(tmp_path / "data"), "dataset_dir": str(tmp_path / "cache")}
    args = OPTSGTrainingArguments(
        str(tmp_path / "run"), title_column="caption", tags_column="words", tag_separator=",", **options
    )
    train, validation = load_splits(args)
    _, streamed, streamed_validation = load_streams(args)
    for rows in (train, validation, streamed, streamed_validation):
        assert rows["title"][:] == ["w", "x", "y", "z"]
        assert rows["tags"][:] == [["red", "big"], ["red"], ["blue"], ["blue"]]


def test_the_command_line_reads_the_named_columns(tmp_path, capsys):
    Dataset.from_dict({"caption": ["a", "b"], "tag_x": [1, 0], "tag_y": [1, 1]}).to_parquet(
        str(tmp_path / "data/train.parquet")
    )
    cache = ["--dataset-dir", str(tmp_path / "cache")]
    names = ["--title-column", "caption", "--tags-column", "tag_*"]
    assert main(["stats", str(tmp_path / "data"), "--json", *names, *cache]) == 0
    assert '"unique_tags": 2' in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "data"), "--tags-column", "nope", *cache]) == 2
    assert "its columns are caption, tag_x, tag_y" in capsys.readouterr().err
    draw(tmp_path / "images/one.png")
    with pytest.raises(SystemExit):
        main(["index", str(tmp_path / "images"), "--tags-column", "words"])
    assert "--tags-column needs a dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "delimiter", "title"),
    [
        ("utf-8", ",", "title"),
        ("cp1252", ";", "caption"),
        ("utf-16", "\t", "text"),
        ("utf-8-sig", ";", "description"),
    ],
)
def test_spreadsheets_are_read_as_for_tagging(tmp_path, caplog, encoding, delimiter, title):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "one.png")
    expected = "Die Brücke über den Fluß führt für müde Wanderer, die später kommen, zurück in das alte Städtchen"
    cells = [
        ["file_name ", f" {title}", "tags"],
        ["one.png", expected, "red|big"],
    ]
    text = "".join(delimiter.join(f'"{c}"' if delimiter in c else c for c in row) + "\r\n" for row in cells)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    [row] = load_tagging_folder(tmp_path)["train"]
    assert (row["title"], row["tags"]) == (expected, ["red", "big"])
    rows, _, failure = read_metadata(str(tmp_path / "metadata.csv"), read_tags=True)
    assert failure is None and rows["one.png"] == FileMetadata(row["title"], ("red", "big"))
    assert ("titles are read from the column" in caplog.text) == (title != "title")
    assert "columns not used" not in caplog.text


def test_a_column_with_another_use_is_not_the_title(tmp_path):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "metadata.csv").write_text("file_name;text\none.png;red\n")
    [row] = load_tagging_folder(tmp_path, ColumnNames(tags_column="text"))["train"]
    assert (row["title"], row["tags"]) == ("", ["red"])
