"""The formats a model is exported to: each makes the bytes of one file, which holds its `Facts` too."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbhd.errors import ArgumentError, BackendError, MissingExtra
from nbhd.export.subject import INPUT, Facts, Outputs, trace

FORMATS = ("onnx", "torch-export", "aoti")

#: The name of the facts inside a file.
FACTS = "nbhd"

#: ONNX's own limit: a file is one message of at most 2 GiB.
MOST_BYTES = 2**31 - 1


def to_onnx(subject: Outputs, facts: Facts) -> Any:
    """An ``onnx.ModelProto`` in standard operators only, checked, with the facts among its ``metadata_props``.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ArgumentError: the model cannot be traced or has an operation ONNX does not know.
    """
    try:
        import onnx
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("export to ONNX", "export", error.name or "onnx") from error
    from nbhd.export.onnx_tensor import translations

    program = trace(subject, facts)
    with quiet():
        try:
            written: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[INPUT],
                output_names=facts.outputs,
                custom_translation_table=translations(),
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter wraps everything into kinds of its own
            raise ArgumentError(
                f"this {type(subject.model).__name__} cannot be written as ONNX: {_last_cause(error)}"
            ) from error
        _tidy(written.model)
        _name_axes(written.model, facts)
        model = onnx_ir.to_proto(written.model)
    if model.ByteSize() > MOST_BYTES:
        raise ArgumentError(f"the model has {model.ByteSize():,} bytes; an ONNX file holds at most {MOST_BYTES:,}.")
    set_facts(model, facts)
    onnx.checker.check_model(model, full_check=True)
    domains = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    assert not domains, f"operators outside the standard: {domains}"
    return model


def set_facts(model: Any, facts: Facts) -> None:
    """Put the facts into an ``onnx.ModelProto``, in place of those that are there."""
    from onnx import helper

    others = {entry.key: entry.value for entry in model.metadata_props if entry.key != FACTS}
    helper.set_model_props(model, {**others, FACTS: facts.to_json()})


def _tidy(model: Any) -> None:
    """Cheap simplifications; the rest is done where the model is loaded. Layers share tables of one size thereby."""
    import onnx_ir.passes.common as passes

    _transpose_weights(model.graph)
    for name in ("IdentityEliminationPass", "CommonSubexpressionEliminationPass", "RemoveUnusedNodesPass"):
        if hasattr(passes, name):  # not all are in every version
            getattr(passes, name)()(model)
    for node in model.graph:  # where a node came from in the source, which nobody can use
        node.metadata_props.clear()
        node.doc_string = None


def _transpose_weights(graph: Any) -> None:
    """Store the weights of linear layers as their products read them: a quantiser looks for constants there."""
    import onnx_ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers or weight.const_value is None:
            continue
        array = weight.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        name = f"{weight.name}.transposed"
        if name not in graph.initializers:
            tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
            value = onnx_ir.Value(
                name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.initializers[name] = value
        replaced = node.outputs[0]
        replaced.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)


def _name_axes(model: Any, facts: Facts) -> None:
    import onnx_ir

    pixels = model.graph.inputs[0]
    named: dict[Any, str] = {}
    for axis, name in enumerate(("batch", None, "height", "width")):
        size = pixels.shape[axis]
        if name is not None and not isinstance(size, int):
            named[size] = name
    pixels.shape = onnx_ir.Shape([named.get(size, size) for size in pixels.shape])
    for output in model.graph.outputs:
        output.shape = onnx_ir.Shape([named.get(size, size) for size in output.shape])


def to_torch_export(subject: Outputs, facts: Facts) -> bytes:
    """A file for ``torch.export.load``; the facts are an extra file ``nbhd`` inside it."""
    program = _program(subject, facts)
    stream = io.BytesIO()
    with quiet():
        torch.export.save(program, stream, extra_files={FACTS: facts.to_json()})
    return stream.getvalue()


def to_aoti(subject: Outputs, facts: Facts) -> bytes:
    """A package for ``torch._inductor.aoti_load_package``, compiled for this machine's processor.

    Raises:
        BackendError: there is no C++ compiler, or the model does not compile.
    """
    import torch._inductor

    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++", "cl")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise BackendError(
            f"--to aoti compiles C++, but there is no compiler here ({compiler or 'g++, clang++, c++, cl'} not found). "
            "Install one, such as the package g++, or name it in the environment variable CXX."
        )
    program = _program(subject, facts)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = str(Path(folder) / "model.pt2")
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=path, inductor_configs={"aot_inductor.metadata": {FACTS: facts.to_json()}}
            )
        except Exception as error:  # a compiler's pages of output among others
            raise BackendError(
                f"this {type(subject.model).__name__} does not compile ahead of time: {_last_cause(error)}"
            ) from error
        return Path(path).read_bytes()


def _program(subject: Outputs, facts: Facts) -> torch.export.ExportedProgram:
    program = trace(subject, facts)
    if not facts.needs_nbhd:
        from nbhd.export.program import lower

        lower(program)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters say to their own developers off standard error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._inductor", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _last_cause(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
