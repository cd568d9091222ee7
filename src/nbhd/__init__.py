"""Neighborhood attention for PyTorch: fast on CPUs and GPUs from one wheel, with the NAT vision transformers on top."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from nbhd._version import __version__
from nbhd.errors import ArgumentError, BackendError, NbhdError

if TYPE_CHECKING:
    from nbhd import nn
    from nbhd.functional import apply_attention_weights, attention_scores, attention_weights, na1d, na2d, na3d
    from nbhd.merging import merge_attentions
    from nbhd.optimize import optimize_for_inference
    from nbhd.qkv import split_qkv

__all__ = [
    "ArgumentError",
    "BackendError",
    "NbhdError",
    "__version__",
    "apply_attention_weights",
    "attention_scores",
    "attention_weights",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "nn",
    "optimize_for_inference",
    "split_qkv",
]

_HOMES = {
    "merge_attentions": "merging",
    "nn": "nn",
    "optimize_for_inference": "optimize",
    "split_qkv": "qkv",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nbhd' has no attribute {name!r}")
    home = importlib.import_module("nbhd." + _HOMES.get(name, "functional"))
    globals()[name] = found = home if name == "nn" else getattr(home, name)
    return found


def __dir__() -> list[str]:
    return __all__


# Importing the package registers its operators, so that saved programs that call them load. Only the command line does
# not, because `nbhd --help` should not wait for torch: there they are registered by their first use.
_command = sys.argv[0] if getattr(sys, "argv", None) else ""
if _command != "-m" and os.path.basename(_command).removesuffix(".exe") != "nbhd":
    importlib.import_module("nbhd.nn")
    importlib.import_module("nbhd.flops").give_to_counters()
