"""XMP as text that is edited in place: lists of text come and go, every other byte stays.

XML libraries rewrite what they save: quotes, white space inside tags, prefixes, line ends. So `expat` only says where
things are, and edits are made in the bytes. It loads nothing from outside, and a document type, without which there
are no entities to expand, is refused.
"""

import codecs
import re
from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
CONTAINERS = {(RDF, "Bag"), (RDF, "Seq"), (RDF, "Alt")}
NEW_PACKET = f"""\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{RDF}">
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()
_TAG = re.compile(rb"""<(?:"[^"]*"|'[^']*'|[^"'>])*>""")
_ENCODING = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
# Section 2.2 of XML 1.0; everything else cannot be written in it, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def is_xml_text(text: str) -> bool:
    """Whether XML can hold `text`."""
    return _NOT_XML.search(text) is None


@dataclass
class _Element:
    """Where an element stands: `start`, `inner` (after its start tag), `end` (before its end tag), `stop`."""

    name: tuple[str, str]
    attributes: dict[tuple[str, str], str]
    start: int
    inner: int = 0
    end: int = 0
    stop: int = 0
    closes_itself: bool = False
    text: str = ""
    children: list["_Element"] = field(default_factory=list)


class XmpPacket:
    """An XMP document and the changes to make in it.

    Args:
        data: the file's bytes, in any encoding that XML declares.

    Raises:
        ValueError: it is not well-formed XML with an `rdf:RDF` in it, or has a document type.
    """

    def __init__(self, data: bytes = NEW_PACKET):
        self.encoding, self.bom = _encoding(data)
        try:
            # `expat` knows four encodings and counts bytes; in UTF-8 both are settled.
            self.data = data[len(self.bom) :].decode(self.encoding).encode()
        except (LookupError, UnicodeDecodeError) as error:
            raise ValueError(f"it is not text in {self.encoding}: {error}") from error
        elements = _parse(self.data)
        self.root = next((element for element in elements if element.name == (RDF, "RDF")), None)
        if self.root is None:
            raise ValueError("there is no rdf:RDF in it")
        self.edits: list[tuple[int, int, bytes]] = []
        self.new_properties: dict[str, list[bytes]] = {}

    def examples(self, namespace: str, name: str) -> list[str] | None:
        """The texts of a list property, or `None` if there is no such property.

        Raises:
            ValueError: the property is there and is not a list.
        """
        properties = self._properties(namespace, name)
        return [_value(example) for found in properties for example in self._examples(found)] if properties else None

    def change(self, namespace: str, prefix: str, name: str, add: list[str], remove: list[str], kind: str = "Bag"):
        """Adds texts at the end of a list property, which is made if it is not there, and removes others.

        A property that becomes empty is taken out. Examples with qualifiers are left alone.

        Raises:
            ValueError: see `examples`.
        """
        properties = self._properties(namespace, name)
        leaving = set(remove)
        for found in properties:
            examples = self._examples(found)
            out = [example for example in examples if not example.children and _value(example) in leaving]
            if out and len(out) == len(examples) and not (add and found is properties[0]):
                self._cut(found)
                continue
            for example in out:
                self._cut(example)
            if add and found is properties[0]:
                self._append(found, add, kind)
        if add and not properties:
            self._new(namespace, prefix, name, add, kind)

    def replace(self, namespace: str, prefix: str, lists: dict[str, list[str]]):
        """Makes `lists` all there is of a namespace that is ours alone, as `rdf:Seq`s; empty ones are left out."""
        for description in self.root.children:
            own = [child for child in description.children if child.name[0] == namespace]
            others = len(description.children) > len(own) or description.attributes.keys() - {(RDF, "about")}
            for element in own if others else [description] if own else []:
                self._cut(element)
        for name, texts in lists.items():
            if texts:
                self._new(namespace, prefix, name, texts, "Seq")

    def to_bytes(self) -> bytes:
        """The document with the changes, in its own encoding."""
        edits = list(self.edits)
        if self.new_properties:
            edits.append(self._new_descriptions())
        data = self.data
        for start, stop, replacement in sorted(edits, key=lambda edit: (edit[0], edit[1]), reverse=True):
            data = data[:start] + replacement + data[stop:]
        return self.bom + data.decode().encode(self.encoding, errors="xmlcharrefreplace")

    def _properties(self, namespace: str, name: str) -> list[_Element]:
        for description in self.root.children:
            if (namespace, name) in description.attributes:
                raise ValueError(f"{name} is an attribute in it, not the list that XMP wants")
        return [p for description in self.root.children for p in description.children if p.name == (namespace, name)]

    @staticmethod
    def _examples(found: _Element) -> list[_Element]:
        container = found.children[0] if len(found.children) == 1 else None
        if container is not None and container.name in CONTAINERS and not found.text.strip():
            return [child for child in container.children if child.name == (RDF, "li")]
        if found.children or found.text.strip() or found.attributes:
            raise ValueError(f"{found.name[1]} is not the list in it that XMP wants")
        return []

    def _cut(self, element: _Element):
        self.edits.append((element.start - len(self._space_before(element.start)), element.stop, b""))

    def _space_before(self, position: int) -> bytes:
        before = self.data[:position]
        return before[len(before.rstrip(b" \t\r\n")) :]

    def _append(self, found: _Element, texts: list[str], kind: str):
        if not found.children:
            tag = self._tag_name(found)
            inside = self._list(texts, kind, self._prefix(self.root), b" ")
            self.edits.append((found.start, found.stop, self._open(found) + inside + b"</" + tag + b">"))
            return
        container = found.children[0]
        examples = [child for child in container.children if child.name == (RDF, "li")]
        prefix = self._prefix(container)
        space = self._space_before(examples[-1].start) if examples else self._space_before(container.start) + b" "
        new = b"".join(space + _example(prefix, text) for text in texts)
        if container.closes_itself:
            closing = self._space_before(container.start) + b"</" + self._tag_name(container) + b">"
            self.edits.append((container.start, container.stop, self._open(container) + new + closing))
        else:
            position = examples[-1].stop if examples else container.inner
            self.edits.append((position, position, new))

    def _open(self, element: _Element) -> bytes:
        """Its start tag, as one that does not close itself."""
        return re.sub(rb"\s*/?>$", b">", self.data[element.start : element.inner])

    def _tag_name(self, element: _Element) -> bytes:
        return re.match(rb"<([^\s/>]+)", self.data[element.start : element.inner])[1]

    def _prefix(self, element: _Element) -> bytes:
        return self._tag_name(element).rpartition(b":")[0]

    def _new(self, namespace: str, prefix: str, name: str, texts: list[str], kind: str):
        tag = f"{prefix}:{name}".encode()
        inside = self._list(texts, kind, b"rdf", self._indent() + b"  ")
        declaration = f"xmlns:{prefix}={quoteattr(namespace)}"
        element = b"<" + tag + b">" + inside + self._indent() + b" </" + tag + b">"
        self.new_properties.setdefault(declaration, []).append(element)

    def _list(self, texts: list[str], kind: str, prefix: bytes, indent: bytes) -> bytes:
        tag = (prefix + b":" if prefix else b"") + kind.encode()
        examples = b"".join(indent + b" " + _example(prefix, text) for text in texts)
        return indent + b"<" + tag + b">" + examples + indent + b"</" + tag + b">"

    def _indent(self) -> bytes:
        """White space, a line end in it, that stands before a description."""
        if self.root.children:
            space = self._space_before(self.root.children[0].start)
        else:
            space = self._space_before(self.root.start) + b" "
        return space if b"\n" in space else b"\n  "

    def _new_descriptions(self) -> tuple[int, int, bytes]:
        # All descriptions of one packet name the same resource (XMP part 1, section 7.4).
        about = next((d.attributes[RDF, "about"] for d in self.root.children if (RDF, "about") in d.attributes), "")
        own = "" if self._prefix(self.root) == b"rdf" else f' xmlns:rdf="{RDF}"'
        new = b""
        for declaration, elements in self.new_properties.items():
            head = f"<rdf:Description{own} rdf:about={quoteattr(about)} {declaration}>".encode()
            inside = b"".join(self._indent() + b" " + element for element in elements)
            new += self._indent() + head + inside + self._indent() + b"</rdf:Description>"
        if self.root.closes_itself:
            closing = self._space_before(self.root.start) + b"</" + self._tag_name(self.root) + b">"
            return self.root.start, self.root.stop, self._open(self.root) + new + closing
        position = self.root.end - len(self._space_before(self.root.end))
        return max(position, self.root.inner), max(position, self.root.inner), new


