"""``natten.functional`` of 0.17: unfused functions heads first, fused ones heads last with ``dilation`` fifth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nbhd.compat.natten.core import fused, knobs
from nbhd.compat.natten.core.signature import Signature, heads_last, named
from nbhd.compat.natten.core.unfused_names import av, plain_av, plain_qk, qk, qkrpb

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]

_ERA = "0.17"
_AXES = (1, 2, 3)

_DOC = """Fused neighborhood attention, ``{layout}``, as NATTEN 0.17 has it: ``dilation`` is the fifth argument.

    Runs on every device in every floating dtype, with the gradient of ``rpb`` (``[heads, 2k - 1, ...]``), and takes a
    ``scale`` of 0.0 as 0.0. Additional tokens are ``[batch, tokens, heads, dim]``.

    Raises:
        ArgumentError: a shape or parameter does not fit (a ``ValueError``).
    """


def _fused(axes: int) -> Callable[..., Tensor]:
    arguments = "query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None, ..."
    signature = Signature(_ERA, f"na{axes}d", f"({arguments}), all {heads_last(axes)}, heads last")

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        knobs.ignore(xformers_kwargs=xformers_kwargs)
        result: Tensor = fused.attend(
            signature,
            axes,
            query,
            key,
            value,
            kernel_size,
            1,
            dilation,
            is_causal,
            scale,
            rpb,
            additional_keys,
            additional_values,
        )
        return result

    return named(na, f"na{axes}d", __name__, _DOC.format(layout=heads_last(axes)))


na1d, na2d, na3d = (_fused(axes) for axes in _AXES)
na1d_qk, na2d_qk, na3d_qk = (qk(_ERA, __name__, axes) for axes in _AXES)
na1d_av, na2d_av, na3d_av = (av(_ERA, __name__, axes) for axes in _AXES)

# Shims in 0.17.0 to 0.17.4, gone in 0.17.5; here they stay.
natten1dqk, natten2dqk, natten3dqk = (plain_qk(_ERA, __name__, axes, f"natten{axes}dqk") for axes in _AXES)
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (qkrpb(_ERA, __name__, axes) for axes in _AXES)
natten1dav, natten2dav, natten3dav = (plain_av(_ERA, __name__, axes, f"natten{axes}dav") for axes in _AXES)
