"""Norms that divide by what they find in their input, and attention: however users write them, the maps are the same.

What the maps have to be is said by the oracle in test_graph.py ("statistics", "attending"), for frozen clips in test_collapse.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import between
from torch import Tensor, nn
from torch.nn.utils import parametrize

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, DiscriminativeRelevance, UnsupportedOperationError
from captum_dtd.composites import DTD
from captum_dtd.graph import trace
from captum_dtd.propagate import Network

LOW, HIGH = -1.0, 1.5


class Net(nn.Module):
    """A stem, whatever ``body`` does to its activations (N, 8, 4, 5, 5), and a head on their mean."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = body
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.conv = nn.Conv3d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.groups = nn.GroupNorm(4, 8)
        self.batch = nn.BatchNorm3d(8)
        self.tokens = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for norm in (self.norm, self.groups, self.batch):
                norm.weight.copy_(torch.tensor([1.2, -0.8, 0.9, -1.1, 0.7, 1.3, -0.6, 1.0]))
                norm.bias.copy_(torch.linspace(-0.2, 0.4, 8))

    def forward(self, x: Tensor, *further: Any) -> Tensor:
        return self.head(self.body(self, F.relu(self.stem(x)), *further).mean((2, 3, 4)))


def net(body: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Net:
    return Net(body).to(dtype).eval()


def clips(dtype: torch.dtype = torch.float64) -> Tensor:
    return between((LOW,) * 3, (HIGH,) * 3, (2, 3, 4, 5, 5), 1, dtype)


def explained(model: nn.Module, *further: Any) -> Tensor:
    """Relevance of a target whose score the traced model has, too."""
    x = clips()
    relevance, delta = DeepTaylor(model, LOW, HIGH).attribute(x, 1, *further, return_convergence_delta=True)
    with torch.no_grad():
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, model(x, *further)[:, 1])
    assert relevance.abs().max() > 0
    return relevance


def assert_alike(body: Callable[..., Tensor], plain: Callable[..., Tensor], *further: Any) -> None:
    torch.testing.assert_close(
        explained(net(body), *further), explained(net(plain), *further), rtol=1e-9, atol=1e-13, check_stride=False
    )


# --- norms -------------------------------------------------------------------------------------------------------


def permuted(m: Net, h: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(h).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3))


def by_tokens(m: Net, h: Tensor) -> Tensor:
    y = m.norm(m.conv(h).flatten(2).transpose(1, 2))
    return F.relu(y.transpose(1, 2).reshape(h.shape))


def by_cast(m: Net, h: Tensor) -> Tensor:
    y = m.conv(h).movedim(1, -1)
    return F.relu(F.layer_norm(y.to(torch.float64), (8,), m.norm.weight, m.norm.bias).movedim(-1, 1))


def by_linear(m: Net, h: Tensor) -> Tensor:
    y = F.linear(h.permute(0, 2, 3, 4, 1), m.conv.weight[:, :, 0, 0, 0], m.conv.bias)
    return F.relu(m.norm(y)).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("body", [by_tokens, by_cast, by_linear])
def test_signs_of_a_norm_s_weights_reach_the_layer_before_it(body: Callable[..., Tensor]) -> None:
    assert_alike(body, permuted)


def test_signs_that_nothing_takes_make_other_maps() -> None:
    """Else the test above would show nothing."""

    def apart(m: Net, h: Tensor) -> Tensor:
        y = m.conv(h)
        return F.relu(m.norm((y + 0 * y).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3))

    difference = explained(net(apart)) - explained(net(permuted))
    assert difference.abs().max() > 1e-3 * explained(net(permuted)).abs().max()


def test_weights_that_are_computed_behind_the_layer() -> None:
    def computed(m: Net, h: Tensor) -> Tensor:
        return F.relu(F.group_norm(m.conv(h), 4, m.groups.weight * 2 - m.groups.weight, m.groups.bias))

    assert_alike(computed, lambda m, h: F.relu(m.groups(m.conv(h))))


