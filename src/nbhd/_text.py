"""Text for terminals and files, from names that may hold anything."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters and broken encoding made visible: no file name can command a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def valid_unicode(text: str) -> str:
    r"""File names that are not valid UTF-8 hold lone surrogates, which no file format takes: they become ``\udcxx``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def width(text: str) -> int:
    """Columns the text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def pad(text: str, columns: int) -> str:
    """The text followed by blanks to fill ``columns``; longer text stays as it is."""
    return text + " " * (columns - width(text))
