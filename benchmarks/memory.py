"""Peak memory of one contender, in a process of its own.

    python benchmarks/memory.py "C3D, 16 frames" "captum_dtd float32" job

What is told is the largest resident set while it works, above what is there before it starts, the model and its clips among it.
The contender has worked before: what it keeps from call to call (traces, packed weights) is told apart. A job is done with one
clip at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networks
import torch
from explanations import contenders, discriminator, explainer, warm_up
from networks import OUTER, Workload
from peers import PEERS

from captum_dtd.kernels import Precision

RESET = Path("/proc/self/clear_refs")
"""A process that writes 5 to it counts its peak from there."""

MEASURABLE = os.access(RESET, os.W_OK)

WEIGHT_CACHE = "CAPTUM_DTD_WEIGHT_CACHE_MB"
"""Limits what packed weights take."""

MEASURED: tuple[Precision, ...] = (*OUTER, "float32")
"""Precisions whose memory is measured."""

RIVALS = ("zennit", "captum LRP", "plain torch")
"""Peers whose memory is measured."""


def peaks(workload: Workload, small: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Memory in MiB by kind and contender: of ours, explanation and job, and of peers' explanations."""
    names = [name for name in contenders(workload, compiled=False) if name in RIVALS or name.endswith(MEASURED)]
    return {
        "explanation": {name: peak(workload, name, "explanation", small) for name in names},
        "job": {name: peak(workload, name, "job", small) for name in names if name not in PEERS},
    }


def peak(workload: Workload, contender: str, kind: str, small: bool) -> dict[str, float]:
    """Of a contender's explanation or job, in MiB: ``peak_mib`` while it works, ``kept_mib`` from call to call.

    Raises:
        RuntimeError: if the process that measures fails; the message is what it said.
    """
    command = [sys.executable, __file__, str(workload), contender, kind, *(["--small"] if small else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop(WEIGHT_CACHE, None)  # as somebody has it who explains in one precision
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory of {contender} on {workload} was not measured: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _settled() -> float:
    """Resident memory in MiB, after everything that can go has gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def main() -> None:
    """Measure one contender and print what was found, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("contender")
    parser.add_argument("kind", choices=["explanation", "job"])
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    question = networks.named(given.workload).posed(given.small)
    before = _settled()
    if given.kind == "job":
        method = discriminator(given.contender, question)
        warm_up(method, question)
        run: Callable[[], Any] = partial(method.attribute, question.clips, question.target, internal_batch_size=1)
    else:
        run = partial(explainer(given.contender, question), question.clips)
        run()
    start = _settled()
    RESET.write_text("5")
    run()
    print(json.dumps({"peak_mib": round(_status("VmHWM") - start, 1), "kept_mib": round(start - before, 1)}))


if __name__ == "__main__":
    main()
