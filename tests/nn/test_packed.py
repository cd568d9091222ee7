"""nbhd.nn.packed: layers with packed weights give what the plain ones give, and notice when their weights change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import nbhd
from nbhd import optimize
from nbhd.backends import cpu
from nbhd.models import NatConfig, NatForImageClassification
from nbhd.nn import packed
from nbhd.nn.linear import Linear
from nbhd.nn.packed import PackedConv2d, PackedLinear

MACHINES_OWN_ANSWER = packed.packed_convolutions_are_faster


@pytest.fixture(autouse=True)
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """As if the machine gained by it: the shapes of the weights that were packed."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    seen: list[torch.Size] = []
    of = packed._Packed.of

    def spy(
        self: packed._Packed, weight: Tensor, pack: Callable[[Tensor], Tensor], *settings: object, compares: bool = True
    ) -> Tensor:
        def noted(weight: Tensor) -> Tensor:
            seen.append(weight.shape)
            return pack(weight)

        return of(self, weight, noted, *settings, compares=compares)

    monkeypatch.setattr(packed._Packed, "of", spy)
    monkeypatch.setattr(packed, "packed_convolutions_are_faster", lambda: True)
    monkeypatch.setattr(optimize, "packed_convolutions_are_faster", lambda: True)
    monkeypatch.setattr(optimize, "packed_linear_gain", lambda dtype: 1.25)
    yield seen


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (2, 7, 7, 100), (3, 50, 25, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_is_as_exact(
    shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool, threads: int, packs: list[torch.Size]
) -> None:
    torch.manual_seed(0)
    plain = Linear(shape[-1], 77, bias=has_bias, dtype=dtype).requires_grad_(False)
    layer, batch = PackedLinear(plain), torch.randn(shape).to(dtype)
    truth = batch.double() @ plain.weight.double().T + (plain.bias.double() if has_bias else 0)
    with torch.no_grad():
        for _ in range(2):
            for ours, theirs, exact in (
                (layer(batch), functional.linear(batch, plain.weight, plain.bias), truth),
                (layer.with_gelu(batch), functional.gelu(functional.linear(batch, plain.weight, plain.bias)),
                 functional.gelu(truth)),
            ):  # fmt: skip
                assert ours.shape == theirs.shape and ours.is_contiguous() and ours.dtype == dtype
                assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-7 * exact.abs().max()
    assert packs == [(77, shape[-1])]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2), "bias": False},
        {"kernel_size": 1, "groups": 4},
    ],
    ids=["downsampler", "uneven", "grouped"],
)
def test_convolution_is_as_exact(options: dict, threads: int, packs: list[torch.Size]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 48, **options).requires_grad_(False)
    layer = PackedConv2d(plain)
    with torch.no_grad():
        for size in ((2, 14, 15), (2, 14, 15), (1, 9, 20)):
            maps = torch.randn(size[0], 32, *size[1:]).to(memory_format=torch.channels_last)
            ours, theirs, exact = layer(maps), plain(maps), copy.deepcopy(plain).double()(maps.double())
            assert ours.shape == theirs.shape and ours.is_contiguous(memory_format=torch.channels_last)
            # PyTorch has another library for the smallest
            off, of_plain = ((maps - exact).square().mean().sqrt() for maps in (ours, theirs))
            assert off <= 2 * of_plain
        assert len(packs) == 2  # maps of two sizes
        layer(torch.randn(2, 32, 14, 15))  # channels first: the plain layer
        layer.stride = (1, 1)
        torch.testing.assert_close(
            layer(maps), functional.conv2d(maps, plain.weight, plain.bias, 1, *_rest(layer)), rtol=1e-4, atol=1e-5
        )
        with pytest.raises(RuntimeError):
            layer(maps[:, :-4])
        if layer.kernel_size != (1, 1):
            with pytest.raises(RuntimeError, match="greater than actual input size"):
                PackedConv2d(nn.Conv2d(32, 48, 3))(maps[:, :, :2].contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("maker", "is_zen_4", "capability", "expected"),
    [
        ("GenuineIntel", False, "AVX512", True), ("GenuineIntel", False, "AVX2", False),
        ("AuthenticAMD", True, "AVX512", True), ("AuthenticAMD", False, "AVX512", False),
        ("AuthenticAMD", False, "AVX2", True), ("AuthenticAMD", True, "DEFAULT", False),
    ],
)  # fmt: skip
def test_where_packed_convolutions_are_faster(
    monkeypatch: pytest.MonkeyPatch, maker: str, is_zen_4: bool, capability: str, expected: bool
) -> None:
    asked = MACHINES_OWN_ANSWER.__wrapped__
    monkeypatch.setattr(packed, "maker", lambda: maker)
    monkeypatch.setattr(packed, "is_zen_4", lambda: is_zen_4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asked() is expected


def _rest(layer: nn.Conv2d) -> tuple:
    return layer.padding, layer.dilation, layer.groups


def test_which_convolutions_suit() -> None:
    assert PackedConv2d.suits(nn.Conv2d(3, 4, 3))
    for other in (nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
                  nn.Conv3d(3, 4, 3), PackedConv2d(nn.Conv2d(3, 4, 3)), Linear(3, 4)):  # fmt: skip
        assert not PackedConv2d.suits(other)


@pytest.mark.parametrize("change", ["in place", "loaded", "data", "data in place", "numpy", "parameter", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_changed_weight_is_packed_again(change: str, dtype: torch.dtype, packs: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(Linear(64, 96, dtype=dtype).requires_grad_(False))
    batch = torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        layer(batch)
        if change == "in place":
            layer.weight.mul_(2)
        elif change == "loaded":
            layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
        elif change == "data":
            layer.weight.data = torch.randn(96, 64).to(dtype)
        elif change == "data in place":
            layer.weight.data[:, 1:] += 1e-3  # which tells no version
        elif change == "numpy":
            layer.weight.view(torch.int8).numpy().reshape(-1, dtype.itemsize)[:, 1] ^= 3
        elif change == "parameter":
            layer.weight = nn.Parameter(torch.randn(96, 64).to(dtype), requires_grad=False)
        else:
            layer.double()
            batch = batch.double()
        expected = functional.linear(batch, layer.weight, layer.bias)
        torch.testing.assert_close(layer(batch), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)
    assert len(packs) == (1 if change == "double" else 2)
    assert (layer._packed._kept is None) == (change == "double")


def test_a_new_weight_may_lie_where_the_last_one_lay(packs: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer, batch = PackedLinear(Linear(128, 128, bias=False).requires_grad_(False)), torch.randn(5, 128)
    for _ in range(20):
        layer.weight = None  # type: ignore[assignment]
        layer.weight = nn.Parameter(torch.randn(128, 128), requires_grad=False)
        torch.testing.assert_close(layer(batch), batch @ layer.weight.T, rtol=1e-4, atol=1e-4)
        other = torch.randn(128, 128)
        replaced = torch.func.functional_call(layer, {"weight": other}, (batch,))
        torch.testing.assert_close(replaced, batch @ other.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_weight_that_learns_is_not_packed(optimizer: type, packs: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer, batch = PackedLinear(Linear(64, 96)), torch.randn(5, 64)
    learns = optimizer(layer.parameters(), 0.1, fused=True)  # fused ones tell no version
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(layer(batch), functional.linear(batch, layer.weight, layer.bias))
        layer(batch).square().sum().backward()
        learns.step()
    assert not packs


@pytest.mark.parametrize("shape", [(1,), (1, 96), (5, 96)])
def test_biases_that_are_broadcast(shape: tuple[int, ...], packs: list[torch.Size]) -> None:
    layer, batch = PackedLinear(Linear(64, 96).requires_grad_(False)), torch.randn(5, 64)
    layer.bias = nn.Parameter(torch.randn(shape), requires_grad=False)
    torch.testing.assert_close(layer(batch), functional.linear(batch, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PackedLinear(Linear(64, 96).requires_grad_(False))(batch[:, :60].contiguous())
    assert not packs


@pytest.mark.parametrize(
    "what", ["gradient", "layout", "negative", "autocast", "vmap", "watched", "empty", "inference mode"]
)
def test_what_is_not_packed(what: str, packs: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = Linear(64, 96).requires_grad_(what == "gradient")
    layer, batch = PackedLinear(plain), torch.randn(5, 64)
    if what == "layout":
        batch = torch.randn(64, 5).t()
    elif what == "negative":  # of which the library would see the numbers without their sign
        batch = torch.randn(5, 64, dtype=torch.complex64).conj().imag.contiguous()
        batch = torch.complex(torch.zeros(5, 64), batch).conj().imag
        assert batch.is_neg()
    elif what == "empty":
        batch = batch[:0]
    elif what == "inference mode":
        with torch.inference_mode():
            layer = PackedLinear(Linear(64, 96))
            assert layer(batch).shape == (5, 96)
        assert not packs
        return
    expected = functional.linear(batch, plain.weight, plain.bias)
    if what == "vmap":
        ours = torch.vmap(layer)(torch.stack([batch, batch]))[1]
    elif what == "watched":
        with FlopCounterMode(display=False) as counter:
            ours = layer(batch)
        assert counter.get_total_flops() == 2 * 5 * 64 * 96
    elif what == "autocast":
        with torch.autocast("cpu"):
            ours = layer(batch).float()
            expected = functional.linear(batch, plain.weight, plain.bias).float()
    else:
        ours = layer(batch)
    torch.testing.assert_close(ours, expected, **({"rtol": 1e-2, "atol": 1e-2} if what == "autocast" else {}))
    assert not packs
    assert ours.requires_grad is (what == "gradient")


def small_nat() -> NatForImageClassification:
    torch.manual_seed(0)
    config = NatConfig(embed_dim=32, depths=[1, 2], num_heads=[1, 2], kernel_size=3, num_labels=5)
    return NatForImageClassification(config).eval()


def test_a_nat_with_packed_weights(packs: list[torch.Size], tmp_path) -> None:
    plain, pixels = small_nat(), torch.randn(2, 3, 64, 48)
    model = nbhd.optimize_for_inference(copy.deepcopy(plain), dtype=None)
    step = model.inference_report["packed weights"]
    assert step.done and step.reason.startswith("15 layers")  # 4 of each layer, 2 of the stem, 1 between
    assert not packs
    expected = plain(pixels).logits.detach()
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(packs) == 15
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(packs) == 15
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(packs) == 45

    state = plain.state_dict()
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in state.items()}
    model.save_pretrained(tmp_path)
    loaded = NatForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    model.load_state_dict({name: value * 2 for name, value in state.items()})
    plain.load_state_dict({name: value * 2 for name, value in state.items()})
    torch.testing.assert_close(model(pixels).logits, plain(pixels).logits.detach(), rtol=1e-4, atol=1e-5)

    again = nbhd.optimize_for_inference(model, dtype=None)
    assert not again.inference_report["packed weights"].done


def test_graphs_of_a_packed_nat_have_the_plain_operators(packs: list[torch.Size]) -> None:
    model, pixels = nbhd.optimize_for_inference(small_nat(), dtype=None), torch.randn(2, 3, 64, 48)
    sides = {2: torch.export.Dim("height", min=33, max=512), 3: torch.export.Dim("width", min=33, max=512)}
    graph = torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": sides}, strict=False).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("aten.linear.default") == 13 and targets.count("aten.conv2d.default") == 3
    assert not packs and not [target for target in targets if "mkldnn" in target]


def test_a_layer_with_a_hook_keeps_it(packs: list[torch.Size]) -> None:
    model = small_nat()
    seen: list[object] = []
    model.nat.encoder.levels[0].layers[0].output.dense.register_forward_hook(lambda *_: seen.append(1))
    nbhd.optimize_for_inference(model, dtype=None)
    model(torch.randn(1, 3, 64, 48))
    assert len(seen) == 1 and len(packs) == 14


@pytest.mark.parametrize(
    ("options", "gain", "reason"),
    [
        ({"dtype": None}, 0.8, "takes 1.2 times as long"),
        ({"dtype": None}, 0.0, "no library today"),
        ({"dtype": torch.float64}, 2.0, "for float32 and 16 bits on a CPU, not float64"),
        ({"dtype": None, "compile": True}, 2.0, "compiled graphs"),
    ],
)
def test_where_nothing_is_packed(
    options: dict, gain: float, reason: str, monkeypatch: pytest.MonkeyPatch, packs: list[torch.Size]
) -> None:  # fmt: skip
    monkeypatch.setattr(optimize, "packed_convolutions_are_faster", lambda: False)
    monkeypatch.setattr(optimize, "packed_linear_gain", lambda dtype: gain)
    monkeypatch.setattr(cpu, "why_unusable", lambda: "no library today")
    model = nbhd.optimize_for_inference(small_nat(), **options)
    step = model.inference_report["packed weights"]
    assert not step.done and reason in step.reason
    assert not [module for module in model.modules() if isinstance(module, (PackedLinear, PackedConv2d))]