NOT_FOLDED: dict[str, Callable[..., Tensor]] = {
    "batch norm behind a linear layer of another dimension": lambda m, h: F.batch_norm(
        F.linear(h.mean((3, 4)), m.tokens.weight[:8, :4]), m.batch.running_mean, m.batch.running_var, m.batch.weight
    ).relu()[..., None, None],
    "twice a number for each channel": lambda m, h: torch.add(
        m.conv(h), m.batch.bias.view(-1, 1, 1, 1), alpha=2
    ).relu(),
    "what is left of a number": lambda m, h: (m.batch.weight.view(-1, 1, 1, 1) - m.conv(h)).relu(),
    "channels that are split": lambda m, h: (
        F.group_norm(m.conv(h).unflatten(1, (4, 2)), 2, m.groups.weight[:4]).relu().flatten(1, 2)
    ),
    "a layer that is read before the norm, too": lambda m, h: (
        lambda y: (m.norm(y).relu() + y.relu()).permute(0, 4, 1, 2, 3)
    )(m.conv(h).permute(0, 2, 3, 4, 1)),
    "a norm of rows": lambda m, h: F.layer_norm(m.conv(h), (5,), m.groups.weight[:5]).relu(),
    "a norm of clips": lambda m, h: F.layer_norm(
        m.conv(h), (8, 4, 5, 5), m.groups.weight.view(-1, 1, 1, 1).expand(8, 4, 5, 5)
    ).relu(),
    "an average that is as large as nothing else": lambda m, h: torch.cat(
        [h.mean((2, 3, 4), True).expand(-1, -1, 4, 5, 5) + m.groups.bias.abs().view(-1, 1, 1, 1), h], 3
    ),
}
"""What resembles what is folded into a layer, or left out, and is not."""


@pytest.mark.filterwarnings("ignore:relevance of")
@pytest.mark.parametrize("how", NOT_FOLDED)
def test_what_only_resembles_what_is_folded_keeps_the_models_score(how: str) -> None:
    explained(net(NOT_FOLDED[how]))


def test_a_parametrized_batch_norm_is_a_batch_norm() -> None:
    def body(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.batch(m.conv(h)))

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    made = net(body)
    parametrize.register_parametrization(made.batch, "weight", Doubled())
    made.eval()
    literal = net(body)
    with torch.no_grad():
        literal.batch.weight.mul_(2)
    torch.testing.assert_close(explained(made), explained(literal), rtol=1e-9, atol=1e-13)


def test_weights_that_are_an_argument_are_not_folded() -> None:
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    found = explained(net(lambda m, h, weight: F.relu(F.group_norm(m.conv(h), 4, weight))), weight)
    apart = explained(net(lambda m, h, w: F.relu(F.group_norm(m.conv(h).clamp(min=-99), 4, w))), weight)
    torch.testing.assert_close(found, apart, rtol=1e-9, atol=1e-13)


