"""The tutorial's commands run in order, at toy size, and print what the page says they print."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memory3 import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "tutorial"
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
RERUN = runpy.run_path(str(SCRIPTS / "rerun.py"))
SAID: list[tuple[str, list[str]]] = RERUN["commands"](PAGE)
TOY = {"--steps": "3", "--things": "60", "--notes": "20", "--limit": "8"}
"""What the page's sizes become. The first notes are the same at every size, so the page's questions can be asked."""
Printed = list[tuple[str, list[str]]]


def run(command: str, folder: Path) -> str:
    """What a command prints; `memory3` runs in this process, which has its heavy imports already."""
    name, *words = shlex.split(command)
    arguments = [TOY.get(before, word) for before, word in zip([name, *words], words, strict=False)]
    if name != "memory3":
        program = sys.executable if name == "python" else name
        return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tutorial is gone through."""
    made = tmp_path_factory.mktemp("tutorial")
    shutil.copy(SCRIPTS / "world.py", made)
    return made


@pytest.fixture(scope="module")
def printed(folder: Path) -> Printed:
    """Every command with the lines that it printed at toy size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MEMORY3_CACHE", str(folder / "cache"))
        return [(command, RERUN["shortened"](run(command, folder))) for command, _ in SAID]


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, and of a citation the note and its text."""
    if line.startswith("step "):
        return " ".join(re.findall(r"(\w+) [\d.]", line)[:3])
    if cited := re.match(r"  \[\d\] +\d+%  (world/notes/)[\w-]+\.md:\d+-\d+  # ", line):
        return f"cited {cited[1]}"
    line = re.sub(r"-?\b\d[\d,.]*\b", "N", line)
    return line.split(" [N, N]")[0] if line.startswith("| ") else re.sub(r"layer .*,", "layer,", line)


def shapes(command: str, lines: list[str]) -> list[str]:
    """The shapes of a command's lines, each once. Of an answer only what stands below it; answers have no shape."""
    if re.match(r'memory3 ask "', command):
        lines = lines[next((n for n, line in enumerate(lines) if line.startswith("  ")), len(lines)) :]
    return list(dict.fromkeys(shape(line) for line in lines if line != RERUN["CUT"]))


def test_every_command_succeeds_and_prints_lines_of_the_shape_that_the_page_shows(printed: Printed) -> None:
    assert [command.split()[0] for command, _ in SAID].count("memory3") >= 7
    for (command, said), (_, lines) in zip(SAID, printed, strict=True):
        assert said and said != [RERUN["CUT"]], command
        assert shapes(command, lines) == shapes(command, said), command


def test_a_note_is_recalled_and_cited_until_it_is_deleted(folder: Path, printed: Printed) -> None:
    asked = [lines for command, lines in printed if command.startswith('memory3 ask "') and "--bank" in command]
    note = next(re.search(r"--source (\S+)", command)[1] for command, _ in SAID if "delete" in command)  # type: ignore[index]
    assert [any(note in line for line in lines) for lines in (asked[0], asked[-1])] == [True, False]
    assert (folder / note).exists()
    assert (folder / "run" / "model" / "memory_spec.json").exists()


def test_no_name_of_the_notes_stands_in_the_training_data(folder: Path, printed: Printed) -> None:
    rows = pq.read_table(folder / "world" / "qa.parquet").to_pylist()
    plain = pq.read_table(folder / "world" / "passages.parquet").to_pylist()
    trained = " ".join([*(f"{r['title']} {r['passage']}" for r in rows if r["split"] == "train"), *(p["text"] for p in plain)])
    held = [row for row in rows if row["split"] == "dev"]
    names = {row["title"] for row in held} | {a for row in held for a in row["answers"] if not re.search(r"\d", a)}
    assert len(names) > 20
    assert [name for name in names if re.search(rf"\b{name}\b", trained)] == []


def test_every_answer_stands_in_its_passage_and_every_note_holds_its_passage(folder: Path, printed: Printed) -> None:
    rows = pq.read_table(folder / "world" / "qa.parquet").to_pylist()
    assert len(rows) > 200
    assert all(re.search(rf"(?<!\w){row['answers'][0]}(?!\w)", row["passage"]) for row in rows)
    notes = "\n".join(note.read_text("utf-8") for note in (folder / "world" / "notes").iterdir())
    assert all(f"# {row['title']}\n\n{row['passage']}\n" in notes for row in rows if row["split"] == "dev")


def test_rerunning_a_page_replaces_outputs_and_leaves_commands_and_prose() -> None:
    page = "Prose.\n\n```console\n$ one\nold\n$ two\n```\n\n```\n$ not a command\n```\n"
    made = RERUN["filled"](page, lambda command: f"{command} done\n" + "x" * 200)
    cut = "x" * (RERUN["WIDTH"] - 1) + RERUN["CUT"]
    assert made == f"Prose.\n\n```console\n$ one\none done\n{cut}\n$ two\ntwo done\n{cut}\n```\n\n```\n$ not a command\n```\n"
    said = iter(SAID)  # in order: the last question is asked twice
    assert RERUN["filled"](PAGE, lambda command: "\n".join(next(said)[1])) == PAGE
    many = [str(n) for n in range(30)]
    assert RERUN["shortened"]("\n".join(many)) == [*many[:4], RERUN["CUT"], *many[-5:]]


def test_what_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
