"""A peer as a process: its worker runs in the peer's interpreter and is asked one thing at a time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from memory3.bench.peers.venvs import PeerError, last_line

HERE = Path(__file__).parent
WORKER, EXPORT = HERE / "worker.py", HERE / "gguf_export.py"


class Process:
    """A running worker; the protocol is told in `worker.py`.

    Args:
        name: of the peer.
        python: interpreter that has it.
        setup: what is loaded, and where.

    Attributes:
        version: of the peer and what it stands on.

    Raises:
        PeerError: the peer cannot run, with what it said; later calls raise it too.
    """

    def __init__(self, name: str, python: Path, setup: Mapping[str, Any]) -> None:
        self.name, self._errors = name, TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        try:
            self._process = subprocess.Popen(
                [str(python), str(WORKER), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=_environment(),
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"its interpreter {python} does not start: {error.strerror}") from None
        try:
            self.version = str(self.ask(setup)["version"])
        except PeerError:
            self.close()
            raise

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """One line to the worker, and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"it ended without an answer: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """Nothing more is asked; the worker ends by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return last_line(self._errors.read())


def export_gguf(python: Path, folder: Path, file: Path) -> None:
    """Write the model of a folder as GGUF by the `gguf` package of that interpreter; `PeerError` where it cannot be."""
    done = subprocess.run(
        [str(python), str(EXPORT), str(folder), str(file)], capture_output=True, text=True, env=_environment()
    )
    if done.returncode:
        raise PeerError(f"its GGUF file cannot be written: {last_line(done.stderr).removeprefix('ValueError: ')}")


def _environment() -> dict[str, str]:
    """Ours without what would lend our packages to another interpreter."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
