"""``python -m benchmarks.inference``: what `nbhd.optimize_for_inference` gains over the model as it is loaded.

The same network, eager in float32 and in each optimised form, interleaved in one process as in ``benchmarks.sampling``:
in each round every form is timed once, in a new order; ratios are of samples of one round.
"""

from __future__ import annotations

import copy
import datetime
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import nbhd
from benchmarks import machine
from nbhd._files import write_json
from nbhd.cli._console import note
from nbhd.cli._errors import reporting
from nbhd.errors import ArgumentError
from nbhd.optimize import bfloat16_gain

#: What each form asks `nbhd.optimize_for_inference` for; the first is the model as it is loaded.
FORMS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "fused": {"dtype": None},
    "bfloat16": {"dtype": torch.bfloat16},
    "compiled": {"dtype": None, "compile": True},
    "compiled-bfloat16": {"dtype": torch.bfloat16, "compile": True},
}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


@app.command()
def inference(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the shipped checkpoint.")] = None,
    form: Annotated[list[str] | None, typer.Option(help=f"Only these, beside eager: {', '.join(FORMS)}.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    side: Annotated[int, typer.Option(min=1, help="Pixels.")] = 128,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option(help="A JSON with every sample.")] = None,
    debug: Annotated[bool, typer.Option(help="On an error, print the traceback.")] = False,
) -> None:
    r"""Time an image classifier as it is loaded and made ready for inference.

    \b
    Example:
      python -m benchmarks.inference --form fused --form compiled --output inference.json
    """
    with reporting(debug=debug):
        for name in form or ():
            if name not in FORMS:
                raise ArgumentError(f"--form must be one of {', '.join(FORMS)}, got {name!r}.")
        torch.set_num_threads(threads)
        found = measure(model, ["eager", *(name for name in FORMS if name != "eager" and name in (form or FORMS))],
                        batch, side, rounds)  # fmt: skip
        if output is not None:
            write_json(output, found)
            note(f"wrote {output}")
        for row in found["results"]:
            typer.echo(f"{row['name']:<18} {row['median_ms_per_image']:8.2f} ms/image   {row['speedup']:5.2f}x eager   "
                       f"differs by {row['difference']:.1e}")  # fmt: skip


def measure(model: str | None, names: list[str], batch: int, side: int, rounds: int) -> dict[str, Any]:
    """Samples, medians and ratios of the forms."""
    from nbhd.tasks.checkpoints import load_classifier

    loaded = load_classifier(model, torch.device("cpu"))
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    networks, reports, outputs = {}, {}, {}
    for name in names:
        network = copy.deepcopy(loaded.model)
        options = FORMS[name]
        if options is not None:
            network = nbhd.optimize_for_inference(network, **options)
            reports[name] = str(network.inference_report).splitlines()
        with torch.inference_mode():
            outputs[name] = network(pixels).logits.float()  # compiled here
            network(pixels)
        networks[name] = network
        note(f"{name} is ready")
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    shuffle = random.Random(0).shuffle
    with torch.inference_mode():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                networks[name](pixels)
                samples[name].append(time.perf_counter() - start)
    eager = outputs["eager"]
    return {
        "what": "seconds a batch of inference, interleaved; speed-up is the median of ratios within a round",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "load_average": machine.load_average(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "model": loaded.source.name,
        "batch": batch,
        "side": side,
        "bfloat16_gain_of_a_product": bfloat16_gain(),
        "results": [
            {
                "name": name,
                "median_ms_per_image": statistics.median(samples[name]) / batch * 1e3,
                "speedup": statistics.median(e / s for e, s in zip(samples["eager"], samples[name], strict=True)),
                "difference": float((outputs[name] - eager).abs().max() / eager.abs().max()),
                "report": reports.get(name),
                "samples": samples[name],
            }
            for name in names
        ],
    }


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.inference")
