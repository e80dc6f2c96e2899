"""Time every kernel on every kind of layer and write the fastest into the committed table (`make tune`).

    python benchmarks/tune.py                 # rewrites this CPU's part of captum_dtd/kernel_table.json
    python benchmarks/tune.py --device cuda   # the GPU's
    python benchmarks/tune.py --only grouped  # only kinds of shape whose name matches

What other kinds of machine have measured stays. A table, not a timing at run time: the same model on the same kind of machine
is always explained by the same kernels. Where two kernels are about equally fast the more precise one is entered.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import workloads
from gpu import Timer, about_gpu
from timing import ROOT, Protocol, interleaved, machine, protocol_of, timed_by
from torch import Tensor
from workloads import ONE_CLIP, Addition, Batch, Convolution, Pooling

from captum_dtd import kernels, native
from captum_dtd.kernels import ARITHMETICS, TRANSFORMED, Precision, transforms

TABLE = ROOT / "captum_dtd" / "kernel_table.json"

PRECISIONS = get_args(Precision)

ABOUT = {
    "what": "The fastest kernel by device, feature level, operation, precision and kind of shape; written by make tune.",
    "how": "Single clips (on a GPU 16), channels last, weights known not to change; least geometric mean over a kind's layers, "
    "within 10 % the more precise.",
    "feature levels": "The best of amx_bf16, avx512_fp16, avx512_bf16, avx512, avx2, generic; sm_<major><minor> of a GPU.",
    "kinds": {
        "grouped": "groups of at most 16 channels",
        "pixels": "at most 4 input channels",
        "linear": "kernel 1x1x1 at one position",
        "pointwise": "kernel 1x1x1 at more positions",
        "strided": "any other with a stride",
        "small": "unit stride, at most 1024 output positions",
        "dense": "unit stride, more positions",
        "any": "operations whose kernels are not told apart by shape",
    },
    "where there is no entry": "captum_dtd/kernels.py has an order.",
}

# A kernel this many times slower than the best on a small layer is not tried on larger ones, unless it is quick anyway.
_HOPELESS = 3.0
_QUICK = 0.02
_ABOUT_EQUAL = 1.1

Times = dict[str, float]
"""Seconds by kernel."""

Entries = dict[str, dict[str, dict[str, str]]]
"""Kernel by operation, precision and kind of shape."""


def allowed(names: Iterable[str], precision: Precision) -> list[str]:
    """Kernels that round no more than a precision allows."""
    finer = PRECISIONS[: PRECISIONS.index(precision) + 1]
    return [name for name in names if name == "reference" or ARITHMETICS[name.partition("/")[2]] in finer]


@dataclass(frozen=True)
class Run:
    """One layer.

    Attributes:
        by: runs it by a kernel.
        weights: nothing changes these while it is timed, as in an ``attribute()``.
    """

    by: Callable[[str], object]
    weights: Callable[[], Sequence[Tensor]] = tuple


@dataclass(frozen=True)
class Clock:
    """Times contenders on a device: by a short ``look``, or as long as it takes to tell them apart (``race``).

    Some may be left out.
    """

    look: Callable[[Mapping[str, Callable[[], object]]], Times]
    race: Callable[[Mapping[str, Callable[[], object]]], Times]


def clock_of_cpu(protocol: Protocol) -> Clock:
    """The clock on the wall. Of a look's two runs the first is a warm-up."""
    tries = Protocol(2, 0, clock=protocol.clock)
    return Clock(
        lambda runs: {name: min(timing.samples) for name, timing in interleaved(runs, tries).items()},
        lambda runs: {name: timing.median for name, timing in interleaved(runs, protocol).items()},
    )


def clock_of_gpu(device: torch.device, protocol: Protocol) -> Clock:
    """The device's own: of replayed graphs, without Python and launches. It tells which contenders fail, and leaves them out."""

    def times(timer: Timer, kind: str, runs: Mapping[str, Callable[[], object]]) -> Times:
        found = timer.times(runs)
        for name, each in found.items():
            if "failed" in each:
                print(f"{name} failed: {each['failed']}", flush=True)
        return {name: each[kind] / 1e3 for name, each in found.items() if kind in each}

    return Clock(
        partial(times, Timer(device, 2, 0.0), "least_ms"),
        partial(times, Timer(device, max(protocol.repetitions, 2)), "median_ms"),
    )


