"""The same numbers as transformers 4.40.2, whose outputs are recorded in ``tests/fixtures/nat_4_40_2``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatModel
from tests.fixtures import nat_reference
from tests.fixtures.nat_reference import CASES, Case

FOLDER = Path(nat_reference.__file__).parent / "nat_4_40_2"
#: Largest error allowed, relative to the largest value of the tensor (or to 1 if that is smaller). One operation rounds
#: by 1e-16 in float64 and by 6e-8 in float32; a network has some hundred in a row.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

#: Random masks are drawn in the model's dtype and were recorded in float64: a training case has no other.
PAIRS = [(case, dtype) for case in CASES for dtype in TOLERANCE if not (case.training and dtype == torch.float32)]
every_case = pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=lambda value: getattr(value, "name", str(value)))


class Recorded:
    """The recorded outputs of a case, and a comparison with them."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        with safe_open(FOLDER / f"{case.name}.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        pixel_values, labels = nat_reference.make_inputs(case)
        self.pixel_values = pixel_values.to(dtype)
        self.labels = labels.to(dtype) if labels.is_floating_point() else labels

    def build(self, model_class: type, **config: Any) -> Any:
        model = model_class(NatConfig(**self.case.config, **config)).to(self.dtype)
        nat_reference.fill_weights(model, self.case.seed)
        model.train(self.case.training)
        torch.manual_seed(self.case.seed)  # drop path and dropout draw the same numbers as when this was recorded
        return model

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name in self.tensors)

    def compare(self, name: str, value: Tensor) -> None:
        expected = self.tensors[name]
        assert value.shape == expected.shape, name
        assert value.dtype == self.dtype, name
        error = (value.double() - expected).abs().max() / max(1.0, expected.abs().max())
        assert error <= TOLERANCE[self.dtype], f"{name}: {error:.1e}"


@pytest.fixture
def recorded(case: Case, dtype: torch.dtype) -> Recorded:
    return Recorded(case, dtype)


@every_case
def test_model(recorded: Recorded) -> None:
    model = recorded.build(NatModel)
    out = model(recorded.pixel_values, output_hidden_states=True, output_attentions=True)
    recorded.compare("model.last_hidden_state", out.last_hidden_state)
    recorded.compare("model.pooler_output", out.pooler_output)
    assert len(out.hidden_states) == recorded.count("model.hidden_states.")
    assert len(out.attentions) == recorded.count("model.attentions.")
    for i, state in enumerate(out.hidden_states):
        recorded.compare(f"model.hidden_states.{i}", state)
        assert torch.equal(out.reshaped_hidden_states[i], state.permute(0, 3, 1, 2))
    for i, attention in enumerate(out.attentions):
        recorded.compare(f"model.attentions.{i}", attention)


@every_case
def test_fused_operator_gives_the_same_as_the_two_halves(recorded: Recorded) -> None:
    out = recorded.build(NatModel)(recorded.pixel_values)
    recorded.compare("model.last_hidden_state", out.last_hidden_state)
    assert out.hidden_states is out.attentions is out.reshaped_hidden_states is None


@every_case
def test_classifier_loss_and_gradients(recorded: Recorded) -> None:
    model = recorded.build(NatForImageClassification)
    out = model(recorded.pixel_values, labels=recorded.labels)
    recorded.compare("classifier.logits", out.logits)
    recorded.compare("classifier.loss", out.loss)
    assert model.config.problem_type == recorded.facts["problem_type"]

    out.loss.backward()
    parameters = dict(model.named_parameters())
    assert recorded.case.gradients
    for name in recorded.case.gradients:
        recorded.compare(f"classifier.gradient.{name}", parameters[name].grad)
    unused = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert not unused


@every_case
def test_backbone(recorded: Recorded) -> None:
    stages = ["stem", *(f"stage{i + 1}" for i in range(len(recorded.case.config["depths"])))]
    model = recorded.build(NatBackbone, out_features=stages)
    out = model(recorded.pixel_values, output_hidden_states=True)
    assert model.channels == recorded.facts["channels"]
    assert len(out.feature_maps) == len(out.hidden_states) == recorded.count("backbone.feature_maps.")
    for i, (feature_map, state) in enumerate(zip(out.feature_maps, out.hidden_states, strict=True)):
        recorded.compare(f"backbone.feature_maps.{i}", feature_map)
        recorded.compare(f"backbone.hidden_states.{i}", state)
        assert feature_map.is_contiguous()


@every_case
def test_plain_tuples_have_the_same_length_and_order(recorded: Recorded) -> None:
    def check(model_class: type, kind: str, first: str, *everything: Any, **config: Any) -> None:
        model = recorded.build(model_class, **config)
        plain = model(recorded.pixel_values, return_dict=False)
        assert type(plain) is tuple
        assert len(plain) == recorded.facts[kind]
        model = recorded.build(model_class, **config)
        plain = model(recorded.pixel_values, *everything)
        assert type(plain) is tuple
        assert len(plain) == recorded.facts[f"{kind}_all"]
        recorded.compare(first, plain[0][0] if kind == "backbone" else plain[1 if kind == "classifier" else 0])

    stages = ["stem", *(f"stage{i + 1}" for i in range(len(recorded.case.config["depths"])))]
    check(NatModel, "model", "model.last_hidden_state", True, True, False)
    check(NatForImageClassification, "classifier", "classifier.logits", recorded.labels, True, True, False)
    check(NatBackbone, "backbone", "backbone.feature_maps.0", True, True, False, out_features=stages)
