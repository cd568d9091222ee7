"""Pictures made for tests, the broken and the hostile ones included."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def corners(width: int = 48, height: int = 32) -> Image.Image:
    """Red and green over blue and white: no turn or mirror image of it looks the same."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return Image.fromarray(pixels)


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def distance(image: Image.Image, expected: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 to 255."""
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, np.float64) - np.asarray(expected, np.float64)).mean())


def png(width: int, height: int, depth: int, colour: int, data: bytes | None) -> bytes:
    """A PNG written by hand: ``data`` is its raw rows without filter bytes, or None for no data at all.

    ``colour`` is PNG's: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
    """

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if data is not None:
        row = len(data) // height
        rows = b"".join(b"\0" + data[i * row : (i + 1) * row] for i in range(height))
        out += chunk(b"IDAT", zlib.compress(rows))
    return out + chunk(b"IEND", b"")


def bombs(side: int = 60_000) -> dict[str, bytes]:
    """Small files whose headers promise ``side`` x ``side`` pixels, by format."""
    jpeg = bytearray(encode(noise(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")  # start of frame: marker, length, precision, height, width
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    gif = bytearray(encode(noise(), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encode(noise(), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    return {
        "jpg": bytes(jpeg),
        "png": png(side, side, 8, 2, None),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "ppm": b"P6 %d %d 255\n" % (side, side) + bytes(1000),
        "psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, side, side, 8, 3) + bytes(100),
    }
