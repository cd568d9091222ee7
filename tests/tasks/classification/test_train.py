"""`nbhd train` on real images: the result folder, killing and resuming, many processes, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="the train extra is not installed")
pytest.importorskip("kornia", reason="the train extra is not installed")

from nbhd.errors import ArgumentError, FileError, RecipeError
from nbhd.tasks.checkpoints import load_classifier
from nbhd.tasks.classification import train as train_module
from nbhd.tasks.classification.evaluate import evaluate_images
from nbhd.tasks.classification.train import (
    EvalImages,
    TrainImages,
    build_model,
    evaluation_metrics,
    top_k_metrics,
    train,
)
from nbhd.tasks.datasets import open_images
from nbhd.tasks.recipe_sections import DataSection, Recipe
from nbhd.tasks.recipes import load_recipe, parse_recipe
from nbhd.tasks.training import TaskTrainer
from nbhd.tasks.transforms import resize_for_eval
from tests.pictures import encode, noise
from tests.tasks.test_datasets import CLASSES, IMAGENETTE48, write_folder

# Everything that could make two runs differ is on: augmentation, dropout, averages, accumulation, growing images.
SMALL: dict[str, Any] = {
    "model": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3, "mlp_ratio": 2.0,
        "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1,
    },
    "data": {"image_size": 48, "resize": "squash", "name": "Imagenette at 48x48", "terms": "research and education"},
    "augment": {
        "rand_augment_ops": 1, "brightness": 0.2, "hue": 0.05, "erase_prob": 0.3, "mixup": 0.2, "cutmix": 1.0,
        "mix_prob": 0.5, "label_smoothing": 0.1, "plain_epochs": 1,
    },
    "optim": {"lr": 0.003, "batch_size": 20, "device_batch_size": 10, "ema_decay": 0.9, "clip_grad_norm": 1.0},
    "schedule": {"epochs": 3, "warmup_epochs": 1, "image_sizes": [[0, 32], [2, 48]]},
    "run": {"device": "cpu", "save_every_steps": 3, "save_dtype": "float16", "keep_checkpoints": 2},
}  # fmt: skip


def small(**sections: dict[str, Any]) -> Recipe:
    return parse_recipe({name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}})


#: The least work that is a training run.
TINY: dict[str, Any] = {
    "model": {"embed_dim": 8, "depths": [1], "num_heads": [1], "kernel_size": 3},
    "data": {"image_size": 16, "resize": "squash"},
    "optim": {"batch_size": 4},
    "schedule": {"epochs": 1},
    "run": {"device": "cpu", "plot": False},
}


def tiny(**sections: dict[str, Any]) -> Recipe:
    return parse_recipe({name: TINY.get(name, {}) | sections.get(name, {}) for name in {*TINY, *sections}})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    train(small(), IMAGENETTE48, output)
    return output


def without_times(metrics: Path) -> dict[str, Any]:
    found = json.loads(metrics.read_text())
    for row in found["epochs"]:
        del row["seconds"]
    del found["final"]["seconds"]
    return dict(found)


# What a run leaves


def test_result_is_a_model_folder_with_everything_beside_it(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "recipe.yaml", "metrics.json",
        "curves.png", "checkpoints",
    }  # fmt: skip
    assert load_recipe(unbroken / "recipe.yaml") == small()
    kept = {path.name for path in (unbroken / "checkpoints").iterdir()}
    assert kept == {"checkpoint-9", "checkpoint-12"}
    assert (unbroken / "model.safetensors").stat().st_mode & 0o777 == (unbroken / "config.json").stat().st_mode & 0o777


def test_half_precision_file_is_loaded_and_run_in_float32(unbroken: Path) -> None:
    stored = load_file(unbroken / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(unbroken)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert [model.config.id2label[i] for i in range(8)] == CLASSES
    assert model.config.label2id["tench"] == 0


def test_metrics_have_each_epoch_and_the_final_figures_of_the_saved_files(unbroken: Path) -> None:
    metrics = json.loads((unbroken / "metrics.json").read_text())
    assert metrics["complete"] is True
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3]
    assert [row["image_size"] for row in metrics["epochs"]] == [32, 32, 48]
    assert [row["step"] for row in metrics["epochs"]] == [4, 8, 12]
    for row in metrics["epochs"]:
        assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "learning_rate"} <= set(row)
        assert 1 < row["train_loss"] < 4
    assert metrics["recipe"]["optim"]["lr"] == 0.003
    assert metrics["machine"]["versions"]["torch"] == torch.__version__
    final = evaluate_images(load_classifier(unbroken, torch.device("cpu")), open_images(IMAGENETTE48, "validation"))
    assert metrics["final"]["top1"] == final.top1
    assert metrics["final"]["images"] == final.images == 40
    assert metrics["final"]["loss"] == pytest.approx(final.loss, abs=1e-5)
    # The last epoch evaluated the same weights before they were rounded to half precision.
    assert metrics["epochs"][-1]["eval_loss"] == pytest.approx(final.loss, abs=5e-3)
    assert metrics["epochs"][-1]["eval_top1"] == pytest.approx(final.top1, abs=0.051)


def test_card_says_data_recipe_result_and_terms(unbroken: Path) -> None:
    card = (unbroken / "README.md").read_text()
    final = json.loads((unbroken / "metrics.json").read_text())["final"]
    for text in ("Imagenette at 48x48", "research and education", "| epochs | 3 |", f"{final['top1']:.2%}", "gas pump"):
        assert text in card


def test_training_learns_its_images(tmp_path: Path) -> None:
    """Training and evaluation agree on pixels and labels: what was learnt by heart is known again."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "validation"):
        shutil.copy(IMAGENETTE48 / "validation.parquet", data / f"{name}.parquet")
    recipe = parse_recipe(
        {
            "model": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 5, "drop_path_rate": 0.0},
            "data": {"image_size": 32, "resize": "squash"},
            "augment": {
                "crop_scale": [1.0, 1.0],
                "crop_aspect": [1.0, 1.0],
                "hflip_prob": 0.0,
                "crop_resample": "bicubic",
            },
            "optim": {"lr": 0.004, "batch_size": 20, "weight_decay": 0.0},
            "schedule": {"epochs": 60, "warmup_epochs": 5},
            "eval": {"every_epochs": 60},
            "run": {"device": "cpu", "plot": False, "save_every_steps": 1000},
        }
    )
    metrics = train(recipe, data, tmp_path / "run")
    assert metrics["final"]["top1"] >= 0.9
    assert metrics["final"]["loss"] == pytest.approx(metrics["epochs"][-1]["train_loss"], abs=0.2)
    assert not (tmp_path / "run" / "curves.png").exists()


