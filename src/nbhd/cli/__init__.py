"""The command line: ``nbhd COMMAND``.

Each command is a function of the same name in a module of its own, which is imported when the command is called or
its help is read, so that ``nbhd --help`` does not wait for torch. Results go to standard output, everything else to
standard error. Exit status: 0 all went well, 1 some inputs failed (each is named) or a file could not be written, 2 a
wrong call, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nbhd._version import __version__
from nbhd.cli._errors import reporting, told_to_end

#: The commands, in the order of the help, with their line in it. A command is listed when its module is there.
COMMANDS = {
    "classify": "Name what is in pictures.",
    "train": "Train an image classifier.",
    "evaluate": "Measure an image classifier on labelled pictures.",
    "recipes": "List the training recipes.",
    "convert": "Turn an original NAT checkpoint into one for transformers.",
    "export": "Write a model as ONNX, for torch.export, or compiled.",
    "info": "Say what nbhd can use on this machine.",
}

_ABOUT = r"""Neighborhood attention for PyTorch, and the vision transformers made of it.

\b
Example:
  nbhd classify photos/ --top-k 3
"""

_NO_MARKUP: Any = None  # plain help: it starts faster and keeps its shape in a pipe


def _help(text: str | None) -> str:
    """A docstring as help: paragraphs are wrapped, but not those under a line with a backslash and b."""
    return inspect.cleandoc(text or "").replace("\\b", "\b")


class _Commands(TyperGroup):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if importlib.util.find_spec(f"nbhd.cli.{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        function = getattr(importlib.import_module(f"nbhd.cli.{cmd_name}"), cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=_NO_MARKUP, pretty_exceptions_enable=False)
        single.command(cmd_name, help=_help(function.__doc__))(function)
        return typer.main.get_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
        if near and near[0] != args[0]:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: Any) -> Any:
        with reporting(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=_NO_MARKUP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nbhd {__version__}")
        raise typer.Exit


@app.callback(help=_help(_ABOUT))
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


def main() -> None:
    """The console script."""
    # A closed stream (`nbhd ... >&-`) is None in Python; what goes there is lost, which is what was asked for.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (for the process's life)
    try:
        # Help and version are written before a command begins.
        with reporting(debug="--debug" in sys.argv[1:]), told_to_end():
            app(prog_name="nbhd")
    except typer.Exit as end:
        sys.exit(end.exit_code)
