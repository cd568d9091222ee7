"""What a command says besides its results: notes and a progress bar, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from nbhd._text import printable

T = TypeVar("T")

#: A progress bar appears when the work has gone on for this long.
PROGRESS_AFTER_S = 1.0


def note(text: str) -> None:
    """A line for the person at the terminal. Control characters in it (file names may have any) are made visible."""
    line = f"nbhd: {printable(text)}\n"
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding))
        sys.stderr.flush()


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a progress bar on standard error if that is a terminal and the work is long."""
    if not sys.stderr.isatty():
        yield from items
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    start = time.monotonic()
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # results go where they were sent
    )
    task = bar.add_task(what, total=total)
    shown = False
    try:
        for done, item in enumerate(items, 1):
            if not shown and done < total and time.monotonic() - start > PROGRESS_AFTER_S:
                bar.start()
                shown = True
            bar.update(task, completed=done)
            yield item
    finally:
        if shown:
            bar.stop()
