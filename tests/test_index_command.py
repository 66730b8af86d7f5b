"""`optsg index` and `optsg tag --book`: keywords of images, books, suggestions."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.ExifTags import Base
from raw_photographs import raw_file

from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.book import building, embed_examples, encoder_fingerprint, load_book
from optsg import main
from optsg.media_files import MediaFile
from optsg.sidecars import SidecarError, SidecarLocator, embedded
from optsg.sidecars.embedded import EXIF_KEYWORDS, read_embedded
from optsg.sidecars.keywords import read_keywords
from optsg.tagger import BOOK_FOLDER

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
 xmlns:digiKam="http://www.digikam.org/ns/1.0/" xmlns:optsg="urn:x-optsg:1.0/">{}</rdf:Description>
</rdf:RDF></x:xmpmeta>"""
COLOURS = ((220, 30, 30), (30, 160, 50), (40, 60, 210), (230, 200, 40))
KEYWORDS = ("Grandma's garden", "Lake house", "Old town", "Ski week")


def xmp(**lists):
    properties = (
        f"<{name.replace('_', ':')}><rdf:Bag>{''.join(f'<rdf:li>{text}</rdf:li>' for text in texts)}</rdf:Bag>"
        f"</{name.replace('_', ':')}>"
        for name, texts in lists.items()
    )
    return XMP.format("".join(properties))


def keywords_of(path):
    file = MediaFile(str(path), None, path.suffix == ".mp4")
    return read_keywords(file, SidecarLocator(), read_embedded(file))


def save_image(path, **options):
    Image.new("RGB", (40, 30), "red").save(path, **options)
    return path


