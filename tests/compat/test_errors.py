"""A call that fits no rule of its era names the era, the function and what it takes."""

from __future__ import annotations

import pytest
import torch

from nbhd.compat.natten import v0_14, v0_14_4, v0_15, v0_17, v0_21
from nbhd.errors import ArgumentError

Q = torch.randn(1, 2, 9, 8, 4)  # heads first
LAST = Q.movedim(1, -2)  # heads last
BIAS = torch.zeros(2, 5, 5)

WRONG = {
    "heads last to the unfused pair, with a bias": (
        lambda: v0_14.functional.natten2dqkrpb(LAST, LAST, BIAS, 3, 1),
        r"natten2dqkrpb of NATTEN 0.14.6 takes \(query, key, rpb, kernel_size, dilation.*\[batch, heads, X, Y, dim\], "
        r"heads first. The bias has 2 heads, query has 9 in shape \(1, 9, 8, 2, 4\). If query is heads last",
    ),
    "heads last to the unfused pair": (
        lambda: v0_17.functional.na2d_qk(LAST, LAST, 3),
        r"na2d_qk of NATTEN 0.17 takes .*heads first. .*axis Y has 2 positions.*Query is \(1, 9, 8, 2, 4\)",
    ),
    "heads first to the fused operator": (
        lambda: v0_21.na2d(Q, Q, Q, 3),
        r"na2d of NATTEN 0.21 takes .*\[batch, X, Y, heads, dim\], heads last. .*axis X has 2 positions",
    ),
    "a map to the operator of sequences": (
        lambda: v0_21.na1d(LAST, LAST, LAST, 3),
        r"na1d of NATTEN 0.21 takes .*\[batch, X, heads, dim\].*Got query with 5 axes",
    ),
    "a matrix to the generic one": (
        lambda: v0_21.functional.neighborhood_attention_generic(Q[0, 0], Q, Q, 3),
        r"neighborhood_attention_generic of NATTEN 0.21 takes .*Got query with 3 axes",
    ),
    "window too large": (
        lambda: v0_15.functional.na2d_qk(Q, Q, 3, 4),
        r"na2d_qk of NATTEN 0.15 takes .*axis X has 9 positions, but kernel_size 3 with dilation 4 spans 12",
    ),
    "query and key differ": (
        lambda: v0_17.functional.na2d_qk(Q, Q[:, :, 1:], 3),
        r"Query and key must have one shape, got \(1, 2, 9, 8, 4\) and \(1, 2, 8, 8, 4\)",
    ),
    "attention of another window": (
        lambda: v0_17.functional.na2d_av(torch.zeros(1, 2, 9, 8, 25), Q, 3),
        r"na2d_av of NATTEN 0.17 takes .*must be \[batch, heads, ..., 9\].*got \(1, 2, 9, 8, 25\)",
    ),
    "attention without its additional tokens": (
        lambda: v0_17.functional.na2d_av(torch.zeros(1, 2, 9, 8, 9), Q, 3, 1, torch.zeros(1, 2, 3, 4)),
        r"must be \[batch, heads, ..., 9 \+ 3\]",
    ),
    "additional tokens heads last": (
        lambda: v0_17.functional.na2d_qk(Q, Q, 3, 1, torch.zeros(1, 3, 2, 4)),
        r"additional_keys must be \[batch, heads, tokens, dim\] = \[1, 2, tokens, 4\], got \(1, 3, 2, 4\)",
    ),
    "additional tokens heads first to the fused operator": (
        lambda: v0_21.na2d(LAST, LAST, LAST, 3, additional_keys=Q[:, 0], additional_values=Q[:, 0]),
        r"additional_keys must be \[batch, tokens, heads, dim\] = \[1, tokens, 2, 4\], got \(1, 9, 8, 4\)",
    ),
    "additional keys alone": (
        lambda: v0_21.na2d(LAST, LAST, LAST, 3, additional_keys=torch.zeros(1, 3, 2, 4)),
        r"additional_keys and additional_values must be given together",
    ),
    "no bias up to 0.14.4": (
        lambda: v0_14_4.functional.natten2dqkrpb(Q, Q, None, 1),
        r"natten2dqkrpb of NATTEN up to 0.14.4 takes .*rpb must be \[heads, 2 \* kernel_size - 1.*got NoneType",
    ),
    "no square attention up to 0.14.4": (
        lambda: v0_14_4.functional.natten2dav(torch.zeros(1, 2, 9, 8, 10), Q, 1),
        r"The last axis of attn must be kernel_size \*\* 2, got \(1, 2, 9, 8, 10\)",
    ),
    "no tensor": (lambda: v0_17.functional.na1d_qk(None, Q, 3), r"na1d_qk of NATTEN 0.17 .*Got NoneType as query"),
    "kernel_size text": (lambda: v0_17.functional.na2d_av(Q, Q, "3"), r"na2d_av of NATTEN 0.17 .*Got kernel_size '3'"),
    "bias of another window": (
        lambda: v0_17.functional.na2d_qk(Q, Q, 5, rpb=BIAS),
        r"na2d_qk of NATTEN 0.17 .*rel_pos_bias must be",
    ),
    "mixed dtypes": (lambda: v0_21.na2d(LAST, LAST.double(), LAST, 3), r"na2d of NATTEN 0.21 .*they must agree"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_error_says_which_function_of_which_era_and_what_it_takes(name):
    call, message = WRONG[name]
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        call()


def test_sparse_and_nested_tensors_are_not_implemented():
    with pytest.raises(NotImplementedError, match="NATTEN does not support sparse tensors"):
        v0_21.na2d(LAST.to_sparse(), LAST, LAST, 3)
