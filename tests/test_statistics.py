"""Tag counts, published statistics and `optsg stats`."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest

from dataset_scripts import tag_counts, tag_statistics
from dataset_scripts.published_statistics import PUBLISHED, check_identities
from dataset_scripts.tag_counts import TagCounts, nearest_common_count
from optsg import main


@pytest.fixture(scope="module")
def tag_lists():
    random = np.random.default_rng(0)
    sizes = random.integers(0, 8, 3000)
    lists = [[f"标签{rank}" for rank in random.zipf(1.4, size).clip(max=500)] for size in sizes]
    return [*lists, [], None]


@pytest.mark.parametrize("batch", [7, 50_000])
def test_counts_are_equal_to_those_of_a_python_loop(tag_lists, monkeypatch, batch):
    monkeypatch.setattr(tag_counts, "BATCH", batch)
    features = datasets.Features({"tags": datasets.List(datasets.Value("string")), "id": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"tags": tag_lists, "id": range(len(tag_lists))}, features=features)
    expected = Counter(tag for tags in tag_lists for tag in set(tags or []))
    # Also a selection of rows, whose lists do not begin where their column does, and a stream.
    for own in (rows, rows.select(range(100, len(rows))), rows.to_iterable_dataset()):
        lists = tag_lists[100:] if own.__class__ is datasets.Dataset and len(own) < len(rows) else tag_lists
        found = TagCounts.from_rows(own)
        assert found.counts == Counter(tag for tags in lists for tag in set(tags or []))
        assert (found.examples, found.tagged) == (len(lists), sum(bool(tags) for tags in lists))
    assert expected.most_common(1)[0][1] > 100


def test_the_common_count_nearest_to_published_numbers_is_found():
    train = TagCounts(counts=Counter({"a": 9, "b": 5, "c": 5, "d": 1, "e": 7}))
    test = TagCounts(counts=Counter({"a": 1, "b": 1, "c": 1, "d": 1}))
    assert nearest_common_count(train, test, common=1, rare=3) == (6, 1, 3)
    assert nearest_common_count(train, test, common=2, rare=2)[0] in (2, 6)
    assert nearest_common_count(train, test, common=4, rare=0) == (1, 4, 0)


def test_the_identities_of_published_statistics_are_checked():
    assert all(holds for _, holds in check_identities(PUBLISHED["create_tagging"]))
    # The union of the supplement's Table 2 differs by eight tags from the sum of its parts.
    assert [holds for _, holds in check_identities(PUBLISHED["pexel_tagging"])] == [False, True]


@pytest.fixture
def pexel(tmp_path):
    for split, examples in (("train", [["a", "b"], ["a"], ["a", "c"]]), ("test", [["a", "c"], ["d"]])):
        rows = [{"id": f"{split}{n}", "title": "", "tag": tags} for n, tags in enumerate(examples)]
        (tmp_path / f"pexel_{split}.json").write_text(json.dumps(rows))
    return ["stats", "pexel-tagging", "--data-dir", str(tmp_path), "--dataset-dir", str(tmp_path / "cache")]


def test_the_command_prints_counted_and_published_statistics(pexel, capsys, tmp_path):
    assert main([*pexel, "--common", "2"]) == 0
    out = capsys.readouterr().out
    assert "common tags" in out and "1,627" in out and "published: train + test" in out and "does NOT hold" in out
    assert "MS-COCO" in out
    assert main([*pexel, "--match-published", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counted"]["evaluated_tags"] == 2 and found["common_count"] >= 1
    pytest.importorskip("matplotlib")
    assert main([*pexel, "--plot", str(tmp_path / "f.png")]) == 0 and (tmp_path / "f.png").stat().st_size > 1000


def test_invalid_arguments_and_files_are_reported(pexel, capsys, tmp_path):
    assert main(["stats", "create_tagging", "--data-dir", str(tmp_path)]) == 2
    assert "create_210k_train.json" in capsys.readouterr().err
    assert main([*pexel, "--common", "0"]) == 2 and "--common 0" in capsys.readouterr().err
    assert main(["stats", "icon-tagging", "--data-dir", "nowhere"]) == 2
    with pytest.raises(ValueError, match="'test'"):
        tag_statistics({"train": TagCounts()})
    for arguments, message in (
        (["--plot", str(tmp_path / "no/f.png")], "the folder does not exist"),
        (["--plot", str(tmp_path / "f.xyz")], "must end with"),
        (["--published", "imagenet"], "pexel_tagging"),
    ):
        assert main([*pexel, *arguments]) == 2 and message in capsys.readouterr().err
    (tmp_path / "pexel_train.json").write_text('[{"id": "a", "tag": ["x"]}, {"id"')
    assert main(pexel) == 2 and "pexel_train.json, after 1 examples" in capsys.readouterr().err
    assert main(["stats", "icon_tagging", "--title", "raw"]) == 2 and "title" in capsys.readouterr().err


def test_an_export_is_counted_as_a_stream_and_compared_by_its_name(pexel, capsys, tmp_path):
    assert main(["export", *pexel[1:2], str(tmp_path / "pexel-tagging"), *pexel[2:]]) == 0
    capsys.readouterr()
    exported = ["stats", str(tmp_path / "pexel-tagging"), "--dataset-dir", str(tmp_path / "empty")]
    assert main([*exported, "--match-published"]) == 0
    out = capsys.readouterr().out
    assert "1,627" in out and "5,660" in out and not list(tmp_path.glob("empty/**/*.arrow"))
    assert main([*exported[:1], str(tmp_path / "pexel-tagging"), "--published", "create_tagging", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["published"]["common_tags"] == 705 and found["identities"]["published"][0]["holds"]
