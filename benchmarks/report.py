"""A run as tables on the terminal."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import models, peers
from benchmarks.summary import Row, Spread, find, rows

#: The names that runs with gradients have.
TRAINING = ("training", "training_step")

TITLES = {**peers.TITLES, **models.TITLES}


def show(run: dict[str, Any], console: Console, against: dict[str, Any] | None = None) -> None:
    """Print a run; with ``against`` also how our share of ``torch.mm``'s rate changed since that run."""
    console.print(_heading(run))
    console.print(_ceilings(run))
    attention = [result for result in run["results"] if result["kind"] == "attention"]
    networks = [result for result in run["results"] if result["kind"] == "model"]
    if attention:
        console.print(_attention(attention, against))
    if networks:
        console.print(_networks(networks))
    memory = [result for result in run["results"] if result["peak_bytes"]]
    if memory:
        console.print(_memory(memory))
    for result in run["results"]:
        for name, reason in result["skipped"].items():
            console.print(f"{result['name']}: {TITLES[name]}: not run: {reason}")
    for what, reason in run["failures"].items():
        console.print(f"{what}: failed: {reason}")


def machine_line(run: dict[str, Any]) -> str:
    """Machine, versions, date and commit in a sentence."""
    machine, versions = run["machine"], run["versions"]
    commit = run["commit"]
    state = (
        "unknown commit" if commit is None else commit["id"][:10] + (" and changes" if commit["has_changes"] else "")
    )
    cache = ", ".join(f"{name.split()[0]} {size}" for name, size in machine["caches"].items() if "Instr" not in name)
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores{' (virtual)' if machine['is_virtual'] else ''}"
        f"{f' ({cache})' if cache else ''}, native core {versions['native_core']}, torch {versions['torch']} "
        f"({versions['torch_capability']}), transformers {versions['transformers']}, Python {versions['python']}, "
        f"nbhd {versions['nbhd']} ({state}), {run['date'][:10]}"
    )


def _heading(run: dict[str, Any]) -> str:
    load = run["load_average"]
    lines = [machine_line(run)]
    if load["before"] is not None and load["before"] > 0.5:
        lines.append(f"the machine was busy: load average {load['before']:.1f} before the run")
    if run["is_quick"]:
        lines.append("a quick run on small maps: the numbers mean nothing")
    return "\n".join(lines)


def _ceilings(run: dict[str, Any]) -> Table:
    table = _table("The machine", "threads", "float32 torch.mm", "bfloat16 torch.mm", "copy", "fresh memory")
    for threads, entries in run["ceilings"].items():
        middle = {name: statistics.median(samples) / 1e9 for name, samples in entries.items()}
        table.add_row(
            threads,
            f"{middle['mm_float32_flop_per_s']:.0f} GFLOP/s",
            f"{middle['mm_bfloat16_flop_per_s']:.0f} GFLOP/s",
            f"{middle['copy_bytes_per_s']:.1f} GB/s",
            f"{middle['fresh_memory_bytes_per_s']:.1f} GB/s",
        )
    return table


def _attention(results: list[dict[str, Any]], against: dict[str, Any] | None) -> Table:
    columns = [
        "case",
        "threads",
        "what",
        "forward",
        "share",
        "x nbhd",
        "both",
        "share of backward",
        "x nbhd",
        "1 thread",
    ]
    if against is not None:
        columns += ["share before"]
    table = _table(
        "Median (quartiles). Share: useful FLOP over torch.mm's rate. x nbhd: time over ours, of the same round. "
        "Both: forward and backward. 1 thread: our time at one thread over this, forward and both.",
        *columns,
    )
    for result in results:
        before = {} if against is None else _shares_of_ours(against, result["name"])
        for i, row in enumerate(rows(result)):
            entries = [
                row.case if i == 0 else "",
                str(row.threads),
                TITLES[row.subject],
                time_text(row.times.get("forward")),
                number(row.shares.get("forward")),
                number(row.ratios.get("forward")),
                time_text(row.times.get("both")),
                number(row.shares.get("backward")),
                number(row.ratios.get("both")),
                " | ".join(number(row.first_at_one[q]) for q in ("forward", "both") if q in row.first_at_one),
            ]
            if against is not None:
                entries.append(before.get(row.threads, "") if row.subject == "nbhd" else "")
            table.add_row(*entries, style="bold" if row.subject == "nbhd" else None)
        table.add_section()
    return table


