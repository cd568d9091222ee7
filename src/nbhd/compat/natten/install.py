"""``install()``: ``import natten`` finds nbhd where NATTEN itself is not installed."""

from __future__ import annotations

import sys

from nbhd.compat.natten import _finder
from nbhd.errors import ArgumentError


def install(version: str | None = None) -> bool:
    """Make ``import natten`` find the stand-in for a version, unless NATTEN itself is there.

    Call it before the modules that import natten. It offers ``natten`` and its submodules, the metadata of a
    distribution named natten, and looks after transformers' DiNAT (see the page "Coming from NATTEN").

    Args:
        version: such as ``"0.17.5"`` or ``"0.17"`` (its last release). By default the newest, 0.21.7, or the version
            that is in place already.

    Returns:
        Whether the stand-in is what ``import natten`` finds: False where NATTEN itself is installed.

    Raises:
        ArgumentError: NATTEN had no such version, or ``natten`` has been imported as another one.

    Example:
        >>> install("0.17.5")
        True
        >>> from natten.functional import na2d_qk
    """
    try:
        _finder.resolve(version)
        if _finder.real_natten() is not None:
            return False
        _finder.add(version)
    except ValueError as error:
        text = str(error)
        raise ArgumentError(text[0].upper() + text[1:]) from None
    _tell_transformers()
    return True


def uninstall() -> None:
    """Undo :func:`install`. Modules that imported names from ``natten`` keep them."""
    _finder.remove()
    _tell_transformers()


def _tell_transformers() -> None:
    """Transformers remembers whether natten is there, and its DiNAT binds the functions when it is imported."""
    utils = sys.modules.get("transformers.utils.import_utils")
    forget = getattr(getattr(utils, "is_natten_available", None), "cache_clear", None)
    if forget is not None:
        forget()
    dinat = sys.modules.get(_finder.DINAT)
    if dinat is not None and _finder.installed() is not None:
        from nbhd.compat.natten.dinat import settle

        settle(dinat)
