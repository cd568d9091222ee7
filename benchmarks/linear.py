"""``python -m benchmarks.linear``: PyTorch's linear layer against the same product as a convolution, on this machine.

The layers of NAT-Tiny at 224 pixels. Both ways are timed in turns in one process; a ratio is PyTorch's time over the
convolution's, the median of the rounds and its quartiles. `nbhd.nn.linear` takes the convolution where
`nbhd.nn.linear.mkl_is_slow` says so: this is where that rule comes from, and what to run before it is widened.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks import machine
from nbhd.cli._errors import reporting
from nbhd.nn import linear

#: NAT-Tiny's at 224 pixels: side of a stage's map, channels, layers.
STAGES = ((56, 64, 3), (28, 128, 4), (14, 256, 18), (7, 512, 5))

#: Rows of one image, channels in, channels out.
LAYERS = tuple(
    (side * side, inner, outer)
    for side, dim, _ in STAGES
    for inner, outer in ((dim, dim), (dim, 3 * dim), (3 * dim, dim))
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


@app.command()
def compare(
    batch: Annotated[int, typer.Option(min=1)] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    debug: Annotated[bool, typer.Option(help="On an error, print the traceback.")] = False,
) -> None:
    r"""Time the two ways to make a linear layer in float32.

    \b
    Example:
      python -m benchmarks.linear --batch 1 --threads 1
    """
    with reporting(debug=debug):
        torch.set_num_threads(threads)
        here = "torch.nn.functional.linear"
        if linear.mkl_is_slow():
            here = f"the convolution from {linear.smallest_work():,} products on, with gradients from twice as many"
        typer.echo(f"{machine.describe()['cpu']}, torch {torch.__version__}, threads {threads}, batch {batch}")
        typer.echo(f"On this machine nbhd.nn.linear takes {here}.")
        typer.echo("layer             ms forward:   linear   convolution                ratio    with gradients: ratio")
        for rows, inner, outer in LAYERS:
            batches = torch.randn(batch * rows, inner, requires_grad=True)
            weight, bias = torch.randn(outer, inner, requires_grad=True), torch.randn(outer, requires_grad=True)
            parameters, gradient = [batches, weight, bias], torch.randn(batch * rows, outer)

            def forward(
                call: Callable[..., Tensor], inputs: list[Tensor] = parameters, gradient: Tensor = gradient
            ) -> None:
                with torch.no_grad():
                    call(*inputs)

            def both(
                call: Callable[..., Tensor], inputs: list[Tensor] = parameters, gradient: Tensor = gradient
            ) -> None:
                torch.autograd.grad(call(*inputs), inputs, gradient)

            ways = torch.nn.functional.linear, convolution
            plain, ours, ratios = in_turns(*(functools.partial(forward, way) for way in ways), rounds)
            *_, ratios_of_both = in_turns(*(functools.partial(both, way) for way in ways), rounds)
            typer.echo(f"{batch * rows:>6} x {inner:>4} -> {outer:<5} {plain:13.3f} {ours:13.3f} {spread(ratios):>26}"
                       f" {spread(ratios_of_both):>24}")  # fmt: skip


def convolution(batches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `nbhd.nn.linear.linear` does where MKL is slow, here on any machine and at any size."""
    images = linear.images_of(len(batches))
    if not images:
        return torch.nn.functional.linear(batches, weight, bias)
    return linear.as_convolution(batches, weight, bias, images)


def in_turns(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float, list[float]]:
    """Medians in milliseconds of the two, and their ratios in each round."""
    times: tuple[list[float], list[float]] = ([], [])
    first(), second()
    for _ in range(rounds):
        for run, samples in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1]), [a / b for a, b in zip(*times, strict=True)]


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.linear")
