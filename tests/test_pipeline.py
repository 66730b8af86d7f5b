"""`pipeline("tag-generation")`: inputs, outputs, and the code in a saved folder."""

import base64
import io
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import torch
from numbered_videos import write_video
from PIL import Image
from transformers import pipeline

from modeling_optsg import TagGenerationPipeline


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255), "grey": (99, 99, 99)}.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=6)


@pytest.fixture(scope="module")
def tagger(tiny_checkpoint):
    return pipeline("tag-generation", model=str(tiny_checkpoint), trust_remote_code=True)


@pytest.fixture(scope="module")
def expected(tagger):
    """Return the tags of the model and the processor without a pipeline."""

    def tags(generate_kwargs=None, **example):
        inputs = tagger.processor(**{name: [value] for name, value in example.items()})
        (tags,) = tagger.processor.batch_decode(tagger.model.generate(**inputs, **(generate_kwargs or {})))
        return [
            {"label": tag["tag"], "score": pytest.approx(tag["score"], abs=1e-5), "novel": tag["novel"]}
            for tag in tags
        ]

    return tags


def test_an_image_gives_labels_like_image_classification(tagger, expected, images):
    tags = tagger(str(images / "red.png"))
    assert tags == expected(images=str(images / "red.png")) and tags
    assert [tag["score"] for tag in tags] == sorted((tag["score"] for tag in tags), reverse=True)


def test_the_model_is_prepared_for_inference(tagger):
    assert not tagger.model.lm_head.weight.is_contiguous()


def test_every_form_of_an_image_gives_the_same_tags(tagger, images):
    path = images / "blue.png"
    forms = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))]
    forms += [
        {"image": path},
        {"bytes": path.read_bytes(), "path": "blue.png"},
        {"image": {"bytes": path.read_bytes()}},
    ]
    first, *others = [tagger(form) for form in forms]
    assert first and all(other == first for other in others)


def test_the_address_of_an_image_is_fetched(tagger, images):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=images))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/red.png"
        assert tagger({"image": address, "title": "a red dog"}, timeout=5) == tagger(
            {"image": images / "red.png", "title": "a red dog"}
        )
        with pytest.raises(ValueError, match="none.png cannot be loaded .*404"):
            tagger(address.replace("red", "none"))
    finally:
        server.shutdown()
        server.server_close()


def test_videos_may_be_paths_bytes_or_frames(tagger, expected, video, tmp_path):
    tags = tagger(str(video))
    assert tags == expected(videos=str(video)) and tags
    assert tagger({"video": video.read_bytes()}) == tags
    # A path alone is recognised as a video by its content.
    assert tagger(shutil.copy(video, tmp_path / "photo.png")) == tags
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 90, 180)]
    assert tagger({"frames": frames, "title": "red"}) == expected(videos=frames, titles="red")


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (3, 0), (2, 2)])
def test_a_mixed_list_is_tagged_in_batches_in_order(tagger, images, video, batch_size, num_workers):
    examples = [images / "red.png", {"video": video, "title": "a dog"}, {"title": "blue square"}, video]
    examples += [{"image": images / "grey.png", "title": "e-mail"}]
    one_by_one = [tagger(example) for example in examples]
    together = tagger(examples, batch_size=batch_size, num_workers=num_workers)
    for tags, alone in zip(together, one_by_one, strict=True):
        assert tags == [tag | {"score": pytest.approx(tag["score"], abs=1e-5)} for tag in alone]


def test_an_empty_list_gives_an_empty_list(tagger):
    assert tagger([]) == []


def test_generators_are_read_lazily(tagger, images):
    read = []

    def examples():
        for name in ("red", "blue", "grey"):
            read.append(name)
            yield {"image": images / f"{name}.png"}

    results = iter(tagger(examples()))
    next(results)
    assert len(read) < 3
    assert len(list(results)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_read_by_their_column_names(tagger, images, streaming):
    paths = sorted(map(str, images.glob("*.png")))
    rows = {"id": ["1", "2", "3"], "image": paths, "title": ["red", None, "dog"], "tags": [["a"]] * 3}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    results = tagger(dataset.to_iterable_dataset() if streaming else dataset, batch_size=2)
    expected = tagger([{"image": path, "title": title} for path, title in zip(paths, rows["title"])])
    for tags, alone in zip(results, expected, strict=True):
        assert tags == [tag | {"score": pytest.approx(tag["score"], abs=1e-5)} for tag in alone]
    if not streaming:
        assert len(tagger(dataset)) == 3


def test_a_dataset_without_images_or_titles_is_refused(tagger):
    with pytest.raises(ValueError, match=r"columns \['id'\]; expected some of"):
        tagger(datasets.Dataset.from_dict({"id": [1]}))


def test_settings_reach_generate(tagger, expected, images):
    path = str(images / "red.png")
    assert len(tagger(path, top_k=1)) == 1
    assert tagger(path, threshold=1.0) == []
    assert tagger(path, decoding="sequential") == expected({"decoding": "sequential"}, images=path)
    assert tagger(path, num_beams=2, pad_bias=-9.0) == expected({"num_beams": 2, "pad_bias": -9.0}, images=path)
    only = tagger(path, tag_vocabulary=["blue", "creative"], threshold=0.0)
    assert only and {tag["label"] for tag in only} <= {"blue", "creative"}


def test_settings_of_the_pipeline_are_defaults_for_calls(tiny_checkpoint, tagger, images):
    settings = {"top_k": 1, "decoding": "sequential"}
    once = pipeline("tag-generation", model=str(tiny_checkpoint), trust_remote_code=True, **settings)
    assert once(images / "red.png") == tagger(images / "red.png", top_k=1, decoding="sequential")
    assert len(once(images / "red.png", top_k=3)) > 1


def test_rows_and_columns_of_a_dataset_are_tagged(tagger, expected, images):
    paths = [str(images / f"{name}.png") for name in ("red", "blue")]
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "image": paths, "title": ["x", "y"], "tags": [["p"], ["q"]]})
    rows = rows.cast_column("image", datasets.Image())
    assert tagger(rows[1]) == expected(images=paths[1], titles="y")
    assert list(tagger(rows["image"])) == [expected(images=path) for path in paths]
    assert list(tagger(rows.to_iterable_dataset()["image"])) == [expected(images=path) for path in paths]
    assert tagger(tuple(paths)) == tagger(paths) and tagger(()) == []
    nothing = datasets.IterableDataset.from_generator(lambda: iter(()))
    assert list(tagger(nothing)) == []


