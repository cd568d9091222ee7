"""How large an image may be: the same for pictures that are decoded and for sizes that are asked for."""

from __future__ import annotations

import math
from typing import Any

from nbhd.errors import ArgumentError

#: Twice Pillow's own warning level, 0.5 GB as RGB.
MAX_PIXELS = 178_956_970


def check_pixels(name: str, value: object, height: int, width: int) -> None:
    """Raise `ArgumentError` for an argument ``name`` that asks for larger images than ``MAX_PIXELS``."""
    if height * width > MAX_PIXELS:
        raise ArgumentError(
            f"{name} must be at most {MAX_PIXELS:,} pixels (a side of {math.isqrt(MAX_PIXELS):,} in a square), got "
            f"{_shown(value)}. Use e.g. 224."
        )


def check_image_processor(settings: Any) -> None:
    """Raise `ArgumentError` unless the sizes of an image processor are pixels, and not too many.

    Args:
        settings: the processor, or its settings as a dict.
    """
    for name in ("size", "crop_size"):
        size: Any = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
        if hasattr(size, "get"):
            # What else may be in there (longest_edge, ...) is a limit on images, none that they are brought to.
            size = [size.get(side) for side in ("height", "width", "shortest_edge")]
        sides = [side for side in (size if isinstance(size, (list, tuple)) else [size]) if side is not None]
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ArgumentError(f"{name} must be in pixels of at least 1, got {_shown(sides)}. Use e.g. 224.")
        if sides:
            check_pixels(name, " x ".join(map(_shown, sides)), sides[0], sides[-1])


def _shown(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python does not spell out numbers of more than 4300 digits
        return "a number of thousands of digits"
    return f"{text[:40]}..." if len(text) > 40 else text
