"""The fused operator as 0.17 and later call it: heads last, with additional tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import dense
from nbhd.compat.natten.core.merging import merge
from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import autocast, check_tensor, or_default
from nbhd.errors import ArgumentError
from nbhd.functional import na1d, na2d, na3d

OPERATORS: dict[int, Any] = {1: na1d, 2: na2d, 3: na3d}


def attend(
    signature: Signature,
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Output, or output and log-sum-exp. A ``scale`` of 0.0 is 0.0: NATTEN takes it for the default."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(signature, name, tensor, axes + 3)
    if (additional_keys is None) != (additional_values is None):
        raise signature.error("`additional_keys` and `additional_values` must be either both Tensors or None.")
    geometry = (kernel_size, or_default(stride, 1), or_default(dilation, 1), or_default(is_causal, False))
    try:
        result = OPERATORS[axes](
            query,
            key,
            value,
            *geometry,
            scale,
            rel_pos_bias=rpb,
            return_lse=return_lse or additional_keys is not None,
            backend=backend,
        )
    except ArgumentError as error:
        raise signature.error(str(error)) from None
    if additional_keys is None or additional_values is None:
        return result
    (query,) = autocast(query)
    more_keys, more_values = _additional(signature, query, key, value, additional_keys, additional_values)
    out, lse = result
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    extra, extra_lse = dense.attend(query.flatten(1, -3), more_keys, more_values, factor, False, with_lse=True)
    assert extra_lse is not None
    merged, merged_lse = merge([out.flatten(1, -3), extra], [lse.flatten(1, -2), extra_lse])
    merged, merged_lse = merged.unflatten(1, query.shape[1:-2]), merged_lse.unflatten(1, query.shape[1:-2])
    return (merged, merged_lse) if return_lse else merged


def _additional(
    signature: Signature, query: Tensor, key: Tensor, value: Tensor, more_keys: Any, more_values: Any
) -> tuple[Tensor, Tensor]:
    """Additional tokens, in the dtype of an active autocast as ``query`` is, and checked against it."""
    found = []
    for name, extra, like in (("additional_keys", more_keys, key), ("additional_values", more_values, value)):
        check_tensor(signature, name, extra, 4)
        batch, heads, dim = like.shape[0], like.shape[-2], like.shape[-1]
        if (extra.shape[0], extra.shape[2], extra.shape[3]) != (batch, heads, dim):
            raise signature.error(
                f"{name} must be [batch, tokens, heads, dim] = [{batch}, tokens, {heads}, {dim}], got "
                f"{tuple(extra.shape)}."
            )
        (cast,) = autocast(extra)
        if cast.dtype != query.dtype or cast.device != query.device:
            raise signature.error(f"{name} is {cast.dtype} on {cast.device}, not {query.dtype} on {query.device}.")
        found.append(cast)
    if more_keys.shape[1] != more_values.shape[1]:
        raise signature.error(
            f"additional_keys has {more_keys.shape[1]} tokens, additional_values {more_values.shape[1]}."
        )
    return found[0], found[1]
