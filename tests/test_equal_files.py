"""Files with the same bytes: found without decoding, and kept in the same split."""

import io

import pytest
from datasets import Dataset, Features, Image, List, Value, Video
from PIL import Image as PILImage

from modeling_optsg.data.equal_files import find_equal_files
from modeling_optsg.data.splits import split_examples

TEXT = {"id": Value("string"), "title": Value("string"), "tags": List(Value("string"))}


def content(number):
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (number, 0, 0)).save(file, "BMP")  # all of the same size
    return file.getvalue()


def image_rows(numbers, tags=("x",)):
    rows = [
        {"id": str(row), "title": "", "tags": list(tags), "image": {"bytes": content(number), "path": None}}
        for row, number in enumerate(numbers)
    ]
    return Dataset.from_list(rows, Features(TEXT | {"image": Image()}))


def test_equal_files_are_found_in_bytes_paths_and_frames(tmp_path):
    for name, number in {"a": 1, "b": 2, "c": 1}.items():
        (tmp_path / f"{name}.bmp").write_bytes(content(number))
    paths = [tmp_path / "a.bmp", tmp_path / "b.bmp", tmp_path / "c.bmp", tmp_path / "gone.bmp", "https://x.org/a.bmp"]
    files = Dataset.from_dict({"image": [str(path) for path in paths]}, Features({"image": Image()}))
    stored = image_rows([3, 1, 2, 3])
    assert find_equal_files([stored, files]) == [[(0, 0), (0, 3)], [(0, 1), (1, 0), (1, 2)], [(0, 2), (1, 1)]]
    assert find_equal_files([stored.select([1, 2]), files.select([3, 4])]) == []

    frames = [[content(1), content(2)], [content(2), content(1)], [content(1), content(2)], [], None]
    lists = Dataset.from_dict({"video": frames}, Features({"video": List(Image(decode=False))}))
    assert find_equal_files([lists]) == [[(0, 0), (0, 2)]]
    videos = Dataset.from_dict({"video": [b"1", b"2", b"1"]}, Features({"video": Video(decode=False)}))
    assert find_equal_files([videos, videos.shuffle(seed=0)]) != [] and find_equal_files([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_file_are_set_aside_together(seed):
    # Every image has two copies, far from each other.
    train, validation = split_examples({"train": image_rows([*range(100)] * 3)}, validation_ratio=None, seed=seed)
    images = [
        {own["bytes"] for own in part.cast_column("image", Image(decode=False))["image"]}
        for part in (train, validation)
    ]
    assert images[0].isdisjoint(images[1]) and len(train) == 3 * len(images[0]) and len(train) + len(validation) == 300
    assert len(validation) == 30


def test_without_copies_the_examples_are_those_of_datasets():
    rows = image_rows(range(60))
    train, validation = split_examples({"train": rows}, validation_ratio=0.2, seed=7)
    expected = rows.train_test_split(test_size=0.2, seed=7)
    assert train["id"][:] == expected["train"]["id"][:] and validation["id"][:] == expected["test"]["id"][:]


@pytest.mark.parametrize("seed", range(5))
def test_copies_by_image_and_by_video_are_one_group(seed):
    # Rows 0, 1 and 2: the image of the second is that of the first, its video that of the third.
    others = [str(number).encode() * 3 for number in range(20)]
    columns = {"image": [b"a", b"a", b"b", *others], "video": [b"c", b"d", b"d", *others]}
    columns = {"id": list(map(str, range(23))), "title": [""] * 23, "tags": [["x"]] * 23, **columns}
    columns["image"] = [{"bytes": value, "path": None} for value in columns["image"]]
    rows = Dataset.from_dict(columns, Features(TEXT | {"image": Image(decode=False), "video": Video(decode=False)}))
    parts = split_examples({"train": rows}, validation_ratio=0.5, seed=seed)
    assert sorted(len({"0", "1", "2"}.intersection(part["id"])) for part in parts) == [0, 3]


def test_copies_of_one_file_are_divided():
    train, validation = split_examples({"train": image_rows([5] * 20)}, validation_ratio=None, seed=0)
    assert len(train) == 13 and len(validation) == 7
