"""Every rule on every kind of linear layer against the oracle, on numbers by hand, and how composites choose rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import between, zoo
from oracle import Node, Walk, assert_agrees, explain
from torch import Tensor, nn

from captum_dtd import Composite, DeepTaylor
from captum_dtd.composites import DTD, EPSILON_GAMMA_BOX
from captum_dtd.reference import divide
from captum_dtd.rules import AlphaBeta, Epsilon, Flat, Gamma, Proportional, WinnerTakesAll, WSquare, ZBeta, ZPlus

LOW, HIGH = (-2.1, -2.0, -1.8), (2.2, 2.4, 2.6)

RULES: dict[str, tuple[Any, oracle.Rule]] = {
    "z+": (ZPlus(), oracle.z_plus),
    "z+ bias absorbed": (ZPlus(bias="absorbed"), partial(oracle.z_plus, bias="absorbed")),
    "z+ stabilized": (ZPlus(stabilizer=0.1), partial(oracle.z_plus, stabilizer=0.1)),
    "epsilon": (Epsilon(), oracle.epsilon),
    "epsilon 0.25": (Epsilon(stabilizer=0.25), partial(oracle.epsilon, stabilizer=0.25)),
    "epsilon bias ignored": (Epsilon(bias="ignored"), partial(oracle.epsilon, bias="ignored")),
    "gamma": (Gamma(), oracle.gamma),
    "gamma 1": (Gamma(gamma=1.0, stabilizer=0.01), partial(oracle.gamma, gamma=1.0, stabilizer=0.01)),
    "gamma bias ignored": (Gamma(bias="ignored"), partial(oracle.gamma, bias="ignored")),
    "alpha-beta": (AlphaBeta(), oracle.alpha_beta),
    "alpha-beta 1.5 0.5": (
        AlphaBeta(alpha=1.5, beta=0.5, stabilizer=0.01),
        partial(oracle.alpha_beta, alpha=1.5, beta=0.5, stabilizer=0.01),
    ),
    "alpha-beta bias absorbed": (AlphaBeta(bias="absorbed"), partial(oracle.alpha_beta, bias="absorbed")),
    "w-squared": (WSquare(), oracle.w_square),
    "flat": (Flat(), oracle.flat),
}


def test_which_denominators_cannot_be_negative() -> None:
    positive = {name: [group.is_positive for group in rule.groups] for name, (rule, _) in RULES.items()}
    assert positive == {
        **{name: [True] for name in ("z+", "z+ bias absorbed", "z+ stabilized", "w-squared", "flat")},
        **{name: [False] for name in ("epsilon", "epsilon 0.25", "epsilon bias ignored")},
        **{name: [False] * len(RULES[name][0].groups) for name in ("gamma", "gamma 1", "gamma bias ignored")},
        **{name: [True, False] for name in ("alpha-beta", "alpha-beta 1.5 0.5", "alpha-beta bias absorbed")},
    }
    assert [group.is_positive for group in ZBeta().groups] == [False], "pixels may lie outside of their box"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quotients_are_the_same_where_denominators_cannot_be_negative(dtype: torch.dtype) -> None:
    """Zeros and subnormal numbers pass nothing, the smallest normal one and NaN do."""
    tiny = torch.finfo(dtype).tiny
    subnormal = tiny * (1 - torch.finfo(dtype).eps)
    z = torch.tensor([0.0, -0.0, tiny / 8, subnormal, tiny, 2.0, float("inf"), float("nan")], dtype=dtype)
    relevance = torch.tensor([1.0, 1.0, 1.0, 1.0, tiny, 3.0, 1.0, 1.0], dtype=dtype)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.5, 0.0, float("nan")], dtype=dtype)
    for is_positive in (False, True):
        torch.testing.assert_close(divide(relevance, z, 0.0, is_positive), expected, rtol=0, atol=0, equal_nan=True)


class Add(nn.Module):
    """A layer of two inputs: each half of the channels, added."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return left + right


class Subtract(Add):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return left - right


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 4))


LAYERS: dict[str, Any] = {
    "conv": lambda: nn.Conv3d(4, 3, (2, 3, 3), stride=(1, 2, 1), padding=1),
    "grouped conv": lambda: nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 0), groups=2, dilation=(1, 1, 2)),
    "linear": lambda: nn.Linear(5, 3),
    "average pool": lambda: nn.AvgPool3d(3, 2, 1),
    "mean": Mean,
    "add": Add,
    "subtract": Subtract,
}


