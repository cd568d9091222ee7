"""The commands are found, described and started; how they end."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

from nbhd import __version__, cli
from nbhd._files import WrongFile
from nbhd.cli import COMMANDS
from nbhd.errors import FileError, RecipeError
from nbhd.tasks.recipes import find_recipe
from tests.commands import nbhd
from tests.processes import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_its_help_has_an_example(name: str) -> None:
    assert callable(getattr(importlib.import_module(f"nbhd.cli.{name}"), name))
    run = nbhd(name, "--help")
    assert run.exit_code == 0
    assert f"\n    nbhd {name}" in run.stdout or f"\n      nbhd {name}" in run.stdout  # lines kept as they are
    assert "\\b" not in run.stdout


def test_help_lists_the_commands() -> None:
    for args in (["--help"], ["-h"], []):
        run = nbhd(*args)
        assert run.exit_code == 0 if args else run.exit_code in (0, 2)  # it depends on the version of click
        for name, line in COMMANDS.items():
            assert f"  {name:<8}  {line}" in run.output


def test_version() -> None:
    run = nbhd("--version")
    assert (run.exit_code, run.stdout) == (0, f"nbhd {__version__}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["classifi"], "No such command 'classifi'. Did you mean 'classify'?"),
        (["classify", "x", "-k", "abc"], "'abc'"),
        (["classify", "x", "--batch-size", "0"], "0"),
        (["classify", "x", "-f", "xml"], "'--format' / '-f': 'xml' is not one of 'table', 'json', 'csv', 'parquet'"),
    ],
)
def test_wrong_calls_are_said_with_the_value(args: list[str], message: str) -> None:
    run = nbhd(*args)
    assert (run.exit_code, run.stdout) == (2, "")
    assert message in run.stderr.splitlines()[-1].partition(": ")[2]


def test_recipes_that_are_named_are_there() -> None:
    """In the help, in the pages, and in the recipes' own comments."""
    texts = {name: nbhd(name, "--help").stdout for name in COMMANDS}
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src/nbhd/recipes").rglob("*.yaml")):
        texts[file.name] = file.read_text(encoding="utf-8")
    named = {(where, name) for where, text in texts.items() for name in re.findall(r"--config[ =]([\w./-]+)", text)}
    named = {(where, name) for where, name in named if not name.endswith(".yaml") and name.islower()}
    assert {"train", "training.md"} <= {where for where, _ in named}
    for _, name in sorted(named):
        find_recipe(name)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RecipeError("optim.lr must be positive"), 2, "nbhd: optim.lr must be positive\n"),
        (FileError("a.jpg: cut short"), 1, "nbhd: a.jpg: cut short\n"),
        (WrongFile("a.jpg: no such file"), 2, "nbhd: a.jpg: no such file\n"),
        (OSError(28, "No space left on device", "out"), 1, "nbhd: out: No space left on device\n"),
        (OSError(12, "Cannot allocate memory"), 1, "nbhd: Cannot allocate memory\n"),
        (KeyboardInterrupt(), 130, "nbhd: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (ValueError("\x1b[31mx"), 1, "nbhd: internal error: ValueError: \\x1b[31mx\n"),
    ],
)
def test_how_a_command_ends(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str) -> None:
    def info() -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("nbhd.cli.info"), "info", info)
    run = nbhd("info")
    assert run.exit_code == status
    assert run.stdout == ""
    assert run.stderr.startswith(message)
    assert "Traceback" not in run.stderr


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nbhd", "info"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("args", [["--help"], ["--version"], ["classify", "--help"], ["recipes", "keys"]])
@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_full_disk_is_said_in_a_line(args: list[str], unbuffered: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | unbuffered
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "nbhd", *args],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (run.returncode, run.stderr) == (1, "nbhd: standard output: No space left on device\n")


def test_debug_lets_errors_before_the_command_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["nbhd", "--debug", "--version"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["nbhd", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
