"""Measure the fused operations and whole explanations against their rivals, in one run, on this machine.

    python benchmarks/measure.py                        # everything; about half an hour on one core
    python benchmarks/measure.py --only "conv4|pool"    # the cases whose name matches
    python benchmarks/measure.py --precision bfloat16 --repetitions 5 --no-compile

Ratios are of medians, rival over ours: above 1 the fused operation is faster. Every case compares our fastest layout with the
fastest rival. The record goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import rivals
import torch
import workloads
from timing import Protocol, Timing, interleaved, machine, protocol_of, timed_by
from torch import Tensor

from captum_dtd import DeepTaylor
from captum_dtd.kernels import Precision

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Goal:
    """What is aimed at: the worst ratio of all cases, and their geometric mean."""

    worst: float
    mean: float


GOALS: dict[tuple[str, str], Goal] = {
    ("convolution layers / best composition", "float32"): Goal(0.95, 1.3),
    ("convolution layers / best composition", "bfloat16"): Goal(0.95, 1.4),
    ("pixel layers / three convolutions and adjoints", "float32"): Goal(3, 3),
    ("pixel layers / three convolutions and adjoints", "bfloat16"): Goal(3, 3),
    ("max pooling / average pooling and its adjoint", "float32"): Goal(5, 5),
    ("max pooling / average pooling and its adjoint", "bfloat16"): Goal(5, 5),
    ("explanation of C3D / zennit", "float32"): Goal(4, 4),
    ("explanation of C3D / zennit", "ieee"): Goal(2.7, 2.7),
    ("explanation of C3D / zennit", "bfloat16"): Goal(16, 16),
}
"""By kind of comparison and precision. What has no goal is measured for information."""

Contenders = dict[str, Callable[[], Tensor]]


@dataclass
class Case:
    """Contenders that compute the same, to be timed in turn, and which of them are compared.

    Attributes:
        name: of the layer or network.
        precision: of ours.
        flops: of one run, to tell the rate; 0 if not counted.
        reference: what the results are compared with, to show that all compute the same.
        contenders: everything that is timed.
        comparisons: (kind, precision, ours, rivals), the last two being names of contenders.
        others: contenders whose relevance is another by definition, and is not compared with the reference.
    """

    name: str
    precision: str
    flops: int
    reference: Callable[[], Tensor]
    contenders: Contenders = field(default_factory=dict)
    comparisons: list[tuple[str, str, list[str], list[str]]] = field(default_factory=list)
    others: frozenset[str] = frozenset()

    def add(self, kind: str, precision: str, ours: Contenders, theirs: Contenders) -> None:
        """Compare the best of ours with the best of theirs."""
        self.contenders |= ours | theirs
        if ours and theirs:
            self.comparisons.append((kind, precision, list(ours), list(theirs)))


def layer_cases(
    precisions: list[Precision], wanted: Callable[[str], bool], small: bool, compiled: bool
) -> Iterator[Case]:
    """Every layer in every precision; tensors are made when a case is asked for and die with it."""
    for layer in workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS:
        for precision in precisions:
            if wanted(f"{layer} {precision}"):
                yield _convolution_case(workloads.reduced(layer) if small else layer, precision, compiled)
    for layer in workloads.PIXEL_LAYERS:
        for precision in precisions:
            if wanted(f"{layer} pixels {precision}"):
                yield _pixel_case(workloads.reduced(layer) if small else layer, precision, compiled)
    for pool in workloads.POOLINGS:
        for precision in precisions:
            if wanted(f"{pool} {precision}"):
                yield _pooling_case(workloads.reduced_pooling(pool) if small else pool, precision, compiled)


def _convolution_case(layer: workloads.Convolution, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype)
    kernel = workloads.chosen("z_plus_conv3d", layer, dtype, precision)
    case = Case(str(layer), precision, layer.flops, partial(workloads.z_plus, layer, given, "reference"))
    theirs = _by_name(rivals.z_plus_rivals(layer, given, compiled))
    kind = "linear layers" if workloads.shape_class(layer) == "linear" else "convolution layers"
    case.add(f"{kind} / best composition", precision, _ours(layer, given, kernel, workloads.z_plus), theirs)
    return case


def _pixel_case(layer: workloads.Convolution, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype, pixels=True)
    kernel = workloads.chosen("z_beta_conv3d", layer, dtype, precision)
    reference = partial(workloads.z_beta, layer, given, "reference")
    case = Case(f"{layer} pixels", precision, 2 * layer.flops, reference)
    ours = _ours(layer, given, kernel, workloads.z_beta)
    three = _by_name(rivals.z_beta_rivals(layer, given))
    lifted = {f"lifted {n}": run for n, run in _by_name(rivals.lifted_z_beta_rivals(layer, given, compiled)).items()}
    case.add("pixel layers / three convolutions and adjoints", precision, ours, three)
    case.add("pixel layers / best composition", precision, ours, three | lifted)
    return case


def _pooling_case(layer: workloads.Pooling, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    x, relevance = workloads.draw_pooling(layer, dtype)
    kernel = workloads.chosen("max_pool3d_relevance", layer, dtype, precision)
    reference = partial(workloads.max_pool, layer, x, relevance, "reference")
    case = Case(str(layer), precision, 0, reference)
    ours: Contenders = {}
    for layout, memory_format in rivals.LAYOUTS.items():
        u, given = (t.contiguous(memory_format=memory_format) for t in (x, relevance))
        ours[f"captum_dtd {kernel}, {layout}"] = partial(workloads.max_pool, layer, u, given, kernel)
    pooled = _by_name(rivals.max_pool_rivals(layer, x, relevance))
    blocks = _by_name(rivals.block_max_pool_rivals(layer, x, relevance, compiled))
    case.add("max pooling / average pooling and its adjoint", precision, ours, pooled)
    case.add("max pooling / best composition", precision, ours, pooled | blocks)
    return case


def _ours(
    layer: workloads.Convolution,
    given: workloads.Tensors,
    kernel: str,
    operation: Callable[[workloads.Convolution, workloads.Tensors, str], Tensor],
) -> Contenders:
    return {
        f"captum_dtd {kernel}, {layout}": partial(operation, layer, given.in_layout(memory_format), kernel)
        for layout, memory_format in rivals.LAYOUTS.items()
    }


def _by_name(found: list[rivals.Rival]) -> Contenders:
    return {rival.name: rival.run for rival in found}


def explanation_cases(precision: Precision, small: bool) -> Iterator[Case]:
    """One explanation of C3D: ours against the plain walk, against Captum's LRP, and against zennit.

    Each rival and each precision by itself, as a user runs them: memory that one keeps, and packed weights of several
    precisions that push each other out of their cache, would weigh on the others.
    """
    model = workloads.c3d(thinner=16 if small else 1)
    clip, target = workloads.pixels(), 7
    low, high = (torch.tensor(bound).view(1, 3, 1, 1, 1) for bound in (workloads.LOW, workloads.HIGH))
    plain = partial(DeepTaylor(model, workloads.LOW, workloads.HIGH, backend="reference").attribute, clip, target)
    theirs: dict[str, Callable[[], Contenders]] = {
        "plain torch": lambda: {"plain torch": plain},
        "captum": lambda: {"captum": rivals.captum_walk(rivals.one_by_one(model), clip, target)},
    }
    if importlib.util.find_spec("zennit"):
        theirs["zennit"] = lambda: {"zennit": rivals.zennit_walk(rivals.one_by_one(model), clip, target, low, high)}
    else:
        print("zennit is not installed: C3D is explained without it")
    for name, rival in theirs.items():
        ours = partial(DeepTaylor(model, workloads.LOW, workloads.HIGH, precision=precision).attribute, clip, target)
        others = frozenset() if name == "plain torch" else frozenset({name})
        case = Case(f"C3D explained, {name}", precision, 0, plain, others=others)
        case.add(f"explanation of C3D / {name}", precision, {f"captum_dtd {precision}": ours}, rival())
        yield case


def measured(case: Case, protocol: Protocol) -> dict[str, Any]:
    """Time a case; everything that is known about it afterwards."""
    right = case.reference().double()
    errors = {name: _error(run(), right) for name, run in case.contenders.items()}  # and warm up
    timings = interleaved(case.contenders, protocol)
    return {
        "case": case.name,
        "precision": case.precision,
        "comparisons": [
            _compared(kind, precision, timings, ours, theirs) for kind, precision, ours, theirs in case.comparisons
        ],
        "contenders": {
            name: {
                **timing.record(),
                **({"gflops": round(case.flops / timing.median / 1e9, 1)} if case.flops else {}),
                **({"error": float(f"{errors[name]:.2g}")} if name not in case.others else {}),
            }
            for name, timing in timings.items()
        },
    }


def _error(result: Tensor, right: Tensor) -> float:
    """Relative L2 distance of a result from the definition's."""
    return float((result.double() - right).norm() / right.norm())


