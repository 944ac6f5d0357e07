"""The commands of docs/probe.md run in order on the shipped model, and print lines of the shape that the page shows."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memory3.cli import app
from memory3.spec import Memory3Error

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "probe.md").read_text("utf-8")
RERUN = runpy.run_path(str(ROOT / "examples" / "tutorial" / "rerun.py"))
SAID: list[tuple[str, list[str]]] = RERUN["commands"](PAGE)
FEWER = {"heads": ["--texts", "2", "--length", "8"]}
"""What makes a command quicker than on the page."""


def shape(line: str) -> str:
    """A line without its numbers and verdicts; of a row of a table its number of cells, of words that a model said nothing."""
    line = re.sub(r"  says behind (\w+): .*", r"says \1", line)
    if line.startswith("| ") and re.search(r"\d", line) and "95 %" not in line:
        return f"row of {line.count('|')}"
    return re.sub(r" serves$|(?<=\): )[a-z ,]+$", "", re.sub(r"[(]?[-+]?\b\d[\d,.]*\b[)]?\s*", "N ", line)).strip()


def test_every_command_of_the_page_prints_lines_of_the_shape_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert [command.split()[1:3] for command, _ in SAID if "probe" in command][::3] == [["probe", "facts"], ["probe", "answer"]]
    for command, said in SAID:
        _, *words = shlex.split(command)
        done = CliRunner().invoke(app, [*words, *FEWER.get(words[1], [])], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        missing = {shape(line) for line in said if line != "…"} - {shape(line) for line in done.stdout.splitlines()}
        assert missing == set(), command
    assert (tmp_path / "circuit.png").stat().st_size > 10_000


def test_what_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_a_picture_or_threshold_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(Memory3Error, match=r"picture named circuit\.doc"):
        CliRunner().invoke(app, ["probe", "answer", "Who?", "--out", str(tmp_path / "circuit.doc")], catch_exceptions=False)
    assert CliRunner().invoke(app, ["probe", "facts", "none.jsonl", "--given", "1.5"]).exit_code == 2
