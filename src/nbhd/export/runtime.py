"""Exported files run: each behaves as the model it was made from, for classification and evaluation."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbhd.errors import ArgumentError, CheckpointError, MissingExtra
from nbhd.export.formats import FACTS
from nbhd.export.subject import INPUT, Facts

Run = Callable[[Tensor], list[Tensor]]


class ExportedModel:
    """An exported file, called as the model was.

    Attributes:
        kind: ``"onnx"``, ``"torch-export"`` or ``"aoti"``.
        facts: labels, preprocessing and sizes, from inside the file.
        config: ``num_labels``, ``id2label`` and ``problem_type``, as a configuration of transformers has them.
        device, dtype: of the input; always the CPU and float32.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, kind: str, facts: Facts, run: Run) -> None:
        self.kind = kind
        self.facts = facts
        self._run = run
        # A single label that is no label among many is a number.
        single = "regression" if len(facts.labels) == 1 else None
        self.config = SimpleNamespace(
            num_labels=len(facts.labels),
            id2label=dict(enumerate(facts.labels)),
            problem_type="multi_label_classification" if facts.multi_label else single,
        )

    def __call__(self, pixel_values: Tensor) -> SimpleNamespace:
        """The outputs by name (``.logits``), for ``[batch, channels, height, width]``.

        Raises:
            ArgumentError: the file was made for images of one size, and these have another.
        """
        fixed = self.facts.fixed_size
        if fixed is not None and list(pixel_values.shape[2:]) != fixed:
            raise ArgumentError(
                f"this file takes images of {fixed[0]} x {fixed[1]}, got {tuple(pixel_values.shape[2:])}. "
                "Export it again without --size for any size."
            )
        outputs = self._run(pixel_values.to(self.device, self.dtype))
        return SimpleNamespace(**dict(zip(self.facts.outputs, outputs, strict=True)))

    def processor(self) -> Any:
        """The image processor that travelled in the file; NAT's default if there was none."""
        from nbhd.models._transformers import AutoImageProcessor
        from nbhd.models.nat import NatImageProcessor

        if self.facts.preprocessing is None:
            return NatImageProcessor()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.facts.preprocessing), "utf-8")
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def open_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Load a file that ``nbhd export`` wrote; what kind it is is told by its bytes.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
        MissingExtra: an ONNX file without onnxruntime installed.
    """
    path = Path(path)
    try:
        if not zipfile.is_zipfile(path):
            if path.suffix == ".pt2":
                raise CheckpointError(
                    f"{path} is damaged or cut short, or was not written by `nbhd export`: a .pt2 is a zip archive, "
                    "this is none. Export it again."
                )
            return _open_onnx(path)
        with zipfile.ZipFile(path) as archive:
            is_compiled = any("aotinductor" in name for name in archive.namelist())
        return _open_aoti(path) if is_compiled else _open_program(path)
    except (CheckpointError, MissingExtra):
        raise
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # onnxruntime and torch raise kinds of their own for damaged files
        raise CheckpointError(f"{path} cannot be loaded as an exported model: {_first_line(error)}") from error


def _open_onnx(path: Path) -> ExportedModel:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("running ONNX files", "export", "onnxruntime") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path} is not an exported model: {_first_line(error)}") from error
    facts = _facts(path, session.get_modelmeta().custom_metadata_map.get(FACTS))

    def run(pixel_values: Tensor) -> list[Tensor]:
        pixels = np.ascontiguousarray(pixel_values.numpy())
        return [torch.from_numpy(output) for output in session.run(facts.outputs, {INPUT: pixels})]

    return ExportedModel("onnx", facts, run)


def _open_program(path: Path) -> ExportedModel:
    import nbhd.ops  # noqa: F401  (the program may call them; the command line has not imported them yet)

    extra = {FACTS: ""}
    program = torch.export.load(str(path), extra_files=extra)
    facts = _facts(path, extra[FACTS])
    return ExportedModel("torch-export", facts, _listed(program.module()))


def _open_aoti(path: Path) -> ExportedModel:
    import torch._inductor

    import nbhd.ops  # noqa: F401

    package = torch._inductor.aoti_load_package(str(path))
    facts = _facts(path, package.get_metadata().get(FACTS))
    return ExportedModel("aoti", facts, _listed(package))


def _listed(module: Any) -> Run:
    def run(pixel_values: Tensor) -> list[Tensor]:
        found = module(pixel_values)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    return run


def _facts(path: Path, text: str | None) -> Facts:
    if not text:
        raise CheckpointError(f"{path} was not written by `nbhd export`: labels and preprocessing are not in it.")
    return Facts.from_json(text)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