def compared(runs: Sequence[Run], names: list[str], precisions: Sequence[Precision], clock: Clock) -> list[Times]:
    """Seconds of every kernel on every layer of a kind, the smallest first, as long as some precision may yet choose it."""
    found = []
    for run in runs:
        run.by(names[0])  # draws the tensors
        with native.unchanging(run.weights()):
            seconds = clock.look({name: partial(run.by, name) for name in names})
            hopeful: set[str] = set()
            for precision in precisions:
                usable = allowed(seconds, precision)
                best = min((seconds[name] for name in usable), default=math.inf)
                hopeful.update(name for name in usable if seconds[name] <= max(_HOPELESS * best, _QUICK))
            names = [name for name in names if name in hopeful]
            found.append(clock.race({name: partial(run.by, name) for name in names}))
    return found


def fastest(times: Sequence[Times], precision: Precision) -> str | None:
    """The kernel of the least geometric mean that a precision allows, if one ran; of those about equal the most precise, and of
    equally precise ones the fastest."""
    common = [name for name in allowed(times[0], precision) if all(name in each for each in times)]
    means = {name: math.exp(sum(math.log(each[name]) for each in times) / len(times)) for name in common}
    equal = [name for name in common if means[name] <= _ABOUT_EQUAL * min(means.values())]
    return min(equal, key=lambda name: (_roughness(name), means[name]), default=None)


def _roughness(name: str) -> int:
    return 0 if name == "reference" else PRECISIONS.index(ARITHMETICS[name.partition("/")[2]])


def by_kind(layers: Iterable[Convolution]) -> dict[str, list[Convolution]]:
    """Layers by the kind of their shape, the smallest first."""
    kinds: dict[str, list[Convolution]] = {}
    for layer in sorted(layers, key=lambda layer: layer.flops):
        kinds.setdefault(workloads.shape_class(layer), []).append(layer)
    return kinds


def tuned(clock: Clock, batch: Batch, small: bool, only: str = "") -> Iterator[Entries]:
    """Time every kind of shape that matches on a device; after each operation what is fastest so far."""
    pattern = re.compile(only)
    found: defaultdict[tuple[str, Precision, str], list[Times]] = defaultdict(list)
    device = batch.device.type
    layers_of_all_kinds = workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS + workloads.GROUPED_LAYERS
    operations = {
        "z_plus_conv3d": (workloads.z_plus, layers_of_all_kinds),
        "z_beta_conv3d": (workloads.z_beta, workloads.PIXEL_LAYERS),
        "conv3d": (workloads.convolved, layers_of_all_kinds),
    }
    pools = [workloads.reduced_pooling(pool) for pool in workloads.POOLINGS] if small else workloads.POOLINGS
    sums = [workloads.reduced_addition(each) for each in workloads.ADDITIONS] if small else workloads.ADDITIONS
    for dtype, precisions in precisions_by_type(device).items():
        for op, (operation, layers) in operations.items():
            names = kernels.available(op, device, dtype)
            if op == "conv3d":  # which "mixed" computes as "bf16" does, and is not asked to: it is about the walk back
                names = [name for name in names if not name.endswith("/mixed")]
            for kind, members in by_kind(
                layer for layer in layers if pattern.search(workloads.shape_class(layer))
            ).items():
                usable = names if kind in TRANSFORMED else [name for name in names if not transforms(name)]
                chosen = [workloads.reduced(layer) for layer in members] if small else members
                runs = [_convolution(operation, layer, dtype, op == "z_beta_conv3d", batch) for layer in chosen]
                _add(found, op, precisions, kind, compared(runs, usable, precisions, clock))
            yield winners(found)
        if not pattern.search("any"):
            continue
        for op, without_weights in (
            ("max_pool3d", [_pooling(workloads.pooled, pool, dtype, batch) for pool in reversed(pools)]),
            ("max_pool3d_relevance", [_pooling(workloads.max_pool, pool, dtype, batch) for pool in reversed(pools)]),
            ("z_plus_add", [_addition(each, dtype, batch) for each in reversed(sums)]),
        ):
            names = kernels.available(op, device, dtype)
            _add(found, op, precisions, "any", compared(without_weights, names, precisions, clock))
        yield winners(found)


def winners(found: Mapping[tuple[str, Precision, str], Sequence[Times]]) -> Entries:
    """The fastest kernel of every operation, precision and kind of shape that was timed."""
    entries: Entries = {}
    for (op, precision, kind), times in found.items():
        if best := fastest(times, precision):
            entries.setdefault(op, {}).setdefault(precision, {})[kind] = best
    return entries


