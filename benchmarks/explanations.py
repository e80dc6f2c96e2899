"""Whole explanations, and whole jobs of 1 + T explanations: timed side by side once their answers agree.

Ours and a peer's answer are compared with ours in float64 and plain ATen, by the rules the peer follows; what is wrong is timed
all the same, and said to be wrong. A peer's whole job is its explanation times 1 + T, and said to be extrapolated, unless it
takes no time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from networks import Question, Workload
from peers import PEERS, Answer, Explain
from timing import Protocol, Timing, interleaved
from torch import Tensor, nn

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, SpatioTemporalRelevance
from captum_dtd.kernels import Precision
from captum_dtd.rules import WinnerTakesAll

ALLOWED: dict[Precision, float] = {"ieee": 1e-5, "float32": 1e-4, "mixed": 1e-2, "bfloat16": 5e-2}
"""Relative error of ours, by precision."""

ALLOWED_TO_PEERS = 2e-2

LONG = 16
"""Frames: of longer clips the right answer is taken in float32, which is within 1e-6."""

SHORT = 2.0
"""Seconds: a peer's whole job is run where it takes less, else extrapolated."""


def ours(precision: Precision) -> str:
    """Our name as a contender."""
    return f"captum_dtd {precision}"


def precision_of(name: str) -> Precision:
    """The precision of one of ours."""
    return name.rpartition(" ")[2]  # type: ignore[return-value]


def contenders(workload: Workload, compiled: bool = True) -> list[str]:
    """Who explains a workload: ours, and the peers that are installed."""
    there = [name for name in workload.peers if PEERS[name].installed and (compiled or "compiled" not in name)]
    return [*map(ours, workload.precisions), *there]


def discriminator(name: str, question: Question) -> DiscriminativeDeepTaylor:
    """One of ours, for the whole job; its ``method`` makes one explanation."""
    return DiscriminativeDeepTaylor(question.model, question.low, question.high, precision=precision_of(name))


def explainer(name: str, question: Question) -> Explain:
    """One explanation by a contender."""
    if name in PEERS:
        return PEERS[name].prepare(question)
    return partial(discriminator(name, question).method.attribute, target=question.target)


def job_by_hand(explain: Explain, question: Question) -> None:
    """The whole job by a method that explains one clip: the clip, then every frozen clip."""
    explain(question.clips)
    for frame in range(question.frames):
        explain(question.frozen(frame))


def warm_up(method: DiscriminativeDeepTaylor, question: Question) -> None:
    """A job of two different frames: whatever is made once is made."""
    clips = question.clips.clone()
    clips[:, :, 1:] = clips[:, :, -1:]
    method.attribute(clips, question.target)


# --- whether answers agree ---------------------------------------------------------------------------------------------


