"""``attention`` and ``merge_attentions``."""

from __future__ import annotations

import math

import pytest
import torch

from nbhd import dense
from nbhd.compat.natten import v0_20, v0_21, v0_21_1
from nbhd.compat.natten.core.varlen import generate_varlen_parameters
from nbhd.errors import ArgumentError


def naive(q, k, v, causal=False, scale=None):
    """Output and log-sum-exp in float64."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.double() for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = torch.einsum("bihd,bjhd->bihj", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen[:, None], -math.inf)
    return torch.einsum("bihj,bjhd->bihd", torch.softmax(scores, -1), v), torch.logsumexp(scores, -1)


def tensors(queries=7, keys=9, heads=4, kv_heads=2, batch=2, dtype=torch.float64, dim_v=5):
    q = torch.randn(batch, queries, heads, 3, dtype=dtype)
    return q, torch.randn(batch, keys, kv_heads, 3, dtype=dtype), torch.randn(batch, keys, kv_heads, dim_v, dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 9), (9, 7), (1, 5)])
def test_attention(monkeypatch, causal, queries, keys):
    q, k, v = tensors(queries, keys)
    expected, lse = naive(q, k, v, causal, 0.6)
    assert torch.allclose(v0_21.attention(q, k, v, causal, 0.6), expected)
    for elements in (1 << 22, 40):  # in one piece, and a few queries at a time
        monkeypatch.setattr(dense, "CHUNK_ELEMENTS", elements)
        out, found = v0_21.attention(q, k, v, causal, 0.6, return_lse=True)
        assert torch.allclose(out, expected)
        assert torch.allclose(found, lse)
    if not causal:
        for era in (v0_20, v0_21_1):
            assert torch.allclose(era.attention(q, k, v, 0.6), expected)  # the fourth is the scale there


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_output_and_log_sum_exp(monkeypatch, causal):
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 24)
    q, k, v = (t.requires_grad_() for t in tensors(3, 4, 2, 1, 1, dim_v=2))
    both = lambda q, k, v: v0_21.attention(q, k, v, causal, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(both, (q, k, v))
    assert torch.autograd.gradgradcheck(both, (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: v0_21.attention(q, k, v, causal), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = tensors(dtype=dtype)
    out, lse = v0_21.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected, exact = naive(q, k, v)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


def packed(lengths_q, lengths_kv, causal):
    parts = [naive(*tensors_of(n, m), causal) for n, m in zip(lengths_q, lengths_kv, strict=True)]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


CACHE: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}


def tensors_of(n, m):
    return CACHE.setdefault((n, m), tensors(n, m, 2, 1, 1))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal):
    lengths_q, lengths_kv = (4, 1, 6), (5, 3, 2)
    q, k, v = (
        torch.cat(t, 1) for t in zip(*(tensors_of(*n) for n in zip(lengths_q, lengths_kv, strict=True)), strict=True)
    )
    expected, lse = packed(lengths_q, lengths_kv, causal)
    q_lengths, kv_lengths = torch.tensor(lengths_q, dtype=torch.int32), torch.tensor(lengths_kv)
    out = v0_21.attention(q, k, v, causal, seqlens_Q=q_lengths, seqlens_KV=kv_lengths)
    assert torch.allclose(out, expected)
    sum_q, sum_kv, max_q, max_kv = generate_varlen_parameters(q, k, v, q_lengths, kv_lengths)
    assert (sum_q.tolist(), sum_kv.tolist(), max_q, max_kv) == ([0, 4, 5, 11], [0, 5, 8, 10], 6, 5)
    assert sum_q.dtype == torch.int32
    out, found = v0_21.attention(
        q, k, v, causal,
        cumulative_seqlen_Q=sum_q, cumulative_seqlen_KV=sum_kv, max_seqlen_Q=max_q, max_seqlen_KV=max_kv,
        return_lse=True,
    )  # fmt: skip
    assert torch.allclose(out, expected)
    assert torch.allclose(found, lse)
    assert generate_varlen_parameters(q, k, v) == (None, None, 0, 0)


def test_without_lengths_nothing_is_packed():
    """What ``generate_varlen_parameters`` gives for no lengths, handed on."""
    q, k, v = tensors(batch=1)
    sum_q, sum_kv, max_q, max_kv = generate_varlen_parameters(q, k, v, None, None)
    out = v0_21.attention(
        q, k, v,
        cumulative_seqlen_Q=sum_q, cumulative_seqlen_KV=sum_kv, max_seqlen_Q=max_q, max_seqlen_KV=max_kv,
    )  # fmt: skip
    assert torch.equal(out, v0_21.attention(q, k, v))
    with pytest.raises(ArgumentError, match="requires all of cumulative_seqlen"):
        v0_21.attention(q, k, v, max_seqlen_Q=3, max_seqlen_KV=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["lengths", "sums"])
def test_packed_sequences_compile_in_one_graph(backend, form):
    q, k, v = (t.requires_grad_() for t in tensors(11, 10, 4, 2, 1))
    lengths = torch.tensor([4, 1, 0, 6]), torch.tensor([5, 0, 3, 2])

    def call(q, k, v, some, others):
        if form == "lengths":
            given = dict(seqlens_Q=some, seqlens_KV=others)
        else:
            names = "cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV"
            given = dict(zip(names, (some, others, 6, 5), strict=True))
        return v0_21.attention(q, k, v, True, return_lse=True, **given)

    if form == "sums":
        lengths = tuple(torch.nn.functional.pad(t.cumsum(0), (1, 0)).int() for t in lengths)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    weight = torch.randn(1, 11, 4, 5, dtype=torch.float64)
    found, expected = (f(q, k, v, *lengths) for f in (compiled, call))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (
        torch.autograd.grad((out * weight).sum() + lse[:, :4].sum() + lse[:, 5:].sum(), (q, k, v))
        for out, lse in (found, expected)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ArgumentError, match=r"tokens together|starts at 0"):
        compiled(q, k, v, lengths[0], lengths[1] + 1)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_tensor_in_all_roles_compiles(backend):
    q = torch.randn(1, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    call = lambda q: v0_21.attention(q, q, q, return_lse=True)  # noqa: E731
    found, expected = (
        torch.autograd.grad(sum(t.square().sum() for t in f(q)), q)
        for f in (torch.compile(call, backend=backend, fullgraph=True), call)
    )
    torch.testing.assert_close(found, expected)


def test_shapes_on_the_meta_device():
    q, k, v = (t.to("meta") for t in tensors())
    out, lse = v0_21.attention(q, k, v, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 7, 4, 5), (2, 7, 4))


def test_dtypes_are_compared_after_autocast():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = v0_21.attention(q, k.bfloat16(), v.half())
    assert torch.equal(out, v0_21.attention(*(t.bfloat16() for t in (q, k, v.half()))))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match=r"same data type, got .*int64"):
        v0_21.attention(q, k.long(), v)


def test_a_sequence_without_keys_gives_zeros_and_no_nan():
    q, k, v = (t.requires_grad_() for t in tensors(5, 3, 2, 1, 1))
    for lengths in ([2, 3], [3, 0]), ([3, 2], [0, 3]):
        out, lse = v0_21.attention(
            q, k, v, seqlens_Q=torch.tensor(lengths[0]), seqlens_KV=torch.tensor(lengths[1]), return_lse=True
        )
        empty = torch.isneginf(lse)
        assert empty.sum() == 2 * 3
        assert not out[empty].any()
        merged, _ = v0_21.merge_attentions([out, out], [lse, lse])
        gradients = torch.autograd.grad(merged.sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("value", [1.0, math.inf])
@pytest.mark.parametrize("return_lse", [False, True])
def test_without_keys_zeros_are_zeros_whatever_the_queries(value, return_lse):
    """In float16 a sum of large tensors is infinite, and 0 * inf is no number."""
    q = torch.full((1, 4096, 8, 64), value, dtype=torch.float16, requires_grad=True)
    k = torch.ones(1, 4, 8, 64, dtype=torch.float16)
    result = v0_21.attention(q, k[:, :0], k[:, :0], return_lse=return_lse)
    out, lse = result if return_lse else (result, torch.tensor(-math.inf))
    assert not out.any() and torch.isneginf(lse).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert not gradient.any()


WRONG = {
    "batch": (dict(seqlens_Q=[7], seqlens_KV=[9]), r"sequence-packed memory layout \(batch = 1\), got batch 2"),
    "is_causal": (dict(is_causal=1), "is_causal must be a bool, got 1"),
    "scale": (dict(scale="x"), "scale must be a number"),
    "query": (dict(query=torch.zeros(2, 7, 4)), r"Got query with 3 axes"),
    "heads": (dict(query=torch.zeros(2, 7, 3, 3, dtype=torch.float64)), "Key/value heads must evenly divide"),
    "dtype": (dict(query=torch.zeros(2, 7, 4, 3)), "same data type, got torch.float32"),
    "ints": (dict(query=torch.zeros(1).int()), "Got query with 1 axes"),
    "dim": (dict(query=torch.zeros(2, 7, 4, 4, dtype=torch.float64)), "Q and K head dims must match"),
    "keys": (dict(value=torch.zeros(2, 8, 2, 3, dtype=torch.float64)), "K and V must match in sequence length"),
    "nested": (dict(query=None), "Got NoneType as query"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    change, message = WRONG[name]
    q, k, v = tensors()
    with pytest.raises(ArgumentError, match=rf"attention of NATTEN 0.21 takes \(query, key.*{message}"):
        v0_21.attention(**{"query": q, "key": k, "value": v, **change})


def sums(sum_q, sum_kv, max_q, max_kv):
    names = "cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV"
    return dict(zip(names, (torch.tensor(sum_q), torch.tensor(sum_kv), max_q, max_kv), strict=True))


WRONG_LENGTHS = {
    "one alone": (dict(seqlens_Q=[7]), "seqlens_KV must be a 1-D int tensor"),
    "too short": (dict(seqlens_Q=[3, 3], seqlens_KV=[4, 5]), "sequences of query have 6 tokens together, query has 7"),
    "number": (dict(seqlens_Q=[3, 4], seqlens_KV=[9]), "must have one size, got 2 and 1"),
    "negative": (dict(seqlens_Q=[8, -1], seqlens_KV=[4, 5]), "seqlens_Q must be"),
    "missing": (dict(cumulative_seqlen_Q=torch.tensor([0, 7])), "requires all of cumulative_seqlen"),
    "start": (
        sums([1, 7], [0, 9], 7, 9),
        "starts at 0",
    ),
    "max": (
        sums([0, 7], [0, 9], 6, 9),
        "max_seqlen_Q must be an int of at least 7",
    ),
    "kind": (sums([0.0, 7.0], [0, 9], 7, 9), r"cumulative_seqlen_Q must be a 1-D int32 tensor, got torch.float32"),
    "sum": (sums([0, 6], [0, 9], 7, 9), "The sequences of query have 6 tokens together, query has 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_wrong_lengths(name):
    change, message = WRONG_LENGTHS[name]
    with pytest.raises(ArgumentError, match=message):
        v0_21.attention(*tensors(batch=1), **change)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_merging_parts_is_attention_over_all_keys_with_its_gradients(parts):
    q, k, v = (t.requires_grad_() for t in tensors(6, 10))
    outs, lses = [], []
    for some_k, some_v in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True):
        out, lse = v0_21.attention(q, some_k, some_v, return_lse=True)
        outs.append(out)
        lses.append(lse)
    kept = [t.detach().clone() for t in (*outs, *lses)]
    out, lse = v0_21.merge_attentions(outs, lses)
    assert all(torch.equal(a, b) for a, b in zip((*outs, *lses), kept, strict=True))  # not overwritten
    expected, exact = naive(q, k, v)
    assert torch.allclose(out, expected)
    assert torch.allclose(lse, exact)
    weights = torch.randn_like(expected), torch.randn_like(exact)
    found = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), (q, k, v))
    right = torch.autograd.grad((expected * weights[0]).sum() + (exact * weights[1]).sum(), (q, k, v))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_neighborhoods_and_global_tokens_merge():
    """What callers do with na2d and attention by hand is what additional tokens do."""
    q, k, v = torch.randn(3, 1, 6, 7, 2, 4, dtype=torch.float64)
    more_k, more_v = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64)
    out, lse = v0_21.na2d(q, k, v, 3, return_lse=True)
    extra, extra_lse = v0_21.attention(q.flatten(1, 2), more_k, more_v, return_lse=True)
    merged, _ = v0_21.merge_attentions([out.flatten(1, 2), extra], [lse.flatten(1, 2), extra_lse])
    expected = v0_21.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    assert torch.allclose(merged.view_as(expected), expected)


def test_what_is_returned_depends_on_the_era():
    outs, lses = [torch.randn(1, 4, 2, 3)] * 2, [torch.randn(1, 4, 2)] * 2
    out, lse = v0_21.merge_attentions(outs, lses)
    assert torch.equal(v0_20.merge_attentions(outs, lses), out)
    assert torch.equal(v0_21_1.merge_attentions(outs, lses), out)
    assert lse.shape == (1, 4, 2)
    half, lse = v0_21.merge_attentions([t.bfloat16() for t in outs], lses)
    assert (half.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_wrong_parts():
    out, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2)
    for outs, lses in (
        ([out], [lse]),
        ([out, out], [lse]),
        ([out, out[:, :2]], [lse, lse]),
        (out, lse),
        ([out, 1], [lse, lse]),
    ):
        with pytest.raises(ArgumentError, match=r"merge_attentions of NATTEN 0.20 and later takes"):
            v0_21.merge_attentions(outs, lses)
