"""int8 for CPUs, by ONNX Runtime's quantiser: weights alone ahead of time, or activations too from example images."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nbhd.errors import ArgumentError, MissingExtra
from nbhd.export.formats import set_facts
from nbhd.export.subject import INPUT, Facts


def quantize(model: Any, facts: Facts, images: Iterable[np.ndarray] | None = None) -> Any:
    """An ``onnx.ModelProto`` with int8 products of weights.

    Linear layers are quantised, and with ``images`` the convolutions; the attention itself, norms and activations stay
    in floating point. Weights keep 7 of the 8 bits, so that processors without VNNI cannot overflow.

    Args:
        model: of `nbhd.export.formats.to_onnx`; left as it is.
        facts: what it holds.
        images: None for dynamic quantisation, where activations are scaled as they come. Otherwise examples
            ``[batch, channels, height, width]`` as float32 arrays, from which the ranges of activations are taken once
            (static quantisation, by minimum and maximum).

    Raises:
        MissingExtra: onnxruntime is not installed.
        ArgumentError: there are no examples in ``images``.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise MissingExtra("quantisation", "export", error.name or "onnxruntime") from error
    import onnx

    options: dict[str, Any] = {
        "weight_type": quantization.QuantType.QInt8,
        "per_channel": True,
        "reduce_range": True,
        # Products of two activations, as in the attention, stay as they are.
        "extra_options": {"MatMulConstBOnly": True},
    }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = str(Path(folder) / "int8.onnx")
        source = onnx.ModelProto()
        source.CopyFrom(model)
        if images is None:
            quantization.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], **options)
        else:
            quantization.quantize_static(
                source,
                target,
                _Reader(images),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                **options,
            )
        quantized = onnx.load(target)
    set_facts(quantized, facts)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


class _Reader:
    """Examples in the form ONNX Runtime asks for them."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self._images = iter(images)
        self._first = next(self._images, None)
        if self._first is None:
            raise ArgumentError("static quantisation needs at least one image to calibrate with, got none.")

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next example, None at the end."""
        image = self._first if self._first is not None else next(self._images, None)
        self._first = None
        return None if image is None else {INPUT: image}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser recommends steps that it does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
