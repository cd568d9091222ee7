"""Any picture, as bytes or a file, to an upright 8-bit RGB image.

What is a picture is decided by its bytes, never by its name. Everything that cannot be shown as a picture ends in one
exception, ``ImageError``, whose ``reason`` is fit for a report; no input blocks (a pipe is not opened for waiting),
runs a program or allocates for more than ``MAX_PIXELS``.

Needs Pillow and NumPy alone; safe in threads and in the workers of a data loader.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from nbhd._sizes import MAX_PIXELS
from nbhd.errors import ArgumentError, FileError

#: Larger files are not opened, because some decoders read the whole file first.
MAX_FILE_BYTES = 1 << 30

#: From this many pixels on, one picture is decoded at a time, so that threads full of huge pictures do not fill the
#: memory.
LARGE_PIXELS = 1 << 25

#: Formats that are told by a real signature and decoded in bounded time. Left out: those without one (TGA, PCX, ...),
#: so that arbitrary bytes are not taken for a picture; EPS, which would run Ghostscript on them; and DDS and QOI,
#: decoded by loops in Python, where a short file can keep older Pillow busy for minutes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "ICNS", "PSD", "SGI")

#: Colour behind transparent pixels.
BACKGROUND = (255, 255, 255)

_large = threading.Lock()


def _new_lock() -> None:
    global _large
    _large = threading.Lock()


# A fork while another thread holds the lock would leave it locked in the child for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


#: The bytes of a file, or its path.
Source: TypeAlias = "bytes | bytearray | memoryview | str | os.PathLike[str]"


class ImageError(FileError):
    """A picture cannot be decoded.

    Attributes:
        reason: why, without the name of the file.
        name: the file, or None for bytes.
    """

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(reason if name is None else f"{name}: {reason}")
        self.reason = reason
        self.name = name


def decode_image(source: Source, min_size: int | None = None) -> Image.Image:
    """Decode a picture to an upright 8-bit RGB image.

    EXIF orientation is applied. CMYK and Lab become RGB (JPEG's inverted CMYK included); 16-bit greyscale is scaled,
    not clipped; transparent pixels are laid on ``BACKGROUND``; of an animation the first frame is taken. Colour
    profiles are left alone.

    Args:
        source: the bytes of a file, or its path. min_size: if given, a picture may come back smaller by a whole
        factor, as long as its shorter side keeps at least this
            many pixels. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster.

    Returns:
        A new ``RGB`` image that does not depend on the file any more.

    Raises:
        ImageError: not there, not readable, not a picture, damaged, cut short, or more than ``MAX_PIXELS`` pixels.
    """
    name = None if isinstance(source, (bytes, bytearray, memoryview)) else os.fspath(source)
    if min_size is not None and min_size < 1:
        raise ArgumentError(f"min_size must be at least 1, got {min_size}.")
    try:
        with _stream(source) as stream, _identify(stream) as image, _turn(image):
            return _upright_rgb(image, min_size)
    except ImageError as error:
        raise ImageError(error.reason, name) from error.__cause__
    except MemoryError as error:
        raise ImageError("not enough memory to decode it", name) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_large(str(error)), name) from error
    except OSError as error:
        raise ImageError(_os_reason(error, name), name) from error
    except Exception as error:  # decoders raise anything on hostile bytes: struct.error, IndexError, zlib.error, ...
        raise ImageError(f"damaged or cut short ({_first_line(error)})", name) from error


def is_image(source: Source) -> bool:
    """Whether the bytes begin as a picture does; nothing is decoded and nothing raised."""
    try:
        with _stream(source) as stream, _identify(stream):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True
    except Exception:
        return False


def readable_formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow has a decoder for."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _stream(source: Source) -> Iterator[IO[bytes]]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise ImageError("no bytes")
        yield io.BytesIO(source)
        return
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(os.open(source, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a file but a pipe, socket or device")
        if status.st_size == 0:
            raise ImageError("empty file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"too large: {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        yield stream


def _identify(stream: IO[bytes]) -> Image.Image:
    """The picture with its header read and nothing decoded."""
    formats = readable_formats()
    try:
        image = Image.open(stream, formats=formats)
    except UnidentifiedImageError as error:
        stream.seek(0)
        head = stream.read(16)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            raise ImageError("HEIC/HEIF pictures are not read; convert it to JPEG or PNG") from error
        if any(accept is not None and accept(head) is True for _, accept in (Image.OPEN[name] for name in formats)):
            raise ImageError("damaged or cut short (its header cannot be read)") from error
        raise ImageError("not an image, or not in a format that is read here") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise ImageError(f"too large: {size} pixels, at most {MAX_PIXELS:,} are decoded")
    return image


def _turn(image: Image.Image) -> contextlib.AbstractContextManager[object]:
    """What a picture has to wait for before it is decoded."""
    return _large if image.width * image.height >= LARGE_PIXELS else contextlib.nullcontext()


def _upright_rgb(image: Image.Image, min_size: int | None) -> Image.Image:
    if min_size is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (min_size, min_size))  # type: ignore[arg-type]
    image.load()
    orientation = _orientation(image)
    rgb = _rgb(image)
    if min_size is not None and min(rgb.size) >= 2 * min_size:
        rgb = rgb.reduce(min(rgb.size) // min_size)
    return rgb if orientation is None else rgb.transpose(orientation)


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The EXIF orientation still to be applied. A damaged EXIF block counts as none: the pixels are good."""
    try:
        return _TRANSPOSE.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or (mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        if mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    if mode.startswith("I;16"):
        return _grey((np.asarray(image).astype(np.uint32) + 128) // 257)
    if mode in ("I", "F"):
        return _grey(_to_eight_bits(np.asarray(image), image))
    if mode == "LAB":
        return _lab_to_rgb(image)
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _to_eight_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Whole or real greyscale numbers of more than 8 bits, scaled to 0..255.

    Where the format fixes what white is (16-bit PNG, PPM and JPEG 2000 opened as 32 bits; reals within 0..1) that is
    used; elsewhere the darkest value becomes black and the brightest white.
    """
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if high == low:
        return np.zeros(values.shape)
    scaled: np.ndarray = np.rint((values - low) * (255.0 / (high - low)))
    return scaled


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert rgb is not None
    return rgb


def _os_reason(error: OSError, name: str | None) -> str:
    if error.errno == errno.ENOENT:
        if name is not None and os.path.islink(name):
            return f"broken link to {os.readlink(name)}"
        return "no such file"
    if error.errno is None:  # raised by a decoder, not by the system
        text = _first_line(error)
        return f"cut short ({text})" if "truncated" in text else f"damaged or cut short ({text})"
    if error.errno == errno.EISDIR or (name is not None and os.path.isdir(name)):
        return "is a folder"
    return (error.strerror or str(error)).lower()


def _too_large(text: str) -> str:
    pixels = re.search(r"\((\d+) pixels\)", text)
    size = f"{int(pixels[1]):,}" if pixels else "too many"
    return f"too large: {size} pixels, at most {MAX_PIXELS:,} are decoded"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