def precisions_by_type(device: str) -> dict[torch.dtype, list[Precision]]:
    """In which type of activations and weights precisions are measured.

    A GPU explains networks of float32 in every precision; on a CPU "bfloat16" is about networks of bfloat16, too.
    """
    of_float32 = {torch.float32: list(PRECISIONS)}
    return of_float32 if device == "cuda" else {**of_float32, torch.bfloat16: ["bfloat16"]}


def _convolution(
    operation: Callable[[Convolution, workloads.Tensors, str], Tensor],
    layer: Convolution,
    dtype: torch.dtype,
    pixels: bool,
    batch: Batch,
) -> Run:
    """The layer; its tensors are drawn when it first runs, and gone once it is dropped."""
    drawn: list[workloads.Tensors] = []

    def run(kernel: str) -> Tensor:
        if not drawn:
            drawn.append(workloads.draw(layer, dtype, pixels, batch=batch))
        return operation(layer, drawn[0], kernel)

    return Run(run, lambda: [tensors.weight for tensors in drawn])


def _pooling(
    operation: Callable[[Pooling, Tensor, Tensor, str], Tensor], layer: Pooling, dtype: torch.dtype, batch: Batch
) -> Run:
    return Run(partial(operation, layer, *workloads.draw_pooling(layer, dtype, batch=batch)))


def _addition(layer: Addition, dtype: torch.dtype, batch: Batch) -> Run:
    return Run(partial(workloads.summands, *workloads.draw_addition(layer, dtype, batch=batch)))


def _add(
    found: defaultdict[tuple[str, Precision, str], list[Times]],
    op: str,
    precisions: Sequence[Precision],
    kind: str,
    times: Sequence[Times],
) -> None:
    seconds = {name: sum(each[name] for each in times) for name in times[0] if all(name in each for each in times)}
    seen = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms" for name in sorted(seconds, key=lambda name: seconds[name]))
    print(f"{op:21} {kind:9} {seen}", flush=True)
    for precision in precisions:
        found[op, precision, kind] += times


def merged(table: dict[str, Any], device: str, level: str, entries: Entries, about: dict[str, Any]) -> dict[str, Any]:
    """The table with some entries of one feature level of a device replaced; everything else as it was."""
    of_device = table.get("kernels", {}).get(device, {})
    ops = dict(of_device.get(level, {}))
    for op, by_precision in entries.items():
        old = ops.get(op, {})
        ops[op] = {**old, **{precision: {**old.get(precision, {}), **new} for precision, new in by_precision.items()}}
    by_level = {**of_device, level: ops}
    return {
        "about": ABOUT,
        "measured on": {**table.get("measured on", {}), level: about},
        "kernels": {**table.get("kernels", {}), device: by_level},
    }


def main(arguments: list[str] | None = None) -> None:
    """Tune this machine's feature level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed_by(parser, Protocol(repetitions=5, seconds=0.3))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes; one that is there is rewritten")
    parser.add_argument("--only", default="", help="regular expression that a kind of shape must match to be timed")
    given = parser.parse_args(arguments)
    if given.device not in native.loaded:
        parser.error(
            f"there is nothing to choose from: the compiled kernels are not loaded ({native.missing[given.device]})"
        )
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if given.device == "cuda" and given.clock == "cpu":
        parser.error("--clock cpu is about a CPU: a GPU is timed by its own clock")
    protocol = protocol_of(given, parser)
    table = json.loads((given.out if given.out.exists() else TABLE).read_text())
    about = machine()
    measured_on = {key: about[key] for key in ("date", "commit")} | {"torch": about["versions"]["torch"]}
    if given.device == "cuda":
        batch = Batch(16, torch.device("cuda"))
        clock = clock_of_gpu(batch.device, protocol)
        measured_on = about_gpu(batch.device) | {"clips": batch.clips} | measured_on
    else:
        batch, clock = ONE_CLIP, clock_of_cpu(protocol)
        measured_on = {key: about[key] for key in ("cpu", "threads")} | measured_on
    level = kernels.feature_level(given.device)
    if given.only:
        measured_on = {**table.get("measured on", {}).get(level, {}), given.only: measured_on}
    with torch.no_grad():
        # If it is stopped what it found stays, and what it did not measure.
        for entries in tuned(clock, batch, given.small, given.only):
            new = merged(table, given.device, level, entries, measured_on)
            given.out.write_text(json.dumps(new, indent=1) + "\n")
            print(f"written to {given.out}: {', '.join(entries)}", flush=True)


if __name__ == "__main__":
    main()
