"""Tokens that every query sees beside its window, and merging of several attentions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import nbhd
from nbhd import dense
from nbhd.errors import ArgumentError
from tests.truth import keys_of

OPERATORS = {1: nbhd.na1d, 2: nbhd.na2d, 3: nbhd.na3d}
SPATIAL = {1: (13,), 2: (6, 7), 3: (3, 4, 5)}


def truth(query, key, value, more_keys, more_values, window, bias=None, scale=None):
    """Output and log-sum-exp by one masked softmax over all positions and tokens, in float64."""
    axes, heads = query.ndim - 3, query.shape[-2]
    spatial, groups = query.shape[1:-2], heads // key.shape[-2]
    positions = list(itertools.product(*map(range, spatial)))
    mask = torch.full((heads, len(positions), len(positions)), -math.inf, dtype=torch.float64)
    kernel, stride, dilation, causal = window
    for i, here in enumerate(positions):
        axis = zip(here, spatial, (kernel,) * axes, (stride,) * axes, (dilation,) * axes, (causal,) * axes, strict=True)
        for there in itertools.product(*(keys_of(*one) for one in axis)):
            if None not in there:
                mask[:, i, positions.index(there)] = 0.0
                if bias is not None:
                    relative = (b // dilation - a // dilation + kernel - 1 for a, b in zip(here, there, strict=True))
                    mask[:, i, positions.index(there)] += bias.double()[(slice(None), *relative)]
    rows = query.double().flatten(1, -3)
    keys, values = (
        torch.cat([near.flatten(1, -3), more], 1).double().repeat_interleave(groups, 2)
        for near, more in ((key, more_keys), (value, more_values))
    )
    scores = torch.einsum("bihd,bjhd->bhij", rows, keys) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + torch.cat([mask, mask.new_zeros(heads, len(positions), more_keys.shape[1])], -1)
    out = torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), values)
    return out.unflatten(1, spatial), torch.logsumexp(scores, -1).transpose(1, 2).unflatten(1, spatial)


def tensors(axes, dtype=torch.float64, tokens=5, heads=4, kv_heads=2, dim=8, dim_v=8, batch=2):
    torch.manual_seed(axes)
    shapes = (*SPATIAL[axes], heads, dim), (*SPATIAL[axes], kv_heads, dim), (*SPATIAL[axes], kv_heads, dim_v)
    more = (tokens, kv_heads, dim), (tokens, kv_heads, dim_v)
    return [torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in (*shapes, *more)]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dim_v", [8, 5])  # with PyTorch's kernel for the tokens and without
@pytest.mark.parametrize("window", [(3, 1, 1, False), (3, 2, 1, False), (2, 1, 1, True)], ids=str)
def test_against_one_softmax_with_gradients(axes, dim_v, window):
    q, k, v, more_k, more_v = tensors(axes, dim_v=dim_v)
    bias = torch.randn(4, *(2 * window[0] - 1,) * axes, dtype=torch.float64, requires_grad=True)
    inputs = q, k, v, more_k, more_v, bias
    expected = truth(q, k, v, more_k, more_v, window, bias, scale=0.4)
    found = OPERATORS[axes](
        q, k, v, *window, 0.4, rel_pos_bias=bias, return_lse=True, additional_keys=more_k, additional_values=more_v
    )
    weights = [torch.randn_like(t) for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(sum((a * w).sum() for a, w in zip(got, weights, strict=True)), inputs)
        for got in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 5, 77])
def test_dtypes(dtype, tolerance, tokens):
    q, k, v, more_k, more_v = tensors(2, dtype, tokens)
    out, lse = nbhd.na2d(q, k, v, 3, return_lse=True, additional_keys=more_k, additional_values=more_v)
    expected, exact = truth(q, k, v, more_k, more_v, (3, 1, 1, False))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=min(tolerance, 1e-3))
    alone = nbhd.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    assert torch.equal(alone, out)


STRIDED = {
    "channels first": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "heads first": lambda t: t.movedim(-2, 1).contiguous().movedim(1, -2),
}


@pytest.mark.parametrize("lie", STRIDED)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_however_channels_lie(lie, kv_heads):
    plain = [t.detach() for t in tensors(2, torch.float32, kv_heads=kv_heads)]
    if lie == "expanded":
        plain = [t[..., :1].expand(t.shape).contiguous() for t in plain]
    strided = [STRIDED[lie](t).requires_grad_() for t in plain]
    results = []
    for q, k, v, more_k, more_v in ([t.clone().requires_grad_() for t in plain], strided):
        out, lse = nbhd.na2d(q, k, v, 3, return_lse=True, additional_keys=more_k, additional_values=more_v)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        inputs = q, k, v, more_k, more_v
        results.append((out, lse, *torch.autograd.grad((out * weight).sum() + lse.sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_batches_of_gradients():
    q, k, v, more_k, more_v = tensors(1)
    out = nbhd.na1d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    several = torch.randn(3, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(out, (q, more_k, more_v), several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        for a, b in zip(together, torch.autograd.grad(out, (q, more_k, more_v), one, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_a_window_that_a_bias_hides_leaves_the_tokens():
    q, k, v, more_k, more_v = (t.detach() for t in tensors(1))
    hides = torch.full((4, 5), -math.inf, dtype=torch.float64)
    out, lse = nbhd.na1d(
        q, k, v, 3, rel_pos_bias=hides, return_lse=True, additional_keys=more_k, additional_values=more_v
    )
    expected, exact = truth(q, k, v, more_k, more_v, (3, 1, 1, False), hides)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, exact)


def test_no_tokens_change_nothing():
    q, k, v, more_k, more_v = tensors(2, tokens=0)
    out = nbhd.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    torch.testing.assert_close(out, nbhd.na2d(q, k, v, 3), rtol=0, atol=0)


def test_autocast_takes_them_along():
    q, k, v, more_k, more_v = tensors(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = nbhd.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    short = [t.bfloat16() for t in (q, k, v, more_k, more_v)]
    assert torch.equal(out, nbhd.na2d(*short[:3], 3, additional_keys=short[3], additional_values=short[4]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
def test_compiled_and_transformed():
    def call(q, k, v, more_k, more_v):
        return nbhd.na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)

    inputs = tensors(2, torch.float32)
    expected = call(*inputs)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), expected)
    with torch.no_grad():
        by_image = torch.func.vmap(lambda *one: call(*(t[None] for t in one))[0])(*inputs)
    torch.testing.assert_close(by_image, expected)
    tangents = [torch.randn_like(t) for t in inputs]
    forward = torch.func.jvp(call, tuple(inputs), tuple(tangents))[1]
    backward = torch.autograd.grad(call(*inputs), inputs, forward)
    dot = sum((g * t).sum() for g, t in zip(backward, tangents, strict=True))
    torch.testing.assert_close(dot, (forward * forward).sum(), rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(call, tensors(2, heads=1, kv_heads=1, dim=2, dim_v=2, batch=1, tokens=2))


Q = torch.zeros(2, 6, 7, 4, 8)
TOKENS = torch.zeros(2, 5, 4, 8)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (TOKENS, None, "additional_keys and additional_values must be given together"),
        (None, TOKENS, "additional_keys and additional_values must be given together"),
        ([1.0], TOKENS, r"additional_keys must be a torch.Tensor, got list"),
        (TOKENS[0], TOKENS, r"additional_keys must be \[batch, tokens, heads, dim\] = \[2, tokens, 4, 8\], got \(5, 4"),
        (TOKENS, TOKENS[:, :, :2], r"additional_values must be .* got \(2, 5, 2, 8\)"),
        (TOKENS, TOKENS[:, :3], r"additional_values must have the tokens of additional_keys, 5, got 3"),
        (TOKENS.double(), TOKENS, r"additional_keys is torch.float64, query torch.float32"),
        (TOKENS.to("meta"), TOKENS, r"additional_keys is on meta, query on cpu"),
    ],
)
def test_what_is_refused(keys, values, message):
    with pytest.raises(ArgumentError, match=message):
        nbhd.na2d(Q, Q, Q, 3, additional_keys=keys, additional_values=values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_both_ways_over_tokens_agree(monkeypatch, dtype, groups):
    """PyTorch's kernel, which is private and may go, and what is done without it."""
    q, k, v = torch.randn(2, 30, 4, 8), torch.randn(2, 7, 4 // groups, 8), torch.randn(2, 7, 4 // groups, 8)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    exact, exact_lse = dense.output_and_lse(q.double(), k.double(), v.double(), 0.3, False)
    monkeypatch.setattr(dense, "_suits_pytorchs", lambda *_: False)
    plain, plain_lse = dense.output_and_lse(q, k, v, 0.3, False)
    monkeypatch.undo()
    out, lse = dense.output_and_lse(q, k, v, 0.3, False)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (plain.shape, plain.dtype, plain_lse.shape, plain_lse.dtype)
    bound = 2 * (plain.double() - exact).abs().max().item() + 2 * torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= bound
    assert (lse.double() - exact_lse).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-4)


def test_parts_without_keys():
    """The first two of three parts have no key for a query, and then none has."""
    torch.manual_seed(0)
    outputs = [torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), torch.randn(1, 2, 1, 3)]
    lses = [torch.full((1, 2, 1), -math.inf), torch.full((1, 2, 1), -math.inf), torch.tensor([[[0.5], [-math.inf]]])]
    outputs[2][:, 1] = 0.0
    for t in (*outputs, *lses):
        t.requires_grad_()
    out, lse = nbhd.merge_attentions(outputs, lses)
    assert torch.equal(out, outputs[2])
    assert torch.equal(lse, lses[2])
    (out.sum() + lse[:, 0].sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in (*outputs, *lses))


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([Q], [Q[..., 0]], "two parts or more"),
        ([Q, Q], [Q[..., 0]], "Got 2 outputs and 1 log-sum-exps"),
        (Q, Q[..., 0], "two lists"),
        ([Q, 1], [Q[..., 0]] * 2, "must hold tensors"),
        ([Q, Q[:1]], [Q[..., 0]] * 2, "All parts must have one shape"),
    ],
)
def test_wrong_parts(outputs, lses, message):
    with pytest.raises(ArgumentError, match=message):
        nbhd.merge_attentions(outputs, lses)