def _compared(
    kind: str, precision: str, timings: dict[str, Timing], ours: list[str], theirs: list[str]
) -> dict[str, Any]:
    best, rival = (min(names, key=lambda name: timings[name].median) for names in (ours, theirs))
    ratio = timings[rival].median / timings[best].median
    return {"kind": kind, "precision": precision, "ours": best, "rival": rival, "ratio": round(ratio, 3)}


def summary(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def show(record: dict[str, Any]) -> None:
    """Print one case: every contender, the fastest first, and the ratios."""
    print(f"\n{record['case']}  {record['precision']}")
    for name, found in sorted(record["contenders"].items(), key=lambda item: float(item[1]["median_ms"])):
        spread = found["third_quartile_ms"] - found["first_quartile_ms"]
        rate = f"{found['gflops']:8.1f} GFLOP/s" if "gflops" in found else " " * 16
        error = f"error {found['error']:.1e}" if "error" in found else " " * 13
        print(f"  {found['median_ms']:10.3f} ms +- {spread:8.3f} {rate}  {error}  {name}")
    for compared in record["comparisons"]:
        print(f"  {compared['ratio']:6.2f} x  {compared['kind']}, {compared['precision']}")


def show_summary(rows: list[dict[str, Any]]) -> None:
    """Print the summary's table."""
    width = max((len(row["kind"]) for row in rows), default=4)
    print(f"\n{'kind':{width}}  {'precision':9}  cases  worst   mean  goal          worst at")
    for row in rows:
        goal = ""
        if "goal" in row:
            aimed = row["goal"]
            goal = f"{aimed['worst']:g}, {aimed['geometric_mean']:g} {'met' if row['met'] else 'missed'}"
        print(
            f"{row['kind']:{width}}  {row['precision']:9}  {row['cases']:5}  {row['worst']:5.2f}  "
            f"{row['geometric_mean']:5.2f}  {goal:16}  {row['worst_case']}"
        )


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the record; its path."""
    precisions = get_args(Precision)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed_by(parser, Protocol())
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="regular expression that a case's name and precision must match")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rivals that torch.compile makes")
    parser.add_argument("--out", type=Path, help="file for the record")
    given = parser.parse_args(arguments)
    protocol = protocol_of(given, parser)
    about = machine()
    pattern = re.compile(given.only)

    def wanted(name: str) -> bool:
        return pattern.search(name) is not None

    found = []
    with torch.no_grad():
        for case in layer_cases(given.precision, wanted, given.small, not given.no_compile):
            found.append(measured(case, protocol))
            show(found[-1])
            del case  # before the next is drawn
            torch._dynamo.reset()
        if wanted("C3D explained"):
            for precision in [p for p in precisions if p in given.precision or p == "ieee"]:
                for case in explanation_cases(precision, given.small):
                    found.append(measured(case, protocol))
                    show(found[-1])
    rows = summary(found)
    show_summary(rows)
    path = given.out or RESULTS / f"cpu_kernels_{about['date']}_{about['feature_level']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {
        "repetitions": protocol.repetitions,
        "seconds": protocol.seconds,
        "clock": protocol.clock,
        "order": "contenders in turn",
        "small": given.small,
    }
    record = {"machine": about, "protocol": how, "summary": rows, "cases": found}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return path


if __name__ == "__main__":
    main()
