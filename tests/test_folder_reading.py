"""`optsg tag` reads each file once, while the model runs, and tags images and videos in separate batches."""

import gc
import itertools
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from image_helpers import noise_image

from optsg import file_tagger, main
from optsg import tagger as tagger_module
from optsg.file_tagger import MAX_VIDEOS, TagSettings, split_into_batches
from optsg.media_files import MediaFile
from optsg.tagger import Tagger


def media(names):
    return [MediaFile(name, None, name.endswith(".mp4")) for name in names]


def test_live_photos_fill_their_batches():
    files = media(f"{number:03}.{suffix}" for number in range(128) for suffix in ("jpg", "mp4"))
    batches = list(split_into_batches(files, 16))
    images, videos = ([batch for batch in batches if batch[0].is_video == is_video] for is_video in (False, True))
    assert [len(batch) for batch in images] == [16] * 8 and [len(batch) for batch in videos] == [MAX_VIDEOS] * 64
    assert all(len({file.is_video for file in batch}) == 1 for batch in batches)
    assert sorted(file.path for batch in batches for file in batch) == [file.path for file in files]
    # A video does not wait for the end of the folder.
    files = media(["000.mp4", *(f"{number:03}.jpg" for number in range(1, 1000))])
    assert [file.path for file in list(split_into_batches(files, 16))[16]] == ["000.mp4"]


