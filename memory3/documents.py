"""Files -> documents: their text, and the name that citations give it.

Text kinds are read here; the others through libraries of `memory3[docs]`. Nothing is executed, and archives are looked at
before they are unpacked.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from memory3.spec import SourceError

STDIN = "stdin"
"""Source of what came through stdin."""

MAX_UNPACKED_BYTES = 2**30
"""An archive (DOCX, EPUB) that claims to be larger is refused."""

_CODE = tuple(
    f".{suffix}"
    for line in (
        "c cc cpp cs css go h hpp ini java jl js jsx kt lua php pl",
        "py r rb rs rst scala sh sql swift tex toml ts tsx yaml yml",
    )
    for suffix in line.split()
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text and its name: the path, and the place in the file where that holds several (`notes.jsonl:3`, `a.pdf#page=2`)."""

    name: str
    text: str
    markdown: bool = False


_ZIP_ERRORS = (KeyError, zipfile.BadZipFile, zlib.error, RuntimeError)
"""What a damaged archive raises, and as `RuntimeError` one that is encrypted or packed in an unknown way."""
_XML_ERRORS = (*_ZIP_ERRORS, ElementTree.ParseError, ExpatError)
"""What a damaged archive of XML files raises."""

OnUnreadable = Callable[[SourceError], None]
"""Told of a file, page or row that cannot be read; what it does not raise is left out."""

Reader = Callable[[Path, str, str, OnUnreadable], Iterator[Document]]
"""`(path, name, text field, on unreadable)` to the documents of a file; raises what spoils the whole file."""


