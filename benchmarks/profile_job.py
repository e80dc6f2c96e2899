"""Where the time of a whole job goes, by kind of operation, and what is left to the machine's ceiling.

    python benchmarks/profile_job.py                                       # C3D, 16 frames, in every precision
    python benchmarks/profile_job.py "s3d, 16 frames" --precision ieee bfloat16

Time is each operation's own, as torch.profiler counts it; what no operation took is Python's and the allocator's. A fused
operation takes denominators z and adjoint at once; where frozen clips are collapsed, z is a convolution like those of the forward
pass. The floor is what the arithmetic that was done takes at the rate of a matrix product.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import networks
import torch
from explanations import ceiling, discriminator, ours, warm_up
from networks import Question
from timing import ceilings
from torch.profiler import ProfilerActivity, profile

from captum_dtd.kernels import Precision

KINDS = {
    "forward, collapsed z": (
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
        *("captum_dtd::max_pool3d_relevance", "aten::max_pool3d", "aten::max_pool3d_with_indices", "aten::avg_pool3d"),
        *("aten::avg_pool3d_backward", "aten::mean", "aten::sum", "aten::adaptive_avg_pool3d"),
    ),
    "elementwise": tuple(
        f"aten::{name}{suffix}"
        for name in ("add", "sub", "mul", "div", "clamp", "clamp_min", "relu", "where", "masked_fill", "neg", "abs")
        for suffix in ("", "_")
    )
    + tuple(f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "any", "all", "isfinite", "logical_or")),
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


def parts(events: Iterable[Any], wall: float) -> list[Part]:
    """Sum a profile's events by kind; ``wall`` is how many seconds all took."""
    seconds: defaultdict[str, float] = defaultdict(float)
    flops: defaultdict[str, int] = defaultdict(int)
    for event in events:
        kind = _KIND_OF.get(event.name, "rest")
        seconds[kind] += event.self_cpu_time_total / 1e6
        flops[kind] += flops_of(event.name, event.input_shapes, event.concrete_inputs)
    seconds["Python, allocator"] = max(0.0, wall - sum(seconds.values()))
    order = [*KINDS, "rest", "Python, allocator"]
    return [Part(kind, seconds[kind], flops[kind]) for kind in order]


def flops_of(name: str, shapes: Sequence[Any], values: Sequence[Any]) -> int:
    """Of one operation, from the shapes it was given: convolutions, their adjoints, and linear layers."""
    if name in ("captum_dtd::conv3d", "aten::convolution"):
        x, weight = shapes[:2]
        stride, padding, dilation = values[3:6]
        before = padding if len(padding) == len(stride) else padding[::2]
        after = padding if len(padding) == len(stride) else padding[1::2]
        outputs = [
            (n + p + q - d * (k - 1) - 1) // s + 1
            for n, p, q, k, s, d in zip(x[2:], before, after, weight[2:], stride, dilation, strict=True)
        ]
        return int(2 * x[0] * math.prod(outputs) * math.prod(weight))
    if name == "captum_dtd::z_plus_conv3d":
        weight, relevance, divided = shapes[1], shapes[3], values[10]
        return int((2 if divided else 4) * math.prod(relevance) * math.prod(weight[1:]))
    if name == "captum_dtd::z_beta_conv3d":  # on twice the channels
        weight, relevance, divided = shapes[3], shapes[5], values[11]
        return int((4 if divided else 8) * math.prod(relevance) * math.prod(weight[1:]))
    if name == "captum_dtd::frozen_conv3d":
        weight, reads, times = shapes[1], values[3], values[4]
        stride, padding, dilation = values[5:8]
        size = [
            (n + p + q - d * (k - 1) - 1) // s + 1
            for n, p, q, k, s, d in zip(
                shapes[0][3:], padding[2::2], padding[3::2], weight[3:], stride[1:], dilation[1:], strict=True
            )
        ]
        return 2 * products(reads, shapes[0][0], times, weight[2]) * math.prod(size) * math.prod(weight) // weight[2]
    if name in ("captum_dtd::frozen_z_plus_conv3d", "captum_dtd::frozen_z_beta_conv3d"):
        at = 0 if name == "captum_dtd::frozen_z_plus_conv3d" else 2  # z-beta has bounds, and twice the channels
        weight, relevance, reads, gives = shapes[1 + at], shapes[3 + at], values[4 + at], values[5 + at]
        divided = values[13] if at == 0 else values[14]
        tables = (gives,) if divided else (reads, gives)
        taken = sum(products(table, relevance[0], relevance[2], weight[2]) for table in tables)
        return (2 if at == 0 else 4) * taken * math.prod(relevance[3:]) * math.prod(weight) // weight[2]
    if name == "aten::addmm":
        (rows, inner), outputs = shapes[1], shapes[2][1]
        return int(2 * rows * inner * outputs)
    return 0


def products(table: Sequence[int], n: int, times: int, taps: int) -> int:
    """How many products of a frame and a tap a table asks for, over all examples: what several times share is taken once."""
    rows = [table[at : at + times * taps] for at in range(0, len(table), times * taps)]
    taken = [
        len({(tap, time) for tap in range(taps) for time in row[tap::taps]} - {(tap, -1) for tap in range(taps)})
        for row in rows
    ]
    return sum(taken) if len(rows) == n else n * sum(taken)


def profiled(question: Question, precision: Precision) -> tuple[list[Part], float]:
    """The parts of a whole job, and how many seconds it takes when nobody profiles it."""
    method = discriminator(ours(precision), question)
    warm_up(method, question)
    begun = time.perf_counter()
    method.attribute(question.clips, question.target)
    alone = time.perf_counter() - begun
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        method.attribute(question.clips, question.target)
        wall = time.perf_counter() - begun
    return parts(profiler.events() or (), wall), alone


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
