"""What of a model is exported: pixels in, named tensors out, and what has to be known to use them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbhd._version import __version__
from nbhd.errors import ArgumentError

INPUT = "pixel_values"

#: The number of the layout of `Facts`, for readers of later versions.
FORMAT = 1

#: The outputs of a model without a head, those that it has.
FEATURES = ("last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Facts:
    """What travels inside an exported file, as JSON.

    Attributes:
        task: ``"image-classification"``, ``"backbone"`` or ``"image-feature-extraction"``.
        outputs: names of the outputs, in their order.
        labels: of a classifier, in the order of its logits.
        multi_label: one label does not exclude another: probabilities are sigmoids instead of a softmax. So is a single
            label's, unless the model is for regression.
        preprocessing: the image processor's settings, as in ``preprocessor_config.json``; None if there was none.
        image_size: height and width in pixels of what the preprocessing gives; None where that depends on the image.
        fixed_size: the one height and width the file takes; None for any.
        channels: of the images.
        needs_nbhd: whether the file runs only after ``import nbhd``.
        int8: ``"dynamic"`` or ``"static"`` for a quantised file.
    """

    task: str
    outputs: list[str]
    labels: list[str] = field(default_factory=list)
    multi_label: bool = False
    preprocessing: dict[str, Any] | None = None
    image_size: list[int] | None = None
    fixed_size: list[int] | None = None
    channels: int = 3
    needs_nbhd: bool = False
    int8: str | None = None
    nbhd: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Facts:
        """The facts of a file.

        Raises:
            ArgumentError: it is not such JSON, or that of a later version.
        """
        try:
            found = json.loads(text)
            if found["format"] > FORMAT:
                raise ArgumentError(
                    f"the file was written by nbhd {found.get('nbhd')} in format {found['format']}, this version reads"
                    f" up to {FORMAT}. Update nbhd."
                )
            return cls(**found)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(f"the facts in the file are damaged ({type(error).__name__}: {error})") from error


class Outputs(nn.Module):
    """A model as a function from ``pixel_values`` to a tensor or a tuple of them."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits, the feature maps, or the last hidden state and, of a model that has it, its mean."""
        found = self.model(pixel_values, return_dict=True)
        if self.task == "image-classification":
            logits: Tensor = found.logits
            return logits
        if self.task == "backbone":
            return tuple(found.feature_maps)
        return tuple(found[name] for name in FEATURES if found.get(name) is not None)


def facts_of(model: Any, processor: Any = None, fixed_size: tuple[int, int] | None = None) -> Facts:
    """What is to be known of a model of transformers and its image processor.

    Raises:
        ArgumentError: the model is neither a classifier nor a backbone and has no ``last_hidden_state``.
    """
    config = model.config
    if hasattr(model, "classifier") or type(model).__name__.endswith("ForImageClassification"):
        task, outputs = "image-classification", ["logits"]
    elif hasattr(config, "out_features") and type(model).__name__.endswith("Backbone"):
        task, outputs = "backbone", list(config.out_features)
    else:
        task, outputs = "image-feature-extraction", _features(model, fixed_size)
    classifies = task == "image-classification"
    return Facts(
        task=task,
        outputs=outputs,
        labels=[str(config.id2label.get(i, i)) for i in range(config.num_labels)] if classifies else [],
        multi_label=classifies and is_multi_label(config),
        preprocessing=None if processor is None else json.loads(processor.to_json_string()),
        image_size=_image_size(processor),
        fixed_size=None if fixed_size is None else list(fixed_size),
        channels=getattr(config, "num_channels", 3),
    )


def is_multi_label(config: Any) -> bool:
    """Whether one label of a classifier does not exclude another. So it is of a single one, unless it is a quantity."""
    single = config.num_labels == 1 and config.problem_type != "regression"
    return bool(single or config.problem_type == "multi_label_classification")


def _features(model: Any, size: tuple[int, int] | None) -> list[str]:
    """The names of what a model without a head returns, told by a run."""
    own = getattr(model.config, "image_size", None) or 224
    height, width = size or (own if isinstance(own, (list, tuple)) else (own, own))
    model.eval()
    pixels = torch.zeros(1, getattr(model.config, "num_channels", 3), height, width, dtype=_dtype(model))
    try:
        with torch.no_grad():
            found = model.forward(pixels, return_dict=True)  # not compiled, though it may be to be
        names = [name for name in FEATURES if found.get(name) is not None]
    except Exception as error:  # a model raises whatever it likes
        raise ArgumentError(
            f"this {type(model).__name__} does not take images of {height} x {width}. Give a size that it takes. "
            f"It says: {_first_line(error)}"
        ) from error
    if names[:1] != ["last_hidden_state"]:
        raise ArgumentError(
            f"model must be a classifier, a backbone, or return a last_hidden_state, got a {type(model).__name__} that "
            f"returns {', '.join(found)}. Export the backbone inside it."
        )
    return names


def _image_size(processor: Any) -> list[int] | None:
    """Height and width of what an image processor gives."""
    names = []
    if getattr(processor, "do_resize", False):
        names.append("size")
    if getattr(processor, "do_center_crop", False):
        names.insert(0, "crop_size")
    for name in names:
        size = getattr(processor, name, None) or {}
        if "height" in size and "width" in size:
            return [int(size["height"]), int(size["width"])]
    return None


@torch.no_grad()
def trace(subject: Outputs, facts: Facts) -> torch.export.ExportedProgram:
    """The model as a program of ``torch.export`` that calls nbhd's operators.

    It takes any batch and, unless ``facts.fixed_size`` names one, any height and width.

    Raises:
        ArgumentError: the model cannot be traced with sizes that change.
    """
    from torch.export import Dim
    from torch.fx.experimental import _config

    symbolic: Any = _config
    # Sizes that no axis of a deeper map becomes 1 for, so that none is taken for a constant.
    height, width = facts.fixed_size or (448, 416)
    pixels = torch.zeros(2, facts.channels, height, width, dtype=_dtype(subject), device="cpu")
    dynamic = {0: Dim.AUTO} if facts.fixed_size else {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    try:
        with symbolic.patch(backed_size_oblivious=True):  # a size of 1 is no case of its own
            program = torch.export.export(subject.eval(), (pixels,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # torch raises many kinds, each with pages of advice for developers
        raise ArgumentError(
            f"this {type(subject.model).__name__} cannot be traced for "
            + ("any batch size" if facts.fixed_size else "images of any size. Give one size (--size 224)")
            + f". torch.export says: {_first_line(error)}"
        ) from error
    _open(program, pixels.shape)
    return program


def _open(program: torch.export.ExportedProgram, traced: torch.Size) -> None:
    """Let sizes of 1 pass.

    While tracing, PyTorch asks whether a side is larger than 1 to choose memory formats of convolutions, and the
    program then refuses smaller ones. Nothing computed depends on it: the tests run such sizes.
    """
    from torch.utils._sympy.value_ranges import ValueRanges

    if hasattr(program, "_guards_code"):
        program._guards_code = []
    for symbol, limits in list(program.range_constraints.items()):
        program.range_constraints[symbol] = ValueRanges(1, limits.upper)  # type: ignore[arg-type]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
