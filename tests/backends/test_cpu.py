"""The native core against the reference in float64: output, log-sum-exp and every gradient."""

from __future__ import annotations

import pytest
import torch

from nbhd.backends import cpu, reference
from nbhd.geometry import Neighborhood

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")

# spatial, heads, kv_heads, dim, dim_v, kernel_size, stride, dilation, is_causal
CASES = {
    "stage1": ((56, 56), 2, 2, 32, 32, (7, 7), (1, 1), (1, 1), (False, False)),
    "stage3": ((14, 14), 3, 3, 32, 32, (7, 7), (1, 1), (1, 1), (False, False)),
    "window-is-map": ((7, 7), 4, 4, 32, 32, (7, 7), (1, 1), (1, 1), (False, False)),
    "prime-sides": ((17, 31), 2, 2, 16, 16, (5, 5), (1, 1), (1, 1), (False, False)),
    "window3": ((9, 13), 2, 2, 8, 8, (3, 3), (1, 1), (1, 1), (False, False)),
    "window13": ((15, 40), 1, 1, 64, 64, (13, 13), (1, 1), (1, 1), (False, False)),
    "even-window": ((12, 15), 2, 2, 16, 16, (4, 6), (1, 1), (1, 1), (False, False)),
    "window1": ((5, 6), 2, 2, 16, 16, (1, 1), (1, 1), (1, 1), (False, False)),
    "dilated-odd-channels": ((20, 24), 4, 2, 12, 20, (5, 3), (1, 1), (2, 3), (False, False)),
    "strided": ((20, 24), 4, 1, 5, 3, (5, 3), (2, 3), (2, 3), (False, False)),
    "blocked": ((12, 16), 2, 2, 16, 16, (4, 4), (4, 4), (1, 1), (False, False)),
    "causal-rows": ((10, 24), 2, 2, 16, 16, (5, 3), (1, 1), (2, 3), (True, False)),
    "causal-both-strided": ((20, 24), 4, 1, 24, 20, (5, 4), (3, 4), (2, 3), (True, True)),
    "sequence": ((100,), 2, 1, 24, 24, (17,), (1,), (2,), (False,)),
    "sequence-causal-strided": ((100,), 2, 1, 24, 24, (17,), (3,), (2,), (True,)),
    "sequence-long-window": ((400,), 1, 1, 16, 16, (300,), (1,), (1,), (False,)),
    "sequence-large-dilation": ((300,), 1, 1, 16, 16, (5,), (1,), (60,), (False,)),
    "volume": ((6, 9, 18), 2, 1, 24, 24, (3, 5, 4), (1, 1, 1), (1, 1, 2), (False, False, False)),
    "video-causal": ((6, 9, 18), 2, 1, 24, 24, (3, 5, 4), (1, 2, 3), (1, 1, 2), (True, False, False)),
    "column-blocks": ((12, 700), 2, 2, 64, 32, (7, 7), (1, 1), (1, 1), (False, False)),
    "row-blocks": ((130, 20), 1, 1, 16, 16, (7, 7), (1, 1), (1, 1), (False, False)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_rel_pos_bias")


def inputs(case, dtype, *, batch=2, bias=True):
    spatial, heads, kv_heads, dim, dim_v, kernel_size, stride, dilation, is_causal = case
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    real = torch.float64 if dtype == torch.float64 else torch.float32
    query, key = randn(batch, *spatial, heads, dim), randn(batch, *spatial, kv_heads, dim)
    value, d_out = randn(batch, *spatial, kv_heads, dim_v), randn(batch, *spatial, heads, dim_v)
    d_lse = randn(batch, *spatial, heads, kind=real)
    rel_pos_bias = randn(heads, *(2 * k - 1 for k in kernel_size), kind=real) if bias else None
    return (query, key, value, rel_pos_bias), (d_out, d_lse), Neighborhood(kernel_size, stride, dilation, is_causal)


def run(backend, tensors, gradients, neighborhood, dtype=None):
    def cast(tensor):
        return tensor if tensor is None or dtype is None else tensor.to(dtype)

    query, key, value, bias = map(cast, tensors)
    d_out, d_lse = map(cast, gradients)
    scale = query.shape[-1] ** -0.5
    out, lse = backend.forward(query, key, value, bias, neighborhood, scale)
    return out, lse, *backend.backward(d_out, d_lse, query, key, value, bias, out, lse, neighborhood, scale)


def error(result, truth):
    """Root mean square and largest deviation, each relative to the same norm of the truth."""
    off = result.double() - truth
    return (off.norm() / truth.norm()).item(), (off.abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype, bias):
    arguments = inputs(CASES[name], dtype, bias=bias)
    truth = run(reference, *arguments, torch.float64)
    plain = run(reference, *arguments)
    ours = run(cpu, *arguments)
    # two roundings where plain torch happens to be exact; in float64 the truth is rounded itself
    unit = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 2)
    for what, t, p, o in zip(NAMES, truth, plain, ours, strict=True):
        if t is None:
            assert o is None
            continue
        assert o.dtype == p.dtype and o.shape == p.shape and o.is_contiguous()
        (ours_rms, ours_max), (plain_rms, plain_max) = error(o, t), error(p, t)
        assert ours_rms <= 2 * plain_rms + unit, what
        assert ours_max <= 8 * plain_max + 8 * unit, what  # no single element is off
