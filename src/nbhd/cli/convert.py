"""``nbhd convert``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from nbhd.cli._console import check_folder, note
from nbhd.errors import ArgumentError


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A file of the original NAT repository, or a folder with a NAT or a DiNAT of transformers.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="FOLDER", help="Where to write; must be new or empty.")],
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Class names, one a line or as JSON; default: those in the checkpoint, or LABEL_0, LABEL_1, ...",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Side of the images the model is given, all else as the checkpoint's folder says; default: as it says "
            "too, or 512 for a segmenter, or 224.",
        ),
    ] = None,
    dilations: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="A DiNAT's dilations, one list a stage, where the checkpoint does not tell them."
        ),
    ] = None,
) -> None:
    r"""Turn a checkpoint of another make into a folder for nbhd and transformers.

    Takes state dicts of the original NAT repository (.pth): classifiers, segmenters (UPerNet), and of detectors the
    backbone. The variant and all sizes are told from the weights; a DiNAT's dilations are not in them, but are known
    for the published classifiers. Nothing but weights is read from the file: a pickle that would run code is refused.
    Takes folders of transformers too; a DiNAT becomes a NAT with dilations.

    The folder holds config.json, model.safetensors and preprocessor_config.json, and appears only when all of it is
    written.

    \b
    Example:
      nbhd convert nat_tiny.pth nat-tiny --labels imagenet-classes.txt
      nbhd classify photos/ --model ./nat-tiny
      nbhd convert upernet_dinat_mini.pth upernet --dilations '[[1,16,1],[1,4,1,8],[1,2,1,3,1,4],[1,2,1,2,1]]'
    """
    if not checkpoint:
        raise ArgumentError("CHECKPOINT must name a file or a folder, got ''. The current folder is '.'.")
    check_folder("FOLDER", output)
    lists = _lists(dilations)

    import transformers

    from nbhd.models.nat.convert_nat import convert_nat

    transformers.logging.disable_progress_bar()
    try:
        done = convert_nat(checkpoint, output, labels=labels, image_size=image_size, dilations=lists)
    except ArgumentError as error:
        raise ArgumentError(_of_the_command(str(error), dilations)) from error
    size = done.variant or f"a {'NAT' if done.config.dilations is None else 'DiNAT'} of no published size"
    classes = "" if done.model in ("NatModel", "NatBackbone") else f", {done.classes} classes"
    note(f"{done.model}: {size}, {done.parameters:,} parameters{classes}")
    if done.config.dilations is None:
        note("without dilations; if it is a DiNAT, give them with --dilations")
    if done.left_out:
        note(f"left out, because transformers has no such head: {', '.join(done.left_out)}")
    if done.config.num_channels != 3:
        note(
            f"num_channels is {done.config.num_channels}: images are not made RGB; see that image_mean and "
            "image_std in preprocessor_config.json are those it was trained with"
        )
    typer.echo(output)


#: What the command calls the arguments of `convert_nat`.
_CALLED = {"output": "FOLDER", "labels": "--labels", "image_size": "--image-size"}


def _of_the_command(message: str, dilations: str | None) -> str:
    """What is wrong with an argument, with the command's name for it."""
    name, _, rest = message.partition(" ")
    if name == "dilations":
        return f"--dilations {dilations}: {message}"
    return f"{_CALLED.get(name, name)} {rest}"


def _lists(dilations: str | None) -> Any:
    try:
        return None if dilations is None else json.loads(dilations)
    except ValueError as error:
        raise ArgumentError(
            f"--dilations must be JSON, one list for each stage such as '[[1, 8], [1, 4]]', got {dilations!r}."
        ) from error
