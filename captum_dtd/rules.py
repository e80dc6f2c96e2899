"""Rules: how the relevance of a layer's output is shared among its inputs.

A rule is written down as a short list of *groups*. Every group has one denominator::

    z    = sum over terms of  scale * A_weight(input)   (+ bias)
    s    = coefficient * R / (z + stabilizer * sign(z))
    R_in = sum over terms of  input * scale * adjoint(A_weight)(s)

where ``A_weight`` is the layer as a linear map with its weights ``v`` replaced by a part of them, and ``input`` is a part
of what enters the layer. A zero denominator passes no relevance. Rules are frozen dataclasses: printable, comparable, a
record of how a map was made.

Sources: z+, z-beta and w-squared: Montavon et al. 2017, *Explaining nonlinear classification decisions with deep Taylor
decomposition*; epsilon and alpha-beta: Bach et al. 2015, *On pixel-wise explanations*; gamma: Montavon et al. 2019,
*Layer-wise relevance propagation: an overview*; flat: Lapuschkin et al. 2019, *Unmasking Clever Hans predictors*;
proportional max pooling: Hiley et al. 2019, *Discriminating spatial and temporal relevance in deep Taylor decompositions*.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

InputPart: TypeAlias = Literal["x", "x+", "x-", "x-low", "x-high", "1"]
"""Which part of a layer's input a term reads: ``x+ = max(x, 0)``, ``x- = min(x, 0)``, the distance to a pixel bound, or ones."""

WeightPart: TypeAlias = Literal["v", "v+", "v-", "v^2", "1"]
"""Which part of a layer's weights a term uses: ``v+ = max(v, 0)``, ``v- = min(v, 0)``, their squares, or ones."""

Bias: TypeAlias = Literal["ignored", "absorbed"]
"""``"ignored"``: biases do not enter the denominator; ``"absorbed"``: they do, and keep the share that is theirs."""


Outputs: TypeAlias = Literal["all", "negative", "non-negative"]
"""Which outputs of a layer a group of terms is for."""


@dataclass(frozen=True)
class Term:
    """One summand of a denominator: ``scale * A_weight(input)``."""

    input: InputPart
    weight: WeightPart
    scale: float = 1.0


@dataclass(frozen=True)
class Group:
    """Terms that share one denominator.

    ``bias`` lists the parts of the layer's bias that are added to it, with their scale. ``outputs`` says whose relevance it is
    for: that of all outputs, or of those that are negative, or are not. An output is ``A_v(x)``, with the bias if it has a share.
    """

    terms: tuple[Term, ...]
    bias: tuple[tuple[WeightPart, float], ...] = ()
    coefficient: float = 1.0
    outputs: Outputs = "all"

    @property
    def is_positive(self) -> bool:
        """Whether the denominator is never negative, whatever the input and the weights are."""
        signs = {"x+": 1, "v+": 1, "1": 1, "v^2": 1, "x-": -1, "v-": -1}
        terms = [signs.get(term.input, 0) * signs.get(term.weight, 0) * term.scale for term in self.terms]
        return min(terms + [signs.get(part, 0) * scale for part, scale in self.bias], default=0) > 0


OUTPUT = Group((Term("x", "v"),))
"""Its denominator is the layer's output, without its bias."""


class Rule(ABC):
    """How a linear layer's relevance is shared among its inputs. A new rule is a frozen dataclass with ``groups``."""

    stabilizer: float = 0.0
    """Added to every denominator, away from zero. Rules whose denominators are sums of squares or counts have no use for it."""

    @property
    @abstractmethod
    def groups(self) -> tuple[Group, ...]:
        """The rule's groups of terms, each with one denominator."""

    @property
    def reads_bounds(self) -> bool:
        """Whether it reads pixel bounds, which are known where a layer reads pixels only."""
        return any(term.input in ("x-low", "x-high") for group in self.groups for term in group.terms)


def _check(stabilizer: float, bias: str = "ignored") -> None:
    _check_number("stabilizer", stabilizer)
    if bias not in ("ignored", "absorbed"):
        raise ValueError(f"bias must be 'ignored' or 'absorbed', got {bias!r}")


