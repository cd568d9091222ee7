"""NAT's layers in four calls of the native core: what the plain layers give, in training too, and what is noticed."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nbhd.backends import cpu
from nbhd.backends.cpu_linear import DTYPES
from nbhd.models import NatConfig, NatForImageClassification
from nbhd.models.nat import joined_layers, layers
from nbhd.models.nat.layers import NatDropPath, NatLayer, NatOutput, NeighborhoodAttention
from nbhd.nn import joined

pytestmark = pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}")

#: Calls of a layer: attention and MLP.
BRANCHES = 2


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As if every machine gained by it: the branches that were computed in a call, in their order."""
    seen: list[str] = []
    for name in ("attention_branch", "mlp_branch"):
        real = getattr(joined_layers, name)

        def spy(*args: object, real: Callable = real, name: str = name) -> Tensor | None:
            output = real(*args)
            if output is not None:
                seen.append(name)
            return output

        monkeypatch.setattr(joined_layers, name, spy)
    monkeypatch.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: dtype in DTYPES)
    yield seen


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Calls a function on a machine that gains nothing."""

    def run(function: Callable) -> object:
        with monkeypatch.context() as context:
            context.setattr(joined, "joined_layers_are_faster", lambda dtype, with_gradients: False)
            return function()

    return run


KINDS = ("nat", "scaled", "dilated", "dropping")


def model_of(kind: str = "nat") -> nn.Module:
    torch.manual_seed(0)
    options: dict = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3, "num_labels": 5}
    options |= {"drop_path_rate": 0.0}
    if kind == "scaled":
        options |= {"embed_dim": 20, "num_heads": [2, 4], "layer_scale_init_value": 0.5, "mlp_ratio": 2.5}
        options |= {"qkv_bias": False, "drop_path_rate": 0.5}
    elif kind == "dilated":
        options |= {"dilations": [[1, 2], [1]]}
    elif kind == "dropping":
        options |= {"drop_path_rate": 0.6}
    model = NatForImageClassification(NatConfig(**options))
    with torch.no_grad():  # numbers that no part of a layer takes for another's
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def first_layer(model: nn.Module) -> NatLayer:
    return next(module for module in model.modules() if isinstance(module, NatLayer))


PIXELS = torch.randn(4, 3, 32, 44, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1, 4])


def step(model: nn.Module, seed: int = 0, pixels: Tensor = PIXELS) -> list[Tensor]:
    """The loss of a training step, and what its gradients are."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(pixel_values=pixels, labels=LABELS[: len(pixels)]).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[misc]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    largest = max(float(t.abs().max()) for t in expected[1:])
    for ours, theirs in zip(found, expected, strict=True):
        # a key's bias changes nothing, and its gradient is what rounding leaves
        scale = max(float(theirs.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_training_step_is_the_plain_one(kind: str, seed: int, calls: list[str], plainly: Callable) -> None:
    """Whatever images are dropped: the same random numbers are drawn, in the same order."""
    model = model_of(kind).train()
    found = step(model, seed)
    assert calls
    after = torch.rand(1)
    calls.clear()
    close(found, plainly(lambda: step(model, seed)))
    assert not calls
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inference_is_the_plain_one(kind: str, context: Callable, calls: list[str], plainly: Callable) -> None:
    model = model_of(kind).eval()
    with context():
        found = model(PIXELS).logits
        assert calls == ["attention_branch", "mlp_branch"] * 3
        torch.testing.assert_close(found, plainly(lambda: model(PIXELS)).logits, rtol=1e-4, atol=1e-5)


def errors(found: Any, exact: Any) -> list[float]:
    return [float((x.double() - y.double()).square().mean().sqrt()) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_16_bits(kind: str, how: str, calls: list[str], plainly: Callable) -> None:
    """Inference and a training step, with the dtypes that the plain layers have and errors as small."""
    model = model_of(kind)
    dtype = torch.bfloat16 if how == "autocast" else getattr(torch, how)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype).float()
    exact = copy.deepcopy(model).double()
    if how != "autocast":
        model.to(dtype)

    def hidden(of: nn.Module) -> list[Tensor]:
        under = torch.autocast("cpu", dtype, enabled=how == "autocast" and of is not exact)
        with under, torch.no_grad():
            output = of(PIXELS.to(torch.float64 if of is exact else torch.float32), output_hidden_states=True)
        return [*output.hidden_states, output.logits]

    def trained(of: nn.Module) -> list[Tensor]:
        under = torch.autocast("cpu", dtype, enabled=how == "autocast" and of is not exact)
        torch.manual_seed(3)
        of.zero_grad()
        with under:
            loss = of(PIXELS.to(torch.float64 if of is exact else torch.float32), labels=LABELS).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in of.parameters() if p.grad is not None)]

    for mode, run in ((False, hidden), (True, trained)):
        model.train(mode), exact.train(mode)
        calls.clear()
        found = run(model)
        assert len(calls) == 6 or (mode and kind in ("scaled", "dropping") and calls)
        calls.clear()
        theirs, truth = plainly(lambda run=run: [t.clone() for t in run(model)]), plainly(lambda run=run: run(exact))
        assert not calls
        assert [t.dtype for t in found] == [t.dtype for t in theirs]
        ours, expected = errors(found, truth), errors(theirs, truth)
        size = [float(t.square().mean().sqrt()) for t in truth]
        # each by itself is luck; a key's bias changes nothing
        assert sum(ours) <= 1.2 * sum(expected)
        assert all(a <= 2 * b + 0.01 * s for a, b, s in zip(ours, expected, size, strict=True))


