"""The configuration: 4.40.2's defaults, order and tolerance; what no model could have is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from nbhd.errors import ArgumentError
from nbhd.models import NatConfig, NatForImageClassification, NatModel
from nbhd.models.nat import VARIANTS

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3}


def test_defaults_are_those_of_4_40_2() -> None:
    config = NatConfig()
    expected = {
        "patch_size": 4, "num_channels": 3, "embed_dim": 64, "depths": [3, 4, 6, 5], "num_heads": [2, 4, 8, 16],
        "kernel_size": 7, "mlp_ratio": 3.0, "qkv_bias": True, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.1, "hidden_act": "gelu", "initializer_range": 0.02,
        "layer_norm_eps": 1e-5, "layer_scale_init_value": 0.0, "num_layers": 4, "hidden_size": 512,
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"], "out_features": ["stage4"], "out_indices": [4],
        "num_labels": 2, "num_hidden_layers": 4, "num_attention_heads": [2, 4, 8, 16], "dilations": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "nat"


def test_arguments_come_in_the_order_of_4_40_2() -> None:
    config = NatConfig(
        4,
        1,
        12,
        [1, 2],
        [3, 2],
        5,
        2,
        False,
        0.1,
        0.2,
        0,
        "relu",
        0.1,
        1e-6,
        1,
        ["stem", "stage2"],
        [0, 2],
        image_size=9,
    )
    assert (config.num_channels, config.embed_dim, config.depths, config.num_heads) == (1, 12, [1, 2], [3, 2])
    assert (config.kernel_size, config.mlp_ratio, config.qkv_bias) == (5, 2, False)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate) == (0.1, 0.2, 0)
    assert (config.hidden_act, config.initializer_range, config.layer_norm_eps) == ("relu", 0.1, 1e-6)
    assert (config.layer_scale_init_value, config.out_features, config.out_indices) == (1, ["stem", "stage2"], [0, 2])
    assert config.image_size == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"mlp_ratio": 2, "layer_scale_init_value": 0, "layer_norm_eps": 0, "drop_path_rate": 0},
        {"hidden_act": torch.nn.functional.relu},
        {"depths": (1, 1), "num_heads": (1, 2), "out_indices": (0, -1)},
        {"num_heads": [1, 2, 4, 8]},
        {"depths": [0, 1]},
        {"layer_scale_init_value": -1.0},
        {"embed_dim": np.int64(8), "kernel_size": np.int32(3)},
        {"kernel_size": 4},
        {"kernel_size": 1},
        {"out_features": ["stem", "stage2"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_4_40_2_took_still_runs(settings: dict[str, Any]) -> None:
    model = NatModel(NatConfig(**(SMALL | settings))).eval()
    assert model(torch.randn(1, 3, 20, 24)).last_hidden_state.shape == (1, 3, 3, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 16}, r"patch_size must be one of \(2, 4, 8\), got 16"),
        ({"patch_size": "4"}, "patch_size must be one of"),
        ({"num_channels": 0}, "num_channels must be an integer of at least 1, got 0"),
        ({"embed_dim": 1}, "embed_dim must be an integer of at least 2, got 1"),
        ({"embed_dim": 8.0}, r"embed_dim must be an integer of at least 2, got 8\.0"),
        ({"kernel_size": 0}, "kernel_size must be an integer of at least 1, got 0"),
        ({"kernel_size": (7, 7)}, r"kernel_size must be an integer of at least 1, got \(7, 7\)"),
        ({"depths": []}, "depths must have at least one stage"),
        ({"depths": 3}, r"depths must be a list .* got 3"),
        ({"depths": "33"}, "depths must be a list"),
        ({"depths": [1, -1]}, r"depths must be an integer of at least 0, got -1 in \[1, -1\]"),
        ({"num_heads": [1]}, "num_heads needs one entry for each of the 2 stages"),
        ({"num_heads": [1, 0]}, "num_heads must be an integer of at least 1, got 0"),
        ({"dilations": [[1], [1], [1]]}, r"dilations needs one list .* depths is \[1, 1\]"),
        ({"dilations": [[1], [1, 1]]}, r"the lists have \[1, 2\] entries"),
        ({"dilations": [[1], [0]]}, "dilations must be an integer of at least 1, got 0"),
        ({"dilations": [1, 2]}, "dilations must be a list"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must be a probability in \[0, 1\], got 1\.5"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate must be"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob must be"),
        ({"attention_probs_dropout_prob": "0"}, "attention_probs_dropout_prob must be"),
        ({"mlp_ratio": 0}, "mlp_ratio must give the MLP at least one channel"),
        ({"mlp_ratio": "3"}, "mlp_ratio must"),
        ({"layer_norm_eps": -1}, "layer_norm_eps must be"),
        ({"initializer_range": None}, "initializer_range must be"),
        ({"layer_scale_init_value": None}, "layer_scale_init_value must be a number"),
        ({"hidden_act": "gelo"}, "hidden_act must be .* got 'gelo'. Did you mean 'gelu'"),
        ({"hidden_act": 3}, "hidden_act must be a name or a callable"),
        ({"out_features": ["stage9"]}, "out_features must be a subset"),
        ({"out_features": ["stage2", "stage1"]}, "same order"),
        ({"out_indices": [7]}, "out_indices must be valid"),
        ({"out_features": ["stem"], "out_indices": [1]}, "same stages"),
        ({"out_features": ["stem"], "out_indices": [0, 1]}, "same stages"),
        ({"out_indices": 3}, "out_indices|not iterable"),
    ],
    ids=str,
)
def test_what_no_model_could_have_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        NatConfig(**(SMALL | settings))


def test_heads_are_checked_when_a_model_is_built() -> None:
    config = NatConfig(embed_dim=37)  # 4.40.2 lets it exist, and transformers' own tests make one
    with pytest.raises(ArgumentError, match=r"stage1 has 37 channels .* not a multiple of 2\. Use 1 heads there"):
        NatModel(config)


def test_changes_after_construction_are_checked_when_a_model_is_built() -> None:
    config = NatConfig(**SMALL)
    config.kernel_size = 0
    with pytest.raises(ArgumentError, match="kernel_size"):
        NatModel(config)


@pytest.mark.parametrize(("name", "parameters", "base", "tensors"), [
    ("nat_mini", 19_984_174, 19_471_174, 325),
    ("nat_tiny", 27_901_582, 27_388_582, 529),
    ("nat_small", 50_743_297, 49_974_297, 559),
    ("nat_base", 89_769_652, 88_744_652, 559),
    ("dinat_mini", 19_984_174, 19_471_174, 325),
    ("dinat_tiny", 27_901_582, 27_388_582, 529),
    ("dinat_small", 50_719_681, 49_950_681, 529),
    ("dinat_base", 89_769_652, 88_744_652, 559),
    ("dinat_large", 200_943_514, 199_406_514, 529),
    ("dinat_large_384", 200_943_514, 199_406_514, 529),
    ("dinat_large_384_11x11", 201_144_250, 199_607_250, 529),
])  # fmt: skip
def test_variants_have_the_published_number_of_parameters(name: str, parameters: int, base: int, tensors: int) -> None:
    with torch.device("meta"):
        model = NatForImageClassification(NatConfig.from_variant(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.nat.parameters()) == base
    assert len(model.state_dict()) == tensors


def test_every_second_layer_of_a_dinat_is_dilated_but_in_the_last_stage() -> None:
    assert NatConfig.from_variant("dinat_mini").dilations == [
        [1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1],
    ]  # fmt: skip
    large = NatConfig.from_variant("dinat_large_384").dilations
    assert large == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert NatConfig.from_variant("nat_mini").dilations is None


def test_variant_settings_can_be_overridden_and_are_not_shared() -> None:
    config = NatConfig.from_variant("nat_tiny", num_labels=10, drop_path_rate=0.0)
    assert (config.num_labels, config.drop_path_rate) == (10, 0.0)
    config.depths.append(1)
    assert VARIANTS["nat_tiny"]["depths"] == [3, 4, 18, 5]
    assert NatConfig.from_variant("nat_mini", id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3
    with pytest.raises(ArgumentError, match=r"nat_mini, .*'nat_tinny'. Did you mean 'nat_tiny'"):
        NatConfig.from_variant("nat_tinny")


def test_heads_under_their_other_name() -> None:
    heads = [1, 2, 4, 8]
    for config in (
        NatConfig(num_attention_heads=tuple(heads)),
        NatConfig(num_heads=heads, num_attention_heads=heads),
        NatConfig(num_attention_heads=heads, num_hidden_layers=9),
        NatConfig.from_dict({"num_attention_heads": heads}),
        NatConfig.from_dict({"num_heads": [2] * 4}, num_attention_heads=heads),
        NatConfig.from_dict({"num_attention_heads": [2] * 4}, num_heads=heads),
        NatConfig.from_variant("nat_mini", num_attention_heads=heads),
    ):
        assert (config.num_heads, config.num_attention_heads, config.num_layers) == (heads, heads, 4)
        assert "num_attention_heads" not in config.to_dict()
    assert NatConfig(num_attention_heads=None).num_heads == [2, 4, 8, 16]
    different = {"num_heads": (2, 4, 8, 16), "num_attention_heads": heads}
    for make in (lambda: NatConfig(**different), lambda: NatConfig.from_dict({}, **different)):
        with pytest.raises(ArgumentError, match=r"num_heads and num_attention_heads .* must not differ"):
            make()
    with pytest.raises(ArgumentError, match="num_attention_heads must be a list"):
        NatConfig(num_attention_heads=4)


@pytest.mark.skipif(not dataclasses.is_dataclass(PreTrainedConfig), reason="no dataclass in this transformers")
def test_replacing_settings_keeps_the_others() -> None:
    config = NatConfig(**SMALL, dilations=[[2], [1]], mlp_ratio=2, num_labels=7, out_features=["stage1"])
    assert dataclasses.replace(config) == config
    for changes in ({"hidden_act": "relu"}, {"out_features": ["stem"]}, {"out_indices": [0]}, {"num_heads": (2, 2)}):
        found = dataclasses.replace(config, **changes)
        assert found.to_dict() == NatConfig.from_dict(config.to_dict(), **changes).to_dict()
    other = dataclasses.replace(config, depths=[1, 1, 1], num_heads=[1, 1, 1], dilations=None)
    assert (other.out_features, other.num_layers, other.embed_dim) == (["stage3"], 3, 8)
    assert dataclasses.asdict(config)["depths"] == [1, 1]
    assert {name: dataclasses.asdict(config)[name] for name in SMALL} == SMALL


def test_backbone_stages_stay_aligned() -> None:
    config = NatConfig(out_features=["stage1", "stage3"])
    assert list(config.out_indices) == [1, 3]
    config.out_indices = [0, 2]
    assert config.out_features == ["stem", "stage2"]
    config.out_features = None
    assert (config.out_features, list(config.out_indices)) == (["stage4"], [4])
    assert NatConfig(out_features=("stem",), out_indices=(0,)).out_features == ["stem"]
    assert NatConfig(out_features=["stage4"], out_indices=[-1]).out_features == ["stage4"]


@pytest.mark.parametrize(
    "settings", [{}, {"dilations": [[2], [1]], "out_indices": [0, 1], "mlp_ratio": 2, "patch_size": 8}]
)
def test_configuration_survives_the_disk(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = NatConfig(**SMALL, **settings, num_labels=7)
    config.save_pretrained(tmp_path)
    for loaded in (NatConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is NatConfig
        assert loaded.to_diff_dict() == {**config.to_diff_dict(), **{
            k: v for k, v in loaded.to_diff_dict().items() if k in ("_name_or_path", "transformers_version")
        }}  # fmt: skip
    assert NatConfig.from_pretrained(tmp_path, out_features=["stem"]).out_features == ["stem"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"depths": [1, 1, 1], "num_heads": [1, 2, 2], "embed_dim": 16},
        {"depths": [1], "num_heads": [1]},
        {"dilations": ((1,), (2,))},
        {"dilations": np.array([[1], [2]])},
        {"out_features": ("stage1",)},
        {"out_indices": [0, 2]},
        {"depths": (1, 1, 1), "num_heads": (1, 2, 2), "out_features": ["stage3"]},
        {"kernel_size": 5, "num_labels": 7},
    ],
    ids=str,
)
def test_arguments_win_over_what_is_stored_as_if_given_to_the_class(tmp_path: Path, overrides: dict) -> None:
    stored = SMALL | {"out_features": ["stage2"]}
    NatConfig(**stored).save_pretrained(tmp_path)
    found = NatConfig.from_pretrained(tmp_path, **overrides)
    base = {name: value for name, value in stored.items() if name != "out_features"}
    keeps = {"out_features": ["stage2"]} if not {"depths", "out_features", "out_indices"} & overrides.keys() else {}
    wanted = NatConfig(**{**base, **keeps, **overrides})
    for name in ("depths", "num_layers", "hidden_size", "stage_names", "out_features", "out_indices", "dilations",
                 "kernel_size", "num_labels", "embed_dim"):  # fmt: skip
        assert getattr(found, name) == getattr(wanted, name), name
    found.save_pretrained(tmp_path / "again")
    assert NatConfig.from_pretrained(tmp_path / "again").dilations == wanted.dilations
    rest, unused = NatConfig.from_pretrained(tmp_path, return_unused_kwargs=True, other=1, **overrides)
    assert unused == {"other": 1} and rest.depths == wanted.depths


@pytest.mark.parametrize("overrides", [{"depths": 3}, {"dilations": [1, 1]}, {"out_features": []}, {"depths": [1.5]}])
def test_wrong_arguments_over_what_is_stored_are_named(tmp_path: Path, overrides: dict) -> None:
    NatConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=next(iter(overrides))):
        NatConfig.from_pretrained(tmp_path, **overrides)


def test_equality_compares_every_setting() -> None:
    assert NatConfig() == NatConfig()
    assert NatConfig() != NatConfig(depths=[3, 4, 18, 5])
    assert NatConfig() != NatConfig(kernel_size=5)


# Subclasses


class Plain(NatConfig):
    model_type = "plain-nat"


class Annotated(NatConfig):
    model_type = "annotated-nat"
    extra: int = 4


class Written(NatConfig):
    model_type = "written-nat"

    def __init__(self, extra: int = 3, **others: Any) -> None:
        super().__init__(**others)
        self.extra = extra


@pytest.mark.parametrize("kind", [Plain, Annotated, Written])
def test_a_subclass_is_built_saved_and_loaded(kind: type[NatConfig], tmp_path: Path) -> None:
    assert kind.from_variant("nat_tiny").depths == [3, 4, 18, 5]
    settings = SMALL if kind is Plain else SMALL | {"extra": 7}
    config = kind(**settings)
    config.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind
    assert again.to_dict() == config.to_dict()
    assert getattr(again, "extra", 7) == 7
    assert again.depths == [1, 1]


def test_a_subclass_takes_positional_arguments_as_its_parent_does() -> None:
    assert Plain(2, 1, 12).embed_dim == NatConfig(2, 1, 12).embed_dim == 12


@pytest.mark.parametrize("kind", [NatConfig, Plain, Written])
def test_what_overrides_a_subclass_is_checked_and_derived_from(kind: type[NatConfig], tmp_path: Path) -> None:
    kind(**SMALL).save_pretrained(tmp_path)
    config = kind.from_pretrained(tmp_path, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4), extra=9)
    assert (config.hidden_size, config.num_layers, config.depths) == (64, 3, [1, 1, 1])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert config.out_features == ["stage3"]
    with pytest.raises(ArgumentError, match="kernel_size"):
        kind.from_pretrained(tmp_path, kernel_size=-3)
    with pytest.raises(ArgumentError, match="differ"):
        kind.from_pretrained(tmp_path, num_heads=[1, 2], num_attention_heads=[2, 2])