def _example(prefix: bytes, text: str) -> bytes:
    tag = prefix + b":li" if prefix else b"li"
    return b"<" + tag + b">" + escape(text, {"\r": "&#13;"}).encode() + b"</" + tag + b">"


def _value(example: _Element) -> str:
    value = next((child for child in example.children if child.name == (RDF, "value")), example)
    return value.text.strip()


def _encoding(data: bytes) -> tuple[str, bytes]:
    marks = [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")]
    for mark, encoding in marks:
        if data.startswith(mark):
            return encoding, mark
    for start, encoding in ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be")):
        if data.startswith(start):
            return encoding, b""
    declared = _ENCODING.match(data)
    return (declared[1].decode() if declared else "utf-8"), b""


def _parse(data: bytes) -> list[_Element]:
    """Every element of a document in UTF-8, in the order of their start tags."""
    parser = expat.ParserCreate("utf-8", " ")
    elements, open_elements = [], []

    def split(name: str) -> tuple[str, str]:
        namespace, _, local = name.rpartition(" ")
        return namespace, local

    def start(name, attributes):
        offset = parser.CurrentByteIndex
        tag = _TAG.match(data, offset)
        element = _Element(split(name), {split(k): value for k, value in attributes.items()}, offset, tag.end())
        element.closes_itself = tag[0].endswith(b"/>")
        if open_elements:
            open_elements[-1].children.append(element)
        elements.append(element)
        open_elements.append(element)

    def end(name):
        element = open_elements.pop()
        if element.closes_itself:
            element.end = element.stop = element.inner
        else:
            element.end = parser.CurrentByteIndex
            element.stop = data.index(b">", element.end) + 1

    def text(characters):
        if open_elements:
            open_elements[-1].text += characters

    def refuse(*_):
        raise ValueError("it has a document type, which XMP never needs")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.buffer_text = text, True
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is not well-formed XML: {error}") from error
    return elements