def _check_number(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive, and finite, got {value}")


@dataclass(frozen=True)
class ZPlus(Rule):
    """z+: relevance goes where it excited the neuron, ``R_in = x+ adj_v+(s) + x- adj_v-(s)``.

    ``s = R / (A_v+(x+) + A_v-(x-))``. On the non-negative inputs of a ReLU network the second part is zero and this is the
    rule of Montavon et al. 2017; on signed inputs it is its two-part form. On an addition, a mean or an average pool it
    gives every summand the share of its positive part.

    Args:
        bias: ``"ignored"`` (as in deep Taylor decomposition) or ``"absorbed"``: the bias's positive part joins the denominator.
        stabilizer: added to the denominator, away from zero.

    Raises:
        ValueError: if the stabilizer is negative or not finite, or the bias option does not exist.

    Example:
        >>> ZPlus()
        ZPlus(bias='ignored', stabilizer=0.0)
    """

    bias: Bias = "ignored"
    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        _check(self.stabilizer, self.bias)

    @property
    def groups(self) -> tuple[Group, ...]:
        bias: tuple[tuple[WeightPart, float], ...] = (("v+", 1.0),) if self.bias == "absorbed" else ()
        return (Group((Term("x+", "v+"), Term("x-", "v-")), bias),)


@dataclass(frozen=True)
class ZBeta(Rule):
    """z-beta, for pixels that live in a box ``low <= x <= high``: ``R_in = x adj_v(s) - low adj_v+(s) - high adj_v-(s)``.

    ``s = R / (A_v(x) - A_v+(low) - A_v-(high))``. It is evaluated as z+ of the distances to the box,
    ``z = A_v+(x - low) + A_v-(x - high)``: the same sum, without its cancellation, and non-negative by construction.

    Args:
        bias: ``"ignored"`` or ``"absorbed"`` (positive part).
        stabilizer: added to the denominator, away from zero.

    Raises:
        ValueError: if the stabilizer is negative or not finite, or the bias option does not exist.

    Example:
        >>> ZBeta().groups[0].terms[0]
        Term(input='x-low', weight='v+', scale=1.0)
    """

    bias: Bias = "ignored"
    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        _check(self.stabilizer, self.bias)

    @property
    def groups(self) -> tuple[Group, ...]:
        bias: tuple[tuple[WeightPart, float], ...] = (("v+", 1.0),) if self.bias == "absorbed" else ()
        return (Group((Term("x-low", "v+"), Term("x-high", "v-")), bias),)


@dataclass(frozen=True)
class Epsilon(Rule):
    """Epsilon: every contribution ``x v`` keeps its sign, ``R_in = x adj_v(R / (z + epsilon sign(z)))`` with ``z = A_v(x) + b``.

    Args:
        stabilizer: the epsilon.
        bias: ``"absorbed"`` (as usual for this rule) or ``"ignored"``.

    Raises:
        ValueError: if the stabilizer is negative or not finite, or the bias option does not exist.

    Example:
        >>> Epsilon(1e-3).stabilizer
        0.001
    """

    stabilizer: float = 1e-6
    bias: Bias = "absorbed"

    def __post_init__(self) -> None:
        _check(self.stabilizer, self.bias)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term("x", "v"),), (("v", 1.0),) if self.bias == "absorbed" else ()),)


