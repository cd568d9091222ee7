"""The models beyond the recorded numbers: sizes, training, dtypes, compilation, and what is refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from nbhd.errors import ArgumentError
from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatModel
from nbhd.models.nat import layers
from nbhd.models.nat.layers import NatDropPath, NatLayer, NeighborhoodAttention
from tests.fixtures.nat_reference import fill_weights

SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "kernel_size": 3,
    "num_labels": 5,
    "layer_scale_init_value": 0.1,
}


def build(model_class: Any = NatForImageClassification, **settings: Any) -> Any:
    model = model_class(NatConfig(**(SMALL | settings)))
    fill_weights(model, seed=0)
    return model.eval()


# torch.func


@pytest.mark.parametrize("attentions", [False, True])
def test_gradients_of_each_image_by_vmap(attentions: bool) -> None:
    model = build().double()
    parameters = dict(model.named_parameters())
    pixels, labels = torch.randn(3, 3, 20, 24, dtype=torch.float64), torch.tensor([0, 3, 1])

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        options = {"output_attentions": attentions}
        logits = torch.func.functional_call(model, parameters, (image[None],), options).logits
        return nn.functional.cross_entropy(logits, label[None])

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, pixels, labels)
    for i in range(3):
        wanted = torch.autograd.grad(loss(parameters, pixels[i], labels[i]), list(parameters.values()))
        for name, one in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], one)


# Subclasses and hooks


class Sorter(NatForImageClassification):
    """Transformers tells a loss by the name of the class."""


@pytest.mark.parametrize(
    ("labels", "kind"), [(torch.tensor([0, 3]), "single_label"), (torch.rand(2, 5), "multi_label")]
)
def test_losses_do_not_depend_on_the_name_of_the_class(labels: torch.Tensor, kind: str) -> None:
    pixels = torch.randn(2, 3, 20, 24)
    model = build(Sorter)
    loss = model(pixels, labels=labels).loss
    assert loss == build()(pixels, labels=labels).loss
    assert model.config.problem_type == f"{kind}_classification"


@pytest.mark.parametrize("attentions", [False, True])
def test_modules_return_no_none(attentions: bool) -> None:
    """Tools that hook into layers take each entry for a tensor; 4.40.2 had as many."""
    model, seen = build(), {}
    for name, module in model.named_modules():
        if name.endswith(("attention", "attention.self", "layers.0", "levels.0")):
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    model(torch.randn(1, 3, 20, 24), output_attentions=attentions)
    assert len(seen) > 4
    assert all(torch.is_tensor(entry) for output in seen.values() for entry in output)
    assert len(seen["nat.encoder.levels.0"]) == 2 + attentions
    assert len(seen["nat.encoder.levels.0.layers.0"]) == 1 + attentions


def test_a_layer_may_be_one_that_returns_its_output_alone() -> None:
    class Identity(nn.Module):
        def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
            return (hidden_states,)

    model = build()
    model.nat.encoder.levels[0].layers[0] = Identity()
    assert torch.isfinite(model(torch.randn(1, 3, 20, 24)).logits).all()


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (17, 64), (33, 31)])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_every_stride_halves_and_rounds_up(size: tuple[int, int], patch_size: int) -> None:
    def half(n: int, times: int) -> int:
        return n if times == 0 else half(-(-n // 2), times - 1)

    times = {2: 1, 4: 2, 8: 3}[patch_size]
    out = build(NatModel, patch_size=patch_size)(torch.randn(2, 3, *size), output_hidden_states=True)
    stem, stage1, stage2 = out.hidden_states
    assert stem.shape == (2, half(size[0], times), half(size[1], times), 8)
    assert stage1.shape == stage2.shape == (2, half(size[0], times + 1), half(size[1], times + 1), 16)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_stem_doubles_its_channels_up_to_embed_dim(patch_size: int) -> None:
    convolutions = build(NatModel, patch_size=patch_size, embed_dim=16).embeddings.patch_embeddings.projection
    assert [c.out_channels for c in convolutions] == {2: [16], 4: [8, 16], 8: [4, 8, 16]}[patch_size]


def test_empty_batch() -> None:
    assert build()(torch.randn(0, 3, 20, 24)).logits.shape == (0, 5)


def test_a_map_smaller_than_the_dilated_window_is_padded_to_it() -> None:
    model = build(NatModel, dilations=[[4], [1, 2]])
    out = model(torch.randn(1, 3, 20, 36), output_attentions=True)  # maps 5x9, 3x5
    assert [tuple(a.shape) for a in out.attentions] == [(1, 1, 12, 12, 9), (1, 2, 6, 6, 9)]
    assert out.last_hidden_state.shape == (1, 3, 5, 16)


def test_dilation_changes_the_output() -> None:
    pixels = torch.randn(1, 3, 48, 48)
    plain, dilated = build(NatModel), build(NatModel, dilations=[[2], [1, 1]])
    assert not torch.allclose(plain(pixels).pooler_output, dilated(pixels).pooler_output, atol=1e-3)
    same = build(NatModel, dilations=[[1], [1, 1]])
    assert torch.equal(plain(pixels).pooler_output, same(pixels).pooler_output)


# Outputs


def test_attentions_are_probabilities_of_the_last_layer_of_each_stage() -> None:
    out = build(NatModel)(torch.randn(2, 3, 40, 24), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 1, 10, 6, 9), (2, 2, 5, 3, 9)]
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_returned_attentions_and_hidden_states_get_gradients() -> None:
    out = build(NatModel)(torch.randn(1, 3, 24, 24), output_attentions=True, output_hidden_states=True)
    kept = [*out.attentions, *out.hidden_states]
    for tensor in kept:
        tensor.retain_grad()
    out.last_hidden_state.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


def test_configuration_asks_for_outputs_too() -> None:
    pixels = torch.randn(1, 3, 24, 24)
    model = build(output_hidden_states=True, output_attentions=True)
    out = model(pixels)
    assert (len(out.hidden_states), len(out.attentions), len(out.reshaped_hidden_states)) == (3, 2, 3)
    assert model(pixels, output_hidden_states=False, output_attentions=False).hidden_states is None
    assert type(build(return_dict=False)(pixels)) is tuple


def test_without_pooling_there_is_no_pooler_output() -> None:
    model = NatModel(NatConfig(**SMALL), add_pooling_layer=False).eval()
    assert model(torch.randn(1, 3, 24, 24)).pooler_output is None
    assert model(torch.randn(1, 3, 24, 24), return_dict=False)[1] is None


def test_zero_labels_give_features() -> None:
    assert build(num_labels=0)(torch.randn(1, 3, 24, 24)).logits.shape == (1, 16)


def test_backbone_runs_no_further_than_it_must() -> None:
    model = build(NatBackbone, out_features=["stem", "stage1"])
    pixels = torch.randn(1, 3, 24, 40)
    whole = model(pixels, output_hidden_states=True)
    with mock.patch.object(layers.NatDownsampler, "forward", side_effect=AssertionError):
        maps = model(pixels).feature_maps
    assert len(maps) == 2
    assert all(torch.equal(a, b) for a, b in zip(maps, whole.feature_maps, strict=True))
    assert len(whole.hidden_states) == 3
    assert len(build(NatBackbone, out_features=["stem"])(pixels).feature_maps) == 1


def test_backbone_names_a_stage_it_was_not_built_for() -> None:
    model = build(NatBackbone, out_features=["stage1"])
    model.out_features = ["stage2"]
    with pytest.raises(ArgumentError, match=r"'stage2', but this backbone was built for \['stage1'\]"):
        model(torch.randn(1, 3, 24, 24))


def test_forward_takes_the_arguments_in_the_order_of_4_40_2() -> None:
    def names(model_class: type) -> list[str]:
        return list(inspect.signature(model_class.forward).parameters)[1:]

    assert names(NatModel)[:4] == ["pixel_values", "output_attentions", "output_hidden_states", "return_dict"]
    assert names(NatForImageClassification)[:5] == [
        "pixel_values", "labels", "output_attentions", "output_hidden_states", "return_dict",
    ]  # fmt: skip
    assert names(NatBackbone)[:4] == ["pixel_values", "output_hidden_states", "output_attentions", "return_dict"]


def test_input_embeddings_are_the_patch_embeddings() -> None:
    for model in (build(NatModel), build(), build(NatBackbone)):
        assert isinstance(model.get_input_embeddings(), layers.NatPatchEmbeddings)
        others = copy.deepcopy(model.get_input_embeddings())
        model.set_input_embeddings(others)
        assert model.get_input_embeddings() is model.base_model.embeddings.patch_embeddings is others


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (None, "You have to specify pixel_values"),
        (torch.randn(3, 24, 24), r"pixel_values must be \(batch, channels, height, width\), got 3 axes"),
        (torch.randn(1, 4, 24, 24), "3 channels of config.num_channels along axis 1, got 4"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.uint8), r"floating point and normalised, got torch\.uint8"),
    ],
)
def test_wrong_pixel_values_are_named(pixel_values: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()(pixel_values)


# Training


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model = build(drop_path_rate=0.5, attention_probs_dropout_prob=0.2).train()
    other = copy.deepcopy(model)
    if hasattr(other, "activation_checkpointing_enable"):
        other.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        assert other.is_activation_checkpointing
    else:  # the names of older versions of transformers
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert other.is_gradient_checkpointing
    pixels, labels = torch.randn(3, 3, 24, 24), torch.tensor([0, 1, 2])
    for m in (model, other):
        torch.manual_seed(0)
        m(pixels, labels=labels).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_attention_dropout_drops_probabilities_in_training_only() -> None:
    model = build(attention_probs_dropout_prob=0.5)
    pixels = torch.randn(4, 3, 40, 40)
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    attention = model(pixels, output_attentions=True).attentions[0]
    assert 0.45 < (attention == 0).float().mean() < 0.55
    torch.testing.assert_close(attention.sum(-1).mean(), torch.tensor(1.0), atol=0.05, rtol=0)  # kept ones are doubled
    with mock.patch.object(layers, "na2d", side_effect=AssertionError):
        model(pixels).logits.sum().backward()
    model.eval()
    with mock.patch.object(layers, "attention_weights", side_effect=AssertionError):
        model(pixels)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    drop = NatDropPath(0.3).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(2, 3)), torch.ones(2, 3))
    assert torch.equal(NatDropPath(1.0).train()(torch.ones(2, 3)), torch.zeros(2, 3))


def test_drop_path_rates_grow_linearly_over_all_layers() -> None:
    model = build(NatModel, depths=[2, 3], drop_path_rate=0.4)
    drops = [layer.drop_path for level in model.encoder.levels for layer in level.layers]
    assert isinstance(drops[0], nn.Identity)
    assert [d.drop_prob for d in drops[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_loss_follows_the_problem_type() -> None:
    pixels = torch.randn(2, 3, 24, 24)
    model = build()
    logits = model(pixels).logits
    classes, several = torch.tensor([1, 4]), torch.tensor([[0, 1, 0, 1, 1.0], [1, 0, 0, 0, 0]])
    torch.testing.assert_close(build()(pixels, labels=classes).loss, nn.functional.cross_entropy(logits, classes))
    expected = nn.functional.binary_cross_entropy_with_logits(logits, several)
    torch.testing.assert_close(build()(pixels, labels=several).loss, expected)
    values = torch.randn(2, 5)
    expected = nn.functional.mse_loss(logits, values)
    torch.testing.assert_close(build(problem_type="regression")(pixels, labels=values).loss, expected)


def test_forward_names_what_a_trainer_looks_for() -> None:
    parameters = inspect.signature(NatForImageClassification.forward).parameters
    assert {"pixel_values", "labels"} <= set(parameters)
    assert NatForImageClassification.accepts_loss_kwargs is False


# Initial weights


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = NatForImageClassification(NatConfig(**(SMALL | {"embed_dim": 32, "initializer_range": 0.05})))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.2)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
        elif isinstance(module, NeighborhoodAttention):
            assert not module.rpb.any()
        elif isinstance(module, NatLayer):
            assert torch.equal(module.layer_scale_parameters, torch.full_like(module.layer_scale_parameters, 0.1))


def test_model_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = NatForImageClassification(NatConfig.from_variant("nat_base"))
    assert all(p.is_meta for p in model.parameters())
    assert model.nat.encoder.levels[3].layers[-1].drop_path.drop_prob == pytest.approx(0.5)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_close_to_float32(dtype: torch.dtype) -> None:
    pixels = torch.randn(2, 3, 40, 56)
    model = build()
    expected = model(pixels).logits
    model.to(dtype)
    logits = model(pixels).logits  # the processor gives float32; the stem takes it to the model's dtype
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol={torch.float64: 1e-5}.get(dtype, 0.1), rtol=0)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_is_close_to_float32_and_keeps_float32_gradients() -> None:
    pixels = torch.randn(2, 3, 40, 56)
    model = build(drop_path_rate=0.0).train()
    expected = model(pixels).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pixels, labels=torch.tensor([0, 1]))
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), expected, atol=0.1, rtol=0)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# Compilation


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in [(2, 3, 40, 56), (1, 3, 24, 24)]:
        pixels = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)
    with torch.no_grad():
        out = compiled(pixels, output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [NatForImageClassification, NatBackbone])
def test_exports_with_any_batch_and_size(model_class: Any) -> None:
    from torch.export import Dim

    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch cannot tell that a graph is being exported")
    model = build(model_class, depths=[1, 1], kernel_size=7)
    first = (lambda out: out.logits) if model_class is NatForImageClassification else (lambda out: out.feature_maps[0])
    dynamic = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=9, max=2048), 3: Dim("width", min=9, max=2048)}
    program = torch.export.export(model, (torch.randn(2, 3, 224, 160),), dynamic_shapes=(dynamic,))
    for size in [(2, 3, 224, 160), (1, 3, 64, 49), (3, 3, 20, 100), (2, 3, 12, 9)]:  # maps smaller than the window, too
        pixels = torch.randn(size)
        torch.testing.assert_close(first(program.module()(pixels)), first(model(pixels)))
