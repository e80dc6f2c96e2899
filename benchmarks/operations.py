"""Fused operations on single layers, and what else computes the same from PyTorch's own calls.

Every case compares our fastest layout with the fastest rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import rivals
import workloads
from timing import Protocol, Timing, interleaved
from torch import Tensor

from captum_dtd import native
from captum_dtd.kernels import Precision

Contenders = dict[str, Callable[[], rivals.Result]]


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
        weights: that do not change while contenders are timed, so that what is made of them beforehand serves.
    """

    name: str
    precision: str
    flops: int
    reference: Callable[[], rivals.Result]
    contenders: Contenders = field(default_factory=dict)
    comparisons: list[tuple[str, str, list[str], list[str]]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, kind: str, precision: str, ours: Contenders, theirs: Contenders) -> None:
        """Compare the best of ours with the best of theirs."""
        self.contenders |= ours | theirs
        if ours and theirs:
            self.comparisons.append((kind, precision, list(ours), list(theirs)))


def cases(precisions: Sequence[Precision], small: bool, compiled: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The name of every layer in every precision, and what makes its case: tensors are drawn then, and die with it."""
    for layer in workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS + workloads.GROUPED_LAYERS:
        measured = workloads.reduced(layer) if small else layer
        for precision in precisions:
            yield f"{layer} {precision}", partial(_convolution_case, measured, precision, compiled)
    for layer in workloads.PIXEL_LAYERS:
        measured = workloads.reduced(layer) if small else layer
        for precision in precisions:
            yield f"{layer} pixels {precision}", partial(_pixel_case, measured, precision, compiled)
    for pool in workloads.POOLINGS:
        measured_pool = workloads.reduced_pooling(pool) if small else pool
        for precision in precisions:
            yield f"{pool} {precision}", partial(_pooling_case, measured_pool, precision, compiled)
    for addition in workloads.ADDITIONS:
        measured_addition = workloads.reduced_addition(addition) if small else addition
        for precision in precisions:
            yield f"{addition} {precision}", partial(_addition_case, measured_addition, precision, compiled)


def _convolution_case(layer: workloads.Convolution, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype)
    kernel = workloads.chosen("z_plus_conv3d", layer, dtype, precision)
    reference = partial(workloads.z_plus, layer, given, "reference")
    case = Case(str(layer), precision, layer.flops, reference, weights=[given.weight])
    theirs = _by_name(rivals.z_plus_rivals(layer, given, compiled))
    kinds = {"linear": "linear layers", "grouped": "grouped layers"}
    kind = kinds.get(workloads.shape_class(layer), "convolution layers")
    case.add(f"{kind} / best composition", precision, _ours(layer, given, kernel, workloads.z_plus), theirs)
    return case


def _pixel_case(layer: workloads.Convolution, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    given = workloads.draw(layer, dtype, pixels=True)
    kernel = workloads.chosen("z_beta_conv3d", layer, dtype, precision)
    reference = partial(workloads.z_beta, layer, given, "reference")
    case = Case(f"{layer} pixels", precision, 2 * layer.flops, reference, weights=[given.weight])
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


def _addition_case(layer: workloads.Addition, precision: Precision, compiled: bool) -> Case:
    dtype = workloads.dtype_of(precision)
    given = workloads.draw_addition(layer, dtype)
    kernel = workloads.chosen("z_plus_add", layer, dtype, precision)
    case = Case(str(layer), precision, 0, partial(workloads.summands, *given, "reference"))
    ours: Contenders = {}
    for layout, memory_format in rivals.LAYOUTS.items():
        x, other, relevance = (t.contiguous(memory_format=memory_format) for t in given)
        ours[f"captum_dtd {kernel}, {layout}"] = partial(workloads.summands, x, other, relevance, kernel)
    case.add("additions / elementwise steps", precision, ours, _by_name(rivals.addition_rivals(*given, compiled)))
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


def measured(case: Case, protocol: Protocol) -> dict[str, Any]:
    """Time a case; everything that is known about it afterwards."""
    right = workloads.joined(case.reference()).double()
    with native.unchanging(case.weights):
        errors = {name: _error(workloads.joined(run()), right) for name, run in case.contenders.items()}  # and warm up
        timings = interleaved(case.contenders, protocol)
    return {
        "case": f"{case.name} {case.precision}",
        "kind": "operation",
        "comparisons": [
            _compared(kind, precision, timings, ours, theirs) for kind, precision, ours, theirs in case.comparisons
        ],
        "contenders": {
            name: {
                **timing.record(),
                **({"gflops": round(case.flops / timing.median / 1e9, 1)} if case.flops else {}),
                "error": float(f"{errors[name]:.2g}"),
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
