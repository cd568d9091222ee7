"""Command lines in this process."""

from __future__ import annotations

import inspect
from typing import Any

from typer.testing import CliRunner

from nbhd import cli


def run(app: Any, *args: object) -> Any:
    """Run a typer application; the result has ``exit_code``, ``stdout``, ``stderr`` and ``exception``."""
    # Before click 8.2 a runner mixed the two streams unless told not to.
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart).invoke(app, [str(arg) for arg in args])


def nbhd(*args: object) -> Any:
    """Run ``nbhd ARGS``."""
    return run(cli.app, *args)
