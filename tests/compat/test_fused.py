"""Fused calls of 0.17 and later: argument orders, extra tokens, log-sum-exps, knobs."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

from nbhd.compat.natten import v0_17, v0_20, v0_21, v0_21_1
from nbhd.errors import ArgumentError
from tests import truth
from tests.compat.loops import everywhere

AFTER = [v0_20, v0_21_1, v0_21]


def tensors(spatial=(6, 7), heads=2, kv_heads=None, dim=4, dtype=torch.float64):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return tuple(torch.randn(1, *spatial, h, dim, dtype=dtype) for h in shapes)


def test_the_fifth_argument_is_the_dilation_in_0_17_and_the_stride_after():
    q, k, v = tensors()
    dilated = truth.attention(q, k, v, (3, 3), (1, 1), (2, 2), (False, False))[0]
    strided = truth.attention(q, k, v, (3, 3), (2, 2), (1, 1), (False, False))[0]
    assert torch.allclose(v0_17.functional.na2d(q, k, v, 3, 2), torch.from_numpy(dilated))
    for era in AFTER:
        assert torch.allclose(era.na2d(q, k, v, 3, 2), torch.from_numpy(strided))
        assert torch.allclose(era.na2d(q, k, v, 3, 1, 2), torch.from_numpy(dilated))


def test_0_17_takes_causal_then_bias_then_scale():
    q, k, v = tensors((9,))
    bias = torch.randn(2, 5, dtype=torch.float64)
    expected, _, _ = truth.attention(q, k, v, (3,), (1,), (2,), (False,), 0.3, bias)
    assert torch.allclose(v0_17.functional.na1d(q, k, v, 3, 2, False, bias, 0.3), torch.from_numpy(expected))
    expected, _, _ = truth.attention(q, k, v, (3,), (1,), (2,), (True,))
    assert torch.allclose(v0_17.functional.na1d(q, k, v, 3, 2, True), torch.from_numpy(expected))


@pytest.mark.parametrize("era", AFTER)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_option_at_once(era, axes):
    spatial, kernel, stride, dilation, causal = (
        part[:axes] for part in ((8, 7, 4), (3, 2, 3), (2, 1, 3), (2, 3, 1), (True, False, False))
    )
    q, k, v = tensors(spatial, heads=4, kv_heads=2)
    expected, lse, _ = truth.attention(q, k, v, kernel, stride, dilation, causal, 0.7)
    call = getattr(era, f"na{axes}d")
    out, found = call(q, k, v, kernel, stride, dilation, causal, 0.7, return_lse=True)
    assert torch.allclose(out, torch.from_numpy(expected))
    assert torch.allclose(found, torch.from_numpy(lse))
    assert torch.equal(
        era.functional.neighborhood_attention_generic(q, k, v, kernel, stride, dilation, causal, 0.7), out
    )
    assert call(q, k, v, kernel, stride=None, dilation=None, is_causal=None).shape == out.shape  # None: the default


def test_scale_0_is_0():
    q, k, v = tensors((5,))
    mean = v.unfold(1, 5, 1).mean(-1).expand_as(v)  # equal scores: the mean of the values
    assert torch.allclose(v0_21.na1d(q, k, v, 5, scale=0.0), mean)
    assert torch.allclose(v0_21.attention(q, k, v, scale=0.0), mean)
    assert torch.allclose(v0_17.functional.na1d(q, k, v, 5, scale=0.0), mean)


def joined(q, k, v, more_k, more_v, scale):
    """The loop's scores with those of the additional tokens behind, one softmax over all."""
    scores, _ = everywhere(q, k, v, (3, 3), (1, 1), scale=scale)
    extra = scale * torch.einsum("bxyhd,bnhd->bxyhn", q, more_k)
    weights = torch.softmax(torch.cat([scores, extra], -1), -1)
    out = torch.einsum("bxyhn,bnhd->bxyhd", weights[..., 9:], more_v)
    first = v0_17.functional.na2d_av(weights[..., :9].movedim(-2, 1), v.movedim(-2, 1), 3).movedim(1, -2)
    return out + first, torch.logsumexp(torch.cat([scores, extra], -1), -1)


@pytest.mark.parametrize("scale", [None, 0.4])
def test_additional_tokens(scale):
    q, k, v = tensors()
    more_k, more_v = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64)
    expected, lse = joined(q, k, v, more_k, more_v, scale or 0.5)
    out, found = v0_21.na2d(q, k, v, 3, scale=scale, additional_keys=more_k, additional_values=more_v, return_lse=True)
    assert torch.allclose(out, expected)
    assert torch.allclose(found, lse)
    before = v0_17.functional.na2d(q, k, v, 3, scale=scale, additional_keys=more_k, additional_values=more_v)
    assert torch.allclose(before, expected)


def test_gradients_with_additional_tokens_and_log_sum_exp():
    q, k, v = (t.requires_grad_() for t in tensors((4,), heads=2, kv_heads=1, dim=2))
    more_k, more_v = (torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(q, k, v, more_k, more_v):
        return v0_21.na1d(q, k, v, 3, additional_keys=more_k, additional_values=more_v, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, more_k, more_v))


