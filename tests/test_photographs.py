"""The program that counts the photographs with an acceptable tag."""

import json
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_embedded_metadata import TITLE, packet

from benchmarks import photographs
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, predict_tags


@pytest.fixture
def tag_alone(tiny_checkpoint):
    """Returns the most probable tags of an image without a title."""
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)

    def tag(path):
        with Image.open(path) as image:
            tags = predict_tags(model, processor, [{"image": image}], progress=False)[0]
        return {tag["tag"]: round(tag["score"], 3) for tag in tags[: photographs.NUM_TAGS]}

    return tag


def test_hits_are_counted_and_titles_inside_files_are_not_used(tiny_checkpoint, tag_alone, tmp_path, monkeypatch):
    title = PngInfo()
    title.add_itxt("XML:com.adobe.xmp", packet(TITLE.replace("Robin", "a red square")).decode())
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png", pnginfo=title)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "grey.png")
    tags = {name: tag_alone(tmp_path / name) for name in ("red.png", "grey.png")}
    entries = [
        {"package": "drawn", "file": "red.png", "accept": ["unknown", list(tags["red.png"])[-1]]},
        {"package": "drawn", "file": "grey.png", "accept": ["unknown"]},
    ]
    (tmp_path / "photographs.json").write_text(json.dumps({"photos": entries}))
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", tmp_path / "photographs.json")
    output = tmp_path / "result.json"
    words = ["--checkpoint", tiny_checkpoint, "--backgrounds", tmp_path, "--output", output]
    monkeypatch.setattr(sys, "argv", ["photographs.py", *map(str, words)])
    photographs.main()
    result = json.loads(output.read_text())
    assert {name: result[name] for name in ("photographs", "hits", "without_tags")} == {
        "photographs": 2,
        "hits": 1,
        "without_tags": 0,
    }
    assert [(row["file"], row["hit"]) for row in result["rows"]] == [("red.png", True), ("grey.png", False)]
    for row in result["rows"]:
        assert row["tags"] == pytest.approx(tags[row["file"]], abs=0.002)
    (tmp_path / "grey.png").unlink()
    with pytest.raises(FileNotFoundError, match="grey.png does not exist. Get drawn as described"):
        photographs.main()
