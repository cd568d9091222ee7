"""What a command says besides its results: notes and a progress bar, on standard error; and where its results go."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from nbhd._files import is_special
from nbhd._text import printable
from nbhd.errors import ArgumentError

T = TypeVar("T")
F = TypeVar("F", bound=StrEnum)

#: The format that an ending of --output says.
BY_SUFFIX = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "table"}

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


def choose_format(format: F | None, output: str | None, formats: type[F]) -> F:
    """The format named, or said by the ending of the output; a table on the screen and in pipes and devices."""
    known = {suffix: formats(name) for suffix, name in BY_SUFFIX.items() if name in list(formats)}
    if format is not None:
        return format
    chosen = known.get(Path(output).suffix.lower()) if output is not None else None
    if chosen is None and (output is None or is_special(output)):
        return formats("table")
    if chosen is None:
        raise ArgumentError(
            f"--output {output}: its ending does not say in which format. Give --format {'|'.join(formats)}"
            f" or an ending of {', '.join(known)}."
        )
    return chosen


def check_output(output: str) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    folder = Path(output).parent
    if os.path.isdir(output):
        raise ArgumentError(f"--output {output}: this is a folder. Name a file in it.")
    if is_special(output):  # written to as it is, so that its folder does not matter
        return
    if not folder.is_dir():
        raise ArgumentError(f"--output {output}: the folder {folder} does not exist. Create it first.")
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"--output {output}: no permission to write in {folder}.")


def same_file(first: str, second: str) -> bool:
    """Whether two names are of one file that is there."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False
