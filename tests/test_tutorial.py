"""The tutorial's commands run in order, at toy size, and print what the page says they print."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memory3 import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "tutorial"
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
TOY = {"--steps": "3", "--things": "60", "--notes": "8", "--max-tokens": "4"}
"""What the page's sizes become. The first notes are the same at every size, so the page's questions can be asked."""
RERUN = runpy.run_path(str(SCRIPTS / "rerun.py"))


def toy_sized(words: list[str]) -> list[str]:
    return [TOY.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def run(command: str, folder: Path) -> str:
    """What a command prints; `memory3` runs in this process, which has its heavy imports already."""
    words, _, target = command.partition(" > ")
    name, *arguments = toy_sized(shlex.split(words))
    if name == "memory3":
        done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed = done.stdout
    else:
        program = sys.executable if name == "python" else name
        printed = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
    if target:
        (folder / target).write_text(printed, "utf-8")
    return "" if target else printed


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every command with what it printed, and the folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    for script in ("world.py", "score.py"):
        shutil.copy(SCRIPTS / script, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MEMORY3_CACHE", str(folder / "cache"))
        return {"folder": folder, "lines": [(c, run(c, folder).rstrip().splitlines()) for c, _ in RERUN["commands"](PAGE)]}


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, names of notes, texts behind a citation."""
    if line.startswith("step "):
        return " ".join(re.findall(r"\b(step|rate|minutes|loss)\b (?=[\d.])", line))
    if cited := re.match(r"  \[(\d)\] +\d+%  (world/\w+/)[\w-]+\.md:\d+-\d+  # ", line):
        return f"[{cited[1]}] {cited[2]}"
    return re.sub(r"\b\d[\d,.]*\b", "N", line)


def shapes(command: str, lines: list[str]) -> list[str]:
    """The shapes of a command's output. A note, an answer, and the steps of a training are as many lines as they are."""
    if command.startswith("cat "):
        return [line[:2] for line in lines[:1]]
    if "train" in command:
        return [shape(line) for line in lines[-2:]]
    if re.search(r'ask "', command):
        cited = next((n for n, line in enumerate(lines) if line.startswith("  [1]")), len(lines))
        assert cited, "an answer stands before its citations"
        return [shape(line) for line in lines[cited:]]
    return [shape(line) for line in lines]


def test_every_command_of_the_tutorial_prints_lines_of_the_shape_that_the_page_shows(printed: dict[str, Any]) -> None:
    for (command, said), (_, lines) in zip(RERUN["commands"](PAGE), printed["lines"], strict=True):
        if said:  # the page shows nothing of some commands
            assert shapes(command, RERUN["shortened"]("\n".join(lines))) == shapes(command, said), command
