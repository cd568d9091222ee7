"""The training core of every task: transformers' `Trainer` made repeatable.

What it adds: a data order and augmentation that are functions of (seed, epoch, row) and a seed for every step, so that
a run killed at any moment and resumed gives the same weights as an unbroken one; AdamW with the right parameters
undecayed; warm-up, cosine and cool-down; averaged weights; checkpoints marked complete only when they are; the history
of the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from nbhd._files import write_json
from nbhd.errors import ArgumentError, FileError, MissingExtra
from nbhd.tasks.devices import available_devices
from nbhd.tasks.recipe_sections import Recipe
from nbhd.tasks.runs import MARKER, remove_old_checkpoints
from nbhd.tasks.schedule import EpochSampler, lr_factor, size_at

EMA_FILE = "ema.safetensors"
NO_DECAY = ("rpb", "layer_scale_parameters")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: vectors (norms, biases), ``rpb`` and layer scale are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or name.rpartition(".")[2] in NO_DECAY
            (plain if undecayed else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class TaskTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` that a task gives four functions.

    Args:
        recipe: the resolved recipe.
        arguments: of `training_arguments` for the same recipe.
        train_data: a data set indexed by ``(epoch, row)`` keys; its items must hold ``"key"``.
        prepare: ``(inputs, seed, epoch) -> inputs`` on the device for a batch; ``seed`` is None for evaluation, else
            integers to draw augmentations from. ``inputs["labels"]`` are the targets of ``loss``.
        loss: ``(outputs, labels) -> scalar``.
        metrics: ``(predictions, labels) -> {name: number}`` over the whole evaluation set; ``"loss"`` among them.
        on_epoch: called on the main process with the history after each epoch.
        data: what a checkpoint remembers of the data (`nbhd.tasks.runs.data_facts`).

    Nothing is written before training begins.

    Raises:
        ArgumentError: there are fewer training images than a batch has.
    """

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        model: nn.Module,
        train_data: Dataset[Any],
        eval_data: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        prepare: Callable[[dict[str, Any], list[int] | None, int], dict[str, Any]],
        loss: Callable[[Any, Tensor], Tensor],
        metrics: Callable[[Any, Any], dict[str, float]],
        on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.network, self._data = recipe, model, data
        self._prepare, self._loss, self._on_epoch = prepare, loss, on_epoch
        self.history: list[dict[str, Any]] = []
        self._loss_sum, self._loss_count, self._seconds = 0.0, 0, 0.0
        self._micro_step = 0
        self._clock = time.monotonic()
        rows = len(train_data)  # type: ignore[arg-type]
        self.steps_per_epoch = rows // recipe.optim.batch_size
        if self.steps_per_epoch == 0:
            raise ArgumentError(
                f"optim.batch_size is {recipe.optim.batch_size}, but there are only {rows} training images. "
                "Use a smaller batch."
            )
        images = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
        if images != recipe.optim.batch_size:
            raise ArgumentError(
                f"optim.batch_size is {recipe.optim.batch_size}, but a step would see {images} images. Leave the size "
                "of the batch to training_arguments()."
            )
        self.sampler = EpochSampler(rows, self.steps_per_epoch * recipe.optim.batch_size, recipe.run.seed)
        # Trainer makes its folder at once; this one is there.
        folder, arguments.output_dir = arguments.output_dir, os.curdir
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=train_data,
            eval_dataset=eval_data,
            compute_metrics=lambda prediction: metrics(prediction.predictions, prediction.label_ids),
        )
        arguments.output_dir = folder
        self.model_accepts_loss_kwargs = False  # compute_loss below is a mean over the batch: divide by accumulation
        self._ema: dict[str, Tensor] | None = None
        if recipe.optim.ema_decay is not None:
            self._ema = {name: value.detach().clone().float() for name, value in model.named_parameters()}
        self.remove_callback(_printer_of_transformers())
        self.add_callback(_Hooks(self))

    # ------------------------------------------------------------------------------- what Trainer asks for

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optim = self.recipe.optim
            lr = optim.lr * (optim.batch_size / optim.lr_batch_size if optim.lr_batch_size else 1)
            groups = parameter_groups(self.network if model is None else model, optim.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer if optimizer is not None else self.create_optimizer(),
                lambda step: lr_factor(step, self.steps_per_epoch, self.recipe.schedule),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
        # Dropout and stochastic depth draw from the global generator: a seed of its own for each step makes a resumed
        # run equal to an unbroken one whatever else drew numbers in between.
        seed = [self.recipe.run.seed, self.state.global_step, self._micro_step, self.args.process_index]
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        self._micro_step += 1
        loss: Tensor = super().training_step(model, inputs, *rest, **more)
        accumulation = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        self._loss_sum += float(loss) * accumulation
        self._loss_count += 1
        self._check_finite(self._loss_sum, "the loss")
        return loss

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise ArgumentError(
                f"{what} is not finite at step {self.state.global_step}: the run has diverged. Lower optim.lr, "
                "lengthen schedule.warmup_epochs or set optim.clip_grad_norm."
            )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        keys = inputs.pop("keys", None)
        inputs = super()._prepare_inputs(inputs)
        if keys is None:
            return self._prepare(inputs, None, -1)
        epoch, first_row = keys[0]
        return self._prepare(inputs, [self.recipe.run.seed, epoch, first_row], epoch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self._loss(outputs, labels)
        return (loss, {"loss": loss, "logits": outputs["logits"]}) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # ------------------------------------------------------------------------------------ averaged weights

    def update_average(self) -> None:
        if self._ema is None:
            return
        decay = self.recipe.optim.ema_decay or 0.0
        # The average of the first steps would otherwise hang on to the random start.
        decay = min(decay, (1 + self.state.global_step) / (10 + self.state.global_step))
        with torch.no_grad():
            parameters = dict(self.network.named_parameters())
            averages = list(self._ema.values())
            torch._foreach_lerp_(averages, [parameters[name].float() for name in self._ema], 1 - decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Run a block with the averaged weights in the model."""
        if self._ema is None:
            yield
            return
        parameters = dict(self.network.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self._ema}
        with torch.no_grad():
            for name, value in self._ema.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self.averaged_weights():
            result: dict[str, float] = super().evaluate(*arguments, **options)
        return result

    # ---------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        totals = self._gather_loss()  # all processes take part
        seconds = self._seconds + time.monotonic() - self._clock
        state = {"history": self.history, "loss_sum": totals[0], "loss_count": totals[1], "seconds": seconds}
        try:
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)  # left incomplete by a run that was killed
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                if self._ema is not None:
                    save_file({name: value.cpu().contiguous() for name, value in self._ema.items()}, folder / EMA_FILE)
                write_json(folder / MARKER, state | {"data": self._data})
                remove_old_checkpoints(folder.parent, self.recipe.run.keep_checkpoints)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError of a full disk
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise FileError(
                f"cannot write the checkpoint {folder}: {reason}. See that there is room and that the folder may be "
                "written, then go on with --resume."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        self.history, self._seconds = state["history"], state["seconds"]
        # The sums are over all processes; one of them carries them on.
        if self.args.process_index == 0:
            self._loss_sum, self._loss_count = state["loss_sum"], state["loss_count"]
        if self._ema is not None:
            self._ema = {name: value.to(self.args.device) for name, value in load_file(folder / EMA_FILE).items()}

    def _gather_loss(self) -> tuple[float, int]:
        if self.accelerator.num_processes == 1:
            return self._loss_sum, self._loss_count
        sums = torch.tensor([self._loss_sum, float(self._loss_count)], dtype=torch.float64, device=self.args.device)
        total = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total[0], int(total[1])

    # -------------------------------------------------------------------------------------------- history

    def finish_epoch(self) -> bool:
        """Add the finished epoch to the history; True if it is time to evaluate."""
        total, count = self._gather_loss()
        epoch = self.state.global_step // self.steps_per_epoch
        self._seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        size = size_at(epoch - 1, self.recipe.schedule, self.recipe.data.image_size)
        self.history.append(
            {
                "epoch": epoch,
                "step": self.state.global_step,
                "image_size": size,
                "learning_rate": self.create_scheduler(0).get_last_lr()[0],
                "train_loss": total / max(1, count),
                "seconds": round(self._seconds, 1),
            }
        )
        self._loss_sum, self._loss_count = 0.0, 0
        return epoch % self.recipe.eval.every_epochs == 0 or epoch == self.recipe.schedule.epochs

    def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
        """Take the evaluation results into the history; the Trainer's own printing is not used."""
        results = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        self._check_finite(results.get("loss", 0.0), "the evaluation loss")
        if results and self.history:
            for speed in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"):
                results.pop(speed, None)
            self.history[-1].update({f"eval_{name}": float(value) for name, value in results.items()})

    def train_to_the_end(self, resume_from: Path | None) -> None:
        """Train, resuming from a complete checkpoint if one is given."""
        self._clock = time.monotonic()
        with quiet_transformers():
            self.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
        self.accelerator.wait_for_everyone()  # nobody leaves while another still talks


def leave_process_group() -> None:
    """Leave the process group of a run of many processes, if this is one. To be called before the process ends.

    A process that ends inside its group may abort (gloo's threads outlive it), and then the launcher stops the first
    one, which is still writing the model.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Hooks(TrainerCallback):  # type: ignore[misc]
    """Where the Trainer's events reach the `TaskTrainer`."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self.trainer = trainer
        self._shown = 0.0
        self._save_at_end = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.sampler.epoch = state.global_step // self.trainer.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._micro_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        trainer = self.trainer
        trainer.update_average()
        # The checkpoint of an epoch's last step waits until the epoch is in the history.
        self._save_at_end = control.should_save and state.global_step % trainer.steps_per_epoch == 0
        control.should_save = control.should_save and not self._save_at_end
        if state.is_world_process_zero and time.monotonic() - self._shown > (0.5 if sys.stderr.isatty() else 60):
            self._shown = time.monotonic()
            step = state.global_step % trainer.steps_per_epoch or trainer.steps_per_epoch
            epoch = (state.global_step - 1) // trainer.steps_per_epoch + 1
            loss = trainer._loss_sum / max(1, trainer._loss_count)
            line = (
                f"epoch {epoch}/{trainer.recipe.schedule.epochs} step {step}/{trainer.steps_per_epoch} loss {loss:.4f}"
            )
            print(
                f"\r{line}\x1b[K" if sys.stderr.isatty() else line,
                end="" if sys.stderr.isatty() else "\n",
                file=sys.stderr,
            )
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate = self.trainer.finish_epoch()
        control.should_save = control.should_save or self._save_at_end
        if not control.should_evaluate:
            self._report(state)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state)

    def _report(self, state: Any) -> None:
        if not state.is_world_process_zero or not self.trainer.history:
            return
        row = self.trainer.history[-1]
        numbers = {name: value for name, value in row.items() if name.startswith("eval_") or name == "train_loss"}
        text = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in numbers.items())
        line = f"epoch {row['epoch']}/{self.trainer.recipe.schedule.epochs}  {text}  ({row['seconds']:.0f} s)"
        print(f"\r{line}\x1b[K" if sys.stderr.isatty() else line, file=sys.stderr)
        self.trainer._on_epoch(self.trainer.history)


def _printer_of_transformers() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


# --------------------------------------------------------------------------------------------------- arguments


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Run a block without transformers' own progress bars for each file it saves or loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """What the recipe says, in the words of `TrainingArguments`. A process takes one GPU."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtra("training", "train", "accelerate") from error
    from accelerate.utils import set_seed

    set_seed(recipe.run.seed)
    optim, run = recipe.optim, recipe.run
    # Processes on a machine without accelerators find each other (gloo) only if the CPU is asked for.
    cpu = run.device == "cpu" or available_devices() == ["cpu"]
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        num_train_epochs=recipe.schedule.epochs,
        per_device_train_batch_size=1,  # set below, once the number of devices is known
        per_device_eval_batch_size=recipe.eval.batch_size,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip_grad_norm or 0.0,
        eval_strategy="no",  # _Hooks asks for it
        save_strategy="steps" if run.save_every_steps else "epoch",
        save_steps=run.save_every_steps or 500,
        save_total_limit=None,  # rotated by _save_checkpoint once the newest is complete
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=run.seed,
        bf16=run.precision == "bfloat16",
        fp16=run.precision == "float16",
        torch_compile=run.compile,
        use_cpu=cpu,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_persistent_workers=False,  # each epoch has a sampler order of its own
        dataloader_pin_memory=torch.cuda.is_available() and not cpu,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would use DataParallel, which is slow and splits the batch by itself
    devices = max(1, arguments.world_size) * max(1, arguments.n_gpu)
    per_device = min(optim.device_batch_size or optim.batch_size, optim.batch_size)
    if optim.batch_size % devices:
        raise ArgumentError(
            f"optim.batch_size {optim.batch_size} cannot be shared by {devices} devices. Use a multiple of {devices}."
        )
    share = optim.batch_size // devices
    accumulation = math.ceil(share / per_device)
    while share % accumulation:
        accumulation += 1
    arguments.per_device_train_batch_size = share // accumulation
    arguments.gradient_accumulation_steps = accumulation
    return arguments
