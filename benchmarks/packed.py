"""``python -m benchmarks.packed``: what stands between NAT's attentions, by the native core and by plain layers.

The layers of NAT-Tiny at 224 pixels, float32, without gradients: norm and projection to query, key and value;
projection and residual; norm, MLP and residual. Both ways are timed in turns in one process; a ratio is the plain
layers' time over the core's, the median of the rounds and its quartiles. A share is the products that are made, at the
rate of ``torch.mm`` of two 2048 x 2048 matrices, over the core's time. `nbhd.optimize_for_inference` times the MLP in
the same way to choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.linear import STAGES, in_turns, spread
from nbhd.backends import cpu
from nbhd.cli._errors import reporting
from nbhd.errors import BackendError
from nbhd.linear import Linear
from nbhd.packed import Layers, PackedLinear

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


@app.command()
def compare(
    batch: Annotated[int, typer.Option(min=1)] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    debug: Annotated[bool, typer.Option(help="On an error, print the traceback.")] = False,
) -> None:
    r"""Time the two ways to make the layers around an attention.

    \b
    Example:
      python -m benchmarks.packed --batch 1 --threads 1
    """
    with reporting(debug=debug), torch.no_grad():
        if (reason := cpu.why_unusable()) is not None:
            raise BackendError(f"there is nothing to time: {reason}")
        torch.set_num_threads(threads)
        core = cpu.description().split(",")[0]
        typer.echo(f"{machine.describe()['cpu']}, {core}, torch {torch.__version__}, threads {threads}, batch {batch}")
        matrix = torch.randn(2048, 2048)
        multiply = functools.partial(torch.mm, matrix, matrix)
        milliseconds, *_ = in_turns(multiply, multiply, rounds)
        rate = 2048**3 / milliseconds
        typer.echo("layers                  ms:  plain     core    share                ratio")
        totals = [0.0, 0.0]
        for side, dim, layers in STAGES:
            rows = batch * side * side
            for name, products, plain, packed in ways(rows, dim):
                *times, ratios = in_turns(plain, packed, rounds)
                share = products / rate / times[1]
                typer.echo(f"{rows:>6} x {dim:<4} {name:<11} {times[0]:9.3f} {times[1]:8.3f} {share:8.2f} "
                           f"{spread(ratios):>20}")  # fmt: skip
                totals = [total + layers * time for total, time in zip(totals, times, strict=True)]
        typer.echo(f"all of the network's     {totals[0]:9.3f} {totals[1]:8.3f}")


def ways(rows: int, dim: int) -> list[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    """Each kind of call: its name, its products (multiplications and additions), plain layers, the core."""
    batch, norm = torch.randn(rows, dim), nn.LayerNorm(dim)
    qkv, projection, hidden, last = (
        Linear(*sizes).requires_grad_(False) for sizes in ((dim, 3 * dim), (dim, dim), (dim, 3 * dim), (3 * dim, dim))
    )
    norm.requires_grad_(False)

    def mlp() -> Tensor:
        return batch + last(hidden.with_gelu(norm(batch)))

    packed_qkv = Layers(PackedLinear(qkv), norm=norm)
    packed_projection = Layers(PackedLinear(projection))
    packed_mlp = Layers(PackedLinear(last), hidden=PackedLinear(hidden), norm=norm)
    square = rows * dim * dim
    return [
        ("norm, qkv", 3 * square, lambda: qkv(norm(batch)), lambda: packed_qkv(batch)),
        ("projection", square, lambda: batch + projection(batch), lambda: packed_projection(batch, batch)),
        ("norm, MLP", 6 * square, mlp, lambda: packed_mlp(batch, batch)),
    ]


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.packed")
