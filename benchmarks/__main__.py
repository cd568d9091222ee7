"""``python -m benchmarks``, which is ``make bench``. The same manners as ``nbhd``: results on standard output, the rest
on standard error; exit status 0 all went well, 1 some cases failed (each is named), 2 a wrong call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import cases, machine, models
from nbhd._files import write_json
from nbhd.cli._console import note
from nbhd.cli._errors import SOME_INPUTS_FAILED, reporting
from nbhd.errors import ArgumentError, FileError

RESULTS = Path(__file__).resolve().parent / "results"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)  # type: ignore[arg-type]


@app.command()
def bench(
    list_: Annotated[bool, typer.Option("--list", help="Print the cases that would run, with their peers.")] = False,
    case: Annotated[list[str] | None, typer.Option("--case", help="Only cases that match a glob. Repeatable.")] = None,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="Only peers that match a glob. Repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every case, in 40 minutes.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small maps, two rounds: to see that everything runs.")
    ] = False,
    threads: Annotated[str, typer.Option(help="Numbers of threads, such as 1,2. Default: one, and all cores.")] = "",
    minutes: Annotated[
        float | None, typer.Option(help="How long the run should take. Default 7.5; with --full 40.", min=0.05)
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="The JSON. Default, for whole runs only: results/MACHINE-DATE.json.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier JSON: show its shares beside ours.")] = None,
    show: Annotated[Path | None, typer.Option(help="Print the tables of a JSON and stop.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the README's tables from a JSON and stop.")] = None,
    readme: Annotated[Path, typer.Option(help="Where --table writes.")] = Path("README.md"),
    debug: Annotated[bool, typer.Option(help="On an error, print the traceback.")] = False,
) -> None:
    r"""Time neighborhood attention against its peers, interleaved, in one process.

    \b
    Example:
      python -m benchmarks --case 'nat/*' --output nat.json
      python -m benchmarks --table benchmarks/results/MACHINE-DATE.json
    """
    with reporting(debug=debug):
        if table is not None:
            from benchmarks import readme as tables

            return tables.write(_load(table), _in_repository(table), readme)
        if show is not None:
            return _print(_load(show), None if against is None else _load(against))
        names = _names(case, full)
        if list_:
            return _list(names)
        earlier = None if against is None else _load(against)
        if output is not None and not output.resolve().parent.is_dir():
            raise FileError(f"cannot write {output}: the folder {output.resolve().parent} does not exist.")
        _run(names, _threads(threads), _peers(peer), quick, memory, minutes or (40.0 if full else 7.5), output,
             is_whole=not (case or peer or quick), earlier=earlier)  # fmt: skip
    return None


def _names(patterns: list[str] | None, full: bool) -> list[str]:
    from benchmarks.run import registry

    known = registry()
    if patterns:
        return cases.matching(list(known), patterns, "--case")
    return [name for name, case in known.items() if full or case.is_default]


def _list(names: list[str]) -> None:
    from benchmarks.run import registry

    known = registry()
    for name in names:
        case = known[name]
        if isinstance(case, models.ModelCase):
            typer.echo(f"{name}: {', '.join(case.networks)}; {case.side}x{case.side}, batch {case.batch}")
            continue
        shape = f"{'x'.join(map(str, case.spatial))}, window {'x'.join(map(str, case.kernel_size))}"
        extras = "".join(
            f", {word} {'x'.join(str(int(v)) for v in values)}"
            for word, values, usual in (
                ("stride", case.stride, 1), ("dilation", case.dilation, 1), ("causal", case.is_causal, 0),
            )
            if any(v != usual for v in values)
        )  # fmt: skip
        bias = ", bias" if case.has_bias else ""
        held = f"; {', '.join(case.peers)}" if case.peers else ""
        size = f"batch {case.batch}, heads {case.heads}, dim {case.head_dim}, {case.dtype}"
        typer.echo(f"{name}: {shape}{extras}{bias}, {size}{held}")


def _threads(text: str) -> tuple[int, ...]:
    cores = machine.usable_cores()
    if not text:
        return tuple(sorted({1, cores}))
    try:
        found = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise ArgumentError(f"--threads must be whole numbers from 1, such as 1,2, got {text!r}.")
    if found[-1] > cores:
        raise ArgumentError(f"--threads must not exceed the {cores} cores this process may use, got {text!r}.")
    return found


def _peers(patterns: list[str] | None) -> frozenset[str] | None:
    from benchmarks.peers import PEERS

    if not patterns:
        return None
    return frozenset(cases.matching([*PEERS, *models.TITLES], patterns, "--peer"))


def _run(
    names: list[str], threads: tuple[int, ...], peers: frozenset[str] | None, quick: bool, memory: bool, minutes: float,
    output: Path | None, is_whole: bool, earlier: dict[str, Any] | None,
) -> None:  # fmt: skip
    from benchmarks import run as runner

    load = machine.load_average()
    if load is not None and load > 0.5 and not quick:
        note(f"the machine is busy (load average {load:.1f}): figures will be too low")
    request = runner.Request(names, threads, minutes * 60, peers, quick, memory)
    found = runner.run(request, note)
    if output is None and is_whole:
        output = RESULTS / f"{machine.slug(found['machine'])}-{found['date'][:10]}.json"
        RESULTS.mkdir(exist_ok=True)
    if output is not None:
        write_json(output, found)
        note(f"wrote {output}")
    _print(found, earlier)
    if found["failures"]:
        note(f"{len(found['failures'])} failed: {', '.join(found['failures'])}")
        raise typer.Exit(SOME_INPUTS_FAILED)


def _print(found: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    from rich.console import Console

    from benchmarks import report

    # In a pipe there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False, soft_wrap=False)
    report.show(found, console, earlier)


def _load(path: Path) -> dict[str, Any]:
    from benchmarks.run import FORMAT

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "results" not in found:
        raise FileError(f"{path} is not the JSON of a benchmark run in format {FORMAT}.")
    return found


def _in_repository(path: Path) -> Path:
    """The path as README.md links to it."""
    root = RESULTS.parent.parent
    whole = path.resolve()
    return whole.relative_to(root) if whole.is_relative_to(root) else Path(path.name)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
