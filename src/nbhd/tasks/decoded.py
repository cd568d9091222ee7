"""Decoded images in memory, so that an epoch costs no decoding."""

from __future__ import annotations

import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from nbhd._text import printable
from nbhd.errors import FileError
from nbhd.tasks.datasets import ImageTable

BLOCK_BYTES = 1 << 26


class DecodedImages:
    """uint8 RGB images of any sizes in a few large blocks, shared with forked loader processes without copies."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._used = 0  # bytes of the last block
        self._places = array("q")  # block, start, X, Y of each image; no objects, whose counters a fork would copy
        self.nbytes = 0

    def append(self, image: np.ndarray) -> None:
        """Copy an ``[X, Y, 3]`` uint8 image behind the others."""
        if not self._blocks or self._used + image.size > self._blocks[-1].size:
            self._blocks.append(np.empty(max(BLOCK_BYTES, image.size), dtype=np.uint8))
            self._used = 0
        self._blocks[-1][self._used : self._used + image.size] = image.reshape(-1)
        self._places.extend((len(self._blocks) - 1, self._used, *image.shape[:2]))
        self._used += image.size
        self.nbytes += image.size

    def __len__(self) -> int:
        return len(self._places) // 4

    def __getitem__(self, row: int) -> np.ndarray:
        """``[X, Y, 3]`` uint8, a view."""
        block, start, x, y = self._places[4 * row : 4 * row + 4]
        return self._blocks[block][start : start + x * y * 3].reshape(x, y, 3)


def decode_all(
    table: ImageTable,
    shrink: Callable[[Image.Image], Image.Image],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DecodedImages, np.ndarray, list[str]]:
    """Decode every image once.

    Args:
        shrink: applied to each image before it is kept.
        limit: stop once the images kept take more bytes than this.
        progress: called with how many of how many are done.

    Returns:
        The images that could be decoded, the rows they stand in, and one message for each that could not. Stopped by
        ``limit``, these are together fewer than the table has rows.
    """

    def one(row: int) -> np.ndarray | str:
        try:
            return np.asarray(shrink(table.decode(row)), dtype=np.uint8)
        except FileError as error:
            return str(error)
        except MemoryError:
            return f"{table.name(row)}: not enough memory to decode it"

    images, rows, failures = DecodedImages(), [], []
    workers = min(8, os.cpu_count() or 1)
    window = 4 * workers  # what waits to be kept is held twice for a moment, so it must not be much
    with ThreadPoolExecutor(max_workers=workers) as pool:
        ahead = deque(pool.submit(one, row) for row in range(min(window, len(table))))
        for row in range(len(table)):
            result = ahead.popleft().result()
            if row + window < len(table):
                ahead.append(pool.submit(one, row + window))
            if isinstance(result, str):
                failures.append(result)
            else:
                images.append(result)
                rows.append(row)
            if limit is not None and images.nbytes > limit:
                for future in ahead:
                    future.cancel()
                break
            if progress is not None and (row % 256 == 255 or row + 1 == len(table)):
                progress(row + 1, len(table))
    return images, np.array(rows, dtype=np.int64), failures


def report_failures(failures: Sequence[str], most: int = 20) -> None:
    """Name the images that were skipped, on standard error; control characters in their names are made visible."""
    for message in failures[:most]:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    if len(failures) > most:
        print(f"skipped: and {len(failures) - most} more", file=sys.stderr)