def _shares_of_ours(run: dict[str, Any], case: str) -> dict[int, str]:
    result = find(run, case)
    if result is None:
        return {}
    return {
        row.threads: f"{number(row.shares.get('forward'), True)} | {number(row.shares.get('backward'), True)}"
        for row in rows(result)
        if row.subject == "nbhd"
    }


def _networks(results: list[dict[str, Any]]) -> Table:
    table = _table(
        "Networks: images a second (quartiles). Share: our useful FLOP over torch.mm's rate. x: time over the first's.",
        "case", "threads", "what", "inference", "share", "x", "training step", "share", "x",
    )  # fmt: skip
    for result in results:
        for i, row in enumerate(rows(result)):
            images, first = result["units"][row.subject], row.subject == result["first"]
            table.add_row(
                row.case if i == 0 else "",
                str(row.threads),
                TITLES[row.subject],
                rate_text(images, row.times.get("inference")),
                number(row.shares.get("inference")) if first else "",
                number(row.ratios.get("inference")),
                rate_text(images, row.times.get("training_step")),
                number(row.shares.get("training_step")) if first else "",
                number(row.ratios.get("training_step")),
            )
        table.add_section()
    return table


def _memory(results: list[dict[str, Any]]) -> Table:
    table = _table(
        "Peak memory: attention beyond inputs and what is returned, networks beyond the process without them",
        "case", "what", "forward / inference", "both / training step",
    )  # fmt: skip
    for result in results:
        for i, (name, entry) in enumerate(result["peak_bytes"].items()):
            plain, training = (entry.get(a, entry.get(b)) for a, b in (("forward", "inference"), TRAINING))
            table.add_row(result["name"] if i == 0 else "", TITLES[name], memory_text(plain), memory_text(training))
        table.add_section()
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "what") else "right", overflow="fold")
    return table


def significant(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value >= 99.5:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def time_text(spread: Spread | None, is_bare: bool = False) -> str:
    """Seconds as ``12.3 ms (12.1-12.6)``; microseconds below a tenth of a millisecond."""
    if spread is None:
        return ""
    factor, unit = (1e3, "ms") if spread.median >= 1e-4 else (1e6, "us")
    s = spread.scaled(factor)
    if is_bare:
        return f"{significant(s.median)} {unit}"
    return f"{significant(s.median)} {unit} ({significant(s.low)}-{significant(s.high)})"


def number(spread: Spread | None, is_bare: bool = False) -> str:
    """``1.23 (1.20-1.25)``."""
    if spread is None:
        return ""
    if is_bare:
        return significant(spread.median)
    return f"{significant(spread.median)} ({significant(spread.low)}-{significant(spread.high)})"


def rate_text(units: int, seconds: Spread | None, is_bare: bool = False) -> str:
    """Units a second; the quartiles of a time are those of its rate the other way round."""
    if seconds is None:
        return ""
    return number(Spread(units / seconds.median, units / seconds.high, units / seconds.low), is_bare)


def memory_text(value: int | str | None) -> str:
    """MiB, or the reason that there is no number."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value / 2**20:.{int(value < 10 << 20)}f} MiB"


def bound(result: dict[str, Any], row: Row) -> dict[str, float]:
    """Seconds of the useful FLOP at the median rate of ``torch.mm``: forward and both."""
    rate = statistics.median(result["samples"][str(row.threads)]["mm_flop_per_s"])
    flop = result["useful_flop"]
    return {"forward": flop["forward"] / rate, "both": (flop["forward"] + flop["backward"]) / rate}
