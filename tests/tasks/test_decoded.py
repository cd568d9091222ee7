"""Decoded images in memory: how much they take, when decoding stops, what is said of those that fail."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from nbhd.tasks import decoded as decoded_module
from nbhd.tasks.datasets import ImageTable
from nbhd.tasks.decoded import decode_all, report_failures


class _Solid(ImageTable):
    """As many images of one size as wanted."""

    def __init__(self, rows: int, side: int) -> None:
        self.labels, self.class_names, self.where = np.zeros(rows, np.int64), ["a"], "solid"
        self.side, self.decoded = side, 0

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, row: int) -> bytes:
        raise NotImplementedError

    def name(self, row: int) -> str:
        return f"row {row}"

    def decode(self, row: int) -> Image.Image:
        self.decoded += 1
        return Image.new("RGB", (self.side, self.side), (row % 256, 0, 0))


def test_decoded_images_are_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_module, "BLOCK_BYTES", 1 << 20)
    table = _Solid(400, 150)
    tracemalloc.start()
    try:
        images, _, _ = decode_all(table, lambda image: image)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images.nbytes == 400 * 150 * 150 * 3
    assert peak < 1.4 * images.nbytes
    assert [int(images[row][0, 0, 0]) for row in (0, 17, 399)] == [0, 17, 399 % 256]


def test_decoding_stops_at_the_limit() -> None:
    table = _Solid(1000, 10)
    images, rows, failures = decode_all(table, lambda image: image, limit=3000)
    assert (len(images), len(rows), failures) == (11, 11, [])
    assert table.decoded < 100


def test_image_that_takes_more_memory_than_there_is_fails_alone() -> None:
    def shrink(image: Image.Image) -> Image.Image:
        if image.getpixel((0, 0)) == (1, 0, 0):
            raise MemoryError
        return image

    _, rows, failures = decode_all(_Solid(3, 4), shrink)
    assert (rows.tolist(), failures) == ([0, 2], ["row 1: not enough memory to decode it"])


def test_name_of_a_skipped_image_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report_failures(["\x1b[2Jphoto.jpg: not an image"])
    assert capsys.readouterr().err == "skipped: \\x1b[2Jphoto.jpg: not an image\n"
