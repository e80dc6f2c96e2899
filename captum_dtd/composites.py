"""Composites: which rule is used where.

A composite names a rule for each kind of layer and may override it by module path or module type::

    EPSILON_GAMMA_BOX.override({"layer4.*": ZPlus(), nn.Linear: Epsilon(1e-3)})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from captum_dtd.layers import Layer, LinearMap, MaxPool, Weighted
from captum_dtd.rules import Epsilon, Gamma, MaxPoolRule, Proportional, Rule, WinnerTakesAll, ZBeta, ZPlus

Selector: TypeAlias = str | type[nn.Module]
"""A glob over module paths (``"layer4.*"``; an operation outside any module goes by its own name) or a module type."""

Override: TypeAlias = tuple[Selector, Rule | MaxPoolRule]


@dataclass(frozen=True)
class Composite:
    """Which rule is used where.

    Args:
        name: what the composite is called in tables and records.
        pixel: first linear layers, reached from the input through nothing but affine steps and rearrangements.
        convolution: convolutions that are not pixel layers.
        linear: fully connected layers.
        combination: additions, sums, means and average pools, linear upsampling, and attention's averages.
        max_pool: max pooling.
        overrides: pairs of a selector and a rule; the last that matches decides.

    Example:
        >>> from captum_dtd.rules import Epsilon
        >>> DTD.override({"fc8": Epsilon(1e-3)}).overrides
        (('fc8', Epsilon(stabilizer=0.001, bias='absorbed')),)
    """

    name: str
    pixel: Rule
    convolution: Rule
    linear: Rule
    combination: Rule
    max_pool: MaxPoolRule
    overrides: tuple[Override, ...] = ()

    def override(self, rules: Mapping[Selector, Rule | MaxPoolRule]) -> Composite:
        """The same composite with other rules where a selector matches; later selectors win over earlier ones.

        Args:
            rules: selector -> rule; a linear rule touches linear layers only, a max-pooling rule max poolings only.

        Raises:
            TypeError: if a selector is neither a string nor a module type, or a value is not a rule.
        """
        for selector, rule in rules.items():
            if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
                raise TypeError(f"composite: {selector!r} selects nothing; use a glob of module paths or a module type")
            if not isinstance(rule, (Rule, MaxPoolRule)):
                raise TypeError(f"composite: {selector!r} is given {rule!r}, which is not a rule of captum_dtd.rules")
        return replace(self, overrides=(*self.overrides, *rules.items()))

    def rule_for(
        self, layer: Layer, is_pixel_layer: bool, joins_logits: bool, path: str, module: nn.Module | None
    ) -> tuple[Rule | MaxPoolRule | None, set[Selector]]:
        """The rule of one layer (None: relevance just passes), and the selectors that chose among its rules.

        Args:
            layer: the layer.
            is_pixel_layer: whether it is a first linear layer.
            joins_logits: whether it combines logits, which may be negative, on their way to the output.
            path: of its module.
            module: its module, if it stands in one.
        """
        wanted: type | tuple[type, ...]
        rule: Rule | MaxPoolRule
        if isinstance(layer, MaxPool):
            rule, wanted = WinnerTakesAll() if joins_logits else self.max_pool, (Proportional, WinnerTakesAll)
        elif isinstance(layer, LinearMap):
            rule, wanted = JOINED_LOGITS if joins_logits else self._linear_rule(layer, is_pixel_layer), Rule
        else:
            return None, set()
        used: set[Selector] = set()
        for selector, other in self.overrides:
            if isinstance(other, wanted) and _selects(selector, path, module):
                rule = other
                used.add(selector)
        return rule, used

    def _linear_rule(self, layer: LinearMap, is_pixel_layer: bool) -> Rule:
        if is_pixel_layer:
            return self.pixel
        if isinstance(layer, Weighted):
            return self.convolution if layer.channel_dim == 1 else self.linear
        return self.combination

    def check_selectors(self, used: Iterable[Selector], paths: Iterable[str]) -> None:
        """Raise ValueError for selectors that chose nothing: a misspelt name must not be silently ignored."""
        idle = [selector for selector, _ in self.overrides if selector not in set(used)]
        if idle:
            known = sorted({path for path in paths if path})
            inner = [each for each in idle if isinstance(each, str) and any(p.startswith(f"{each}.") for p in known)]
            hint = f" (what is in it is {', '.join(repr(f'{each}.*') for each in inner)})" if inner else ""
            raise ValueError(
                f"composite: {', '.join(map(repr, idle))} matches no layer that has a rule of that kind{hint}; layers: "
                f"{', '.join(known)}"
            )


def _selects(selector: Selector, path: str, module: nn.Module | None) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(path, selector)
    return isinstance(module, selector)


JOINED_LOGITS = Epsilon(stabilizer=0.0, bias="ignored")
"""Sums and averages of logits, behind the last linear layers: each logit keeps its own share, of whatever sign."""

DTD = Composite(
    name="dtd",
    pixel=ZBeta(),
    convolution=ZPlus(),
    linear=ZPlus(),
    combination=ZPlus(),
    max_pool=Proportional(),
)
"""Deep Taylor decomposition: z-beta at the pixels, z+ everywhere else, proportional max pooling."""

EPSILON_GAMMA_BOX = Composite(
    name="epsilon-gamma-box",
    pixel=ZBeta(),
    convolution=Gamma(0.25),
    linear=Epsilon(1e-6),
    combination=Epsilon(1e-6),
    max_pool=WinnerTakesAll(),
)
"""z-beta at the pixels, gamma on convolutions, epsilon on the rest: less noise than epsilon, sharper than z+."""

COMPOSITES = {composite.name: composite for composite in (DTD, EPSILON_GAMMA_BOX)}


def as_composite(composite: str | Composite | Mapping[Selector, Rule | MaxPoolRule]) -> Composite:
    """The composite that a name, a composite, or a mapping laid over `DTD` stands for.

    Raises:
        ValueError: if there is no composite of that name.
        TypeError: if it is none of the three.
    """
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, Mapping):
        return DTD.override(composite)
    if not isinstance(composite, str):
        raise TypeError(f"composite must be a name, a Composite or a mapping of rules, got {type(composite).__name__}")
    if composite not in COMPOSITES:
        raise ValueError(f"composite {composite!r} does not exist; there are {', '.join(map(repr, COMPOSITES))}")
    return COMPOSITES[composite]