@pytest.fixture
def library(tmp_path):
    for number in range(5):
        noise_image(20 + number, 30).save(tmp_path / f"{number}.png")
    for number in range(2):
        with av.open(str(tmp_path / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width = stream.height = 32
            for level in range(3):
                frame = np.full((32, 32, 3), 80 * level + number, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
    (tmp_path / "1bad.png").write_bytes(b"no image")
    return media(str(path) for path in sorted(tmp_path.iterdir()))


@pytest.fixture
def tagger(tiny_checkpoint):
    return Tagger(str(tiny_checkpoint), TagSettings(threshold=0.0), num_threads=3)


def test_every_file_is_read_once_and_in_threads(tagger, library, monkeypatch):
    reads, threads, read = Counter(), set(), tagger.processor.read_pixels

    def count(**file):
        reads[next(iter(file.values()))] += 1
        threads.add(threading.current_thread())
        return read(**file)

    monkeypatch.setattr(tagger.processor, "read_pixels", count)
    results = dict((file.path, result) for file, result in tagger(library, 4))
    assert reads == Counter(file.path for file in library)
    assert threading.main_thread() not in threads
    errors = [path for path, result in results.items() if isinstance(result, Exception)]
    assert [path[-8:] for path in errors] == ["1bad.png"] and len(results) == len(library)


def test_metadata_is_read_in_threads_and_once(tagger, library, monkeypatch):
    reads, read = [], file_tagger.read_embedded
    monkeypatch.setattr(
        file_tagger,
        "read_embedded",
        lambda file: reads.append((file.path, threading.current_thread())) or read(file),
    )
    library = [file for file in library if not file.path.endswith("bad.png")]
    results = list(tagger(library, 4, {file.path for file in library}))
    assert sorted(path for path, _ in reads) == sorted(file.path for file in library)
    assert threading.main_thread() not in {thread for _, thread in reads}
    assert all(result.embedded is not None for _, result in results)
    assert all((result.embedded is None) == file.is_video for file, result in tagger(library, 4))


def test_any_error_of_a_reader_concerns_one_file(tagger, library, monkeypatch):
    read = file_tagger.read_embedded

    def fail(file):
        if file.path.endswith("2.png"):
            raise RecursionError
        return read(file)

    monkeypatch.setattr(file_tagger, "read_embedded", fail)
    results = {file.path[-5:]: result for file, result in tagger(library, 4)}
    assert isinstance(results.pop("2.png"), RecursionError) and len(results) == len(library) - 1


needs_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="The model would run on the accelerator.")


@needs_cpu
@pytest.mark.parametrize(
    ("threads", "batches", "threads_per_batch"), [(1, 1, 1), (3, 3, 1), (6, 3, 2), (7, 3, 2), (16, 4, 4)]
)
def test_threads_share_batches(tiny_checkpoint, library, monkeypatch, threads, batches, threads_per_batch):
    tagger = Tagger(str(tiny_checkpoint), TagSettings(), threads)
    assert (tagger.num_readers, tagger.num_batches) == (threads, batches)
    chosen, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    list(tagger(library, 4))
    assert set(chosen) == {threads_per_batch} and torch.get_num_threads() == before


def test_the_number_of_threads_does_not_change_the_tags(tiny_checkpoint, library, capsys):
    printed = []
    for number in ("1", "3"):
        folder = str(Path(library[0].path).parent)
        words = ["tag", "--model", str(tiny_checkpoint), "--threads", number, "--batch-size", "1", "--json", folder]
        assert main(words) == 1, "one file is damaged"
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == len(library)


@needs_cpu
def test_batches_are_tagged_at_the_same_time(tiny_checkpoint, library, monkeypatch):
    tagger = Tagger(str(tiny_checkpoint), TagSettings(), 2)
    generate, both = tagger.model.generate, threading.Barrier(2)

    def meet(**inputs):
        both.wait(20)
        return generate(**inputs)

    monkeypatch.setattr(tagger.model, "generate", meet)
    images = [file for file in library if not file.is_video and "bad" not in file.path][:4]
    assert [file for file, _ in tagger(images, 1)] == images


def test_batches_that_wait_are_not_tagged_after_an_interruption(tiny_checkpoint, library, monkeypatch):
    # One thread tags one batch after the other, so the first batch is the first that is tagged.
    tagger = Tagger(str(tiny_checkpoint), TagSettings(threshold=0.0), num_threads=1)
    generate, tagged, interrupted = tagger.model.generate, itertools.count(), threading.Event()

    def wait(**inputs):
        if next(tagged) > 0:
            interrupted.wait(60)
        return generate(**inputs)

    monkeypatch.setattr(tagger.model, "generate", wait)
    images = [file for file in library if not file.is_video and "bad" not in file.path] * 4
    results = tagger(images, 1)
    next(results)
    # Long after `close` has begun.
    threading.Timer(2, interrupted.set).start()
    results.close()
    assert next(tagged) <= 2


def test_an_error_of_the_model_concerns_the_files_that_it_cannot_tag(tagger, library, monkeypatch):
    generate = tagger.model.generate

    def fail_for_videos_and_batches(**inputs):
        if inputs["pixel_values"].shape[1] > 1 or inputs["pixel_values"].shape[0] > 1:
            raise RuntimeError("no memory")
        return generate(**inputs)

    expected = {file.path: result for file, result in tagger(library, 2)}
    monkeypatch.setattr(tagger.model, "generate", fail_for_videos_and_batches)
    found = {file.path: result for file, result in tagger(library, 2)}
    assert list(found) == list(expected)
    for file in library:
        if file.is_video:
            assert isinstance(found[file.path], RuntimeError), "only videos cannot be tagged one by one"
        elif isinstance(expected[file.path], Exception):
            assert isinstance(found[file.path], ValueError)
        else:
            assert [tag["tag"] for tag in found[file.path].tags] == [tag["tag"] for tag in expected[file.path].tags]


def test_the_number_of_threads_is_checked(capsys):
    with pytest.raises(SystemExit):
        main(["tag", "--threads", "0", "photos"])
    assert "argument --threads: expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_loading_is_not_slowed_down_by_garbage_collection(tiny_checkpoint, monkeypatch):
    states = []
    check = tagger_module.check_model
    monkeypatch.setattr(tagger_module, "check_model", lambda *own: states.append(gc.isenabled()) or check(*own))
    try:
        tagger_module.load_model(str(tiny_checkpoint))
        assert states == [False] and gc.isenabled() and gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_unread_files_are_not_read_after_an_interruption(tagger, library, monkeypatch):
    monkeypatch.setattr(tagger, "num_readers", 1)
    reads, read = [], tagger.processor.read_pixels
    monkeypatch.setattr(tagger.processor, "read_pixels", lambda **file: reads.append(file) or read(**file))
    results = tagger(library * 10, 1)
    next(results)
    results.close()
    assert len(reads) < len(library)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_decoder_that_hangs_stops_neither_the_others_nor_the_end(tagger, library, monkeypatch, interrupted):
    read, forever, hanging = tagger.processor.read_pixels, threading.Event(), threading.Event()

    def hang(**file):
        if next(iter(file.values())).endswith("1.png"):
            hanging.set()
            forever.wait()
        return read(**file)

    monkeypatch.setattr(tagger.processor, "read_pixels", hang)
    monkeypatch.setattr(file_tagger, "READ_SECONDS", 30 if interrupted else 2)
    start, tagged = time.monotonic(), tagger(library, 1)
    if interrupted:
        next(tagged)
        assert hanging.wait(10)
        tagged.close()
        assert time.monotonic() - start < 20
    else:
        errors = {file.path: result for file, result in tagged if isinstance(result, Exception)}
        assert [path[-5:] for path in errors] == ["1.png", "d.png"]
        assert "1.png could not be read in 2 seconds" in str([*errors.values()][0])
    forever.set()


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:{name}><rdf:Alt>
<rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:{name}></rdf:Description></rdf:RDF></x:xmpmeta>"""


def iptc(record, text):
    """Returns the segment of a JPEG with an IPTC field."""
    field = struct.pack(">BBBH", 0x1C, *record, len(text)) + text
    resource = b"8BIM" + struct.pack(">HHI", 0x0404, 0, len(field)) + field + bytes(len(field) % 2)
    content = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    ("xmp", "segment", "title"),
    [
        ({"name": "title", "text": "Käse am See"}, b"", "Käse am See"),
        ({"name": "description", "text": "a caption"}, b"", "a caption"),
        ({"name": "description", "text": "OLYMPUS DIGITAL CAMERA"}, b"", None),
        ({"name": "description", "text": "a caption"}, iptc((2, 5), b"a title"), "a title"),
        (None, iptc((2, 120), "Käse".encode()), "Käse"),
        (None, iptc((2, 120), "Käse".encode("latin-1")), "Käse"),
        (None, b"", None),
    ],
)
def test_titles_inside_images_are_used(tagger, tmp_path, xmp, segment, title):
    path = tmp_path / "a.jpg"
    noise_image().save(path, xmp=XMP.format(**xmp).encode() if xmp else b"")
    data = path.read_bytes()
    path.write_bytes(data[:2] + segment + data[2:])
    [(_, found)] = tagger([MediaFile(str(path), None, False)], 1)
    assert found.title == title
    [(_, found)] = tagger([MediaFile(str(path), "mine", False)], 1)
    assert found.title == "mine"
    [(_, expected)] = tagger([MediaFile(str(path), title, False)], 1)
    assert found.title == "mine" and expected.title == title
