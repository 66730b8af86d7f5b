"""The handler for Inference Endpoints, loaded from a folder as the toolkit does."""

import base64
import importlib.util
import io
import json
import shutil
import sys

import pytest
from hub_client import run_without_package
from numbered_videos import write_video
from PIL import Image
from transformers import pipeline

from modeling_optsg.hub import handler as packaged
from modeling_optsg.image_formats import AVIF_BRANDS, HEIC_BRANDS


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint") / "repository"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.copy(packaged.__file__, folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(folder):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(path=str(folder))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "red.png"
    Image.new("RGB", (40, 30), (250, 20, 20)).save(path)
    return path


@pytest.fixture(scope="module")
def tagger(folder):
    return pipeline("tag-generation", model=str(folder), trust_remote_code=True)


def test_the_model_is_prepared_for_inference(endpoint):
    assert not endpoint.pipeline.model.lm_head.weight.is_contiguous()


def test_an_image_in_every_encoding_gives_the_pipelines_answer(endpoint, tagger, image):
    content = image.read_bytes()
    text = base64.b64encode(content).decode()
    expected = tagger(image)
    assert expected
    for inputs in (content, text, f"data:image/png;base64,{text}", Image.open(image), {"image": text}):
        assert endpoint({"inputs": inputs}) == expected
    # The URL-safe alphabet, without padding.
    assert endpoint({"inputs": base64.urlsafe_b64encode(content).decode().rstrip("=")}) == expected
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert endpoint({"inputs": {"image": wrapped}}) == expected


def test_requests_and_answers_are_json(endpoint, tagger, image, tmp_path):
    video = write_video(tmp_path / "video.mp4", num_frames=5)
    encoded = {path: base64.b64encode(path.read_bytes()).decode() for path in (image, video)}
    inputs = [{"video": encoded[video], "title": "a dog"}, {"frames": [encoded[image]] * 2}, {"title": "blue"}]
    body = json.loads(json.dumps({"inputs": inputs, "parameters": {"top_k": 2, "decoding": "sequential"}}))
    examples = [{"video": video, "title": "a dog"}, {"frames": [image] * 2}, {"title": "blue"}]
    answer = json.loads(json.dumps(endpoint(body)))
    for tags, alone in zip(
        answer, (tagger(example, top_k=2, decoding="sequential") for example in examples), strict=True
    ):
        assert tags == [tag | {"score": pytest.approx(tag["score"], abs=1e-5)} for tag in alone]


def test_parameters_reach_the_pipeline(endpoint):
    only = endpoint({"inputs": {"title": "red"}, "parameters": {"tag_vocabulary": ["blue"], "threshold": 0}})
    assert [tag["label"] for tag in only] == ["blue"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"abc", "expected"),
        ({}, "expected"),
        ({"inputs": {"title": "a"}, "top_k": 3}, r"unknown keys \['top_k'\] in the request; settings go in"),
        ({"inputs": {"title": "a"}, "parameters": [1]}, "parameters"),
        ({"inputs": {"title": "a"}, "parameters": {"tag_vocabulary": {"a": 1}}}, "expected a list of tags"),
        ({"inputs": {"title": "a"}, "parameters": {"num_workers": 9}}, r"unknown parameters \['num_workers'\]"),
        ({"inputs": {"imge": "AAAA"}}, "'imge'"),
        ({"inputs": {"frames": "AAAA"}}, "expected a list of images"),
        ({"inputs": {"title": 3}}, "expected str"),
        ({"inputs": {"image": 3}}, "type int"),
        ({"inputs": "AAAA"}, "not an image"),
        ({"inputs": {"video": "AAAA"}}, "not a video"),
    ],
)
def test_malformed_requests_are_refused(endpoint, data, message):
    with pytest.raises(ValueError, match=message):
        endpoint(data)


@pytest.mark.parametrize("wrap", [lambda name: name, lambda name: {"image": name}, lambda name: {"video": name}])
def test_paths_and_addresses_of_the_server_are_not_opened(endpoint, image, wrap):
    for name in (str(image), f"file://{image}", "http://127.0.0.1:1/x.png", f"data:image/png,{image}"):
        with pytest.raises(ValueError, match="not base64"):
            endpoint({"inputs": wrap(name)})
    for inputs in (
        {"path": str(image), "bytes": None},
        {"image": {"path": str(image)}},
        {"frames": [{"path": "a"}]},
    ):
        with pytest.raises(ValueError, match="expected"):
            endpoint({"inputs": inputs})


SERVE = """
import base64, json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
endpoint = EndpointHandler(sys.argv[1])
print(json.dumps(endpoint({"inputs": base64.b64encode(open(sys.argv[2], "rb").read()).decode()})))
"""


def test_the_handler_does_not_need_the_package(folder, endpoint, image, tmp_path):
    answer = run_without_package(SERVE, [folder, image], "http://127.0.0.1:9", tmp_path / "home", "")
    expected = endpoint({"inputs": image.read_bytes()})
    assert [tag["label"] for tag in answer] == [tag["label"] for tag in expected] and answer


def test_a_video_may_be_the_body(endpoint, tagger, tmp_path):
    for name in ("video.mp4", "video.mkv", "video.avi"):
        video = write_video(tmp_path / name, num_frames=5)
        assert endpoint({"inputs": video.read_bytes()}) == tagger(video)


def test_large_photographs_are_read_and_larger_images_refused(endpoint, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480), (250, 20, 20)).save(buffer, "JPEG")
    photograph = buffer.getvalue()
    # The limit of the reader counts, not that of Pillow.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    expected = endpoint({"inputs": photograph})
    reader = sys.modules[type(endpoint.pipeline.processor).__module__].read_image.__globals__
    monkeypatch.setitem(reader, "MAX_DECODED_BYTES", 4 * 640 * 480 - 1)
    assert endpoint({"inputs": photograph}) == expected
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="more than the limit"):
        endpoint({"inputs": buffer.getvalue()})


def test_the_handler_knows_all_still_images():
    assert packaged.STILL_IMAGE_BRANDS == (*HEIC_BRANDS, *AVIF_BRANDS)
