"""``natten.utils.varlen``: from lengths of packed sequences to their sums."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nbhd.compat.natten.core.full_attention import varlen_parameters

__all__ = ["generate_varlen_parameters"]


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Any = None,  # noqa: N803
    seqlens_KV: Any = None,  # noqa: N803
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Sums and greatest lengths: ``(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)``.

    Sums are int32 from 0 on, on the device of ``query``. Without lengths: ``(None, None, 0, 0)``.

    Raises:
        ArgumentError: one of the two is missing, they differ in number, or a length is no whole number.
    """
    return varlen_parameters(query, key, value, seqlens_Q, seqlens_KV)
