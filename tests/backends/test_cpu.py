"""The native core against the reference in float64: output, log-sum-exp and every gradient."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbhd import geometry
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
    "wide-heads": ((12, 13), 2, 2, 128, 128, (7, 7), (1, 1), (1, 1), (False, False)),
    "very-wide-heads": ((8, 9), 1, 1, 300, 200, (5, 5), (1, 1), (1, 1), (False, False)),
    "column-blocks": ((12, 700), 2, 2, 64, 32, (7, 7), (1, 1), (1, 1), (False, False)),
    "row-blocks": ((130, 20), 1, 1, 16, 16, (7, 7), (1, 1), (1, 1), (False, False)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHORT = (torch.float32, torch.bfloat16, torch.float16)  # the truth of float64 is rounded itself
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


def assert_as_exact(names, ours, plain, truth, dtype):
    """The error of each of ``ours`` is at most twice that of plain PyTorch's in the same dtype, in root mean square."""
    # one rounding where plain torch happens to be exact; in float64 the truth is rounded itself
    unit = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    for what, o, p, t in zip(names, ours, plain, truth, strict=True):
        if t is None:
            assert o is None
            continue
        assert o.dtype == p.dtype and o.shape == p.shape and o.is_contiguous()
        seen = torch.isfinite(t)
        assert torch.equal(o[~seen].double(), t[~seen]), what  # minus infinity where a slot has no key
        (ours_rms, ours_max), (plain_rms, plain_max) = error(o[seen], t[seen]), error(p[seen], t[seen])
        assert ours_rms <= 2 * plain_rms + unit, what
        assert ours_max <= 4 * plain_max + 2 * unit, what  # no single element is off


