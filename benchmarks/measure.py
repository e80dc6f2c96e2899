"""Measure whole explanations and single operations against what else computes them, in one run, on this machine.

    python benchmarks/measure.py                               # everything; at most 40 minutes
    python benchmarks/measure.py --only "C3D, 16|conv4"        # the workloads and layers whose name matches
    python benchmarks/measure.py --threads 2                   # on two threads
    python benchmarks/measure.py --compare old.json            # exit code 1 where something became slower than noise explains

Ratios are of medians, rival over ours: above 1 ours is faster. The record goes to benchmarks/results/, and beside it a table and
plots of it (report.py). It is written after every case, so that what was measured is kept if the run is stopped. The exit code
is 1 too where an answer of ours is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import compare
import memory
import networks
import operations
import report
import torch
from explanations import Contest
from networks import Workload
from timing import Protocol, ceilings, machine, protocol_of, timed_by

from captum_dtd.kernels import Precision

RESULTS = Path(__file__).with_name("results")

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What is aimed at: the worst ratio of all cases, and their geometric mean."""

    worst: float
    mean: float


def _job_goals(workload: str, peer: str, **ratios: float) -> dict[tuple[str, str], Goal]:
    return {(f"job of {workload} / {peer}", precision): Goal(ratio, ratio) for precision, ratio in ratios.items()}


GOALS: dict[tuple[str, str], Goal] = {
    ("convolution layers / best composition", "float32"): Goal(0.95, 1.3),
    ("convolution layers / best composition", "bfloat16"): Goal(0.95, 1.4),
    ("pixel layers / three convolutions and adjoints", "float32"): Goal(3, 3),
    ("pixel layers / three convolutions and adjoints", "bfloat16"): Goal(3, 3),
    ("max pooling / average pooling and its adjoint", "float32"): Goal(5, 5),
    ("max pooling / average pooling and its adjoint", "bfloat16"): Goal(5, 5),
    ("explanation of C3D, 16 frames / zennit", "float32"): Goal(4, 4),
    ("explanation of C3D, 16 frames / zennit", "bfloat16"): Goal(16, 16),
    **_job_goals("C3D, 16 frames", "zennit", ieee=6, float32=12, mixed=18, bfloat16=36),
    **_job_goals("C3D, 32 frames", "zennit", ieee=9, float32=20, mixed=30, bfloat16=55),
    **_job_goals("r3d_18, 16 frames", "plain torch", ieee=2.2, bfloat16=12),
    **_job_goals("s3d, 16 frames", "zennit", float32=5, bfloat16=15),
}
"""By kind of comparison and precision, for a CPU with AMX. What has no goal is measured for information."""


@dataclass(frozen=True)
class Task:
    """A case that is yet to be measured: its name, and what gives its records."""

    name: str
    measure: Callable[[], list[Record]]


def tasks(given: argparse.Namespace, protocol: Protocol, peaks: dict[str, float]) -> Iterator[Task]:
    """Everything that ``--only`` lets through, the most important first."""
    pattern = re.compile(given.only)

    def wanted(name: str) -> bool:
        return pattern.search(name) is not None

    def of(workload: Workload) -> Task:
        return Task(str(workload), partial(_explained, workload, given, protocol, peaks))

    workloads = [workload for workload in networks.WORKLOADS if wanted(str(workload))]
    aimed_at = [workload for workload in workloads if any(f" {workload} /" in kind for kind, _ in GOALS)]
    yield from map(of, aimed_at)
    for name, make in operations.cases(given.precision, given.small, given.compile == "all"):
        if wanted(name):
            yield Task(name, partial(_operated, make, protocol))
    yield from (of(workload) for workload in workloads if workload not in aimed_at)
    yield from (of(workload) for workload in networks.CURVES if wanted(str(workload)))


def _explained(
    workload: Workload, given: argparse.Namespace, protocol: Protocol, peaks: dict[str, float]
) -> list[Record]:
    records = Contest(workload, protocol, peaks, given.small, given.compile != "nothing").records()
    if workload.memory and memory.MEASURABLE:
        for kind, found in memory.peaks(workload, given.small).items():
            for record in records:
                for name in found if record["kind"] == kind else ():
                    record["contenders"][name] |= found[name]
    return records


def _operated(make: Callable[[], operations.Case], protocol: Protocol) -> list[Record]:
    found = operations.measured(make(), protocol)
    torch._dynamo.reset()
    return [found]


