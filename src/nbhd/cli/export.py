"""``nbhd export``."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbhd._sizes import check_pixels
from nbhd.cli._console import check_output, note, track, warn_of_instruction_set
from nbhd.cli._errors import SOME_INPUTS_FAILED
from nbhd.errors import ArgumentError, BackendError, CheckpointError

if TYPE_CHECKING:
    from nbhd.tasks.inputs import Input

#: Pictures looked at to find the ranges of activations.
CALIBRATION_PICTURES = 256

#: Largest difference to the model that a floating-point file may have, as a share of its largest output.
TOLERANCE = 1e-4

#: The same of an int8 file, on pictures it was calibrated with: a usual one has a few hundredths.
TOLERANCE_INT8 = 0.3

#: Fewer pictures than this may well leave out ranges that others reach.
FEW_PICTURES = 16

#: Contrast that some picture must have, as a share of black to white.
LEAST_CONTRAST = 0.1

#: Of the pictures calibrated with, how many an int8 file is compared with the model on.
COMPARED_PICTURES = 8


class Target(StrEnum):
    """The format."""

    onnx = "onnx"
    torch_export = "torch-export"
    aoti = "aoti"


class Part(StrEnum):
    """What of the model is exported."""

    classifier = "classifier"
    backbone = "backbone"
    features = "features"


def export(
    to: Annotated[Target, typer.Option(help="ONNX, a program for torch.export.load, or compiled for this machine.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Written whole or not at all; ends in .onnx or .pt2.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(metavar="[FOLDER|HUB_ID]", help="The model; by default the one that comes with nbhd."),
    ] = None,
    part: Annotated[
        Part | None, typer.Option("--part", help="What its outputs are; by default what the checkpoint was saved as.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Of a backbone: its maps, such as stage1,stage2,stage3,stage4.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="The one image size the file takes; by default it takes any.")
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="A .pt2 that runs without nbhd, in PyTorch's own operations.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="ONNX with 8-bit weights, for CPUs.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="With --int8: pictures to fix the ranges of activations with (static)."),
    ] = None,
) -> None:
    r"""Write a model for use outside of Python, or without transformers.

    The file takes any batch, height and width, unless --size names one size. Labels and preprocessing travel inside it,
    so that nbhd classify and nbhd evaluate take it as a model. Before it is put in place it is run, at sizes it has not
    been traced with or on pictures it was calibrated with, and compared with the model. ONNX files are in standard
    operators only.

    \b
    Examples:
      nbhd export --to onnx -o nat.onnx
      nbhd export --to onnx -o nat-int8.onnx --int8 --calibrate photos/
      nbhd export ./my-nat --to torch-export -o nat.pt2 --part backbone --stages stage1,stage2,stage3,stage4
      nbhd export ./my-nat --to aoti -o nat.pt2 --size 224 --standalone
    """
    fixed = _size(size)
    _check(to, output, stages, part, standalone, int8, calibrate)

    import torch

    from nbhd._files import write_whole
    from nbhd.cli.classify import _quieten
    from nbhd.export import export as write, open_exported
    from nbhd.export.check import largest_difference

    _quieten()
    warn_of_instruction_set()
    network, processor = _load(model, part, stages)
    examples = None if calibrate is None else _Examples(calibrate, processor)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.onnx" if to is Target.onnx else "model.pt2")
        facts = write(
            network, path, to.value, processor=processor, size=fixed, standalone=standalone, int8=int8,
            calibration=examples,
        )  # fmt: skip
        with torch.inference_mode():
            compared = () if examples is None else (examples.compared(),)
            difference = largest_difference(network, open_exported(path), facts, *compared)
        _check_difference(difference, int8, calibrate)
        with write_whole(output) as stream:
            stream.write(path.read_bytes())
    sizes = "x".join(map(str, fixed)) if fixed else "any size"
    on = "" if examples is None else " on the calibration pictures"
    note(f"{facts.task}, {sizes}, outputs {', '.join(facts.outputs)}; differs from PyTorch by {difference:.1e}{on}")
    if examples is not None and examples.read < FEW_PICTURES:
        note(
            f"pictures calibrated with: {examples.read}. With so few it may be further off on others; take some dozens"
        )
    if facts.needs_nbhd:
        note("it calls nbhd's operator: `import nbhd` before it runs, or export it with --standalone")
    typer.echo(output)
    if examples is not None and examples.failed:
        raise typer.Exit(SOME_INPUTS_FAILED)


def _check_difference(difference: float, int8: bool, calibrate: str | None) -> None:
    if difference <= (TOLERANCE_INT8 if int8 else TOLERANCE):  # which NaN is not
        return
    found = f"the file's outputs differ from the model's by {difference:.1e} of the largest"
    if not int8:
        raise BackendError(f"{found}: it was not written. Please report it.")
    if calibrate is None:
        raise BackendError(
            f"{found}, more than {TOLERANCE_INT8}: it was not written. Give pictures with --calibrate, or leave out "
            "--int8."
        )
    raise ArgumentError(
        f"--calibrate {calibrate}: {found} even on these pictures, more than {TOLERANCE_INT8}: they do not suit, and "
        "it was not written. Name a folder with some dozens of the pictures that the model is for, or leave out "
        "--calibrate."
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"0*([1-9]\d*)(?:x0*([1-9]\d*))?", text)
    if found is None:
        raise ArgumentError(f"--size must be pixels, as 224 or 224x320 (height x width), got {text!r}.")
    # of numbers too long to be read the first digits are too many
    height, width = (int(side[:20]) for side in (found[1], found[2] or found[1]))
    check_pixels("--size", text, height, width)
    return height, width


def _check(
    to: Target, output: str, stages: str | None, part: Part | None, standalone: bool, int8: bool, calibrate: str | None
) -> None:
    """Refuse options that do not go together and outputs that cannot be written, before any work is done."""
    check_output(output)
    ending = ".onnx" if to is Target.onnx else ".pt2"
    if Path(output).suffix != ending:
        raise ArgumentError(f"--output {output}: a file of --to {to} ends in {ending}.")
    if int8 and to is not Target.onnx:
        raise ArgumentError(f"--int8 is for --to onnx, got --to {to}.")
    if calibrate is not None and not int8:
        raise ArgumentError("--calibrate goes with --int8. Add it.")
    if standalone and to is Target.onnx:
        raise ArgumentError("--standalone is for .pt2 files: an ONNX file needs nothing of nbhd anyway. Leave it out.")
    if stages is not None and part not in (None, Part.backbone):
        raise ArgumentError(f"--stages goes with --part backbone, got --part {part}.")


def _load(model: str | None, part: Part | None, stages: str | None) -> tuple[Any, Any]:
    """The network in float32, and its image processor."""
    import torch

    from nbhd.tasks.checkpoints import check_config, is_exported, load_classifier, load_processor, model_folder

    if is_exported(model):
        raise CheckpointError(f"{model} is an exported file already. Name the folder of the model it was made from.")
    if part is None and stages is not None:
        part = Part.backbone
    if part is Part.classifier:
        loaded = load_classifier(model, torch.device("cpu"))
        return loaded.model, loaded.processor

    import transformers

    from nbhd.models import NatBackbone, NatModel

    folder = model_folder(model)
    named = "the default checkpoint" if model is None else model
    check_config(folder, str(named))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{named} is not a model: {' '.join(str(error).split())[:300]}") from error
    saved_as = next(iter(config.architectures or []), "")
    if part is None and not saved_as.endswith(("Backbone", "NatModel", "DinatModel")):
        return _load(model, Part.classifier, None)
    if config.model_type not in ("nat", "dinat"):
        raise CheckpointError(f"--part {part} is for NAT models, {named} is a {config.model_type}.")
    chosen = None if stages is None else _stages(stages, config.stage_names)
    is_backbone = saved_as.endswith("Backbone")
    others = [stage for stage in config.stage_names if not is_backbone or stage not in config.out_features]
    # Norms that the folder's own kind has no place for; they start as ones and zeros.
    absent = (*(f"hidden_states_norms.{stage}." for stage in others), *(["layernorm."] if is_backbone else []))
    if part is Part.backbone or (part is None and is_backbone):
        options = {} if chosen is None else {"out_features": chosen}
        network = _from_pretrained(NatBackbone, folder, named, absent, **options)
    else:
        network = _from_pretrained(NatModel, folder, named, absent)
    return network, load_processor(folder, str(named))


def _stages(text: str, known: list[str]) -> list[str]:
    """The stages named, in the order of the model's."""
    named = [name.strip() for name in text.split(",")]
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ArgumentError(
            f"--stages must be of {', '.join(known)}, with commas between them, got {text!r}: there is no "
            f"{unknown[0]!r}."
        )
    return [name for name in known if name in named]


