"""The fused operator as 0.17 and later call it: heads last, with additional tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nbhd.compat.natten.core.signature import Signature
from nbhd.compat.natten.core.tensors import check_tensor, or_default
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
    geometry = (kernel_size, or_default(stride, 1), or_default(dilation, 1), or_default(is_causal, False))
    try:
        return OPERATORS[axes](
            query,
            key,
            value,
            *geometry,
            scale,
            rel_pos_bias=rpb,
            return_lse=return_lse,
            backend=backend,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
    except ArgumentError as error:
        raise signature.error(str(error)) from None
