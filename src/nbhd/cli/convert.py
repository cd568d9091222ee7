"""``nbhd convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from nbhd.cli._console import note


def convert(
    checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint of the original NAT repository.")],
    output: Annotated[str, typer.Argument(metavar="FOLDER", help="Where to write; must be new or empty.")],
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Class names, one a line or as JSON; without it they are called LABEL_0, LABEL_1, ..."
        ),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, metavar="PIXELS", help="Side of the images the model is given.")
    ] = 224,
) -> None:
    r"""Turn a checkpoint of the original NAT repository (.pth) into a folder for nbhd and transformers.

    The variant and all sizes are told from the weights. Nothing but weights is read from the file: a pickle that would
    run code is refused. The folder holds config.json, model.safetensors and preprocessor_config.json, and appears only
    when all of it is written.

    \b
    Example:
      nbhd convert nat_tiny.pth nat-tiny --labels imagenet-classes.txt
      nbhd classify photos/ --model ./nat-tiny
    """
    import transformers

    from nbhd.models.nat.convert_nat import convert_nat

    transformers.logging.disable_progress_bar()
    done = convert_nat(checkpoint, output, labels=labels, image_size=image_size)
    note(
        f"{done.variant or 'a NAT of no published size'}, {done.parameters:,} parameters, "
        f"{done.config.num_labels} classes"
    )
    typer.echo(output)
