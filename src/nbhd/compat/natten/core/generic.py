"""``neighborhood_attention_generic``, ``na1d``, ``na2d`` and ``na3d`` of 0.20 and later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import fused, knobs
from nbhd.compat.natten.core.signature import Signature, heads_last, named
from nbhd.compat.natten.core.tensors import check_tensor

_DOC = """Neighborhood attention, ``{layout}``, as NATTEN {era} has it: ``stride`` before ``dilation``.

    A ``scale`` of 0.0 is taken as 0.0, the log-sum-exp has its gradient, and inputs may share heads (GQA, MQA). Extra
    tokens, ``[batch, tokens, heads, dim]``, are attended to by every query. Tile shapes, schedules and NATTEN's backend
    names are accepted and ignored, with one warning each.

    Returns:
        Output, or with ``return_lse`` output and log-sum-exp ``[batch, *spatial, heads]``.

    Raises:
        ArgumentError: a shape or parameter does not fit (a ``ValueError``).
    """


def generic(era: str, module: str, axes: int | None = None) -> Callable[..., Any]:
    """The function of one era: for one number of axes, or for any."""
    name = "neighborhood_attention_generic" if axes is None else f"na{axes}d"
    arguments = "query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None"

    def neighborhood_attention_generic(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        *,
        try_fuse_additional_kv: bool = False,
    ) -> Any:
        found = axes
        if found is None:
            rank = query.ndim if isinstance(query, Tensor) else 0
            if rank not in (4, 5, 6):
                check_tensor(signatures[2], "query", query, 5)
            found = rank - 3
        knobs.check_schedule(kernel_schedule)
        knobs.ignore(
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            backward_q_tile_shape=backward_q_tile_shape,
            backward_kv_tile_shape=backward_kv_tile_shape,
            backward_kv_splits=backward_kv_splits,
            backward_use_pt_reduction=backward_use_pt_reduction,
            run_persistent_kernel=run_persistent_kernel,
            kernel_schedule=kernel_schedule,
            torch_compile=torch_compile,
            try_fuse_additional_kv=try_fuse_additional_kv,
        )
        if attention_kwargs:
            knobs.ignored("attention_kwargs", "additional tokens need no kernel of their own")
        return fused.attend(
            signatures[found],
            found,
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            None,
            additional_keys,
            additional_values,
            return_lse,
            knobs.backend_for(backend, "fna"),
        )

    signatures = {n: Signature(era, name, f"({arguments}, ...), all {heads_last(n)}, heads last") for n in (1, 2, 3)}
    layout = heads_last(axes) if axes else "[batch, *spatial, heads, dim]"
    function: Callable[..., Any] = neighborhood_attention_generic
    parameters = list(inspect.signature(function).parameters.values())
    if not era.startswith("0.20"):  # the one knob that only 0.20 has
        setattr(function, "__signature__", inspect.Signature(parameters[:-1]))  # noqa: B010
    return named(function, name, module, _DOC.format(layout=layout, era=era))
