"""A table and plots of a benchmark's record, written beside it.

python benchmarks/report.py benchmarks/results/bench_2026-11-25_amx_bf16.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import networks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]

YARDSTICKS = ("zennit", "plain torch")
"""Whom ours is told to be so many times as fast as: the first of these that is right."""


def write(record: Record, path: Path) -> list[Path]:
    """Write the table and those plots for which the record has enough points; their paths.

    Args:
        record: what measure.py found.
        path: where it is written; the table is beside it with the suffix .md, plots are named after it.
    """
    table = path.with_suffix(".md")
    plots = [plot for curve in CURVES if (plot := drawn(record["cases"], curve, path)) is not None]
    pictures = [f"![{plot.stem}]({plot.name})" for plot in plots]
    table.write_text("\n\n".join([*sections(record), *pictures]) + "\n")
    return [table, *plots]


# --- the table ---------------------------------------------------------------------------------------------------------


def sections(record: Record) -> Iterator[str]:
    """The Markdown text, section by section."""
    about, protocol = record["machine"], record["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    ceilings = ", ".join(f"{rate} in {name}" for name, rate in record["ceilings_gflops"].items())
    yield f"# Benchmarks of {about['date']}"
    yield (
        f"{about['cpu']}, {about['feature_level']}, {about['threads']} thread(s); commit {about['commit']}; {versions}. Matrix "
        f"products reach {ceilings} GFLOP/s. Medians of at least {protocol['repetitions']} runs in turn (fewer once a "
        f"contender has run for {protocol['patience']:g} s), quartiles in brackets."
    )
    if protocol["small"]:
        yield "A smoke test on thin networks and tiny layers: the times mean nothing."
    if record["left_out"]:
        yield f"Left out, for lack of time if nothing else is said: {', '.join(record['left_out'])}."
    goals = [row for row in record["summary"] if "goal" in row]
    if goals:
        yield "## What was aimed at\n\n" + "\n".join(_goals(goals))
    explained = [case for case in record["cases"] if case["kind"] == "explanation"]
    if explained:
        yield (
            "## Whole explanations\n\nThe job is 1 + T explanations; a peer's is extrapolated, (1 + T) times its median single "
            "one, where it says so. An answer is compared with ours in float64 by the same rules: relative L2 error. Memory is "
            "the peak of the resident set at work, above weights, and what is kept between calls (traces, packed weights); of a "
            "job with one clip at a time. The share of the ceiling counts the work of explaining every clip in full: what is "
            "saved lifts it, above 100 % perhaps."
        )
    for case in explained:
        jobs = (job for job in record["cases"] if job["kind"] == "job" and _same_workload(job, case))
        yield "\n".join(_workload(case, next(jobs, None)))
    operations = [row for row in record["summary"] if row["kind"].partition(" / ")[0] in OPERATIONS]
    if operations:
        yield "## Single operations\n\n" + "\n".join(_operations(operations))


OPERATIONS = ("convolution layers", "grouped layers", "linear layers", "pixel layers", "max pooling", "additions")


def _same_workload(job: Record, case: Record) -> bool:
    return all(job[what] == case[what] for what in ("network", "frames", "size", "clips"))


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _header(*names: str) -> Iterator[str]:
    yield _row(names)
    yield _row("---" for _ in names)


def _goals(rows: Sequence[Record]) -> Iterator[str]:
    yield from _header("comparison", "precision", "worst", "geometric mean", "goal", "")
    for row in rows:
        goal = f"{row['goal']['worst']:g}, {row['goal']['geometric_mean']:g}"
        reached = "met" if row["met"] else "missed"
        yield _row(
            [row["kind"], row["precision"], f"{row['worst']:.2f}", f"{row['geometric_mean']:.2f}", goal, reached]
        )


def _operations(rows: Sequence[Record]) -> Iterator[str]:
    yield "How many times as fast as the best of the others, by medians.\n"
    yield from _header("comparison", "precision", "layers", "worst", "geometric mean", "worst at")
    for row in rows:
        mean = f"{row['geometric_mean']:.2f}"
        yield _row([row["kind"], row["precision"], row["cases"], f"{row['worst']:.2f}", mean, row["worst_case"]])


def _workload(case: Record, job: Record | None) -> Iterator[str]:
    contenders = case["contenders"]
    right = [name for name in YARDSTICKS if contenders.get(name, {}).get("verdict") == "agrees"]
    yardstick = right[0] if right else None
    yield f"### {case['case'].removesuffix(', explanation')}\n"
    yield f"One explanation is {case['gflop']:g} GFLOP.\n"
    than = f"times as fast as {yardstick}" if yardstick else "times as fast"
    yield from _header(
        "contender",
        "one explanation, ms",
        "whole job, s",
        f"{than}: one, job",
        "answer",
        "MiB at work + kept: one, job",
        "of ceiling",
    )
    for name, one in contenders.items():
        whole = job["contenders"][name] if job else None
        pair = [(one, case), *([(whole, job)] if job and whole else [])]
        ratios = [
            f"{every['contenders'][yardstick]['median_ms'] / found['median_ms']:.2f}" if yardstick else ""
            for found, every in pair
        ]
        memory = [f"{found['peak_mib']:.0f} + {found['kept_mib']:.0f}" for found, _ in pair if "peak_mib" in found]
        yield _row(
            [
                name,
                _time(one, 1),
                _time(whole, 1e-3) + (", extrapolated" if whole.get("extrapolated") else "") if whole else "",
                ", ".join(ratios),
                _answer(one, whole),
                ", ".join(memory),
                ", ".join(f"{100 * found['share_of_ceiling']:.0f} %" for found, _ in pair),
            ]
        )


def _time(found: Record, unit: float) -> str:
    first, median, third = (unit * found[f"{which}_ms"] for which in ("first_quartile", "median", "third_quartile"))
    return f"{median:.4g} ({first:.4g} to {third:.4g})"


def _answer(one: Record, whole: Record | None) -> str:
    if "error" not in one:
        return str(one["verdict"])
    if one["verdict"] == "wrong":
        return (
            f"**wrong**: off by {one['error']:g} times what is right, sums to {one['sum_over_score']:g} times the score"
        )
    temporal = f", temporal {whole['temporal_error']:.1e}" if whole and "temporal_error" in whole else ""
    return f"agrees, {one['error']:.1e}{temporal}"


# --- plots -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Cost against one of a workload's numbers.

    Attributes:
        name: ends the plot's file name.
        along: the number: "frames", "size" or "clips".
        kind: "explanation" or "job".
        label: of the horizontal axis.
        cost: seconds and the number to what is drawn.
        unit: of that.
    """

    name: str
    along: str
    kind: str
    label: str
    cost: Callable[[float, int], float]
    unit: str


