"""Edits lists of text in an XMP document in place; every other byte stays.

XML libraries rewrite the whole document when they save it: quotes, white space inside tags, prefixes, line ends. Here
`expat` only finds the positions of elements, and edits are made in the bytes. `expat` loads no other files. A document
type is refused, and without one there are no entities to expand.
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
# Codecs of Python that are not encodings of files. Some need hours for a long text.
_NOT_ENCODINGS = {"idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7", "undefined"}
# XML 1.0, section 2.2: these characters cannot occur in a document, not even as references.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def is_xml_text(text: str) -> bool:
    """Return whether XML can hold a text."""
    return _NOT_XML.search(text) is None


@dataclass
class _Element:
    """An element and its byte positions.

    Args:
        name: Namespace and local name.
        attributes: Values by namespace and local name.
        start: Position of the start tag.
        inner: Position after the start tag.
        end: Position of the end tag.
        stop: Position after the end tag.
        closes_itself: Whether the start tag ends with `/>`.
        text: Text directly inside the element.
        children: Elements directly inside the element.
    """

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
    """An XMP document and the pending edits to it.

    Args:
        data: The file's bytes, in any encoding that XML declares.

    Raises:
        ValueError: The data are not well-formed XML with an `rdf:RDF` element, or have a document type.
    """

    def __init__(self, data: bytes = NEW_PACKET):
        try:
            self.encoding, self.byte_order_mark = _detect_encoding(data)
            # `expat` supports four encodings and counts bytes. UTF-8 settles both.
            self.data = data[len(self.byte_order_mark) :].decode(self.encoding).encode()
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"it cannot be decoded: {error}") from error
        self.root = next((element for element in _parse(self.data) if element.name == (RDF, "RDF")), None)
        if self.root is None:
            raise ValueError("it contains no rdf:RDF element")
        self.edits: list[tuple[int, int, bytes]] = []  # start, stop and replacement of a range of `data`
        self.new_properties: dict[str, list[bytes]] = {}

    def read_list(self, namespace: str, name: str) -> list[str] | None:
        """Return the texts of a list property, or `None` if there is no such property.

        Raises:
            ValueError: The property exists and is not a list.
        """
        properties = self._properties(namespace, name)
        return [_value(entry) for found in properties for entry in _entries(found)] if properties else None

    def has_property(self, namespace: str, name: str) -> bool:
        """Return whether there is a property that is not empty, in any form."""
        return any(
            description.attributes.get((namespace, name))
            or any(child.name == (namespace, name) and _has_content(child) for child in description.children)
            for description in self.root.children
        )

    def change(
        self, namespace: str, prefix: str, name: str, add: list[str], remove: list[str], kind: str = "Bag"
    ) -> None:
        """Append texts to a list property and remove others from it.

        The property is created if it does not exist, and removed if it becomes empty. Entries with qualifiers stay.

        Args:
            namespace: Namespace of the property.
            prefix: Prefix of a new property.
            name: Local name of the property.
            add: Texts to append.
            remove: Texts to remove.
            kind: Container of a new property, "Bag" or "Seq".

        Raises:
            ValueError: The property exists and is not a list.
        """
        properties = self._properties(namespace, name)
        for index, found in enumerate(properties):
            texts = add if index == 0 else []
            entries = _entries(found)
            removed = [entry for entry in entries if not entry.children and _value(entry) in remove]
            if removed and len(removed) == len(entries) and not texts:
                self._cut(found)
                continue
            for entry in removed:
                self._cut(entry)
            if texts:
                self._append(found, texts, kind)
        if add and not properties:
            self._create(namespace, prefix, name, add, kind)

    def replace(self, namespace: str, prefix: str, lists: dict[str, list[str]]) -> None:
        """Replace all properties of a namespace by `rdf:Seq` lists.

        Args:
            namespace: A namespace that only this program uses.
            prefix: Prefix of the new properties.
            lists: Texts by local name; empty lists are left out.
        """
        for description in self.root.children:
            own = [child for child in description.children if child.name[0] == namespace]
            if not own:
                continue
            has_others = len(description.children) > len(own) or description.attributes.keys() - {(RDF, "about")}
            for element in own if has_others else [description]:
                self._cut(element)
        for name, texts in lists.items():
            if texts:
                self._create(namespace, prefix, name, texts, "Seq")

    def to_bytes(self) -> bytes:
        """Return the edited document in its own encoding."""
        edits = list(self.edits)
        if self.new_properties:
            edits.append(self._insert_descriptions())
        data = self.data
        for start, stop, replacement in sorted(edits, key=lambda edit: (edit[0], edit[1]), reverse=True):
            data = data[:start] + replacement + data[stop:]
        return self.byte_order_mark + data.decode().encode(self.encoding, errors="xmlcharrefreplace")

    def _properties(self, namespace: str, name: str) -> list[_Element]:
        for description in self.root.children:
            if (namespace, name) in description.attributes:
                raise ValueError(f"{name} is an attribute; expected a list")
        return [
            child
            for description in self.root.children
            for child in description.children
            if child.name == (namespace, name)
        ]

    def _cut(self, element: _Element) -> None:
        """Remove an element and the white space before it."""
        self.edits.append((element.start - len(self._space_before(element.start)), element.stop, b""))

    def _append(self, found: _Element, texts: list[str], kind: str) -> None:
        if not found.children:
            content = self._list(texts, kind, _prefix(self._tag_name(self.root)), b" ")
            self._expand(found, content, b"")
            return
        container = found.children[0]
        space = self._space_before(container.start)
        entries = _entries(found)
        indent = self._space_before(entries[-1].start) if entries else space + b" "
        prefix = _prefix(self._tag_name(container))
        content = b"".join(indent + _list_entry(prefix, text) for text in texts)
        if container.closes_itself:
            self._expand(container, content, space)
        else:
            position = entries[-1].stop if entries else container.inner
            self.edits.append((position, position, content))

    def _expand(self, element: _Element, content: bytes, space: bytes) -> None:
        """Replace an element that has no content by one that has, with `space` before its end tag."""
        end_tag = b"</" + self._tag_name(element) + b">"
        self.edits.append((element.start, element.stop, self._start_tag(element) + content + space + end_tag))

    def _create(self, namespace: str, prefix: str, name: str, texts: list[str], kind: str) -> None:
        """Add a list property; `to_bytes` puts all new ones of a namespace into one description."""
        tag = f"{prefix}:{name}".encode()
        indent = self._description_indent()
        content = self._list(texts, kind, b"rdf", indent + b"  ")
        declaration = f"xmlns:{prefix}={quoteattr(namespace)}"
        element = b"<" + tag + b">" + content + indent + b" </" + tag + b">"
        self.new_properties.setdefault(declaration, []).append(element)

    def _insert_descriptions(self) -> tuple[int, int, bytes]:
        """Return the edit that adds the descriptions of all new properties."""
        # XMP part 1, section 7.4: all descriptions of a packet name the same resource.
        about = next((d.attributes[RDF, "about"] for d in self.root.children if (RDF, "about") in d.attributes), "")
        declare_rdf = "" if _prefix(self._tag_name(self.root)) == b"rdf" else f' xmlns:rdf="{RDF}"'
        indent = self._description_indent()
        content = b""
        for declaration, elements in self.new_properties.items():
            start_tag = f"<rdf:Description{declare_rdf} rdf:about={quoteattr(about)} {declaration}>".encode()
            properties = b"".join(indent + b" " + element for element in elements)
            content += indent + start_tag + properties + indent + b"</rdf:Description>"
        if self.root.closes_itself:
            end_tag = self._space_before(self.root.start) + b"</" + self._tag_name(self.root) + b">"
            return self.root.start, self.root.stop, self._start_tag(self.root) + content + end_tag
        position = max(self.root.end - len(self._space_before(self.root.end)), self.root.inner)
        return position, position, content

    def _space_before(self, position: int) -> bytes:
        before = self.data[:position]
        return before[len(before.rstrip(b" \t\r\n")) :]

    def _description_indent(self) -> bytes:
        """The white space before a description, which includes a line end."""
        if self.root.children:
            space = self._space_before(self.root.children[0].start)
        else:
            space = self._space_before(self.root.start) + b" "
        return space if b"\n" in space else b"\n  "

    def _start_tag(self, element: _Element) -> bytes:
        """The start tag of an element, without the slash of one that closes itself."""
        return re.sub(rb"\s*/?>$", b">", self.data[element.start : element.inner])

    def _tag_name(self, element: _Element) -> bytes:
        return re.match(rb"<([^\s/>]+)", self.data[element.start : element.inner])[1]

    @staticmethod
    def _list(texts: list[str], kind: str, prefix: bytes, indent: bytes) -> bytes:
        tag = _qualified(prefix, kind.encode())
        entries = b"".join(indent + b" " + _list_entry(prefix, text) for text in texts)
        return indent + b"<" + tag + b">" + entries + indent + b"</" + tag + b">"


def _entries(found: _Element) -> list[_Element]:
    """The `rdf:li` elements of a list property."""
    container = found.children[0] if len(found.children) == 1 else None
    if container is not None and container.name in CONTAINERS and not found.text.strip():
        return [child for child in container.children if child.name == (RDF, "li")]
    if found.children or found.text.strip() or found.attributes:
        raise ValueError(f"{found.name[1]} is not a list")
    return []


def _has_content(found: _Element) -> bool:
    return bool(found.text.strip()) or any(container.children for container in found.children)


def _value(entry: _Element) -> str:
    value = next((child for child in entry.children if child.name == (RDF, "value")), entry)
    return value.text.strip()


def _list_entry(prefix: bytes, text: str) -> bytes:
    tag = _qualified(prefix, b"li")
    return b"<" + tag + b">" + escape(text, {"\r": "&#13;"}).encode() + b"</" + tag + b">"


def _qualified(prefix: bytes, name: bytes) -> bytes:
    return prefix + b":" + name if prefix else name


def _prefix(tag_name: bytes) -> bytes:
    return tag_name.rpartition(b":")[0]


def _detect_encoding(data: bytes) -> tuple[str, bytes]:
    """Return the encoding of an XML document and its byte-order mark."""
    # The mark of UTF-16 is the start of that of UTF-32.
    wide = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
    marks = [(codecs.BOM_UTF8, "utf-8"), *(("\ufeff".encode(encoding), encoding) for encoding in wide)]
    for mark, encoding in marks:
        if data.startswith(mark):
            return encoding, mark
    for encoding in wide:
        if data.startswith("<".encode(encoding)):
            return encoding, b""
    declared = _ENCODING.match(data)
    encoding = declared[1].decode() if declared else "utf-8"
    if codecs.lookup(encoding).name.replace("_", "-") in _NOT_ENCODINGS:
        raise ValueError(f"{encoding} is not an encoding of XML files")
    return encoding, b""


def _parse(data: bytes) -> list[_Element]:
    """Return all elements of a document in UTF-8, in the order of their start tags."""
    parser = _Parser(data)
    try:
        parser.expat.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is not well-formed XML: {error}") from error
    return parser.elements


class _Parser:
    """Collects the elements of a document with their positions."""

    def __init__(self, data: bytes):
        self.data = data
        self.elements: list[_Element] = []
        self.open_elements: list[_Element] = []
        self.expat = expat.ParserCreate("utf-8", " ")
        self.expat.buffer_text = True
        self.expat.StartElementHandler = self._start
        self.expat.EndElementHandler = self._end
        self.expat.CharacterDataHandler = self._text
        self.expat.StartDoctypeDeclHandler = self._refuse

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        start = self.expat.CurrentByteIndex
        tag = _TAG.match(self.data, start)
        names = {_split_name(attribute): value for attribute, value in attributes.items()}
        element = _Element(_split_name(name), names, start, tag.end(), closes_itself=tag[0].endswith(b"/>"))
        if self.open_elements:
            self.open_elements[-1].children.append(element)
        self.elements.append(element)
        self.open_elements.append(element)

    def _end(self, name: str) -> None:
        element = self.open_elements.pop()
        if element.closes_itself:
            element.end = element.stop = element.inner
        else:
            element.end = self.expat.CurrentByteIndex
            element.stop = self.data.index(b">", element.end) + 1

    def _text(self, characters: str) -> None:
        if self.open_elements:
            self.open_elements[-1].text += characters

    @staticmethod
    def _refuse(*_: object) -> None:
        raise ValueError("it has a document type, which XMP does not allow")


def _split_name(name: str) -> tuple[str, str]:
    """Split a name as `expat` gives it into namespace and local name."""
    namespace, _, local = name.rpartition(" ")
    return namespace, local
