"""The folder of an exported model."""

import importlib.util

import pytest

from modeling_optsg.onnx import export, export_onnx
from optsg.command_line import main

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"Not installed: {', '.join(missing)}.", allow_module_level=True)


def test_an_export_replaces_only_an_earlier_export(make_model, tiny_processor, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "export_programs", lambda model, folder, size: None)
    model = make_model()
    folder, checkpoint = tmp_path / "onnx", tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    folder.mkdir()
    (folder / "README.md").write_text("mine", encoding="utf-8")
    for output, message in ((folder, "neither an empty folder nor an earlier export"), (checkpoint, "a checkpoint")):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, tiny_processor, output)
        # The command says it before it loads the model.
        assert main(["export-onnx", str(checkpoint), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert message in error and "choose another folder" in error and str(output) in error
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    (folder / "README.md").unlink()
    export_onnx(model, tiny_processor, folder)
    foreign = folder / "foreign.onnx"
    foreign.write_bytes(b"no program")
    # Not an export: a settings file of another program.
    settings = (folder / "settings.json").read_text(encoding="utf-8")
    for text in ("[]", "{}", "no JSON"):
        (folder / "settings.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="nor an earlier export"):
            export_onnx(model, tiny_processor, folder)
    (folder / "settings.json").write_text(settings, encoding="utf-8")
    export_onnx(model, tiny_processor, folder)
    assert foreign.read_bytes() == b"no program" and (folder / "settings.json").is_file()

    def interrupt(source, target):
        raise KeyboardInterrupt

    (checkpoint / "README.md").write_text("a card", encoding="utf-8")
    monkeypatch.setattr(export.shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, tiny_processor, folder, checkpoint=checkpoint)
    assert not (folder / "settings.json").exists()
