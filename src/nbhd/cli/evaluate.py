"""``nbhd evaluate``."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nbhd._text import pad, printable, width
from nbhd.cli._console import check_output, choose_format, note, same_file, track, warn_of_instruction_set
from nbhd.cli._errors import SOME_INPUTS_FAILED
from nbhd.cli._threads import let_others_run
from nbhd.errors import ArgumentError

if TYPE_CHECKING:
    from nbhd.tasks.classification.evaluate import Evaluation
    from nbhd.tasks.datasets import ImageTable


class Format(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


def evaluate(
    data: Annotated[
        str,
        typer.Option("--data", "-d", metavar="FOLDER|FILE|HUB_ID", help="Parquet files, an image folder, or a hub id."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="FOLDER|FILE|HUB_ID", help="The model; by default the one that comes with nbhd."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data, where it has splits.")] = "validation",
    image_column: Annotated[str, typer.Option(metavar="NAME", help="Column of pictures.")] = "image",
    label_column: Annotated[str, typer.Option(metavar="NAME", help="Column of class numbers or names.")] = "label",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only so many pictures, the same ones each time.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at once.")] = 64,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, ...; by default the best one here.")
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="By default what the ending of --output says, or table.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the results here, whole or not at all.")
    ] = None,
) -> None:
    r"""Measure an image classifier on labelled pictures.

    Gives top-1 and top-5 accuracy, the cross-entropy in nats, and for each class the accuracy, the precision and what
    it is most often taken for; as JSON the confusion matrix too. The pictures go through the model's own image
    processor. One that cannot be decoded, or for which the model's answer is not a number, is named on standard error
    and left out, and the exit status is then 1.

    \b
    Examples:
      nbhd evaluate --data imagenette128/
      nbhd evaluate --model runs/1 --data photos/ --split test --format json > results.json
    """
    if output == "-":
        output = None
    if output is not None:
        check_output(output)
    as_json = choose_format(format, output, Format) is Format.json
    if output is not None and any(same_file(output, name) for name in (data, model) if name is not None):
        raise ArgumentError(f"--output {output}: this is one of the inputs and would be lost. Name another file.")

    let_others_run()
    from transformers.utils import logging as transformers_logging

    from nbhd._files import write_whole
    from nbhd.errors import WrongFile
    from nbhd.tasks.checkpoints import device_for, load_classifier, prepare_for_many
    from nbhd.tasks.classification.evaluate import check_measurable, evaluate_images, open_for_model
    from nbhd.tasks.datasets import NoSuchSplit, check_source, first_rows, is_missing

    check_source(data)
    if is_missing(data):
        raise ArgumentError(f"--data {data}: no such file or folder. Name a parquet file, a folder or a hub id.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warn_of_instruction_set()
    loaded = load_classifier(model, device_for(model, device))
    check_measurable(loaded)
    try:
        table = open_for_model(loaded, data, split, image_column=image_column, label_column=label_column)
    except NoSuchSplit as error:
        raise WrongFile(f"{error} Name one of them with --split.") from error
    _check_columns(table, data, {"--image-column": image_column, "--label-column": label_column})
    prepare_for_many(loaded)
    result = evaluate_images(
        loaded,
        first_rows(table, limit),
        batch_size=batch_size,
        track=lambda batches, count: track(batches, count, "evaluating"),
    )
    for failure in result.failures:
        note(f"skipped: {failure}")
    if as_json:
        text = json.dumps(result.summary(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        text = _table(result)
    if output is None:
        sys.stdout.write(text)
    else:
        with write_whole(output, "w") as stream:
            stream.write(text)
    if result.failures:
        raise typer.Exit(SOME_INPUTS_FAILED)


def _check_columns(table: ImageTable, data: str, columns: dict[str, str]) -> None:
    """Refuse a column that was named of data without columns."""
    for option, column in columns.items():
        if not table.has_columns and column != option.removeprefix("--").removesuffix("-column"):
            raise ArgumentError(
                f"{option} {column}: {data} is a folder of pictures, which has no columns: its folders are the labels. "
                "Leave it out."
            )


def _table(result: Evaluation) -> str:
    """The figures, one line a class with what it is most often taken for."""
    lines = [
        f"{result.images} images of {len(result.per_class)} classes in {result.seconds:.1f} s",
        f"top-1 {result.top1:.2%}   top-5 {result.top5:.2%}   cross-entropy {result.loss:.4f}",
        "",
    ]
    header = ("class", "images", "accuracy", "precision", "most often taken for")
    rows = [header]
    for row in result.per_class:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        mistaken = f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken"] else "-"
        rows.append(
            (printable(row["class"]), str(row["images"]), f"{row['accuracy']:.1%}", precision, printable(mistaken))
        )
    first = max(width(row[0]) for row in rows)
    for name, images, accuracy, precision, mistaken in rows:
        lines.append(f"{pad(name, first)}  {images:>7}  {accuracy:>8}  {precision:>9}  {mistaken}")
    return "\n".join(lines) + "\n"