CURVES = (
    Curve("frames", "frames", "job", "frames", lambda seconds, _: seconds, "whole job, s"),
    Curve(
        "pixels", "size", "explanation", "height and width, pixels", lambda seconds, _: seconds, "one explanation, s"
    ),
    Curve(
        "clips", "clips", "explanation", "clips at once", lambda seconds, clips: seconds / clips, "one explanation, s"
    ),
)


def drawn(cases: Sequence[Record], curve: Curve, path: Path) -> Path | None:
    """Draw a curve for every network that has more than one point; the plot's path, or None if there is no such network."""
    lines = {name: found for name in _networks(cases) if (found := _points(cases, curve, name))}
    if not lines:
        return None
    names = list(dict.fromkeys(name for contenders in lines.values() for name in contenders))
    figure, every = plt.subplots(
        1, len(lines), figsize=(3.2 * len(lines) + 2, 3.4), squeeze=False, layout="constrained"
    )
    for axes, (network, contenders) in zip(every[0], lines.items(), strict=True):
        for name, points in contenders.items():
            style = "-o" if name.startswith("captum_dtd") else "--s"
            axes.plot(
                *zip(*sorted(points), strict=True), style, color=f"C{names.index(name)}", markersize=3, label=name
            )
        ticks = sorted({number for points in contenders.values() for number, _ in points})
        axes.set(title=network, xlabel=curve.label, ylabel=curve.unit, xscale="log", yscale="log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    shown = {line.get_label(): line for axes in every[0] for line in axes.lines}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize="x-small")
    plot = path.with_name(f"{path.stem}_{curve.name}.svg")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(plot, metadata={"Date": None})
    plt.close(figure)
    return plot


def _networks(cases: Sequence[Record]) -> list[str]:
    measured = {case["network"] for case in cases if "network" in case}
    return [name for name in dict.fromkeys(w.network.name for w in networks.WORKLOADS) if name in measured]


def _points(cases: Sequence[Record], curve: Curve, network: str) -> dict[str, list[tuple[int, float]]]:
    """By contender its points, where it has more than one; the other numbers are those of the network's usual clip."""
    found: dict[str, list[tuple[int, float]]] = {}
    of_network = [case for case in cases if case.get("network") == network and case["kind"] == curve.kind]
    for case in of_network:
        if _usual(case, of_network, curve.along):
            for name, told in case["contenders"].items():
                number = case[curve.along]
                found.setdefault(name, []).append((number, curve.cost(told["median_ms"] / 1e3, number)))
    return {name: points for name, points in found.items() if len(points) > 1}


def _usual(case: Record, of_network: Sequence[Record], along: str) -> bool:
    """Whether a case differs from most of the others that vary along this number in that number alone."""
    others = [what for what in ("frames", "size", "clips") if what != along]
    groups: dict[tuple[int, ...], set[int]] = {}
    for each in of_network:
        groups.setdefault(tuple(each[what] for what in others), set()).add(each[along])
    best = max(groups, key=lambda key: len(groups[key]))
    return tuple(case[what] for what in others) == best


def main(arguments: list[str] | None = None) -> None:
    """Write the table and plots of a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    given = parser.parse_args(arguments)
    print(*write(json.loads(given.record.read_text()), given.record), sep="\n")


if __name__ == "__main__":
    main()
