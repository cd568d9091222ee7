"""The training core: schedule, order, parameter groups, checkpoints, the run's folder."""

from __future__ import annotations

import errno
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the train extra is not installed")

from nbhd.errors import ArgumentError, CheckpointError, FileError
from nbhd.models.nat import NatConfig, NatForImageClassification
from nbhd.tasks.recipe_sections import ScheduleSection
from nbhd.tasks.recipes import load_recipe, parse_recipe
from nbhd.tasks.runs import (
    MARKER,
    RUN_FILES,
    check_same_data,
    check_same_recipe,
    data_facts,
    draw_curves,
    last_checkpoint,
    prepare_output,
    remove_old_checkpoints,
    remove_run,
)
from nbhd.tasks.schedule import EpochSampler, lr_factor, size_at
from nbhd.tasks.training import TaskTrainer, parameter_groups, training_arguments

# Schedule and order


def test_learning_rate_warms_up_falls_as_a_cosine_and_cools_down() -> None:
    schedule = ScheduleSection(epochs=10, warmup_epochs=2, cooldown_epochs=1, warmup_lr_ratio=0.1, min_lr_ratio=0.05)
    rates = [lr_factor(step, 100, schedule) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.55)
    assert rates[200] == pytest.approx(1.0)
    assert rates[550] == pytest.approx(0.05 + 0.95 * 0.5)
    assert rates[899] == pytest.approx(0.05, abs=1e-4)
    assert set(rates[900:]) == {0.05}
    assert all(a <= b for a, b in pairwise(rates[:201]))
    assert all(a >= b for a, b in pairwise(rates[200:]))


def test_learning_rate_without_warmup_starts_at_its_peak() -> None:
    schedule = ScheduleSection(epochs=2, min_lr_ratio=0.0)
    assert lr_factor(0, 5, schedule) == 1.0
    assert lr_factor(9, 5, schedule) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_image_size_grows_by_the_schedule() -> None:
    schedule = ScheduleSection(epochs=6, image_sizes=[[0, 64], [2, 96], [5, 128]])
    assert [size_at(epoch, schedule, 128) for epoch in range(6)] == [64, 64, 96, 96, 96, 128]
    assert size_at(3, ScheduleSection(), 224) == 224


def test_order_is_a_permutation_of_the_seed_and_the_epoch_alone() -> None:
    sampler = EpochSampler(10, 10, seed=3)
    sampler.epoch = 4
    first = list(sampler)
    assert {epoch for epoch, _ in first} == {4}
    assert sorted(row for _, row in first) == list(range(10))
    torch.rand(3)
    assert first == list(sampler)
    sampler.epoch = 5
    assert [row for _, row in first] != [row for _, row in sampler]
    assert len(list(EpochSampler(10, 8, seed=3))) == 8


def test_norms_biases_position_biases_and_layer_scale_are_not_decayed() -> None:
    model = NatForImageClassification(
        NatConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3, layer_scale_init_value=1e-5)
    )
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    undecayed = {names[id(parameter)] for parameter in plain["params"]}
    assert all(
        name in undecayed
        for name in names.values()
        if name.endswith((".bias", ".rpb", "layer_scale_parameters")) or "norm" in name
    )
    assert all(names[id(parameter)].endswith(".weight") for parameter in decayed["params"])