def summary(cases: list[Record]) -> list[Record]:
    """Worst ratio and geometric mean of every kind of comparison in every precision, beside what is aimed at."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case in cases:
        for comparison in case["comparisons"]:
            key = comparison["kind"], comparison["precision"]
            groups.setdefault(key, []).append((comparison["ratio"], case["case"]))
    rows = []
    for (kind, precision), found in groups.items():
        worst, where = min(found)
        mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
        row = {"kind": kind, "precision": precision, "cases": len(found), "worst": worst, "worst_case": where}
        row["geometric_mean"] = round(mean, 3)
        goal = GOALS.get((kind, precision))
        if goal:
            row["goal"] = {"worst": goal.worst, "geometric_mean": goal.mean}
            row["met"] = worst >= goal.worst and mean >= goal.mean
        rows.append(row)
    return rows


def show(record: Record) -> None:
    """Print one case: every contender, the fastest first."""
    print(f"\n{record['case']}")
    for name, found in sorted(record["contenders"].items(), key=lambda item: float(item[1]["median_ms"])):
        spread = found["third_quartile_ms"] - found["first_quartile_ms"]
        rate = f"{found['gflops']:8.1f} GFLOP/s" if "gflops" in found else " " * 16
        error = f"error {found['error']:.1e}" if "error" in found else " " * 13
        remarks = [found.get("verdict", ""), "extrapolated" if found.get("extrapolated") else ""]
        told = ", ".join(remark for remark in remarks if remark not in ("", "agrees"))
        print(f"  {found['median_ms']:10.3f} ms +- {spread:8.3f} {rate}  {error}  {name}{told and f'  ({told})'}")
    print(flush=True)


def show_goals(rows: list[Record]) -> None:
    """Print what was aimed at, and what was reached."""
    aimed = [row for row in rows if "goal" in row]
    width = max((len(row["kind"]) for row in aimed), default=0)
    if aimed:
        print(f"\n{'kind':{width}}  {'precision':9}  cases  worst   mean  goal")
    for row in aimed:
        goal = f"{row['goal']['worst']:g}, {row['goal']['geometric_mean']:g} {'met' if row['met'] else 'missed'}"
        found = f"{row['cases']:5}  {row['worst']:5.2f}  {row['geometric_mean']:5.2f}"
        print(f"{row['kind']:{width}}  {row['precision']:9}  {found}  {goal}")


def wrong(cases: list[Record]) -> list[str]:
    """Where an answer of ours is wrong."""
    return [
        f"{case['case']}: {name} is off by {found['error']:.1e}"
        for case in cases
        for name, found in case["contenders"].items()
        if name.startswith("captum_dtd") and found.get("verdict") == "wrong"
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the record; the exit code."""
    precisions = get_args(Precision)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed_by(parser, Protocol(repetitions=3, seconds=0.5))
    parser.add_argument(
        "--precision", nargs="+", choices=precisions, default=["float32", "bfloat16"], help="of single operations"
    )
    parser.add_argument("--only", default="", help="regular expression that a workload's or a layer's name must match")
    parser.add_argument(
        "--compile",
        choices=["nothing", "networks", "all"],
        default="networks",
        help="which rivals torch.compile makes as well: of whole explanations, or also of single operations (minutes)",
    )
    parser.add_argument("--minutes", type=float, default=32, help="begin no case after this; what was left out is told")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="a record that this one must not be slower than")
    parser.add_argument("--out", type=Path, help="file for the record")
    given = parser.parse_args(arguments)
    protocol = protocol_of(given, parser)
    begun = time.monotonic()
    about = machine()
    old = json.loads(given.compare.read_text()) if given.compare else None
    if old is not None:
        try:
            compare.check_same_machine(old["machine"], about)
        except ValueError as error:
            parser.error(str(error))
    threads = "" if given.threads == 1 else f"_{given.threads}threads"
    path = given.out or RESULTS / f"bench_{about['date']}_{about['feature_level']}{threads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record: Record = {
        "machine": about,
        "protocol": {
            "repetitions": protocol.repetitions,
            "seconds": protocol.seconds,
            "patience": protocol.patience,
            "clock": protocol.clock,
            "order": "contenders in turn, each round in an order of its own",
            "small": given.small,
        },
        "ceilings_gflops": ceilings(64 if given.small else 1024),
        "left_out": [] if memory.MEASURABLE else [f"peak memory, which needs {memory.RESET}"],
        "summary": [],
        "cases": [],
    }
    with torch.no_grad():
        for task in tasks(given, protocol, record["ceilings_gflops"]):
            minutes = (time.monotonic() - begun) / 60
            if minutes > given.minutes:
                record["left_out"].append(task.name)
                continue
            print(f"--- {minutes:4.1f} min: {task.name}", flush=True)
            found = task.measure()
            record["cases"] += found
            record["summary"] = summary(record["cases"])
            path.write_text(json.dumps(record, indent=1) + "\n")
            for case in found:
                show(case)
    show_goals(record["summary"])
    if record["left_out"]:
        print(f"\nleft out: {', '.join(record['left_out'])}")
    record["minutes"] = round((time.monotonic() - begun) / 60, 1)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\nwritten:", *(path, *report.write(record, path)), sep="\n  ")
    failures = wrong(record["cases"])
    if old is not None:
        failures += map(str, compare.regressions(old, record))
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    # Contenders of several precisions take turns here: none's weights shall make room for another's.
    os.environ.setdefault(memory.WEIGHT_CACHE, "8192")
    raise SystemExit(main())
