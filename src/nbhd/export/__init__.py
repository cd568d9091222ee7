"""Models out of Python: ONNX, ``torch.export`` and ahead-of-time compiled packages.

    from nbhd.export import export
    export(model, "nat.onnx", processor=processor)       # any batch, height and width
    export(model, "nat.pt2", to="torch-export")

Labels and preprocessing travel inside the file: `open_exported` gives it back as something to call, and
``nbhd classify --model FILE`` uses it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from operator import index
from typing import Any, Literal

import numpy as np

from nbhd._files import write_whole
from nbhd._sizes import check_pixels
from nbhd.errors import ArgumentError
from nbhd.export.runtime import ExportedModel, open_exported
from nbhd.export.subject import Facts

__all__ = ["ExportedModel", "Facts", "export", "open_exported"]


def export(
    model: Any,
    path: str | os.PathLike[str],
    to: Literal["onnx", "torch-export", "aoti"] = "onnx",
    *,
    processor: Any = None,
    size: int | tuple[int, int] | None = None,
    standalone: bool = False,
    int8: bool = False,
    calibration: Iterable[np.ndarray] | None = None,
) -> Facts:
    """Write a model to one file, whole or not at all.

    Args:
        model: `NatForImageClassification`, `NatModel`, `NatBackbone`, or another image model of transformers; in
            float32 on the CPU. It is put into evaluation mode.
        path: the file.
        to: ``"onnx"``, in standard operators; ``"torch-export"``, for ``torch.export.load``; ``"aoti"``, compiled for
            this machine, for ``torch._inductor.aoti_load_package``.
        processor: the image processor, whose settings travel in the file.
        size: the one (height, width) in pixels that the file takes, or a square's side; None for any. The batch is
            always free, from 1. A compiled package takes one size: None is then what the processor gives (PyTorch 2.13
            cannot compile the convolutions of a map whose sides are open).
        standalone: for ``"torch-export"`` and ``"aoti"``: write attention out in PyTorch's own operations, so that
            nothing has to be imported to run the file. Otherwise it calls nbhd's operator, which is faster and needs
            ``import nbhd`` first. ONNX files are always standalone.
        int8: quantise the weights for CPUs; ONNX only.
        calibration: with ``int8``, example ``pixel_values`` arrays ``[batch, channels, height, width]`` for static
            quantisation; None for dynamic.

    Returns:
        What travels in the file.

    Raises:
        ArgumentError: arguments that do not go together, or a model that cannot be traced.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        BackendError: no C++ compiler for ``"aoti"``.
        FileError: the file cannot be written.
    """
    import torch

    from nbhd.export import formats
    from nbhd.export.subject import Outputs, facts_of

    if to not in formats.FORMATS:
        raise ArgumentError(f"to must be one of {', '.join(formats.FORMATS)}, got {to!r}.")
    if int8 and to != "onnx":
        raise ArgumentError(f"int8 is for ONNX files, got to={to!r}. Use to='onnx'.")
    if calibration is not None and not int8:
        raise ArgumentError("calibration is for int8 files, got int8=False. Use int8=True.")
    fixed = None if size is None else _pair(size)
    if standalone and to == "onnx":
        standalone = False
    weights = list(model.parameters())
    if any(w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
        raise ArgumentError(
            f"the model must be float32 on the CPU, got {weights[0].dtype} on {weights[0].device}. "
            "Use model.float().cpu()."
        )
    if to == "aoti" and fixed is None:
        given = facts_of(model, processor).image_size
        if given is None:
            raise ArgumentError("to='aoti' compiles for one image size, which the processor does not say. Give size.")
        fixed = (given[0], given[1])
    facts = facts_of(model, processor, fixed)
    kind = ("dynamic" if calibration is None else "static") if int8 else None
    facts = dataclasses.replace(facts, needs_nbhd=to != "onnx" and not standalone, int8=kind)
    subject = Outputs(model, facts.task).eval()
    if to == "onnx":
        written = formats.to_onnx(subject, facts)
        if int8:
            from nbhd.export.quantize import quantize

            written = quantize(written, facts, calibration)
        content = written.SerializeToString()
    else:
        content = formats.to_torch_export(subject, facts) if to == "torch-export" else formats.to_aoti(subject, facts)
    with write_whole(path) as stream:
        stream.write(content)
    return facts


def _pair(size: Any) -> tuple[int, int]:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = (index(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1 or any(isinstance(side, bool) for side in sides):
        raise ArgumentError(f"size must be pixels, as 224 or (224, 320) (height, width), got {size!r}.")
    check_pixels("size", size, height, width)
    return height, width
