"""Products in 16 bits are made in float32 where PyTorch's are slow, with its dtypes, derivatives and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nbhd import _processor
from nbhd.nn import linear, sixteen_bits
from nbhd.nn.convolution import Conv2d
from nbhd.nn.linear import Linear


@pytest.fixture(params=["slow", "fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """As if PyTorch's products in 16 bits were slow on this machine, or not."""
    monkeypatch.setattr(sixteen_bits, "are_slow", lambda dtype: request.param == "slow")
    monkeypatch.setattr(linear, "_keeps_up", lambda dtype: False)
    monkeypatch.setattr(sixteen_bits, "least_products", lambda dtype: 1)
    yield request.param == "slow"


def dtypes_given_to(
    name: str, monkeypatch: pytest.MonkeyPatch, seen: list[torch.dtype] | None = None
) -> list[torch.dtype]:
    """Those of the inputs that a function of PyTorch's gets from now on."""
    found: list[torch.dtype] = [] if seen is None else seen
    real = getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda x, *rest: (found.append(x.dtype), real(x, *rest))[1])
    return found


def slow_from(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 16 bits were slow, and float32 paid from so many products for each number that is converted."""
    monkeypatch.setattr(sixteen_bits, "are_slow", lambda dtype: True)
    monkeypatch.setattr(sixteen_bits, "least_products", lambda dtype: least)


LAYERS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "linear": (lambda: Linear(48, 33), (3, 5, 48)),
    "linear without a bias": (lambda: Linear(48, 33, bias=False), (150, 48)),
    "convolution": (lambda: Conv2d(8, 20, 3, 2, 1), (2, 8, 13, 9)),
    "grouped convolution": (lambda: Conv2d(8, 16, (1, 3), groups=4, bias=False, padding_mode="reflect"), (2, 8, 5, 9)),
    "unbatched convolution": (lambda: Conv2d(8, 16, 3, padding="same"), (8, 5, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "autocast of float32"])
def test_16_bits_are_as_exact(name: str, how: str, slow: bool) -> None:
    """In the dtypes that PyTorch's layers have, values and gradients."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    of_batch = {"float16": torch.float16, "autocast of float32": torch.float32}.get(how, torch.bfloat16)
    of_layer = torch.float32 if how.startswith("autocast") else of_batch
    layer = make().to(of_layer)
    batch = torch.randn(shape).to(of_batch)
    gradient = torch.randn_like(layer.double()(batch.double()))
    layer.to(of_layer)

    def results(run: Callable, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaf = batch.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=how.startswith("autocast") and dtype is None):
            output = run(leaf)
        layer.zero_grad()
        output.backward(gradient.to(output.dtype))
        gradients = [leaf.grad, *(p.grad for p in layer.parameters())]
        return [output.detach(), *(g.clone() for g in gradients if g is not None)]  # layers take theirs to other dtypes

    plain = super(type(layer), layer).forward
    found, theirs = results(layer), results(plain)
    layer.double()
    truth = results(plain, torch.float64)
    assert [t.dtype for t in found] == [t.dtype for t in theirs]
    for ours, other, exactly in zip(found, theirs, truth, strict=True):
        error, expected = ((x.double() - exactly).square().mean().sqrt() for x in (ours, other))
        assert error <= 1.1 * expected


def test_16_bits_run_in_float32_where_they_are_slow(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    for name in ("linear", "conv2d"):
        dtypes_given_to(name, monkeypatch, seen)
    for make, shape in LAYERS.values():
        make().bfloat16()(torch.randn(shape).bfloat16())
    expected = torch.float32 if slow else torch.bfloat16
    assert seen == [expected] * len(LAYERS)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        for make, shape in LAYERS.values():
            assert make()(torch.randn(shape)).dtype == torch.bfloat16
    assert seen == [torch.float32] * len(LAYERS)  # what they are given
    seen.clear()
    for make, shape in LAYERS.values():
        layer = make().bfloat16()
        for other in (torch.float32, torch.float16):
            with pytest.raises(RuntimeError):
                layer(torch.randn(shape).to(other))  # which PyTorch's error explains
        layer.weight = nn.Parameter(layer.weight.double())
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):  # it leaves float64 alone
            layer(torch.randn(shape))
        plain = torch.export.export(make().bfloat16(), (torch.randn(shape).bfloat16(),)).graph
        targets = [str(node.target) for node in plain.nodes if node.op == "call_function"]
        assert len([t for t in targets if "linear" in t or "conv" in t]) == 1
        assert not [t for t in targets if "_to" in t or "nbhd" in t]


@pytest.mark.parametrize(
    ("shape", "out", "expected"),
    [
        ((49, 512), 512, True), ((30, 512), 512, False), ((2, 70, 64), 64, False), ((2, 700, 64), 192, True),
        ((3136, 8), 4096, False), ((3136, 1024), 1, False), ((0, 512), 512, False), ((512,), 512, False),
    ],
)  # fmt: skip
def test_products_that_are_small_or_thin_stay_in_16_bits(
    shape: tuple[int, ...], out: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_from(32, monkeypatch)
    seen = dtypes_given_to("linear", monkeypatch)
    monkeypatch.setattr(linear, "one_piece_is_faster", lambda: False)
    monkeypatch.setattr(linear, "_keeps_up", lambda dtype: False)
    Linear(shape[-1], out).bfloat16()(torch.randn(shape).bfloat16())
    assert seen == [torch.float32 if expected else torch.bfloat16]


@pytest.mark.parametrize(
    ("shape", "stride", "expected"), [((1, 64, 56, 56), 2, True), ((1, 64, 9, 9), 2, False), ((64, 20, 20), 1, True),
                                      ((64, 20, 20), (4, 5), False)]
)  # fmt: skip
def test_small_convolutions_stay_in_16_bits(
    shape: tuple[int, ...], stride: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_from(32, monkeypatch)
    seen = dtypes_given_to("conv2d", monkeypatch)
    Conv2d(64, 64, 3, stride, 1).bfloat16()(torch.randn(shape).bfloat16())
    assert seen == [torch.float32 if expected else torch.bfloat16]


def test_convolutions_in_float16_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's have a backward that is a hundred times slower."""
    slow_from(32, monkeypatch)
    seen = dtypes_given_to("conv2d", monkeypatch)
    for dtype in (torch.float16, torch.bfloat16):
        stem, pixels = Conv2d(3, 32, 3, 2, 1).to(dtype), torch.randn(1, 3, 64, 64).to(dtype)
        stem(pixels)
        with torch.no_grad():
            stem(pixels)
    assert seen == [torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]


def test_what_conversions_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((set(), 4), (None, 4), ({"avx512_fp16"}, 4), ({"avx512_bf16"}, 32)):
        monkeypatch.setattr(sixteen_bits, "features", lambda has=has: has)
        assert sixteen_bits.least_products.__wrapped__(torch.bfloat16) == expected


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_as_much_is_kept_for_the_backward(name: str, how: str, slow: bool) -> None:
    """The input in 16 bits, and the weight as it is; what changes before the backward is noticed."""
    make, shape = LAYERS[name]
    layer, kept = make(), []
    batch = torch.randn(shape).bfloat16().requires_grad_()
    if how == "bfloat16":
        layer.bfloat16()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
    ):
        layer(batch)
    numbers = {t.data_ptr(): t.nbytes for t in kept}
    has_own_padding = getattr(layer, "padding_mode", "zeros") != "zeros" or getattr(layer, "padding", 0) == "same"
    if not has_own_padding:
        assert sum(numbers.values()) <= batch.nbytes + layer.weight.numel() * 4
        if how == "bfloat16":
            output = layer(batch)
            with torch.no_grad():
                layer.weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


@pytest.mark.parametrize("name", ["linear", "convolution", "unbatched"])
def test_derivatives_of_16_bits(name: str, slow: bool) -> None:
    """Twice, forward, in batches and under transforms, as of PyTorch's layer."""
    torch.manual_seed(0)
    ours_is, plain_is, arguments, shape = {
        "linear": (Linear, nn.Linear, (12, 7), (40, 12)),
        "convolution": (Conv2d, nn.Conv2d, (6, 9, 3, 2, 1), (2, 6, 9, 8)),
        "unbatched": (Conv2d, nn.Conv2d, (6, 9, 3, (1, 2), 1, 1, 3), (6, 9, 8)),
    }[name]
    layer, plain = ours_is(*arguments).bfloat16(), plain_is(*arguments).bfloat16()
    plain.load_state_dict(layer.state_dict())
    batch = torch.randn(shape).bfloat16()
    results: list[list[Tensor]] = []
    for each in (layer, plain):
        x, w = batch.clone().requires_grad_(), each.weight
        found = torch.autograd.grad(each(x).square().sum(), (x, w), create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in found), (x, w))

        def of(parameters: Any, x: Tensor, each: nn.Module = each) -> Tensor:
            return torch.func.functional_call(each, parameters, (x,)).float().square().mean()

        parameters = {name: p.detach() for name, p in each.named_parameters()}
        transformed = torch.func.grad(of)(parameters, batch)
        _, tangent = torch.func.jvp(lambda p, each=each: of(p, batch, each), (parameters,), (parameters,))
        stacked = torch.vmap(each)(torch.stack([batch, -batch]))
        jacobian = torch.autograd.functional.jacobian(
            lambda x, each=each: each(x)[:9].float().sum(1), batch, vectorize=True
        )
        results.append([*found, *second, *transformed.values(), tangent, stacked, jacobian])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * float(theirs.detach().abs().max()))


