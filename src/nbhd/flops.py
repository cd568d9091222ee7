"""How many floating point operations the operators make, for `torch.utils.flop_counter.FlopCounterMode`.

As PyTorch counts its own attention: products alone, a multiply-add is two, and causality spares none. A backward makes
five products where a forward makes two, since it makes the scores again.

    nbhd::na_forward       2 * queries * keys * (dim + value_dim), keys being prod(kernel_size)
    nbhd::na_backward      2 * queries * keys * (3 * dim + 2 * value_dim)

PyTorch's counter imports Triton, which `import nbhd` must not: the formulas are given to it when it is there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

Shape = Any


def _na_forward(query: Shape, key: Shape, value: Shape, bias: Shape, kernel_size: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * math.prod(kernel_size) * (query[-1] + value[-1])


def _na_backward(
    d_out: Shape, d_lse: Shape, query: Shape, key: Shape, value: Shape, bias: Shape, out: Shape, lse: Shape,
    kernel_size: list[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * math.prod(query[:-1]) * math.prod(kernel_size) * (3 * query[-1] + 2 * value[-1])


def _scores(query: Shape, key: Shape, bias: Shape, kernel_size: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(query) * math.prod(kernel_size)


def _scores_backward(
    d_scores: Shape, query: Shape, key: Shape, bias: Shape, kernel_size: list[int], *_: Any, **__: Any
) -> int:
    return 4 * math.prod(query) * math.prod(kernel_size)


def _weighted_sum(weights: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weights) * value[-1]


def _weighted_sum_backward(d_out: Shape, weights: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(weights) * value[-1]


def _linear(input: Shape, weight: Shape, bias: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(input) * weight[0]


def _linear_d_weight(d_out: Shape, input: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(input) * d_out[-1]


def _layers(input: Shape, residual: Shape, *others: Any, **__: Any) -> int:
    weights = [weight for weight in others[2:10:2] if weight is not None]
    return 2 * math.prod(input[:-1]) * sum(map(math.prod, weights))


def _layers_backward(d_1: Shape, d_2: Shape, d_3: Shape, input: Shape, *others: Any, **__: Any) -> int:
    """A product for each gradient of a weight that is wanted, and one for each of a layer's input on the way."""
    wants_input, wants_norm, wants = others[-1][0], any(others[-1][1:3]), others[-1][3:]
    hidden, *last = (math.prod(weight) if weight is not None else 0 for weight in others[2:10:2])
    products = sum(size for size, wanted in zip((hidden, *last), wants[::2], strict=True) if wanted)
    if wants_input or wants_norm:
        products += hidden + sum(last)
    elif hidden and any(wants[:2]):
        products += sum(last)
    return 2 * math.prod(input[:-1]) * products


#: By the operators' names, ``nbhd::`` before them.
FORMULAS: dict[str, Callable[..., int]] = {
    "na_forward": _na_forward,
    "na_backward": _na_backward,
    "scores": _scores,
    "scores_backward": _scores_backward,
    "weighted_sum": _weighted_sum,
    "weighted_sum_backward": _weighted_sum_backward,
    "linear": _linear,
    "linear_d_weight": _linear_d_weight,
    "layers": _layers,
    "layers_backward": _layers_backward,
}


def tell_counters() -> None:
    """`give_to_counters`, if somebody watches the dispatcher: called before an operator is."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        give_to_counters()


def give_to_counters() -> None:
    """Let PyTorch's counter know the formulas, if it has been imported, and the counters that are at work already."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    there = {getattr(torch.ops.nbhd, name): FORMULAS[name] for name in FORMULAS if hasattr(torch.ops.nbhd, name)}
    for operator, formula in there.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", {})
        known.update({operator: counter.flop_registry[operator] for operator in there if operator not in known})
