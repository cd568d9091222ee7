"""``python -m benchmarks.packed``: what stands between NAT's attentions, by the native core and by plain layers.

The layers of NAT-Tiny at 224 pixels: norm and projections to query, key and value; projection and residual;
norm, MLP and residual. The core has its weights packed, as `nbhd.optimize_for_inference` leaves them, or packs them at
each call, as NAT's layers do; with ``--how gradients`` forward and backward are timed, the gradients of inputs and all
parameters. Both ways are timed in turns in one process; a ratio is the plain layers' time over the core's, the median
of the rounds and its quartiles. A share is the products that are made, at the rate of ``torch.mm`` of two 2048 x 2048
matrices of float32, over the core's time.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.linear import STAGES, in_turns, spread
from nbhd.backends import cpu
from nbhd.backends.cpu_linear import Layer, Norm
from nbhd.cli._errors import reporting
from nbhd.errors import BackendError
from nbhd.nn.joined import join
from nbhd.nn.linear import Linear
from nbhd.nn.packed import Layers, PackedLinear

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


class How(enum.StrEnum):
    """How the core makes the layers."""

    PACKED = "packed"
    JOINED = "joined"
    GRADIENTS = "gradients"


class Dtype(enum.StrEnum):
    """What a NAT may be of."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.command()
def compare(
    how: Annotated[
        How, typer.Option(help="packed weights; weights packed at each call; the same with gradients.")
    ] = How.PACKED,
    dtype: Annotated[Dtype, typer.Option(help="Of all tensors.")] = Dtype.FLOAT32,
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
    with reporting(debug=debug), torch.set_grad_enabled(how is How.GRADIENTS):
        if (reason := cpu.why_unusable()) is not None:
            raise BackendError(f"there is nothing to time: {reason}")
        torch.set_num_threads(threads)
        isa = cpu.description().split(",")[0]
        typer.echo(f"{machine.describe()['cpu']}, {isa}, torch {torch.__version__}, threads {threads}, batch {batch}, "
                   f"{dtype}, {how}")  # fmt: skip
        matrix = torch.randn(2048, 2048)
        multiply = functools.partial(torch.mm, matrix, matrix)
        milliseconds, *_ = in_turns(multiply, multiply, rounds)
        rate = 2048**3 / milliseconds
        typer.echo("layers                  ms:  plain     core    share                ratio")
        totals = [0.0, 0.0]
        for side, dim, layers in STAGES:
            rows = batch * side * side
            for name, products, plain, core in ways(rows, dim, how, getattr(torch, dtype)):
                *times, ratios = in_turns(plain, core, rounds)
                share = products / rate / times[1]
                typer.echo(f"{rows:>6} x {dim:<4} {name:<11} {times[0]:9.3f} {times[1]:8.3f} {share:8.2f} "
                           f"{spread(ratios):>20}")  # fmt: skip
                totals = [total + layers * time for total, time in zip(totals, times, strict=True)]
        typer.echo(f"all of the network's     {totals[0]:9.3f} {totals[1]:8.3f}")


Way = tuple[str, int, Callable[[], object], Callable[[], object]]


def ways(rows: int, dim: int, how: How, dtype: torch.dtype = torch.float32) -> list[Way]:
    """Each kind of call: its name, its products (multiplications and additions), plain layers, the core."""
    batch, norm = torch.randn(rows, dim, dtype=dtype), nn.LayerNorm(dim, dtype=dtype)
    query, key, value, projection = (Linear(dim, dim, dtype=dtype) for _ in range(4))
    hidden, last = Linear(dim, 3 * dim, dtype=dtype), Linear(3 * dim, dim, dtype=dtype)

    def plain_qkv() -> list[Tensor]:
        x = norm(batch)
        return [query(x), key(x), value(x)]

    def plain_mlp() -> list[Tensor]:
        return [batch + last(hidden.with_gelu(norm(batch)))]

    def plain_projection() -> list[Tensor]:
        return [batch + projection(batch)]

    def layer(module: nn.Linear) -> Layer:
        return Layer(None, module.weight, module.bias)

    of_norm = Norm(norm.weight, norm.bias, norm.eps)
    joined_qkv = functools.partial(join, batch, [layer(query), layer(key), layer(value)], norm=of_norm)
    joined_projection = functools.partial(join, batch, [layer(projection)], residual=batch)
    joined_mlp = functools.partial(join, batch, [layer(last)], hidden=layer(hidden), norm=of_norm, residual=batch)
    square = rows * dim * dim
    named = [
        ("norm, qkv", 3 * square, plain_qkv, joined_qkv),
        ("projection", square, plain_projection, joined_projection),
        ("norm, MLP", 6 * square, plain_mlp, joined_mlp),
    ]
    if how is How.GRADIENTS:
        batch.requires_grad_()
        parameters = [batch, *(p for m in (norm, query, key, value, projection, hidden, last) for p in m.parameters())]
        return [(n, 3 * p, with_gradients(x, parameters), with_gradients(y, parameters)) for n, p, x, y in named]
    for module in (norm, query, key, value, projection, hidden, last):
        module.requires_grad_(False)
    if how is How.JOINED:
        return named
    qkv = Linear(dim, 3 * dim, dtype=dtype).requires_grad_(False)
    packed_qkv = Layers(PackedLinear(qkv), norm=norm)
    packed_projection = Layers(PackedLinear(projection))
    packed_mlp = Layers(PackedLinear(last), hidden=PackedLinear(hidden), norm=norm)
    return [
        ("norm, qkv", 3 * square, lambda: qkv(norm(batch)), lambda: packed_qkv(batch)),
        ("projection", square, plain_projection, lambda: packed_projection(batch, batch)),
        ("norm, MLP", 6 * square, plain_mlp, lambda: packed_mlp(batch, batch)),
    ]


def with_gradients(forward: Callable[[], Sequence[Tensor] | None], leaves: list[Tensor]) -> Callable[[], None]:
    """Forward, and backward of gradients that are all of them other numbers."""
    gradients = [torch.randn_like(output) for output in forward() or ()]

    def run() -> None:
        torch.autograd.backward(forward() or (), gradients)
        for leaf in leaves:
            leaf.grad = None

    return run


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.packed")
