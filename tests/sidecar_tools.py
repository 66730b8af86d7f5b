"""Tools of the tests of `optsg tag --write`: photos, a stand-in for the model, and a user who edits sidecars."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from optsg import main
from optsg import tag as command
from optsg.file_tagger import FileTags

RDF, DC = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://purl.org/dc/elements/1.1/"
SUFFIXES = {"xmp": ".jpg.xmp", "json": ".jpg.optsg.json", "txt": ".txt"}
SIDECARS = list(SUFFIXES)


def make_photos(folder: Path) -> Path:
    """Makes files named like photos, one of them in a sub-folder."""
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of all files of a folder by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TagCommand:
    """Runs `optsg tag` with a stand-in for the model.

    Args:
        tmp_path: Folder of the test.
        monkeypatch: pytest's fixture.
        capsys: pytest's fixture.
    """

    def __init__(self, tmp_path, monkeypatch, capsys):
        self.capsys = capsys
        self.model = tmp_path / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        # Tags by file name; "*" stands for all other files.
        self.predicted = {"*": ["dog", "novel"]}
        # Title in all images.
        self.title = None
        # Names of the files that the last run tagged.
        self.tagged = []
        monkeypatch.setattr(command, "Tagger", lambda name, settings, num_threads: self.predict)

    def predict(self, files, batch_size, with_metadata):
        for file in files:
            name = Path(file.path).name
            self.tagged.append(name)
            tags = enumerate(self.predicted.get(name, self.predicted["*"]))
            tags = [{"tag": tag, "score": 0.9 - 0.1 * i, "novel": tag == "novel"} for i, tag in tags]
            yield file, FileTags(tags, [], title=file.title or self.title)

    def __call__(self, *args):
        """Returns exit status, standard output and standard error."""
        self.tagged = []
        status = main(["tag", "--model", str(self.model), *map(str, args)])
        return status, *self.capsys.readouterr()


class User:
    """Reads and edits the sidecar of `a.jpg` without the package's code."""

    def __init__(self, folder: Path, kind: str):
        self.path, self.kind = folder / ("a" + SUFFIXES[kind]), kind

    def read(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        if self.kind == "txt":
            return [piece.strip() for piece in text.split(",") if piece.strip()]
        if self.kind == "json":
            return [entry["tag"] for entry in json.loads(text)["tags"]]
        subjects = ElementTree.fromstring(text).iter(f"{{{DC}}}subject")
        return [entry.text for subject in subjects for entry in subject.iter(f"{{{RDF}}}li")]

    def write(self, tags: list[str]):
        if self.kind == "txt":
            self.path.write_text(", ".join(tags), encoding="utf-8")
        elif self.kind == "json":
            sidecar = json.loads(self.path.read_text(encoding="utf-8"))
            kept = {entry["tag"]: entry for entry in sidecar["tags"]}
            sidecar["tags"] = [kept.get(tag, {"tag": tag, "by": "me"}) for tag in tags]
            self.path.write_text(json.dumps(sidecar), encoding="utf-8")
        else:
            self._write_xmp(tags)

    def _write_xmp(self, tags: list[str]):
        # ElementTree writes the whole document with prefixes of its own.
        root = ElementTree.fromstring(self.path.read_text(encoding="utf-8"))
        subject = next(root.iter(f"{{{DC}}}subject"), None)
        if subject is None:
            description = ElementTree.SubElement(next(root.iter(f"{{{RDF}}}RDF")), f"{{{RDF}}}Description")
            description.set(f"{{{RDF}}}about", "")
            subject = ElementTree.SubElement(description, f"{{{DC}}}subject")
        subject.clear()
        bag = ElementTree.SubElement(subject, f"{{{RDF}}}Bag")
        for tag in tags:
            ElementTree.SubElement(bag, f"{{{RDF}}}li").text = tag
        self.path.write_bytes(ElementTree.tostring(root))
