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

#: What NBHD_CPU_ISA may be.
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline", "neon")

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
    if not output:
        raise ArgumentError("--output must name a file, got ''. Name one, or leave it out.")
    folder = Path(os.path.realpath(output) if os.path.islink(output) else output).parent
    if os.path.isdir(output):
        raise ArgumentError(f"--output {output}: this is a folder. Name a file in it.")
    if is_special(output):  # written to as it is, so that its folder does not matter
        return
    if not folder.is_dir():
        raise ArgumentError(f"--output {output}: the folder {folder} does not exist. Create it first.")
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"--output {output}: no permission to write in {folder}.")


def check_folder(option: str, folder: str) -> None:
    """Refuse what would be the current folder, or a folder of a name that means standard output elsewhere."""
    if folder in ("", "-"):
        raise ArgumentError(
            f"{option} must name a folder, got {folder!r}. The current folder is '.', one called - is './-'."
        )


def warn_of_instruction_set() -> None:
    """Say that NBHD_CPU_ISA leaves attention without the native core: all else that shows it is the time it takes."""
    if not os.environ.get("NBHD_CPU_ISA"):
        return
    from nbhd.backends import cpu

    reason = cpu.why_unusable()
    if reason is not None and "NBHD_CPU_ISA" in reason:
        note(
            f"warning: {reason} Attention on the CPU runs on the plain PyTorch reference, which is slow. Unset it, or "
            f"name one of {', '.join(INSTRUCTION_SETS)} that this processor has."
        )


def same_file(first: str, second: str) -> bool:
    """Whether two names are of one file that is there."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False