def test_all_images_of_a_branch_dropped(calls: list[str], plainly: Callable) -> None:
    model = model_of("dropping").train()
    for module in model.modules():
        if isinstance(module, NatDropPath):
            module.drop_prob = 0.999
    found = step(model)
    # the first layer never drops; of the others none is left
    assert calls == ["attention_branch", "mlp_branch"]
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.nat.encoder.levels[1].layers.parameters())
    close(found, plainly(lambda: step(model)))
    for module in model.modules():
        if isinstance(module, NatDropPath):
            module.drop_prob = 1.0
    close(step(model), plainly(lambda: step(model)))


def test_the_same_bits_with_any_threads_and_again(calls: list[str]) -> None:
    model, before, found = model_of("dropping").train(), torch.get_num_threads(), []
    layer = first_layer(model)
    batch = torch.randn(2, 20, 24, 32)
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            layer.zero_grad()
            leaf = batch.clone().requires_grad_()
            output = layer(leaf)[0]
            output.square().sum().backward()
            found.append([output.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert len(calls) == 4 * BRANCHES


def test_maps_smaller_than_the_window_and_probabilities(calls: list[str], plainly: Callable) -> None:
    model = model_of().eval()
    small = torch.randn(8, 3, 8, 40)  # maps of 2 and 1 rows
    with torch.no_grad():
        found = model(small).logits
        assert not calls
        torch.testing.assert_close(found, plainly(lambda: model(small)).logits)
        outputs = model(PIXELS, output_attentions=True)
        assert len(outputs.attentions) == 2
        assert calls == ["attention_branch", "mlp_branch"]  # of the layer whose probabilities nobody gets
        torch.testing.assert_close(outputs.logits, plainly(lambda: model(PIXELS)).logits, rtol=1e-4, atol=1e-5)


def test_dropout(calls: list[str]) -> None:
    model = model_of().train()
    for name in ("attention.self.dropout", "attention.output.dropout", "output.dropout"):
        dropout = first_layer(model).get_submodule(name)
        step(model)
        assert len(calls) == 3 * BRANCHES
        calls.clear()
        dropout.p = 0.5  # type: ignore[assignment]
        step(model)
        assert len(calls) == 2 * BRANCHES  # the other layers
        model.eval()
        step(model)
        assert len(calls) == 5 * BRANCHES
        model.train()
        dropout.p = 0.0  # type: ignore[assignment]
        calls.clear()


#: All but the dropout of probabilities, which nobody calls where there are none.
PARTS = [n for n, _ in NatLayer(NatConfig(), 64, 2, 0.1).named_modules() if n and n != "attention.self.dropout"]


@pytest.mark.parametrize("name", PARTS)
def test_hooks_that_come_later_see_everything(name: str, calls: list[str], plainly: Callable) -> None:
    model = model_of("dropping").train()
    step(model)
    calls.clear()
    layer = model.nat.encoder.levels[0].layers[1]  # the one with a NatDropPath
    part, seen = layer.get_submodule(name), []

    def hook(*args: object) -> None:
        seen.append(args[0])

    hooks = (
        part.register_forward_hook, part.register_forward_pre_hook, part.register_full_backward_hook,
        part.register_full_backward_pre_hook,
    )  # fmt: skip
    for register in hooks:
        seen.clear(), calls.clear()
        handle = register(hook)
        found = step(model, 2)
        assert seen and set(seen) == {part}
        handle.remove()
        expected = step(model, 2)
        close(found, expected)
    seen.clear(), calls.clear()
    real = part.forward
    part.forward = lambda *a, **k: (hook(part), real(*a, **k))[1]  # type: ignore[method-assign]
    step(model, 2)
    assert seen
    del part.forward
    seen.clear()
    step(model, 2)
    assert not seen


def test_global_hooks(calls: list[str]) -> None:
    model, seen = model_of().eval(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        model(PIXELS)
    finally:
        handle.remove()
    layer = first_layer(model)
    assert not calls and seen.issuperset(map(layer.get_submodule, PARTS))
    model(PIXELS)
    assert len(calls) == 3 * BRANCHES


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, nn.Parameter(torch.ones(()))

    def forward(self, *args: Tensor) -> Tensor:
        return self.base(*args) * self.more


@pytest.mark.parametrize("name", [n for n in PARTS if n.endswith(("query", "dense", "before", "act_fn"))])
def test_parts_that_come_later(name: str, calls: list[str], plainly: Callable) -> None:
    model = model_of().train()
    step(model)
    layer = first_layer(model)
    layer.set_submodule(name, Adapter(layer.get_submodule(name)))
    calls.clear()
    found = step(model)
    assert len(calls) == 2 * BRANCHES
    close(found, plainly(lambda: step(model)))


def test_a_class_or_a_function_that_becomes_another(calls: list[str]) -> None:
    model = model_of().eval()
    model(PIXELS)
    layer = first_layer(model)

    class Other(type(layer.output.dense)):  # type: ignore[misc]
        pass

    kind = type(layer.output.dense)
    layer.output.dense.__class__ = Other
    calls.clear()
    model(PIXELS)
    assert len(calls) == 2 * BRANCHES
    layer.output.dense.__class__ = kind
    layer.intermediate.intermediate_act_fn.act = functools.partial(torch.mul, torch.tensor(0.0))  # type: ignore[union-attr, assignment]
    calls.clear()
    with torch.no_grad():
        model(PIXELS)
        assert len(calls) == 2 * BRANCHES
        assert not layer.intermediate(torch.randn(1, 8, 8, 32)).any()


def test_an_activation_that_is_not_the_exact_gelu(calls: list[str], plainly: Callable) -> None:
    for activation in ("gelu_new", "relu", "gelu_python"):
        config = NatConfig(embed_dim=32, depths=[1], num_heads=[1], kernel_size=3, hidden_act=activation)
        model = NatForImageClassification(config).eval()
        model(PIXELS)
        assert not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.parametrizations.weight_norm(m.output.dense),
        lambda m: m.double(), lambda m: (m.bfloat16(), m.layernorm_before.float(), m.layernorm_after.float()),
        lambda m: setattr(m.layernorm_after, "eps", -1e-9),
        lambda m: m.layernorm_before.register_parameter("bias", nn.Parameter(torch.zeros(32).double())),
    ],
    ids=["parametrized", "double", "norms of another dtype", "epsilon", "a bias of another dtype"],
)  # fmt: skip
def test_layers_that_are_left_to_pytorch(change: Callable, calls: list[str], plainly: Callable) -> None:
    layer = first_layer(model_of()).train()
    batch = torch.randn(1, 8, 8, 32)
    layer(batch)
    assert len(calls) == BRANCHES
    change(layer)
    calls.clear()
    batch = batch.to(layer.output.dense.weight.dtype)
    try:
        expected = plainly(lambda: layer(batch)[0])
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            layer(batch)
        return
    torch.testing.assert_close(layer(batch)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(calls) < BRANCHES


def test_parameters_that_do_not_learn(calls: list[str], plainly: Callable) -> None:
    """Layers of which some learn have PyTorch's: less has to be kept for their gradients."""
    model = model_of("dropping").train()
    last = list(model.nat.encoder.levels[1].layers)[-1]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in last.parameters():
        parameter.requires_grad_(True)
    close(step(model, 3), plainly(lambda: step(model, 3)))
    assert {*calls} == {
        "attention_branch",
        "mlp_branch",
    }  # of two that have no gradients at all, and of one that has them all
    last.output.dense.weight.requires_grad_(False)
    last.attention.self.key.bias.requires_grad_(False)
    close(step(model, 3), plainly(lambda: step(model, 3)))
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    close(step(model, 3), plainly(lambda: step(model, 3)))


def test_biases_may_change_before_the_backward(calls: list[str], plainly: Callable) -> None:
    """Their values are not needed then."""
    model = model_of().train()

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(pixel_values=PIXELS, labels=LABELS).loss
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("dense.bias") or ("query" in name and "bias" in name):
                    parameter.add_(1)
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data.copy_(before[name])
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[misc]

    close(run(), plainly(run))


@pytest.mark.parametrize("kind", ["linear", "layer_norm"])
def test_functions_that_somebody_has_replaced(kind: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers do."""
    model, seen, real = model_of().eval(), [], getattr(nn.functional, kind)
    monkeypatch.setattr(nn.functional, kind, lambda *args, **options: (seen.append(kind), real(*args, **options))[1])
    model(PIXELS)
    assert not calls and seen


@pytest.mark.parametrize("when", ["before", "later", "in a copy"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, NatOutput, NeighborhoodAttention, nn.Module])
def test_classes_that_somebody_has_changed(
    kind: type[nn.Module], when: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, name = model_of().eval(), [], "__call__" if kind is nn.Module else "forward"
    real = getattr(kind, name)
    if when != "before":
        model(PIXELS)
    if when == "in a copy":
        model = copy.deepcopy(model)
    calls.clear()
    monkeypatch.setattr(kind, name, lambda self, *args, **options: (seen.append(self), real(self, *args, **options))[1])
    model(PIXELS)
    assert not calls and len(seen) >= 3
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["_attend", "_attention_branch", "_mlp_branch", "_scale"])
def test_methods_that_somebody_has_changed(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, real = model_of().eval(), [], getattr(NatLayer, name)
    model(PIXELS)
    calls.clear()
    monkeypatch.setattr(NatLayer, name, lambda self, *args: (seen.append(self), real(self, *args))[1])
    model(PIXELS)
    assert not calls and len(seen) >= 3


def test_subclasses_and_replaced_methods(calls: list[str]) -> None:
    model = model_of().eval()
    layer, seen = first_layer(model), []

    class Other(NatLayer):
        def _mlp_branch(self, hidden_states: Tensor) -> Tensor:
            seen.append(self)
            return super()._mlp_branch(hidden_states)

    layer.__class__ = Other
    model(PIXELS)
    assert seen == [layer] and len(calls) == 2 * BRANCHES
    layer.__class__ = NatLayer
    real = layer._attend
    layer._attend = lambda *args: (seen.append(None), real(*args))[1]  # type: ignore[method-assign]
    model(PIXELS)
    assert seen == [layer, None] and len(calls) == 4 * BRANCHES
    del layer._attend
    layer.output.dense._compiled_call_impl = lambda *args: (seen.append(1), layer.output.dense.forward(*args))[1]
    model(PIXELS)
    assert seen == [layer, None, 1] and len(calls) == 6 * BRANCHES


def test_nothing_is_kept_alive(calls: list[str]) -> None:
    model = model_of().train()
    step(model)
    layer = first_layer(model)
    weight = weakref.ref(layer.output.dense.weight)
    layer.output.dense = copy.deepcopy(layer.output.dense)
    assert weight() is None
    step(model)
    last, everything = weakref.ref(layer), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del layer, model
        assert last() is None and everything() is None
    finally:
        gc.enable()


def test_a_part_that_is_none(calls: list[str]) -> None:
    model = model_of().eval()
    first_layer(model).output.register_module("more", None)
    model(PIXELS), model(PIXELS)
    assert len(calls) == 6 * BRANCHES


@pytest.mark.parametrize("epsilon", [float("inf"), float("nan"), -1.0])
def test_an_epsilon_that_the_core_does_not_take(epsilon: float, calls: list[str], plainly: Callable) -> None:
    model = model_of().train()
    first_layer(model).layernorm_before.eps = epsilon
    found = step(model)
    assert len(calls) == 2 * BRANCHES + 1
    for ours, theirs in zip(found, plainly(lambda: step(model)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_the_attention_is_computed_once(calls: list[str], monkeypatch: pytest.MonkeyPatch, plainly: Callable) -> None:
    """Also where its projection is one that PyTorch has to make."""
    layer, seen, real = first_layer(model_of()).eval(), [], layers.na2d
    monkeypatch.setattr(layers, "na2d", lambda *args, **options: (seen.append(1), real(*args, **options))[1])
    weight = layer.attention.output.dense.weight
    layer.attention.output.dense.weight = nn.Parameter(weight.detach().t().contiguous().t())
    batch = torch.randn(2, 8, 8, 32)
    found = layer(batch)[0]
    assert len(seen) == 1
    torch.testing.assert_close(found, plainly(lambda: layer(batch)[0]), rtol=1e-4, atol=1e-5)


def test_numbers_that_overflow_are_seen(calls: list[str], plainly: Callable) -> None:
    """GELU of minus infinity is no number, as PyTorch's is: losses show it."""
    model = model_of().eval()
    with torch.no_grad():
        first_layer(model).intermediate.dense.bias.fill_(-torch.inf)
        assert model(PIXELS).logits.isnan().all()
        assert plainly(lambda: model(PIXELS)).logits.isnan().all()


def test_parameters_given_by_a_caller(calls: list[str], plainly: Callable) -> None:
    model = model_of().eval()
    parameters = {name: (p * 1.1).detach().requires_grad_() for name, p in model.named_parameters()}

    def run() -> list[Tensor]:
        logits = torch.func.functional_call(model, parameters, (PIXELS,)).logits
        return list(torch.autograd.grad(logits.square().sum(), list(parameters.values())))

    found = run()
    assert len(calls) == 3 * BRANCHES
    close(found, plainly(run))


def test_graphs_transforms_and_counters_have_the_plain_layers(calls: list[str]) -> None:
    model = model_of().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(PIXELS)
    assert counter.get_total_flops() > 0 and not calls
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (PIXELS,)).logits.sum())(parameters)
    with torch.no_grad():
        torch.func.vmap(lambda image: model(image[None]).logits)(PIXELS)
        torch.export.export(model, (PIXELS,))
    assert not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints(reentrant: bool, calls: list[str]) -> None:
    """Have the plain layers where tensors have to be the same when they are computed again, whoever watches then."""
    model = model_of().train()
    expected = step(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    calls.clear()
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(pixel_values=PIXELS, labels=LABELS).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert bool(calls) is reentrant and counter.get_total_flops() > 0
    close([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], expected)
    with torch.no_grad():
        calls.clear()
        model.eval()(PIXELS)
    assert calls


def test_checkpoints_of_a_caller(calls: list[str]) -> None:
    layer, batch = first_layer(model_of()), torch.randn(2, 8, 8, 32, requires_grad=True)
    expected = torch.autograd.grad(layer(batch)[0].square().sum(), batch)[0]
    calls.clear()
    handle = layer.output.register_forward_hook(lambda *args: None)
    output = checkpoint(lambda x: layer(x)[0], batch, use_reentrant=False)
    handle.remove()
    output.square().sum().backward()
    assert not calls
    torch.testing.assert_close(batch.grad, expected, rtol=1e-3, atol=1e-3)


def test_gradients_of_gradients(calls: list[str], plainly: Callable) -> None:
    """As a penalty on the gradient of the pixels has them."""
    model, pixels = model_of().train(), PIXELS.clone().requires_grad_()

    def run() -> list[Tensor]:
        model.zero_grad()
        loss = model(pixels, labels=LABELS).loss
        (gradient,) = torch.autograd.grad(loss, pixels, create_graph=True)
        gradient.square().sum().mul(100).backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[misc]

    found = run()
    assert calls
    close(found, plainly(run))


def test_copies_and_pickles(calls: list[str]) -> None:
    model = model_of().eval()
    expected = model(PIXELS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        calls.clear()
        assert torch.equal(other(PIXELS).logits, expected)
        assert len(calls) == 3 * BRANCHES
    with torch.no_grad():
        first_layer(copied := copy.deepcopy(model)).output.dense.weight.mul_(2)
    assert not torch.equal(copied(PIXELS).logits, expected)
    assert torch.equal(model(PIXELS).logits, expected)


def test_several_threads_train_copies_of_a_network() -> None:
    expected = step(model_of("nat").train())
    found: list[list[Tensor]] = []

    models = [model_of("nat").train() for _ in range(3)]
    threads = [threading.Thread(target=lambda m=m: found.append(step(m))) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for other in found:
        assert all(map(torch.equal, other, expected))
