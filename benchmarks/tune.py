"""Time every kernel on every kind of layer and write the fastest into the committed table (`make tune`).

    python benchmarks/tune.py                 # rewrites this machine's part of captum_dtd/kernel_table.json

What other kinds of machine have measured stays. A table, not a timing at run time: the same model on the same kind of machine
is always explained by the same kernels. Where two kernels are about equally fast the more precise one is entered.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import workloads
from timing import ROOT, Protocol, interleaved, machine, protocol_of, timed_by
from torch import Tensor
from workloads import Addition, Convolution, Pooling

from captum_dtd import kernels, native
from captum_dtd.kernels import ARITHMETICS, TRANSFORMED, Precision

TABLE = ROOT / "captum_dtd" / "kernel_table.json"

PRECISIONS = get_args(Precision)

ABOUT = {
    "what": "The fastest kernel by device, feature level, operation, precision and kind of shape; written by make tune.",
    "how": "Single clips, channels last, least geometric mean of the times over a kind's layers; within 10 % the more precise.",
    "feature levels": "The best of amx_bf16, avx512_fp16, avx512_bf16, avx512, avx2, generic; sm_<major><minor> of a GPU.",
    "kinds": {
        "pixels": "at most 4 input channels in a group",
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


def compared(
    runs: Sequence[Callable[[str], object]], names: list[str], precisions: Sequence[Precision], protocol: Protocol
) -> list[Times]:
    """Seconds of every kernel on every layer of a kind, the smallest first, as long as some precision may yet choose it."""
    found = []
    for run in runs:
        run(names[0])  # draws the tensors
        tries = interleaved({name: partial(run, name) for name in names}, Protocol(2, 0, clock=protocol.clock))
        seconds = {name: min(timing.samples) for name, timing in tries.items()}  # the first is a warm-up
        hopeful: set[str] = set()
        for precision in precisions:
            usable = allowed(names, precision)
            best = min(seconds[name] for name in usable)
            hopeful.update(name for name in usable if seconds[name] <= max(_HOPELESS * best, _QUICK))
        names = [name for name in names if name in hopeful]
        timings = interleaved({name: partial(run, name) for name in names}, protocol)
        found.append({name: timing.median for name, timing in timings.items()})
    return found


def fastest(times: Sequence[Times], precision: Precision) -> str:
    """The kernel of the least geometric mean that a precision allows; of those about equal the most precise."""
    common = [name for name in allowed(times[0], precision) if all(name in each for each in times)]
    means = {name: math.exp(sum(math.log(each[name]) for each in times) / len(times)) for name in common}
    equal = [name for name in common if means[name] <= _ABOUT_EQUAL * min(means.values())]
    return min(equal, key=_roughness)


def _roughness(name: str) -> int:
    return 0 if name == "reference" else PRECISIONS.index(ARITHMETICS[name.partition("/")[2]])


def by_kind(layers: Iterable[Convolution]) -> dict[str, list[Convolution]]:
    """Layers by the kind of their shape, the smallest first."""
    kinds: dict[str, list[Convolution]] = {}
    for layer in sorted(layers, key=lambda layer: layer.flops):
        kinds.setdefault(workloads.shape_class(layer), []).append(layer)
    return kinds


def tuned(protocol: Protocol, small: bool) -> Entries:
    """Time everything on this machine; what is fastest."""
    entries: Entries = {}
    operations = {
        "z_plus_conv3d": (workloads.z_plus, workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS),
        "z_beta_conv3d": (workloads.z_beta, workloads.PIXEL_LAYERS),
        "conv3d": (workloads.convolved, workloads.CONVOLUTIONS + workloads.LINEAR_LAYERS),
    }
    pools = [workloads.reduced_pooling(pool) for pool in workloads.POOLINGS] if small else workloads.POOLINGS
    sums = [workloads.reduced_addition(each) for each in workloads.ADDITIONS] if small else workloads.ADDITIONS
    for dtype in (torch.float32, torch.bfloat16):
        precisions = [precision for precision in PRECISIONS if workloads.dtype_of(precision) == dtype]
        for op, (operation, layers) in operations.items():
            names = kernels.available(op, "cpu", dtype)
            for kind, members in by_kind(layers).items():
                usable = names if kind in TRANSFORMED else [name for name in names if not name.endswith("/winograd")]
                chosen = [workloads.reduced(layer) for layer in members] if small else members
                runs = [_convolution(operation, layer, dtype, op == "z_beta_conv3d") for layer in chosen]
                _enter(entries, op, precisions, kind, compared(runs, usable, precisions, protocol))
        for op, without_weights in (
            ("max_pool3d_relevance", [_pooling(pool, dtype) for pool in reversed(pools)]),
            ("z_plus_add", [_addition(each, dtype) for each in reversed(sums)]),
        ):
            names = kernels.available(op, "cpu", dtype)
            _enter(entries, op, precisions, "any", compared(without_weights, names, precisions, protocol))
    return entries


def _convolution(
    operation: Callable[[Convolution, workloads.Tensors, str], Tensor],
    layer: Convolution,
    dtype: torch.dtype,
    pixels: bool,
) -> Callable[[str], Tensor]:
    """The layer as a function of the kernel; its tensors are drawn when it first runs, and gone once it is dropped."""
    drawn: list[workloads.Tensors] = []

    def run(kernel: str) -> Tensor:
        if not drawn:
            drawn.append(workloads.draw(layer, dtype, pixels))
        return operation(layer, drawn[0], kernel)

    return run


def _pooling(layer: Pooling, dtype: torch.dtype) -> Callable[[str], Tensor]:
    x, relevance = workloads.draw_pooling(layer, dtype)
    return partial(workloads.max_pool, layer, x, relevance)


def _addition(layer: Addition, dtype: torch.dtype) -> Callable[[str], object]:
    return partial(workloads.summands, *workloads.draw_addition(layer, dtype))


def _enter(entries: Entries, op: str, precisions: Sequence[Precision], kind: str, times: Sequence[Times]) -> None:
    seconds = {name: sum(each[name] for each in times) for name in times[0] if all(name in each for each in times)}
    seen = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms" for name in sorted(seconds, key=lambda name: seconds[name]))
    print(f"{op:21} {kind:9} {seen}", flush=True)
    for precision in precisions:
        entries.setdefault(op, {}).setdefault(precision, {})[kind] = fastest(times, precision)


def merged(table: dict[str, Any], level: str, entries: Entries, about: dict[str, Any]) -> dict[str, Any]:
    """The table with one feature level's entries replaced; everything else as it was."""
    by_level = {**table.get("kernels", {}).get("cpu", {}), level: entries}
    return {
        "about": ABOUT,
        "measured on": {**table.get("measured on", {}), level: about},
        "kernels": {**table.get("kernels", {}), "cpu": by_level},
    }


def main(arguments: list[str] | None = None) -> None:
    """Tune this machine's feature level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timed_by(parser, Protocol(repetitions=5, seconds=0.3))
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to rewrite")
    given = parser.parse_args(arguments)
    if "cpu" not in native.loaded:
        parser.error(f"there is nothing to choose from: the compiled kernels are not loaded ({native.missing['cpu']})")
    protocol = protocol_of(given, parser)
    table = json.loads(given.out.read_text()) if given.out.exists() else {}
    about = machine()
    measured_on = {key: about[key] for key in ("cpu", "threads", "date", "commit")} | {
        "torch": about["versions"]["torch"]
    }
    with torch.no_grad():
        entries = tuned(protocol, given.small)
    given.out.write_text(json.dumps(merged(table, about["feature_level"], entries, measured_on), indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
