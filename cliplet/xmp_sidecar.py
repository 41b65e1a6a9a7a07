"""Keywords in an XMP side-car: labels are merged into `dc:subject`, every other byte stays as it was.

    merged(b"<x:xmpmeta …", ["cat", "dog"])

A side-car is other programs' work: edits, ratings, faces. So it is never written anew from a parsed tree; the few
elements that change are cut out and put in at their places. What was added is noted in `cliplet:labels`, an own list
beside it: so a label that a later run does not find any more is taken back, while a keyword that somebody typed
stays, even if it is called the same. A keyword of ours that somebody removed comes back as long as the label is there.

The format: XMP Specification, Part 1 (ISO 16684-1), 7 and 8.2.1; side-cars: Part 3, 1.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape

from cliplet.errors import DataError

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
OWN = "urn:x-cliplet:labels/1.0/"
_LISTS = tuple((RDF, name) for name in ("Bag", "Seq", "Alt"))
_NEW = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="cliplet">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:dc="{DC}"
    xmlns:cliplet="{OWN}">
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
""".encode()


def merged(data: bytes | None, labels: Sequence[str]) -> bytes | None:
    """The side-car `data` with `labels` among its keywords; None for one that neither exists nor is needed.

    Args:
        data: what the side-car holds; None if there is none.

    Raises:
        DataError: it is not a side-car that can be changed without harm.
    """
    if data is None and not labels:
        return None
    packet = _Packet(_NEW if data is None else data)
    keywords, before = packet.texts(packet.subject), packet.texts(packet.own)
    added = [label for label in labels if label not in keywords]
    gone = {label for label in before if label not in labels}
    ours = [label for label in labels if label in before or label in added]
    if not added and not gone and ours == before:
        return packet.data
    result = _Edit(packet).done(added, gone, ours)
    expected = [k for k in keywords if k not in gone] + added
    again = _Packet(result)
    # Never to replace somebody's work by something that is not exactly what was meant.
    if again.texts(again.subject) != expected or again.texts(again.own) != ours:
        raise DataError("its keywords cannot be changed: they are written in an unusual way")
    return result


def keywords(data: bytes) -> list[str]:
    """The keywords (`dc:subject`) that a side-car holds, in order.

    Raises:
        DataError: it is none.
    """
    packet = _Packet(data)
    return packet.texts(packet.subject)


@dataclass
class _Element:
    """One element and where it lies: its start tag [start, inside), its end tag [outside, end)."""

    name: tuple[str, str]
    prefix: str
    attributes: dict[str, str]
    scope: dict[str, str]
    start: int
    inside: int
    outside: int = 0
    end: int = 0
    text: str = ""
    children: list[_Element] = field(default_factory=list)

    def child(self, *names: tuple[str, str]) -> _Element | None:
        return _only([self], *names)


def _only(parents: Sequence[_Element], *names: tuple[str, str]) -> _Element | None:
    """The one child of some elements with one of the names; None if there is none."""
    found = [c for parent in parents for c in parent.children if c.name in names]
    if len(found) > 1:
        raise DataError(f"it holds {found[0].prefix}{found[0].name[1]} twice")
    return found[0] if found else None


