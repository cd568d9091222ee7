"""``nbhd train``, ``nbhd evaluate`` and ``nbhd recipes`` in this process: wrong calls, bad input, outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the train extra is not installed")

from nbhd.tasks.recipes import find_recipe, load_recipe, recipe_names
from tests import commands
from tests.tasks.test_datasets import IMAGENETTE48, write_folder, write_parquet
from tests.tiny import LABELS, write_classifier

Run = Callable[..., Any]

#: The least work that is a training run.
QUICK = [
    "--set", "model.embed_dim=8", "--set", "model.depths=[1]", "--set", "model.num_heads=[1]",
    "--set", "data.image_size=16", "--set", "data.eval_split=validation", "--set", "schedule.epochs=1",
    "--set", "optim.batch_size=40", "--set", "run.device=cpu", "--set", "run.plot=false",
]  # fmt: skip


@pytest.fixture
def nbhd() -> Iterator[Run]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield commands.nbhd
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def refused(run: Any, code: int = 2) -> str:
    """What a call that could not be done says; it must be one line, and nothing on standard output."""
    assert run.exit_code == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    return str(run.stderr)


# train


def test_train_then_evaluate_then_resume_what_is_finished(nbhd: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    call = ["train", "--config", "cifar10_quick", "--data", IMAGENETTE48, "--output", output, *QUICK]
    run = nbhd(*call)
    assert run.exit_code == 0, run.stderr
    assert run.stdout == ""
    assert "finished:" in run.stderr
    weights = (output / "model.safetensors").read_bytes()
    assert "is not empty" in refused(nbhd(*call))

    run = nbhd("evaluate", "--model", output, "--data", IMAGENETTE48, "--format", "json", "--device", "cpu")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["top1"] == json.loads((output / "metrics.json").read_text())["final"]["top1"]

    (output / ".export-killed").mkdir()
    (output / ".metrics.json.killed.part").touch()
    run = nbhd("train", "--resume", "--data", IMAGENETTE48, "--output", output)
    assert run.exit_code == 0, run.stderr
    assert not list(output.glob(".*"))
    assert (output / "model.safetensors").read_bytes() == weights

    run = nbhd(*call, "--overwrite", "--set", "run.seed=5")
    assert run.exit_code == 0, run.stderr
    assert (output / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "imagenet"], 2, "no recipe file or recipe called 'imagenet'"),
        (["--config", "classification/cifar10_quik"], 2, "Did you mean 'classification/cifar10_quick'"),
        ([], 2, "--config is missing"),
        (["--resume"], 2, "--config is missing"),
        (["--resume", "--overwrite", "--config", "cifar10_quick"], 2, "Give one of them"),
        (["--config", "cifar10_quick", "--set", "optim.learning_rate=1"], 2, "unknown key 'learning_rate'"),
        (["--config", "cifar10_quick", "--set", "optim.lr=-1"], 2, "optim.lr must be at least 0"),
        (["--config", "cifar10_quick", "--set", "data.label_column=kind"], 2, "has no column 'kind'"),
        (["--config", "cifar10_quick", "--set", "data.eval_split=dev"], 2, "--set data.eval_split=validation"),
        (["--config", "cifar10_quick", "--set", "model.num_heads=[3,3,3]"], 2, "num_heads must divide"),
    ],
)
def test_wrong_call_of_train_says_what_is_wrong(
    arguments: list[str], code: int, message: str, nbhd: Run, tmp_path: Path
) -> None:
    common = ["--data", IMAGENETTE48, "--output", tmp_path / "run", "--set", "run.device=cpu"]
    if "data.eval_split=dev" not in arguments:
        common += ["--set", "data.eval_split=validation"]
    assert message in refused(nbhd("train", *common, *arguments), code)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_leaves_the_process_group_it_was_started_in(nbhd: Run, tmp_path: Path) -> None:
    """A process that ends inside of it may abort, and the launcher stops the one that is still writing the model."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    refused(nbhd("train", "--config", "cifar10_quick", "--data", tmp_path / "none", "--output", tmp_path / "run"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("output", ["", "-"])
def test_a_run_goes_into_a_folder(output: str, nbhd: Run) -> None:
    said = refused(nbhd("train", "--config", "cifar10_quick", "--data", IMAGENETTE48, "--output", output))
    assert f"--output must name a folder, got {output!r}." in said