def _from_pretrained(kind: Any, folder: Path, named: object, absent: tuple[str, ...], **options: Any) -> Any:
    """The network, none of whose weights is missing but those that start with one of ``absent``."""
    import torch

    from nbhd.tasks.checkpoints import reason

    try:
        network, info = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and torch raise each their own kinds for a bad checkpoint
        raise CheckpointError(f"cannot load {named}: {reason(error, folder)}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(absent))
    if missing:
        raise CheckpointError(
            f"{named} lacks {len(missing)} of the weights of a {kind.__name__} ({', '.join(missing[:3])}): its outputs "
            "would be random. Name a folder with all of them."
        )
    return network.eval()


class _Examples:
    """The pictures of a folder as the model sees them, one at a time. What cannot be read is named and left out."""

    def __init__(self, folder: str, processor: Any) -> None:
        from nbhd.tasks.inputs import find_inputs

        self._processor = processor
        self._inputs: list[Input] = []
        self.failed = 0
        for item in find_inputs([folder]):
            if item.error is not None:
                raise ArgumentError(f"--calibrate {item.path or repr('')}: {item.error}.")
            self._inputs.append(item)
        step = max(1, len(self._inputs) // CALIBRATION_PICTURES)  # spread over the folder
        self._inputs = self._inputs[::step][:CALIBRATION_PICTURES]
        self._kept: list[Any] = []
        self.read = 0

    def compared(self) -> list[Any]:
        """Some of the pictures that there were, as tensors."""
        import torch

        return [torch.from_numpy(pixels) for pixels in self._kept]

    def __iter__(self) -> Iterator[Any]:
        import numpy as np
        import PIL.Image

        from nbhd.tasks.images import ImageError, decode_image

        contrast, every = 0.0, -(-len(self._inputs) // COMPARED_PICTURES)
        for item in track(self._inputs, len(self._inputs), "calibrating"):
            try:
                image = decode_image(item.path)
            except ImageError as error:
                self.failed += 1
                note(f"{item.path}: {error.reason}")
                continue
            pixels = self._pixels(image)
            if self.read % every == 0:
                self._kept.append(pixels)
            self.read += 1
            contrast = max(contrast, float(np.ptp(pixels, (2, 3)).max()))
            yield pixels
        if not self.read:
            raise ArgumentError("--calibrate: no picture in the folder can be read.")
        black, white = (self._pixels(PIL.Image.new("RGB", (64, 64), (value,) * 3)) for value in (0, 255))
        if contrast < LEAST_CONTRAST * np.abs(white - black).max():
            raise ArgumentError(
                "--calibrate: the pictures in the folder are each of hardly more than one colour, which tells no "
                "ranges. Name a folder with some dozens of the pictures that the model is for."
            )

    def _pixels(self, image: Any) -> Any:
        return self._processor(images=image, return_tensors="np")["pixel_values"]
