"""Layers in one call as operators of compiled graphs: what the call gives; who gets PyTorch's layers instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nbhd
from nbhd.backends import cpu
from nbhd.models import NatConfig, NatForImageClassification
from nbhd.models.nat.layers import NatDropPath, NatIntermediate, NatLayer, NeighborhoodAttention
from nbhd.nn import joined, joined_operator
from tests.nn.test_joined import CASES, Case, compare

pytestmark = [
    pytest.mark.skipif(cpu.why_unusable() is not None, reason=f"no native core: {cpu.why_unusable()}"),
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_exporting"), reason="this torch cannot tell that a graph is being exported"
    ),
]


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if every machine gained by it."""
    monkeypatch.setattr(joined_operator, "joined_layers_are_faster", lambda dtype, with_gradients: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_operator(case: Case) -> Callable[[list[Any]], list[Tensor]]:
    """The operator called with a case's tensors."""

    def run(tensors: list[Any]) -> list[Tensor]:
        batch, residual, *parameters = tensors
        adds_input = case.residual == "input"
        learns = torch.is_grad_enabled()
        made = torch.ops.nbhd.layers(
            batch, None if adds_input else residual, *parameters, *(None,) * (10 - len(parameters)),
            1e-5 if case.norm else None, case.factor, adds_input, learns,
        )  # fmt: skip
        return list(made[: (len(parameters) - 4) // 2])

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_the_call(name: str) -> None:
    case = CASES[name]
    ours = case.results(by_operator(case))
    assert all(map(torch.equal, ours, case.results(case.joined)))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_on_a_machine_without_the_core(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's layers, and what a backward wants that runs where there is one."""
    case = CASES[name]
    monkeypatch.setattr(joined_operator.cpu, "why_unusable", lambda: "there is none")
    compare(case.results(by_operator(case)), case)


@pytest.mark.parametrize("name", ["mlp of NAT", "query, key and value", "projection", "no norm"])
def test_the_operator_is_as_pytorch_wants_it(name: str) -> None:
    case = CASES[name]
    batch, residual, *parameters = case.leaves()
    adds_input = case.residual == "input"
    parameters += [None] * (10 - len(parameters))
    rest = 1e-5 if case.norm else None, case.factor, adds_input
    given = batch, None if adds_input else residual, *parameters, *rest, True
    torch.library.opcheck(torch.ops.nbhd.layers, given)
    *outputs, moments, sums = (t.detach() for t in torch.ops.nbhd.layers(*given))
    d_outputs = [torch.randn_like(output) if output.numel() else None for output in outputs]
    detached = [None if t is None else t.detach() for t in (batch, *parameters)]
    wants = [t is not None for t in detached]
    torch.library.opcheck(
        torch.ops.nbhd.layers_backward, (*d_outputs, *detached, moments, sums, *rest, wants),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# ---- networks


def network(**options: Any) -> NatForImageClassification:
    torch.manual_seed(0)
    config = NatConfig(
        embed_dim=16, depths=[2, 1], num_heads=[2, 4], kernel_size=3, num_labels=5, drop_path_rate=0.0, **options
    )
    return NatForImageClassification(config)


def compiled(model: nn.Module, **options: Any) -> tuple[Any, list[int]]:
    """The model, and how many of the operators each of its graphs has."""
    graphs: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(sum("nbhd.layers" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return torch.compile(model, backend=keep, **{"fullgraph": True, **options}), graphs


PIXELS = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))
#: Norm and projections, projection and residual, norm and MLP and residual.
CALLS = 3 * 3


@pytest.mark.parametrize("options", [{}, {"layer_scale_init_value": 0.5}, {"qkv_bias": False}], ids=str)
def test_a_network_in_inference(options: dict[str, Any]) -> None:
    model = network(**options).eval()
    run, graphs = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(PIXELS).logits, model.double()(PIXELS.double()).logits.float())
    assert graphs == [CALLS]


@pytest.mark.slow
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.4])
def test_a_network_in_training(drop_path_rate: float) -> None:
    """Values and gradients of what the compiler makes, against float64."""
    model = network().train()
    if drop_path_rate:
        for level in model.nat.encoder.levels:
            level.layers[0].drop_path = NatDropPath(drop_path_rate).train()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(call: Callable, pixels: Tensor) -> list[Tensor]:
        torch.manual_seed(3)  # of what is dropped
        logits = call(pixels).logits
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        return [logits.detach(), *found]

    ours = step(run, PIXELS)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(joined_operator, "joined_layers_are_faster", lambda *_: False)
        torch._dynamo.reset()
        theirs = step(torch.compile(model, backend="aot_eager", fullgraph=True), PIXELS)
    if drop_path_rate:  # float64 draws other numbers
        for found, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)
        return
    truth = step(model.double(), PIXELS.double())
    size = max(t.square().mean().sqrt() for t in truth[1:])
    for found, other, exact in zip(ours, theirs, truth, strict=True):
        error, expected = ((x.double() - exact).square().mean().sqrt() for x in (found, other))
        assert error <= 2 * expected + 1e-7 * size


@pytest.mark.slow
def test_batches_of_any_size() -> None:
    model = network().eval()
    run, graphs = compiled(model, dynamic=True)
    with torch.no_grad():
        for size in [(2, 3, 32, 40), (3, 3, 48, 36), (5, 3, 32, 32)]:
            pixels = torch.randn(size)
            torch.testing.assert_close(run(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-5)
    assert graphs == [CALLS]


def test_ready_for_inference() -> None:
    model = network().eval()
    expected = model(PIXELS).logits.detach()
    run, graphs = compiled(nbhd.optimize_for_inference(model, dtype=None, compile=True))
    model._compiled_call_impl = None  # compiled here, to look at the graph
    torch.testing.assert_close(run(PIXELS).logits, expected, rtol=1e-4, atol=1e-5)
    assert graphs == [CALLS]


def test_second_derivatives() -> None:
    """With a compiler that leaves the backward to autograd: a penalty on a gradient, as it is without a graph."""
    model = network().train()
    run, graphs = compiled(model)

    def penalty(call: Callable, dtype: torch.dtype) -> list[Tensor]:
        pixels = PIXELS.to(dtype, copy=True).requires_grad_()
        loss = call(pixels).logits.square().sum()
        (slope,) = torch.autograd.grad(loss, pixels, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True))

    ours = penalty(run, torch.float32)
    assert graphs == [CALLS]
    for found, exact in zip(ours, penalty(model.double(), torch.float64), strict=True):
        assert (found is None) is (exact is None)
        if found is not None:
            torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-5 * float(exact.abs().max()) + 1e-9)


