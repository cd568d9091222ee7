"""Train an image classifier from a recipe: ``nbhd train``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from nbhd._files import write_json, write_whole
from nbhd._text import printable
from nbhd.errors import ArgumentError, FileError, RecipeError, WrongFile
from nbhd.tasks.checkpoints import load_classifier
from nbhd.tasks.classification.evaluate import Evaluation, evaluate_images
from nbhd.tasks.classification.model_card import model_card
from nbhd.tasks.classification.predict import without_long_ends
from nbhd.tasks.datasets import ImageTable, NoSuchSplit, Rows, first_rows, open_images
from nbhd.tasks.decoded import DecodedImages, decode_all, report_failures
from nbhd.tasks.devices import resolve_device
from nbhd.tasks.recipe_sections import ModelSection, Recipe
from nbhd.tasks.runs import (
    check_same_data,
    check_same_recipe,
    data_facts,
    draw_curves,
    last_checkpoint,
    machine_facts,
    prepare_output,
    remove_cut_short,
    remove_run,
)
from nbhd.tasks.schedule import Key, size_at
from nbhd.tasks.training import TaskTrainer, quiet_transformers, training_arguments
from nbhd.tasks.transforms import (
    BatchAugment,
    normalise,
    processor_settings,
    random_crop,
    resize_for_eval,
    shrink_to,
)

CACHE_LIMIT_BYTES = 4_000_000_000
MOST_REPLACEMENTS = 32  # rows tried in place of one that cannot be decoded
IGNORED = -100  # label of an evaluation image that could not be decoded; cross_entropy's default ignore_index


def train(
    recipe: Recipe, data: str | Path, output: str | Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train a classifier and leave a finished model folder.

    ``output`` gets ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and ``README.md`` (the model
    card), which `transformers` loads as they are; ``recipe.yaml`` (resolved), ``metrics.json``, ``curves.png``; and
    ``checkpoints/`` to resume from. Under ``torchrun`` or ``accelerate launch`` all processes share each batch; such a
    process should call `nbhd.tasks.training.leave_process_group` before it ends, as ``nbhd train`` does.

    Args:
        recipe: what to train and how (`load_recipe`).
        data: parquet files, an image folder or a hub id, as `open_images` takes.
        output: folder of the run.
        resume: go on from the last complete checkpoint in ``output``, or start if there is none.
        overwrite: start anew in a folder that is not empty; its former run is removed, once the new one can begin.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ArgumentError, FileError, RecipeError, CheckpointError: bad arguments or input; each says what to do.
    """
    output = Path(output)
    arguments = training_arguments(recipe, output)
    with arguments.main_process_first(local=False, desc="output folder"):
        if arguments.process_index == 0:
            prepare_output(output, resume=resume, overwrite=overwrite)
        checkpoint = last_checkpoint(output) if resume else None
        if checkpoint is not None:
            check_same_recipe(recipe, output)
    say = _sayer(arguments.process_index == 0)
    gpus = 0 if arguments.use_cpu else torch.cuda.device_count()
    if gpus > 1 and arguments.world_size == 1:
        say(f"note: one of {gpus} GPUs is used; `torchrun --nproc-per-node {gpus} -m nbhd train ...` uses all")
    train_table, eval_table, same_images = _open(recipe, data, say)
    classes = train_table.class_names
    model = build_model(recipe, classes)
    train_data = TrainImages(train_table, recipe, say)
    eval_data = EvalImages(eval_table, recipe, say)
    augment = BatchAugment(recipe.augment, recipe.data, len(classes))
    first_plain_epoch = recipe.schedule.epochs - recipe.augment.plain_epochs

    def prepare(inputs: dict[str, Any], seed: list[int] | None, epoch: int) -> dict[str, Any]:
        pixels, labels = inputs["images"], inputs["labels"]
        if seed is None:
            return {"pixel_values": normalise(pixels, recipe.data), "labels": labels}
        pixels, targets = augment(pixels, labels, seed, plain=epoch >= first_plain_epoch)
        return {"pixel_values": pixels, "labels": targets}

    facts = machine_facts()
    remembered = data_facts(classes, train_data.table.labels)
    if checkpoint is not None:
        check_same_data(checkpoint, remembered)

    def on_epoch(history: list[dict[str, Any]]) -> None:
        _write_results(output, recipe, facts, history, None)

    trainer = TaskTrainer(
        recipe,
        arguments,
        model,
        train_data,
        eval_data,
        collate,
        prepare=prepare,
        loss=classification_loss,
        metrics=evaluation_metrics,
        on_epoch=on_epoch,
        data=remembered,
    )
    # From here on the run can begin, so the former one may go.
    if arguments.process_index == 0:
        (remove_run if overwrite else remove_cut_short)(output)
    if arguments.process_index == 0 and checkpoint is None:
        with write_whole(output / "recipe.yaml", "w") as stream:
            stream.write(recipe.to_yaml())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"training {recipe.model.variant or recipe.model.type} with {parameters:,} parameters on {len(train_data)} "
        f"images of {len(classes)} classes: {recipe.schedule.epochs} epochs of {trainer.steps_per_epoch} steps of "
        f"{recipe.optim.batch_size} images"
    )
    if resume:
        say(
            f"resuming from {checkpoint}"
            if checkpoint is not None
            else "no complete checkpoint yet: starting from the beginning"
        )
    trainer.train_to_the_end(checkpoint)
    if arguments.process_index != 0:
        return {}
    device = resolve_device("cpu" if arguments.use_cpu else None)
    with quiet_transformers():
        with trainer.averaged_weights():
            export(_bare(trainer.network), recipe, output)
        final = evaluate_images(load_classifier(output, device), eval_table, batch_size=recipe.eval.batch_size)
    result = _write_results(output, recipe, facts, trainer.history, final)
    with write_whole(output / "README.md", "w") as stream:
        stream.write(model_card(recipe, classes, parameters, final, facts, trainer.history, same_images=same_images))
    say(
        f"finished: the model saved in {output} has top-1 {final.top1:.2%}, top-5 {final.top5:.2%}, "
        f"loss {final.loss:.4f}"
    )
    return result


