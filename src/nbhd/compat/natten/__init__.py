"""NATTEN's names over nbhd, in the semantics of each of its eras.

    v0_14   0.14.5, 0.14.6 (``v0_14_4`` up to 0.14.4)     unfused, heads first
    v0_15   0.15                                          the same, three axes, additional tokens
    v0_17   0.17                                          and fused, heads last, ``dilation`` fifth
    v0_20   0.20                                          fused, ``stride`` fifth
    v0_21   0.21.5 to 0.21.7 (``v0_21_1`` up to 0.21.1)   and log-sum-exps, packed sequences

Either import an era by name, ``from nbhd.compat.natten import v0_17 as natten``, or let :func:`install` put one where
``import natten`` finds it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbhd.compat.natten.install import install, uninstall

if TYPE_CHECKING:
    from nbhd.compat.natten import v0_14, v0_14_4, v0_15, v0_17, v0_20, v0_21, v0_21_1

_ERAS = ("v0_14", "v0_14_4", "v0_15", "v0_17", "v0_20", "v0_21", "v0_21_1")

__all__ = ["install", "uninstall", "v0_14", "v0_14_4", "v0_15", "v0_17", "v0_20", "v0_21", "v0_21_1"]


def __getattr__(name: str) -> Any:
    if name in _ERAS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