def test_batches_of_gradients() -> None:
    model = network().train()
    run, graphs = compiled(model)
    weight = model.nat.encoder.levels[0].layers[0].intermediate.dense.weight

    def slopes(call: Callable) -> Tensor:
        logits = call(PIXELS).logits
        which = torch.eye(logits.numel()).view(-1, *logits.shape)
        return torch.autograd.grad(logits, weight, which, is_grads_batched=True)[0]

    torch.testing.assert_close(slopes(run), slopes(model), rtol=1e-3, atol=1e-7)
    assert graphs == [CALLS]


def test_dual_numbers_that_come_later() -> None:
    """Other graphs are made for them (PyTorch 2.15 breaks them where they come in), and nothing loses a tangent."""
    model = network().eval().requires_grad_(False)
    run, graphs = compiled(model, fullgraph=False)
    run(PIXELS)

    def tangent(call: Callable) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            logits = call(torch.autograd.forward_ad.make_dual(PIXELS, PIXELS.sin())).logits
            return torch.autograd.forward_ad.unpack_dual(logits).tangent

    torch.testing.assert_close(tangent(run), tangent(model))
    assert graphs[0] == CALLS
    assert not any(graphs[1:])


class Other(nn.Parameter):
    """As quantised and sharded weights are, which know linear() and not this."""


