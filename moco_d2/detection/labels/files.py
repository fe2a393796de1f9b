"""Readers of label files: JSON, XML and lists in any encoding, with the line of each record.

All label files are opened here. A file that cannot be read raises ``ValueError`` with its path and the remedy.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

# Byte order marks. UTF-32's come first, because they begin with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
# Programs declare the smaller character set and write the larger one.
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}
_DECLARED = re.compile(rb"""\A\s*<\?xml[^>]*?\bencoding\s*=\s*["']([^"']*)["']""")


class Text(NamedTuple):
    """The text of a file.

    Attributes:
        text: the text, without a byte order mark.
        utf8: whether the file is UTF-8 without a byte order mark, which every program reads.
    """

    text: str
    utf8: bool


def read_text(path: Path, declared: str = "") -> Text:
    """Read a text file. The encoding follows from its byte order mark, zero bytes (UTF-16) or ``declared``; else UTF-8.

    Raises:
        ValueError: the file cannot be read, or has another encoding.
    """
    return _decode(path, _read(path), declared)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _decode(path: Path, data: bytes, declared: str) -> Text:
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", ""))
    if not encoding and b"\0" in data[:2]:  # UTF-16: one byte of an ASCII character is zero
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        encoding = encoding or _python_name(declared)
        text = _text_of(data[len(mark) :], encoding)
    except LookupError:
        raise ValueError(f"{path}:1: the declared encoding {declared!r} is not known; save the file as UTF-8") from None
    except UnicodeError as error:
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        problem = f"not in the declared encoding {declared!r}" if declared else "not in UTF-8"
        hint = ", or declare its encoding in the first line" if path.suffix.lower() == ".xml" and not declared else ""
        raise ValueError(f"{path}:{line}: the text is {problem}; save the file as UTF-8{hint}") from None
    return Text(text, not mark and encoding in ("utf-8", "ascii"))


def _python_name(declared: str) -> str:
    if not declared:
        return "utf-8"
    if not re.fullmatch(r"[A-Za-z][\w.:+-]*", declared, re.ASCII):
        raise LookupError(declared)
    name = codecs.lookup(declared).name.replace("-", "_")
    # UTF-16 has been recognised by its zero bytes; Windows programs declare it and write UTF-8.
    return "utf-8" if name.startswith(("utf_16", "utf_32", "utf_8")) else name


def _text_of(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeError:
        if encoding not in _WIDER:
            raise
        return data.decode(_WIDER[encoding])


def read_json(path: Path) -> tuple[Any, Text]:
    """Return the content of a JSON file, and its text.

    Raises:
        ValueError: the file cannot be read, or is not valid JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text.text), text
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: brackets are nested too deeply") from None
    except ValueError as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON: {reason}") from None


class JsonFile:
    """The lists of a COCO file, with messages that name a record's line, index and id."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        """Read the file.

        Raises:
            ValueError: the file cannot be read, or is not a JSON object.
        """
        self.path, self._report = path, report
        self.content, self._text = read_json(path)
        self.utf8 = self._text.utf8
        self._lines: dict[str, list[int]] = {}
        if not isinstance(self.content, dict):
            raise ValueError(f"{path}:1: not COCO labels, which are an object with images, annotations and categories")

    def records(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield index and record of each object in a list; items that are not objects are reported."""
        records = self.content.get(key) or []
        if not isinstance(records, list):
            self._report(f"{self.path}: {key} must be a list")
            return
        for index, record in enumerate(records):
            if isinstance(record, dict):
                yield index, record
            else:
                self.problem(key, index, f"is {shown(record)}; it must be an object")

    def values(self, key: str, field: str) -> Iterator[Any]:
        """Yield a field of each record that has it; nothing is checked or reported."""
        records = self.content.get(key)
        for record in records if isinstance(records, list) else ():
            if isinstance(record, dict) and record.get(field) is not None:
                yield record[field]

    def problem(self, key: str, index: int, what: str) -> None:
        """Report a problem of a record."""
        self._report(self.place(key, index) + what)

    def place(self, key: str, index: int) -> str:
        """Return the beginning of a message about a record: its file, line, index and id."""
        if key not in self._lines:  # The lines are searched for only if there is a problem.
            self._lines[key] = record_lines(self._text.text, key)
        record = self.content[key][index]
        own_id = f" (id {shown(record.get('id'))})" if isinstance(record, dict) else ""
        return f"{self.path}:{self._lines[key][index]}: {key}[{index}]{own_id} "


def shown(value: object, most: int = 80) -> str:
    """Return a value for a message: on one line, at most ``most`` characters of it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def record_lines(text: str, key: str) -> list[int]:
    """Return the line on which each record of a top-level list begins, in text that is valid JSON."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        found = between.match(text, at)
        assert found is not None
        return found.end()

    lines: list[int] = []
    at = skip(text.index("{") + 1)
    while text[at] != "}":
        name, at = decode(text, at)
        at = skip(at)
        if name != key:
            at = skip(decode(text, at)[1])
            continue
        lines, line, counted = [], 1, 0  # json.loads, too, takes the last of equal keys.
        at = skip(at + 1)
        while text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            lines.append(line)
            at = skip(decode(text, at)[1])
        at = skip(at + 1)
    return lines


class Xml(NamedTuple):
    """A parsed XML file.

    Attributes:
        root: the root element; each element has its line in the attribute ``line``.
        standard: whether every parser reads the file in the same way: it is UTF-8, declares nothing else, and has no
            namespaces.
    """

    root: ElementTree.Element
    standard: bool


def parse_xml(path: Path) -> Xml:
    """Parse an XML file in any encoding that Python knows.

    Declarations of entities are refused: labels need none, and a few lines of them can expand to gigabytes or read
    other files of this machine.

    Raises:
        ValueError: the file cannot be read, is not well-formed, or declares an entity.
    """
    data = _read(path)
    declared = _DECLARED.match(data)
    text = _decode(path, data, declared[1].decode("latin-1") if declared else "")
    # This encoding overrides the declared one.
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate("utf-8")

    def refuse(name: str, *_: object) -> None:
        raise ValueError(
            f"{path}:{parser.CurrentLineNumber}: declares the entity {name!r}; remove the DOCTYPE, labels need none"
        )

    parser.StartElementHandler = lambda tag, attributes: builder.start(
        tag, {**attributes, "line": str(parser.CurrentLineNumber)}
    )
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text.text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid XML: {error}") from None
    encoding = declared[1].lower() if declared else b"utf-8"
    standard = text.utf8 and encoding in (b"utf-8", b"us-ascii", b"ascii") and "xmlns" not in text.text
    return Xml(builder.close(), standard)
