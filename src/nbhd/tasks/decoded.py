"""Decoded images in memory, so that an epoch costs no decoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from nbhd.errors import FileError
from nbhd.tasks.datasets import ImageTable


class DecodedImages:
    """uint8 RGB images of any sizes in one block of memory, shared with forked loader processes without copies."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._shapes = np.array([array.shape[:2] for array in arrays], dtype=np.int64).reshape(-1, 2)
        sizes = self._shapes.prod(1) * 3
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._block = np.empty(int(self._starts[-1]), dtype=np.uint8)
        for i, array in enumerate(arrays):
            self._block[self._starts[i] : self._starts[i + 1]] = array.reshape(-1)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def nbytes(self) -> int:
        return self._block.nbytes

    def __getitem__(self, row: int) -> np.ndarray:
        """``[X, Y, 3]`` uint8, a view."""
        return self._block[self._starts[row] : self._starts[row + 1]].reshape(*self._shapes[row], 3)


def decode_all(
    table: ImageTable,
    shrink: Callable[[Image.Image], Image.Image],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DecodedImages, np.ndarray, list[str]]:
    """Decode every image once.

    Args:
        shrink: applied to each image before it is kept.
        progress: called with how many of how many are done.

    Returns:
        The images that could be decoded, the rows they stand in, and one message for each that could not.
    """

    def one(row: int) -> np.ndarray | str:
        try:
            return np.asarray(shrink(table.decode(row)), dtype=np.uint8)
        except FileError as error:
            return str(error)

    arrays, rows, failures = [], [], []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for row, result in enumerate(pool.map(one, range(len(table)))):
            if isinstance(result, str):
                failures.append(result)
            else:
                arrays.append(result)
                rows.append(row)
            if progress is not None and (row % 256 == 255 or row + 1 == len(table)):
                progress(row + 1, len(table))
    return DecodedImages(arrays), np.array(rows, dtype=np.int64), failures


def report_failures(failures: Sequence[str], most: int = 20) -> None:
    """Name the images that were skipped, on standard error."""
    for message in failures[:most]:
        print(f"skipped: {message}", file=sys.stderr)
    if len(failures) > most:
        print(f"skipped: and {len(failures) - most} more", file=sys.stderr)
