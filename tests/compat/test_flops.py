"""``natten.flops``, which counts with fvcore."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbhd.compat.natten import v0_14, v0_17
from nbhd.compat.natten.core import flops
from nbhd.compat.natten.v0_17 import flops as counts
from nbhd.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


class Pair(nn.Module):
    def forward(self, q):
        scores = v0_14.functional.natten2dqk(q, q, 3, 1)
        return v0_14.functional.natten2dav(scores.softmax(-1), q, 3, 1)


class Fused(nn.Module):
    def forward(self, q):
        return v0_17.functional.na2d(q, q, q, 3)


def test_counts_of_both_forms_are_scores_times_dim_twice():
    pytest.importorskip("fvcore", reason="natten.flops counts with fvcore, which is not installed")
    scores = 2 * 6 * 7 * 9
    assert flops.get_flops(Pair(), torch.randn(1, 2, 6, 7, 4), disable_warnings=True) == pytest.approx(
        2 * scores * 4, 0.05
    )
    assert flops.get_flops(Fused(), torch.randn(1, 6, 7, 2, 4), disable_warnings=True) == pytest.approx(
        2 * scores * 4, 0.05
    )


def test_handles_count_from_shapes():
    """What callers hand to fvcore under names of their own."""

    class Value:
        def __init__(self, *shape):
            self.shape = shape

        def type(self):
            return self

        def sizes(self):
            return list(self.shape)

    query, scores = Value(1, 2, 6, 7, 4), Value(1, 2, 6, 7, 9)
    assert flops.qk_2d_rpb_flop([query, query], [scores]) == 2 * 6 * 7 * 9 * 4
    assert flops.qk_2d_rpb_flop([query, query, Value(2, 5, 5)], [scores]) == 2 * 6 * 7 * 9 * 5
    assert flops.av_2d_flop([scores, query], [query]) == 2 * 6 * 7 * 9 * 4
    counter = object()
    assert flops.add_natten_handle(counter) is counter


@pytest.mark.parametrize("is_heads_last", [True, False])
@pytest.mark.parametrize("return_macs", [True, False])
def test_counts_from_shapes(is_heads_last, return_macs):
    shape = (2, 6, 7, 3, 8) if is_heads_last else (2, 3, 6, 7, 8)
    rest = ((3, 5), 1, False, is_heads_last, return_macs)
    half = 2 * 6 * 7 * 3 * 8 * 15 * (1 if return_macs else 2)
    assert counts.na_qk_flop_count(shape, shape, *rest) == half
    assert counts.na_av_flop_count((*shape[:-1], 15), shape, *rest) == half
    assert counts.fna_flop_count(torch.Size(shape), shape, shape, *rest) == 2 * half
    with pytest.raises(ArgumentError, match="Expected identical QKV shapes"):
        counts.fna_flop_count(shape, shape, shape[::-1], *rest)
    with pytest.raises(ArgumentError, match="one to three spatial axes"):
        counts.na_qk_flop_count(shape[:3], shape[:3], *rest)