def test_weights_of_channels_with_further_dimensions_are_signs_of_channels() -> None:
    """LayerNorm([C, 1, 1, 1]) of a global context is a group norm of one group."""
    weight = torch.tensor([1.2, -0.8, 0.9, -1.1, 0.7, 1.3, -0.6, 1.0], dtype=torch.float64)

    def context(norm: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda m, h: h + F.relu(norm(m.conv(h.mean((2, 3, 4), keepdim=True))))

    of_layer = context(lambda y: F.layer_norm(y, (8, 1, 1, 1), weight.view(8, 1, 1, 1)))
    assert_alike(of_layer, context(lambda y: F.group_norm(y, 1, weight)))


@pytest.mark.parametrize("norm", ["groups", "norm"])
def test_half_precision_layers_before_full_precision_norms(norm: str) -> None:
    def body(m: Net, h: Tensor) -> Tensor:
        y = m.conv(h.bfloat16())
        y = m.groups(y) if norm == "groups" else m.norm(y.movedim(1, -1)).movedim(-1, 1)
        return F.relu(y).float()

    def exact(m: Net, h: Tensor) -> Tensor:
        y = m.conv(h)
        return F.relu(m.groups(y) if norm == "groups" else m.norm(y.movedim(1, -1)).movedim(-1, 1))

    model = net(body, torch.float32)
    model.conv.bfloat16()
    found = DiscriminativeDeepTaylor(model, LOW, HIGH).attribute(clips(torch.float32), 1)
    right = DiscriminativeDeepTaylor(net(exact), LOW, HIGH).attribute(clips(), 1)
    for part, wanted in zip(found, right, strict=True):
        assert part.dtype == torch.float32
        assert (part - wanted).norm() < 0.05 * right.total.norm()


@pytest.mark.parametrize(
    ("normalised", "divisor"),
    [
        (lambda h: F.normalize(h, dim=1), lambda h: h.norm(dim=1, keepdim=True).clamp(min=1e-12)),
        (
            lambda h: F.local_response_norm(h, 3, 0.1, 0.75, 1.0),
            lambda h: (1 + 0.1 / 3 * sum(F.pad(h**2, (0,) * 6 + (1, 1))[:, i : i + 8] for i in range(3))) ** 0.75,
        ),
        (lambda h: h / h.sum((2, 3, 4), keepdim=True), lambda h: h.sum((2, 3, 4), keepdim=True)),
    ],
)
def test_what_divides_counts_as_constant(normalised: Callable[[Tensor], Tensor], divisor: Any) -> None:
    model = net(lambda m, h: F.relu(m.conv(normalised(h))))
    plain = net(lambda m, h, divisor: F.relu(m.conv(h / divisor)))
    with torch.no_grad():
        given = divisor(F.relu(model.stem(clips()))).expand(2, 8, 4, 5, 5).contiguous()
    torch.testing.assert_close(explained(model), explained(plain, given), rtol=1e-9, atol=1e-13, check_stride=False)


def test_what_one_input_is_divided_by_is_no_constant_if_another_input_makes_it() -> None:
    class Two(nn.Module):
        def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.how, self.a, self.b, self.head = how, nn.Conv3d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.how(F.relu(self.a(x)), 1 + F.relu(self.b(y))).mean((2, 3, 4)))

    def shared(a: Tensor, b: Tensor) -> Tensor:
        return a / (a.norm(dim=1, keepdim=True) + b)

    for how in (lambda a, b: a / b, lambda a, b: a * b.rsqrt(), shared):
        with pytest.raises(UnsupportedOperationError):
            DeepTaylor(Two(how).double().eval(), LOW, HIGH).attribute((clips(), clips()), 1)


CENTRED: dict[str, Callable[[Tensor], Tensor]] = {
    "in ConvNeXt's way": lambda h: (
        (h - h.mean(1, keepdim=True)) / torch.sqrt((h - h.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + 1e-5)
    ),
    "of one difference": lambda h: (lambda d: d / (d * d).mean(1, keepdim=True).add(1e-5).sqrt())(
        h - h.mean(1, keepdim=True)
    ),
    "by var": lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt(),
    "by rsqrt": lambda h: torch.rsqrt(h.var(1, keepdim=True, unbiased=False) + 1e-5) * (h - h.mean(1, True)),
}


CENTRED_AND_SCALED = {
    "the dividend scaled": lambda h, w, e: (
        w * (h - h.mean(1, True)) / (h.var(1, keepdim=True, correction=0) + e).sqrt()
    ),
    "the inverse scaled": lambda h, w, e: (h - h.mean(1, True)) * (w * (h.var(1, False, True) + e).rsqrt()),
    "the inverse a quotient": lambda h, w, e: (h - h.mean(1, True)) * (w / (h.var(1, False, True) + e).sqrt()),
    "the epsilon read before": lambda h, w, e: (
        lambda y: w * (y - y.mean(1, True)) * (y.var(1, False, True) + e).rsqrt()
    )(h + e),
}


@pytest.mark.parametrize("way", CENTRED)
def test_a_layer_norm_by_hand_is_a_layer_norm(way: str) -> None:
    def layer_norm(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.conv(F.layer_norm(h.movedim(1, -1), (8,)).movedim(-1, 1)))

    assert_alike(lambda m, h: F.relu(m.conv(CENTRED[way](h))), layer_norm)


@pytest.mark.parametrize("way", CENTRED_AND_SCALED)
def test_it_may_have_weights_and_share_constants_with_others(way: str) -> None:
    """Signs of its weights are told from signs of the next layer's: it is not behind a layer here."""

    def constants(m: Net) -> tuple[Tensor, Tensor]:
        return m.norm.weight.view(8, 1, 1, 1), torch.tensor(1e-5, dtype=torch.float64)

    def by_hand(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.conv(CENTRED_AND_SCALED[way](h, *constants(m))))

    def layer_norm(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.conv(F.layer_norm(h.movedim(1, -1), (8,), m.norm.weight).movedim(-1, 1)))

    assert_alike(by_hand, layer_norm)


@pytest.mark.parametrize(
    "divided",
    [
        lambda d: F.normalize(d, dim=1),
        lambda d: d / d.abs().mean(1, keepdim=True),
        lambda d: d / d.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6),
    ],
)
def test_what_is_left_without_a_mean_has_both_signs(divided: Callable[[Tensor], Tensor]) -> None:
    """The divisor is known not to be negative: the quotient is not."""
    x, options = clips(), {"low": LOW, "high": HIGH}
    model = net(lambda m, h: F.relu(m.conv(divided(h - h.mean(1, keepdim=True)))))
    shifted = net(lambda m, h: F.relu(m.conv(divided(h - h.mean(1, keepdim=True)) * torch.ones(1).double())))
    torch.testing.assert_close(
        DeepTaylor(model, **options).attribute(x, 1),
        DeepTaylor(shifted, **options, backend="reference").attribute(x, 1),
        rtol=1e-9,
        atol=1e-13,
    )