def _sayer(main: bool) -> Callable[[str], None]:
    return (lambda text: print(printable(text), file=sys.stderr, flush=True)) if main else (lambda text: None)


# ------------------------------------------------------------------------------------------------------------ data


def _open(recipe: Recipe, data: str | Path, say: Callable[[str], None]) -> tuple[ImageTable, ImageTable, bool]:
    """The images to train on, those to evaluate on, and whether they are the same."""
    columns = {"image_column": recipe.data.image_column, "label_column": recipe.data.label_column}
    key = "train_split"
    try:
        train_table = open_images(data, recipe.data.train_split, **columns)
        key = "eval_split"
        eval_table = open_images(data, recipe.data.eval_split, class_names=train_table.class_names, **columns)
    except NoSuchSplit as error:
        # rather one that the other key does not name
        other = recipe.data.train_split if key == "eval_split" else recipe.data.eval_split
        split = next((name for name in error.splits if name != other), error.splits[0])
        raise WrongFile(f"{error} Choose one with data.{key}, as --set data.{key}={split}.") from error
    if len(train_table.class_names) < 2:
        raise WrongFile(
            f"{train_table.where} has only the class {train_table.class_names}: there is nothing to tell apart"
        )
    absent = sorted(set(range(len(train_table.class_names))) - set(train_table.labels.tolist()))
    if absent:
        say(f"note: no training image of {', '.join(train_table.class_names[i] for i in absent[:10])}")
    same = _same_images(train_table, eval_table)
    if same:
        say(
            f"note: the images of {train_table.where} are used for training and for evaluation: the accuracy says "
            "nothing of new images"
        )
    return first_rows(train_table, recipe.data.train_limit), first_rows(eval_table, recipe.data.eval_limit), same


def _same_images(a: ImageTable, b: ImageTable) -> bool:
    """Whether two tables hold the same images, as far as their labels and a few images tell."""
    if a.where == b.where:
        return True
    if len(a) != len(b) or not np.array_equal(a.labels, b.labels):
        return False
    try:
        return all(a.image_bytes(row) == b.image_bytes(row) for row in _spread(a, 16))
    except OSError:
        return False


def _spread(table: ImageTable, count: int) -> list[int]:
    """At most ``count`` rows, evenly over the table."""
    rows: list[int] = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int).tolist()
    return rows


