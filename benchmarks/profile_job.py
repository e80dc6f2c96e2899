"""Where the time of a whole job goes, by kind of operation, and what is left to the machine's ceiling.

    python benchmarks/profile_job.py                                       # C3D, 16 frames, in every precision
    python benchmarks/profile_job.py "s3d, 16 frames" --precision ieee bfloat16

Time is each operation's own, as torch.profiler counts it; what no operation took is Python's and the allocator's. A fused
operation takes denominators z and adjoint at once; where each tap of a frozen layer is one operation, z is a convolution, as on
the way forward. The floor is what the arithmetic that was done takes at the rate of a matrix product.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import networks
import torch
from explanations import ceiling, discriminator, ours, warm_up
from networks import Question
from timing import ceilings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd import ops
from captum_dtd.kernels import Precision

KINDS = {
    "forward": (
        *(
            "captum_dtd::conv3d",
            "captum_dtd::frozen_conv3d",
            "aten::conv3d",
            "aten::convolution",
            "aten::_convolution",
            "aten::mkldnn_convolution",
        ),
        *("aten::slow_conv3d_forward", "aten::_slow_conv3d_forward", "aten::linear", "aten::addmm", "aten::mm"),
    ),
    "z and adjoint": ("captum_dtd::z_plus_conv3d", "captum_dtd::frozen_z_plus_conv3d", "aten::convolution_backward"),
    "pixel layer": ("captum_dtd::z_beta_conv3d", "captum_dtd::frozen_z_beta_conv3d"),
    "pooling": (
        *(
            "captum_dtd::max_pool3d",
            "captum_dtd::frozen_max_pool3d",
            "captum_dtd::max_pool3d_relevance",
            "captum_dtd::frozen_max_pool3d_relevance",
            "aten::max_pool3d",
            "aten::max_pool3d_with_indices",
            "aten::avg_pool3d",
        ),
        *("aten::avg_pool3d_backward", "aten::mean", "aten::sum", "aten::adaptive_avg_pool3d"),
    ),
    "elementwise": tuple(
        f"aten::{name}{suffix}"
        for name in ("add", "sub", "mul", "div", "clamp", "clamp_min", "relu", "where", "masked_fill", "neg", "abs")
        for suffix in ("", "_")
    )
    + tuple(f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "any", "all", "isfinite", "logical_or"))
    + ("captum_dtd::z_plus_add",),
    "copies": tuple(f"aten::{name}" for name in ("copy_", "clone", "contiguous", "cat", "stack", "fill_", "zero_")),
}
"""Operations by what they are to the job; every other one is the rest."""

_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


@dataclass(frozen=True)
class Part:
    """A kind of operation: seconds and floating-point operations it took."""

    kind: str
    seconds: float
    flops: int


def parts(events: Iterable[Any], wall: float, flops: Mapping[str, int]) -> list[Part]:
    """Sum a profile's events by kind; ``wall`` is how many seconds all took, ``flops`` what was counted of each kind."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        seconds[_KIND_OF.get(event.name, "rest")] += event.self_cpu_time_total / 1e6
    seconds["Python, allocator"] = max(0.0, wall - sum(seconds.values()))
    order = [*KINDS, "rest", "Python, allocator"]
    return [Part(kind, seconds[kind], flops.get(kind, 0)) for kind in order]