def with_square(d: Tensor) -> tuple[Tensor, Tensor]:
    return d, d.square()


def test_a_mean_that_is_taken_away_for_its_own_sake_gets_its_share() -> None:
    """What is left of a clip without its mean over time is motion: the mean counts, whatever else is divided somewhere."""
    bodies: list[Callable[..., Tensor]] = [
        lambda m, h: m.conv(h - h.mean(2, keepdim=True)),
        lambda m, h: m.conv((h - h.mean(2, keepdim=True)) / 2.0),
        lambda m, h: (lambda d: m.conv(d) + d / (1 + d.square()))(h - h.mean(2, keepdim=True)),
        lambda m, h: (h - h.flip(1).mean(2, keepdim=True)) * 2.0,
        lambda m, h: (lambda d, q: m.conv(d / (1 + q.mean(1, keepdim=True)) + q))(
            *with_square(h - h.mean(2, keepdim=True))
        ),
        lambda m, h: (lambda d: d / (1 + d.square().mean(1, keepdim=True)))(h - 5 * h.mean(1, keepdim=True)),
    ]
    for body in bodies:
        rules = {row.operation: row.rule for row in DeepTaylor(net(body), LOW, HIGH).rule_table(clips()).rows}
        assert rules["sub"].startswith("ZPlus")


def test_clips_that_the_model_standardises_are_refused_by_name() -> None:
    class Standardised(Net):
        def forward(self, x: Tensor, *further: Any) -> Tensor:
            dims = (2, 3, 4)
            return super().forward((x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True))

    with pytest.raises(ValueError, match="in the way: sub"):
        DeepTaylor(Standardised(lambda m, h: h).double().eval(), LOW, HIGH).attribute(clips(), 1)


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        (lambda h: torch.ones_like(h) / (1 + h), "div"),
        (lambda h: h * (1 - (1 + h.square().mean(1, keepdim=True)).rsqrt()), "mul"),
        (lambda h: h * ((1 + h.square().mean(1, keepdim=True)).rsqrt() - 5), "mul"),
    ],
)
def test_what_is_no_normalisation_is_refused(body: Callable[[Tensor], Tensor], operation: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=operation):
        explained(net(lambda m, h: F.relu(m.conv(body(h)))))


def test_what_follows_a_norm_is_not_taken_for_pixels() -> None:
    model = nn.Sequential(nn.InstanceNorm3d(3), nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match="no pixel layer"):
        DeepTaylor(model.double().eval(), LOW, HIGH).attribute(clips(), 1)


