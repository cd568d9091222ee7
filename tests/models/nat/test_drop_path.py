"""Stochastic depth, whose dropped branches are not computed where that makes no difference but in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nbhd.models import NatConfig, NatForImageClassification
from nbhd.models.nat.layers import NatDropPath, NatIntermediate, NatLayer, NeighborhoodAttention

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depths": [3, 2], "num_heads": [2, 4], "kernel_size": 3, "num_labels": 5, "drop_path_rate": 0.6,
}  # fmt: skip


def network(**settings: Any) -> NatForImageClassification:
    torch.manual_seed(0)
    return NatForImageClassification(NatConfig(**SMALL | settings)).double().train()


def step(model: nn.Module, images: int, seed: int, **more: Any) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """Logits, the gradient of every parameter, and the next random number."""
    pixels = torch.randn(images, 3, 40, 36, generator=torch.Generator().manual_seed(1)).double()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(pixel_values=pixels, **more).logits
    (logits * torch.arange(1.0, 6)).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}, torch.rand(1)


def watch(model: nn.Module) -> None:
    """Somebody looks at what stochastic depth makes, so that all of it has to be made."""
    for module in model.modules():
        if isinstance(module, NatDropPath):
            module.register_forward_hook(lambda *_: None)


def images_seen(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[int]:
    """How many images go through each module of a kind; no hook, which would be noticed."""
    seen: list[int] = []
    forward: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]

    def counting(self: nn.Module, hidden_states: torch.Tensor, *more: Any) -> Any:
        seen.append(len(hidden_states))
        return forward(self, hidden_states, *more)

    monkeypatch.setattr(kind, "forward", counting)
    return seen


@pytest.mark.parametrize(
    "settings",
    [{}, {"layer_scale_init_value": 0.3, "qkv_bias": False}, {"kernel_size": 11}, {"dilations": [[1, 2, 1], [1, 1]]}],
)
@pytest.mark.parametrize("images", [1, 2, 7])
def test_results_and_gradients_are_those_of_computing_all(settings: dict[str, Any], images: int) -> None:
    model, watched = network(**settings), network(**settings)
    watch(watched)
    for seed in range(6):
        logits, gradients, next_number = step(model, images, seed)
        all_logits, all_gradients, all_next = step(watched, images, seed)
        torch.testing.assert_close(logits, all_logits, rtol=1e-10, atol=1e-12)
        assert torch.equal(next_number, all_next)
        for name, gradient in all_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_under_autocast_results_are_those_of_computing_all() -> None:
    model, watched = network().float(), network().float()
    watch(watched)
    found = []
    for each in (model, watched):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(each(pixel_values=torch.randn(7, 3, 40, 36)).logits)
        found[-1].float().sum().backward()
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


def test_dropped_branches_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    attended, passed = images_seen(monkeypatch, NeighborhoodAttention), images_seen(monkeypatch, NatIntermediate)
    model = network(drop_path_rate=0.7)
    step(model, 16, 0)
    assert len(attended) == len(passed) == 5
    assert attended[0] == passed[0] == 16  # the first layer drops nothing
    assert all(n < 16 for n in attended[2:] + passed[2:])
    model.eval()
    step(model, 16, 0)
    assert attended[5:] == passed[5:] == [16] * 5


def test_parameters_of_layers_that_all_images_drop_have_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = images_seen(monkeypatch, NatIntermediate)
    model = network(drop_path_rate=0.99)
    _, gradients, _ = step(model, 2, 0)
    last = [gradient for name, gradient in gradients.items() if ".levels.1.layers.1." in name]
    assert seen[-1] == 0
    assert len(last) > 10
    assert all(gradient is not None and not gradient.any() for gradient in last)


@pytest.mark.parametrize("watcher", ["hook inside", "forward inside", "dropout", "global hook"])
def test_who_watches_sees_all_images(watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = images_seen(monkeypatch, NeighborhoodAttention)
    model = network(hidden_dropout_prob=0.1 if watcher == "dropout" else 0.0)
    layers = [module for module in model.modules() if isinstance(module, NatLayer)]
    handle = None
    for layer in layers:
        if watcher == "hook inside":
            layer.intermediate.dense.register_forward_hook(lambda *_: None)
        elif watcher == "forward inside":
            layer.attention.output.forward = layer.attention.output.forward
    if watcher == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        step(model, 8, 0)
    finally:
        if handle is not None:
            handle.remove()
    assert seen == [8] * 5


def test_attentions_are_those_of_all_images() -> None:
    model = network()
    torch.manual_seed(0)
    attentions = model(pixel_values=torch.randn(8, 3, 40, 36).double(), output_attentions=True).attentions
    assert [len(each) for each in attentions] == [8, 8]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_drop_the_same_images_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpointed = network(), network()
    if hasattr(checkpointed, "activation_checkpointing_enable"):
        checkpointed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:  # TODO: drop when the oldest supported transformers has the other name
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    logits, gradients, _ = step(model, 6, 3)
    seen = images_seen(monkeypatch, NeighborhoodAttention)
    again, others, _ = step(checkpointed, 6, 3)
    assert min(seen) < 6
    torch.testing.assert_close(again, logits, rtol=1e-10, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_a_compiled_model_computes_all() -> None:
    model = network(depths=[1, 1])
    logits, gradients, _ = step(torch.compile(model, backend="eager", fullgraph=True), 4, 0)
    assert logits.shape == (4, 5)
    assert all(gradient is not None for gradient in gradients.values())
