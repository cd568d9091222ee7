"""``from_pretrained`` on DiNAT folders, on NAT folders of transformers 4 and on the original repository's files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from nbhd.errors import ArgumentError, CheckpointError, FileError
from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatModel
from nbhd.models.nat import VARIANTS
from nbhd.models.nat.loading_nat import load_weights
from tests.commands import nbhd
from tests.fixtures import nat_reference
from tests.fixtures.nat_reference import CASES, fill_weights
from tests.models.nat.original import OriginalNat

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 4], "kernel_size": 3, "num_classes": 6}
DILATED = SMALL | {"dilations": [[1, 3], [4]]}
MODELS = {"nat": "NatForImageClassification", "dinat": "DinatForImageClassification"}


def case_named(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def recorded(name: str) -> dict[str, torch.Tensor]:
    """Outputs of transformers 4.40.2."""
    with safe_open(Path(nat_reference.__file__).parent / "nat_4_40_2" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))


def write_folder(folder: Path, case: Any, file: str, model_class: type = NatForImageClassification) -> Path:
    """A folder as transformers 4.40.2 wrote it, of a NAT or a DiNAT, with the recorded case's weights."""
    stages = {"out_features": ["stage1", "stage3"]} if model_class is NatBackbone else {}
    model: Any = model_class(NatConfig(**case.config, **stages)).double()
    fill_weights(model, case.seed)
    weights = model.state_dict()
    if case.model_type == "dinat":
        weights = {f"di{name}" if name.startswith("nat.") else name: value for name, value in weights.items()}
    folder.mkdir(exist_ok=True)
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})
    settings = {key: value for key, value in case.config.items() if key != "num_labels"}
    labels = {str(i): f"class {i}" for i in range(case.config["num_labels"])}
    (folder / "config.json").write_text(json.dumps({
        "architectures": [model_class.__name__.replace("Nat", "Dinat" if case.model_type == "dinat" else "Nat")],
        "model_type": case.model_type, "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()},
        "patch_norm": True, "image_size": 224, "torch_dtype": "float64", "transformers_version": "4.40.2",
        **settings, **stages,
    }))  # fmt: skip
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["dilated", "wide_layer_scale_no_qkv_bias"])
def test_folders_of_transformers_4_give_the_recorded_numbers(
    tmp_path: Path, name: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The second map and the last of the dilated case are smaller than its dilated windows."""
    case, truth = case_named(name), recorded(name)
    folder = write_folder(tmp_path / "folder", case, file)
    pixels, _ = nat_reference.make_inputs(case)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            model, info = NatForImageClassification.from_pretrained(folder, output_loading_info=True)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not caplog.records, caplog.text
    assert type(model.config) is NatConfig
    assert model.config.dilations == case.config.get("dilations")
    assert model.config.id2label[4] == "class 4"
    close(model(pixels).logits, truth["classifier.logits"])
    close(NatModel.from_pretrained(folder)(pixels).last_hidden_state, truth["model.last_hidden_state"])
    stages = ["stem", "stage1", "stage2", "stage3"]
    states = NatBackbone.from_pretrained(folder, out_features=stages)(pixels, output_hidden_states=True).hidden_states
    for n, state in enumerate(states):
        close(state, truth[f"backbone.hidden_states.{n}"])

    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(model.state_dict())
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (content["model_type"], content["architectures"]) == ("nat", ["NatForImageClassification"])
    close(NatForImageClassification.from_pretrained(tmp_path / "again")(pixels).logits, model(pixels).logits)


def test_configuration_of_a_dinat_may_be_given(tmp_path: Path) -> None:
    from transformers import DinatConfig

    case = case_named("dilated")
    folder = write_folder(tmp_path / "folder", case, "model.safetensors")
    config = DinatConfig.from_pretrained(folder)
    model = NatForImageClassification.from_pretrained(folder, config=config, dtype=torch.float64)
    close(model(nat_reference.make_inputs(case)[0]).logits, recorded("dilated")["classifier.logits"])


def test_folder_of_a_dinat_backbone(tmp_path: Path) -> None:
    case, truth = case_named("dilated"), recorded("dilated")
    folder = write_folder(tmp_path / "folder", case, "model.safetensors", NatBackbone)
    maps = NatBackbone.from_pretrained(folder)(nat_reference.make_inputs(case)[0]).feature_maps
    for n, found in zip((1, 3), maps, strict=True):
        close(found, truth[f"backbone.feature_maps.{n}"])


def test_settings_of_a_dinat_become_a_nats(tmp_path: Path) -> None:
    from transformers import DinatConfig

    dinat = DinatConfig(layer_scale_init_value=0.0)
    config = NatConfig.from_dict(dinat.to_dict())
    assert config.dilations == dinat.dilations == VARIANTS["dinat_mini"]["dilations"]
    dinat.save_pretrained(tmp_path)
    assert NatConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinat"}))
    assert NatConfig.from_pretrained(tmp_path).dilations == dinat.dilations
    with pytest.raises(ArgumentError, match="config must be a NatConfig, got a DinatConfig"):
        NatModel(dinat)
    # Longer lists than depths: a DiNAT reads the first of each.
    settings = {"model_type": "dinat", "depths": [1, 1], "num_heads": [1, 2], "dilations": [[2, 3], [4, 1], [9]]}
    assert NatConfig.from_dict(settings).dilations == [[2], [4]]


def test_command_converts_a_dinat_folder(tmp_path: Path) -> None:
    case = case_named("dilated")
    folder = write_folder(tmp_path / "folder", case, "pytorch_model.bin")
    (folder / "preprocessor_config.json").write_text('{"feature_extractor_type": "ViTFeatureExtractor", "size": 56}')
    result = nbhd("convert", folder, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "NatForImageClassification: a DiNAT of no published size" in result.stderr
    model = NatForImageClassification.from_pretrained(tmp_path / "out")
    close(model(nat_reference.make_inputs(case)[0]).logits, recorded("dilated")["classifier.logits"])
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    result = nbhd("convert", folder, tmp_path / "other", "--image-size", 64)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    assert content == {"feature_extractor_type": "ViTFeatureExtractor", "size": 64}


@pytest.mark.parametrize("damage", ["no weights", "half of them", "another type", "no json", "one weight missing"])
def test_command_refuses_a_folder_it_cannot_read_whole(tmp_path: Path, damage: str) -> None:
    folder = write_folder(tmp_path / "folder", case_named("dilated"), "model.safetensors")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half of them":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "another type":
        config.write_text('{"model_type": "swin", "architectures": ["SwinModel"]}')
    elif damage == "no json":
        config.write_text("{")
    else:
        with safe_open(weights, "pt") as file:
            kept = {name: file.get_tensor(name) for name in sorted(file.keys())[1:]}
        save_file(kept, weights, metadata={"format": "pt"})
    result = nbhd("convert", folder, tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert "folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


# The original repository's


def original(seed: int = 0, **settings: Any) -> OriginalNat:
    model = OriginalNat(**(SMALL | settings))
    fill_weights(model, seed)
    return model.eval()


PIXELS = torch.randn(2, 3, 22, 36, generator=torch.Generator().manual_seed(0))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("model_class", [NatForImageClassification, NatBackbone])
def test_the_dtype_of_an_original_state_dict(tmp_path: Path, model_class: Any, argument: str) -> None:
    truth = original()
    torch.save(truth.half().state_dict(), tmp_path / "nat_odd.pth")
    for asked in ("auto", torch.float16, torch.float64):
        model = model_class.from_pretrained(tmp_path / "nat_odd.pth", **{argument: asked})
        wanted = torch.float16 if asked == "auto" else asked
        assert {p.dtype for p in model.parameters()} == {wanted}
        model.save_pretrained(tmp_path / "saved")
        assert NatConfig.from_pretrained(tmp_path / "saved").dtype == wanted


@pytest.mark.parametrize("where", ["file", "folder", "subfolder", "folder of a run"])
@pytest.mark.parametrize(
    "settings", [{}, {"layer_scale": True, "mlp_ratio": 2.0, "qkv_bias": False}], ids=["", "scale"]
)
def test_original_state_dicts_load_by_themselves(tmp_path: Path, where: str, settings: dict[str, Any]) -> None:
    truth = original(**settings)
    folder = tmp_path / "inner"
    folder.mkdir()
    torch.save({"state_dict": truth.state_dict(), "epoch": 3}, folder / "nat_odd.pth")
    if where == "folder of a run":
        torch.save({"state": {}}, folder / "optimizer.pt")
        (folder / "log.txt").write_text("")
    arguments: dict[str, Any] = {"subfolder": "inner"} if where == "subfolder" else {}
    name = {"file": folder / "nat_odd.pth", "subfolder": tmp_path}.get(where, str(folder))

    model, info = NatForImageClassification.from_pretrained(name, output_loading_info=True, **arguments)
    assert not info["missing_keys"]
    assert not model.training
    same(model(PIXELS).logits, truth(PIXELS))
    assert model.name_or_path == str(name)
    model.save_pretrained(tmp_path / "saved")
    again = NatForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(PIXELS).logits, model(PIXELS).logits)

    base = NatModel.from_pretrained(name, **arguments)
    same(base(PIXELS).pooler_output, model.nat(PIXELS).pooler_output)
    backbone = NatBackbone.from_pretrained(name, out_features=["stage1", "stage2"], **arguments)
    same(
        backbone(PIXELS, output_hidden_states=True).hidden_states[2], model.nat(PIXELS, output_hidden_states=True)[2][2]
    )
    assert NatConfig.from_pretrained(name, **arguments).depths == [2, 1]


def test_original_dinat_takes_its_dilations_from_the_caller(tmp_path: Path) -> None:
    truth = original(dilations=DILATED["dilations"])
    torch.save(truth.state_dict(), tmp_path / "dinat_odd.pth")
    with pytest.raises(CheckpointError, match=r"dinat_odd\.pth is a DiNAT, whose dilations are not in its weights"):
        NatForImageClassification.from_pretrained(tmp_path / "dinat_odd.pth")
    model = NatForImageClassification.from_pretrained(tmp_path / "dinat_odd.pth", dilations=DILATED["dilations"])
    same(model(PIXELS).logits, truth(PIXELS))
    config = NatConfig.from_pretrained(tmp_path / "dinat_odd.pth", dilations=DILATED["dilations"], drop_path_rate=0.4)
    assert (config.dilations, config.drop_path_rate) == (DILATED["dilations"], 0.4)
    model = NatForImageClassification.from_pretrained(tmp_path / "dinat_odd.pth", config=config)
    same(model(PIXELS).logits, truth(PIXELS))


def test_original_names_in_a_folder_of_transformers(tmp_path: Path) -> None:
    truth = original(dilations=DILATED["dilations"])
    torch.save(truth.state_dict(), tmp_path / "pytorch_model.bin")
    settings = {key: value for key, value in DILATED.items() if key != "num_classes"}
    labels = {"id2label": {i: "abcdef"[i] for i in range(6)}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinat", **labels, **settings}))
    for name in (tmp_path, tmp_path / "pytorch_model.bin"):
        model = NatForImageClassification.from_pretrained(name)
        same(model(PIXELS).logits, truth(PIXELS))
        assert model.config.id2label[5] == "f"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nat", **labels, **settings}))
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is NatForImageClassification
    same(model(PIXELS).logits, truth(PIXELS))


def test_weights_of_transformers_may_be_named_as_a_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", case_named("square"), "model.safetensors")
    pixels, _ = nat_reference.make_inputs(case_named("square"))
    model = NatForImageClassification.from_pretrained(folder / "model.safetensors")
    close(model(pixels).logits, recorded("square")["classifier.logits"])
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"names of transformers already, .* config\.json, or give config="):
        NatForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ["square", "dilated"])
@pytest.mark.parametrize("file", ["model.safetensors", "weights.pth"])
def test_weights_of_transformers_without_a_config_take_the_one_given(tmp_path: Path, name: str, file: str) -> None:
    folder = write_folder(tmp_path / "folder", case_named(name), "model.safetensors")
    config = NatConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    if file.endswith(".pth"):
        model = NatForImageClassification.from_pretrained(folder, config=config)
        # as torch.compile and DistributedDataParallel name them
        names = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
        torch.save({"model": names}, folder / file)
        (folder / "model.safetensors").unlink()
    pixels, _ = nat_reference.make_inputs(case_named(name))
    for where in (folder, folder / file):
        model = NatForImageClassification.from_pretrained(where, config=config)
        close(model(pixels).logits, recorded(name)["classifier.logits"])
        body = NatModel.from_pretrained(where, config=config)
        assert all(torch.equal(value, model.state_dict()[f"nat.{key}"]) for key, value in body.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_arguments_of_transformers_have_their_meaning(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(original().state_dict(), tmp_path / "nat.pth")
    model = NatForImageClassification.from_pretrained(
        tmp_path / "nat.pth", dtype=dtype, num_labels=3, ignore_mismatched_sizes=True, output_hidden_states=True,
        local_files_only=True, drop_path_rate=0.7,
    )  # fmt: skip
    assert model.dtype == dtype
    assert model.config.drop_path_rate == 0.7
    out = model(PIXELS.to(dtype))
    assert out.logits.shape == (2, 3)
    assert len(out.hidden_states) == 3
    with pytest.raises(RuntimeError, match="size"):
        NatForImageClassification.from_pretrained(tmp_path / "nat.pth", num_labels=3)


def test_missing_unknown_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    weights = original().state_dict()
    for change, message in [
        ({"levels.0.blocks.1.mlp.fc2.bias": None}, r"levels\.0\.layers\.1\.output\.dense\.bias is missing"),
        ({"levels.1.downsample.extra": torch.ones(2)}, r"levels\.1\.downsample\.extra is unexpected"),
        ({"patch_embed.norm.weight": torch.ones(3)}, r"embeddings\.norm\.weight is \(3,\) and should be \(8,\)"),
        ({"norm.weight": None, "norm.bias": None}, r"layernorm\.weight is missing; layernorm\.bias is missing"),
    ]:
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        torch.save(changed, tmp_path / "nat.pth")
        for model_class in (NatForImageClassification, NatModel):
            with pytest.raises(CheckpointError, match=message):
                model_class.from_pretrained(tmp_path / "nat.pth")
    NatBackbone.from_pretrained(tmp_path / "nat.pth")  # has no last norm


class Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_beside_the_weights_are_read(tmp_path: Path, zipped: bool) -> None:
    """As timm stores its metric, written with NumPy 1 or 2."""
    truth = original()
    numbers = {"metric": np.float64(81.8), "epoch": np.int64(3), "best": [np.float32(1.5), np.bool_(True)]}
    file = tmp_path / "nat.pth"
    torch.save({"state_dict": truth.state_dict(), **numbers}, file, _use_new_zipfile_serialization=zipped)
    assert {name: load_weights(file)[1][name] for name in numbers} == numbers
    same(NatForImageClassification.from_pretrained(file)(PIXELS).logits, truth(PIXELS))
    if not zipped:
        old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
        content = file.read_bytes()
        for one, other in ((old, new), (new, old)):
            file.write_bytes(content.replace(one, other))
            assert load_weights(file)[1]["epoch"] == 3


def test_other_objects_of_numpy_are_refused(tmp_path: Path) -> None:
    for value in (np.ones(2), np.array([print]), np.str_("a"), np.void(b"abc"), np.datetime64("2024-01-01")):
        torch.save({"state_dict": original().state_dict(), "metric": value}, tmp_path / "nat.pth")
        with pytest.raises(CheckpointError, match=r"holds more than weights \(numpy"):
            load_weights(tmp_path / "nat.pth")
    content = {"state_dict": original().state_dict(), "metric": np.float64(1), "extra": Trap(tmp_path / "executed")}
    torch.save(content, tmp_path / "nat.pth")
    with pytest.raises(CheckpointError, match=r"mkdir.*could run code"):
        load_weights(tmp_path / "nat.pth")
    assert not (tmp_path / "executed").exists()


def test_hostile_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": original().state_dict(), "extra": Trap(tmp_path / "executed")}, tmp_path / "nat.pth")
    with pytest.raises(CheckpointError, match=r"mkdir.*could run code"):
        NatModel.from_pretrained(tmp_path / "nat.pth", weights_only=False)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "nat.pth").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="damaged"):
        NatModel.from_pretrained(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"several checkpoints: nat\.pth, other\.pt\. Name one"):
        NatModel.from_pretrained(tmp_path)
    (tmp_path / "nat.pth").chmod(0)
    if os.geteuid():
        with pytest.raises(FileError, match="permission"):
            NatModel.from_pretrained(tmp_path / "nat.pth")
