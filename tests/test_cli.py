"""`optsg tag`: what it prints, how it reports files that it cannot use, and its exit status."""

import errno
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sidecar_tools import snapshot

from optsg import command_line, main
from optsg.terminal import printable

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "orange", "purple")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture
def video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 32
        for colour in COLOURS:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))))
        container.mux(stream.encode())
    return path


@pytest.fixture
def tag(tiny_checkpoint, capsys):
    """Runs `optsg tag` with the tiny checkpoint; returns exit status, standard output and standard error."""

    def run(*args):
        status = main(["tag", "--model", str(tiny_checkpoint), *map(str, args)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def reference(tiny_checkpoint, capsys):
    """Tags of one file directly from the model."""
    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    capsys.readouterr()  # drops the output of loading

    def tags(path, title=None, video=False, **settings):
        image, video = (None, str(path)) if video else (str(path), None)
        inputs = processor(images=[image], videos=[video], titles=[title], return_tensors="pt")
        return processor.batch_decode(model.generate(**inputs, **settings))[0]

    return tags


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same_tags(one, other):
    assert [(t["tag"], t["novel"]) for t in one] == [(t["tag"], t["novel"]) for t in other]
    assert [t["score"] for t in one] == pytest.approx([t["score"] for t in other], abs=1e-4)


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


START = """
import resource, sys
from optsg import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    status = end.code
used = resource.getrusage(resource.RUSAGE_SELF)
packages = ",".join({name.partition(".")[0] for name in sys.modules})
print(status, used.ru_utime + used.ru_stime, packages, file=sys.stderr)
"""
SLOW_PACKAGES = {"torch", "transformers", "datasets", "modeling_optsg", "numpy", "pyarrow", "PIL", "tqdm"}


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["tag", "--help"], 0), (["tga"], 2), (["tag"], 2)]
)
def test_help_and_usage_errors_are_fast(arguments, status):
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    end, seconds, packages = done.stderr.splitlines()[-1].split()
    assert int(end) == status
    assert not SLOW_PACKAGES & set(packages.split(","))
    # 0.1 s on an idle machine; torch alone takes more than 1 s.
    assert float(seconds) < 1


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "optsg", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("optsg ")


def test_json_lines_have_the_models_tags_in_the_order_of_the_files(tag, reference, images):
    files = [images / "red.png", images / "blue.png", images / "green.png"]
    status, out, err = tag("--json", *files)
    assert (status, err) == (0, "")
    assert [line["file"] for line in lines(out)] == [str(file) for file in files]
    for file, line in zip(files, lines(out), strict=True):
        assert line.keys() == {"file", "title", "tags"} and line["title"] is None
        assert line["tags"], "a checkpoint without tags would test nothing"
        same_tags(line["tags"], reference(file))


@pytest.mark.parametrize("settings", [{"decoding": "sequential"}, {"max_tags": 1}, {"threshold": 0.2}])
def test_settings_reach_the_model(tag, reference, images, settings):
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    _, out, _ = tag("--json", *options, images / "red.png")
    same_tags(lines(out)[0]["tags"], reference(images / "red.png", **settings))


def test_the_output_in_the_documentation_is_real(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/tagging.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^```sh\n(optsg tag [^\n]*)\n```\n\n```text\n(.*?)```$", page, re.M | re.S).groups()
    Image.open(ROOT / "examples/images/bus.png").convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    printed, shown = capsys.readouterr().out.splitlines(), shown.splitlines()
    probability = re.compile(r"0\.\d{3}$")
    assert [probability.sub("", line) for line in printed] == [probability.sub("", line) for line in shown]
    scores, shown_scores = ([float(probability.search(line)[0]) for line in rows[1:]] for rows in (printed, shown))
    # Encoders of JPEG files differ.
    assert scores == pytest.approx(shown_scores, abs=0.01)


def test_the_batch_size_does_not_change_the_tags(tag, images):
    _, alone, _ = tag("--json", "--batch-size", 1, images)
    _, together, _ = tag("--json", "--batch-size", 4, images)
    for one, other in zip(lines(alone), lines(together), strict=True):
        assert one["file"] == other["file"]
        same_tags(one["tags"], other["tags"])


def test_the_table_has_every_file_and_tag(tag, images):
    _, out, _ = tag("--json", images)
    status, table, err = tag(images)
    assert (status, err) == (0, "")
    header, *rows = table.splitlines()
    assert header.split() == ["file", "tag", "probability", "novel"]
    for line in lines(out):
        assert any(line["file"] in row for row in rows)
        for found in line["tags"]:
            assert any(printable(found["tag"]) in row and f"{found['score']:.3f}" in row for row in rows)


def test_the_title_reaches_the_model(tag, reference, images):
    _, out, _ = tag("--json", "--title", "a red square", images / "red.png")
    assert lines(out)[0]["title"] == "a red square"
    same_tags(lines(out)[0]["tags"], reference(images / "red.png", "a red square"))


def test_titles_can_come_from_file_names(tag, images):
    os.rename(images / "red.png", images / "a-red_square.png")
    _, out, _ = tag("--json", "--title-from-name", images)
    assert [line["title"] for line in lines(out)] == ["a red square", "blue", "green", "orange", "purple"]


def test_invalid_unicode_in_a_file_name_is_left_out_of_the_title(tag, images):
    path = os.fsencode(images) + b"/red-\xff-square.png"
    os.rename(os.fsencode(images / "red.png"), path)
    _, out, _ = tag("--json", "--title-from-name", os.fsdecode(path))
    (line,) = lines(out)
    assert line["title"] == "red square" and line["tags"]


def test_videos_are_tagged_from_the_requested_number_of_frames(tag, reference, video, images):
    status, out, _ = tag("--json", images / "red.png", video)
    assert status == 0
    same_tags(lines(out)[0]["tags"], reference(images / "red.png"))
    same_tags(lines(out)[1]["tags"], reference(video, video=True))

    from modeling_optsg import processing_optsg

    read, seen = processing_optsg.read_frames, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_optsg, "read_frames", lambda *args, **kw: seen.append(read(*args, **kw)) or seen[-1])
        tag("--json", "--frames", 3, video)
    assert [len(frames) for frames in seen] == [3]