def test_weights_of_other_classes() -> None:
    model = network().eval().requires_grad_(False)
    dense = model.nat.encoder.levels[0].layers[0].output.dense
    dense.weight = Other(dense.weight.detach(), requires_grad=False)
    run, graphs = compiled(model)
    torch.testing.assert_close(run(PIXELS).logits, model(PIXELS).logits)
    assert graphs == [CALLS - 1]


def test_biases_may_change_before_the_backward() -> None:
    model = network().train()
    run, _ = compiled(model)
    loss = run(PIXELS).logits.square().sum()
    layer = model.nat.encoder.levels[0].layers[0]
    with torch.no_grad():
        for part in (layer.output.dense, layer.intermediate.dense, layer.attention.self.query):
            part.bias.add_(1)
    loss.backward()
    with torch.no_grad():
        layer.output.dense.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_again = run(PIXELS).logits.sum()
        with torch.no_grad():
            layer.output.dense.weight.add_(1)
        run_again.backward()


@pytest.mark.parametrize("where", [NatIntermediate, NatLayer, NeighborhoodAttention], ids=lambda kind: kind.__name__)
def test_functions_put_into_classes(where: type, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_mlp_branch" if where is NatLayer else "forward"
    real = getattr(where, name)

    def other(self: Any, *given: Any) -> Any:
        made = real(self, *given)
        return (made[0] * 2, *made[1:]) if isinstance(made, tuple) else made * 2

    monkeypatch.setattr(where, name, other)
    model = network().eval()
    run, graphs = compiled(model)
    torch.testing.assert_close(run(PIXELS).logits, model(PIXELS).logits)
    assert graphs == [0]


@pytest.mark.parametrize(
    "what", ["hook", "subclass", "forward", "own method", "activation", "frozen", "autocast", "machine"]
)
def test_what_has_the_plain_layers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    layer = model.nat.encoder.levels[0].layers[0]
    expected, context = CALLS - 3, functools.partial(torch.set_grad_enabled, what == "frozen")
    if what == "hook":  # those that come after the graph torch.compile does not look for
        layer.output.dense.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    elif what == "subclass":
        layer.intermediate.dense.__class__ = type("Other", (type(layer.intermediate.dense),), {})
    elif what == "forward":
        layer.attention.self.query.forward = layer.attention.self.key.forward
    elif what == "own method":
        layer._mlp_branch = lambda x: x
    elif what == "activation":
        layer.intermediate.intermediate_act_fn.act = torch.nn.functional.relu
    elif what == "frozen":  # the MLP's second layer, for whose gradients less has to be kept
        layer.output.dense.requires_grad_(False)
        expected = CALLS - 1
    elif what == "autocast":
        expected, context = 0, functools.partial(torch.autocast, "cpu", torch.bfloat16)
        monkeypatch.setattr(joined, "joined_layers_are_faster", lambda *_: False)  # plain layers on either side
    else:
        monkeypatch.setattr(joined_operator, "joined_layers_are_faster", lambda *_: False)
        expected = 0
    run, graphs = compiled(model)
    # of a processor without products of 16 bits graphs have PyTorch's, which round what float32 does not
    tolerance = {"rtol": 0.02, "atol": 2e-3} if what == "autocast" else {}
    with context():
        torch.testing.assert_close(run(PIXELS).logits, model(PIXELS).logits, **tolerance)
    assert graphs == [expected]


def test_the_switch_of_onednn() -> None:
    run, graphs = compiled(network().eval())
    torch._C._set_mkldnn_enabled(False)
    try:
        run(PIXELS)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert graphs == [0]


@pytest.mark.slow
def test_exports_have_the_plain_layers() -> None:
    program = torch.export.export(network().eval(), (PIXELS,))
    assert not any("nbhd.layers" in str(node.target) for node in program.graph.nodes)