def test_same_recipe_gives_the_same_weights_and_another_seed_others(unbroken: Path, tmp_path: Path) -> None:
    train(small(), IMAGENETTE48, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    train(small(run={"seed": 1}), IMAGENETTE48, tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (unbroken / "model.safetensors").read_bytes()


# Killed and resumed


def command(output: Path, recipe: Recipe, *more: str) -> list[str]:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(recipe.to_yaml())
    return ["nbhd", "train", "--config", str(file), "--data", str(IMAGENETTE48), "--output", str(output), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("kill_at", ["checkpoint-3", "checkpoint-6", "checkpoint-9"])
def test_killed_run_resumes_to_the_same_weights(kill_at: str, unbroken: Path, tmp_path: Path) -> None:
    """kill -9 as soon as a checkpoint shows (it may be half written), in the middle of an epoch; then --resume."""
    output = tmp_path / "killed"
    arguments = command(output, small())
    run = subprocess.Popen([sys.executable, "-m", *arguments], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (output / "checkpoints" / kill_at).exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    _, said = run.communicate()
    assert run.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {said}"
    assert not (output / "model.safetensors").exists()

    train(small(), IMAGENETTE48, output, resume=True)
    assert (output / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert without_times(output / "metrics.json") == without_times(unbroken / "metrics.json")


def test_resuming_skips_a_checkpoint_that_is_not_complete(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "nbhd_state.json").unlink()
    (newest / "model.safetensors").write_bytes(b"cut short")
    (tmp_path / "run" / "model.safetensors").unlink()
    train(small(), IMAGENETTE48, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_resuming_with_no_checkpoint_starts_from_the_beginning(unbroken: Path, tmp_path: Path) -> None:
    train(small(), IMAGENETTE48, tmp_path / "new", resume=True)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_resuming_with_another_recipe_is_refused_and_leaves_the_run_alone(unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    with pytest.raises(ArgumentError, match=r"optim\.lr was 0\.003, is 0\.1"):
        train(small(optim={"lr": 0.1}), IMAGENETTE48, unbroken, resume=True)
    with pytest.raises(ArgumentError, match="is not empty"):
        train(small(), IMAGENETTE48, unbroken)
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


class Killed(Exception):
    pass


def killed_behind_checkpoint(step: int, recipe: Recipe, data: Path, output: Path) -> None:
    """A run that ends as soon as the checkpoint of a step is complete."""
    save = TaskTrainer._save_checkpoint

    def save_and_die(self: TaskTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TaskTrainer, "_save_checkpoint", save_and_die)
        train(recipe, data, output)


@pytest.mark.parametrize("step", [1, 2], ids=["inside of an epoch", "at the end of an epoch"])
def test_history_has_every_epoch_and_all_seconds_wherever_a_run_was_killed(step: int, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=4)
    recipe = tiny(schedule={"epochs": 2}, run={"save_every_steps": 1})
    train(recipe, data, tmp_path / "whole")
    killed_behind_checkpoint(step, recipe, data, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "nbhd_state.json"
    saved = json.loads(state.read_text())
    assert saved["seconds"] > 0
    assert len(saved["history"]) == step - 1
    state.write_text(json.dumps(saved | {"seconds": 1000.0}))
    train(recipe, data, tmp_path / "run", resume=True)
    assert without_times(tmp_path / "run" / "metrics.json") == without_times(tmp_path / "whole" / "metrics.json")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"][-1]["seconds"] > 1000


def test_resuming_with_other_data_is_refused_and_with_an_older_checkpoint_is_not(tmp_path: Path) -> None:
    recipe = tiny(schedule={"epochs": 2})
    data = write_folder(tmp_path / "data", "cat", "dog", images=3)
    killed_behind_checkpoint(1, recipe, data, tmp_path / "run")
    for classes, images, message in (
        (("cat", "cow"), 3, "class 1 was 'dog', is 'cow'"),
        (("cat", "dog", "cow"), 3, "there were 2 classes and are 3"),
        (("cat", "dog"), 4, "there were 6 training images and are 8"),
    ):
        other = write_folder(tmp_path / message, *classes, images=images)
        with pytest.raises(ArgumentError, match=message):
            train(recipe, other, tmp_path / "run", resume=True)
    state = tmp_path / "run" / "checkpoints" / "checkpoint-1" / "nbhd_state.json"
    saved = json.loads(state.read_text())
    del saved["data"]
    state.write_text(json.dumps(saved))
    assert len(train(recipe, data, tmp_path / "run", resume=True)["epochs"]) == 2


# A folder that holds a run


def test_start_that_fails_leaves_the_former_run_and_no_recipe(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=3)
    train(tiny(), data, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for bad, source in (
        (tiny(optim={"batch_size": 7}), data),
        (tiny(), tmp_path),
        (tiny(model={"depths": [1, 1]}), data),
    ):
        with pytest.raises((ArgumentError, FileError, RecipeError)):
            train(bad, source, tmp_path / "run", overwrite=True)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
        with pytest.raises((ArgumentError, FileError, RecipeError)):
            train(bad, source, tmp_path / "new")
        assert not list((tmp_path / "new").iterdir())


def test_overwriting_leaves_nothing_of_the_former_run(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=3)
    train(tiny(), data, tmp_path / "run")
    with pytest.raises(ArgumentError, match="diverged"):
        train(tiny(optim={"lr": 1e30}, schedule={"epochs": 9}), data, tmp_path / "run", overwrite=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"recipe.yaml", "metrics.json", "checkpoints"}


# Many processes


@pytest.mark.slow
def test_two_processes_share_the_batch(unbroken: Path, tmp_path: Path) -> None:
    """gloo on the CPU: the same rows in the same order, half a batch each; dropout and mixing differ by process."""
    plain = {
        "augment": {
            "mixup": 0.0,
            "cutmix": 0.0,
            "rand_augment_ops": 0,
            "erase_prob": 0.0,
            "brightness": 0.0,
            "hue": 0.0,
        },
        "model": {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0},
    }
    # The last batch of the evaluation is one image, which both processes get.
    recipe = small(**plain, data={"eval_limit": 33}, eval={"batch_size": 8})
    train(recipe, IMAGENETTE48, tmp_path / "one")
    arguments = command(tmp_path / "two", recipe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("finished:") == 1, "only the first process speaks"
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-3)
        assert a["step"] == b["step"]
    assert two["final"]["images"] == 33


# Fine-tuning


def test_finished_model_is_the_start_of_another_with_other_classes(unbroken: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=6)
    recipe = parse_recipe(
        {
            "model": {"pretrained": str(unbroken), "drop_path_rate": 0.1},
            "data": {"image_size": 32},
            "optim": {"batch_size": 4, "lr": 0.0},
            "schedule": {"epochs": 1},
            "run": {"device": "cpu"},
        }
    )
    train(recipe, data, tmp_path / "tuned")
    tuned = load_classifier(tmp_path / "tuned", torch.device("cpu")).model
    assert [tuned.config.id2label[i] for i in range(2)] == ["cat", "dog"]
    assert tuned.config.drop_path_rate == 0.1
    body = "nat.encoder.levels.0.layers.0.attention.self.query.weight"
    start = load_file(unbroken / "model.safetensors")[body]
    torch.testing.assert_close(tuned.state_dict()[body], start.float())


def test_shape_of_a_pretrained_model_cannot_be_set(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"so model\.embed_dim cannot be set"):
        train(small(model={"pretrained": str(unbroken)}), IMAGENETTE48, tmp_path)
    recipe = parse_recipe({"model": {"pretrained": str(tmp_path / "none")}, "run": {"device": "cpu"}})
    with pytest.raises(RecipeError, match=r"model\.pretrained .* cannot be loaded"):
        train(recipe, IMAGENETTE48, tmp_path / "x")


@pytest.fixture(scope="module")
def cat_dog_cow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model of three classes."""
    folder = tmp_path_factory.mktemp("models") / "nat"
    model = build_model(tiny(), ["cat", "dog", "cow"])
    torch.nn.init.normal_(model.classifier.bias)  # type: ignore[union-attr,arg-type]
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def tuned(folder: Path, *classes: str) -> Any:
    return build_model(parse_recipe({"model": {"pretrained": str(folder)}}), list(classes))


def test_classifier_of_the_same_classes_is_kept_and_that_of_others_is_new(cat_dog_cow: Path) -> None:
    stored = load_file(cat_dog_cow / "model.safetensors")
    weight, bias = stored["classifier.weight"], stored["classifier.bias"]
    same, turned = tuned(cat_dog_cow, "cat", "dog", "cow"), tuned(cat_dog_cow, "cow", "cat", "dog")
    assert torch.equal(same.classifier.weight, weight)
    assert torch.equal(turned.classifier.weight, weight[[2, 0, 1]])
    assert torch.equal(turned.classifier.bias, bias[[2, 0, 1]])
    assert turned.config.id2label == {0: "cow", 1: "cat", 2: "dog"}
    others = tuned(cat_dog_cow, "cat", "dog", "hen")
    assert not torch.isin(others.classifier.weight, weight).any()
    assert not others.classifier.bias.any()
    assert others.classifier.weight.std() < 0.05
    assert torch.equal(others.classifier.weight, tuned(cat_dog_cow, "a", "b", "c").classifier.weight), "of the seed"
    assert tuned(cat_dog_cow, "a", "b").classifier.weight.shape[0] == 2
    body = "nat.encoder.levels.0.layers.0.attention.self.query.weight"
    for model in (same, turned, others):
        assert torch.equal(model.state_dict()[body], stored[body])


def test_pretrained_weights_that_are_not_those_of_a_whole_nat_are_refused(cat_dog_cow: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(RecipeError, match=r"model\.pretrained .* is a .*vit\b"):
        tuned(tmp_path / "vit", "a", "b")

    stored = load_file(cat_dog_cow / "model.safetensors")
    key = next(key for key in stored if key.endswith("query.weight"))
    shutil.copytree(cat_dog_cow, tmp_path / "nat")
    file = tmp_path / "nat" / "model.safetensors"
    for wrong in (
        {name: value for name, value in stored.items() if name != key},
        stored | {key: stored[key][:4].contiguous()},
    ):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(RecipeError, match=f"1 weights are missing or of another shape .{key}"):
            tuned(tmp_path / "nat", "a", "b")
    file.write_bytes((cat_dog_cow / "model.safetensors").read_bytes()[:500])
    with pytest.raises(RecipeError, match=r"model\.pretrained .* cannot be loaded"):
        tuned(tmp_path / "nat", "a", "b")


# Bad input


def test_evaluating_on_the_training_images_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = write_folder(tmp_path / "plain", "cat", "dog", images=2)
    train(tiny(), plain, tmp_path / "run")
    assert f"the images of {plain} are used for training and for evaluation" in capfd.readouterr().err
    assert "These are the images it was trained on" in (tmp_path / "run" / "README.md").read_text()

    split = tmp_path / "split"
    for name in ("train", "validation"):
        shutil.copytree(plain, split / name)
    train(tiny(), split, tmp_path / "copied")
    assert "are used for training and for evaluation" in capfd.readouterr().err
    (split / "validation" / "cat" / "0.png").write_bytes(encode(noise(seed=99), "PNG"))
    train(tiny(), split, tmp_path / "other")
    assert "are used for training" not in capfd.readouterr().err
    card = (tmp_path / "other" / "README.md").read_text()
    assert "4 images of the validation split" in card
    assert "trained on:" not in card


def broken_copy(folder: Path) -> Path:
    """The images with three that cannot be decoded."""
    folder.mkdir()
    for name in ("train", "validation"):
        table = pq.read_table(IMAGENETTE48 / f"{name}.parquet")
        rows = table.to_pylist()
        for row in (1, 5) if name == "train" else (2,):
            rows[row]["image"]["bytes"] = rows[row]["image"]["bytes"][:40] if row != 5 else b""
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_images_that_cannot_be_decoded_are_named_and_left_out(
    cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = broken_copy(tmp_path / "data")
    recipe = small(data={"cache": cache}, schedule={"epochs": 1, "warmup_epochs": 0})
    metrics = train(recipe, data, tmp_path / "run")
    said = capfd.readouterr().err
    for name in ("(train) row 1 (", "(train) row 5 (", "(validation) row 2 ("):
        assert name in said
    assert said.count("skipped:") >= 3
    assert (metrics["final"]["images"], metrics["final"]["skipped"]) == (39, 1)


def test_cached_and_uncached_images_are_the_same() -> None:
    table = open_images(IMAGENETTE48, "train")
    cached, uncached = (TrainImages(table, small(data={"cache": cache})) for cache in ("memory", "none"))
    for key in ((0, 3), (1, 3), (2, 3), (2, 50)):
        assert (cached[key]["image"] == uncached[key]["image"]).all()  # type: ignore[index]
    held, read = (EvalImages(table, small(data={"cache": cache})) for cache in ("auto", "none"))
    assert (held[9]["image"] == read[9]["image"]).all()


@pytest.mark.slow
def test_loader_processes_change_nothing(unbroken: Path, tmp_path: Path) -> None:
    train(small(data={"num_workers": 2}), IMAGENETTE48, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_another_image_stands_for_one_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=3)
    (data / "cat" / "1.png").write_text("no picture")
    recipe = tiny(data={"cache": "none"}, optim={"batch_size": 2, "device_batch_size": 1}, schedule={"epochs": 2})
    table = open_images(data, "train")
    images = TrainImages(table, recipe)
    stands = [images[epoch, 1] for epoch in range(12)]
    assert [item["key"] for item in stands] == [(epoch, 1) for epoch in range(12)]
    assert {item["label"] for item in stands} == {0, 1}, "not always the same one"
    again = TrainImages(table, recipe)
    for epoch in range(12):
        assert (again[epoch, 1]["image"] == stands[epoch]["image"]).all()
    assert len(train(recipe, data, tmp_path / "run")["epochs"]) == 2

    for file in data.glob("*/*.png"):
        file.write_text("no picture")
    with pytest.raises(FileError, match="33 images in a row cannot be decoded"):
        images[0, 0]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_strip_is_evaluated_as_it_is_classified(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its long ends, which the centre crop does not see, are not scaled up with its short side."""
    data = write_folder(tmp_path / "data", "cat", "dog", images=1)
    (data / "cat" / "0.png").write_bytes(encode(noise(600, 1), "PNG"))
    sizes: list[tuple[int, int]] = []

    def resized(image: Image.Image, section: DataSection) -> np.ndarray:
        sizes.append(image.size)
        return resize_for_eval(image, section)

    monkeypatch.setattr(train_module, "resize_for_eval", resized)
    images = EvalImages(open_images(data, "train"), tiny(data={"resize": "crop", "cache": cache}))
    assert images[0]["image"].shape == (16, 16, 3)
    assert (8, 1) in sizes


def test_image_that_cannot_be_decoded_has_no_part_in_the_evaluation_loss(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=3)
    (data / "cat" / "1.png").write_text("no picture")
    metrics = train(tiny(data={"cache": "none"}, eval={"batch_size": 2}), data, tmp_path / "run")
    assert metrics["final"]["images"] == 5
    assert metrics["epochs"][-1]["eval_loss"] == pytest.approx(metrics["final"]["loss"], rel=1e-5)


def test_images_are_kept_if_they_fit_judged_by_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=20)
    for i in range(1, 20):
        for name in ("cat", "dog"):
            (data / name / f"{i}.png").write_bytes(encode(noise(64, 64, seed=i), "PNG"))
    table = open_images(data, "train")
    first = table.decode(0)
    guess = train_module._guess_bytes(table, lambda image: image)
    assert guess == pytest.approx((38 * 64 * 64 + 2 * first.width * first.height) * 3, rel=0.05)
    monkeypatch.setattr(train_module, "CACHE_LIMIT_BYTES", 30 * 64 * 64 * 3)
    monkeypatch.setattr(train_module, "_guess_bytes", lambda *_: 0.0)
    said: list[str] = []
    images = TrainImages(table, tiny(), said.append)
    assert images.decoded is None
    assert len(images) == 40
    assert "they take more than" in said[-1]
    assert TrainImages(table, tiny(data={"cache_size": 32})).decoded is not None
    assert TrainImages(table, tiny(data={"cache": "memory"})).decoded is not None


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"optim": {"batch_size": 500}}, ArgumentError, "only 80 training images"),
        ({"data": {"train_split": "dev"}}, FileError, "no split 'dev'"),
        ({"data": {"label_column": "class"}}, FileError, "no column 'class'"),
        ({"optim": {"lr": 1e30, "clip_grad_norm": None}}, ArgumentError, "the run has diverged"),
    ],
)
def test_run_that_cannot_be_says_why(
    sections: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(small(**sections), IMAGENETTE48, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat")
    with pytest.raises(FileError, match="only the class"):
        train(small(), data, tmp_path / "run")


def test_top_k_ignores_what_could_not_be_decoded() -> None:
    logits = np.eye(10)[[0, 1, 2, 3]]
    assert top_k_metrics(logits, np.array([0, 1, 9, -100])) == {"top1": pytest.approx(2 / 3), "top5": 1.0}
    assert top_k_metrics(-np.arange(10.0)[None], np.array([5])) == {"top1": 0.0, "top5": 0.0}
    with pytest.raises(FileError, match="none of the evaluation images"):
        top_k_metrics(logits, np.full(4, -100))


def test_logits_that_are_no_numbers_are_no_hits() -> None:
    logits = np.array([[np.nan] * 3, [0.0, 1.0, np.nan], [0.0, 1.0, 2.0]])
    assert top_k_metrics(logits, np.array([0, 1, 2])) == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(1 / 3)}
    assert np.isnan(evaluation_metrics(logits, np.array([0, 1, 2]))["loss"])


def test_evaluation_loss_is_the_mean_over_what_could_be_decoded() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.array([0, 3, -100, 1, 2])
    good = labels >= 0
    each = np.log(np.exp(logits[good]).sum(1)) - logits[good, labels[good]]
    found = evaluation_metrics(logits, labels)
    assert found["loss"] == pytest.approx(each.mean())
    assert {name: found[name] for name in ("top1", "top5")} == top_k_metrics(logits, labels)


def test_run_that_diverges_in_its_last_step_says_so(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", "cat", "dog", images=2)
    with pytest.raises(ArgumentError, match="the evaluation loss is not finite at step 1: the run has diverged"):
        train(tiny(optim={"lr": 1e30}), data, tmp_path / "run")