@dataclass(frozen=True)
class Gamma(Rule):
    """Gamma: as epsilon, with the contributions that made an output what it is counted ``1 + gamma`` times.

    Of an output that is not negative those are the exciting ones, ``z = A_v(x) + gamma (A_v+(x+) + A_v-(x-)) + b + gamma b+``,
    of a negative one the inhibiting ones, ``z = A_v(x) + gamma (A_v-(x+) + A_v+(x-)) + b + gamma b-`` (Andeol et al. 2021,
    *Learning domain invariant representations by joint Wasserstein distance minimization*, and zennit's rule of this name): so
    no denominator is nearer to zero than epsilon's.

    Args:
        gamma: how much more they count; 0 is epsilon, large values approach z+.
        stabilizer: added to the denominator, away from zero.
        bias: ``"absorbed"`` or ``"ignored"``; it is part of the output whose sign is looked at where it is absorbed.

    Raises:
        ValueError: if ``gamma`` or the stabilizer is negative or not finite, or the bias option does not exist.

    Example:
        >>> [group.outputs for group in Gamma(0.5).groups]
        ['non-negative', 'negative']
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    bias: Bias = "absorbed"

    def __post_init__(self) -> None:
        _check(self.stabilizer, self.bias)
        _check_number("gamma", self.gamma)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._group("v+", "v-", "non-negative"), self._group("v-", "v+", "negative")

    def _group(self, of_positive: WeightPart, of_negative: WeightPart, outputs: Outputs) -> Group:
        """With the weights that count more, of positive inputs and of negative ones."""
        terms = (Term("x", "v"), Term("x+", of_positive, self.gamma), Term("x-", of_negative, self.gamma))
        bias: tuple[tuple[WeightPart, float], ...] = (("v", 1.0), (of_positive, self.gamma))
        return Group(terms, bias if self.bias == "absorbed" else (), outputs=outputs)


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """Alpha-beta: excitation shared ``alpha`` times, inhibition ``-beta`` times, each with its own denominator.

    Args:
        alpha: weight of the exciting contributions.
        beta: weight of the inhibiting ones; ``alpha - beta`` must be 1, so that relevance is conserved.
        stabilizer: added to both denominators, away from zero.
        bias: ``"ignored"`` or ``"absorbed"`` (positive part with alpha, negative part with beta).

    Raises:
        ValueError: if ``alpha - beta != 1``, or a number is negative or not finite.

    Example:
        >>> len(AlphaBeta(2.0, 1.0).groups)
        2
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 0.0
    bias: Bias = "ignored"

    def __post_init__(self) -> None:
        _check(self.stabilizer, self.bias)
        _check_number("alpha", self.alpha)
        if not self.beta >= 0 or not abs(self.alpha - self.beta - 1) <= 1e-12:
            raise ValueError(f"alpha - beta must be 1 and beta >= 0, got alpha={self.alpha} and beta={self.beta}")

    @property
    def groups(self) -> tuple[Group, ...]:
        absorbed = self.bias == "absorbed"
        exciting = Group((Term("x+", "v+"), Term("x-", "v-")), (("v+", 1.0),) if absorbed else (), self.alpha)
        inhibiting = Group((Term("x+", "v-"), Term("x-", "v+")), (("v-", 1.0),) if absorbed else (), -self.beta)
        return (exciting, inhibiting)


@dataclass(frozen=True)
class WSquare(Rule):
    """w-squared: shares by squared weights, whatever the input: ``R_in = adj_v2(R / A_v2(1))``. Zero padding gets nothing.

    Biases are ignored.

    Example:
        >>> WSquare().groups[0].terms
        (Term(input='1', weight='v^2', scale=1.0),)
    """

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term("1", "v^2"),)),)


@dataclass(frozen=True)
class Flat(Rule):
    """Flat: equal shares for everything that a neuron sees: ``R_in = adj_1(R / A_1(1))``. Zero padding gets nothing.

    Example:
        >>> Flat().groups[0].terms
        (Term(input='1', weight='1', scale=1.0),)
    """

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term("1", "1"),)),)


@dataclass(frozen=True)
class Proportional:
    """Max pooling, shared: ``R_in = sum over windows of x+ / (sum of x+ in the window) R`` (the authors' choice).

    Example:
        >>> Proportional()
        Proportional(stabilizer=0.0)
    """

    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        _check(self.stabilizer)


@dataclass(frozen=True)
class WinnerTakesAll:
    """Max pooling, routed: a window's relevance goes to its maximum; of equal values the one that torch's indices name.

    Example:
        >>> WinnerTakesAll()
        WinnerTakesAll()
    """


MaxPoolRule: TypeAlias = Proportional | WinnerTakesAll
"""What a max-pooling layer may do with relevance."""