@pytest.mark.parametrize("output", ["--json", None])
def test_an_unreadable_image_does_not_affect_the_others(tag, images, output):
    _, before, _ = tag("--json", images)
    truncate(images / "green.png")
    status, out, err = tag(*filter(None, [output]), images)
    assert status == 1
    assert str(images / "green.png") in err and "4 tagged, 1 failed" in err
    assert "Traceback" not in err
    if output:
        bad, good = [[line for line in lines(out) if ("error" in line) is b] for b in (True, False)]
        assert [line["file"] for line in lines(out)] == [line["file"] for line in lines(before)]
        assert [line["file"] for line in bad] == [str(images / "green.png")] and bad[0]["error"]
        for line in good:
            same_tags(line["tags"], next(b for b in lines(before) if b["file"] == line["file"])["tags"])
    else:
        assert all((f"{colour}.png" in out) == (colour != "green") for colour in COLOURS)


def test_a_video_without_frames_is_reported(tag, video, images):
    truncate(video)
    status, out, err = tag("--json", images / "red.png", video)
    assert status == 1 and str(video) in err
    assert ["error" in line for line in lines(out)] == [False, True]


def test_without_pyav_videos_are_reported_and_images_tagged(tag, video, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    status, out, err = tag("--json", images / "red.png", video)
    assert status == 1 and "PyAV" in err
    assert ["error" in line for line in lines(out)] == [False, True]


def test_a_missing_file_is_reported_and_the_others_are_tagged(tag, images):
    status, out, err = tag("--json", images / "gone.png", images / "red.png")
    assert status == 1
    assert f"{images / 'gone.png'}: no such file" in err
    assert [("error" in line, line["file"]) for line in lines(out)] == [
        (True, str(images / "gone.png")),
        (False, str(images / "red.png")),
    ]


def test_a_named_file_is_read_whatever_its_suffix(tag, images):
    os.rename(images / "red.png", images / "red.image")
    (images / "notes.txt").write_text("not an image")
    status, out, err = tag("--json", images / "red.image", images / "notes.txt")
    assert status == 1 and "notes.txt" in err
    assert ["error" in line for line in lines(out)] == [False, True]


def test_an_empty_folder_is_an_error(tag, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = tag(tmp_path / "empty")
    assert (status, out) == (1, "")
    assert "no images or videos" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FILE"),
        (["--threshold", "1.5", "a.png"], "between 0 and 1"),
        (["--threshold", "nan", "a.png"], "between 0 and 1"),
        (["--max-tags", "0", "a.png"], "at least 1"),
        (["--frames", "few", "a.png"], "at least 1"),
        (["--decoding", "fast", "a.png"], "parallel"),
        (["--title", "x", "a.png", "b.png"], "--title needs exactly one"),
        (["--title", "x", "--title-from-name", "a.png"], "not allowed with"),
    ],
)
def test_usage_errors_name_the_expected_value(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["tag", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_model_the_error_names_the_option(monkeypatch, capsys, tmp_path, images):
    from optsg import model_argument

    monkeypatch.setattr(model_argument, "DEFAULT_MODEL", tmp_path / "no-such-checkpoint")
    with pytest.raises(SystemExit) as end:
        main(["tag", str(images)])
    assert end.value.code == 2
    assert "--model is required" in capsys.readouterr().err


def damage_weights(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)


def change_shape(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] = config["intermediate_size"] * 2
    (checkpoint / "config.json").write_text(json.dumps(config))


def change_model_type(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def remove_weights(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(name for name in weights if "multimodal_encoder" in name))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def remove_config(checkpoint):
    (checkpoint / "config.json").unlink()


def write_nan(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    next(values for values in weights.values() if values.is_floating_point())[..., 0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def store_integers(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name, values in weights.items() if values.is_floating_point())
    save_file(weights | {name: weights[name].long()}, checkpoint / "model.safetensors", {"format": "pt"})


def change_image_processor(**values):
    def change(checkpoint):
        path = checkpoint / "processor_config.json"
        content = json.loads(path.read_text())
        content["image_processor"] |= values
        path.write_text(json.dumps(content))

    return change


def remove_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()


def write_generation_config(**settings):
    def write(checkpoint):
        (checkpoint / "generation_config.json").write_text(json.dumps(settings, allow_nan=False))

    return write


def truncate_generation_config(checkpoint):
    (checkpoint / "generation_config.json").write_bytes(b"")


DAMAGES = [damage_weights, change_shape, change_model_type, remove_weights, remove_config, shutil.rmtree, write_nan]
DAMAGES += [store_integers, change_image_processor(image_std=[0.5, 0.5, 1e9])]
DAMAGES += [change_image_processor(image_mean=[1e30, 0.5, 0.5])]
DAMAGES += [remove_tokenizer, truncate_generation_config, write_generation_config()]
ALL_MODALITIES = {"image+title": 0.1, "image": 0.1, "title": 0.1}
DAMAGED_THRESHOLDS = [1.6, {}, {"sequential": 0.1}, {"parallel": ALL_MODALITIES, "sequential": None}]
DAMAGED_THRESHOLDS += [{"image+title": 0.1, "title": 0.1}, {"parallel": {}, "sequential": ALL_MODALITIES}]
DAMAGED_THRESHOLDS += [{"parallel": {"image+title": 0.1, "title": 0.1}, "sequential": ALL_MODALITIES}]
DAMAGES += [write_generation_config(threshold=threshold) for threshold in DAMAGED_THRESHOLDS]
DAMAGES += [write_generation_config(threshold=0.1, pad_bias={"sequential": -4})]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_model_that_cannot_be_loaded_gives_one_line(tiny_checkpoint, tmp_path, capsys, images, damage):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    damage(broken)
    before = snapshot(images)
    with pytest.raises(SystemExit) as end:
        main(["tag", "--model", str(broken), "--write", "xmp", "--write", "json", str(images)])
    assert snapshot(images) == before
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"optsg tag: model {broken} cannot be loaded: ") and err.count("\n") == 1


def test_more_frames_than_the_model_accepts_are_refused(tag, images, capsys):
    with pytest.raises(SystemExit) as end:
        tag("--frames", 100_000, images)
    assert end.value.code == 2
    assert "--frames 100000 is more than" in capsys.readouterr().err


def test_control_characters_in_file_names_are_escaped(tag, images):
    name = "red\x1b[31m\n.png"
    os.rename(images / "red.png", images / name)
    _, table, _ = tag(images)
    assert "\x1b" not in table and r"red\x1b[31m\n.png" in table
    _, out, _ = tag("--json", images)
    assert str(images / name) in [line["file"] for line in lines(out)]
    (images / name).write_bytes(b"")
    _, _, err = tag(images)
    assert "\x1b" not in err and r"red\x1b[31m\n.png" in err


def test_warnings_of_the_library_go_to_standard_error(tag, images, monkeypatch):
    from modeling_optsg import OPTSGProcessor

    call = OPTSGProcessor.__call__

    def warn_and_call(*args, **kwargs):
        logging.getLogger("modeling_optsg.video_utils").warning("%s: truncated", "red\x1b[31m.mp4")
        return call(*args, **kwargs)

    monkeypatch.setattr(OPTSGProcessor, "__call__", warn_and_call)
    status, _, err = tag("--json", images / "red.png")
    # The model is also tried with a blank image.
    assert status == 0 and set(err.splitlines()) == {"optsg tag: red\\x1b[31m.mp4: truncated"}


@pytest.mark.parametrize("output", ["--json", None])
def test_a_terminal_with_another_encoding_gets_escapes(tiny_checkpoint, monkeypatch, images, output):
    os.rename(images / "red.png", images / "红色.png")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["tag", "--model", str(tiny_checkpoint), *filter(None, [output]), str(images)]) == 0
    text = written.getvalue().decode("ascii")
    if output:
        assert any(line["file"].endswith("红色.png") for line in lines(text))
    else:
        assert r"\u7ea2\u8272.png" in text


def test_a_closed_pipe_ends_the_command_quietly(tiny_checkpoint, monkeypatch, capfd, images):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["tag", "--model", str(tiny_checkpoint), str(images)]) == 141
    assert capfd.readouterr().err == ""


def test_a_closed_pipe_of_windows_is_recognised(monkeypatch):
    errors = (OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EINVAL, "Invalid argument", "a?.jpg"))
    assert not any(map(command_line._is_closed_pipe, errors))
    monkeypatch.setattr(sys, "platform", "win32")
    assert list(map(command_line._is_closed_pipe, errors)) == [True, False]


def test_ctrl_c_keeps_the_printed_results(tag, monkeypatch, images):
    from modeling_optsg import OPTSGForTagGeneration

    generate, calls = OPTSGForTagGeneration.generate, []

    def generate_once(*args, **kwargs):
        if len(calls) == 2:  # a blank image and the first batch
            raise KeyboardInterrupt
        calls.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(OPTSGForTagGeneration, "generate", generate_once)
    status, out, err = tag("--json", "--batch-size", 2, images)
    assert status == 130 and len(lines(out)) == 2
    assert "interrupted" in err and "Traceback" not in err
