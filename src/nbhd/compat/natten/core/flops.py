"""``natten.flops``: counts for fvcore's ``FlopCountAnalysis``. A multiply-add is one, as there."""

from __future__ import annotations

import math
from typing import Any

__all__ = [
    "add_natten_handle",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "get_flops",
    "qk_1d_rpb_flop",
    "qk_2d_rpb_flop",
    "qk_3d_rpb_flop",
]


def _sizes(value: Any) -> list[int]:
    return list(value.type().sizes())


def qk_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Of scores: ``dim`` for each, and one for the bias if there is a third input."""
    return math.prod(_sizes(outputs[0])) * (_sizes(inputs[0])[-1] + (len(inputs) > 2))


def av_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """Of weights times values."""
    return math.prod(_sizes(inputs[0])) * _sizes(inputs[1])[-1]


qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = qk_flop
av_1d_flop = av_2d_flop = av_3d_flop = av_flop


def add_natten_handle(flop_ctr: Any) -> Any:
    """The counter as it is: recorded programs call ordinary PyTorch operations, which fvcore knows."""
    return flop_ctr


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of ``model(input)``. Needs fvcore.

    Raises:
        ImportError: fvcore is not installed.
    """
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False)
    return int(counter.total())