class Branches(nn.Module):
    """For every rule a branch: pixel convolution, activation, layer, linear head.

    Output k is that of branch k, so a target chooses the rule.
    """

    def __init__(self, layer: Callable[[], nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.pixels = nn.ModuleList(nn.Conv3d(3, 4, 1) for _ in RULES)
        self.activation = activation
        self.layers = nn.ModuleList(layer() for _ in RULES)
        features = self.layers[0](torch.zeros(1, 4, 3, 4, 5)).numel()
        self.heads = nn.ModuleList(nn.Linear(features, 1) for _ in RULES)

    def forward(self, x: Tensor) -> Tensor:
        branches = zip(self.pixels, self.layers, self.heads, strict=True)
        return torch.cat([head(layer(self.activation(pixel(x))).flatten(1)) for pixel, layer, head in branches], 1)

    def steps(self, w: Walk, x: Node, k: int) -> Node:
        x = w.each(self.activation, w.pixel(self.pixels[k], x))
        layer = self.layers[k]
        if isinstance(layer, Add):
            left, right = (w.move(lambda v, half=half: v.chunk(2, 1)[half], x) for half in (0, 1))
            sign = -1 if isinstance(layer, Subtract) else 1
            x = w.linear("layer", lambda a, b: a + sign * b, left, right)
        else:
            x = w.linear("layer", layer, x)
        return w.dense(self.heads[k], w.move(lambda v: v.flatten(1), x))


SIGNED = nn.LeakyReLU(0.5)


def check_every_rule(layer: Callable[[], nn.Module], where: str, activation: nn.Module = SIGNED) -> None:
    """Every rule at once on the modules `where` (layers or pixels), one branch each."""
    model = Branches(layer, activation).double().eval()
    x = between(LOW, HIGH, (1, 3, 3, 4, 5), 1)
    composite = {f"{where}.{k}": rule for k, (rule, _) in enumerate(RULES.values())}
    found = {
        backend: DeepTaylor(model, LOW, HIGH, composite=composite, backend=backend).attribute(
            x.expand(len(RULES), -1, -1, -1, -1), torch.arange(len(RULES))
        )
        for backend in ("auto", "reference")
    }
    disagree = []
    for k, (name, (_, form)) in enumerate(RULES.items()):
        walk = partial(Walk, {where.rstrip("s"): form})
        expected = explain(model, x, LOW, HIGH, 0, args=(k,), walk=walk)
        for backend, relevance in found.items():
            try:
                assert_agrees(relevance[k : k + 1], expected)
            except AssertionError as error:
                disagree.append(f"{name}, backend {backend}: {error}")
    assert not disagree, "\n".join(disagree)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("layer", LAYERS)
def test_every_rule_on_every_layer(layer: str) -> None:
    check_every_rule(LAYERS[layer], "layers")


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("layer", ["conv", "linear", "average pool", "subtract"])
def test_every_rule_on_rectified_features(layer: str) -> None:
    """Of what cannot be negative a rule's terms with negative inputs are left out; all else that is the rule's must stay."""
    check_every_rule(LAYERS[layer], "layers", nn.ReLU())


@pytest.mark.usefixtures("one_trace")
def test_every_rule_on_pixels() -> None:
    """An override reaches the pixel layer too."""
    check_every_rule(lambda: nn.Conv3d(4, 3, 2), "pixels")


STEPS = torch.linspace(-0.5, 0.75, 5, dtype=torch.float64)

BELOW_ZERO: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "less a number": ("each", "a", lambda a: a - 0.5),
    "plus a negative number": ("each", "a", lambda a: a + -0.5),
    "a number less it": ("each", "a", lambda a: 0.25 - a),
    "negated": ("each", "a", lambda a: -a),
    "times a negative number": ("each", "a", lambda a: a * -2),
    "by a negative number": ("each", "a", lambda a: a / -2),
    "times numbers of both signs": ("each", "a", lambda a: a * STEPS),
    "less numbers of both signs": ("each", "a", lambda a: a - STEPS),
    "at most numbers of both signs": ("each", "a", lambda a: torch.minimum(a, STEPS)),
    "a negative number below a threshold": ("each", "a", lambda a: F.threshold(a, 0.25, -1.0)),
    "batch norm": ("each", "a", lambda a: F.batch_norm(a, STEPS[3:], STEPS[3:])),
    "at least a negative number": ("each", "s", lambda s: s.clamp(min=-0.25)),
    "at most a number": ("each", "s", lambda s: torch.clamp_max(s, 0.5)),
    "between two numbers": ("each", "s", F.hardtanh),
    "leaky": ("each", "s", lambda s: F.leaky_relu(s, 0.5)),
    "difference": ("add", "ab", lambda a, b: a - b),
    "difference from twice": ("add", "ab", lambda a, b: torch.sub(a, b, alpha=2)),
    "sum with a negative factor": ("add", "ab", lambda a, b: torch.add(a, b, alpha=-2)),
    "sum, the first rectified": ("add", "as", lambda a, s: a + s),
    "sum, the second rectified": ("add", "sa", lambda s, a: s + a),
    "gated": ("gate", "as", lambda a, s: a * torch.tanh(s)),
    "joined": ("move", "as", lambda a, s: torch.cat([a, s], 4)),
    "joined with negative numbers": ("move", "a", lambda a: torch.cat([a, a.new_full(a.shape, -0.5)], 4)),
    "padded with a negative number": ("move", "a", lambda a: F.pad(a, (0, 1, 1, 0), value=-0.5)),
}
"""How rectified features a and b, and s with both signs, become features that may be negative."""


class BelowZero(nn.Module):
    """Output k explains what became of the features in way k, by the same convolution and the same head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.s = (nn.Conv3d(3, 2, 1) for _ in range(3))
        self.conv = nn.Conv3d(2, 4, (1, 2, 2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = {"a": F.relu(self.a(x)), "b": F.relu(self.b(x)), "s": self.s(x)}
        ways = (fn(*(features[name] for name in names)) for _, names, fn in BELOW_ZERO.values())
        return torch.cat([self.head(F.relu(self.conv(way)).mean((2, 3, 4))) for way in ways], 1)

    def steps(self, w: Walk, x: Node, k: int) -> Node:
        kind, names, fn = list(BELOW_ZERO.values())[k]
        features = {"a": w.each(F.relu, w.pixel(self.a, x)), "b": w.each(F.relu, w.pixel(self.b, x))}
        features["s"] = w.pixel(self.s, x)
        first, *others = (features[name] for name in names)
        way = (
            w.each(lambda v: fn(v, others[0].value), first) if kind == "gate" else getattr(w, kind)(fn, first, *others)
        )
        x = w.each(F.relu, w.conv(self.conv, way))
        return w.dense(self.head, w.add(lambda v: v.mean((2, 3, 4)), x))


@pytest.mark.usefixtures("one_trace")
def test_what_may_be_negative_again_is_shared_as_such() -> None:
    """Negative inputs with negative weights excite as well, also behind a ReLU that something was done to since."""
    model = BelowZero().double().eval()
    x, count = between(LOW, HIGH, (1, 3, 3, 4, 5), 1), len(BELOW_ZERO)
    disagree = []
    for backend in ("auto", "reference"):
        method = DeepTaylor(model, LOW, HIGH, backend=backend, seed="one")
        found = method.attribute(x.expand(count, -1, -1, -1, -1), torch.arange(count))
        for k, way in enumerate(BELOW_ZERO):
            try:
                assert_agrees(found[k : k + 1], explain(model, x, LOW, HIGH, 0, args=(k,), seed="one"))
            except AssertionError as error:
                disagree.append(f"{way}, backend {backend}: {error}")
    assert not disagree, "\n".join(disagree)


@pytest.mark.parametrize("name", ["plain", "residual", "images", "slow-fast", "pools", "norms", "gated"])
def test_epsilon_gamma_box(name: str) -> None:
    case = zoo(name)
    model, x = case.model(), case.inputs(2)
    expected = explain(model, x, case.low, case.high, [0, 3], walk=oracle.egb)
    method = DeepTaylor(model, case.low, case.high, composite="epsilon-gamma-box")
    assert_agrees(method.attribute(x, torch.tensor([0, 3])), expected)


TWO_LAYERS = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1)).double().eval()


def by_hand(weight: list[float], bias: float, x: list[float], rule: Any) -> list[float]:
    """Relevance of two features that reach the only output by these weights, seed one, the first layer the identity."""
    model = TWO_LAYERS
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([weight]))
        model[1].bias.fill_(bias)
    method = DeepTaylor(model, -10, 10, composite={"1": rule, "0": WSquare()}, seed="one")
    return method.attribute(torch.tensor([x], dtype=torch.float64), 0)[0].tolist()


@pytest.mark.usefixtures("one_trace")
def test_by_hand() -> None:
    """Numbers anyone can check: weights (2, -1), bias 3, features (3, 2) or (3, -2)."""
    assert by_hand([2, -1], 3, [3, 2], ZPlus()) == pytest.approx([1, 0], abs=1e-14)
    assert by_hand([2, -1], 3, [3, -2], ZPlus()) == pytest.approx([6 / 8, 2 / 8])
    assert by_hand([2, -1], 3, [3, -2], ZPlus(bias="absorbed")) == pytest.approx([6 / 11, 2 / 11])
    assert by_hand([2, -1], 3, [3, 2], Epsilon(0.0)) == pytest.approx([6 / 7, -2 / 7])
    assert by_hand([2, -1], 3, [3, 2], Epsilon(0.0, bias="ignored")) == pytest.approx([6 / 4, -2 / 4])
    assert by_hand([2, -1], 3, [3, 2], Epsilon(1.0)) == pytest.approx([6 / 8, -2 / 8])
    assert by_hand([2, -1], 3, [3, 2], Gamma(0.5, 0.0)) == pytest.approx([9 / 11.5, -2 / 11.5])
    assert by_hand([2, -1], 3, [3, -2], Gamma(0.5, 0.0, "ignored")) == pytest.approx([9 / 12, 3 / 12])
    assert by_hand([2, -1], 3, [1, 4], Gamma(0.5, 0.0)) == pytest.approx([3 / 3.5, -4 / 3.5])
    assert by_hand([2, -1], 3, [1, 4], Gamma(0.5, 0.0, "ignored")) == pytest.approx([2 / -4, -6 / -4]), "negative: -2"
    assert by_hand([2, -1], 3, [3, 2], AlphaBeta(2, 1)) == pytest.approx([2, -1])
    assert by_hand([2, -1], 3, [3, 2], AlphaBeta(2, 1, bias="absorbed")) == pytest.approx([12 / 9, -1])
    assert by_hand([2, -1], 3, [3, 2], WSquare()) == pytest.approx([4 / 5, 1 / 5])
    assert by_hand([2, -1], 3, [3, 2], Flat()) == pytest.approx([1 / 2, 1 / 2])
    assert by_hand([2, 0], 3, [3, 2], Flat()) == pytest.approx([1 / 2, 1 / 2])
    assert by_hand([2, -1], 3, [-3, 2], ZPlus()) == [0, 0]


def test_z_beta_by_hand() -> None:
    """x = (1, 2) between -1 and 3, weights (2, -1): z = 2 (1 + 1) + 1 (3 - 2) = 5, shares 4 and 1."""
    model = nn.Sequential(nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, -1.0]]))
    relevance = DeepTaylor(model, -1, 3, seed="one").attribute(torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0)
    assert relevance[0].tolist() == pytest.approx([4 / 5, 1 / 5])


def chosen(composite: Any) -> dict[str, str]:
    """The rule of every module of the residual net."""
    case = zoo("residual")
    table = DeepTaylor(case.model(), case.low, case.high, composite=composite).rule_table(case.inputs(2))
    return {row.module: str(row.rule) for row in table.rows}


@pytest.mark.parametrize(
    ("override", "module"),
    [
        ({"b": Epsilon()}, "b"),
        ({"shortcut.*": Epsilon()}, "shortcut.0"),
        ({"*": Epsilon()}, "head"),
        ({"?": Epsilon()}, "a"),
        ({nn.Linear: Epsilon()}, "head"),
        ({nn.Conv3d: Epsilon()}, "stem"),
        ({nn.AdaptiveAvgPool3d: Epsilon()}, "pool"),
    ],
)
def test_overrides_by_name_glob_and_type(override: Any, module: str) -> None:
    """What is named gets the rule; what is not keeps its own."""
    rules, untouched = chosen(override), {"a": "shortcut.0", "head": "b"}.get(module, "head")
    assert rules[module] == str(Epsilon())
    if "*" not in override:
        assert rules[untouched].startswith("ZPlus")


@pytest.mark.usefixtures("one_trace")
def test_override_changes_what_it_names_as_the_oracle_says() -> None:
    case = zoo("residual")
    model, x = case.model(), case.inputs(2)
    expected = explain(model, x, case.low, case.high, 1, walk=lambda: Walk({"dense": oracle.epsilon}))
    for composite in (
        {"head": Epsilon()},
        {"he*": Epsilon()},
        {nn.Linear: Epsilon()},
        DTD.override({"head": Epsilon()}),
    ):
        assert_agrees(DeepTaylor(model, case.low, case.high, composite=composite).attribute(x, 1), expected)


@pytest.mark.parametrize(
    ("typo", "named"),
    [({"haed": Epsilon()}, "haed"), ({"layer4.*": Epsilon()}, "layer4"), ({nn.Conv2d: Epsilon()}, "Conv2d")],
)
def test_an_override_that_names_nothing_is_an_error(typo: Any, named: str) -> None:
    case = zoo("residual")
    with pytest.raises(ValueError, match=named):
        DeepTaylor(case.model(), case.low, case.high, composite=typo).attribute(case.inputs(2), 1)


class Sums(nn.Module):
    """Operations of its own between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"stem": nn.Conv3d(3, 4, 3, padding=1), "block": nn.Conv3d(4, 4, 3, padding=1)})
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body["stem"](x))
        y = y + torch.relu(self.body["block"](y))
        return self.head((y + torch.relu(self.body["block"](y))).mean((2, 3, 4)))