class TrainImages(Dataset[Any]):
    """Training images as uint8 crops of the epoch's size, indexed by ``(epoch, row)``."""

    def __init__(self, table: ImageTable, recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> None:
        self.recipe = recipe
        self.decoded: DecodedImages | None = None
        self._reported: set[int] = set()
        cache, limit = recipe.data.cache, CACHE_LIMIT_BYTES

        def shrink(image: Image.Image) -> Image.Image:
            return shrink_to(image, recipe.data.cache_size)

        if cache == "memory" or (cache == "auto" and _guess_bytes(table, shrink) <= limit):
            say(f"decoding {len(table)} training images")
            decoded, rows, failures = decode_all(table, shrink, limit=limit if cache == "auto" else None)
            if len(rows) + len(failures) < len(table):
                say(f"decoded, they take more than {limit / 1e9:g} GB: each epoch decodes them anew")
            else:
                report_failures(failures)
                self.decoded, table = decoded, Rows(table, rows)
                if not len(rows):
                    raise FileError(f"{table.where}: none of the images can be decoded")
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, row = key
        image, label = self._image(epoch, row)
        size = size_at(epoch, self.recipe.schedule, self.recipe.data.image_size)
        rng = np.random.default_rng([self.recipe.run.seed, epoch, row])
        return {"key": key, "image": random_crop(image, size, self.recipe.augment, rng), "label": label}

    def _image(self, epoch: int, row: int) -> tuple[np.ndarray | Image.Image, int]:
        """The image of a row and its label, or of another row in place of one that cannot be decoded."""
        if self.decoded is not None:
            return self.decoded[row], int(self.table.labels[row])
        others = np.random.default_rng([self.recipe.run.seed, epoch, row, 1])
        for _ in range(1 + MOST_REPLACEMENTS):
            try:
                return self.table.decode(row), int(self.table.labels[row])
            except FileError as error:
                if row not in self._reported:
                    self._reported.add(row)
                    report_failures([str(error)])
            row = int(others.integers(len(self.table)))
        raise FileError(f"{self.table.where}: {1 + MOST_REPLACEMENTS} images in a row cannot be decoded")


class EvalImages(Dataset[Any]):
    """Evaluation images as uint8, resized as the finished model's image processor does."""

    def __init__(self, table: ImageTable, recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> None:
        self.recipe = recipe
        self.decoded: DecodedImages | None = None
        if len(table) * recipe.data.image_size**2 * 3 <= CACHE_LIMIT_BYTES and recipe.data.cache != "none":
            say(f"decoding {len(table)} evaluation images")

            def shrink(image: Image.Image) -> Image.Image:
                return Image.fromarray(self._resized(image))

            self.decoded, rows, failures = decode_all(table, shrink)
            report_failures(failures)
            table = Rows(table, rows)
            if not len(rows):
                raise FileError(f"{table.where}: none of the images can be decoded")
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        label = int(self.table.labels[row])
        if self.decoded is not None:
            return {"image": self.decoded[row], "label": label}
        try:
            return {"image": self._resized(self.table.decode(row)), "label": label}
        except FileError as error:
            report_failures([str(error)])
            size = self.recipe.data.image_size
            return {"image": np.zeros((size, size, 3), np.uint8), "label": IGNORED}

    def _resized(self, image: Image.Image) -> np.ndarray:
        data = self.recipe.data
        return resize_for_eval(without_long_ends(image) if data.resize == "crop" else image, data)


def _guess_bytes(table: ImageTable, shrink: Callable[[Image.Image], Image.Image]) -> float:
    """What the table's images take in memory, judged by a few of them."""
    areas = []
    for row in _spread(table, 32):
        try:
            image = shrink(table.decode(row))
        except FileError:
            continue
        areas.append(image.width * image.height)
    return 3 * len(table) * float(np.mean(areas)) if areas else 0.0


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items."""
    batch: dict[str, Any] = {
        "images": torch.from_numpy(np.stack([item["image"] for item in items])),
        "labels": torch.tensor([item["label"] for item in items]),
    }
    if "key" in items[0]:
        batch["keys"] = [item["key"] for item in items]
    return batch


# ------------------------------------------------------------------------------------------------- model and loss


def build_model(recipe: Recipe, classes: list[str]) -> nn.Module:
    """The recipe's model with an output a class, from scratch or from finished weights.

    Raises:
        RecipeError: the settings make no model, or the weights cannot be loaded.
    """
    from nbhd.models.nat import NatConfig, NatForImageClassification

    id2label = dict(enumerate(classes))
    labels = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    settings = {key: value for key, value in _model_settings(recipe.model).items() if value is not None}
    torch.manual_seed(recipe.run.seed)
    try:
        if recipe.model.pretrained is not None:
            return _load_pretrained(recipe.model.pretrained, labels, settings)
        if recipe.model.variant is not None:
            config = NatConfig.from_variant(recipe.model.variant, **settings, **labels)
        else:
            config = NatConfig(**(settings | labels))
        return NatForImageClassification(config)
    except ArgumentError as error:
        raise RecipeError(f"model: {error}") from error


def _model_settings(section: ModelSection) -> dict[str, Any]:
    return {key: value for key, value in vars(section).items() if key not in ("type", "variant", "pretrained")}


def _load_pretrained(name: str, labels: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    """The weights of a NAT; its classifier, too, if it has the same classes, in whatever order."""
    from nbhd.models.nat import NatConfig, NatForImageClassification

    shape = [
        key for key in settings if key not in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
    ]
    if shape:
        raise RecipeError(
            f"model.pretrained fixes the shape of the model, so model.{shape[0]} cannot be set. Leave it null."
        )
    try:
        stored, _ = NatConfig.get_config_dict(name)
        kind = stored.get("model_type", "nat")
        if kind not in ("nat", "dinat"):
            raise RecipeError(f"model.pretrained {name!r} is a {kind}. Name the folder or hub id of a nat or a dinat.")
        before = NatConfig.from_dict(stored)
        model, info = NatForImageClassification.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **labels, **settings
        )
    except (RecipeError, ArgumentError):
        raise
    except Exception as error:  # transformers, safetensors and torch raise each their own kinds for a bad checkpoint
        text = " ".join(str(error).split())
        raise RecipeError(f"model.pretrained {name!r} cannot be loaded: {text}") from error
    unfit = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    body = sorted(key for key in unfit if not key.startswith("classifier."))
    if body:
        raise RecipeError(
            f"model.pretrained {name!r} does not fit its config.json: {len(body)} weights are missing or of another "
            f"shape ({', '.join(body[:3])}). Name a whole checkpoint."
        )
    old = [str(before.id2label.get(i, f"LABEL_{i}")) for i in range(before.num_labels)]
    _match_classifier(model, old, list(labels["id2label"].values()), loaded=not unfit)
    return model  # type: ignore[no-any-return]


def _match_classifier(model: Any, old: list[str], new: list[str], *, loaded: bool) -> None:
    """Put the rows of a loaded classifier in the order of the new classes, or make it new where these are others."""
    head = model.classifier
    if loaded and old == new:
        return
    if loaded and len(set(old)) == len(old) and sorted(old) == sorted(new):
        order = [old.index(name) for name in new]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(parameter[order].clone())
        return
    model.classifier = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    model._init_weights(model.classifier)


def classification_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy in float32 against class numbers ``[B]`` or distributions ``[B, classes]``."""
    return cross_entropy(outputs["logits"].float(), labels)


def top_k_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """``top1`` and ``top5`` of logits ``[N, classes]``."""
    logits, labels = np.asarray(predictions), np.asarray(labels)
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    if not len(labels):
        raise FileError("none of the evaluation images can be decoded")
    better = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
    better[np.isnan(logits).any(1)] = logits.shape[1]  # nothing is known
    return {"top1": float((better < 1).mean()), "top5": float((better < min(5, logits.shape[1])).mean())}


def evaluation_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """`top_k_metrics` and the mean cross-entropy, ``loss``: each image counts once, however the batches fell."""
    result = top_k_metrics(predictions, labels)
    logits, targets = (torch.from_numpy(np.asarray(values)) for values in (predictions, labels))
    return result | {"loss": float(cross_entropy(logits.double(), targets, ignore_index=IGNORED))}


# --------------------------------------------------------------------------------------------------------- results


def export(model: nn.Module, recipe: Recipe, output: Path) -> None:
    """Write the finished model and its image processor into ``output``, each file whole or not at all."""
    from nbhd.models.nat import NatImageProcessor

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if recipe.run.save_dtype == "float16":
        largest = max(float(value.abs().max()) for value in state.values() if value.is_floating_point())
        if not largest < torch.finfo(torch.float16).max:
            raise ArgumentError(f"run.save_dtype float16 cannot hold weights up to {largest:g}. Use float32.")
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        # config.json keeps dtype float32, so that half-precision files are still loaded and run in float32.
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        NatImageProcessor(**processor_settings(recipe.data)).save_pretrained(folder)
        # The weights last: where they are, everything is.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            with path.open("rb") as source, write_whole(output / path.name) as stream:
                shutil.copyfileobj(source, stream)


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _write_results(
    output: Path, recipe: Recipe, facts: dict[str, Any], history: list[dict[str, Any]], final: Evaluation | None
) -> dict[str, Any]:
    result = {
        "task": "classification",
        "complete": final is not None,
        "final": final.summary() if final is not None else None,
        "epochs": history,
        "machine": facts,
        "recipe": recipe.to_dict(),
    }
    write_json(output / "metrics.json", result)
    if recipe.run.plot and any("eval_top1" in row for row in history):
        draw_curves(output / "curves.png", history, "top1", recipe.data.name or "training")
    return result
