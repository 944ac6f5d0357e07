"""The command line."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from memory3.cli.bank import bank_app
from memory3.cli.bench import bench_app
from memory3.cli.commands import INCOMPLETE, app
from memory3.cli.consolidation import apply, consolidate
from memory3.cli.evaluate import eval_app
from memory3.cli.hierarchy import cost, plan, simulate
from memory3.cli.probe import probe_app
from memory3.cli.train import train
from memory3.spec import Memory3Error

__all__ = ["INCOMPLETE", "app", "main"]

app.command()(train)
app.command()(cost)
app.command()(plan)
app.command()(consolidate)
app.command()(apply)
app.command()(simulate)
app.add_typer(bank_app, name="bank")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(probe_app, name="probe")


def main() -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 1."""
    warnings.showwarning = _warned
    try:
        app()
    except Memory3Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
