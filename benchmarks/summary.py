"""Medians, spreads, shares and ratios, computed from a run's raw samples whenever they are shown; never stored."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float | None]) -> Spread | None:
        """Of the samples that are there; None without any."""
        present = [s for s in samples if s is not None]
        if not present:
            return None
        if len(present) < 2:
            return cls(present[0], present[0], present[0])
        low, median, high = statistics.quantiles(present, n=4, method="inclusive")
        return cls(median, low, high)

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Row:
    """One subject of a case at one number of threads; seconds a call. None where there is no such measurement."""

    case: str
    threads: int
    subject: str
    times: dict[str, Spread]  # quantity -> seconds
    shares: dict[str, Spread]  # forward, backward -> share of torch.mm's rate on useful FLOP
    ratios: dict[str, Spread]  # quantity -> this subject's time over the first one's, same round, per unit
    first_at_one: dict[str, Spread]  # quantity -> time at one thread over time at this number: the first subject only


def rows(result: dict[str, Any]) -> list[Row]:
    """The rows of one case of a run."""
    first = result["first"]
    one = result["samples"].get("1")
    found = []
    for threads, here in result["samples"].items():
        ours = quantities(here["subjects"].get(first, {}))
        rates = here["mm_flop_per_s"]
        for name, samples in here["subjects"].items():
            times = quantities(samples)
            units = result["units"][name] / result["units"][first]
            ratios = {}
            if name != first:
                ratios = {q: _pairs(times[q], ours[q], 1 / units) for q in times if q in ours}
            shares = {}
            for quantity, flop in result["useful_flop"].items():
                # Work of another shape (fewer or more queries) has as much useful FLOP a query.
                if quantity in times:
                    shares[quantity] = Spread.of(
                        [
                            None if s is None else flop * units / s / rate
                            for s, rate in zip(times[quantity], rates, strict=True)
                        ]
                    )
            gained = {}
            if name == first and threads != "1" and one is not None and first in one["subjects"]:
                alone = quantities(one["subjects"][first])
                gained = {q: _pairs(alone[q], times[q]) for q in times if q in alone}
            found.append(
                Row(
                    result["name"],
                    int(threads),
                    name,
                    _present({q: Spread.of(s) for q, s in times.items()}),
                    _present(shares),
                    _present(ratios),
                    _present(gained),
                )
            )
    return found


def quantities(samples: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """A subject's samples, with ``both``: forward and backward of a training call."""
    found = dict(samples)
    if "recording" in found and "backward" in found:
        found["both"] = [
            None if a is None or b is None else a + b
            for a, b in zip(found["recording"], found["backward"], strict=True)
        ]
    return found


def _pairs(top: list[float | None], bottom: list[float | None], factor: float = 1.0) -> Spread | None:
    """The spread of the ratios of samples of the same round."""
    pairs: list[float | None] = [
        factor * a / b for a, b in zip(top, bottom, strict=False) if a is not None and b is not None
    ]
    return Spread.of(pairs)


def _present(entries: dict[str, Spread | None]) -> dict[str, Spread]:
    return {key: value for key, value in entries.items() if value is not None}


def find(run: dict[str, Any], case: str) -> dict[str, Any] | None:
    """A case of a run by name."""
    return next((result for result in run["results"] if result["name"] == case), None)
