"""Tell whether a benchmark became slower, or takes more memory, than an older record says.

    python benchmarks/compare.py OLD.json NEW.json         # exit code 1 on a regression

What is compared is how many times as fast as a rival ours was in the same run: that holds when the machine as a whole is a
little slower. A ratio has regressed if it fell by more than the spreads of its four timings explain.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LEAST_NOISE = 0.05
"""No two runs are trusted to agree better than this."""

MEMORY_NOISE = 0.1
"""Relative: peak memory hardly varies."""


@dataclass(frozen=True)
class Regression:
    """What became worse, from what to what, and which relative change noise would have explained."""

    what: str
    before: float
    after: float
    noise: float

    def __str__(self) -> str:
        return (
            f"regression: {self.what}: {self.before:g} -> {self.after:g}, where noise explains {100 * self.noise:.0f} %"
        )


def spread(contender: Record) -> float | None:
    """Distance of the quartiles over the median; None for what ran once."""
    if contender["runs"] < 2:
        return None
    return float((contender["third_quartile_ms"] - contender["first_quartile_ms"]) / contender["median_ms"])


def widest(record: Record) -> float:
    """The largest spread in a record: what is assumed of contenders that ran once."""
    spreads = (spread(found) for case in record["cases"] for found in case["contenders"].values())
    return max((each for each in spreads if each is not None), default=LEAST_NOISE)


def _ratios(record: Record) -> Iterator[tuple[tuple[str, str, str], float, list[float]]]:
    """Of every comparison its key, its ratio, and the spreads of its two timings."""
    unknown = widest(record)
    for case in record["cases"]:
        for compared in case["comparisons"]:
            spreads = [spread(case["contenders"][compared[side]]) for side in ("ours", "rival")]
            known = [unknown if each is None else each for each in spreads]
            yield (case["case"], compared["kind"], compared["precision"]), compared["ratio"], known


def _peaks(record: Record) -> dict[tuple[str, str], float]:
    return {
        (case["case"], name): found["peak_mib"]
        for case in record["cases"]
        for name, found in case["contenders"].items()
        if name.startswith("captum_dtd") and "peak_mib" in found
    }


def check_same_machine(old: Record, new: Record) -> None:
    """Raise ValueError unless two records' machines are of one kind: on another, other kernels and rivals are fast."""
    for what in ("cpu", "feature_level", "threads"):
        if old[what] != new[what]:
            raise ValueError(f"the records cannot be compared: {what} was {old[what]!r} and is {new[what]!r}")


def regressions(old: Record, new: Record) -> list[Regression]:
    """What is slower against its rival, or takes more memory, in the new record; of what both have measured.

    Raises:
        ValueError: if the records are of different kinds of machine, or numbers of threads.
    """
    check_same_machine(old["machine"], new["machine"])
    found = []
    before = {key: (ratio, spreads) for key, ratio, spreads in _ratios(old)}
    for key, ratio, spreads in _ratios(new):
        if key not in before:
            continue
        earlier, earlier_spreads = before[key]
        noise = max(LEAST_NOISE, math.hypot(*spreads, *earlier_spreads))
        if ratio < earlier / (1 + noise):
            case, kind, precision = key
            what = f"{case}, {precision}: times as fast as {kind.rpartition(' / ')[2]}"
            found.append(Regression(what, earlier, ratio, noise))
    peaks = _peaks(old)
    for (case, name), peak in _peaks(new).items():
        if peak > (1 + MEMORY_NOISE) * peaks.get((case, name), math.inf):
            found.append(Regression(f"{case}, {name}: MiB at most", peaks[case, name], peak, MEMORY_NOISE))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare two records; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (given.old, given.new))
    found = regressions(old, new)
    print("\n".join(map(str, found)) or "nothing became slower than noise explains")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