def test_an_image_may_be_base64(tagger, images):
    text = base64.b64encode((images / "red.png").read_bytes()).decode()
    assert tagger(f"data:image/png;base64,{text}") == tagger(images / "red.png")


def test_a_file_may_be_named_like_an_address(tagger, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "red.png", "data:red.png")
    assert tagger("data:red.png") == tagger(images / "red.png")


def test_base64_is_decoded_like_a_file(tagger):
    transparent, grey = Image.new("RGBA", (32, 32), (0, 0, 0, 0)), Image.new("I;16", (32, 32), 20_000)
    for image in (transparent, grey):
        file = io.BytesIO()
        image.save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        pixels = [
            tagger._collate([tagger.preprocess(source)])["pixel_values"]
            for source in (f"data:image/png;base64,{text}", file.getvalue())
        ]
        assert pixels[0].equal(pixels[1])


def test_a_tag_vocabulary_takes_the_training_spelling_and_is_cached(tagger, monkeypatch):
    known = next(iter(tagger.processor.label_vocabulary))
    settings = {"threshold": 0.0}
    (tag,) = tagger({"title": "red"}, tag_vocabulary=[known.upper()], **settings)
    assert tag["label"] == known and not tag["novel"]
    monkeypatch.setattr(tagger.processor, "encode_tags", lambda tags: pytest.fail("the vocabulary was built again"))
    assert tagger({"title": "red"}, tag_vocabulary=[known.upper()], **settings) == [tag]


@pytest.mark.parametrize(
    "example, settings, message",
    [
        ({"imge": "x.png"}, {}, r"unknown keys \['imge'\].*expected some of"),
        ({}, {}, "no examples|neither"),
        ({"video": "a.mp4", "frames": []}, {}, 'both "video" and "frames"'),
        ("nowhere.png", {}, "nowhere.png is not an image that can be read: No such file"),
        ({"title": " "}, {}, "neither an image nor a title"),
        ({"title": "red"}, {"top_k": 0}, "top_k is 0"),
        ({"title": "red"}, {"top_k": True}, "top_k is True"),
        ({"title": "red"}, {"tag_vocabulary": {"dog": 1}}, "dict; expected a list of tags"),
        ({"title": "red"}, {"tag_vocabulary": ["dog", 3]}, "tag_vocabulary .* 3.* int"),
        ("x" * 3_000_000, {}, r"x… \(3,000,000 characters\) is too long for a path"),
        ("data:image/png;base64,AAAA", {}, "data:image/png;base64,AAAA is not an image that can be read"),
        ("data:image/png;base64,A", {}, "data:image/png;base64,A cannot be loaded"),
        ("data:image/png;base64,", {}, "cannot be loaded .*it is empty"),
        ("http://127.0.0.1:9/none.png", {}, "http://127.0.0.1:9/none.png cannot be loaded .*Connect"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"title": ["a"]})), {}, r"splits \['train'\]"),
        ({"title": "red"}, {"top_k": 1, "max_tags": 2}, "the same"),
        ({"title": "red"}, {"tresh": 0.5}, "tresh"),
        ({"title": "red"}, {"decoding": "both"}, "decoding='both'"),
        ({"title": "red"}, {"tag_vocabulary": "dog"}, "expected a list of tags"),
        ({"title": "red"}, {"tag_vocabulary": [" "]}, "is blank"),
    ],
)
def test_wrong_inputs_and_settings_are_refused(tagger, example, settings, message):
    with pytest.raises(ValueError, match=message):
        tagger(example, **settings)


def test_a_model_object_needs_a_processor(tagger):
    with pytest.raises(ValueError, match="needs a processor"):
        TagGenerationPipeline(model=tagger.model)


def test_a_saved_pipeline_loads_with_its_code(tagger, tmp_path, images):
    tagger.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline_optsg.py").exists()
    saved = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert {task: entry["pt"] for task, entry in saved.items()} == {
        "tag-generation": ["AutoModel"],
        "image-classification": ["AutoModel"],
    }
    again = pipeline("tag-generation", model=str(tmp_path), trust_remote_code=True)
    assert again(images / "red.png") == tagger(images / "red.png")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("tag-generation", model=str(tmp_path))
    packaged = pipeline("tag-generation", model=str(tmp_path), pipeline_class=TagGenerationPipeline)
    assert packaged(images / "red.png") == tagger(images / "red.png")


def test_a_model_object_gets_the_registered_pipeline(tiny_model, tiny_processor, images):
    tagger = pipeline("tag-generation", model=tiny_model, processor=tiny_processor)
    assert isinstance(tagger, TagGenerationPipeline)
    assert isinstance(tagger(images / "red.png"), list)


def test_images_are_tagged_in_half_precision(tiny_checkpoint, images):
    tagger = pipeline("tag-generation", model=str(tiny_checkpoint), trust_remote_code=True, dtype=torch.bfloat16)
    assert tagger(images / "red.png")
