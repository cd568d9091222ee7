"""PackedNatLayer: a layer in four calls of the native core gives what the plain layer gives, and notices changes."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import nbhd
from nbhd import optimize
from nbhd.backends import cpu
from nbhd.models import NatConfig, NatForImageClassification
from nbhd.models.nat import inference_layers
from nbhd.models.nat.inference_layers import PackedNatLayer
from nbhd.models.nat.layers import NatLayer
from nbhd.nn import packed
from nbhd.nn.packed import PackedLinear

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")


@pytest.fixture(autouse=True)
def wholes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """As if the machine gained by it: for each call of a layer as a whole, whether it could be made."""
    seen: list[bool] = []
    call = inference_layers._Whole.__call__

    def spy(self: inference_layers._Whole, layer: NatLayer, hidden_states: Tensor) -> Tensor | None:
        output = call(self, layer, hidden_states)
        seen.append(output is not None)
        return output

    monkeypatch.setattr(inference_layers._Whole, "__call__", spy)
    monkeypatch.setattr(optimize, "packed_linear_gain", lambda dtype: 1.25)
    yield seen


def plain_model(name: str = "nat") -> nn.Module:
    torch.manual_seed(0)
    options: dict = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3, "num_labels": 5}
    if name == "nat":
        model: nn.Module = NatForImageClassification(NatConfig(**options))
    elif name == "scaled":
        options |= {"embed_dim": 20, "num_heads": [2, 4], "layer_scale_init_value": 0.5, "mlp_ratio": 2.5}
        model = NatForImageClassification(NatConfig(**options, qkv_bias=False))
    else:
        model = NatForImageClassification(NatConfig(**options, dilations=[[1, 2], [1]]))
    with torch.no_grad():  # numbers that no part of a layer takes for another's
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def packed_model(name: str = "nat", dtype: torch.dtype | None = None) -> nn.Module:
    model = nbhd.optimize_for_inference(plain_model(name), dtype=dtype)
    assert len([module for module in model.modules() if isinstance(module, PackedNatLayer)]) == 3
    return model


def layer_of(model: nn.Module) -> PackedNatLayer:
    return next(module for module in model.modules() if isinstance(module, PackedNatLayer))


def check_same(model: nn.Module, plain: nn.Module, pixels: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nat", "scaled", "dinat"])
@pytest.mark.parametrize("size", [(1, 3, 64, 48), (5, 3, 33, 95)], ids=str)
def test_as_exact_as_the_plain_layers(name: str, size: tuple[int, ...], threads: int, wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(name), packed_model(name), torch.randn(size)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(pixels.double()).logits
        ours, theirs = model(pixels).logits, plain(pixels).logits
    assert wholes == [True] * 3
    error = (theirs - truth).square().mean().sqrt()
    assert (ours - truth).square().mean().sqrt() <= 2 * error + 1e-7 * truth.abs().max()


@pytest.mark.parametrize("name", ["nat", "scaled", "dinat"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_the_plain_layers(name: str, dtype: torch.dtype, wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(name).to(dtype), packed_model(name, dtype), torch.randn(5, 3, 64, 48).to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(pixels.double(), output_hidden_states=True).hidden_states
        ours, theirs = (m(pixels, output_hidden_states=True).hidden_states for m in (model, plain))
    assert wholes == [True] * 3
    assert {hidden.dtype for hidden in ours} == {dtype}
    for found, other, exact in zip(ours, theirs, truth, strict=True):
        assert (found - exact).square().mean() <= 1.1 * (other - exact).square().mean()


def test_the_same_bits_with_every_number_of_threads(wholes: list[bool]) -> None:
    model, pixels, before = packed_model("scaled"), torch.randn(3, 3, 70, 61), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            layer = layer_of(model)
            hidden = model.nat.embeddings(pixels)  # type: ignore[union-attr, operator]
            results.append(layer(hidden)[0])
    finally:
        torch.set_num_threads(before)
    assert wholes == [True] * 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_maps_smaller_than_the_window_and_probabilities(wholes: list[bool]) -> None:
    plain, model = plain_model("dinat"), packed_model("dinat")
    check_same(model, plain, torch.randn(2, 3, 20, 20))  # 5x5 and 3x3: the second layer's window of 6 is padded
    assert wholes == [True, True]
    pixels = torch.randn(1, 3, 64, 64)
    found, expected = (m(pixels, output_attentions=True, output_hidden_states=True) for m in (model, plain))
    for name in ("attentions", "hidden_states"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


INNER = [
    "layernorm_before", "layernorm_after", "drop_path", "attention", "attention.self", "attention.self.qkv",
    "attention.output", "attention.output.dense", "attention.output.dropout", "intermediate", "intermediate.dense",
    "intermediate.intermediate_act_fn", "output", "output.dense", "output.dropout",
]  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_hooks_that_come_later_see_everything(name: str, wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    part = layer_of(model).get_submodule(name)
    seen: list[nn.Module] = []
    for register in (part.register_forward_hook, part.register_forward_pre_hook):
        handle = register(lambda module, *_: seen.append(module))
        wholes.clear()
        check_same(model, plain, pixels)
        assert wholes == [True] * 2 and set(seen) == {part}
        handle.remove()
        wholes.clear()
        seen.clear()
        check_same(model, plain, pixels)
        assert wholes == [True] * 3 and not seen
    original = part.forward
    part.forward = lambda *args, **kwargs: (seen.append(part), original(*args, **kwargs))[1]
    check_same(model, plain, pixels)
    assert seen
    del part.forward
    wholes.clear()
    check_same(model, plain, pixels)
    assert wholes == [True] * 3


def test_global_hooks(wholes: list[bool]) -> None:
    model, pixels, seen = packed_model(), torch.randn(1, 3, 64, 48), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(pixels)
    finally:
        handle.remove()
    assert seen.count("PackedLinear") == 12 and not wholes


def test_parts_that_come_later(wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)

    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    for each in (model, plain):
        layer = next(m for name, m in each.named_modules() if name.endswith("levels.0.layers.0"))
        layer.output.dense = Doubled(layer.output.dense)
        layer.layernorm_after.eps = 0.3
    wholes.clear()
    check_same(model, plain, pixels)
    assert wholes == [True] * 2
    for each in (model, plain):
        layer = next(m for name, m in each.named_modules() if name.endswith("levels.1.layers.0"))
        layer.layernorm_before.eps = 0.5
    check_same(model, plain, pixels)
    assert wholes == [True] * 4


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda p: p.mul_(1.5),
    "data": lambda p: setattr(p, "data", p * 1.5),
    "data in place": lambda p: p.data.mul_(1.5),
    "numpy": lambda p: p.detach().numpy().__imul__(1.5),
}


@pytest.mark.parametrize("how", CHANGES)
def test_parameters_that_change(how: str, wholes: list[bool]) -> None:
    plain, model, pixels = plain_model("scaled"), packed_model("scaled"), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            CHANGES[how](parameter)
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    check_same(model, plain, pixels)
    assert wholes == [True] * 6


def as_attribute(module: nn.Module, name: str) -> None:
    value = getattr(module, name).detach() + 1
    delattr(module, name)
    setattr(module, name, value)


def as_buffer(module: nn.Module, name: str) -> None:
    value = getattr(module, name).detach() + 1
    delattr(module, name)
    module.register_buffer(name, value)


def as_subclass(module: nn.Module, name: str) -> None:
    """A tensor that has its numbers elsewhere."""
    value = getattr(module, name).detach() + 1
    setattr(module, name, nn.Parameter(TwoTensor(value, value.clone()), requires_grad=False))


def as_one_number(module: nn.Module, name: str) -> None:
    """A view at the same address."""
    parameter = getattr(module, name)
    parameter.data = parameter.data[..., :1].expand(parameter.shape)


@pytest.mark.parametrize("change", [as_attribute, as_buffer, as_subclass, as_one_number], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name",
    ["layernorm_before.weight", "layernorm_after.bias", "attention.output.dense.bias", "intermediate.dense.bias",
     "output.dense.bias", "layer_scale_parameters"],
)  # fmt: skip
def test_parameters_that_become_something_else(name: str, change: Callable[[nn.Module, str], None]) -> None:
    plain, model, pixels = plain_model("scaled"), packed_model("scaled"), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    for each in (model, plain):
        layer = next(m for path, m in each.named_modules() if path.endswith("levels.0.layers.0"))
        path, _, own = name.rpartition(".")
        change(layer.get_submodule(path), own)
    with torch.no_grad():  # a tensor subclass makes the network's output one
        ours, theirs = (torch.as_tensor(getattr(m(pixels).logits, "a", m(pixels).logits)) for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_mlp_that_is_pruned_where_it_lies(wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    for each in (model, plain):
        layer = next(m for path, m in each.named_modules() if path.endswith("levels.0.layers.0"))
        hidden, last = layer.intermediate.dense, layer.output.dense
        hidden.weight.data, hidden.bias.data = hidden.weight.data[:40], hidden.bias.data[:40]
        last.weight.data = last.weight.data[:, :40]
    check_same(model, plain, pixels)
    layer_of(model).layernorm_after.normalized_shape = (16,)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        model(pixels)


def test_a_class_or_a_function_that_becomes_another(wholes: list[bool]) -> None:
    model, pixels = packed_model(), torch.randn(1, 3, 64, 48)
    before = model(pixels).logits
    layer = layer_of(model)

    class Twice(PackedLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.output.dense.__class__ = Twice
    wholes.clear()
    assert not torch.allclose(model(pixels).logits, before) and wholes == [True] * 2
    layer.output.dense.__class__ = PackedLinear
    wholes.clear()
    assert torch.equal(model(pixels).logits, before) and wholes == [True] * 3
    layer.intermediate.intermediate_act_fn.act = torch.tanh
    wholes.clear()
    model(pixels)
    assert wholes == [True] * 2


def test_a_shallow_copy_has_its_own_layers() -> None:
    model, pixels = packed_model(), torch.randn(1, 3, 64, 48)
    layer, hidden = layer_of(model), model.nat.embeddings(pixels)  # type: ignore[union-attr, operator]
    expected = layer(hidden)[0]
    other = copy.copy(layer)
    other._modules = dict(other._modules)
    other.output = copy.deepcopy(layer.output)
    other.output.dense.weight.zero_()
    assert not torch.allclose(other(hidden)[0], expected)
    assert torch.equal(layer(hidden)[0], expected)


def test_a_network_in_another_dtype_keeps_no_packed_weights() -> None:
    model, pixels = packed_model(), torch.randn(1, 3, 64, 48)
    model(pixels)
    panels = [weakref.ref(part._packed._kept.weight) for part in model.modules() if isinstance(part, PackedLinear)
              if part._packed._kept is not None]  # fmt: skip
    assert len(panels) == 12
    model.to(torch.bfloat16)
    model(pixels)
    gc.collect()
    assert not [panel for panel in panels if panel() is not None]


def test_sizes_that_the_core_does_not_take() -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    for each in (model, plain):
        next(m for path, m in each.named_modules() if path.endswith("0.layers.0.layernorm_after")).eps = -1e-9
    check_same(model, plain, pixels)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")],
    ids=["inference mode", "autocast", "meta"],
)  # fmt: skip
def test_the_gain_is_measured_wherever_it_is_asked_for(context: Callable) -> None:
    packed._measured_gain.cache_clear()
    numbers = torch.get_rng_state()
    with context():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert packed.packed_linear_gain(dtype) > 0
        assert packed.packed_linear_gain(torch.float64) == 0
    assert torch.equal(torch.get_rng_state(), numbers)
    packed._measured_gain.cache_clear()
    with FlopCounterMode(display=False):
        assert packed.packed_linear_gain() == 0
    assert packed.packed_linear_gain() > 0


def test_made_ready_in_inference_mode(wholes: list[bool]) -> None:
    plain, pixels = plain_model(), torch.randn(1, 3, 64, 48)
    with torch.inference_mode():
        model = nbhd.optimize_for_inference(copy.deepcopy(plain), dtype=None)
    check_same(model, plain, pixels)


def test_a_square_weight_turned_where_it_lies() -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    for each in (model, plain):
        dense = next(m for name, m in each.named_modules() if name.endswith("0.layers.0.attention.output.dense"))
        dense.weight.data = dense.weight.data.t()
    check_same(model, plain, pixels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_and_back(dtype: torch.dtype, wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    model.to(dtype), plain.to(dtype)
    wholes.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, rtol=2e-2, atol=2e-2)
    assert wholes == [False] * 3
    model.float(), plain.float()
    check_same(model, plain, pixels)
    assert wholes == [False] * 3 + [True] * 3


def test_gradients_go_through_the_plain_layers(wholes: list[bool]) -> None:
    model, pixels = packed_model(), torch.randn(1, 3, 64, 48, requires_grad=True)
    with torch.autocast("cpu"):
        assert model(pixels.detach()).logits.dtype == torch.bfloat16
    model(pixels).logits.square().sum().backward()
    assert wholes == [False] * 6 and pixels.grad is not None and pixels.grad.abs().sum() > 0
    model.requires_grad_(True)
    model(pixels).logits.square().sum().backward()
    assert all(p.grad is not None for p in layer_of(model).parameters())


@pytest.mark.parametrize(
    "name",
    ["layernorm_before.weight", "attention.self.rpb", "attention.output.dense.bias", "layer_scale_parameters",
     "layernorm_after.bias", "intermediate.dense.weight", "output.dense.bias"],
)  # fmt: skip
def test_one_parameter_that_learns_gets_its_gradient(name: str) -> None:
    plain, model, pixels = plain_model("scaled"), packed_model("scaled"), torch.randn(1, 3, 64, 48)
    plain.requires_grad_(False)
    gradients = []
    for each in (model, plain):
        layer = next(m for path, m in each.named_modules() if path.endswith("levels.0.layers.0"))
        parameter = layer.get_parameter(name).requires_grad_(True)
        each(pixels).logits.square().sum().backward()
        assert parameter.grad is not None
        gradients.append(parameter.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_pack_for_themselves(wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(1, 3, 64, 48)
    check_same(model, plain, pixels)
    size = len(pickle.dumps(model))
    assert size < 1.2 * len(pickle.dumps(plain))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        wholes.clear()
        check_same(other, plain, pixels)
        assert wholes == [True] * 3
        model.load_state_dict(plain.state_dict())
        check_same(model, plain, pixels)


def test_several_callers_at_once() -> None:
    model, pixels = packed_model(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(pixels).logits
    wrong: list[str] = []

    def call() -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(pixels).logits, expected):
                    wrong.append("differs")

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_graphs_and_transforms_have_the_plain_layers(wholes: list[bool]) -> None:
    plain, model, pixels = plain_model(), packed_model(), torch.randn(2, 3, 64, 48)
    layer = layer_of(model)
    with torch.no_grad():
        hidden = model.nat.embeddings(pixels)  # type: ignore[union-attr, operator]
        expected = layer(hidden)[0]
        wholes.clear()
        graph = torch.export.export(layer, (hidden,)).module()
        torch.testing.assert_close(graph(hidden)[0], expected, rtol=1e-4, atol=1e-5)
        mapped = torch.vmap(lambda x: layer(x[None])[0][0])(hidden)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
    assert not any(wholes)
    check_same(model, plain, pixels)