class _Packet:
    """A parsed side-car.

    Attributes:
        description: the element that has, or will have, the keywords; None if there is none yet.
        subject, own: `dc:subject` and `cliplet:labels`.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.rdf = _rdf(_parsed(data))
        found = [c for c in self.rdf.children if c.name == (RDF, "Description")]
        if any(name.startswith(f"{DC}\nsubject") for d in found for name in d.attributes):
            raise DataError("its dc:subject is an attribute, not a list")
        self.subject = _only(found, (DC, "subject"))
        # Some programs give each namespace a description of its own.
        self.own = _only(found, (OWN, "labels"))
        holders = [d for d in found if any(c is self.subject for c in d.children)]
        self.description = next(iter(holders or found), None)

    def texts(self, element: _Element | None) -> list[str]:
        """The items of a list of texts; none if there is no such element."""
        if element is None:
            return []
        items = element.child(*_LISTS)
        if items is None:
            if element.text.strip() or element.children:
                raise DataError(f"its {element.prefix}{element.name[1]} is not a list")
            return []
        return [li.text.strip() for li in items.children]


class _Edit:
    """Changes to a side-car, collected as stretches of bytes and what takes their place."""

    def __init__(self, packet: _Packet) -> None:
        self._packet = packet
        self._changes: list[tuple[int, int, bytes]] = []

    def done(self, added: Sequence[str], gone: set[str], ours: Sequence[str]) -> bytes:
        packet = self._packet
        blocks = []
        items = packet.subject.child(*_LISTS) if packet.subject else None
        if items is not None:
            self._change_items(items, added, gone)
        elif added:
            if packet.subject is not None:
                self._cut(packet.subject)
            blocks.append(("dc", DC, "subject", added))
        if packet.own is not None:
            self._cut(packet.own)
        if ours:
            blocks.append(("cliplet", OWN, "labels", ours))
        if blocks:
            self._put_blocks(blocks)
        result, at = [], 0
        for start, end, new in sorted(self._changes, key=lambda change: change[:2]):
            result += [packet.data[at:start], new]
            at = end
        return b"".join([*result, packet.data[at:]])

    def _change_items(self, items: _Element, added: Sequence[str], gone: set[str]) -> None:
        for li in items.children:
            if li.text.strip() in gone:
                self._cut(li)
        last = items.children[-1].end if items.children else items.inside
        indent = self._indent(items.children[-1].start) if items.children else self._indent(items.start, b" ")
        tag = f"{items.prefix}li"
        new = b"".join(indent + f"<{tag}>{escape(text)}</{tag}>".encode() for text in added)
        if new and items.end == items.inside:
            self._open(items, new + self._indent(items.start))
        elif new:
            self._changes.append((last, last, new))

    def _put_blocks(self, blocks: Sequence[tuple[str, str, str, Sequence[str]]]) -> None:
        """Add lists to the description, which is made where there is none."""
        home = self._packet.description or self._packet.rdf
        indent = self._indent(home.start, b" ")
        new = b""
        for prefix, uri, name, texts in blocks:
            spaces = [_declared(home.scope, prefix, uri), _declared(home.scope, "rdf", RDF)]
            lines = [f"<{prefix}:{name}{''.join(spaces)}>", " <rdf:Bag>"]
            lines += [f"  <rdf:li>{escape(text)}</rdf:li>" for text in texts]
            lines += [" </rdf:Bag>", f"</{prefix}:{name}>"]
            new += b"".join(indent + line.encode() for line in lines)
        if self._packet.description is None:
            about = f'{_declared(home.scope, "rdf", RDF)} rdf:about=""'
            new = indent + f"<rdf:Description{about}>".encode() + new + indent + b"</rdf:Description>"
        if home.end == home.inside:
            self._open(home, new + self._indent(home.start))
            return
        at = home.children[-1].end if home.children else home.inside
        self._changes.append((at, at, new))

    def _cut(self, element: _Element) -> None:
        """Take an element out, with the white space before it."""
        before = self._packet.data[: element.start]
        self._changes.append((len(before.rstrip(b" \t\r\n")), element.end, b""))

    def _open(self, element: _Element, content: bytes) -> None:
        """Turn `<a/>` into `<a>content</a>`."""
        tag = self._packet.data[element.start : element.inside]
        name = tag[1:-2].split()[0]
        at = element.start + len(tag[:-2].rstrip())
        self._changes.append((at, element.inside, b">" + content + b"</" + name + b">"))

    def _indent(self, at: int, more: bytes = b"") -> bytes:
        """The line break and white space before a position; nothing if something else stands there."""
        before = self._packet.data[:at]
        line = before[before.rfind(b"\n") + 1 :]
        if line.strip() or b"\n" not in before:
            return b""
        return (b"\r\n" if before.endswith(b"\r\n" + line) else b"\n") + line + more


def _declared(scope: dict[str, str], prefix: str, uri: str) -> str:
    """The declaration that a prefix needs, if it does."""
    return "" if scope.get(prefix) == uri else f' xmlns:{prefix}="{uri}"'


def _rdf(root: _Element) -> _Element:
    found = root if root.name == (RDF, "RDF") else root.child((RDF, "RDF"))
    if found is None:
        raise DataError("it is XML but not XMP: it has no rdf:RDF")
    return found


def _parsed(data: bytes) -> _Element:
    """The root element.

    Raises:
        DataError: no well-formed XML in UTF-8, or a document type, in which entity bombs would be.
    """
    reader = _Reader(data)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DataError(f"it is not whole XML: {error}") from error
    return reader.root


class _Reader:
    """Handlers that build the tree."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._path: list[_Element] = []
        self._scopes: list[dict[str, str]] = [{}]
        self._declared: dict[str, str] = {}
        self.root = _Element(("", ""), "", {}, {}, 0, 0)
        self.parser = expat.ParserCreate(namespace_separator="\n")
        self.parser.namespace_prefixes = True
        self.parser.buffer_text = True
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.StartNamespaceDeclHandler = self._namespace
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("it is in UTF-16; only UTF-8 is changed")

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if (encoding or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
            raise DataError(f"it is in {encoding}; only UTF-8 is changed")

    def _doctype(self, *_: object) -> None:
        raise DataError("it has a document type (DOCTYPE), which no XMP has")

    def _namespace(self, prefix: str | None, uri: str | None) -> None:
        self._declared[prefix or ""] = uri or ""

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        start = self.parser.CurrentByteIndex
        self._scopes.append({**self._scopes[-1], **self._declared})
        self._declared = {}
        uri, local, prefix = [*(["", name] if "\n" not in name else name.split("\n")), ""][:3]
        element = _Element(
            (uri, local),
            f"{prefix}:" if prefix else "",
            attributes,
            self._scopes[-1],
            start,
            self._tag_end(start),
        )
        if self._path:
            self._path[-1].children.append(element)
        else:
            self.root = element
        self._path.append(element)

    def _end(self, name: str) -> None:
        element = self._path.pop()
        self._scopes.pop()
        if self._data[element.inside - 2 : element.inside] == b"/>":
            element.outside = element.end = element.inside
        else:
            element.outside = self.parser.CurrentByteIndex
            element.end = self._data.index(b">", element.outside) + 1

    def _characters(self, text: str) -> None:
        self._path[-1].text += text

    def _tag_end(self, start: int) -> int:
        """Where the start tag that begins at `start` ends; `>` may stand in the value of an attribute."""
        at, quote = start, 0
        while True:
            byte = self._data[at]
            at += 1
            if quote:
                quote = 0 if byte == quote else quote
            elif byte in b"\"'":
                quote = byte
            elif byte == ord(">"):
                return at
