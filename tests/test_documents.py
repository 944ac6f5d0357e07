"""Every kind of file gives its text under a name that leads back to it; what cannot be read is named, and the rest is read."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import count, tokenizer

from memory3.documents import KINDS, Document, documents
from memory3.spec import SourceError
from memory3.splitting import references

PAGE = """<html><head><title>Towers</title><style>p { color: red }</style></head><body><nav>Home | About</nav>
<h2>The tower</h2><p>The tower was finished in <b>1889</b>, <a href="http://x.example/">by the river</a>.</p>
<script>alert("no")</script><table><tr><td>height</td><td>330 m</td></tr></table></body></html>"""


def texts(source: Path | list[str | Path], **options: Any) -> dict[str, str]:
    return {Path(d.name).name: d.text for d in documents(source, **options)}


def word(path: Path, *paragraphs: str) -> Path:
    import docx

    made = docx.Document()
    made.add_heading("The tower", 1)
    for paragraph in paragraphs:
        made.add_paragraph(paragraph)
    made.save(str(path))
    return path


def pdf(path: Path, *pages: str, password: str | None = None) -> Path:
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(path), encrypt=password)
    for page in pages:
        canvas.drawString(72, 720, page)
        canvas.showPage()
    canvas.save()
    return path


def epub(path: Path, parts: dict[str, str], listed: tuple[str, ...] | None = None) -> Path:
    order = tuple(parts) if listed is None else listed
    items = "".join(f'<item id="{n}" href="text/{name}" media-type="x"/>' for n, name in enumerate(order))
    spine = "".join(f'<itemref idref="{n}"/>' for n in range(len(order)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", '<container xmlns="c"><rootfile full-path="OEBPS/a.opf"/></container>')
        archive.writestr(
            "OEBPS/a.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>',
        )
        for name, html in parts.items():
            archive.writestr(f"OEBPS/text/{name}", html)
    return path


def test_files_folders_and_stdin_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {
        "b/two.TXT": "zwei".encode("utf-8-sig"),
        "a.md": b"# eins",
        "b/three.jsonl": b'{"text": "drei"}\r\n\n{"text": "vier \\ud83d\\ude00"}',
        "wide.txt": "fünf".encode("utf-16"),
        "wider.txt": "sechs".encode("utf-32"),
        ".git/no.txt": b"no",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("null é".encode())))
    found = [(d.text, d.name.removeprefix(f"{tmp_path}/"), d.markdown) for d in documents(["-", tmp_path]) if d.text]
    assert found == [
        ("null é", "stdin", False),
        ("# eins", "a.md", True),
        ("drei", "b/three.jsonl:1", False),
        ("vier 😀", "b/three.jsonl:3", False),
        ("zwei", "b/two.TXT", False),
        ("fünf", "wide.txt", False),
        ("sechs", "wider.txt", False),
    ]


def test_one_path_is_as_good_as_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert list(documents(tmp_path / "a.txt")) == list(documents([str(tmp_path)])) == [Document(f"{tmp_path}/a.txt", "one")]


def test_other_kinds_in_a_folder_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.txt", "b.bin", "c"):
        (tmp_path / name).write_text("text")
    with caplog.at_level(logging.WARNING):
        assert len(list(documents(tmp_path))) == 1
    assert "2 files of other kinds" in caplog.text


def test_html_gives_its_words_without_scripts_navigation_and_addresses(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    [found] = documents(tmp_path / "a.html")
    assert found.markdown
    assert found.text.startswith("# Towers\n\n")
    assert "The tower was finished in **1889**, by the river." in found.text
    assert "330 m" in found.text
    assert not any(word in found.text for word in ("alert", "color", "Home", "x.example"))


def test_html_in_another_encoding_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes('<meta charset="windows-1251"><p>Башня построена в Париже</p>'.encode("windows-1251"))
    assert texts(tmp_path / "a.html")["a.html"].strip() == "Башня построена в Париже"


def test_word_documents_keep_headings_and_paragraphs(tmp_path: Path) -> None:
    found = texts(word(tmp_path / "a.docx", "It was finished in 1889.", "Второй абзац"))["a.docx"]
    assert found.split("\n\n")[:3] == ["# The tower", "It was finished in 1889.", "Второй абзац"]


def test_a_pdf_is_cited_by_the_page_also_the_two_hundredth(tmp_path: Path) -> None:
    found = texts(pdf(tmp_path / "a.pdf", *[f"This is page number {n}." for n in range(1, 201)]))
    assert len(found) == 200
    assert found["a.pdf#page=200"].strip() == "This is page number 200."


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path: Path) -> None:
    made = epub(
        tmp_path / "a.epub",
        {"two words.xhtml": "<h1>Two</h1>", "one.xhtml": "<p>One</p>", "cover.xhtml": "<p>No</p>"},
        listed=("one.xhtml", "two%20words.xhtml"),
    )
    assert [(name, text.strip()) for name, text in texts(made).items()] == [
        ("a.epub#one.xhtml", "One"),
        ("a.epub#two words.xhtml", "# Two"),
    ]


def test_rows_of_tables_are_documents_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,body\n1,"two\nlines, and a comma"\n2,last\n', "utf-8")
    pq.write_table(pa.table({"id": [1, 2], "body": ["first", "second"]}), tmp_path / "b.parquet")
    assert texts(tmp_path, text_field="body") == {
        "a.csv:1": "two\nlines, and a comma",
        "a.csv:2": "last",
        "b.parquet:1": "first",
        "b.parquet:2": "second",
    }


def test_old_encodings_are_recognised_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "Der Turm wurde für die Weltausstellung gebaut. Später fand man ihn schön, groß und überaus nützlich. " * 3
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path / "a.txt")["a.txt"] == text
    assert "a.txt is not UTF-8 and is read as" in caplog.text


@pytest.mark.parametrize(
    "text", ["العربية لغة جميلة. " * 30, "日本語の文章です。" * 60, "שלום עולם. " * 40, "x" * 3000, "a\x00b\x07c \x1b[0m " * 50]
)
def test_any_script_is_cut_into_references_that_fit_and_lose_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, "utf-8")
    found = list(references(tmp_path / "a.txt", tokenizer(), length=32))
    assert all(0 < count(r.text) <= 32 for r in found)
    assert all(r.text == text[r.start : r.end] for r in found)
    kept = "".join(r.text for r in found)
    assert len("".join(kept.split())) >= len("".join(text.split())) - 8


UNREADABLE = [
    ("a.bin", b"%", r"unknown kind, expected one of \.txt"),
    ("a.txt", b"\x00\x01\xff\xfe\x9d" * 40, "a.txt is not UTF-8 at byte 2"),
    ("a.txt", "fünf".encode("utf-16")[:-1], "a.txt is not UTF-16"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \xff', "a.jsonl is not UTF-8 at byte 23"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl:2 has no text: found 'text' of type int"),
    ("a.jsonl", b'{"body": "a"}', "a.jsonl:1 has no text: found none among 'body', expected a field 'text'"),
    ("a.jsonl", b"[1]", "a.jsonl:1 has no text"),
    ("a.jsonl", b"\n{", "a.jsonl:2 is no JSON"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is no JSON"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1 has a lone surrogate"),
    ("a.csv", b"id,body\n1,x\n", "a.csv:1 has no text: found none among 'id', 'body'"),
    ("a.csv", b'text\n"a"b\n', "a.csv is no CSV at line 1"),
    ("a.parquet", b"PAR1 and nothing more", "a.parquet is no Parquet file"),
    ("a.pdf", b"", "a.pdf cannot be opened as PDF"),
    ("a.pdf", b"%PDF-1.4 and nothing more", "a.pdf cannot be opened as PDF"),
    ("a.docx", b"PK\x03\x04 and nothing more", "a.docx is no archive of its kind"),
    ("a.epub", b"no archive", "a.epub is no archive of its kind"),
    ("a.html", b"<div>" * 5000, "a.html is nested too deeply"),
]


@pytest.mark.parametrize(("name", "data", "reason"), UNREADABLE)
def test_an_unreadable_document_is_named_with_the_reason(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=reason):
        list(references(tmp_path / name, tokenizer()))


def test_archives_of_something_else_locked_files_and_scans_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.docx", "w") as archive:
        archive.writestr("a.txt", "no Word document")
    with zipfile.ZipFile(tmp_path / "other.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
    pdf(tmp_path / "locked.pdf", "secret", password="open sesame")
    pdf(tmp_path / "scan.pdf", "")
    epub(tmp_path / "torn.epub", {"one.xhtml": "<p>One</p>"}, listed=("one.xhtml", "gone.xhtml"))
    told: list[SourceError] = []
    found = texts(tmp_path, on_unreadable=told.append)
    assert {name: text.strip() for name, text in found.items()} == {"torn.epub#one.xhtml": "One"}
    for error, reason in zip(
        told,
        [
            "locked.pdf cannot be opened",
            "other.docx is no Word",
            "other.epub is no EPUB",
            "scan.pdf holds no text",
            "lacks its part",
        ],
        strict=True,
    ):
        assert reason in str(error)


@pytest.mark.parametrize("damage", ["packed", "encrypted"])
@pytest.mark.parametrize(
    ("part", "reason"), [("text/one.xhtml", "lacks its part OEBPS/text/one.xhtml"), ("a.opf", "is no EPUB")]
)
def test_a_book_with_a_damaged_or_encrypted_part_is_named(tmp_path: Path, damage: str, part: str, reason: str) -> None:
    made = epub(tmp_path / "a.epub", {"one.xhtml": "<p>One</p>", "two.xhtml": "<p>Two</p>"})
    with zipfile.ZipFile(made) as archive:
        whole = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, held in whole.items():
            archive.writestr(entry, held)
        start = archive.getinfo(f"OEBPS/{part}").header_offset
    data = bytearray(made.read_bytes())
    name = f"OEBPS/{part}".encode()
    if damage == "packed":
        data[start + 30 + len(name)] = 0xFF  # no block of deflate begins so
    else:
        data[start + 6] |= 1
        data[data.rindex(b"PK\x01\x02", 0, data.rindex(name)) + 8] |= 1
    made.write_bytes(data)
    (tmp_path / "z.txt").write_text("the last is read")
    told: list[SourceError] = []
    found = {name: text.strip() for name, text in texts(tmp_path, on_unreadable=told.append).items()}
    assert found == {"z.txt": "the last is read"} | ({"a.epub#two.xhtml": "Two"} if part != "a.opf" else {})
    assert [reason in str(error) for error in told] == [True]


def test_what_is_unreadable_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    for n, (name, data, _) in enumerate(UNREADABLE[1:]):
        (tmp_path / f"{n}{name}").write_bytes(data)
    (tmp_path / "z.txt").write_text("the last is read")
    told: list[SourceError] = []
    found = list(references(tmp_path, tokenizer(), on_unreadable=told.append))
    assert found[-1].text == "the last is read"
    assert len(told) == len(UNREADABLE) - 1


def test_an_archive_that_claims_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = epub(tmp_path / "a.epub", {"one.xhtml": "<p>" + "a" * 10_000 + "</p>"})
    monkeypatch.setattr("memory3.documents.MAX_UNPACKED_BYTES", 9_999)
    with pytest.raises(SourceError, match=r"unpacks to 10,\d\d\d bytes, expected at most 9,999"):
        texts(made)


def test_an_epub_reads_nothing_from_outside_of_itself(tmp_path: Path) -> None:
    (tmp_path / "secret.xhtml").write_text("<p>secret</p>")
    made = epub(tmp_path / "a.epub", {}, listed=("../../../secret.xhtml",))
    told: list[SourceError] = []
    assert texts(made, on_unreadable=told.append) == {}
    assert len(told) == 1


def test_a_missing_library_is_one_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("bs4", "a.html"), ("mammoth", "a.docx"), ("pypdfium2", "a.pdf")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(SourceError, match=r"not installed: pip install 'memory3\[docs\]'"):
            texts(tmp_path / name)


def test_a_missing_path_and_a_folder_without_documents_are_refused_at_once(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "no file or folder"), (tmp_path, "holds no document")):
        with pytest.raises(SourceError, match=reason):
            documents(path)


def test_the_base_package_reads_text_without_the_libraries_of_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# one")
    code = f"import sys; from memory3.documents import documents; print([d.text for d in documents({str(tmp_path)!r})]);" + (
        "print(sorted({'bs4', 'markdownify', 'mammoth', 'pypdfium2', 'charset_normalizer'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[:2] == ["['# one']", "[]"]


def test_another_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "one"}))
    assert texts(tmp_path / "a.jsonl", text_field="body") == {"a.jsonl:1": "one"}


def test_every_kind_has_a_reader() -> None:
    assert {".txt", ".md", ".jsonl", ".html", ".pdf", ".docx", ".epub", ".csv", ".parquet", ".py"} <= set(KINDS)
