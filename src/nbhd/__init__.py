"""Neighborhood attention for PyTorch: fast on CPUs and GPUs from one wheel, with the NAT vision transformers on top."""

import importlib
from typing import TYPE_CHECKING, Any

from nbhd._version import __version__
from nbhd.errors import NbhdError

if TYPE_CHECKING:
    from nbhd import nn
    from nbhd.functional import apply_attention_weights, attention_weights, na1d, na2d, na3d

__all__ = [
    "NbhdError",
    "__version__",
    "apply_attention_weights",
    "attention_weights",
    "na1d",
    "na2d",
    "na3d",
    "nn",
]


def __getattr__(name: str) -> Any:
    # torch is imported by the first use of a public name, so that `nbhd --help` does not wait for it.
    if name == "nn":
        return importlib.import_module("nbhd.nn")
    if name in __all__:
        return getattr(importlib.import_module("nbhd.functional"), name)
    raise AttributeError(f"module 'nbhd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
