"""``python -m benchmarks.exported``: what the shipped classifier loses by being exported, and what the files cost.

The checkpoint is exported to ONNX in float32 and in int8, and evaluated on labelled images as ``nbhd evaluate`` does,
in PyTorch and from each file, on one thread. One JSON holds the figures.
"""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import machine
from nbhd._files import write_json
from nbhd.cli._console import note
from nbhd.cli._errors import reporting

#: Training images that the ranges of activations are taken from, spread over the set.
CALIBRATION_IMAGES = 256

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


@app.command()
def exported(
    data: Annotated[str, typer.Option(help="Labelled images with the splits train and validation.")],
    output: Annotated[Path, typer.Option(help="The JSON.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the shipped checkpoint.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    debug: Annotated[bool, typer.Option(help="On an error, print the traceback.")] = False,
) -> None:
    r"""Evaluate a classifier in PyTorch, and exported to ONNX in float32 and int8.

    \b
    Example:
      python -m benchmarks.exported --data imagenette128/ --output benchmarks/results/exported-imagenette128.json
    """
    with reporting(debug=debug):
        torch.set_num_threads(1)
        found = measure(data, model, limit, batch_size)
        write_json(output, found)
        note(f"wrote {output}")
        for row in found["results"]:
            typer.echo(f"{row['name']:<14} top-1 {row['top1']:.2%}  cross-entropy {row['loss']:.4f}  "
                       f"{row['bytes'] / 1e6:.1f} MB  {row['seconds_per_image'] * 1e3:.1f} ms/image")  # fmt: skip


def measure(data: str, model: str | None, limit: int | None, batch_size: int) -> dict[str, Any]:
    """The figures of all forms of the model."""
    from nbhd.export.formats import to_onnx
    from nbhd.export.quantize import quantize
    from nbhd.export.subject import Outputs, facts_of
    from nbhd.tasks.checkpoints import load_classifier, model_folder
    from nbhd.tasks.classification.evaluate import evaluate_images, open_for_model
    from nbhd.tasks.datasets import first_rows

    cpu = torch.device("cpu")
    loaded = load_classifier(model, cpu)
    train = open_for_model(loaded, data, "train")
    images = first_rows(open_for_model(loaded, data, "validation"), limit)

    def examples() -> Iterator[Any]:
        for row in range(0, len(train), max(1, len(train) // CALIBRATION_IMAGES)):
            yield loaded.processor(train.decode(row), return_tensors="np")["pixel_values"]

    def form(name: str, runs: Any, size: int) -> dict[str, Any]:
        start = time.process_time()
        result = evaluate_images(runs, images, batch_size=batch_size)
        seconds = (time.process_time() - start) / result.images
        note(f"{name}: top-1 {result.top1:.2%}")
        return {"name": name, "top1": result.top1, "top5": result.top5, "loss": result.loss, "images": result.images,
                "bytes": size, "seconds_per_image": seconds}  # fmt: skip

    weights = sum(file.stat().st_size for file in model_folder(model).glob("*.safetensors"))
    results = [form("torch", loaded, weights)]
    facts = facts_of(loaded.model, loaded.processor)
    written = to_onnx(Outputs(loaded.model, facts.task).eval(), facts)  # once: tracing takes longest
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("onnx", None), ("onnx-int8-dynamic", "dynamic"), ("onnx-int8-static", "static")):
            chosen = dataclasses.replace(facts, int8=kind)
            images_or_none = examples() if kind == "static" else None
            content = written if kind is None else quantize(written, chosen, images_or_none)
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(content.SerializeToString())
            results.append(form(name, load_classifier(path, cpu), path.stat().st_size))
    import onnxruntime

    return {
        "what": "accuracy and processor time of one checkpoint in PyTorch and exported, decoding included, one thread",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "load_average": machine.load_average(),
        "versions": {"torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__},
        "model": str(loaded.source.name),
        "batch_size": batch_size,
        "calibration_images": min(CALIBRATION_IMAGES, len(train)),
        "results": results,
    }


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.exported")