class Right:
    """The right answers to a question: ours in plain ATen, in float64, or for long clips in float32, to save minutes."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self.dtype = torch.float64 if question.frames <= LONG else torch.float32
        self._model = copy.deepcopy(question.model).to(self.dtype)
        self._found: dict[tuple[bool, int | None], Tensor] = {}

    def relevance(self, answer: Answer, frozen_at: int | None = None) -> Tensor:
        """Of the clips, or of the clips frozen at a frame, in float64."""
        winners = answer == "winners" and any(isinstance(module, nn.MaxPool3d) for module in self._model.modules())
        key = winners, frozen_at
        if key not in self._found:
            composite: Any = {nn.MaxPool3d: WinnerTakesAll()} if winners else "dtd"
            low, high = self._question.low, self._question.high
            method = DeepTaylor(self._model, low, high, composite=composite, backend="reference")
            clips = self._question.clips if frozen_at is None else self._question.frozen(frozen_at)
            self._found[key] = method.attribute(clips.to(self.dtype), self._question.target).double()
        return self._found[key]


def verdict(
    result: Tensor, answer: Answer, allowed: float, score: float, right: Callable[[], Tensor]
) -> dict[str, Any]:
    """Whether relevance is what it must be, by how much it is off, and its sum over the score.

    Args:
        result: relevance of the clips.
        answer: what it must agree with.
        allowed: relative error up to which it agrees.
        score: what relevance must add up to.
        right: gives the right answer, where ``answer`` has one.
    """
    if answer == "other":
        return {"verdict": "another question"}
    ratio = float(result.double().sum()) / score
    error = abs(ratio - 1) if answer == "sum" else distance(result, right())
    return {"verdict": _judged(error, allowed), "error": _short(error), "sum_over_score": _short(ratio)}


def verdict_on_job(result: SpatioTemporalRelevance, question: Question, right: Right, allowed: float) -> dict[str, Any]:
    """Likewise for a whole job of ours: total, and spatial and temporal relevance at the middle frame."""
    frame = question.frames // 2
    total = right.relevance("shares").sum(1)
    spatial = right.relevance("shares", frame).sum(1)[:, frame]
    error = max(distance(result.total, total), distance(result.spatial[:, frame], spatial))
    return {
        "verdict": _judged(error, allowed),
        "error": _short(error),
        "temporal_error": _short(distance(result.temporal[:, frame], total[:, frame] - spatial)),
        "sum_over_score": _short(float(result.total.double().sum()) / question.score),
    }


def distance(result: Tensor, right: Tensor) -> float:
    """Relative L2 distance."""
    return float((result.double() - right).norm() / right.norm())


def _judged(error: float, allowed: float) -> str:
    return "agrees" if error <= allowed else "wrong"  # NaN is wrong


def _short(number: float) -> float:
    return float(f"{number:.3g}")


# --- what is measured --------------------------------------------------------------------------------------------------


class Contest:
    """A workload and everybody who explains it, checked.

    Args:
        workload: of `networks.WORKLOADS`.
        protocol: how often everybody runs.
        ceilings: GFLOP/s that the machine reaches, by number format.
        small: whether a thin network and a small clip stand in.
        compiled: whether peers that torch.compile makes take part.
    """

    def __init__(
        self, workload: Workload, protocol: Protocol, ceilings: Mapping[str, float], small: bool, compiled: bool
    ) -> None:
        self.workload, self.protocol, self.ceilings = workload, protocol, ceilings
        self.question = question = workload.posed(small)
        self.right = Right(question)
        self.methods = {name: discriminator(name, question) for name in map(ours, workload.precisions)}
        self.explainers: dict[str, Explain] = {
            name: partial(self.methods[name].method.attribute, target=question.target)
            if name in self.methods
            else PEERS[name].prepare(question)
            for name in contenders(workload, compiled)
        }
        self.verdicts = {name: self._verdict(name, explain) for name, explain in self.explainers.items()}

    def _verdict(self, name: str, explain: Explain) -> dict[str, Any]:
        answer: Answer = PEERS[name].answer if name in PEERS else "shares"
        allowed = ALLOWED_TO_PEERS if name in PEERS else ALLOWED[precision_of(name)]
        # An answer to another question is not awaited twice.
        result = torch.empty(0) if answer == "other" else explain(self.question.clips)
        told = verdict(result, answer, allowed, self.question.score, partial(self.right.relevance, answer))
        print(f"  {name}: {told['verdict']}", flush=True)
        return told

    def records(self) -> list[dict[str, Any]]:
        """What is known about one explanation, and about the whole job if the workload has one."""
        clips = self.question.clips
        print(f"  timing one explanation by {len(self.explainers)}", flush=True)
        singly = interleaved({name: partial(run, clips) for name, run in self.explainers.items()}, self.protocol)
        found = [self._record("explanation", 1, singly, self.verdicts)]
        if self.workload.job:
            found.append(self._job(singly))
        torch._dynamo.reset()
        return found

    def _job(self, singly: Mapping[str, Timing]) -> dict[str, Any]:
        question, explained = self.question, 1 + self.question.frames
        slow = {name for name in singly if name in PEERS and explained * singly[name].median > SHORT}
        results: dict[str, SpatioTemporalRelevance] = {}

        def discriminate(name: str) -> None:
            results[name] = self.methods[name].attribute(question.clips, question.target)

        runs: dict[str, Callable[[], None]] = {}
        for name, explain in self.explainers.items():
            if name in self.methods:
                warm_up(self.methods[name], question)
                runs[name] = partial(discriminate, name)
            elif name not in slow:
                runs[name] = partial(job_by_hand, explain, question)
        print(f"  timing the whole job by {len(runs)}, extrapolating it for {len(slow)}", flush=True)
        timings = interleaved(runs, self.protocol) | {name: singly[name].times(explained) for name in slow}
        verdicts = {
            name: {**found, "extrapolated": name in slow}
            if name in PEERS
            else verdict_on_job(results[name], question, self.right, ALLOWED[precision_of(name)])
            for name, found in self.verdicts.items()
        }
        return self._record("job", explained, timings, verdicts)

    def _record(
        self, kind: str, explained: int, timings: Mapping[str, Timing], verdicts: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        workload = self.workload
        flops = 3 * explained * self.question.flops  # forward, denominators, adjoint: as if nothing were saved
        told = {}
        for name, timing in timings.items():
            rate = flops / timing.median / 1e9
            share = round(rate / ceiling(name, self.ceilings), 3)
            told[name] = {**timing.record(), **verdicts[name], "gflops": round(rate, 1), "share_of_ceiling": share}
        comparisons = [
            {
                "kind": f"{kind} of {workload} / {peer}",
                "precision": precision,
                "ours": ours(precision),
                "rival": peer,
                "ratio": round(timings[peer].median / timings[ours(precision)].median, 3),
            }
            for peer in timings
            if peer in PEERS
            for precision in workload.precisions
        ]
        return {
            "case": f"{workload}, {kind}",
            "kind": kind,
            "network": workload.network.name,
            "frames": workload.frames,
            "size": workload.size or workload.network.size,
            "clips": workload.clips,
            "gflop": round(flops / 1e9, 3),
            "comparisons": comparisons,
            "contenders": told,
        }


def ceiling(name: str, ceilings: Mapping[str, float]) -> float:
    """GFLOP/s that a contender could reach: those of its number format; three bfloat16 products may serve float32."""
    wide, narrow = ceilings["float32"], ceilings["bfloat16"]
    return max(wide, {ours("float32"): narrow / 3, ours("mixed"): narrow, ours("bfloat16"): narrow}.get(name, 0.0))