def test_missing_data_is_named(nbhd: Run, tmp_path: Path) -> None:
    call = ["train", "--config", "cifar10_quick", "--set", "run.device=cpu", "--output", tmp_path / "run", "--data"]
    assert f"--data {tmp_path / 'none'}: no such file or folder" in refused(nbhd(*call, tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no labelled images" in refused(nbhd(*call, tmp_path / "empty"))


def test_full_disk_leaves_no_partial_model(nbhd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from nbhd.models.nat import NatImageProcessor

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NatImageProcessor, "save_pretrained", full)
    output = tmp_path / "run"
    call = ["train", "--config", "cifar10_quick", "--data", IMAGENETTE48, "--output", output, *QUICK]
    assert "No space left on device" in nbhd(*call).stderr
    left = {path.name for path in output.iterdir()}
    assert left == {"recipe.yaml", "metrics.json", "checkpoints"}
    monkeypatch.undo()
    assert nbhd(*call, "--resume").exit_code == 0
    assert (output / "model.safetensors").exists()


# evaluate


def test_evaluate_prints_a_line_a_class(nbhd: Run, tiny_model: Path) -> None:
    run = nbhd("evaluate", "--model", tiny_model, "--data", IMAGENETTE48, "--device", "cpu")
    assert run.exit_code == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("40 images of 10 classes in ")
    assert lines[1].startswith("top-1 ")
    assert [line.split("  ")[0] for line in lines[4:]] == list(LABELS)


def test_evaluate_writes_json_whole(nbhd: Run, tiny_model: Path, tmp_path: Path) -> None:
    call = ["evaluate", "--model", tiny_model, "--data", IMAGENETTE48, "--device", "cpu", "--limit", 12]
    run = nbhd(*call, "--output", tmp_path / "x.json")
    assert (run.exit_code, run.stdout) == (0, "")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == sum(map(sum, found["confusion"])) == 12
    assert "does not exist" in refused(nbhd(*call, "--output", tmp_path / "no" / "x.json"))


def test_evaluate_names_and_skips_what_it_cannot_decode(nbhd: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", "church", "tench")
    (folder / "church" / "bad.jpg").write_text("no picture")
    # Folders are numbered alphabetically: give the model their names in that order.
    model = write_classifier(tmp_path / "model", id2label={0: "church", 1: "tench"}, label2id={"church": 0, "tench": 1})
    run = nbhd("evaluate", "--model", model, "--data", folder, "--device", "cpu", "--format", "json")
    assert run.exit_code == 1
    assert "bad.jpg" in run.stderr
    assert (json.loads(run.stdout)["images"], json.loads(run.stdout)["skipped"]) == (4, 1)


def test_class_folders_are_numbered_by_the_models_names(nbhd: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", "tench", "church", "parachute")
    run = nbhd("evaluate", "--model", tiny_model, "--data", folder, "--device", "cpu", "--format", "json")
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert [row["class"] for row in found["per_class"]] == ["tench", "church", "parachute"]


def test_evaluate_refuses_data_of_other_classes(nbhd: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", "cat", "dog")
    call = ["evaluate", "--model", tiny_model, "--device", "cpu", "--data"]
    assert "folders cat, dog are not among the 10 classes" in refused(nbhd(*call, folder))
    file = write_parquet(tmp_path / "x.parquet", [0, 11])
    assert "row 1 has label 11, outside the 10 classes" in refused(nbhd(*call, file), 1)
    assert "no config.json" in refused(nbhd("evaluate", "--model", tmp_path, "--data", IMAGENETTE48), 2)
    said = refused(nbhd(*call, IMAGENETTE48, "--split", "dev"))
    assert "no split 'dev'. It has: train, validation. Name one of them with --split." in said
    assert "no column 'picture'" in refused(nbhd(*call, IMAGENETTE48, "--image-column", "picture"))


# recipes


def test_recipes_are_listed_with_their_results(nbhd: Run) -> None:
    run = nbhd("recipes")
    assert run.exit_code == 0
    for name in recipe_names():
        assert name in run.stdout
    assert "81.8 % top-1" in run.stdout
    listed = json.loads(nbhd("recipes", "--format", "json").stdout)
    assert [recipe["name"] for recipe in listed] == recipe_names()
    assert all(recipe["expected"] and recipe["reproduced"] for recipe in listed)


def test_recipe_is_shown_copied_and_checked(nbhd: Run, tmp_path: Path) -> None:
    shown = nbhd("recipes", "show", "cifar10_quick")
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("cifar10_quick")

    copy = tmp_path / "copy.yaml"
    assert nbhd("recipes", "copy", "cifar10_quick", "--output", copy).exit_code == 0
    assert copy.read_text().startswith("# NAT")
    assert "exists already" in refused(nbhd("recipes", "copy", "cifar10_quick", "--output", copy))

    assert nbhd("recipes", "check", copy, "imagenette128_nat").stdout.count(": fine") == 2
    copy.write_text(copy.read_text().replace("batch_size:", "batchsize:"))
    run = nbhd("recipes", "check", copy, "imagenette128_nat")
    assert run.exit_code == 2
    assert "unknown key 'batchsize'. The nearest known one is 'batch_size'" in run.stderr
    assert "imagenette128_nat: fine" in run.stdout


def test_every_key_is_explained(nbhd: Run) -> None:
    said = nbhd("recipes", "keys").stdout
    for line in load_recipe("cifar10_quick").to_yaml().splitlines():
        if line.startswith("  "):
            assert f"\n  {line.strip().partition(':')[0]} (" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "x"], ""),
        (["copy"], ""),
        (["check"], ""),
        (["show"], ""),
        (["list", "x"], ""),
        (["copy", "a", "b"], ""),
        (["show", "x"], ""),
        (["show", "cifar10_quick", "--output", "x"], "--output goes with `nbhd recipes copy`, got --output x with"),
        (["copy", "cifar10_quick", "-f", "json"], "--format goes with `nbhd recipes list`, got --format json with"),
        (["copy", "cifar10_quick", "-o", "none/x.yaml"], "--output none/x.yaml: the folder none does not exist."),
        (["copy", "cifar10_quick", "-o", ""], "--output must name a file, got ''."),
        (["copy", "cifar10_quick", "-o", "folder"], "--output folder: this is a folder."),
        (["check", "binary.yaml"], "binary.yaml is no recipe: it is not text in UTF-8."),
    ],
)
def test_wrong_call_of_recipes_is_refused(
    arguments: list[str], message: str, nbhd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\x99\xff")
    assert refused(nbhd("recipes", *arguments)).startswith(f"nbhd: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.yaml", "folder"]


def test_a_copy_goes_to_standard_output(nbhd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = nbhd("recipes", "copy", "cifar10_quick", "-o", "-")
    assert (run.exit_code, run.stderr) == (0, "")
    assert run.stdout == find_recipe("cifar10_quick").read_text()
    assert list(tmp_path.iterdir()) == []
