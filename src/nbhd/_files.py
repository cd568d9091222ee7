"""Outputs are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nbhd.errors import FileError, WrongFile

#: A new file, never one that is there, and never through a link.
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)

#: What files of weights are called: checkpoints of the original, and what `nbhd convert` makes a folder of.
WEIGHTS = (".pth", ".pt", ".pyth", ".bin", ".safetensors")


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its place only if the block ends without an error.

    Args:
        path: the file to write. Its folder must exist. An existing file stays as it was until the new one is complete.
        mode: ``"wb"`` or ``"w"`` (UTF-8, no newline translation).

    Raises:
        WrongFile: the folder does not exist, or ``path`` is one.
        FileError: the file cannot be written (no permission, no space).
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}")
    if is_special(path):
        # A pipe or a device cannot be replaced by rename; there is nothing to protect either. Links are not resolved:
        # what /dev/stdout points to may have no path.
        with _named(path), open(path, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
        return
    # A link is followed, so that replacing the file does not replace the link.
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise WrongFile(f"cannot write {path}: the folder {target.parent} does not exist. Create it first.")
    if target.is_dir():
        raise WrongFile(f"cannot write {path}: it is a folder. Name a file.")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    # Named first and created inside the block that removes it: an interrupt may come right behind the creation.
    # File systems limit names in bytes, so the name is cut by bytes.
    start = os.fsencode(target.name)[:64].decode("utf-8", "ignore")
    temporary = str(target.parent / f".{start}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(temporary, _CREATE, 0o600), mode, **text) as stream:  # type: ignore[call-overload]
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # The file was private until now; the result gets the permissions an ordinary open would have given.
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, FileError) and error.filename in (None, temporary):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether this is there and neither a file nor a folder: a pipe, a socket or a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the output in an error of writing to it; a reader that went away is for the caller."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if isinstance(error, FileError) or error.filename not in (None, os.fspath(path)):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON; NaN and infinities are refused because JSON has none."""
    with write_whole(path, "w") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