# --- attention ---------------------------------------------------------------------------------------------------


def tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def to_maps(y: Tensor, h: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(h.shape)


def projected(m: Net, h: Tensor, heads: int = 2) -> tuple[Tensor, ...]:
    parts = m.tokens(tokens(h)).chunk(3, -1)
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)


def written_out(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = query @ key.transpose(-2, -1) * scale
    weights = torch.softmax((scores + mask).clamp(min=-1e300), -1)
    return weights.masked_fill((mask < -1e300).all(-1, keepdim=True), 0.0)


def hidden(size: int = 100) -> Tensor:
    """Which keys a query may look at: the first at none."""
    mask = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 3] = True
    mask[0] = False
    return mask


def as_numbers(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


WAYS: dict[str, tuple[dict[str, Any], Tensor, float]] = {
    "plain": ({}, torch.zeros(100, 100), 4**-0.5),
    "scaled": ({"scale": 0.3}, torch.zeros(100, 100), 0.3),
    "scaled by zero": ({"scale": 0.0}, torch.zeros(100, 100), 0.0),
    "causal": ({"is_causal": True}, as_numbers(torch.ones(100, 100).tril().bool()), 4**-0.5),
    "masked": ({"attn_mask": hidden()}, as_numbers(hidden()), 4**-0.5),
    "masked by numbers": (
        {"attn_mask": torch.linspace(-1, 1, 10000).double().view(100, 100)},
        torch.linspace(-1, 1, 10000).double().view(100, 100),
        4**-0.5,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_scaled_dot_product_attention_is_what_it_says(way: str) -> None:
    options, mask, scale = WAYS[way]

    def called(m: Net, h: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*projected(m, h), **options)
        return h + to_maps(y.transpose(1, 2).flatten(2), h)

    def by_hand(m: Net, h: Tensor) -> Tensor:
        query, key, value = projected(m, h)
        y = written_out(query, key, mask, scale) @ value
        return h + to_maps(y.transpose(1, 2).flatten(2), h)

    assert_alike(called, by_hand)


def test_heads_that_share_keys_and_values() -> None:
    def called(m: Net, h: Tensor) -> Tensor:
        query, key, value = projected(m, h, 4)
        y = F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], enable_gqa=True)
        return h + to_maps(y.transpose(1, 2).flatten(2), h)

    def by_hand(m: Net, h: Tensor) -> Tensor:
        query, key, value = projected(m, h, 4)
        key, value = (torch.stack([part[:, 0], part[:, 0], part[:, 1], part[:, 1]], 1) for part in (key, value))
        y = torch.softmax(query @ key.transpose(-2, -1) / 2**0.5, -1) @ value
        return h + to_maps(y.transpose(1, 2).flatten(2), h)

    assert_alike(called, by_hand)


def scores(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2) @ h.flatten(2)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, h: to_maps(torch.einsum("nij,njc->nic", scores(h).softmax(-1), tokens(h)), h),
        lambda m, h: to_maps(torch.bmm(scores(h).softmax(-1), tokens(h)), h),
        lambda m, h: (h.flatten(2) @ scores(h).softmax(-1).transpose(1, 2)).view(h.shape),
        lambda m, h: to_maps(F.softmax(scores(h), -1, dtype=torch.float32).to(h.dtype).double() @ tokens(h), h),
        lambda m, h: to_maps(F.dropout(scores(h).softmax(-1), 0.1, m.training) @ tokens(h), h),
    ],
)
def test_attention_to_activations_keeps_all_relevance(body: Callable[..., Tensor]) -> None:
    exact = explained(net(lambda m, h: to_maps(scores(h).softmax(-1) @ tokens(h), h)))
    found = explained(net(body))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7, check_stride=False)
    with torch.no_grad():
        torch.testing.assert_close(found.sum((1, 2, 3, 4)), net(body)(clips())[:, 1], rtol=1e-6, atol=1e-8)


