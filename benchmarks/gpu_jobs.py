"""Whole jobs on a GPU: how many clips are explained in a second, beside what else computes the explanations.

    python benchmarks/gpu_jobs.py                        # everything, at most --limit seconds
    python benchmarks/gpu_jobs.py --only "C3D, 16"       # the workloads whose name matches
    python benchmarks/gpu_jobs.py --device cpu --smoke   # thin networks: shows that everything runs, measures nothing

Each of ours takes part twice: as it is, and replayed by CUDA graphs (on a CPU that changes nothing).

A job explains a clip and its T frozen clips. Everybody is given 1, 4 and 16 clips at once, and the fastest counts: what a peer
needs for a clip is (1 + T) times its explanation of one, extrapolated. Time is from a call to the moment when the device has
done all of it, Python's own included. Answers are checked first, as explanations.py says. Rates are clips a second; the
projection is for UCF-101, cut into clips of as many frames: 150,000 of 16.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from explanations import (
    ALLOWED,
    ALLOWED_TO_PEERS,
    Right,
    contenders,
    ours,
    precision_of,
    verdict,
    verdict_on_job,
)
from gpu import about, device_of, options, write
from networks import C3D_, R3D_18, S3D, Question, Workload
from peers import PEERS
from timing import Protocol, interleaved

from captum_dtd import DiscriminativeDeepTaylor

Record = dict[str, Any]

PEERS_OF_JOBS = ("zennit", "plain torch", "plain torch, compiled")

WORKLOADS = tuple(Workload(*which, peers=PEERS_OF_JOBS) for which in ((C3D_, 16), (R3D_18, 16), (C3D_, 32), (S3D, 16)))

AT_ONCE = (1, 4, 16)
"""Clips of a call."""

DATA_SET = 2_400_000
"""Frames of UCF-101: 27 hours at 25 a second (Soomro et al. 2012, arXiv 1212.0402)."""


def on(device: torch.device, question: Question) -> Question:
    """The same question, asked there."""
    return replace(question, model=copy.deepcopy(question.model).to(device), clips=question.clips.to(device))


def of_clips(question: Question, count: int) -> Question:
    """The same question about so many different clips."""
    low, high = (question.clips.new_tensor(bound).view(1, -1, 1, 1, 1) for bound in (question.low, question.high))
    clips = low + (high - low) * torch.rand_like(question.clips.expand(count, -1, -1, -1, -1))
    return replace(question, clips=clips)


@dataclass(frozen=True)
class Device:
    """Where everything runs."""

    torch: torch.device

    def finishes(self, run: Callable[[], object]) -> None:
        """Run something to its end."""
        run()
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)

    def peak_gib(self, run: Callable[[], object]) -> float | None:
        """Memory that it takes, above what is there before; None on a CPU, where memory.py tells."""
        if self.torch.type != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        self.finishes(run)
        return round((torch.cuda.max_memory_allocated(self.torch) - before) / 2**30, 2)


REPLAYED = ", replayed"
"""What is added to the name of one of ours that uses CUDA graphs."""


def taking_part(workload: Workload, compiled: bool) -> list[str]:
    """Who explains a workload: what people ask first comes first, and what takes long to compile last."""
    everybody = contenders(workload, compiled)
    asked_first = [ours("float32"), ours("bfloat16"), "zennit", "plain torch"]
    names = sorted(everybody, key=lambda name: asked_first.index(name) if name in asked_first else len(asked_first))
    return [way for name in names for way in ([name] if name in PEERS else [name, name + REPLAYED])]


def discriminator(name: str, question: Question) -> DiscriminativeDeepTaylor:
    """One of ours."""
    precision, replayed = precision_of(name.removesuffix(REPLAYED)), name.endswith(REPLAYED)
    return DiscriminativeDeepTaylor(
        question.model, question.low, question.high, precision=precision, cuda_graphs=replayed
    )


def judged(name: str, question: Question, right: Right) -> Record:
    """Whether a contender's answer about one clip is right."""
    if name in PEERS:
        peer = PEERS[name]
        relevance = peer.prepare(question)(question.clips)
        of_peer = partial(right.relevance, peer.answer)
        return verdict(relevance, peer.answer, ALLOWED_TO_PEERS, question.score, of_peer)
    method, precision = discriminator(name, question), precision_of(name.removesuffix(REPLAYED))
    for _ in range(2 if name.endswith(REPLAYED) else 0):  # so that what is judged was replayed
        method.attribute(question.clips, question.target)
    job = method.attribute(question.clips, question.target)
    return verdict_on_job(job, question, right, ALLOWED[precision])


