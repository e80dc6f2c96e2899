"""Other ways to explain a network, each as its users set it up, to be timed beside captum_dtd.

`PEERS` is the registry. A peer says what its answer must agree with, and nothing is compared in silence: relevance by the same
rules must be ours, relevance by other rules must still add up to the score, and a method that answers another question is
marked as such.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from networks import Question
from plain_walk import PlainWalk
from torch import Tensor, nn

Explain = Callable[[Tensor], Tensor]
"""Clips (N, C, T, H, W) to relevance of the same shape."""

Answer = Literal["shares", "winners", "sum", "other"]
"""What a peer computes: z+ and z-beta with max pools that share or whose winner takes all; relevance by other rules, of which
the sum is known; or something else."""


@dataclass(frozen=True)
class Peer:
    """A library or a method.

    Attributes:
        prepare: sets it up for a question, on a copy of the model if it changes that.
        answer: what its result must agree with.
        needs: the package that must be installed.
    """

    prepare: Callable[[Question], Explain]
    answer: Answer
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether it can be asked on this machine."""
        return importlib.util.find_spec(self.needs) is not None


def _zennit(question: Question) -> Explain:
    """zennit's z+ and z-beta, biases ignored, batch norms merged; a max pool's gradient goes to the maximum."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import SpecialFirstLayerMapComposite
    from zennit.rules import Norm, Pass, ZBox, ZPlus
    from zennit.types import Activation, AvgPool, Convolution, Linear

    model = copy.deepcopy(question.model)
    low, high = (question.clips.new_tensor(bound).view(1, -1, 1, 1, 1) for bound in (question.low, question.high))
    z_plus = ZPlus(stabilizer=1e-15, zero_params=["bias"])
    rules = [(Activation, Pass()), (Convolution, z_plus), (Linear, z_plus), (AvgPool, Norm(stabilizer=1e-15))]
    composite = SpecialFirstLayerMapComposite(
        layer_map=rules,
        first_map=[(Convolution, ZBox(low=low, high=high, stabilizer=1e-15))],
        canonizers=[SequentialMergeBatchNorm()],
    )

    def explain(clips: Tensor) -> Tensor:
        with torch.enable_grad(), Gradient(model=model, composite=composite) as attributor:
            relevance: Tensor = attributor(clips, partial(_only, target=question.target))[1]
        return relevance.detach()

    return explain


def _only(scores: Tensor, target: int) -> Tensor:
    chosen = torch.zeros_like(scores)
    chosen[:, target] = scores.detach()[:, target]
    return chosen


def _captum_lrp(question: Question) -> Explain:
    """Captum's LRP with its z+, also at the pixels; rules are set by hand before every call, which removes them."""
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, IdentityRule

    model = copy.deepcopy(question.model)
    rules: list[tuple[nn.Module, Callable[[], Any]]] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            rules.append((module, partial(Alpha1_Beta0_Rule, set_bias_to_zero=True)))
        elif isinstance(module, nn.BatchNorm3d):
            rules.append((module, IdentityRule))
        elif isinstance(module, (nn.AvgPool3d, nn.AdaptiveAvgPool3d)):
            rules.append((module, EpsilonRule))

    def explain(clips: Tensor) -> Tensor:
        for module, rule in rules:
            module.rule = rule()
        with torch.enable_grad():
            relevance: Tensor = LRP(model).attribute(clips.clone().requires_grad_(), target=question.target)
        for module in model.modules():  # it leaves them behind, which would weigh on whoever comes next
            module.__dict__.pop("activations", None)
        return relevance.detach()

    return explain


def _gradient_method(name: str, question: Question, **options: Any) -> Explain:
    """A method of Captum's that needs gradients alone."""
    from captum import attr

    method = getattr(attr, name)(question.model)

    def explain(clips: Tensor) -> Tensor:
        with torch.enable_grad():
            attribution: Tensor = method.attribute(clips.clone().requires_grad_(), target=question.target, **options)
        return attribution.detach()

    return explain


def _integrated_gradients(question: Question) -> Explain:
    """From black, in 50 steps, taken one by one: all at once they would need fifty times the memory."""
    return _gradient_method(
        "IntegratedGradients",
        question,
        baselines=question.clips.new_tensor(question.low).view(1, -1, 1, 1, 1).expand_as(question.clips),
        n_steps=50,
        internal_batch_size=len(question.clips),
    )


def _plain(question: Question, compiled: bool = False) -> Explain:
    walk = PlainWalk(question.model, question.low, question.high)
    run: Callable[[Tensor, int], Tensor] = torch.compile(walk.__call__, dynamic=False) if compiled else walk

    def explain(clips: Tensor) -> Tensor:
        with torch.no_grad():
            return run(clips, question.target)

    return explain


PEERS = {
    "zennit": Peer(_zennit, "winners", "zennit"),
    "captum LRP": Peer(_captum_lrp, "sum"),
    "plain torch": Peer(_plain, "shares"),
    "plain torch, compiled": Peer(partial(_plain, compiled=True), "shares"),
    "input x gradient": Peer(partial(_gradient_method, "InputXGradient"), "other"),
    "integrated gradients": Peer(_integrated_gradients, "other"),
}
