"""The tables in README.md, made from a run's JSON and written between two comments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import models, pages, peers
from benchmarks.cases import NAT_MAPS
from benchmarks.report import bound, machine_line, memory_text, number, rate_text, significant
from benchmarks.summary import Row, find, rows
from nbhd.errors import ArgumentError

BEGIN = "<!-- benchmarks: begin. Made by `python -m benchmarks --table FILE`, not by hand. -->"
END = "<!-- benchmarks: end -->"


def write(run: dict[str, Any], source: Path, readme: Path) -> None:
    """Replace what stands between the comments of ``readme``.

    Raises:
        ArgumentError: the run is a quick one or has none of the tables' cases.
        FileError: the file cannot be read, or does not have both comments, once and in order.
    """
    pages.replace(readme, BEGIN, END, f"\n\n{tables(run, source)}\n\n")


def tables(run: dict[str, Any], source: Path) -> str:
    """The tables as Markdown; ``source`` is the JSON's name, which stands below them.

    Raises:
        ArgumentError: as in ``write``.
    """
    if run["is_quick"]:
        raise ArgumentError(
            "this run is a quick one on small maps: its numbers mean nothing. Make one without --quick."
        )
    parts = [part for part in (_maps(run), _networks(run), _shapes(run)) if part]
    if not parts:
        raise ArgumentError("this run has none of the cases of the tables: run nat/*, models/* or all of them.")
    return "\n\n".join([*parts, f"{machine_line(run)}. Every sample: [{source.name}]({source.as_posix()})."])


def _maps(run: dict[str, Any]) -> str | None:
    """Milliseconds on NAT's four maps, ours and the peers', at all threads."""
    results = [find(run, f"nat/{side}x{side}-b8") for side, _ in NAT_MAPS]
    threads = run["threads"][-1]
    columns: list[dict[str, Row]] = []
    for result in results:
        if result is None:
            return None
        columns.append({row.subject: row for row in rows(result) if row.threads == threads})
    names = [name for name in peers.TITLES if any(name in column for column in columns)]
    head = " | ".join(f"{side}x{side}, {heads} heads" for side, heads in NAT_MAPS)
    lines = [
        f"Window 7x7, head_dim 32, float32, batch 8, {_threads(threads)}; medians in ms, forward / both with backward:",
        "",
        f"| | {head} |",
        "|---" * (len(NAT_MAPS) + 1) + "|",
    ]
    for name in names:
        cells = [_times(column.get(name)) for column in columns]
        title = f"**{peers.TITLES[name]}**" if name == "nbhd" else peers.TITLES[name]
        lines.append(f"| {title} | {' | '.join(f'**{c}**' if name == 'nbhd' and c else c for c in cells)} |")
    limits = []
    for result, column in zip(results, columns, strict=True):
        assert result is not None
        limit = bound(result, column["nbhd"])
        limits.append(f"{significant(limit['forward'] * 1e3)} / {significant(limit['both'] * 1e3)}")
    lines.append(f"| the useful FLOP at `torch.mm`'s rate | {' | '.join(limits)} |")
    peaks = [[(result or {})["peak_bytes"].get(name, {}) for result in results] for name in names]
    if any(isinstance(v, int) for row in peaks for entry in row for v in entry.values()):
        lines += ["", "Peak memory beyond inputs and results, forward / both:", "", f"| | {head} |"]
        lines.append("|---" * (len(NAT_MAPS) + 1) + "|")
        for name, row in zip(names, peaks, strict=True):
            cells = [" / ".join(memory_text(v) for v in entry.values() if isinstance(v, int)) for entry in row]
            if any(cells):
                lines.append(f"| {peers.TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _networks(run: dict[str, Any]) -> str | None:
    result = find(run, "models/tiny-224-b8")
    if result is None or not result["samples"]:
        return None
    case, found = result["case"], rows(result)
    lines = [
        f"Whole networks, {case['side']}x{case['side']}, float32, batch {case['batch']}, "
        f"{_threads(found[0].threads)}; images a second and peak memory:",
        "",
        "| | inference | training step | memory, inference | memory, training |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        images, peak = result["units"][row.subject], result["peak_bytes"].get(row.subject, {})
        cells = [rate_text(images, row.times.get(run_name), True) for run_name in ("inference", "training_step")]
        cells += [
            memory_text(v) if isinstance(v := peak.get(run_name), int) else ""
            for run_name in ("inference", "training_step")
        ]
        lines.append(f"| {models.TITLES[row.subject]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shapes(run: dict[str, Any]) -> str | None:
    """Our shares on every shape, folded away."""
    names = [result["name"] for result in run["results"] if result["kind"] == "attention"]
    chosen = [name for name in names if not name.startswith("overhead/")]
    if not chosen:
        return None
    threads = run["threads"]
    head = " | ".join(_threads(t) for t in threads)
    lines = [
        "<details><summary>Every shape: useful FLOP as a share of <code>torch.mm</code>'s rate</summary>",
        "",
        f"| forward / backward | {head} |",
        "|---" * (len(threads) + 1) + "|",
    ]
    for name in chosen:
        result = find(run, name)
        assert result is not None
        ours = {row.threads: row for row in rows(result) if row.subject == "nbhd"}
        cells = [
            f"{number(ours[t].shares.get('forward'), True)} / {number(ours[t].shares.get('backward'), True)}"
            if t in ours
            else ""
            for t in threads
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "</details>"])


def _times(row: Row | None) -> str:
    if row is None or "forward" not in row.times:
        return ""
    both = row.times.get("both")
    return (
        f"{significant(row.times['forward'].median * 1e3)} / {'-' if both is None else significant(both.median * 1e3)}"
    )


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"