def rates(name: str, question: Question, device: Device, protocol: Protocol, at_once: tuple[int, ...]) -> list[Record]:
    """Clips a second for every number of clips at once, until memory ends."""
    found: list[Record] = []
    for count in at_once:
        asked = of_clips(question, count)
        explained = 1
        if name in PEERS:
            run: Callable[[], object] = partial(PEERS[name].prepare(asked), asked.clips)
            explained += asked.frames
        else:
            run = partial(discriminator(name, asked).attribute, asked.clips, asked.target)
        try:
            device.finishes(run)
            peak = device.peak_gib(run)  # with what is recorded, if anything is
            (timing,) = interleaved({name: partial(device.finishes, run)}, protocol).values()
        except RuntimeError as error:  # our operators' allocations fail without a class of their own
            if "out of memory" not in str(error):
                raise
            found.append({"clips": count, "failed": "out of memory"})
            break
        seconds = timing.times(explained).median / count
        told = {"clips": count, "clips_per_second": float(f"{1 / seconds:.4g}"), "peak_gib": peak}
        found.append(told | {"extrapolated": name in PEERS} | timing.times(explained).record())
    return found


def measured(
    workload: Workload,
    device: Device,
    protocol: Protocol,
    at_once: tuple[int, ...],
    small: bool,
    compiled: bool,
    end: float,
) -> Record:
    """What is known about one workload; who would begin later than ``end`` is left out."""
    question = on(device.torch, workload.posed(small))
    right = Right(question)
    found: dict[str, Record] = {}
    for name in taking_part(workload, compiled):
        if time.monotonic() > end:
            found[name] = {"failed": "left out: --limit was reached"}
            continue
        try:
            told = judged(name, question, right)
            measurements = rates(name, question, device, protocol, at_once)
        except Exception as error:  # one that cannot run is a finding, not the end of the measurement
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"  failed: {name}: {found[name]['failed']}", flush=True)
            continue
        best = max((one.get("clips_per_second", 0.0) for one in measurements), default=0.0)
        found[name] = told | {"best_clips_per_second": best, "rates": measurements}
        if best:
            found[name]["minutes_for_data_set"] = float(f"{DATA_SET / question.frames / best / 60:.3g}")
        print(f"  {best:10.2f} clips/s  {told['verdict']:10}  {name}", flush=True)
        torch._dynamo.reset()
    comparisons = [
        {"precision": precision, "replayed": bool(way), "rival": peer, "ratio": round(rate / against, 3)}
        for peer in workload.peers
        if (against := _best(found, peer)) > 0
        for precision in workload.precisions
        for way in ("", REPLAYED)
        if (rate := _best(found, ours(precision) + way)) > 0
    ]
    return {"case": str(workload), "frames": question.frames, "comparisons": comparisons, "contenders": found}


def _best(found: Record, name: str) -> float:
    return float(found.get(name, {}).get("best_clips_per_second", 0.0))


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the record; its path."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, limit=240, repetitions=5)
    given = parser.parse_args(arguments)
    device = Device(device_of(given, parser))
    protocol = Protocol(1, 0.0) if given.smoke else Protocol(given.repetitions, 0.5, patience=10.0)
    record: Record = {"about": about(device.torch), "smoke": given.smoke, "frames_of_data_set": DATA_SET, "cases": []}
    record["tf32_in_torch"] = {
        "cudnn": torch.backends.cudnn.allow_tf32,
        "matmul": torch.backends.cuda.matmul.allow_tf32,
    }
    record["left_out"] = []
    at_once = AT_ONCE[:2] if given.smoke else AT_ONCE
    with torch.no_grad():
        for workload in WORKLOADS:
            if re.search(given.only, str(workload)) is None:
                continue
            if time.monotonic() - begun > given.limit:
                record["left_out"].append(f"{workload}: --limit was reached")
                continue
            print(f"--- {workload}", flush=True)
            try:
                end = begun + given.limit
                found = measured(workload, device, protocol, at_once, given.smoke, not given.no_compile, end)
            except ModuleNotFoundError as missing:
                record["left_out"].append(f"{workload}: {missing}")
                continue
            record["cases"].append(found)
            write("gpu_jobs", record, done=False)
    for left_out in record["left_out"]:
        print(f"left out: {left_out}")
    return write("gpu_jobs", record)


if __name__ == "__main__":
    main()
