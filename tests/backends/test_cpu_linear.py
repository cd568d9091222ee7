"""Linear layers of the native core: as exact as PyTorch's with every instruction set, the same bits at any threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nbhd.backends import cpu, cpu_linear
from nbhd.backends.cpu_linear import Layer, Norm, PreparedLayers

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")

#: Rows, inputs, hidden, outputs: NAT's, none that is a multiple of anything, many inputs.
SHAPES = ((196, 64, 192, 64), (131, 300, 520, 77), (3, 7, 0, 33), (40, 1024, 0, 300), (57, 96, 260, 2048))


def check(shape: tuple[int, int, int, int], gelu: bool, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    rows, features, hidden, out = shape
    batch, residual = (2 * torch.randn(rows, features) + 0.5).to(dtype), torch.randn(rows, out).to(dtype)
    scale = torch.randn(out)
    norm = torch.randn(features).to(dtype), torch.randn(features).to(dtype)
    sizes = [(hidden, features), (out, hidden)] if hidden else [(out, features)]
    layers = [((torch.randn(size) / size[1] ** 0.5).to(dtype), torch.randn(size[0]).to(dtype)) for size in sizes]

    def by_pytorch(dtype: torch.dtype) -> Tensor:
        x = functional.layer_norm(batch.to(dtype), (features,), *(t.to(dtype) for t in norm), 1e-5)
        for i, layer in enumerate(layers):
            x = functional.linear(x, *(t.to(dtype) for t in layer))
            x = functional.gelu(x) if i < len(layers) - 1 or gelu else x
        return residual.to(dtype) + scale.to(dtype) * x

    packed = [Layer(cpu_linear.pack(weight), weight, bias) for weight, bias in layers]
    call = PreparedLayers(packed[-1], packed[0] if hidden else None, Norm(*norm, 1e-5), gelu)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(batch, scale, residual))
        torch.set_num_threads(1)
        truth, theirs = by_pytorch(torch.float64), by_pytorch(dtype)
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None and all(torch.equal(found[0], other) for other in found)  # type: ignore[arg-type]
    ours, error = ((x.double() - truth).square().mean().sqrt() for x in (found[0], theirs))
    assert ours <= 2 * error, (shape, gelu, float(ours / error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(shape: tuple[int, int, int, int], gelu: bool, dtype: torch.dtype) -> None:
    check(shape, gelu, dtype)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "baseline", "neon"])
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import sys, torch; from tests.backends.test_cpu_linear import SHAPES, check, cpu\n"
        "reason = cpu.why_unusable()\n"
        "if reason: print('none', reason); sys.exit()\n"
        "for shape in SHAPES:\n"
        "    for gelu in (False, True):\n"
        "        for dtype in (torch.float32, torch.bfloat16): check(shape, gelu, dtype)\n"
        "print(cpu.description().split(',')[0])"
    )
    environment = {**os.environ, "NBHD_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("none"):
        assert f"NBHD_CPU_ISA={isa!r}" in done.stdout
        pytest.skip(f"this machine has no {isa}")
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("features", [1, 6, 7])
def test_packed_in_pairs(monkeypatch: pytest.MonkeyPatch, features: int) -> None:
    """Two inputs of an output side by side where products are of bfloat16; zeros past the last ones."""
    monkeypatch.setattr(cpu_linear, "product_dtype", lambda dtype: dtype)
    weight = torch.randn(40, features).bfloat16()
    packed = cpu_linear.pack(weight)
    assert packed.shape == (2, -(-features // 2), 32, 2) and packed.dtype == torch.bfloat16 and packed.is_contiguous()
    for out, k in ((0, 0), (31, features - 1), (32, 0), (39, features - 1)):
        assert packed[out // 32, k // 2, out % 32, k % 2] == weight[out, k]
    assert packed.count_nonzero() == weight.count_nonzero()


def test_who_multiplies_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cpu_linear.product_dtype.__wrapped__
    for isa, dtype, expected in (
        ("avx512bf16", torch.bfloat16, torch.bfloat16), ("avx512bf16", torch.float32, torch.float32),
        ("avx512bf16", torch.float16, torch.float32), ("avx512", torch.bfloat16, torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(cpu.loaded_library(), "isa", isa)
        assert asked(dtype) == expected


def test_gelu_everywhere() -> None:
    none = [float("inf"), float("-inf"), float("nan")]  # infinity times nothing is no number, as in PyTorch's vectors
    x = torch.cat([torch.linspace(-8, 8, 400_001), torch.tensor([0.0, -0.0, 1e30, -1e30, *none])])
    one = torch.ones(1, 1)
    layer = Layer(cpu_linear.pack(one), one, None)
    ours = PreparedLayers(layer, None, None, True)(x[:, None], None, None)
    assert ours is not None
    truth, theirs = functional.gelu(x.double()), functional.gelu(x)
    ours = ours[:, 0]
    assert torch.equal(ours.isnan(), ~x.isfinite())
    small = x.abs() <= 8
    worst = [(y[small] - truth[small]).abs().max() for y in (ours, theirs)]
    assert worst[0] <= 2 * worst[1]


def test_a_weight_that_is_another_is_noticed() -> None:
    weight, batch = torch.randn(40, 50), torch.randn(5, 50)
    layer = Layer(cpu_linear.pack(weight), weight, None)
    call = PreparedLayers(layer, None, None, False)
    expected = call(batch, None, None)
    torch.testing.assert_close(expected, batch @ weight.T, rtol=1e-4, atol=1e-5)
    weight += 1
    with pytest.raises(cpu_linear.Stale):
        call(batch, None, None)


def test_memory_at_odd_bytes_is_left_to_pytorch() -> None:
    weight = torch.randn(40, 50)
    layer = Layer(cpu_linear.pack(weight), weight, None)
    call = PreparedLayers(layer, None, None, False)
    odd = torch.frombuffer(bytearray(1 + 4 * 100), dtype=torch.float32, offset=1, count=100).view(2, 50)
    assert odd.data_ptr() % 4 and call(odd, None, None) is None
