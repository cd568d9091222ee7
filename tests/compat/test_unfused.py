"""The unfused pair of every era against the loop."""

from __future__ import annotations

import math

import pytest
import torch

from nbhd.compat.natten import v0_14, v0_14_4, v0_15, v0_17, v0_20, v0_21
from nbhd.errors import ArgumentError
from tests.compat.loops import everywhere

#: Map, window, dilation of each number of axes: not square, lengths that are no multiples of the dilation.
SETTINGS = {1: ((11,), (3,), (3,)), 2: ((5, 7), (3, 3), (1, 2)), 3: ((3, 4, 5), (3, 3, 3), (1, 1, 1))}
PER_AXIS = {1: ((9,), (4,), (2,)), 2: ((4, 9), (3, 5), (1, 1)), 3: ((4, 3, 5), (2, 3, 5), (2, 1, 1))}


def tensors(spatial, heads=2, dim=3, batch=1, dtype=torch.float64):
    return tuple(torch.randn(batch, heads, *spatial, dim, dtype=dtype) for _ in range(3))


def truth(query, key, value, kernel_size, dilation, **options):
    """The loop on heads-first tensors: scores and outputs, heads first."""
    scores, out = everywhere(*(t.movedim(1, -2) for t in (query, key, value)), kernel_size, dilation, **options)
    return scores.movedim(-2, 1), out.movedim(-2, 1)


def check(qk, av, query, key, value, expected, tolerance=1e-12):
    scores = qk(query, key)
    assert scores.is_contiguous()
    torch.testing.assert_close(scores.double(), expected[0], rtol=tolerance, atol=tolerance)
    out = av(torch.softmax(scores, -1), value)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axes", [1, 2])
def test_up_to_0_14_4_the_window_follows_from_bias_and_attention(axes):
    spatial, kernel, _ = SETTINGS[axes]
    q, k, v = tensors(spatial)
    bias = torch.randn(2, *(2 * n - 1 for n in kernel), dtype=torch.float64)
    functional = v0_14_4.functional
    qkrpb, av = (getattr(functional, f"natten{axes}d{end}") for end in ("qkrpb", "av"))
    expected = truth(q, k, v, kernel, (2,) * axes if axes == 1 else (1, 1), bias=bias)
    dilation = 2 if axes == 1 else 1
    check(lambda a, b: qkrpb(a, b, bias, dilation), lambda a, b: av(a, b, dilation), q, k, v, expected)


@pytest.mark.parametrize("axes", [1, 2])
def test_autograd_functions_of_0_14_have_apply(axes):
    """Copies of NATTEN's own modules in public code call these instead of the functions around them."""
    spatial, kernel, _ = SETTINGS[axes]
    tensors_of = tensors(spatial)
    bias = torch.randn(2, *(2 * n - 1 for n in kernel), dtype=torch.float64)
    expected = truth(*tensors_of, kernel, (1,) * axes, bias=bias)
    for era, window in ((v0_14_4, (1,)), (v0_14, (3, 1))):
        q, k, v = (t.clone().requires_grad_() for t in tensors_of)
        qkrpb, av = (getattr(era.functional, f"NATTEN{axes}D{end}Function").apply for end in ("QKRPB", "AV"))
        check(lambda a, b: qkrpb(a, b, bias, *window), lambda a, b: av(a, b, *window), q, k, v, expected)  # noqa: B023
        av(torch.softmax(qkrpb(q, k, bias, *window), -1), v, *window).sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape for t in (q, k, v))


@pytest.mark.parametrize("era", [v0_14, v0_15, v0_17, v0_21])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", ["qkrpb", "qk"])
def test_natten_functions(era, axes, form):
    if era is v0_14 and axes == 3:
        assert not hasattr(era.functional, "natten3dav")  # three axes came with 0.15
        return
    spatial, kernel, _ = SETTINGS[axes]
    q, k, v = tensors(spatial)
    bias = torch.randn(2, *(2 * n - 1 for n in kernel), dtype=torch.float64) if form == "qkrpb" else None
    window = (3, 3, 1, 1) if axes == 3 else (3, 1)
    leading = () if form == "qk" else (bias,)
    qk, av = (getattr(era.functional, f"natten{axes}d{end}") for end in (form, "av"))
    expected = truth(q, k, v, kernel, (1,) * axes, bias=bias)
    check(lambda a, b: qk(a, b, *leading, *window), lambda a, b: av(a, b, *window), q, k, v, expected)


def test_three_axes_of_0_15_have_the_depth_apart():
    q, k, v = tensors((4, 5, 6))
    expected = truth(q, k, v, (2, 3, 3), (2, 1, 1))
    check(
        lambda a, b: v0_15.functional.na3d_qk(a, b, 2, 3, 2, 1),
        lambda a, b: v0_15.functional.na3d_av(a, b, 2, 3, 2, 1),
        q, k, v, expected,
    )  # fmt: skip


@pytest.mark.parametrize("era", [v0_17, v0_20, v0_21])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_0_17_takes_axes_apart_and_causal_ones(era, axes, causal):
    spatial, kernel, dilation = PER_AXIS[axes]
    flags = (causal,) + (False,) * (axes - 1)
    q, k, v = tensors(spatial, batch=2)
    qk, av = (getattr(era.functional, f"na{axes}d_{end}") for end in ("qk", "av"))
    expected = truth(q, k, v, kernel, dilation, causal=flags)
    assert torch.isneginf(expected[0]).any() == causal
    check(
        lambda a, b: qk(a, b, kernel, dilation, is_causal=flags),
        lambda a, b: av(a, b, list(kernel), list(dilation), None, flags),
        q, k, v, expected,
    )  # fmt: skip


