"""Checks and casts the functions of several eras share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core.signature import Signature, Unsupported
from nbhd.functional import _autocast


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of an active autocast, float64 excepted. NATTEN up to 0.17 casts to float16 always."""
    return _autocast(*tensors)


def check_tensor(signature: Signature, name: str, tensor: Any, rank: int) -> None:
    """Refuse what is no dense tensor with ``rank`` axes."""
    if not isinstance(tensor, Tensor):
        raise signature.error(f"Got {type(tensor).__name__} as {name}.")
    if tensor.is_sparse:
        raise Unsupported(f"{signature.name}: NATTEN does not support sparse tensors.")
    if tensor.is_nested:
        raise Unsupported(f"{signature.name}: NATTEN does not support nested tensors.")
    if tensor.ndim != rank:
        raise signature.error(f"Got {name} with {tensor.ndim} axes: {tuple(tensor.shape)}.")


def per_axis(given: Any, axes: int) -> tuple[Any, ...]:
    """One entry an axis."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(given)
    return (given,) * axes


def or_default(given: Any, default: Any) -> Any:
    """None means the default in NATTEN's signatures."""
    return default if given is None else given
