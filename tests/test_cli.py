"""What `optsg tag` prints, what it says about files it cannot use, and its exit status."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from optsg.__main__ import main
from optsg.media_files import find_media_files
from optsg.terminal import TagTable, printable

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
    """Runs `optsg tag --model tiny_checkpoint …`; returns exit status, standard output and standard error."""

    def run(*args):
        status = main(["tag", "--model", str(tiny_checkpoint), *map(str, args)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def reference(tiny_checkpoint, capsys):
    """Tags of one example straight from the model, without the command."""
    from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor

    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    capsys.readouterr()  # what loading printed is not the command's

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


def test_the_commands_own_modules_load_nothing_heavy():
    # The package around them may; without it the command itself must answer `--help` and usage errors at once.
    program = (
        "import sys, types\n"
        "package = sys.modules['modeling_optsg'] = types.ModuleType('modeling_optsg')\n"
        "package.__path__ = ['modeling_optsg']\n"
        "from optsg.__main__ import main\n"
        "try:\n    main(['tag', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--title-from-name" in done.stdout


def test_json_lines_hold_the_models_own_tags_in_the_order_of_the_files(tag, reference, images):
    files = [images / "red.png", images / "blue.png", images / "green.png"]
    status, out, err = tag("--json", *files)
    assert (status, err) == (0, "")
    assert [line["file"] for line in lines(out)] == [str(file) for file in files]
    for file, line in zip(files, lines(out), strict=True):
        assert line.keys() == {"file", "title", "tags"} and line["title"] is None
        assert line["tags"], "a checkpoint that writes nothing tests nothing"
        same_tags(line["tags"], reference(file))


@pytest.mark.parametrize("settings", [{"decoding": "sequential"}, {"max_tags": 1}, {"threshold": 0.2}])
def test_settings_reach_the_model(tag, reference, images, settings):
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    _, out, _ = tag("--json", *options, images / "red.png")
    same_tags(lines(out)[0]["tags"], reference(images / "red.png", **settings))


def test_batches_change_nothing(tag, images):
    _, alone, _ = tag("--json", "--batch-size", 1, images)
    _, together, _ = tag("--json", "--batch-size", 4, images)
    for one, other in zip(lines(alone), lines(together), strict=True):
        assert one["file"] == other["file"]
        same_tags(one["tags"], other["tags"])


def test_table_names_every_file_and_tag(tag, images):
    _, out, _ = tag("--json", images)
    status, table, err = tag(images)
    assert (status, err) == (0, "")
    header, *rows = table.splitlines()
    assert header.split() == ["file", "tag", "probability", "novel"]
    for line in lines(out):
        assert any(line["file"] in row for row in rows)
        for found in line["tags"]:
            assert any(printable(found["tag"]) in row and f"{found['score']:.3f}" in row for row in rows)


def test_a_title_is_read_with_its_image(tag, reference, images):
    _, out, _ = tag("--json", "--title", "a red square", images / "red.png")
    assert lines(out)[0]["title"] == "a red square"
    same_tags(lines(out)[0]["tags"], reference(images / "red.png", "a red square"))


def test_titles_can_come_from_file_names(tag, images):
    os.rename(images / "red.png", images / "a-red_square.png")
    _, out, _ = tag("--json", "--title-from-name", images)
    assert [line["title"] for line in lines(out)] == ["a red square", "blue", "green", "orange", "purple"]


def test_of_a_name_that_is_not_unicode_the_rest_is_the_title(tag, images):
    path = os.fsencode(images) + b"/red-\xff-square.png"
    os.rename(os.fsencode(images / "red.png"), path)
    _, out, _ = tag("--json", "--title-from-name", os.fsdecode(path))
    (line,) = lines(out)
    assert line["title"] == "red square" and line["tags"]


def test_videos_are_tagged_from_as_many_frames_as_asked(tag, reference, video, images):
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
def test_one_bad_image_costs_no_other_its_tags(tag, images, output):
    _, before, _ = tag("--json", images)
    truncate(images / "green.png")
    status, out, err = tag(*filter(None, [output]), images)
    assert status == 1
    assert str(images / "green.png") in err and "1 could not be used, 4 tagged" in err
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


def test_a_file_that_is_not_there_is_reported_and_the_rest_tagged(tag, images):
    status, out, err = tag("--json", images / "gone.png", images / "red.png")
    assert status == 1
    assert f"{images / 'gone.png'}: no such file" in err
    assert [("error" in line, line["file"]) for line in lines(out)] == [
        (True, str(images / "gone.png")),
        (False, str(images / "red.png")),
    ]


def test_a_named_file_is_tried_whatever_its_suffix(tag, images):
    os.rename(images / "red.png", images / "red.image")
    (images / "notes.txt").write_text("not an image")
    status, out, err = tag("--json", images / "red.image", images / "notes.txt")
    assert status == 1 and "notes.txt" in err
    assert ["error" in line for line in lines(out)] == [False, True]


def test_an_empty_folder_is_an_error(tag, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = tag(tmp_path / "empty")
    assert (status, out) == (1, "")
    assert "no image or video" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FILE"),
        (["--threshold", "1.5", "a.png"], "between 0 and 1"),
        (["--threshold", "nan", "a.png"], "between 0 and 1"),
        (["--max-tags", "0", "a.png"], "at least 1"),
        (["--frames", "few", "a.png"], "at least 1"),
        (["--decoding", "fast", "a.png"], "parallel"),
        (["--title", "x", "a.png", "b.png"], "--title is for one"),
        (["--title", "x", "--title-from-name", "a.png"], "not allowed with"),
    ],
)
def test_usage_errors_say_what_was_expected(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["tag", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_model_the_error_says_what_is_missing(monkeypatch, capsys, tmp_path, images):
    from optsg import tag as command

    monkeypatch.setattr(command, "DEFAULT_MODEL", tmp_path / "no-such-checkpoint")
    with pytest.raises(SystemExit) as end:
        main(["tag", str(images)])
    assert end.value.code == 2
    assert "--model is needed" in capsys.readouterr().err


def damage_weights(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\0" * 100)


def change_shape(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] = config["intermediate_size"] * 2
    (checkpoint / "config.json").write_text(json.dumps(config))


def name_another_model(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def lose_weights(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(name for name in weights if "multimodal_encoder" in name))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def lose_configuration(checkpoint):
    (checkpoint / "config.json").unlink()


HARMS = [damage_weights, change_shape, name_another_model, lose_weights, lose_configuration, shutil.rmtree]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_model_that_does_not_load_is_one_line(tiny_checkpoint, tmp_path, capsys, images, harm):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    harm(broken)
    with pytest.raises(SystemExit) as end:
        main(["tag", "--model", str(broken), str(images)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"optsg tag: model {broken} cannot be loaded: ") and err.count("\n") == 1


def test_more_frames_than_the_model_takes_are_refused(tag, images, capsys):
    with pytest.raises(SystemExit) as end:
        tag("--frames", 100_000, images)
    assert end.value.code == 2
    assert "--frames is 100000" in capsys.readouterr().err


def test_control_characters_in_file_names_stay_harmless(tag, images):
    name = "red\x1b[31m\n.png"
    os.rename(images / "red.png", images / name)
    _, table, _ = tag(images)
    assert "\x1b" not in table and r"red\x1b[31m\n.png" in table
    _, out, _ = tag("--json", images)
    assert str(images / name) in [line["file"] for line in lines(out)]
    (images / name).write_bytes(b"")
    _, _, err = tag(images)
    assert "\x1b" not in err and r"red\x1b[31m\n.png" in err


def test_what_the_library_warns_of_is_said_on_standard_error(tag, images, monkeypatch):
    from modeling_optsg import OPTSGProcessor

    call = OPTSGProcessor.__call__

    def warn_and_call(*args, **kwargs):
        logging.getLogger("modeling_optsg.video_utils").warning("%s: breaks off", "red\x1b[31m.mp4")
        return call(*args, **kwargs)

    monkeypatch.setattr(OPTSGProcessor, "__call__", warn_and_call)
    status, _, err = tag("--json", images / "red.png")
    assert (status, err) == (0, "optsg tag: red\\x1b[31m.mp4: breaks off\n")


@pytest.mark.parametrize("output", ["--json", None])
def test_a_terminal_of_another_encoding_gets_escapes(tiny_checkpoint, monkeypatch, images, output):
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


def test_ctrl_c_keeps_what_is_printed(tag, monkeypatch, images):
    from modeling_optsg import OPTSGForTagGeneration

    generate, calls = OPTSGForTagGeneration.generate, []

    def generate_once(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(OPTSGForTagGeneration, "generate", generate_once)
    status, out, err = tag("--json", "--batch-size", 2, images)
    assert status == 130 and len(lines(out)) == 2
    assert "interrupted" in err and "Traceback" not in err


METADATA = {
    "metadata.jsonl": '{"file_name": "red.png", "title": "rot"}\n{"file_name": "sub/blue.png", "title": "蓝色"}\n',
    "metadata.csv": 'file_name,title,tags\nred.png,rot,"a|b"\nsub/blue.png,蓝色,\n',
}


def write_metadata(folder, name):
    if name == "metadata.parquet":
        import pyarrow
        import pyarrow.parquet

        columns = {"file_name": ["red.png", "sub/blue.png"], "title": ["rot", "蓝色"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    else:
        (folder / name).write_text(METADATA[name], encoding="utf-8")


@pytest.mark.parametrize("name", [*METADATA, "metadata.parquet"])
def test_metadata_gives_titles_to_a_folder(images, name):
    (images / "sub").mkdir()
    os.rename(images / "blue.png", images / "sub" / "blue.png")
    write_metadata(images, name)
    found = find_media_files([str(images)])
    titles = {Path(file.path).name: file.title for file in found.files}
    assert titles == {"red.png": "rot", "blue.png": "蓝色", "green.png": None, "orange.png": None, "purple.png": None}
    assert (found.failures, found.notes) == ([], [])
    from_names = find_media_files([str(images)], title_from_name=True)
    assert {file.title for file in from_names.files} == set(COLOURS)


def test_unusable_metadata_rows_are_counted_and_the_others_used(images):
    rows = ['{"file_name": "red.png", "title": "rot"}', "{", "[]", '{"file_name": "blue.png", "title": 3}']
    (images / "metadata.jsonl").write_text("\n".join(rows))
    found = find_media_files([str(images)])
    [(path, reason)] = found.failures
    assert path == str(images / "metadata.jsonl")
    assert reason.startswith("row 2:") and "2 more" in reason
    assert {file.title for file in found.files} == {"rot", None}


def test_metadata_of_missing_files_is_said(images):
    write_metadata(images, "metadata.jsonl")
    [note] = find_media_files([str(images)]).notes
    assert "names 1 files that are not there" in note and "blue.png" in note


def test_a_folder_is_searched_to_its_depth_and_what_is_left_out_is_counted(images):
    deep = images / "sub" / "deep"
    deep.mkdir(parents=True)
    for path, new in (("red.png", deep / "RED.PNG"), ("blue.png", images / "sub" / "blue.gif")):
        os.rename(images / path, new)
    for name in ("a.txt", "b.txt", "c.json", "README", ".hidden.png"):
        (images / name).write_bytes(b"")
    os.symlink(images, deep / "loop")
    os.symlink(images / "nothing", images / "broken.png")
    found = find_media_files([str(images)])
    assert [(os.path.relpath(file.path, images), file.is_video) for file in found.files] == [
        ("green.png", False),
        ("orange.png", False),
        ("purple.png", False),
        (os.path.join("sub", "blue.gif"), True),
        (os.path.join("sub", "deep", "RED.PNG"), False),
    ]
    assert found.failures == [(str(images / "broken.png"), "not a file, or a link to nothing")]
    [note] = found.notes
    for count in ("2 .txt", "1 .json", "1 no suffix", "1 hidden", "1 linked folder"):
        assert count in note


def test_printable_text_escapes_what_acts_on_a_terminal_and_keeps_languages():
    assert printable("e-mail 创意美食 می‌خواهم é 👩‍🍳") == "e-mail 创意美食 می‌خواهم é 👩‍🍳"
    assert printable("a\tb\n\x1b\x7f\x9b") == r"a\tb\n\x1b\x7f\x9b"
    assert printable("\u202egpj.exe \udcff") == r"\u202egpj.exe \udcff"


def test_columns_line_up_for_wide_characters_and_long_names():
    table = TagTable(["猫.png", "x" * 60])
    rows = table.rows("猫.png", [{"tag": "创意美食", "score": 0.5, "novel": True}]).splitlines()
    rows += table.rows("x" * 60, [{"tag": "cat", "score": 0.25, "novel": False}]).splitlines()
    assert rows[1] == "x" * 60
    cells = [table.header(), rows[0], rows[2]]
    ends = [row.index(cell) + len(cell) for row, cell in zip(cells, ("probability", "0.500", "0.250"), strict=True)]
    # Each of the five Chinese characters of the second line takes two columns.
    assert [ends[0], ends[1] + 5, ends[2]] == [ends[0]] * 3