def test_bias_of_0_17_and_of_0_15_by_their_names():
    q, k, v = tensors((5, 7))
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    expected = truth(q, k, v, (3, 3), (1, 1), bias=bias)[0]
    assert torch.allclose(v0_17.functional.na2d_qk(q, k, 3, rpb=bias), expected)
    assert torch.allclose(v0_15.functional.na2d_qk_with_bias(q, k, bias, 3, 1), expected)
    assert torch.allclose(v0_21.functional.na2d_qk_with_bias(q, k, bias=bias, kernel_size=3, dilation=1), expected)


@pytest.mark.parametrize("era", [v0_15, v0_17])
def test_additional_tokens_come_last(era):
    q, k, v = tensors((6, 5))
    more_k, more_v = torch.randn(2, 1, 2, 4, 3, dtype=torch.float64)
    scores = era.functional.na2d_qk(q, k, 3, 1, additional_keys=more_k)
    assert scores.shape == (1, 2, 6, 5, 9 + 4)
    assert torch.allclose(scores[..., :9], truth(q, k, v, (3, 3), (1, 1))[0])
    assert torch.allclose(scores[..., 9:], torch.einsum("bhxyd,bhnd->bhxyn", q, more_k))
    attn = torch.softmax(scores, -1)
    out = era.functional.na2d_av(attn, v, 3, 1, more_v)
    expected = era.functional.na2d_av(attn[..., :9], v, 3, 1) + torch.einsum("bhxyn,bhnd->bhxyd", attn[..., 9:], more_v)
    assert torch.allclose(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    q, k, v = (t.requires_grad_() for t in tensors((5,), heads=2, dim=2))
    more_k, more_v = (torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def pair(q, k, v, bias, more_k, more_v):
        scores = v0_17.functional.na1d_qk(q, k, 3, 1, more_k, causal, bias)
        return v0_17.functional.na1d_av(torch.softmax(scores, -1), v, 3, 1, more_v, causal)

    inputs = (q, k, v, bias, more_k, more_v)
    assert torch.autograd.gradcheck(pair, inputs)
    assert torch.autograd.gradgradcheck(pair, inputs)
    directions = tuple(torch.randn_like(t) for t in inputs)
    _, forward = torch.func.jvp(pair, inputs, directions)
    out, backward = torch.func.vjp(pair, *inputs)
    some = torch.randn_like(out)
    assert torch.allclose(
        (forward * some).sum(), sum((g * d).sum() for g, d in zip(backward(some), directions, strict=True))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = tensors((6, 7), dtype=dtype)
    bias = torch.randn(2, 5, 5)  # in its own dtype
    scores = v0_14.functional.natten2dqkrpb(q, k, bias, 3, 1)
    assert scores.dtype == dtype
    expected, _ = truth(q, k, v, (3, 3), (1, 1), bias=bias)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=tolerance)
    out = v0_14.functional.natten2dav(torch.softmax(scores, -1).float(), v, 3, 1)  # attention follows value
    assert out.dtype == dtype


def test_autocast_follows_the_active_dtype():
    q, k, v = tensors((6, 7), dtype=torch.float32)
    more_k, more_v = torch.randn(2, 1, 2, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        scores = v0_17.functional.na2d_qk(q, k, 3, 1, more_k)
        assert scores.dtype == torch.bfloat16
        assert v0_17.functional.na2d_av(torch.softmax(scores, -1), v, 3, 1, more_v).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_additional_tokens_are_compared_after_autocast(dtype):
    q, k, v = tensors((6, 7), dtype=torch.float32)
    more_k, more_v = torch.randn(2, 1, 2, 2, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for cast in (torch.float32, dtype):
            scores = v0_17.functional.na2d_qk(q.to(cast), k.to(cast), 3, 1, more_k.float())
            assert scores.dtype == torch.bfloat16
            attn = torch.softmax(scores, -1)
            assert v0_17.functional.na2d_av(attn, v.float(), 3, 1, more_v).dtype == torch.bfloat16
            assert v0_17.functional.na2d_av(attn, v.to(dtype), 3, 1, more_v.float()).dtype == torch.bfloat16
    with pytest.raises(ArgumentError, match=f"additional_keys is {dtype} on cpu, not torch.float32 on cpu"):
        v0_17.functional.na2d_qk(q, k, 3, 1, more_k)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_are_for_inference():
    small, large = tensors((5, 6)), tensors((7, 4))
    q, k, v = (torch.nested.nested_tensor([a[0:1], b[0:1]]) for a, b in zip(small, large, strict=True))
    scores = v0_17.functional.na2d_qk(q, k, 3)
    out = v0_17.functional.na2d_av(scores, v, 3)
    for n, (a, b, c) in enumerate((small, large)):
        alone = v0_17.functional.na2d_qk(a, b, 3)
        assert torch.equal(scores.unbind()[n], alone)
        assert torch.equal(out.unbind()[n], v0_17.functional.na2d_av(alone, c, 3))
    with pytest.raises(ArgumentError, match="inference only"):
        v0_17.functional.na2d_qk(q.requires_grad_(), k, 3)


def test_compiles_in_one_graph():
    def pair(q, k, v, bias):
        scores = v0_17.functional.na2d_qk(q, k, 3, 1, rpb=bias)
        return v0_17.functional.na2d_av(torch.softmax(scores, -1), v, 3)

    q, k, v = tensors((6, 7), dtype=torch.float32)
    bias = torch.randn(2, 5, 5)
    compiled = torch.compile(pair, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, bias), pair(q, k, v, bias), atol=1e-6)


def test_a_window_of_the_whole_axis_is_attention():
    q, k, _ = tensors((6,))
    scores = v0_17.functional.na1d_qk(q, k, 6)
    assert torch.allclose(scores, q @ k.transpose(-1, -2))
    assert math.prod(scores.shape) == 72