def documents(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    on_unreadable: OnUnreadable | None = None,
    on_read: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """The documents of files, folders (read recursively, sorted by path, hidden names left out) and `-` (text on stdin).

    Args:
        source: one of these or several.
        text_field: field or column that holds the text, in JSON lines, CSV and Parquet.
        on_unreadable: told of each file or row that cannot be read, which is then left out; by default it is an error.
        on_read: told of each file that was read to its end and left nothing out; not of stdin.

    Raises:
        SourceError: a path is missing or of an unknown kind (at once), or cannot be read (when it is its turn).
    """
    several = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths = [path for one in several for path in _files(one)]
    told = on_unreadable or _raise
    return (document for path in paths for document in _documents(path, text_field, told, on_read or _ignore))


def files_of(source: str) -> list[str]:
    """Names of files that a document of this name can be, or be a row, page or chapter of."""
    ends = [match.start() for match in re.finditer("[:#]", source)]
    return [source, *(source[:end] for end in ends if _PART.fullmatch(source, end))]


_PART = re.compile(r":\d+|#page=\d+|#.+\.x?html?")


def _raise(error: SourceError) -> None:
    raise error


def _ignore(name: str) -> None:
    pass


def _documents(path: Path | None, text_field: str, told: OnUnreadable, on_read: Callable[[str], None]) -> Iterator[Document]:
    errors: list[SourceError] = []

    def noted(error: SourceError) -> None:
        errors.append(error)
        told(error)

    try:
        if path is None:
            yield Document(STDIN, _decoded(sys.stdin.buffer.read(), STDIN))
        else:
            yield from KINDS[path.suffix.lower()](path, _printable(path), text_field, noted)
            if not errors:
                on_read(_printable(path))
    except SourceError as error:
        told(error)
    except OSError as error:
        told(SourceError(f"{path} cannot be read ({error.strerror}): check its permissions"))


# ---- text ----


def _plain(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    yield Document(name, _decoded(path.read_bytes(), name))


def _markdown(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    yield Document(name, _decoded(path.read_bytes(), name), markdown=True)


def _json_lines(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{name}:{number}"
            try:
                text = _decoded(line, name, offset, guess=False)
                if text.strip():
                    yield Document(where, _json_text(text, where, text_field))
            except SourceError as error:
                told(error)
            offset += len(line)


def _json_text(line: str, where: str, text_field: str) -> str:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is no JSON ({error}), expected one object per line: correct or remove the line") from None
    return _field(fields if isinstance(fields, dict) else {}, where, text_field)


def _csv(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(_decoded(path.read_bytes(), name), newline=""), strict=True)
    try:
        for number, row in enumerate(rows, 1):
            yield from _row(row, f"{name}:{number}", text_field, told)
    except csv.Error as error:
        raise SourceError(f"{name} is no CSV at line {rows.line_num} ({error}): correct or convert it") from None


def _parquet(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _field(dict.fromkeys(file.schema_arrow.names, ""), name, text_field)
            texts = (text for batch in file.iter_batches(1024, columns=[text_field]) for text in batch[0].to_pylist())
            for number, text in enumerate(texts, 1):
                yield from _row({text_field: text}, f"{name}:{number}", text_field, told)
    except pa.ArrowException as error:
        raise SourceError(f"{name} is no Parquet file ({_first_line(error)}): restore or convert it") from None


def _row(fields: dict[str, Any], where: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    try:
        yield Document(where, _field(fields, where, text_field))
    except SourceError as error:
        told(error)


def _field(fields: dict[str, Any], where: str, text_field: str) -> str:
    text = fields.get(text_field)
    if isinstance(text, str):
        return text
    found = f"{text_field!r} of type {type(text).__name__}" if text_field in fields else "none"
    names = ", ".join(repr(name) for name in list(fields)[:8]) or "no fields"
    raise SourceError(
        f"{where} has no text: found {found} among {names}, expected a field {text_field!r} with a text: name another field"
    )


# ---- through libraries ----


def _html(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    yield Document(name, _readable(path.read_bytes(), name), markdown=True)


def _readable(html: bytes | str, name: str) -> str:
    """HTML as Markdown, without scripts, styles, navigation, links' targets and pictures."""
    bs4, markdownify = _library("bs4", "beautifulsoup4", name), _library("markdownify", "markdownify", name)
    try:
        soup = bs4.BeautifulSoup(html, "html.parser")
        title = soup.title.get_text(" ", strip=True) if soup.title and not soup.h1 else ""
        for tag in soup(["head", "script", "style", "noscript", "template", "svg", "nav"]):
            tag.decompose()
        body = markdownify.MarkdownConverter(heading_style="ATX", strip=["a", "img"], escape_misc=False).convert_soup(soup)
    except RecursionError:
        raise SourceError(f"{name} is nested too deeply to be read as HTML: simplify it") from None
    return f"# {title}\n\n{body}" if title else str(body)


def _docx(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    mammoth = _library("mammoth", "mammoth", name)
    with _archive(path, name):
        try:
            with path.open("rb") as file:
                html = mammoth.convert_to_html(file, convert_image=mammoth.images.img_element(lambda image: {})).value
        except (*_XML_ERRORS, ValueError, OSError) as error:
            raise SourceError(f"{name} is no Word document ({_first_line(error)}): restore or convert it") from None
    yield Document(name, _readable(html, name), markdown=True)


def _epub(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    """One document for each part of the book, in reading order: `book.epub#chapter-1.xhtml`."""
    with _archive(path, name) as archive:
        for part in _spine(archive, name):
            try:
                html = archive.read(part)
            except _ZIP_ERRORS as error:
                told(
                    SourceError(
                        f"{name} lacks its part {part} ({_first_line(error)}): restore the file, or remove its password"
                    )
                )
                continue
            yield Document(f"{name}#{PurePosixPath(part).name}", _readable(html, name), markdown=True)


def _spine(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Paths of the parts in reading order."""
    try:
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        package = next(e.attrib["full-path"] for e in container.iter() if e.tag.endswith("rootfile"))
        root = ElementTree.fromstring(archive.read(package))
        items = {e.attrib["id"]: e.attrib["href"] for e in root.iter() if e.tag.endswith("}item")}
        order = [items[e.attrib["idref"]] for e in root.iter() if e.tag.endswith("}itemref")]
    except (*_XML_ERRORS, StopIteration) as error:
        raise SourceError(f"{name} is no EPUB ({_first_line(error) or 'no package'}): restore or convert it") from None
    return [os.path.normpath(PurePosixPath(package).parent / unquote(href)) for href in order]


def _pdf(path: Path, name: str, text_field: str, told: OnUnreadable) -> Iterator[Document]:
    """One document for each page that has text: `a.pdf#page=2`."""
    pdfium = _library("pypdfium2", "pypdfium2", name)
    try:
        file = pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        raise SourceError(
            f"{name} cannot be opened as PDF ({_first_line(error)}): restore it, or remove its password"
        ) from None
    found = False
    try:
        for number in range(1, len(file) + 1):
            try:
                text = file[number - 1].get_textpage().get_text_bounded().replace("\r\n", "\n")
            except pdfium.PdfiumError as error:
                told(SourceError(f"{name}#page={number} cannot be read ({_first_line(error)}): restore the file"))
                continue
            found = found or bool(text.strip())
            if text.strip():
                yield Document(f"{name}#page={number}", text)
    finally:
        file.close()
    if not found:
        raise SourceError(f"{name} holds no text, expected some (it may be scanned): recognise its text first")


def _library(module: str, package: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise SourceError(f"{name} needs {package}, which is not installed: pip install 'memory3[docs]'") from None


def _archive(path: Path, name: str) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{name} is no archive of its kind ({error}): restore or convert it") from None
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        archive.close()
        raise SourceError(f"{name} unpacks to {size:,} bytes, expected at most {MAX_UNPACKED_BYTES:,}: split it")
    return archive


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


# ---- files and encodings ----


def _decoded(data: bytes, name: str, offset: int = 0, *, guess: bool = True) -> str:
    """UTF-8, UTF-16 or UTF-32 where a byte order mark says so, else what charset-normalizer finds, where it is installed."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = _guessed(data) if guess and encoding == "utf-8" else None
        if found is None:
            wanted = encoding.removesuffix("-sig").upper()
            raise SourceError(
                f"{name} is not {wanted} at byte {offset + error.start} ({error.reason}): save it as UTF-8"
            ) from None
        _logger.warning("%s is not UTF-8 and is read as %s: save it as UTF-8 if that is wrong", name, found[1])
        return found[0]


_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""The longer mark first: that of UTF-32 begins with that of UTF-16."""


def _guessed(data: bytes) -> tuple[str, str] | None:
    """Text and encoding; `None` for what looks like no text, or without the library."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    best = from_bytes(data).best()
    return None if best is None or "\0" in str(best) else (str(best), best.encoding)


def _files(source: str | os.PathLike[str]) -> list[Path | None]:
    """The files of one source; `None` is stdin."""
    if source == "-":
        return [None]
    path = Path(source)
    if path.is_dir():
        return list(_walk(path))
    if not path.exists():
        raise SourceError(
            f"no file or folder at {_printable(path)}, expected a document: give a path that exists, or - for stdin"
        )
    if path.suffix.lower() not in KINDS:
        raise SourceError(f"{_printable(path)} is of an unknown kind, expected one of {_supported()}: convert it first")
    return [path]


def _walk(folder: Path) -> list[Path]:
    found = sorted(
        Path(root, name)
        for root, folders, names in os.walk(folder, onerror=_unreadable)
        for name in names
        if not name.startswith(".") and not any(part.startswith(".") for part in Path(root).relative_to(folder).parts)
    )
    known = [path for path in found if path.suffix.lower() in KINDS]
    if not known:
        raise SourceError(f"{_printable(folder)} holds no document, expected files of {_supported()}: give another folder")
    if len(known) < len(found):
        _logger.warning(
            "%d files of other kinds in %s are left out; read are %s", len(found) - len(known), folder, _supported()
        )
    return known


def _unreadable(error: OSError) -> None:
    raise SourceError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _supported() -> str:
    return ", ".join(kind for kind in KINDS if kind not in _CODE) + " and source code"


KINDS: dict[str, Reader] = {
    ".txt": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".docx": _docx,
    ".epub": _epub,
    ".pdf": _pdf,
    **dict.fromkeys(_CODE, _plain),
}
"""The kinds of files that are read, by suffix; a new kind is one reader and one row here."""
