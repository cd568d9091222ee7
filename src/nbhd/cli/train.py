"""``nbhd train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbhd.cli._console import check_folder, warn_of_instruction_set
from nbhd.cli._errors import end_at_once
from nbhd.cli._threads import let_others_run
from nbhd.errors import ArgumentError


def train(
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", metavar="NAME|FILE", help="The recipe; with --resume by default that of the run."
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option("--data", "-d", metavar="FOLDER|FILE|HUB_ID", help="Parquet files, an image folder, or a hub id."),
    ] = ...,  # type: ignore[assignment]
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="Where the run goes.")] = ...,  # type: ignore[assignment]
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint, if any.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that is not empty.")] = False,
) -> None:
    r"""Train an image classifier from a recipe.

    The output folder gets a model that transformers loads as it is, its model card, the resolved recipe (recipe.yaml),
    the results (metrics.json, curves.png) and the checkpoints of the run. A run that was killed goes on with --resume
    and ends with the same weights as one that was not.

    Data: a folder of train.parquet and validation.parquet (or train-00000-of-00004.parquet and so on), a folder of
    train/CLASS/*.jpg and validation/CLASS/*.jpg, or the id of a data set on the Hugging Face hub. Pictures that cannot
    be decoded are named on standard error and left out.

    \b
    Examples:
      nbhd train --config imagenette128_nat --data imagenette128/ --output runs/1
      nbhd train --config my.yaml --set optim.lr=0.0005 --data photos/ --output runs/2
      nbhd train --resume --data imagenette128/ --output runs/1
      torchrun --nproc-per-node 8 -m nbhd train --config imagenet1k_nat_tiny --data imagenet-1k/ --output runs/3
    """
    if resume and overwrite:
        raise ArgumentError("--resume goes on with a run and --overwrite starts it anew. Give one of them.")
    check_folder("--output", output)
    let_others_run()
    from nbhd.tasks.recipes import load_recipe

    if config is None:
        config = str(Path(output) / "recipe.yaml")
        if not resume or not Path(config).is_file():
            raise ArgumentError("--config is missing. `nbhd recipes` lists the recipes.")
    recipe = load_recipe(config, set_ or ())

    from nbhd.tasks.classification.train import train as train_classifier
    from nbhd.tasks.datasets import check_source, is_missing
    from nbhd.tasks.training import leave_process_group

    # An exception could be lost in the fork of a data loader or wait for other processes; --resume goes on anyway.
    end_at_once()
    try:
        check_source(data)
        if is_missing(data):
            raise ArgumentError(f"--data {data}: no such file or folder. Name a parquet file, a folder or a hub id.")
        warn_of_instruction_set()
        train_classifier(recipe, data, output, resume=resume, overwrite=overwrite)
    finally:
        leave_process_group()