@pytest.mark.parametrize(
    ("batch", "device_batch", "expected"), [(64, None, (64, 1)), (64, 16, (16, 4)), (60, 16, (15, 4)), (8, 100, (8, 1))]
)
def test_batch_is_split_for_a_device(
    batch: int, device_batch: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    recipe = parse_recipe({"optim": {"batch_size": batch, "device_batch_size": device_batch}, "run": {"device": "cpu"}})
    arguments = training_arguments(recipe, tmp_path)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == expected


@pytest.mark.parametrize("pinned", [True, False])
def test_step_sees_the_whole_batch_whatever_the_number_of_gpus(
    pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    if pinned:
        make = TrainingArguments.__post_init__

        def with_gpus(self: Any) -> None:
            make(self)
            self._n_gpu = 4

        monkeypatch.setattr(TrainingArguments, "__post_init__", with_gpus)
    else:  # as if transformers did not let itself be told
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    recipe = parse_recipe({"optim": {"batch_size": 64, "device_batch_size": 8}, "run": {"device": "cpu"}})
    arguments = training_arguments(recipe, tmp_path)
    assert arguments.n_gpu == (1 if pinned else 4)
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps == 64


def trainer_for(recipe: Any, output: Path, arguments: Any = None) -> TaskTrainer:
    """A trainer of a model that is one number."""
    model = torch.nn.Linear(1, 1)
    return TaskTrainer(
        recipe, arguments or training_arguments(recipe, output), model, [0] * 8, [0] * 8, list,  # type: ignore[arg-type]
        prepare=lambda inputs, seed, epoch: inputs, loss=lambda outputs, labels: labels, metrics=lambda a, b: {},
    )  # fmt: skip


def test_trainer_writes_nothing_before_it_trains_and_wants_the_recipes_batch(tmp_path: Path) -> None:
    recipe = parse_recipe({"optim": {"batch_size": 4}, "run": {"device": "cpu"}})
    trainer = trainer_for(recipe, tmp_path / "run")
    assert trainer.args.output_dir == str(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run").exists()
    arguments = training_arguments(recipe, tmp_path)
    arguments.per_device_train_batch_size = 2
    with pytest.raises(ArgumentError, match="batch_size is 4, but a step would see 2 images"):
        trainer_for(recipe, tmp_path, arguments)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
    ],
)
def test_checkpoint_that_cannot_be_written_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def full(*_: Any, **__: Any) -> None:
        raise error

    trainer = trainer_for(parse_recipe({"optim": {"batch_size": 4}, "run": {"device": "cpu"}}), tmp_path)
    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(FileError, match=r"cannot write the checkpoint .*checkpoint-0: .*(No space|inline_container)"):
        trainer._save_checkpoint(trainer.network, None)


def test_evaluation_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = trainer_for(parse_recipe({"optim": {"batch_size": 4}, "run": {"device": "cpu"}}), tmp_path)
    with pytest.raises(ArgumentError, match="the evaluation loss is not finite at step 0: the run has diverged"):
        trainer.log({"eval_loss": float("nan"), "eval_top1": 1.0})


# The run's folder


def test_folder_of_a_run_is_made(tmp_path: Path) -> None:
    prepare_output(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArgumentError, match=r"is not empty\. Use --resume .* --overwrite"):
        prepare_output(tmp_path, resume=False, overwrite=False)
    with pytest.raises(ArgumentError, match="holds no run to resume: there is neither"):
        prepare_output(tmp_path, resume=True, overwrite=False)
    prepare_output(tmp_path, resume=False, overwrite=True)
    (tmp_path / "recipe.yaml").write_text("")
    prepare_output(tmp_path, resume=True, overwrite=False)


def test_former_run_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere, run / "logs", run / ".export-x1"):
        folder.mkdir()
    (elsewhere / "weights").write_text("precious")
    (run / "checkpoints").symlink_to(elsewhere)
    for name in (*RUN_FILES[:-2], ".config.json.0f.part", "thesis.txt"):
        (run / name).write_text("x")
    (run / "recipe.yaml").symlink_to(elsewhere / "none")
    remove_run(run)
    assert {path.name for path in run.iterdir()} == {"thesis.txt", "logs"}
    assert (elsewhere / "weights").read_text() == "precious"
    (run / "README.md").write_text("of no run")
    remove_run(run)
    assert (run / "README.md").exists(), "there is no run in the folder"


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        prepare_output(tmp_path / "x", resume=False, overwrite=True)
    with pytest.raises(ArgumentError, match="cannot be made"):
        prepare_output(tmp_path / "x" / "y", resume=False, overwrite=False)


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 100, 200):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    for step in (9, 10, 100):
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / MARKER).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-100"


def test_old_checkpoints_go_and_the_newest_complete_ones_stay(tmp_path: Path) -> None:
    for step in (9, 10, 100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old_checkpoints(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 4, "none is complete"
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}" / MARKER).write_text("{}")
    remove_old_checkpoints(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100", "checkpoint-200"}
    remove_old_checkpoints(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100", "checkpoint-200"}


def test_resuming_with_another_recipe_names_what_differs(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10_quick")
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        check_same_recipe(recipe, tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    check_same_recipe(recipe, tmp_path)
    check_same_recipe(load_recipe("cifar10_quick", ["run.save_every_steps=7", "data.num_workers=2"]), tmp_path)
    with pytest.raises(ArgumentError, match=r"optim\.lr was 0\.002, is 0\.1"):
        check_same_recipe(load_recipe("cifar10_quick", ["optim.lr=0.1"]), tmp_path)


def test_resuming_with_other_data_names_what_differs(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0])
    before = data_facts(["a", "b", "c"], labels)
    (tmp_path / MARKER).write_text(json.dumps({"data": before}))
    check_same_data(tmp_path, data_facts(["a", "b", "c"], labels.copy()))
    for classes, now, message in (
        (["a", "x", "c"], labels, "class 1 was 'b', is 'x'"),
        (["a", "b"], labels, "there were 3 classes and are 2"),
        (["a", "b", "c"], labels[:3], "there were 4 training images and are 3"),
        (["a", "b", "c"], labels[::-1], "other labels"),
    ):
        with pytest.raises(ArgumentError, match=message):
            check_same_data(tmp_path, data_facts(classes, now))
    (tmp_path / MARKER).write_text("{}")  # as before checkpoints remembered it
    check_same_data(tmp_path, before)


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the train extra is not installed")
    from PIL import Image

    history = [
        {"epoch": 1, "train_loss": 2.0},
        {"epoch": 2, "train_loss": 1.5, "eval_loss": 1.4, "eval_top1": 0.5},
    ]
    draw_curves(tmp_path / "curves.png", history, "top1", "test")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