def test_operations_outside_of_modules_are_counted_by_name() -> None:
    x = torch.rand(1, 3, 4, 6, 6)
    rows = DeepTaylor(Sums().eval(), 0.0, 1.0, composite={"add_1": Epsilon()}).rule_table(x).rows
    assert [row.rule.split("(")[0] for row in rows if row.operation == "add"] == ["ZPlus", "Epsilon"]


def test_a_module_of_modules_is_told_how_to_be_selected() -> None:
    with pytest.raises(
        ValueError, match=r"'body' matches no layer .*what is in it is 'body\.\*'\); layers: add, add_1, body\.block"
    ):
        DeepTaylor(Sums().eval(), 0.0, 1.0, composite={"body": Epsilon()}).rule_table(torch.rand(1, 3, 4, 6, 6))


@pytest.mark.parametrize("wrong", ["dtb", {"head": "epsilon"}, 3, {3: Epsilon()}])
def test_a_composite_that_is_none_is_an_error(wrong: Any) -> None:
    case = zoo("residual")
    with pytest.raises((ValueError, TypeError)):
        DeepTaylor(case.model(), case.low, case.high, composite=wrong)


def test_a_rule_that_does_not_fit_its_layer_is_an_error() -> None:
    """Winner-takes-all is no rule of a convolution, nor z-beta of a hidden layer, whose inputs have no bounds."""
    case = zoo("plain")
    for composite in ({"second": WinnerTakesAll()}, {"second": ZBeta()}, {"pool": Gamma()}):
        with pytest.raises((ValueError, TypeError)):
            DeepTaylor(case.model(), case.low, case.high, composite=composite).attribute(case.inputs(2), 1)


def test_rules_and_composites_are_records() -> None:
    """Printable, comparable, frozen: a run can be written down and repeated."""
    assert Epsilon(0.5) == Epsilon(stabilizer=0.5) != Epsilon()
    assert Gamma() == Gamma(gamma=0.25, stabilizer=1e-6, bias="absorbed")
    assert "0.5" in repr(Epsilon(0.5))
    assert DTD != EPSILON_GAMMA_BOX
    assert DTD.override({"head": Epsilon()}) == DTD.override({"head": Epsilon()}) != DTD
    assert isinstance(DTD, Composite)
    for record in (ZPlus(), Proportional(), DTD):
        with pytest.raises(AttributeError):
            record.stabilizer = 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ZPlus(bias="kept"),
        lambda: ZPlus(stabilizer=-1.0),
        lambda: ZPlus(stabilizer=math.inf),
        lambda: Gamma(gamma=math.inf),
        lambda: AlphaBeta(math.nan, math.nan),
        lambda: AlphaBeta(math.inf, math.inf),
        lambda: Epsilon(stabilizer=float("nan")),
    ],
)
def test_rules_refuse_parameters_without_a_meaning(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"bias|stabilizer|gamma|alpha"):
        wrong()