def test_keywords_of_a_sidecar(tmp_path):
    path = save_image(tmp_path / "a.jpg")
    assert keywords_of(path) == []
    sidecar = xmp(
        dc_subject=["Mia", "ours"],
        digiKam_TagsList=["People/Mia", "Places/Rome", "ours"],
        lr_hierarchicalSubject=["Trips|2021", "ours"],
        optsg_Tags=["ours"],
        optsg_Listed=["ours"],
    )
    (tmp_path / "a.jpg.xmp").write_text(sidecar, encoding="utf-8")
    assert keywords_of(path) == ["Mia", "Rome", "2021"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_keywords_in_the_xmp_of_an_image(tmp_path, suffix):
    path, packet = tmp_path / f"a.{suffix}", xmp(dc_subject=["Mia", "mia", " Grandma's  garden "])
    if suffix == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        save_image(path, pnginfo=info)
    elif suffix == "tif":
        save_image(path, tiffinfo={700: packet.encode()})
    else:
        save_image(path, xmp=packet.encode())
    assert keywords_of(path) == ["Mia", "Grandma's garden"]


def test_keywords_in_exif_and_iptc(tmp_path):
    exif = Image.Exif()
    exif[EXIF_KEYWORDS] = "Mia;Überlingen\0".encode("utf-16-le")
    assert Base.XPKeywords == EXIF_KEYWORDS
    assert keywords_of(save_image(tmp_path / "a.jpg", exif=exif)) == ["Mia", "Überlingen"]
    path = save_image(tmp_path / "b.jpg")
    records = b"\x1c\x01\x5a\x00\x03\x1b%G"
    for keyword in ("Bruno", "Überlingen"):
        records += b"\x1c\x02\x19" + len(keyword.encode()).to_bytes(2, "big") + keyword.encode()
    block = b"8BIM\x04\x04\x00\x00" + len(records).to_bytes(4, "big") + records + b"\0" * (len(records) % 2)
    segment = b"Photoshop 3.0\0" + block
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    assert keywords_of(path) == ["Bruno", "Überlingen"]


def test_damaged_metadata_in_an_image_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    path = save_image(tmp_path / "a.jpg", xmp=b"<x:xmpmeta")
    with pytest.raises(SidecarError, match="keywords inside the file cannot be read: .*invalid XMP; install exiftool"):
        keywords_of(path)
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    assert keywords_of(tmp_path / "b.jpg") == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, tiny_processor):
    """A tiny model with a tag classifier. Its towers are random, so that it sees colours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(use_tag_classifier=True)
    model.set_label_vocabulary(tiny_processor.tag_tokenizer(list(tiny_processor.label_vocabulary))["input_ids"])
    model.generation_config.pad_bias = -5.0
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def library(tmp_path):
    """40 images of four colours with a keyword for each, and one without keywords."""
    folder = tmp_path / "library"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        pixels = np.clip(np.array(COLOURS[index % 4]) + random.integers(-15, 15, (30, 40, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.png.xmp").write_text(xmp(dc_subject=[KEYWORDS[index % 4]]), encoding="utf-8")
    save_image(folder / "no-keywords.png")
    return folder


@pytest.fixture
def index(checkpoint, library, capsys):
    def run(*words):
        status = main(["index", str(library), "--model", str(checkpoint), *map(str, words)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tag(checkpoint, library, capsys, tmp_path):
    for colour, name in zip(COLOURS, ("red", "green", "blue", "yellow")):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(tmp_path / "new" / f"{name}.png")

    def run(*words, files=None):
        files = files or sorted((tmp_path / "new").iterdir())
        capsys.readouterr()
        status = main(["tag", "--model", str(checkpoint), *map(str, words), *map(str, files)])
        return status, *capsys.readouterr()

    return run


def test_own_keywords_are_suggested_for_new_images(index, tag, library, tmp_path):
    before = {path: path.read_bytes() for path in library.iterdir()}
    status, out, err = index()
    assert status == 0 and "a book of 40 files and 4 keywords" in out and "skipped 1 file without keywords" in err
    assert {path: path.read_bytes() for path in library.iterdir() if path.is_file()} == before
    status, out, err = tag("--book", library, "--json", "--explain")
    rows = {row["file"].rsplit("/", 1)[-1]: row["tags"] for row in map(json.loads, out.splitlines())}
    assert status == 0 and err == ""
    for name, keyword in zip(("red.png", "green.png", "blue.png", "yellow.png"), KEYWORDS):
        assert rows[name][0]["tag"] == keyword and rows[name][0]["novel"]
        assert {tag["tag"] for tag in rows[name]} <= set(KEYWORDS)
        nearest = rows[name][0]["neighbours"][0]
        assert int(nearest["id"].split(".")[0]) % 4 == KEYWORDS.index(keyword)
    # The folder of the book itself works too, and a table has the reasons below the tags of a file.
    status, out, _ = tag(
        "--book", library / BOOK_FOLDER, "--explain", "--max-tags", 1, files=[tmp_path / "new/red.png"]
    )
    *_, first, second = out.splitlines()
    assert "Grandma's garden" in first and second.startswith("  Grandma's garden: like ") and ".png (0." in second


def test_the_source_of_every_tag_is_explained(tag, tmp_path, checkpoint):
    _, out, _ = tag("--explain", "--json", "--threshold", 0, files=[tmp_path / "new/red.png"])
    sources = {tag["source"] for tag in json.loads(out)["tags"]}
    assert sources <= {"generated", "classified"} and "generated" in sources
    _, out, _ = tag("--explain", "--threshold", 0, "--max-tags", 1, files=[tmp_path / "new/red.png"])
    assert out.splitlines()[-1].endswith(": generated by the model")
    _, out, _ = tag("--json", files=[tmp_path / "new/red.png"])
    assert all(set(tag) == {"tag", "score", "novel"} for tag in json.loads(out)["tags"])


def test_limits_and_exclusions_apply_to_suggestions(index, tag, library, tmp_path):
    index()
    files = [tmp_path / "new/red.png"]
    _, out, _ = tag("--book", library, "--threshold", 0, "--json", files=files)
    every = [tag["tag"] for tag in json.loads(out)["tags"]]
    assert len(every) > 1 and every[0] == "Grandma's garden"
    _, out, _ = tag("--book", library, "--threshold", 0, "--exclude", "grandma's GARDEN", "--json", files=files)
    assert [tag["tag"] for tag in json.loads(out)["tags"]] == every[1:]
    _, out, _ = tag("--book", library, "--threshold", 1, "--json", files=files)
    assert json.loads(out)["tags"] == []


def test_sidecars_depend_on_the_book(index, tag, library, tmp_path):
    index()
    words = ("--book", library, "--write", "xmp")
    files = [tmp_path / "new/red.png"]
    assert "1 written" in tag(*words, files=files)[2]
    assert "already tagged" in tag(*words, files=files)[2]
    (library / "0.png.xmp").write_text(xmp(dc_subject=["Another name"]), encoding="utf-8")
    index()
    assert "already tagged" not in tag(*words, files=files)[2]


def test_the_commands_of_the_documentation_run(checkpoint, library, tag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    library.rename("my_photos")
    Path("new").rename("new_photos")
    page = (Path(__file__).parents[1] / "docs/photo-libraries.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("optsg index") or "--book" in line]
    assert len(lines) == 3
    for line in lines:
        assert main([*shlex.split(line)[1:], "--model", str(checkpoint)]) == 0, capsys.readouterr().err


def test_tags_of_the_metadata_are_keywords(index, library, tag, tmp_path):
    for path in library.glob("*.xmp"):
        path.unlink()
    pq.write_table(pa.table({"file_name": ["0.png"], "tags": [["Ski week"]]}), library / "metadata.parquet")
    assert "1 file and 1 keyword" in index()[1]
    (library / "metadata.parquet").unlink()
    rows = [{"file_name": f"{index}.png", "title": "", "tags": [KEYWORDS[index % 4]]} for index in range(40)]
    (library / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert "40 files and 4 keywords" in index()[1]
    (library / "metadata.jsonl").unlink()
    (library / "metadata.csv").write_text("file_name,tags\n0.png,Ski week|Mia\n", encoding="utf-8")
    assert "1 file and 2 keywords" in index("--output", tmp_path / "book")[1]
    (library / "metadata.csv").unlink()
    (library / "metadata.jsonl").write_text('{"file_name": "0.png", "tags": 7}', encoding="utf-8")
    status, _, err = index()
    assert status == 2 and "no image or video has keywords" in err
    assert '"tags" must be a list of strings or text separated by | or ; or a comma, got 7' in err


def test_a_book_of_the_training_examples_of_a_dataset(checkpoint, library, tag, tmp_path, capsys):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = [
        {"id": str(index), "title": "", "tags": [KEYWORDS[index % 4]] if index else [], "image": str(library / name)}
        for index, name in enumerate(f"{index}.png" for index in range(40))
    ]
    text = Value("string")
    features = Features({"id": text, "title": text, "tags": List(text), "image": ImageFeature()})
    (tmp_path / "dataset").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "dataset/train-00000-of-00001.parquet")
    words = ["--model", str(checkpoint), "--output", str(tmp_path / "book")]
    assert main(["index", str(tmp_path / "dataset"), *words]) == 0
    assert "39 files and 4 keywords" in capsys.readouterr().out
    _, out, _ = tag("--book", tmp_path / "book", "--json", "--explain", files=[tmp_path / "new/red.png"])
    first = json.loads(out)["tags"][0]
    assert first["tag"] == "Grandma's garden" and first["neighbours"][0]["id"].isdigit()


def test_unreadable_files_do_not_stop_the_others(index, library):
    (library / "3.png").write_bytes(b"not an image")
    (library / "5.png.xmp").write_text("<broken", encoding="utf-8")
    status, out, err = index("--batch-size", 7)
    assert status == 1 and "38 files and 4 keywords" in out and "without keywords" in err
    assert "3.png" in err and "5.png.xmp" in err and "Traceback" not in err
    assert len(load_book(library / BOOK_FOLDER)) == 38


def test_an_interrupted_index_is_resumed(index, library, monkeypatch):
    monkeypatch.setattr(building, "CHUNK_SIZE", 8)
    collated, original, stop_after = [], building.OPTSGDataCollator.__call__, 3

    def count(self, rows):
        if len(collated) == stop_after:
            raise KeyboardInterrupt
        collated.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(building.OPTSGDataCollator, "__call__", count)
    assert index()[0] == 130 and collated == [8, 8, 8]
    folder = library / BOOK_FOLDER
    assert not (folder / "book.json").exists()
    # The last chunk was saved only in part, as by a killed run.
    last = max((folder / building.PARTIAL_FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(b"")
    stop_after = None
    # The saved chunks are not read again. The book is then fitted to all of its examples, in batches of 16.
    assert index()[0] == 0 and collated == [8] * 6 + [16, 16, 8]
    assert not (folder / building.PARTIAL_FOLDER).exists()


def test_only_new_and_changed_files_are_read_again(index, tag, library, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MAX_FIT_EXAMPLES", 20)
    index()
    read, original = [], building.OPTSGDataCollator.__call__

    def count(self, rows):
        read.extend(row["image"].rsplit("/", 1)[-1] for row in rows)
        return original(self, rows)

    monkeypatch.setattr(building.OPTSGDataCollator, "__call__", count)
    first = load_book(library / BOOK_FOLDER)
    (library / "1.png").unlink()
    (library / "2.png.xmp").write_text(xmp(dc_subject=["Mia"]), encoding="utf-8")
    save_image(library / "3.png")
    save_image(library / "new.png")
    (library / "new.png.xmp").write_text(xmp(dc_subject=["Bruno"]), encoding="utf-8")
    assert "40 files and 6 keywords" in index()[1]
    # The 20 examples that the book is fitted to are read as well.
    assert {"3.png", "new.png"} <= set(read) and len(read) <= 22
    book = load_book(library / BOOK_FOLDER)
    ids, tags = book.examples["id"][:], book.examples["tags"][:]
    assert sorted(ids) == sorted({*first.examples["id"], "new.png"} - {"1.png"})
    assert tags[ids.index("2.png")] == ["Mia"] and tags[ids.index("new.png")] == ["Bruno"]
    before = first.examples["id"][:]
    for name in set(ids) - {"3.png", "new.png"}:
        for source, vectors in book.vectors.items():
            old = first.vectors[source][before.index(name)]
            assert vectors[ids.index(name)].tolist() == pytest.approx(old.tolist(), abs=2e-3), (name, source)
    _, out, _ = tag("--book", library, "--json", "--threshold", 0, "--explain", files=[library / "7.png"])
    assert json.loads(out)["tags"][0]["tag"] == KEYWORDS[3]
    # A reused book suggests only its own keywords, too.
    assert book.own_tags_only


def test_image_words_work_with_a_book(tmp_path, capsys):
    model = ["--model", str(Path(__file__).parents[1] / "checkpoints/optsg-icon-small")]
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "unfamiliar.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "unfamiliar.png", "tags": ["noise"]}))
    assert main(["index", str(tmp_path), "--output", str(tmp_path / "book"), *model]) == 0
    capsys.readouterr()
    seen = {}
    for words in ([], ["--book", str(tmp_path / "book")]):
        assert main(["tag", *model, *words, "--show-image-words", "--json", str(tmp_path / "unfamiliar.png")]) == 0
        seen[bool(words)] = json.loads(capsys.readouterr().out)["image_words"]
    assert seen[True] == seen[False] and seen[True]


def test_one_odd_file_does_not_stop_the_others(index, library):
    from PIL.PngImagePlugin import PngInfo

    exif = Image.Exif()
    exif[EXIF_KEYWORDS] = 70_000
    save_image(library / "long.jpg", exif=exif)
    info = PngInfo()
    info.add_text("comment", "x" * 5_000_000, zip=True)
    save_image(library / "text.png", pnginfo=info)
    with open(os.fsencode(library) + b"/bad-\xff.png", "wb") as file:
        file.write((library / "0.png").read_bytes())
    with open(os.fsencode(library) + b"/bad-\xff.png.xmp", "w") as file:
        file.write(xmp(dc_subject=["Mia"]))
    status, out, err = index()
    assert status == 1 and "40 files and 4 keywords" in out
    assert "not valid Unicode" in err and "Traceback" not in err


def test_spellings_are_merged(index, tag, library, tmp_path):
    for number in range(0, 12, 4):
        (library / f"{number}.png.xmp").write_text(xmp(dc_subject=["GRANDMA'S  garden"]), encoding="utf-8")
    assert "40 files and 4 keywords" in index()[1]
    _, out, _ = tag("--book", library, "--json", files=[tmp_path / "new/red.png"])
    assert json.loads(out)["tags"][0]["tag"] == "Grandma's garden"


def test_an_image_of_the_book_does_not_suggest_its_own_keywords(index, tag, library):
    (library / "0.png.xmp").write_text(xmp(dc_subject=["only here"]), encoding="utf-8")
    index()
    _, out, _ = tag("--book", library, "--json", "--threshold", 0, files=[library / "0.png"])
    assert "only here" not in {tag["tag"] for tag in json.loads(out)["tags"]}


def test_known_tags_are_not_novel(index, tag, library, tmp_path):
    for number in range(0, 40, 4):
        (library / f"{number}.png.xmp").write_text(xmp(dc_subject=["colour", "Mia"]), encoding="utf-8")
    index()
    _, out, _ = tag("--book", library, "--json", "--threshold", 0, files=[tmp_path / "new/red.png"])
    novel = {tag["tag"]: tag["novel"] for tag in json.loads(out)["tags"]}
    assert novel["Mia"] and not novel["colour"]


def test_sidecars_of_raw_files_and_of_several_files(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / name)
    for name in ("a.cr2", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    for name in ("a.xmp", "b.xmp"):
        (tmp_path / name).write_text(xmp(dc_subject=["Mia"]), encoding="utf-8")
    # A raw file and its JPEG show the same; an image and a video of one name may not.
    assert keywords_of(tmp_path / "a.jpg") == ["Mia"] and keywords_of(tmp_path / "b.jpg") == []
    (tmp_path / "a.jpg.xmp").write_text(xmp(dc_subject=["Bruno"]), encoding="utf-8")
    file = MediaFile(str(tmp_path / "a.jpg"), None, False)
    assert read_keywords(file, SidecarLocator(), read_embedded(file)) == ["Bruno"]
    assert read_keywords(file, SidecarLocator(naming="stem"), read_embedded(file)) == ["Mia"]
    (tmp_path / "a.jpg.xmp").write_text(XMP.format("<dc:subject>Bruno</dc:subject>"), encoding="utf-8")
    with pytest.raises(SidecarError, match="a.jpg.xmp cannot be read: subject is not a list"):
        keywords_of(tmp_path / "a.jpg")


def test_copies_of_our_tags_in_an_image_are_not_the_users(tmp_path):
    path = save_image(tmp_path / "a.jpg", xmp=xmp(dc_subject=["ours", "Mia"]).encode())
    assert keywords_of(path) == ["ours", "Mia"]
    (tmp_path / "a.jpg.xmp").write_text(xmp(dc_subject=["ours"], optsg_Tags=["ours"]), encoding="utf-8")
    assert keywords_of(path) == ["Mia"]


def test_videos_and_titles_are_looked_up(checkpoint, tmp_path, capsys):
    av = pytest.importorskip("av")
    folder = tmp_path / "videos"
    folder.mkdir()
    for index, colour in enumerate(COLOURS * 2):
        with av.open(str(folder / f"a_{index}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height = 32, 32
            for _ in range(3):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        (folder / f"a_{index}.mp4.xmp").write_text(xmp(dc_subject=[KEYWORDS[index % 4]]), encoding="utf-8")
    model = ["--model", str(checkpoint)]
    assert main(["index", str(folder), "--title-from-name", *model]) == 0
    book = load_book(folder / BOOK_FOLDER)
    assert book.examples["title"][:2] == ["a 0", "a 1"]
    capsys.readouterr()
    words = ["--book", str(folder), "--frames", "2", "--threshold", "0", "--json", str(folder / "a_5.mp4")]
    assert main(["tag", *model, *words]) == 0
    assert json.loads(capsys.readouterr().out)["tags"][0]["tag"] == KEYWORDS[1]


def test_the_vectors_are_those_of_the_model(index, checkpoint, library):
    index()
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    book = load_book(library / BOOK_FOLDER, encoder_fingerprint(model, processor))
    queries = embed_examples(model, processor, [{"image": str(library / "7.png"), "title": None}])
    found = book.search(queries, 1)
    rows = [row for row in found.rows[0].tolist() if row >= 0]
    assert book.examples[rows[0]]["id"] == "7.png" and float(found.similarities[0, 0, 0]) == pytest.approx(1, abs=1e-3)


def test_wrong_uses_name_the_problem(index, tag, library, tmp_path, capsys, tiny_checkpoint):
    index()
    (tmp_path / "words.txt").write_text("red")
    with pytest.raises(SystemExit):
        tag("--book", library, "--vocabulary", tmp_path / "words.txt")
    assert "exclude each other" in capsys.readouterr().err
    for folder in ("new", "no-such-folder"):
        for write in ([], ["--write", "xmp"]):
            with pytest.raises(SystemExit) as end:
                tag("--book", tmp_path / folder, *write)
            assert end.value.code == 2 and "does not contain a book" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["tag", "--model", str(tiny_checkpoint), "--book", str(library), str(tmp_path / "new")])
    assert end.value.code == 2 and "needs a model with a tag classifier" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["index", str(library), "--model", str(tiny_checkpoint)])
    assert end.value.code == 2 and "needs a model with a tag classifier" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["index", "no-such-dataset"])
    assert end.value.code == 2 and "there is no folder no-such-dataset" in capsys.readouterr().err
    for words, message in (
        (["--output", str(tmp_path / "words.txt")], "is not a folder"),
        (["--title", "raw"], "--title needs a dataset"),
        (["--batch-size", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["index", str(library), *words])
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert main(["index", str(tmp_path / "words.txt"), "--output", str(tmp_path / "book")]) == 2
    assert "words.txt" in capsys.readouterr().err


def test_raw_files_and_animated_images_are_in_a_book(checkpoint, tmp_path, capsys):
    pytest.importorskip("rawpy")
    folder = tmp_path / "photos"
    (folder / "scans").mkdir(parents=True)
    colours = [Image.new("RGB", (320, 240), colour) for colour in COLOURS]
    (folder / "a.dng").write_bytes(raw_file(colours[0], 1))
    colours[1].save(folder / "b.webp", save_all=True, append_images=[colours[2]], lossless=True)
    # The title and the caption of a person, and the text that a camera writes into every photograph.
    for name, text in (("c.jpg", "By the lake"), ("d.jpg", "OLYMPUS DIGITAL CAMERA")):
        exif = Image.Exif()
        exif[Base.ImageDescription] = text
        save_image(folder / name, exif=exif)
    save_image(folder / "scans" / "e.jpg")
    (folder / "f.nef").write_bytes(b"damaged")
    for path in [path for path in folder.rglob("*.*")]:
        path.with_name(path.name + ".xmp").write_text(xmp(dc_subject=["Mia"]), encoding="utf-8")
    words = [str(folder), "--skip", "scans", "--model", str(checkpoint)]
    assert main(["index", *words]) == 1
    out, err = capsys.readouterr()
    assert "a book of 4 files and 1 keyword" in out and "f.nef" in err and "1 that match scans" in err
    book = load_book(folder / BOOK_FOLDER)
    titles = dict(zip(book.examples["id"], book.examples["title"], strict=True))
    assert titles == {"a.dng": "", "b.webp": "", "c.jpg": "By the lake", "d.jpg": ""}
    model, processor = OPTSGForTagGeneration.from_pretrained(checkpoint), OPTSGProcessor.from_pretrained(checkpoint)
    rows = [{"image": colours[0]}, {"video": [colours[1], colours[2]]}]
    vectors = book.normalize(embed_examples(model, processor, rows))["image"]
    found = book.vectors["image"][[book.examples["id"][:].index(name) for name in ("a.dng", "b.webp")]]
    assert np.abs((found - vectors).numpy()).max() < 0.02


def test_keywords_inside_an_image_that_cannot_be_read_are_reported(index, library, monkeypatch):
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    save_image(library / "broken.jpg", xmp=b"<x:xmpmeta")
    status, out, err = index()
    assert status == 1 and "40 files" in out and "broken.jpg: the keywords inside the file cannot be read" in err
