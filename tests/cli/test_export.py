"""``nbhd export``, and ``nbhd classify`` and ``evaluate`` on what it wrote."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file, save_file

from nbhd.cli.export import Part, _load
from tests.commands import nbhd
from tests.pictures import noise
from tests.tiny import LABELS

pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def onnx_file(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    run = nbhd("export", tiny_model, "--to", "onnx", "-o", path)
    assert (run.exit_code, run.stdout) == (0, f"{path}\n"), run.stderr
    assert "any size" in run.stderr
    return path


def _results(*args: object) -> list[dict]:
    run = nbhd("classify", *args, "--format", "json")
    assert run.exit_code == 0, run.stderr
    return json.loads(run.stdout)


def test_real_photographs_are_classified_as_by_pytorch(onnx_file, tiny_model):
    """Labels and preprocessing come from the file: nothing else of the model is there."""
    expected = _results(PHOTOS, "--model", tiny_model)
    found = _results(PHOTOS, "--model", onnx_file, "--runtime", "onnx")
    assert len(found) == len(list(PHOTOS.iterdir()))
    for one, other in zip(found, expected, strict=True):
        assert [p["label"] for p in one["predictions"]] == [p["label"] for p in other["predictions"]]
        for mine, theirs in zip(one["predictions"], other["predictions"], strict=True):
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
            assert mine["label"] in LABELS


def test_it_is_evaluated_as_the_model_is(onnx_file, tiny_model, tmp_path):
    for i, label in enumerate(LABELS[:3]):
        folder = tmp_path / "data" / "validation" / label
        folder.mkdir(parents=True)
        for j in range(2):
            noise(64, 60, seed=10 * i + j).save(folder / f"{j}.png")
    runs = [
        nbhd("evaluate", "--data", tmp_path / "data", "--model", model, "--format", "json")
        for model in (onnx_file, tiny_model)
    ]
    assert [run.exit_code for run in runs] == [0, 0], runs[0].stderr
    mine, theirs = (json.loads(run.stdout) for run in runs)
    assert mine["confusion"] == theirs["confusion"]
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_int8_calibrated_on_pictures_names_those_that_fail(tiny_model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        noise(70, 60, seed=i).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "int8.onnx"
    args = ("export", tiny_model, "--to", "onnx", "--size", "56", "--int8", "--calibrate", pictures, "-o", output)
    run = nbhd(*args)
    assert run.exit_code == 1
    assert "broken.png" in run.stderr
    assert "56x56" in run.stderr
    assert "on the calibration pictures" in run.stderr
    assert "pictures calibrated with: 3. With so few" in run.stderr
    assert _results(PHOTOS / "church.jpg", "--model", output)[0]["predictions"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--to", "onnx", "-o", "a.pt2"), "ends in .onnx"),
        (("--to", "aoti", "-o", "a.onnx"), "ends in .pt2"),
        (("--to", "aoti", "-o", "a.pt2", "--int8"), "--int8 is for --to onnx"),
        (("--to", "onnx", "-o", "a.onnx", "--calibrate", "."), "--calibrate goes with --int8"),
        (("--to", "onnx", "-o", "a.onnx", "--standalone"), "--standalone is for .pt2 files"),
        (("--to", "onnx", "-o", "a.onnx", "--size", "large"), "--size must be pixels"),
        (("--to", "onnx", "-o", "a.onnx", "--size", "0x5"), "--size must be pixels"),
        (("--to", "onnx", "-o", "a.onnx", "--size", "999999999999"), "--size must be at most 178,956,970 pixels"),
        (("--to", "onnx", "-o", "a.onnx", "--size", "9" * 5000), "--size must be at most 178,956,970 pixels"),
        (("--to", "onnx", "-o", "a.onnx", "--size", "1x999999999"), "--size must be at most 178,956,970 pixels"),
        (("--to", "onnx", "-o", ""), "--output must name a file, got ''."),
        (("--to", "onnx", "-o", "nowhere/a.onnx"), "does not exist"),
        (("--to", "onnx", "-o", "folder.onnx"), "this is a folder"),
        (("--to", "onnx", "-o", "a.onnx", "--part", "features", "--stages", "stage1"), "--stages goes with"),
        (("./nowhere", "--to", "onnx", "-o", "a.onnx"), "there is no such folder"),
        (("--to", "onnx", "-o", "a.onnx", "--stages", "stage9"), "--stages must be of stem, stage1, stage2,"),
        (("--to", "onnx", "-o", "a.onnx", "--stages", ""), "got '': there is no ''."),
        (("--to", "tflite", "-o", "a.tflite"), "tflite"),
        (("--to", "onnx", "-o", "a.onnx", "--int8", "--calibrate", "empty"), "no files in this folder"),
    ],
)
def test_wrong_calls_say_why_and_write_nothing(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "empty").mkdir()
    run = nbhd("export", *args)
    assert run.exit_code == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.onnx"]


def test_an_exported_file_is_not_exported_again(onnx_file, tmp_path):
    run = nbhd("export", onnx_file, "--to", "onnx", "-o", tmp_path / "again.onnx")
    assert run.exit_code == 2
    assert "an exported file already" in run.stderr


def test_a_file_that_computes_something_else_is_not_written(tiny_model, tmp_path, monkeypatch):
    from nbhd.export import check

    monkeypatch.setattr(check, "largest_difference", lambda *args: float("nan"))
    monkeypatch.setattr("nbhd.export.export", lambda model, path, *args, **rest: path.write_bytes(b"x"))
    monkeypatch.setattr("nbhd.export.open_exported", lambda path: None)
    run = nbhd("export", tiny_model, "--to", "onnx", "-o", tmp_path / "a.onnx")
    assert run.exit_code == 2
    assert "was not written" in run.stderr
    assert not list(tmp_path.iterdir())


def test_an_int8_file_is_compared_on_its_pictures(tiny_model, tmp_path, monkeypatch):
    """As far as they tell, a wrong file is not put in place, nor does it replace one that is there."""
    from nbhd.export import check, subject

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        noise(60 + i, 60, seed=i).save(pictures / f"{i}.png")
    output = tmp_path / "int8.onnx"
    output.write_bytes(b"before")

    def export(model, path, *args, calibration=None, **rest):
        path.write_bytes(b"int8")
        for _ in calibration or ():
            pass
        return subject.facts_of(model)

    monkeypatch.setattr("nbhd.export.export", export)
    monkeypatch.setattr("nbhd.export.open_exported", lambda path: None)
    seen: list = []
    answers: list[float] = []

    def difference(model, exported, facts, *batches):
        seen.append([tuple(pixels.shape) for pixels in batches[0]] if batches else None)
        return answers[-1]

    monkeypatch.setattr(check, "largest_difference", difference)
    args = ("export", tiny_model, "--to", "onnx", "--int8", "-o", output)
    calibrated = (*args, "--calibrate", pictures)
    for answer, call, message in (
        (float("inf"), calibrated, "differ from the model's by inf of the largest even on these pictures"),
        (float("nan"), calibrated, "they do not suit, and it was not written. Name a folder with some dozens"),
        (0.31, calibrated, "more than 0.3"),
        (0.31, args, "it was not written. Give pictures with --calibrate, or leave out --int8"),
    ):
        answers.append(answer)
        run = nbhd(*call)
        assert run.exit_code == 2
        assert message in run.stderr
        assert output.read_bytes() == b"before"
    assert seen == [[(1, 3, 56, 56)] * 7] * 3 + [None]
    answers.append(0.29)
    assert nbhd(*args).exit_code == 0
    assert output.read_bytes() == b"int8"


def test_pictures_of_one_colour_calibrate_nothing(tiny_model, tmp_path):
    generator = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, colour in enumerate((0, 130, 255)):
        PIL.Image.new("RGB", (70, 60), (colour, 10, 20)).save(pictures / f"{i}.png")
    PIL.Image.fromarray(generator.integers(0, 20, (60, 70, 3), dtype=np.uint8)).save(pictures / "dark.png")
    args = ("--to", "onnx", "--int8", "--calibrate", pictures, "-o", tmp_path / "int8.onnx")
    run = nbhd("export", tiny_model, *args)
    assert run.exit_code == 2
    assert "hardly more than one colour" in run.stderr
    assert not (tmp_path / "int8.onnx").exists()


# ---- parts of a folder


def _saved(folder: Path, kind: str, without: str = "", **options: object) -> Path:
    """A folder of this kind; its weights whose names contain ``without`` are taken out of the file."""
    import nbhd.models

    settings = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1], [2]]}
    getattr(nbhd.models, kind)(nbhd.models.NatConfig(**settings, **options)).save_pretrained(folder)
    if without:
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if without not in name}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "without", "args", "message"),
    [
        ("NatForImageClassification", "levels.1.layers", ["--part", "features"], "17 of the weights of a NatModel"),
        ("NatForImageClassification", "levels.1.layers", ["--part", "backbone"], "17 of the weights of a NatBackbone"),
        ("NatForImageClassification", "layernorm.weight", ["--part", "features"], "(layernorm.weight)"),
        ("NatBackbone", "embeddings.norm.bias", [], "(embeddings.norm.bias)"),
        ("NatBackbone", "hidden_states_norms.stage2.bias", [], "(hidden_states_norms.stage2.bias)"),
    ],
)
def test_a_part_that_lacks_weights_is_refused(tmp_path, kind, without, args, message):
    folder = _saved(tmp_path / "folder", kind, without)
    output = tmp_path / "part.onnx"
    run = nbhd("export", folder, "--to", "onnx", "-o", output, *args)
    assert run.exit_code == 2
    assert "lacks" in run.stderr and message in run.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("kind", "without", "part", "stages"),
    [
        ("NatForImageClassification", "classifier", Part.features, None),
        ("NatForImageClassification", "", None, "stem,stage2"),
        ("NatModel", "layernorm.", Part.backbone, None),
        ("NatBackbone", "", None, "stage1,stage2"),
        ("NatBackbone", "", Part.features, None),
    ],
)
def test_norms_of_another_kind_of_model_may_be_missing(tmp_path, kind, without, part, stages):
    folder = _saved(tmp_path / "folder", kind, without)
    network, _ = _load(str(folder), part, stages)
    saved = load_file(folder / "model.safetensors")
    body = {name.removeprefix("nat."): value for name, value in saved.items()}
    for name, value in network.state_dict().items():
        start = float("weight" in name)
        assert (value == body[name]).all() if name in body else (value == start).all(), name


@pytest.mark.parametrize(
    ("kind", "part", "stages"),
    [
        ("NatForImageClassification", Part.features, None),
        ("NatForImageClassification", None, "stage1,stage2"),
        ("NatForImageClassification", None, None),
        ("NatModel", None, None),
        ("NatBackbone", None, None),
    ],
)
def test_parts_of_a_dinat_of_transformers(tmp_path, kind, part, stages):
    nat = _saved(tmp_path / "nat", kind)
    dinat = shutil.copytree(nat, tmp_path / "dinat")
    weights = load_file(nat / "model.safetensors")
    weights = {f"di{name}" if name.startswith("nat.") else name: value for name, value in weights.items()}
    save_file(weights, dinat / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((nat / "config.json").read_text())
    config |= {"model_type": "dinat", "architectures": [kind.replace("Nat", "Dinat")]}
    (dinat / "config.json").write_text(json.dumps(config))
    (found, _), (expected, _) = (_load(str(folder), part, stages) for folder in (dinat, nat))
    assert type(found) is type(expected)
    assert found.config.dilations == [[1], [2]]
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all((value == wanted[name]).all() for name, value in found.state_dict().items())


def test_runtimes_that_do_not_fit_the_model(onnx_file, tiny_model, monkeypatch):
    for args, message in (
        ((PHOTOS, "--runtime", "onnx"), "--runtime onnx runs exported files, not the model that comes with nbhd"),
        ((PHOTOS, "--runtime", "aoti", "--model", tiny_model), "not the folder"),
        ((PHOTOS, "--runtime", "torch", "--model", onnx_file), "runs in onnx"),
        ((PHOTOS, "--model", onnx_file, "--device", "meta"), "device 'meta'"),
    ):
        run = nbhd("classify", *args)
        assert run.exit_code == 2, args
        assert message in run.stderr
        assert run.stdout == ""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = nbhd("classify", PHOTOS, "--model", onnx_file)
    assert run.exit_code == 2
    assert "nbhd[export]" in run.stderr


def test_a_damaged_file_is_named(tmp_path, onnx_file):
    path = tmp_path / "cut.onnx"
    path.write_bytes(onnx_file.read_bytes()[:4000])
    run = nbhd("classify", PHOTOS, "--model", path)
    assert run.exit_code == 2
    assert "cut.onnx is not an exported model" in run.stderr


def test_a_pt2_that_is_no_archive_is_named(tmp_path):
    path = tmp_path / "junk.pt2"
    path.write_bytes(b"junk")
    run = nbhd("classify", PHOTOS, "--model", path)
    assert run.exit_code == 2
    assert "junk.pt2 is damaged or cut short, or was not written by `nbhd export`" in run.stderr


def test_stages_are_taken_in_the_order_of_the_model(tmp_path):
    folder = _saved(tmp_path / "folder", "NatForImageClassification")
    assert _load(str(folder), None, "stage2, stem")[0].out_features == ["stem", "stage2"]


def test_settings_in_a_file_that_make_no_pixels_are_named(onnx_file, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    for entry in model.metadata_props:
        facts = json.loads(entry.value) if entry.value.startswith("{") else {}
        if "preprocessing" in facts:
            facts["preprocessing"]["size"] = {"shortest_edge": 99_999_999_999}
            entry.value = json.dumps(facts)
    onnx.save(model, tmp_path / "large.onnx")
    run = nbhd("classify", PHOTOS, "--model", tmp_path / "large.onnx")
    assert run.exit_code == 2
    assert "the image processor in" in run.stderr and "size must be at most" in run.stderr
