"""Exported models: their search, their inputs, and the same tags as in PyTorch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from image_helpers import noise_image
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor, TagGenerationPipeline
from modeling_optsg.onnx import ClassifierProgram, DecodingStep, EncoderProgram, export, export_onnx
from modeling_optsg.onnx.settings import export_settings, tokenizer_json
from modeling_optsg.score_bound import PrefixTree
from modeling_optsg.score_bound import ScoreBound as TorchScoreBound
from optsg.command_line import main

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/optsg-icon-small"
TAGS = ["red", "blue", "e-mail", "创意美食", "家常菜"]
COUNTS = [9, 7, 1, 2, 1]
TITLES = ["a red square", "dog", None, None, "blue", "e-mail [SEP] 红色"]

if missing := [name for name in ("onnxruntime",) if importlib.util.find_spec(name) is None]:
    pytest.skip(f"Not installed: {', '.join(missing)}.", allow_module_level=True)

from optsg.onnx import OnnxTagger, tagger  # noqa: E402
from optsg.onnx.inputs import ImageReader, TitleReader  # noqa: E402
from optsg.onnx.search import ScoreBound, SortedTags  # noqa: E402
from optsg.without_torch.tag_merging import ClassifierOutput  # noqa: E402

needs_exporter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")), reason="no exporter"
)
SETTINGS = {
    "pad_bias": -9.0,
    "num_beams": 4,
    "num_return_sequences": 3,
    "num_candidates": 2,
    "min_beam_probability": 1e-4,
    "logit_adjustment": 0.3,
    "fusion_weights": {
        "image+title": [1.0, 0.5, 3.1, 1.0, 4.0],
        "image": [0.2, 1.5, 1.0, 0.8, 3.0],
        "title": [0.9, 0.6, 3.0, 1.0, 4.0],
    },
    "threshold": {"image+title": 0.08, "image": 0.1, "title": 0.06},
}


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(4)]
    return [*noise, None, Image.new("RGBA", (20, 30), (10, 200, 30, 90))]


@pytest.fixture
def model(make_model, tiny_processor):
    """A model with image words, of which every image is half familiar."""
    words = {"image_word_labels": list("abcdef"), "image_word_feature_size": 16, "num_image_words": 3}
    model = make_model(num_tag_classes=len(TAGS), **words)
    ids = tiny_processor.tag_tokenizer(TAGS, add_special_tokens=False)["input_ids"]
    model.set_label_vocabulary(ids, COUNTS)
    model.tag_classifier.bias.data.zero_()
    model.model.image_words.text_features.normal_()
    model.model.multimodal_encoder.evidence_pooler.standardizer.half_familiar_distance.fill_(1.0)
    set_up(model, **SETTINGS)
    return model


@torch.no_grad()
def set_up(model, **settings):
    """Sets the generation config. Tags get short and a few are likely, so that not all of them are too unlikely."""
    model.lm_head.bias.normal_(std=2.0, generator=torch.Generator().manual_seed(2))
    model.lm_head.bias[model.config.tag_sep_token_id] = 7.0
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


@pytest.fixture
def eager(monkeypatch):
    """Replaces the exported programs by the traced modules, which takes no time to export."""
    programs = {}

    class EagerProgram:
        def __init__(self, path, threads=None):
            self.module, self.names, self.inputs = programs[Path(path).name]

        @torch.no_grad()
        def __call__(self, **inputs):
            found = self.module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
            return {name: value.numpy() for name, value in zip(self.names, found)}

    def export_programs(model, folder, size):
        encoder, step = export.example_inputs(model, size)
        names = export.MEMORY_OUTPUTS
        if model.tag_classifier is not None:
            names += export.EVIDENCE_OUTPUTS + export.WORD_OUTPUTS
            classifier = ClassifierProgram(model)
            programs[export.CLASSIFIER] = (lambda vectors: [classifier(vectors)]), ["logits"], ["vectors"]
        programs[export.ENCODER] = EncoderProgram(model), names, list(encoder)
        programs[export.STEP] = DecodingStep(model), export.STEP_OUTPUTS, list(step)

    monkeypatch.setattr(export, "export_programs", export_programs)
    monkeypatch.setattr(tagger, "Program", EagerProgram)


def tags_in_pytorch(model, processor, images, titles, **settings):
    with torch.no_grad():
        found = processor.batch_decode(model.generate(**processor(images=images, titles=titles), **settings))
    return [[{"label": tag.pop("tag")} | tag for tag in tags] for tags in found]


def examples_of(images, titles):
    return [{"image": image, "title": title} for image, title in zip(images, titles)]


def assert_same(found, expected, tolerance=1e-4):
    assert [[tag["label"] for tag in tags] for tags in found] == [[tag["label"] for tag in tags] for tags in expected]
    for own, other in zip(found, expected):
        assert [tag["novel"] for tag in own] == [tag["novel"] for tag in other]
        assert [tag["score"] for tag in own] == pytest.approx([tag["score"] for tag in other], abs=tolerance)


WITHOUT_TORCH = """
import sys
{}
print([name for name in ("torch", "transformers", "modeling_optsg") if name in sys.modules], file=sys.stderr)
"""
READING = """
import optsg.onnx.files
from optsg.file_inputs import is_seen_as_video
from optsg.media_files import find_media_files
found = [is_seen_as_video(file) for file in find_media_files(sys.argv[1:], "a title", read_raw=True).files]
assert sorted(found) == [False, False, False, True], found
"""


def test_the_runner_and_reading_need_no_torch(tmp_path):
    for suffix in ("png", "webp", "gif", "jpg"):
        noise_image().save(tmp_path / f"a.{suffix}")
    command = [sys.executable, "-c", WITHOUT_TORCH.format(READING), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr == "[]\n"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 1, "num_return_sequences": 1},
        {"length_penalty": 1.0, "threshold": 0.0},
        {"threshold": 0.05, "fusion_weights": [1.0, -0.5, 3.1, 1.0, 4.0]},
        {"fusion_weights": None, "num_candidates": 0, "max_tags": 3, "threshold": 0.001},
    ],
)
def test_the_search_finds_the_tags_of_the_model(model, tiny_processor, images, eager, tmp_path, settings):
    set_up(model, **settings)
    export_onnx(model, tiny_processor, tmp_path)
    expected = tags_in_pytorch(model, tiny_processor, images, TITLES)
    assert sum(map(len, expected)) > 10 and any(tag["novel"] for tags in expected for tag in tags)
    exported = OnnxTagger.from_pretrained(tmp_path)
    assert_same(exported(examples_of(images, TITLES)), expected)
    # Titles of other lengths, and batches without images or titles.
    assert_same(exported(examples_of(images, TITLES), batch_size=2), expected)
    of_titles = tags_in_pytorch(model, tiny_processor, None, ["dog", "blue"])
    assert_same(exported([{"title": "dog"}, {"title": "blue"}]), of_titles)
    (of_image,) = tags_in_pytorch(model, tiny_processor, [images[0]], None, max_tags=2, threshold=0.01)
    assert_same([exported(images[0], top_k=2, threshold=0.01)], [of_image])


def test_a_call_takes_and_returns_what_the_pipeline_does(model, tiny_processor, eager, tmp_path):
    set_up(model, threshold=0.001)
    export_onnx(model, tiny_processor, tmp_path / "onnx")
    exported = OnnxTagger.from_pretrained(tmp_path / "onnx")
    pipeline = TagGenerationPipeline(model, processor=tiny_processor)
    path = tmp_path / "a.png"
    image = noise_image()
    image.save(path)
    forms = [path, str(path), path.read_bytes(), image, np.asarray(image), {"image": path, "title": "dog"}]
    forms += [{"title": "dog"}, {"bytes": path.read_bytes(), "path": "a.png"}, {"image": image, "title": None}]
    # A row of a dataset.
    forms.append({"image": {"bytes": path.read_bytes(), "path": None}, "title": " ", "tags": ["red"], "id": 3})
    for form in forms:
        assert_same([exported(form, top_k=2)], [pipeline(form, top_k=2)])
        assert [tag.keys() for tag in exported(form)] == [tag.keys() for tag in pipeline(form)]
    for batch in (forms, tuple(forms), forms[:1], []):
        assert_same(exported(batch), pipeline(batch))
        assert type(exported(batch)) is type(pipeline(batch)) is list


def test_what_only_the_pipeline_takes_is_an_error(model, tiny_processor, images, eager, tmp_path):
    export_onnx(model, tiny_processor, tmp_path / "onnx")
    exported = OnnxTagger.from_pretrained(tmp_path / "onnx")
    noise_image().save(tmp_path / "moving.gif", save_all=True, append_images=[noise_image().rotate(90)])
    features = np.zeros((1, 8), np.float32)
    for example, message in (
        (tmp_path / "moving.gif", "moving.gif is a video or an animated image; .* use the pipeline"),
        ({"video": "a.mp4"}, "a.mp4 is a video"),
        ({"frames": [images[0]]}, "the example has a video"),
        ({"frame_features": features}, "has frame features"),
        (
            "https://example.org/a.png",
            "'https://example.org/a.png' is an address or base64; give the path or the bytes",
        ),
        ("A" * 9000, "'A{100}' is an address or base64"),
        (iter(images), "an example of type list_iterator; expected an image, a dictionary or a list"),
        ({"caption": 1}, r"unknown keys \['caption'\]"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            exported(example)
        assert "\n" not in str(error.value)


def test_a_model_without_tag_classifier(make_model, tiny_processor, images, eager, tmp_path):
    model = make_model()
    set_up(model, pad_bias=-9.0, num_beams=3, num_return_sequences=3, threshold=0.001)
    export_onnx(model, tiny_processor, tmp_path)
    exported = OnnxTagger.from_pretrained(tmp_path)
    assert_same(exported(examples_of(images, TITLES)), tags_in_pytorch(model, tiny_processor, images, TITLES))


def test_the_bound_drops_what_that_of_the_model_drops():
    generator = torch.Generator().manual_seed(0)
    tags = {tuple(torch.randint(2, 7, (length,), generator=generator).tolist()) for length in (1, 2, 3, 4) * 30}
    # Tokens with a zero as the last byte are sorted like others.
    tags = [[256 * token for token in tag] for tag in sorted(tags)]
    logits = torch.randn(2, len(tags), generator=generator)
    tree = PrefixTree(torch.tensor([tag + [0] * (4 - len(tag)) for tag in tags]), 0)
    weights = [(0.3, 0.8, -0.2, 0.9, -0.5), (0.4, 2.0, -0.7, 1.1, -3.0)]
    bounds = [
        kind([0.3, 0.1], ClassifierOutput(own, {}, None, weights), index)
        for kind, own, index in ((TorchScoreBound, logits, tree), (ScoreBound, logits.numpy(), SortedTags(tags, 4)))
    ]
    for length in (1, 2, 3):
        tokens = 256 * torch.randint(2, 7, (200, length), generator=generator)
        examples, log_probs = torch.arange(200) // 100, -6 * torch.rand(200, generator=generator)
        expected = bounds[0].can_reach(examples, tokens, log_probs)
        found = bounds[1].can_reach(examples.numpy(), tokens.numpy(), log_probs.numpy())
        assert 0 < expected.sum() < 200 and np.array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessor(size={"height": 32, "width": 24}),
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 28}),
    ],
    ids=["vit", "siglip", "cropped"],
)
def test_images_are_prepared_as_by_the_image_processor(image_processor, model, text_tokenizer, tag_tokenizer, images):
    processor = OPTSGProcessor(image_processor, text_tokenizer, tag_tokenizer)
    reader = ImageReader(json.loads(json.dumps(export_settings(model, processor)["image"])))
    for image in (*images[:2], images[5], np.zeros((300, 200), np.uint8)):
        expected = processor.read_pixels(image)[0].numpy()
        np.testing.assert_allclose(reader(image, "the image"), expected, atol=1e-5)


def test_titles_are_encoded_as_by_the_processor(tiny_processor, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tiny_processor.tokenizer, pads=True), encoding="utf-8")
    titles = [*TITLES, "a " * 40]
    expected = tiny_processor(images=[np.zeros((8, 8, 3), np.uint8)] * len(titles), titles=titles)
    for found, name in zip(TitleReader(tmp_path / "tokenizer.json")(titles), ("input_ids", "attention_mask")):
        assert np.array_equal(found, expected[name].numpy())


def test_what_cannot_be_exported_is_an_error(model, make_model, tiny_processor, tmp_path):
    model.generation_config.num_beams = 17
    with pytest.raises(ValueError, match="num_beams=17; exported models have at most 16 beams"):
        export_onnx(model, tiny_processor, tmp_path)
    set_up(model, num_beams=4, repetition_penalty=2.0)
    with pytest.raises(ValueError, match="asks for RepetitionPenaltyLogitsProcessor"):
        export_onnx(model, tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="precomputed frame features"):
        export_onnx(make_model(vision=None, frame_feature_size=8), tiny_processor, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no settings.json; .*optsg export-onnx"):
        OnnxTagger.from_pretrained(tmp_path)


def test_settings_of_a_call_are_checked(model, tiny_processor, images, eager, tmp_path):
    export_onnx(model, tiny_processor, tmp_path)
    exported = OnnxTagger.from_pretrained(tmp_path)
    for name, value in (("top_k", 0), ("threshold", 2), ("threshold", "0.5"), ("threshold", {"image": 0.5})):
        with pytest.raises(ValueError, match=f"^{name}.* (probability|integer)"):
            exported(images[0], **{name: value})
    with pytest.raises(ValueError, match=r"inputs\[1\] is not an image"):
        exported([images[0], b"nothing"])
    with pytest.raises(ValueError, match="example 0 has neither an image nor a title"):
        exported([{}])


def test_the_command_reports_errors_in_one_line(tmp_path, capsys):
    assert main(["export-onnx", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == f"optsg export-onnx: {tmp_path} is not the folder of a checkpoint: it has no config.json\n"


# `optsg tag` with an exported model


@pytest.fixture
def library(tmp_path):
    """A folder with titles in its metadata and inside an image, and a damaged file."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number, name in enumerate(("a.png", "blue square.png", "c.png", "d.jpg")):
        noise_image(24 + number, 30).save(folder / name)
    exif = Image.Exif()
    exif[0x010E] = "a red dog"
    noise_image(50, 40).save(folder / "e.jpg", exif=exif)
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:99])
    rows = [{"file_name": "c.png", "title": "e-mail 红色"}, {"file_name": "d.jpg", "title": "green square"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def both(model, tiny_processor, tmp_path):
    """The folders of a checkpoint and of its export."""
    set_up(model, threshold={"image+title": 0.01, "image": 0.02, "title": 0.01})
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    export_onnx(model, tiny_processor, tmp_path / "onnx")
    return tmp_path / "checkpoint", tmp_path / "onnx"


def assert_same_lines(found, expected):
    """Compares JSON lines, with a tolerance for scores."""
    found, expected = ([json.loads(line) for line in text.splitlines()] for text in (found, expected))
    for own, other in zip(found, expected, strict=True):
        tags, others = own.pop("tags", []), other.pop("tags", [])
        scores, other_scores = ([tag.pop("score") for tag in rows] for rows in (tags, others))
        assert (own, tags) == (other, others)
        assert scores == pytest.approx(other_scores, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--threshold 0.05 --max-tags 3 --batch-size 2",
        "--title-from-name --explain",
        "--exclude 家常菜 --exclude G --max-tags 2",
        "--exclude 家常菜 --threads 1",
    ],
)
def test_optsg_tag_prints_the_tags_of_pytorch(eager, both, library, capsys, options):
    printed, errors = [], []
    for folder in both:
        assert main(["tag", "--model", str(folder), "--json", *options.split(), str(library), "nothing.png"]) == 1
        out, err = capsys.readouterr()
        printed.append(out)
        errors.append(err)
    assert_same_lines(*reversed(printed))
    assert errors[0] == errors[1] and "damaged.png is not an image" in errors[0]
    assert sum(len(json.loads(line).get("tags", [])) for line in printed[0].splitlines()) > 5


def test_optsg_tag_writes_the_sidecars_of_pytorch(eager, both, library, tmp_path, capsys):
    for folder in both:
        command = ["tag", "--model", str(folder), "--write", "txt", "--write", "xmp", str(library)]
        assert main([*command, "--output", str(tmp_path / f"{folder.name} sidecars")]) == 1
    own, expected = (
        {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / f"{name} sidecars").rglob("*.txt")}
        for name in ("onnx", "checkpoint")
    )
    assert own == expected and len(own) == 5
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "onnx sidecars")]) == 1
    assert "5 files already tagged by this model with these settings" in capsys.readouterr().err
    # A new export is another model.
    (both[1] / "encoder.onnx").write_bytes(b"changed")
    assert main([*command, "--output", str(tmp_path / "onnx sidecars"), "--dry-run"]) == 1
    assert "already tagged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--book books", "--vocabulary tags.txt", "--decoding sequential", "--frames 2", "--show-image-words"],
)
def test_optsg_tag_refuses_what_an_export_cannot_do(eager, both, library, tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    Path("tags.txt").write_text("red", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["tag", "--model", "onnx", *option.split(), "library"])
    name = option if "decoding" in option else option.split()[0]
    expected = (
        f"optsg tag: {name} needs a checkpoint, but onnx is an ONNX export; omit it, or give --model CHECKPOINT\n"
    )
    assert (end.value.code, capsys.readouterr().err) == (2, expected)
    assert main(["tag", "--model", "onnx", "--decoding", "parallel", "library/a.png"]) == 0


def test_optsg_tag_refuses_videos_and_animated_images_of_an_export(eager, both, tmp_path, capsys):
    frames = [noise_image(), noise_image().rotate(90)]
    for name in ("a.gif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    noise_image().save(tmp_path / "c.png")
    names = [str(tmp_path / name) for name in ("a.gif", "b.webp", "c.png")]
    assert main(["tag", "--model", str(both[1]), "--json", *names]) == 1
    out, err = capsys.readouterr()
    assert "a.gif is a video, a GIF or an animated image, which an exported model does not tag; use" in err
    assert "b.webp is a video, a GIF or an animated image, which" in err
    assert [("tags" in json.loads(line)) for line in out.splitlines()].count(True) == 1


TAGGING = """
from optsg.command_line import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, end=" ", file=sys.stderr)
"""


def test_a_damaged_export_is_reported_without_torch(model, tiny_processor, eager, library, tmp_path):
    export_onnx(model, tiny_processor, tmp_path / "onnx")
    (tmp_path / "onnx/encoder.onnx").write_bytes(b"\0" * 100)
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH.format(TAGGING),
        "tag",
        "--model",
        str(tmp_path / "onnx"),
        str(library),
    ]
    error = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr.splitlines()
    assert len(error) == 2 and error[1] == "2 []"
    assert (
        error[0].startswith(f"optsg tag: model {tmp_path / 'onnx'} cannot be loaded: ") and "encoder.onnx" in error[0]
    )


@pytest.mark.slow
@needs_exporter
def test_optsg_tag_needs_no_torch(model, tiny_processor, library, tmp_path, capsys):
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "onnx"
    model.save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    assert main(["export-onnx", str(checkpoint), "--output", str(folder)]) == 0
    capsys.readouterr()
    arguments = ["--json", "--threshold", "0.01", "--write", "xmp", str(library)]
    command = [sys.executable, "-c", WITHOUT_TORCH.format(TAGGING), "tag", "--model", str(folder), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stderr.splitlines()[-1] == "1 []"
    assert main(["tag", "--model", str(checkpoint), *arguments, "--redo"]) == 1
    assert_same_lines(found.stdout, capsys.readouterr().out)


@pytest.mark.slow
@needs_exporter
@pytest.mark.parametrize("int8", [False, True])
def test_a_tiny_model_is_exported(model, tiny_processor, images, tmp_path, int8):
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "onnx"
    model.save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    (checkpoint / "LICENSE").write_text("free", encoding="utf-8")
    assert main(["export-onnx", str(checkpoint), "--output", str(folder), *["--int8"] * int8]) == 0
    names = {"LICENSE", "classifier.onnx", "decoding_step.onnx", "encoder.onnx"}
    names |= {"settings.json", "tag_tokenizer.json", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    found = OnnxTagger.from_pretrained(folder)(examples_of(images, TITLES))
    if not int8:
        assert_same(found, tags_in_pytorch(model, tiny_processor, images, TITLES))
    assert all(found)


@pytest.mark.slow
@needs_exporter
def test_the_shipped_checkpoint_gives_the_same_tags(exported_checkpoint):
    examples = load_tagging_dataset("icon_tagging")["test"].cast_column("image", datasets.Image(decode=False))
    examples = examples.select(range(0, 1500, 15))
    model, processor = OPTSGForTagGeneration.from_pretrained(CHECKPOINT), OPTSGProcessor.from_pretrained(CHECKPOINT)
    exported = OnnxTagger.from_pretrained(exported_checkpoint, threads=1)
    images, titles = list(examples["image"]), list(examples["title"])
    # Every third without a title, and every third without an image.
    titles[::3], images[1::3] = [None] * len(titles[::3]), [None] * len(images[1::3])
    expected = []
    for start in range(0, len(titles), 8):
        batch = slice(start, start + 8)
        expected += tags_in_pytorch(model, processor, images[batch], titles[batch])
    assert_same(exported(examples_of(images, titles)), expected)


def test_the_constants_of_the_bound_are_those_of_the_model():
    from modeling_optsg import score_bound
    from optsg.onnx import search

    for name in ("MAX_THRESHOLD", "TOLERANCE", "MIN_RATIO"):
        assert getattr(search, name) == getattr(score_bound, name)
