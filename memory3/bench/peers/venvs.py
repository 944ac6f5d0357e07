"""Which interpreter each peer runs in, and how a venv of its own is made: `HOME/PEER`, by `python -m venv` and pip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from memory3.spec import Memory3Error, SpecError

HOME = Path("build/peers")
"""Where `--install` puts venvs."""
REQUIRED = {
    "transformers": ("torch", "transformers", "safetensors"),
    "llama.cpp": ("llama-cpp-python", "gguf"),
    "kvpress": ("torch", "kvpress"),
}
"""What pip is asked for, for each peer."""


class PeerError(Memory3Error):
    """A peer that cannot run, with the reason in one sentence."""


def given(words: Sequence[str]) -> dict[str, Path]:
    """Folders of venvs by peer, from `NAME=FOLDER`; `SpecError` where one is something else."""
    found = {}
    for word in words:
        name, _, folder = word.partition("=")
        if name not in REQUIRED or not folder:
            raise SpecError(f"found --venv {word}, expected NAME=FOLDER with a name of {', '.join(REQUIRED)}")
        found[name] = Path(folder)
    return found


def python_of(name: str, venvs: Mapping[str, Path], home: Path = HOME) -> Path:
    """The interpreter of a peer: of the venv that was given, of the one in `home`, or for transformers this very one.

    Raises:
        PeerError: there is none.
    """
    python = _python(venvs.get(name, home / name))
    if python.is_file():
        return python
    if name in venvs:
        raise PeerError(f"found no {python}, expected a venv there: give another by --venv {name}=FOLDER")
    if name == "transformers":
        return Path(sys.executable)
    raise PeerError(
        f"not installed: found no {python}; make it with `memory3 bench peers --install`, or give --venv {name}=FOLDER"
    )


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def commands(name: str, folder: Path, constraints: Path) -> list[list[str]]:
    """What makes the venv of a peer: the venv itself where there is none, then its packages."""
    python = _python(folder)
    make = [] if python.is_file() else [[sys.executable, "-m", "venv", str(folder)]]
    return [*make, [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *REQUIRED[name]]]


def install(name: str, home: Path = HOME) -> None:
    """Make the venv of a peer, with the torch of this interpreter and no other: one is large, and two would differ in speed.

    Raises:
        PeerError: a step failed; what it said last is the reason.
    """
    from importlib.metadata import version

    with TemporaryDirectory(prefix="memory3-peers-") as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n")
        for command in commands(name, home / name, constraints):
            print(" ".join(command), file=sys.stderr)
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise PeerError(f"could not be installed: {last_line(made.stderr)}")


def last_line(text: str) -> str:
    """The last line that says anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