def of_frames(h: Tensor) -> Tensor:
    """A number for each frame, (N, 1, T, 1, 1), which may be negative."""
    return h[:, :1].mean((3, 4), keepdim=True) - h[:, 1:].mean((1, 3, 4), keepdim=True).square()


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        (lambda w: w.exp() / w.exp().sum(2, keepdim=True), 1),
        (lambda w: (w - w.amax(2, True)).exp() / (w - w.amax(2, True)).exp().sum(2, True), 1),
        (lambda w: (2 * w).exp() / torch.sum((2 * w).exp(), -3, keepdim=True), 2),
    ],
)
def test_a_softmax_by_hand_is_a_softmax(weights: Callable[[Tensor], Tensor], scale: float) -> None:
    assert_alike(lambda m, h: 4 * h * weights(of_frames(h)), lambda m, h: 4 * h * (scale * of_frames(h)).softmax(2))


@pytest.mark.parametrize(
    "total", [lambda e: e.sum((2, 3), True), lambda e: (1 + e).sum(2, True), lambda e: (e**2).sum(2, True)]
)
def test_exponentials_that_are_no_softmax_are_refused(total: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOperationError, match="exp"):
        explained(net(lambda m, h: h * (of_frames(h).exp() / total(of_frames(h).exp()))))


def test_exponentials_of_other_scales_are_no_softmax() -> None:
    def divided(w: Tensor) -> Tensor:
        return torch.add(w, w, alpha=2).exp() / torch.add(w, w, alpha=3).exp().sum(2, True)

    with pytest.raises(UnsupportedOperationError, match="exp"):
        explained(net(lambda m, h: h * divided(of_frames(h))))


AVERAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums divided": lambda h, a: (h * a).sum(2, keepdim=True) / a.sum(2, keepdim=True),
    "with a small number": lambda h, a: (h * a).sum(2, keepdim=True) / (a.sum(2, keepdim=True) + 1e-9),
    "of flat weights": lambda h, a: ((h.flatten(3) * a.flatten(3)).sum(2) / a.flatten(2).sum(2)[:, :, None]).view(
        -1, 8, 1, 5, 5
    ),
    "weights divided": lambda h, a: (h * (a / a.sum(2, keepdim=True))).sum(2, keepdim=True),
}


@pytest.mark.parametrize("way", AVERAGES)
def test_an_average_by_weights_of_frames_counts_them_as_constant(way: str) -> None:
    def body(m: Net, h: Tensor) -> Tensor:
        return F.relu(m.conv(AVERAGES[way](h, of_frames(h).sigmoid())))

    plain = net(lambda m, h, weights: F.relu(m.conv((h * weights).sum(2, keepdim=True))))
    with torch.no_grad():
        a = of_frames(F.relu(plain.stem(clips()))).sigmoid()
    weights = (a / a.sum(2, keepdim=True)).expand(2, 8, 4, 5, 5).contiguous()
    torch.testing.assert_close(
        explained(net(body)), explained(plain, weights), rtol=1e-7, atol=1e-12, check_stride=False
    )


def test_sums_that_are_divided_by_more_than_their_weights_are_refused() -> None:
    def by_both(m: Net, h: Tensor) -> Tensor:
        a = of_frames(h).sigmoid()
        return (h * a).sum(2, keepdim=True) / (a + h).sum(2, keepdim=True)

    def by_the_signal(m: Net, h: Tensor) -> Tensor:
        return (h * of_frames(h).sigmoid()).sum(2, keepdim=True) / (1 + h.sum(2, keepdim=True))

    for body in (by_both, by_the_signal):
        with pytest.raises(UnsupportedOperationError, match="nor found in the dividend or its weights alone"):
            explained(net(body))


