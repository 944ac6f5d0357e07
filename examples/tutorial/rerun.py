"""Run the commands of a page in order, and put what they print into the page in place of what stands there.

    python examples/tutorial/rerun.py docs/tutorial.md /tmp/tutorial

A command is a line that begins with `$ ` in a block that is fenced as `console`; what follows up to the next command, or
the end of the block, is what it prints. The folder must be new: the tutorial begins with nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.S | re.M)
MOST_LINES, FIRST, LAST = 12, 4, 5
"""Longer outputs show so many lines of their beginning and end."""
WIDTH = 160
CUT = "…"
"""Stands for what is left out, of a line or of lines."""


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the lines that the page says it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in BLOCK.findall(page):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def shortened(printed: str) -> list[str]:
    """Lines as a page shows them."""
    lines = [line if len(line) <= WIDTH else f"{line[: WIDTH - 1].rstrip()}{CUT}" for line in printed.rstrip().splitlines()]
    return lines if len(lines) <= MOST_LINES else [*lines[:FIRST], CUT, *lines[-LAST:]]


def filled(page: str, run: Callable[[str], str]) -> str:
    """The page with its commands' outputs replaced by what `run` says of each command; prose stays as it is."""

    def of(block: re.Match[str]) -> str:
        there = [line[2:] for line in block[0].splitlines() if line.startswith("$ ")]
        return "".join("\n".join([f"$ {command}", *shortened(run(command))]) + "\n" for command in there)

    return BLOCK.sub(of, page)


def main(page: str, folder: str) -> None:
    """Copy `world.py` into the folder, run the commands there, and write the page."""
    path, here = Path(page), Path(folder)
    here.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("world.py"), here)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(command: str) -> str:
        print(f"$ {command}", flush=True)
        done = subprocess.run(command, shell=True, cwd=here, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, end="", flush=True)
        return done.stdout

    path.write_text(filled(path.read_text("utf-8"), run), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