def test_layers_are_traced_and_looked_at_once(slow: bool) -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return x * 2

    for make, shape in LAYERS.values():
        layer, batch = make().bfloat16(), torch.randn(shape).bfloat16()
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        torch.testing.assert_close(traced(batch), layer(batch), rtol=2e-2, atol=2e-2)
        nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
        Counting.calls = 0
        layer(batch)
        assert Counting.calls == 1


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_other_layouts_are_left_to_pytorch(slow: bool) -> None:
    layer, plain = Linear(12, 7).bfloat16(), nn.Linear(12, 7).bfloat16()
    plain.load_state_dict(layer.state_dict())
    ragged = torch.nested.nested_tensor([torch.randn(30, 12), torch.randn(9, 12)]).bfloat16()
    for ours, theirs in zip(layer(ragged).unbind(), plain(ragged).unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)
    weight = layer.weight.detach().to_sparse_csr()
    assert not sixteen_bits.is_slow(torch.randn(30, 12).bfloat16(), weight, None, None)


def test_which_16_bits_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sixteen_bits.are_slow.__wrapped__
    bfloat16, float16 = torch.bfloat16, torch.float16
    everything: Any = {"avx512_bf16", "avx512_fp16"}
    for maker, capability, has, expected in (
        ("GenuineIntel", "AVX512", set(), {bfloat16, float16}),
        ("GenuineIntel", "AVX512", everything, {bfloat16, float16}),
        ("GenuineIntel", "AVX512", everything | {"amx_bf16"}, {float16}),
        ("GenuineIntel", "AVX512", everything | {"amx_bf16", "amx_fp16"}, set()),
        ("AuthenticAMD", "AVX512", {"avx512_bf16"}, {float16}), ("AuthenticAMD", "AVX512", everything, set()),
        ("AuthenticAMD", "AVX2", set(), {bfloat16, float16}), ("GenuineIntel", "AVX2", {"avx_ne_convert"}, set()),
        ("GenuineIntel", "DEFAULT", set(), set()), (None, "AVX512", None, set()), (None, "NEON", None, set()),
    ):  # fmt: skip
        monkeypatch.setattr(sixteen_bits, "maker", lambda maker=maker: maker)
        monkeypatch.setattr(sixteen_bits, "features", lambda has=has: has)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        slow = {dtype for dtype in (bfloat16, float16, torch.float32, torch.float64) if real(dtype)}
        assert slow == expected, (maker, capability, has)
    monkeypatch.setattr(linear, "features", lambda: everything)
    assert linear._keeps_up.__wrapped__(float16) and not linear._keeps_up.__wrapped__(bfloat16)


def test_what_a_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processor, "_linux", {"flags": "fpu avx2 amx_bf16"}.get)
    assert _processor.features() == {"fpu", "avx2", "amx_bf16"}
    monkeypatch.setattr(_processor, "_linux", lambda field: None)
    for found, expected in (
        ({"architecture": "x86_64", "avx2": True, "amx_bf16": False, "num_sockets": 1}, {"avx2"}),
        ({"architecture": "aarch64", "bf16": True}, None), ({}, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert _processor.features() == expected