def test_an_average_of_logits_by_attention_keeps_each_share() -> None:
    """Logits may be negative; averaged by attention they are as they are by any other average."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.stem, self.head, self.look = nn.Conv3d(3, 8, 3), nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            frames = F.relu(self.stem(F.pad(x, (0, 0, 0, 0, 1, 1)))).mean((3, 4)).transpose(1, 2)
            weights = self.look(frames).softmax(1)
            return (weights.transpose(1, 2) @ self.head(frames)).squeeze(1)

    model, x = Late().double().eval(), clips()
    for target in range(3):
        relevance = DeepTaylor(model, LOW, HIGH).attribute(x, target)
        with torch.no_grad():
            torch.testing.assert_close(relevance.sum((1, 2, 3, 4)), model(x)[:, target])
    with torch.no_grad():
        assert bool((model(x) < 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    """Products of queries and keys are beyond float16, and the mask is of another type."""

    def body(m: Net, h: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        query, key, value = (part.to(dtype) for part in projected(m, h))
        y = F.scaled_dot_product_attention(900 * query, 900 * key, value, torch.zeros(100, 100).to(h.dtype), scale=1e-6)
        return h + to_maps(y.to(h.dtype).transpose(1, 2).flatten(2), h)

    relevance = DeepTaylor(net(body, torch.float32), LOW, HIGH).attribute(clips(torch.float32), 1)
    exact = DeepTaylor(net(partial(body, dtype=torch.float64)), LOW, HIGH).attribute(clips(), 1)
    assert (relevance - exact).norm() < 0.1 * exact.norm()


def test_attention_that_drops_out_is_refused() -> None:
    model = net(lambda m, h: to_maps(F.scaled_dot_product_attention(*[tokens(h)] * 3, dropout_p=0.1), h))
    with pytest.raises(UnsupportedOperationError, match="dropout is active"):
        DeepTaylor(model, LOW, HIGH).attribute(clips(), 1)


# --- what is kept ------------------------------------------------------------------------------------------------


def walked(body: Callable[..., Tensor], target: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    """Of the values of these operations whether they are there after the forward pass, and at the end of the way back."""
    model, x = net(body), clips()
    network = Network(model, trace(model, (x,), 2), 1, DTD)
    activations = network.forward(network.weights(model), (x,))
    values = {node.name: value for node, value in activations.values.items() if node.target is target}
    there = {name: not value.is_meta for name, value in values.items()}
    known = {name: weakref.ref(value) for name, value in values.items()}
    values.clear()
    left: dict[str, bool] = {}

    def observe(step: Any, arrived: Any, gone: Any) -> None:
        if step.is_pixel_layer:
            left.update({name: ref() is not None for name, ref in known.items()})

    bound = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    network.backward(activations, [torch.ones_like(activations.output)], [bound], observe)
    assert there
    assert left
    return there, left


def test_gates_are_not_kept_and_attention_only_as_long_as_it_is_read() -> None:
    there, _ = walked(lambda m, h: h * torch.sigmoid(m.conv(h)), torch.ops.aten.sigmoid.default)
    assert not any(there.values())
    there, left = walked(lambda m, h: to_maps(scores(h).softmax(-1) @ tokens(h), h), torch.ops.aten.softmax.int)
    assert all(there.values())
    assert not any(left.values())


def test_a_gate_with_times_on_a_signal_without() -> None:
    model = net(lambda m, h: h.mean((2, 3, 4), keepdim=True) * torch.sigmoid(m.conv(h)))
    method, x = DiscriminativeDeepTaylor(model, LOW, HIGH), clips()
    assert any(row.operation == "mul" for row in method.rule_table(x).rows)
    whole = DiscriminativeRelevance(method.method).attribute(x, 1)
    for part, wanted in zip(method.attribute(x, 1), whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-10 * float(whole.total.abs().max()))


def test_a_video_transformer_is_explained_but_for_what_z_plus_cannot_share() -> None:
    """Its activations keep their signs: z+ has nothing to share where only negative numbers are added up."""
    transformers = pytest.importorskip(
        "torchvision.models.video.swin_transformer", reason="torchvision is not installed"
    )
    torch.manual_seed(0)
    model = transformers.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 2], [2, 4, 4], num_classes=5).double().eval()
    x = between((LOW,) * 3, (HIGH,) * 3, (1, 3, 4, 32, 32), 1, torch.float64)
    relevance, delta = DeepTaylor(model, LOW, HIGH).attribute(x, 1, return_convergence_delta=True)
    with torch.no_grad():
        score = model(x)[:, 1]
    torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, score)
    assert 0.1 < float(delta / score) < 0.9
