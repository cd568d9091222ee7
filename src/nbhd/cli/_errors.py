"""How a command ends: an exit status and, if something went wrong, one line that says what."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

from nbhd.cli._console import note
from nbhd.errors import FileError, NbhdError, WrongFile

SOME_INPUTS_FAILED = 1
WRONG_CALL = 2
INTERRUPTED = 130
STDOUT = "standard output"
BROKEN_PIPE = 141  # as a shell reports a program ended by SIGPIPE

#: What a command says that was told to end, by the signal; Windows has no SIGHUP.
ENDINGS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}

#: A terminal that is closed sends SIGHUP more than once, which must not cut short the removal of files.
ONE_SIGNAL_S = 5.0


class _Told(BaseException):
    """A signal told the process to end. As with an interrupt, no `except Exception` may take it for a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.said = ENDINGS[name]
        self.status = 128 + getattr(signal, name)  # as a shell reports it


_handled: list[int] = []  # signals that raise


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a block by an exception, so that files that are not whole are removed.

    A signal that is ignored (SIGHUP under nohup) or has a handler stays as it is. Only the main thread may set them.
    """
    last = -ONE_SIGNAL_S

    def end(number: int, _: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= ONE_SIGNAL_S:
            raise _Told(signal.Signals(number).name)

    is_main = threading.current_thread() is threading.main_thread()
    try:
        if is_main:
            for number in (getattr(signal, name, None) for name in ENDINGS):
                if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                    _handled.append(number)
                    signal.signal(number, end)
        yield
    finally:
        if is_main:
            end_at_once()


def end_at_once() -> None:
    """Let SIGTERM and SIGHUP end the process as if there were no `told_to_end`."""
    while _handled:
        signal.signal(_handled[-1], signal.SIG_DFL)
        _handled.pop()


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn exceptions into a line on standard error and an exit status; with ``debug`` let them through."""
    try:
        with _stdout_named():
            yield
            # Buffered results meet a full disk or a closed pipe here, where it can be said, and not at interpreter
            # exit.
            sys.stdout.flush()
    except (KeyboardInterrupt, _Told) as error:
        # After one between the start of a `with` and its block, only the traceback's frames hold what began.
        # Let go, it ends as it should: files that are not whole are removed.
        traceback.clear_frames(error.__traceback__)
        if debug and isinstance(error, KeyboardInterrupt):
            raise
        said, status = (error.said, error.status) if isinstance(error, _Told) else ("interrupted", INTERRUPTED)
        note(said)
        raise typer.Exit(status) from None
    except BrokenPipeError:
        _silence_stdout()
        raise typer.Exit(BROKEN_PIPE) from None
    except NbhdError as error:
        if debug:
            raise
        note(str(error))
        failed = isinstance(error, FileError) and not isinstance(error, WrongFile)
        raise typer.Exit(SOME_INPUTS_FAILED if failed else WRONG_CALL) from None
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
            _say_the_value(error)
            raise
        note(f"internal error: {type(error).__name__}: {error}")
        note("this is a fault of nbhd; `nbhd --debug ...` prints the traceback, please report it")
        raise typer.Exit(SOME_INPUTS_FAILED) from None


def _say_the_value(error: Any) -> None:
    """Put the value of an option into an error of typer's that has it from pydantic and leaves it out."""
    cause = error.__cause__
    if not (hasattr(error, "param") and hasattr(error, "message") and hasattr(cause, "errors")):
        return
    value = next((each.get("input") for each in cause.errors()), None)
    message = error.message.removeprefix("Value error, ").rstrip(".")
    error.message = message if repr(value) in message else f"{message}, got {value!r}"


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