def check_attention(name, dtype, bias):
    arguments = inputs(CASES[name], dtype, bias=bias)
    assert_as_exact(
        NAMES, run(cpu, *arguments), run(reference, *arguments), run(reference, *arguments, torch.float64), dtype
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype, bias):
    check_attention(name, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_the_unfused_pair_is_as_exact(name, dtype):
    (query, key, value, bias), (d_out, _), neighborhood = inputs(CASES[name], dtype)
    scale = query.shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(1)
    weights, d_scores = (
        torch.randn(*query.shape[:-1], neighborhood.slots, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    given = (query, key, value, bias, d_out, weights, d_scores)

    def both(backend, query, key, value, bias, d_out, weights, d_scores):
        return (
            backend.scores(query, key, bias, neighborhood, scale),
            *backend.scores_backward(d_scores, query, key, bias, neighborhood, scale),
            backend.weighted_sum(weights, value, neighborhood),
            *backend.weighted_sum_backward(d_out, weights, value, neighborhood),
        )

    names = ("scores", "d_query", "d_key", "d_rel_pos_bias", "sum", "d_weights", "d_value")
    truth = both(reference, *(t.double() for t in given))
    assert_as_exact(names, both(cpu, *given), both(reference, *given), truth, dtype)


def test_a_prepared_call_outlives_the_cache_of_its_tables():
    query = torch.randn(1, 40, 1, 8)
    kept = cpu.prepare(query, query, query, Neighborhood((5,), (1,), (1,), (False,)), 1.0)
    before, _ = kept.forward(query, query, query, None, False)
    for length in range(41, 41 + 600):
        other = torch.randn(1, length, 1, 8)
        cpu.forward(other, other, other, None, Neighborhood((5,), (1,), (1,), (False,)), 1.0)
    assert torch.equal(kept.forward(query, query, query, None, False)[0], before)


@pytest.mark.parametrize("name", ["stage3", "volume", "row-blocks", "column-blocks", "sequence"])
def test_same_bits_at_any_thread_count(name):
    arguments = inputs(CASES[name], torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(cpu, *arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tensors_that_no_cache_holds(dtype):
    """Their heads are computed together, in narrow blocks, by the cuts that every user gets."""
    batch = 16 if dtype == torch.float32 else 32
    case = ((9, 65), 8, 8, 32, 32, (3, 3), (1, 1), (1, 1), (False, False))
    arguments = inputs(case, dtype, batch=batch)
    query = arguments[0][0]
    assert 4 * query.nbytes > 32 << 20
    plain, truth = run(reference, *arguments), run(reference, *arguments, torch.float64)
    for what, t, p, o in zip(NAMES, truth, plain, run(cpu, *arguments), strict=True):
        assert error(o, t)[0] <= 2 * error(p, t)[0] + 2 * torch.finfo(dtype).eps, what


def test_strided_tensors_give_the_same_bits_as_dense_ones():
    (query, key, value, bias), gradients, neighborhood = inputs(CASES["stage3"], torch.float32)

    def heads_first(t):  # heads outside in memory, the same values
        return t.movedim(-2, 1).contiguous().movedim(1, -2)

    qkv = torch.cat([query, key, value], -1)  # the three side by side, as one product gives them
    dense = run(cpu, (query, key, value, bias), gradients, neighborhood)
    for tensors in (tuple(map(heads_first, (query, key, value))), qkv.split(query.shape[-1], -1)):
        assert not any(t.is_contiguous() for t in tensors)
        found = run(cpu, (*tensors, bias), gradients, neighborhood)
        assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))


def test_expanded_gradient_is_read_by_its_strides():
    tensors, (d_out, d_lse), neighborhood = inputs(CASES["window3"], torch.float32)
    d_out = d_out[:1, :1, :1, :1].expand_as(d_out)
    assert d_out.stride(0) == 0
    found = run(cpu, tensors, (d_out, d_lse), neighborhood)
    dense = run(cpu, tensors, (d_out.contiguous(), d_lse), neighborhood)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_bad_key_spoils_the_queries_that_see_it_and_no_other(number):
    (query, key, value, bias), _, neighborhood = inputs(CASES["prime-sides"], torch.float32, batch=1)
    clean, _ = cpu.forward(query, key, value, bias, neighborhood, 0.25)
    key, value = key.clone(), value.clone()
    key[0, 8, 15], value[0, 8, 15] = number, number
    out, lse = cpu.forward(query, key, value, bias, neighborhood, 0.25)
    seen = torch.zeros(17, 31, dtype=torch.bool)
    seen[6:11, 13:18] = True
    assert not torch.isfinite(out[0][seen]).any()
    assert torch.equal(out[0][~seen], clean[0][~seen]) and torch.isfinite(lse[0][~seen]).all()


def test_large_scores_do_not_overflow():
    (query, key, value, bias), _, neighborhood = inputs(CASES["stage3"], torch.float32)
    out, lse = cpu.forward(query * 1e4, key, value, bias, neighborhood, 1.0)
    truth, truth_lse = reference.forward(
        (query * 1e4).double(), key.double(), value.double(), bias.double(), neighborhood, 1.0
    )
    assert torch.allclose(lse.double(), truth_lse, rtol=1e-5)
    assert (out - truth).abs().mean() < 1e-2  # near ties may fall the other way


def check_a_common_part(name, dtype, amplitude=1.0):
    """Scores that are large, and a part that all products of values and gradients have in common: it must cancel."""
    (query, key, value, bias), (d_out, d_lse), neighborhood = inputs(CASES[name], dtype)
    arguments = (query * amplitude, key, value + 2, bias), (d_out + 2, d_lse), neighborhood
    truth = run(reference, *arguments, torch.float64)
    assert_as_exact(NAMES, run(cpu, *arguments), run(reference, *arguments), truth, dtype)


@pytest.mark.parametrize("amplitude", [1.0, 10.0])
@pytest.mark.parametrize("dtype", SHORT, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["stage1", "window3", "causal-rows", "sequence-long-window"])
def test_a_common_part_leaves_gradients_as_exact(name, dtype, amplitude):
    check_a_common_part(name, dtype, amplitude)


def test_scores_of_any_size_give_weights_that_add_up_to_one():
    """The log-sum-exp of such scores is exact to thousands at best, and gradients are of weights all the same."""
    (query, key, _, _), _, neighborhood = inputs(CASES["stage3"], torch.float32)
    ones = torch.ones_like(query)
    for size in (1e5, 1e8, 1e12, 1e20):
        found = run(cpu, (query * size, key, ones, None), (ones, torch.zeros_like(ones[..., 0])), neighborhood)
        assert torch.allclose(found[0], ones), size
        assert torch.allclose(found[4].sum(), ones.sum(), rtol=1e-4), size  # d_value: each weight once


@pytest.mark.parametrize("offset", ["lowest", "infinite", -1e31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["stage3", "causal-both-strided", "sequence-causal-strided"])
def test_a_head_whose_bias_is_the_lowest_number(name, dtype, offset):
    """Of equal scores all weights are equal, as large as they may be; without any score there is nothing to weigh."""
    (query, key, value, bias), gradients, neighborhood = inputs(CASES[name], dtype)
    bias[0] = {"lowest": torch.finfo(dtype).min, "infinite": -torch.inf}.get(offset, offset)
    arguments = (query, key, value, bias), gradients, neighborhood
    for what, found, expected in zip(NAMES, run(cpu, *arguments), run(reference, *arguments), strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite()), what
        if what == "lse":  # in units of log2 the lowest number is less
            found, expected = found[..., 1:], expected[..., 1:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("length", [20, 24, 28])
def test_lanes_without_a_query_leave_the_bias_gradient_alone(length):
    """The last queries fill no vector, and what its other lanes hold may overflow."""
    query, key, value = (torch.randn(1, length, 1, 4) for _ in range(3))
    d_out, bias = torch.randn(1, length, 1, 4), torch.zeros(1, 3)
    d_out[0, 16], value[0, 18:], value[0, 15:17], d_out[0, 17:] = 1e20, 1e20, 0.0, 1e-20
    arguments = (query, key, value, bias), (d_out, torch.zeros(1, length, 1)), Neighborhood((2,), (1,), (1,), (False,))
    found, expected = run(cpu, *arguments)[-1], run(reference, *arguments)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_call_outlives_the_cache_of_its_tables(monkeypatch):
    """Another thread may push them out of the cache after the call's numbers have been written."""
    weights, value = torch.rand(1, 40, 1, 5), torch.randn(1, 40, 1, 8)
    neighborhood = Neighborhood((5,), (1,), (1,), (False,))
    before = cpu.weighted_sum(weights, value, neighborhood)
    aligned, rubbish = cpu._aligned, []

    def forgetting(tensor):
        cpu._geometry.cache_clear()
        geometry.axis_table.cache_clear()
        rubbish.extend(torch.full((40,), -7) for _ in range(8))
        return aligned(tensor)

    monkeypatch.setattr(cpu, "_aligned", forgetting)
    assert torch.equal(cpu.weighted_sum(weights, value, neighborhood), before)


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("readelf") is None, reason="there is no readelf to look into the library"
)
def test_the_library_shows_its_interface_and_needs_the_c_library_alone():
    """No torch, no OpenMP, no C++ runtime: one file for every one of them."""

    def readelf(option):
        command = ["readelf", "--wide", option, str(cpu.loaded_library().path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = re.findall(r"NEEDED.*\[(.+?)\.so", readelf("--dynamic"))
    assert set(needed) <= {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    lines = [line.split() for line in readelf("--dyn-syms").splitlines()]
    shown = {line[7] for line in lines if len(line) == 8 and line[4] in ("GLOBAL", "WEAK") and line[6].isdigit()}
    header = Path(__file__).parents[2] / "csrc" / "include" / "nbhd.h"
    assert shown == set(re.findall(r"NBHD_API[^;]*?(nbhd_\w+)\(", header.read_text()))


#: Of the cases, those that each instruction set is held to; the machine's own is held to all.
OF_EACH_SET = ("stage3", "window-is-map", "even-window", "window13", "dilated-odd-channels", "causal-both-strided",
               "sequence-long-window", "video-causal", "very-wide-heads")  # fmt: skip


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "baseline", "neon"])
def test_each_instruction_set_is_as_exact(isa):
    program = (
        "import sys; from tests.backends.test_cpu import *\n"
        "reason = cpu.why_unusable()\n"
        "if reason: print('none', reason); sys.exit()\n"
        "for name in OF_EACH_SET:\n"
        "    for dtype in DTYPES: check_attention(name, dtype, True)\n"
        "    for dtype in SHORT: check_a_common_part(name, dtype)\n"
        "print(cpu.description().split(',')[0])"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "NBHD_CPU_ISA": isa, "PYTHONPATH": root}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("none"):
        assert f"NBHD_CPU_ISA={isa!r}" in done.stdout
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip() == isa
