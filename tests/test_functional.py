"""What the operator accepts and refuses, and what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nbhd
from nbhd.errors import ArgumentError, BackendError
from tests.cases import NAMED

OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=dtype) for _ in range(3))


GOOD = qkv(1, 8, 9, 2, 4)
Q, K, V = GOOD

WRONG = {
    "kernel_size 0": (dict(kernel_size=0), r"kernel_size must be at least 1, got 0 on axis X"),
    "kernel_size text": (dict(kernel_size="7"), r"kernel_size must be an int or one per axis, got '7'"),
    "kernel_size float": (dict(kernel_size=3.0), r"kernel_size must be an int or one per axis, got 3.0 \(float\)"),
    "kernel_size bool": (dict(kernel_size=True), r"kernel_size must be an int"),
    "kernel_size nested": (
        dict(kernel_size=[3, [3]]),
        r"kernel_size must be an int or one per axis, got \[3\] \(list\)",
    ),
    "kernel_size set": (dict(kernel_size={3}), r"kernel_size must be an int or one per axis, got \{3\} \(set\)"),
    "kernel_size three": (dict(kernel_size=(3, 3, 3)), r"kernel_size must be an int or 2 of them.*got 3: \(3, 3, 3\)"),
    "kernel_size large": (
        dict(kernel_size=(3, 10)),
        r"axis Y has 9 positions, but kernel_size 10 with dilation 1 spans 10. Here use kernel_size <= 9",
    ),
    "dilation large": (
        dict(kernel_size=3, dilation=3),
        r"axis X has 8 positions, but kernel_size 3 with dilation 3 spans 9. Here use dilation <= 2, or pad",
    ),
    "dilation 0": (dict(kernel_size=3, dilation=(1, 0)), r"dilation must be at least 1, got 0 on axis Y"),
    "stride large": (dict(kernel_size=3, stride=4), r"stride 4 with kernel_size 3 on axis X. Use stride <= 3"),
    "stride 0": (dict(kernel_size=3, stride=0), r"stride must be between 1 and kernel_size"),
    "is_causal int": (dict(kernel_size=3, is_causal=1), r"is_causal must be a bool or 2 of them"),
    "is_causal short": (dict(kernel_size=3, is_causal=(True,)), r"is_causal must be a bool or 2 of them"),
    "is_causal nested": (dict(kernel_size=3, is_causal=[True, [False]]), r"is_causal must be a bool or 2 of them"),
    "scale text": (dict(kernel_size=3, scale="x"), r"scale must be None or a real number, got 'x'"),
    "scale nan": (dict(kernel_size=3, scale=float("nan")), r"scale must be finite"),
    "scale beyond a float": (
        dict(kernel_size=3, scale=10**400),
        r"scale must be finite and within the range of a float, got 10{19}\.\.\. \(401 digits\)",
    ),
    "scale without end": (dict(kernel_size=3, scale=10**9000), r"got an int of very many digits"),
    "backend unknown": (dict(kernel_size=3, backend="cuda9"), r"backend must be 'auto' or one of 'reference'"),
    "backend number": (dict(kernel_size=3, backend=1), r"backend must be a string"),
    "bias shape": (
        dict(kernel_size=3, rel_pos_bias=torch.zeros(2, 5, 4)),
        r"rel_pos_bias must be .* = \(2, 5, 5\) for 2 heads and kernel_size \(3, 3\), got \(2, 5, 4\)",
    ),
    "bias int": (
        dict(kernel_size=3, rel_pos_bias=torch.zeros(2, 5, 5, dtype=torch.int64)),
        r"rel_pos_bias must be None",
    ),
    "query list": (dict(kernel_size=3, query=[1.0]), r"query must be a torch.Tensor, got list"),
    "query rank": (dict(kernel_size=3, query=Q[0]), r"query must have 5 axes for na2d, .* got 4: .* use na1d"),
    "key map": (
        dict(kernel_size=3, key=K[:, :7]),
        r"key must have the batch and map of query, \(1, 8, 9\), got \(1, 7, 9\)",
    ),
    "key dim": (dict(kernel_size=3, key=K[..., :3]), r"key must have the dim of query, 4, got 3"),
    "value heads": (dict(kernel_size=3, value=V[..., :1, :]), r"value must have the heads of key, 2, got 1"),
    "grouped heads": (
        dict(kernel_size=3, query=torch.zeros(1, 8, 9, 3, 4)),
        r"query must have a multiple of the heads of key and value, 2, got 3",
    ),
    "dtype mixed": (dict(kernel_size=3, key=K.double()), r"key is torch.float64, query torch.float32: they must agree"),
    "dtype int": (
        dict(kernel_size=3, query=Q.long(), key=K.long(), value=V.long()),
        r"must be float64, float32, bfloat16",
    ),
    "dtype float8": (
        dict(zip(("query", "key", "value"), (t.to(torch.float8_e4m3fn) for t in GOOD), strict=True), kernel_size=3),
        r"must be float64, float32, bfloat16 or float16, got torch.float8_e4m3fn",
    ),
    "sparse": (dict(kernel_size=3, query=Q.to_sparse()), r"query must be a dense tensor, got layout torch.sparse_coo"),
    "sparse value": (dict(kernel_size=3, value=V.to_sparse()), r"value must be a dense.*Pass value.to_dense\(\)"),
    "device mixed": (dict(kernel_size=3, key=K.to("meta")), r"key is on meta, query on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_rule_value_and_remedy(name):
    arguments, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        nbhd.na2d(**{"query": Q, "key": K, "value": V, **arguments})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused(layout):
    query, key, value = (torch.nested.nested_tensor([*t, *t], layout=layout) for t in GOOD)
    with pytest.raises(ArgumentError, match=r"got a nested one. Pad it: query.to_padded_tensor\(0.0\)"):
        nbhd.na2d(query, key, value, 3)


def test_argument_errors_are_value_errors():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, nbhd.NbhdError)


def test_positional_order_is_natten_s():
    """query, key, value, kernel_size, stride, dilation, is_causal, scale."""
    by_place = nbhd.na2d(Q, K, V, (3, 4), (2, 1), (2, 2), (True, False), 0.3)
    by_name = nbhd.na2d(Q, K, V, kernel_size=(3, 4), stride=(2, 1), dilation=(2, 2), is_causal=(True, False), scale=0.3)
    assert torch.equal(by_place, by_name)


@pytest.mark.parametrize("kernel_size", [3, (3, 3), [3, 3], np.int64(3), (np.int32(3), 3), torch.Size([3, 3])])
def test_integers_of_any_kind_are_taken(kernel_size):
    assert torch.equal(nbhd.na2d(Q, K, V, kernel_size), nbhd.na2d(Q, K, V, 3))


def test_a_scale_of_zero_is_zero():
    out = nbhd.na2d(Q, K, V, 3, scale=0.0)
    torch.testing.assert_close(out[0, 4, 4], V[0, 3:6, 3:6].mean((0, 1)))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_empty_batch_gives_an_empty_result(axes):
    query = torch.zeros(0, *(5,) * axes, 2, 4, requires_grad=True)
    bias = torch.zeros(2, *(5,) * axes, requires_grad=True)
    out, lse = OPERATORS[axes](query, query, query, 3, rel_pos_bias=bias, return_lse=True)
    assert out.shape == query.shape
    assert lse.shape == query.shape[:-1]
    (out.sum() + lse.sum()).backward()
    assert query.grad is not None and query.grad.shape == query.shape
    assert bias.grad is not None and not bias.grad.any()
    assert nbhd.attention_weights(query, query, 3).shape == (*query.shape[:-1], 3**axes)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_any_strides_give_the_same_result(axes):
    spatial = (5, 6, 4)[:axes]
    torch.manual_seed(0)
    heads_first = torch.randn(3, 2, 3, *spatial, 4)
    query, key, value = (t.movedim(1, -2) for t in heads_first)
    channels_first = [t.movedim(-1, 1).contiguous().movedim(1, -1) for t in (query, key, value)]  # last axis not dense
    expected = OPERATORS[axes](query.contiguous(), key.contiguous(), value.contiguous(), 3)
    torch.testing.assert_close(OPERATORS[axes](query, key, value, 3), expected)
    torch.testing.assert_close(OPERATORS[axes](*channels_first, 3), expected)
    broadcast = key[:, :1].expand_as(key)  # stride 0
    torch.testing.assert_close(
        OPERATORS[axes](query, broadcast, value, 3), OPERATORS[axes](query, broadcast.contiguous(), value, 3)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_dtype_and_leaves_the_bias(dtype):
    bias = torch.randn(2, 5, 5, requires_grad=True)
    query = Q.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = nbhd.na2d(query, K, V, 3, rel_pos_bias=bias)
        weights = nbhd.attention_weights(query, K, 3, rel_pos_bias=bias)
        wide = nbhd.na2d(Q.double(), K.double(), V.double(), 3)
    assert out.dtype == dtype
    assert wide.dtype == torch.float64
    assert nbhd.na2d(query, K.to(query.dtype), V, 3).dtype == torch.float32
    torch.testing.assert_close(out, nbhd.na2d(query.to(dtype), K.to(dtype), V.to(dtype), 3, rel_pos_bias=bias))
    assert weights.isfinite().all()
    out.float().sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_the_log_sum_exp_merges_parts_of_an_attention_with_right_gradients():
    """Two sets of keys, each attended to alone and merged by log-sum-exp, equal the attention to all of them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(k, v):
        return nbhd.na1d(query, k, v, 6, return_lse=True)

    def merge(parts):
        outs, lses = zip(*parts, strict=True)
        total = torch.logsumexp(torch.stack(lses), 0)
        return sum(out * (lse - total).exp()[..., None] for out, lse in zip(outs, lses, strict=True))

    shifted = key.roll(2, 1) * 0.5, value.roll(1, 1)
    merged = merge([attend(key, value), attend(*shifted)])
    flat = [t.transpose(1, 2) for t in (query, torch.cat([key, shifted[0]], 1), torch.cat([value, shifted[1]], 1))]
    full = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2)
    torch.testing.assert_close(merged, full, rtol=0, atol=1e-13)
    weight = torch.randn_like(full)
    inputs = (query, key, value)
    expected = torch.autograd.grad((full * weight).sum(), inputs, retain_graph=True)
    for one, other in zip(torch.autograd.grad((merged * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        {"kernel_size": 3.0},
        {"kernel_size": (3.0, 3)},
        {"kernel_size": [3, 3.0]},
        {"kernel_size": 3, "stride": True},
        {"kernel_size": 3, "is_causal": 0},
    ],
)
def test_what_equals_a_good_argument_is_refused_after_it_too(bad):
    nbhd.na2d(Q, K, V, 3)
    nbhd.na2d(Q, K, V, (3, 3))
    nbhd.na2d(Q, K, V, [3, 3])
    with pytest.raises(ArgumentError, match="must be"):
        nbhd.na2d(Q, K, V, **bad)


def test_lists_are_remembered_as_tuples_are(monkeypatch):
    """Configurations read from JSON have them; a call like an earlier one is checked no second time."""
    expected = nbhd.na2d(Q, K, V, [3, 5], stride=[1, 1], dilation=[2, 1], is_causal=[True, False])
    monkeypatch.setattr(nbhd.functional, "_check", None)
    again = nbhd.na2d(Q, K, V, [3, 5], stride=[1, 1], dilation=[2, 1], is_causal=[True, False])
    assert torch.equal(again, expected)


def test_autocast_does_not_shorten_the_sums_of_the_reference():
    query, key, value = (t.float() * 3 for t in (Q, K, V))
    with torch.autocast("cpu", torch.bfloat16):
        inside = nbhd.na2d(query, key, value, 3, backend="reference")
    outside = nbhd.na2d(query.bfloat16(), key.bfloat16(), value.bfloat16(), 3, backend="reference")
    assert torch.equal(inside, outside)


def test_a_named_backend_that_cannot_run_says_why(monkeypatch):
    from nbhd.backends import reference

    monkeypatch.setattr(reference, "why_not", lambda call: "it is resting.")
    with pytest.raises(
        BackendError, match=r"backend 'reference' cannot run this call: it is resting. Use backend='auto'"
    ):
        nbhd.na2d(Q, K, V, 3, backend="reference")


@pytest.mark.parametrize("name", ["1d-causal-stride-dilation-bias", "2d-grouped-heads", "3d-causal-time"])
def test_weights_sum_to_one_and_rebuild_the_output(name):
    case = NAMED[name]
    tensors = case.tensors()
    bias = tensors.pop("rel_pos_bias", None)
    query, key, value = tensors.values()
    weights = nbhd.attention_weights(query, key, *case.geometry, rel_pos_bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    out = nbhd.apply_attention_weights(weights, value, *case.geometry)
    expected = OPERATORS[len(case.spatial)](query, key, value, *case.geometry, rel_pos_bias=bias)
    torch.testing.assert_close(out, expected)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(
        ArgumentError, match=r"weights must be \[batch, \*spatial, heads, 9\] for value \(1, 8, 9, 2, 4\)"
    ):
        nbhd.apply_attention_weights(torch.zeros(1, 8, 9, 2, 8), V, 3)
    with pytest.raises(ArgumentError, match="one to three spatial axes"):
        nbhd.attention_weights(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_program_recorded_by_torch_jit_computes():
    """The fast path hides its kernel from the recorder, which once kept an uninitialised output."""
    q, k, v = qkv(1, 6, 7, 2, 4)
    traced = torch.jit.trace(lambda a, b, c: nbhd.na2d(a, b, c, 3), (q, k, v))
    other = [t.flip(1) for t in (q, k, v)]
    assert torch.allclose(traced(*other), nbhd.na2d(*other, 3), atol=1e-6)


@pytest.mark.parametrize("first", ["plain", "negated"])
def test_negated_views_are_not_taken_for_plain_ones(first):
    """The imaginary part of a conjugate has the layout of any other view, and is copied before use."""
    real = torch.randn(2, 40, 3, 1, dtype=torch.complex64)
    plain, negated = real.imag, real.conj().imag
    assert negated.is_neg() and plain.stride() == negated.stride()
    for one in (plain, negated) if first == "plain" else (negated, plain):
        dense = one.resolve_neg().clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(nbhd.na1d(one, one, one, 5), nbhd.na1d(dense, dense, dense, 5))
