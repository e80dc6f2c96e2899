"""What the scripts for a GPU share: where records go, what they say about the device, and how a device is timed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import machine

ROOT = Path(__file__).resolve().parents[1]

_cuda: Any = torch.cuda  # untyped in some versions of torch
_cudnn: Any = torch.backends.cudnn


def about(device: torch.device) -> dict[str, Any]:
    """The machine, the device, the versions and the commit that a record belongs to."""
    found: dict[str, Any] = {"machine": machine(), "device": str(device)}
    if device.type == "cuda":
        found["gpu"] = about_gpu(device)
    return found


def about_gpu(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver, and the libraries that serve it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn.version(),
    }


def options(parser: argparse.ArgumentParser, limit: float, repetitions: int) -> None:
    """Add what the scripts that measure have in common."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repetitions", type=int, default=repetitions, help="least samples of every contender")
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rivals that torch.compile makes")
    parser.add_argument("--limit", type=float, default=limit, help="seconds after which no further case is begun")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny measurement: shows that everything runs, tells nothing"
    )


def device_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device that those options name; the parser's error where it is not there."""
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --smoke shows that everything runs")
    return device


def folder() -> Path:
    """Where records go: to the folder that OUT names, or to benchmarks/results."""
    found = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(kind: str, record: dict[str, Any], done: bool = True) -> Path:
    """Write a record, perhaps of a measurement that is not ``done``; its path."""
    level = record["about"].get("gpu", {}).get("capability", "cpu")
    path = folder() / f"{kind}_{record['about']['machine']['date']}_{level}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    if done:
        print(f"\nwritten to {path}")
    return path


class Timer:
    """Times contenders in turn, A B C A B C ..., each sample long enough that the clock does not show.

    On a GPU a contender is captured in a CUDA graph and its replays are timed by events: what is measured is the device's
    time, without what Python and the launches take.
    """

    def __init__(self, device: torch.device, repetitions: int, least_ms: float = 2.0) -> None:
        self.device = device
        self.repetitions = repetitions
        self.least_ms = least_ms

    def times(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        """Medians and quartiles of every contender in milliseconds; or why it did not run."""
        found: dict[str, dict[str, Any]] = {}
        runs: dict[str, Callable[[], object]] = {}
        for name, run in contenders.items():
            try:
                runs[name] = self._prepared(run)
            except Exception as error:  # a rival that cannot run is a finding, not the end of the measurement
                found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        counts = {name: max(1, round(self.least_ms / max(self._sample(once, 1), 1e-4))) for name, once in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repetitions):
            for name, prepared in runs.items():
                samples[name].append(self._sample(prepared, counts[name]))
        for name, values in samples.items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            found[name] = {
                "median_ms": round(median, 5),
                "first_quartile_ms": round(low, 5),
                "third_quartile_ms": round(high, 5),
                "least_ms": round(min(values), 5),
                "samples": len(values),
                "runs_each": counts[name],
            }
        return found

    def _prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        if self.device.type != "cuda":
            run()
            return run
        side = _cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels, compilers compile
                run()
        before = torch.cuda.current_stream()
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        finally:
            torch.cuda.set_stream(before)  # which torch forgets where a recording fails
        return graph.replay

    def _sample(self, run: Callable[[], object], count: int) -> float:
        """Milliseconds of one run, the mean of ``count``."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - start) * 1e3 / count
        begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None
