"""What stands between two comments of a page is made, not written by hand."""

from __future__ import annotations

from pathlib import Path

from nbhd._files import write_whole
from nbhd.errors import FileError


def replaced(page: Path, begin: str, end: str, content: str) -> str:
    """The text of ``page`` with ``content`` between its comments.

    Raises:
        FileError: the file cannot be read, or does not have both comments, once and in order.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {page}: {error}") from error
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise FileError(f"{page} must have the lines {begin!r} and {end!r} once each, in this order.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{content}{end}{rest.partition(end)[2]}"


def replace(page: Path, begin: str, end: str, content: str) -> None:
    """Write that text, whole or not at all."""
    made = replaced(page, begin, end, content)
    with write_whole(page, "w") as stream:
        stream.write(made)
