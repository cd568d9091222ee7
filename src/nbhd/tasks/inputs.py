"""Which files are meant by what the caller named: files, folders (with everything below them) and glob patterns."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Input:
    """One file to look at.

    Attributes:
        path: as the caller would write it.
        error: why there is nothing to look at (no such file, an empty folder, ...), or None.
        named: whether the caller named this file; False if it was found in a folder.
    """

    path: str
    error: str | None = None
    named: bool = True


def find_inputs(names: Iterable[str | os.PathLike[str]]) -> Iterator[Input]:
    """Every file meant by ``names``, in their order; inside a folder by name, subfolders included.

    A name that exists is taken as it stands, whatever characters it has; otherwise ``*``, ``?``, ``[...]`` and ``**``
    are expanded. In folders, hidden files and folders (a leading dot) are passed over, links are followed, and a
    folder is entered once. Files are not judged here: what is a picture is for ``images.decode_image`` to say.
    Nothing is raised: what cannot be found or listed comes back as an ``Input`` with an ``error``.
    """
    for name in names:
        path = os.fspath(name)
        if not path:
            yield Input(path, "the name is empty; the current folder is '.'")
            continue
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            if glob.has_magic(path):
                yield from _matches(path)
            else:
                yield Input(path, "no such file or folder")
        except (OSError, ValueError) as error:
            yield Input(path, (getattr(error, "strerror", None) or str(error)).lower())
        else:
            yield from _expand(path)


def without_duplicates(inputs: Iterable[Input]) -> tuple[list[Input], int]:
    """The inputs with each file in its first place only, and the number of repetitions left out."""
    seen: set[str] = set()
    kept: list[Input] = []
    repeated = 0
    for item in inputs:
        key = os.path.abspath(item.path)
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        kept.append(item)
    return kept, repeated


def _expand(path: str) -> Iterator[Input]:
    if not os.path.isdir(path):
        yield Input(path)
        return
    empty = True
    for item in _walk(path, set()):
        empty = False
        yield item
    if empty:
        yield Input(path, "no files in this folder")


def _matches(pattern: str) -> Iterator[Input]:
    paths = sorted(glob.glob(pattern, recursive=True))
    if "**" in pattern:  # the files below a matching folder match themselves
        paths = [path for path in paths if not os.path.isdir(path)]
    if not paths:
        yield Input(pattern, "no file matches this pattern")
    for path in paths:
        yield from _expand(path)


def _walk(folder: str, entered: set[tuple[int, int]]) -> Iterator[Input]:
    try:
        status = os.stat(folder)
        # Windows has no inode numbers in some file systems: 0 means unknown.
        if status.st_ino and (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries if not _is_hidden(entry))
    except OSError as error:
        yield Input(folder, f"cannot list this folder: {(error.strerror or str(error)).lower()}", named=False)
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, entered)
        else:
            yield Input(path, named=False)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return True
    if sys.platform != "win32":
        return False
    return bool(entry.stat(follow_symlinks=False).st_file_attributes & stat.FILE_ATTRIBUTE_HIDDEN)