class Counted(TorchDispatchMode):
    """Counts the floating-point operations of what runs within, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name in _KIND_OF:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
            self.flops[_KIND_OF[schema.name]] += flops_of(schema.name, given, result)
        return result


def flops_of(name: str, given: Mapping[str, Any], result: Any) -> int:
    """Of one operation and its arguments by name: convolutions, their adjoints, and linear layers."""
    if name == "aten::addmm":
        return int(2 * given["mat1"].numel() * result.shape[1])
    if name in ("captum_dtd::conv3d", "aten::convolution"):
        return int(2 * result.numel() * given["weight"][0].numel())
    operation = name.removeprefix("captum_dtd::")
    if operation not in ops.SCHEMAS or not operation.endswith("conv3d"):
        return 0
    weight = given["weight"]
    of_a_tap = weight[:, :, 0].numel()
    if operation == "frozen_conv3d":
        return int(2 * products(given["reads"], result, weight) * of_a_tap * result[0, 0, 0].numel())
    relevance = given["relevance"]
    if operation.startswith("frozen"):
        tables = [given["gives"]] if given["divided"] else [given["reads"], given["gives"]]
        taken = sum(products(table, relevance, weight) for table in tables) * of_a_tap * relevance[0, 0, 0].numel()
    else:
        taken = (1 if given["divided"] else 2) * relevance.numel() * weight[0].numel()
    return int((4 if operation.endswith("z_beta_conv3d") else 2) * taken)  # z-beta is on twice the channels


def products(table: Sequence[int], output: Tensor, weight: Tensor) -> int:
    """How many products of a frame and a tap a table asks for, over all examples: what several times share is taken once."""
    n, times, taps = output.shape[0], output.shape[2], weight.shape[2]
    rows = [table[at : at + times * taps] for at in range(0, len(table), times * taps)]
    taken = [len({(at % taps, time) for at, time in enumerate(row) if time >= 0}) for row in rows]
    return sum(taken) if len(rows) == n else n * sum(taken)


def profiled(question: Question, precision: Precision) -> tuple[list[Part], float]:
    """The parts of a whole job, and how many seconds it takes when nobody profiles it."""
    method = discriminator(ours(precision), question)
    warm_up(method, question)
    method.attribute(question.clips, question.target)  # the second use of weights moves them to huge pages
    begun = time.perf_counter()
    method.attribute(question.clips, question.target)
    alone = time.perf_counter() - begun
    with Counted() as counted:
        method.attribute(question.clips, question.target)
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        method.attribute(question.clips, question.target)
        wall = time.perf_counter() - begun
    return parts(profiler.events() or (), wall, counted.flops), alone


def table(found: Sequence[Part], alone: float, rate: float, whole: int) -> Iterator[str]:
    """Rows of Markdown.

    Args:
        found: the parts of a job.
        alone: seconds it takes when nobody profiles it.
        rate: GFLOP/s that the machine reaches.
        whole: operations of 1 + T explanations in full.
    """
    yield "| operations | ms | share | GFLOP | GFLOP/s | floor, ms |"
    yield "| --- | --- | --- | --- | --- | --- |"
    total = sum(part.seconds for part in found)
    for part in found:
        share = f"{100 * part.seconds / total:.1f} %"
        cells = [part.kind, f"{1e3 * part.seconds:.1f}", share]
        if part.flops:
            work = part.flops / 1e9
            cells += [f"{work:.2f}", f"{work / part.seconds:.1f}", f"{1e3 * work / rate:.1f}"]
        else:
            cells += ["", "", ""]
        yield f"| {' | '.join(cells)} |"
    done = sum(part.flops for part in found)
    floor = done / 1e9 / rate
    yield ""
    yield (
        f"The job takes {1e3 * alone:.1f} ms, its arithmetic would take {1e3 * floor:.1f} ms at {rate:g} GFLOP/s: "
        f"{alone / floor:.1f} times the floor. It did {done / 1e9:.1f} GFLOP; 1 + T explanations in full, of three passes a "
        f"layer, are {whole / 1e9:.1f}."
    )


def main(arguments: list[str] | None = None) -> None:
    """Profile a workload's whole job and print a table for each precision."""
    names = [str(workload) for workload in (*networks.WORKLOADS, *networks.CURVES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workload", nargs="?", default=names[0], choices=names, metavar="WORKLOAD", help="; ".join(names)
    )
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=get_args(Precision))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a thin network: shows that everything runs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    question = networks.named(given.workload).posed(given.small)
    reached = ceilings(64 if given.small else 1024)
    for precision in given.precision:
        found, alone = profiled(question, precision)
        whole = 3 * (1 + question.frames) * question.flops
        rate = ceiling(ours(precision), reached)
        print(f"\n## {given.workload}, {precision}\n", *table(found, alone, rate, whole), sep="\n")


if __name__ == "__main__":
    main()