def test_half_precision_with_additional_tokens_and_autocast():
    q, k, v = tensors(dtype=torch.bfloat16)
    more = torch.randn(1, 3, 2, 4, dtype=torch.bfloat16)
    out, lse = v0_21.na2d(q, k, v, 3, additional_keys=more, additional_values=more, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    expected, _ = joined(*(t.double() for t in (q, k, v, more, more)), 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = v0_21.na2d(
            *(t.float() for t in (q, k, v)), 3, additional_keys=more.float(), additional_values=more.float()
        )
    assert cast.dtype == torch.bfloat16


@pytest.mark.parametrize("era", [v0_17.functional, v0_21])
def test_additional_tokens_are_compared_after_autocast(era):
    q, k, v = tensors(dtype=torch.float32)
    more = torch.randn(1, 3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = era.na2d(q, k, v, 3, additional_keys=more.bfloat16(), additional_values=more.bfloat16())
        for inputs in ((q, k, v), tuple(t.bfloat16() for t in (q, k, v))):
            out = era.na2d(*inputs, 3, additional_keys=more, additional_values=more.bfloat16())
            assert torch.equal(out, expected)
    with pytest.raises(ArgumentError, match=r"additional_values is torch.bfloat16, query torch.float32"):
        era.na2d(q, k, v, 3, additional_keys=more, additional_values=more.bfloat16())


def test_no_additional_tokens_in_float16():
    """The sum of so many float16 is infinite, and 0 * inf is no number."""
    q = torch.ones(1, 24, 24, 8, 16, dtype=torch.float16, requires_grad=True)
    none = torch.ones(1, 0, 8, 16, dtype=torch.float16)
    out = v0_21.na2d(q, q, q, 3, additional_keys=none, additional_values=none)
    assert torch.equal(out, v0_21.na2d(q, q, q, 3))
    assert torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


def test_shapes_on_the_meta_device():
    q, k, v = (t.to("meta") for t in tensors())
    more = torch.empty(1, 3, 2, 4, dtype=torch.float64, device="meta")
    out, lse = v0_21.na2d(q, k, v, 3, additional_keys=more, additional_values=more, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])


def test_signatures_are_those_of_the_era():
    def names(function):
        return list(inspect.signature(function).parameters)

    head = ["query", "key", "value", "kernel_size"]
    after = ["stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values", "attention_kwargs"]
    assert names(v0_17.functional.na2d)[:8] == [*head, "dilation", "is_causal", "rpb", "scale"]
    assert names(v0_17.functional.na3d_qk) == [
        "query",
        "key",
        *head[3:],
        "dilation",
        "additional_keys",
        "is_causal",
        "rpb",
    ]
    for era in AFTER:
        for call in (era.na1d, era.na2d, era.na3d, era.functional.neighborhood_attention_generic):
            assert names(call)[:11] == head + after
    assert ("try_fuse_additional_kv" in names(v0_20.na2d)) and ("try_fuse_additional_kv" not in names(v0_21.na2d))
    assert names(v0_20.attention)[3] == names(v0_21_1.attention)[3] == "scale"
    assert names(v0_21.attention)[3:5] == ["is_causal", "scale"]


KNOBS = {
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 8),
    "backward_q_tile_shape": (8, 8),
    "backward_kv_tile_shape": (8, 8),
    "backward_kv_splits": (1, 1),
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": "coop",
    "torch_compile": True,
    "attention_kwargs": {"backend": "cutlass-fmha"},
    "backend": "hopper-fna",
}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_changes_nothing_and_says_so_once(knob):
    q, k, v = tensors()
    plain = v0_21.na2d(q, k, v, 3)
    with pytest.warns(UserWarning, match=f"(?s){knob}.*no effect"):
        assert torch.equal(v0_21.na2d(q, k, v, 3, **{knob: KNOBS[knob]}), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v0_21.na2d(q, k, v, 3, **{knob: KNOBS[knob]})
        v0_21.na2d(q, k, v, 3, run_persistent_kernel=True, backward_kv_splits=None)


def test_backends_by_name():
    q, k, v = tensors()
    plain = v0_21.na2d(q, k, v, 3)
    assert torch.allclose(v0_21.na2d(q, k, v, 3, backend="reference"), plain)
    assert torch.equal(v0_21.na2d(q, k, v, 3, backend="nbhd"), plain)
    with pytest.raises(NotImplementedError, match="Unrecognized NATTEN backend cutlas-fna"):
        v0_21.na2d(q, k, v, 3, backend="cutlas-fna")
    with pytest.raises(NotImplementedError, match="Unrecognized NATTEN FMHA backend x"):
        v0_21.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), backend="x")
    with pytest.raises(ArgumentError, match=r"Kernel schedule fast is invalid; choices are: `non`"):
        v0_21.na2d(q, k, v, 3, kernel_schedule="fast")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
def test_compiles_in_one_graph():
    q, k, v = tensors(dtype=torch.float32)
    more = torch.randn(1, 3, 2, 4, requires_grad=True)  # one tensor, twice

    def call(q, k, v, more):
        return v0_21.na2d(q, k, v, 3, additional_keys=more, additional_values=more, backend="cutlass-fna")

    compiled = torch.compile(call, backend="eager", fullgraph=True)(q, k, v, more)
    with pytest.warns(UserWarning, match="cutlass-fna"):
        assert torch.allclose(compiled, call(q, k, v, more), atol=1e-6)
