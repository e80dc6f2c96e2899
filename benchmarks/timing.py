"""How time is taken: one process, contenders in turn, medians and quartiles, and a record of the machine."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from captum_dtd import kernels, native

ROOT = Path(__file__).resolve().parents[1]

# Whatever decides how fast a convolution can be on x86 and ARM.
_FEATURES = {"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"}
_FEATURES |= {"asimd", "sve", "sve2", "bf16"}


@dataclass(frozen=True)
class Protocol:
    """How often a contender runs: at least ``repetitions`` times, then on until all together have run for ``seconds``.

    One that has run for ``patience`` seconds sits out the rest. ``clock`` is "wall", or "cpu": this thread's own time, which
    other processes on a busy machine do not lengthen; it tells nothing where more than one thread works.
    """

    repetitions: int = 11
    seconds: float = 1.0
    most: int = 200
    clock: str = "wall"
    patience: float = 30.0


@dataclass(frozen=True)
class Timing:
    """Seconds that a contender took."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.samples)

    def times(self, factor: int) -> Timing:
        """As if every run had done its work so many times."""
        return Timing(tuple(factor * seconds for seconds in self.samples))

    def record(self) -> dict[str, float]:
        """Median, quartiles and smallest in milliseconds, and the number of runs."""
        samples = self.samples if len(self.samples) > 1 else self.samples * 2
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
        names = ("first_quartile_ms", "median_ms", "third_quartile_ms")
        found = {name: round(1e3 * value, 4) for name, value in zip(names, quartiles, strict=True)}
        return {**found, "least_ms": round(1e3 * min(self.samples), 4), "runs": len(self.samples)}


_LONG = 0.5
"""Seconds."""


def interleaved(contenders: Mapping[str, Callable[[], object]], protocol: Protocol) -> dict[str, Timing]:
    """Time all contenders in turn, round after round: what disturbs the machine disturbs all alike. They have warmed up before.

    Each round has an order of its own, the same in every run: who comes after a large contender finds caches without his data.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()  # a collection takes longer than most layers, so it comes before the long ones, and is not timed
    now = time.perf_counter if protocol.clock == "wall" else time.thread_time
    begun = now()
    for repetition in range(protocol.most):
        if repetition >= protocol.repetitions and now() - begun > protocol.seconds:
            break
        for name, run in random.Random(repetition).sample(list(contenders.items()), len(contenders)):
            if sum(samples[name]) > protocol.patience:
                continue
            if samples[name] and samples[name][-1] > _LONG:
                gc.collect()  # what a contender leaves in cycles must not weigh on the next
            start = now()
            run()
            samples[name].append(now() - start)
    if collecting:
        gc.enable()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def ceilings(size: int) -> dict[str, float]:
    """What this many threads of the machine reach at best, in GFLOP/s: matrix products of this size, by number format."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.rand(size, size).to(dtype)
        product = partial(torch.mm, matrix, matrix)
        product()
        (timing,) = interleaved({"product": product}, Protocol(3, 0.2)).values()
        found[str(dtype).removeprefix("torch.")] = round(2 * size**3 / min(timing.samples) / 1e9, 1)
    return found


def timed_by(parser: argparse.ArgumentParser, default: Protocol) -> None:
    """Add the options that every script's timing has in common."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=default.repetitions, help="least runs of every contender")
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, help="least time of a case, repetitions permitting"
    )
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, one thread only"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny layers: shows that everything runs, measures nothing"
    )


def protocol_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Protocol:
    """What those options say; the threads are set."""
    if given.clock == "cpu" and given.threads != 1:
        parser.error("--clock cpu counts one thread: leave --threads at 1, or --clock at wall")
    torch.set_num_threads(given.threads)
    return Protocol(given.repetitions, given.seconds, clock=given.clock)


def machine() -> dict[str, Any]:
    """The machine, the versions and the commit that a measurement belongs to."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "features": sorted(_FEATURES & set((_cpu_field("flags") or _cpu_field("Features")).split())),
        "feature_level": kernels.feature_level("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "kernels": kernels.available("z_plus_conv3d", "cpu", torch.float32),
        "not loaded": native.missing,
        "versions": {name: _version(name) for name in ("captum_dtd", "torch", "captum", "zennit")}
        | {"python": platform.python_version()},
    }


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with "+" where the working tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
