"""How a command ends: an exit status and, if something went wrong, one line that says what."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

from nbhd.cli._console import note
from nbhd.errors import FileError, NbhdError

SOME_INPUTS_FAILED = 1
WRONG_CALL = 2
INTERRUPTED = 130
STDOUT = "standard output"
BROKEN_PIPE = 141  # as a shell reports a program ended by SIGPIPE


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn exceptions into a line on standard error and an exit status; with ``debug`` let them through."""
    try:
        with _stdout_named():
            yield
            # Buffered results meet a full disk or a closed pipe here, where it can be said, and not at interpreter
            # exit.
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        # After an interrupt between the start of a `with` and its block, only the traceback's frames hold what began.
        # Let go, it ends as it should: files that are not whole are removed.
        traceback.clear_frames(error.__traceback__)
        if debug:
            raise
        note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _silence_stdout()
        raise typer.Exit(BROKEN_PIPE) from None
    except FileError as error:
        if debug:
            raise
        note(str(error))
        raise typer.Exit(SOME_INPUTS_FAILED) from None
    except NbhdError as error:
        if debug:
            raise
        note(str(error))
        raise typer.Exit(WRONG_CALL) from None
    except OSError as error:
        if debug:
            raise
        if error.filename == STDOUT:
            _silence_stdout()
        note(f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error))
        raise typer.Exit(SOME_INPUTS_FAILED) from None
    except Exception as error:
        # Ways to end that are the command line's own (a wrong option, an exit status) pass.
        if debug or isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code"):
            raise
        note(f"internal error: {type(error).__name__}: {error}")
        note("this is a fault of nbhd; `nbhd --debug ...` prints the traceback, please report it")
        raise typer.Exit(SOME_INPUTS_FAILED) from None


@contextlib.contextmanager
def _stdout_named() -> Iterator[None]:
    """Put the name of standard output into the errors of writing to it, which have none of their own."""

    def named(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return method(*args)
            except OSError as error:
                error.filename = STDOUT
                raise

        return call

    stream: Any = sys.stdout
    if "write" in vars(stream):  # further out already
        yield
        return
    stream.write, stream.flush = named(stream.write), named(stream.flush)
    try:
        yield
    finally:
        del stream.write, stream.flush


def _silence_stdout() -> None:
    """Point standard output at nothing, so that what is still buffered does not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
