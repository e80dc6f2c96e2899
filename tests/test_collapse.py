"""Frozen clips at distinct times only: the same relevance as by the ordinary walk over every time, for every read-out.

The ordinary walk, which is held to the Jacobian oracle elsewhere, explains the repeated frames as any clip.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import STOCK, between, stock_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd import (
    DeepTaylor,
    DiscriminativeDeepTaylor,
    DiscriminativeRelevance,
    FrameCache,
    SpatioTemporalRelevance,
    collapse,
    room,
    routes,
)
from captum_dtd.attribution import FrozenClips
from captum_dtd.composites import EPSILON_GAMMA_BOX
from captum_dtd.routes import Route
from captum_dtd.rules import AlphaBeta, Flat, Proportional, WinnerTakesAll, WSquare, ZBeta, ZPlus

LOW, HIGH = -1.0, 1.5
READ_OUTS = [("own", "none"), ("first", "none"), ("mean", "none"), ("own", "max"), ("first", "sum")]


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return between((LOW,) * shape[1], (HIGH,) * shape[1], shape, seed, torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, scale: float | None = None) -> None:
    size = expected.abs().max().item() if scale is None else scale
    assert size > 0, "the expected relevance is zero: the comparison would show nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size)


def both(
    method: DiscriminativeDeepTaylor,
    x: Any,
    target: Any,
    readout: str = "own",
    normalize: str = "none",
    extra: Any = None,
) -> tuple[Any, Any]:
    """What is tested, and the same by explaining whole frozen clips as any clip."""
    whole = DiscriminativeRelevance(method.method, readout=readout, normalize=normalize)  # type: ignore[arg-type]
    method.readout, method.normalize = whole.readout, whole.normalize
    return method.attribute(x, target, extra), whole.attribute(x, target, extra)


def assert_same(actual: SpatioTemporalRelevance, expected: SpatioTemporalRelevance, tolerance: float = 1e-10) -> None:
    for part, wanted in zip(actual, expected, strict=True):
        close(part, wanted, tolerance, expected.total.abs().max().item())


# --- stock models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=STOCK)
def explained(request: pytest.FixtureRequest) -> tuple[FrozenClips, Tensor, Tensor, int]:
    """A stock model on frozen clips, two frames, and the ordinary relevance (2, 3, T, H, W) of their frozen clips."""
    name = request.param
    model = stock_model(name, torch.float64)
    frames, size = (16, 16) if name != "s3d" else (16, 32)
    if name == "s3d":
        model.avgpool = nn.AvgPool3d((2, 1, 1), stride=1)
    if name == "c3d":
        size, model.fc6 = 32, nn.Linear(512 * 2 * 2, 4096).double().eval()
    clips = between((LOW,) * 3, (HIGH,) * 3, (2, 3, 1, size, size), 3, torch.float64)
    frozen = clips.expand(-1, -1, frames, -1, -1)
    method = DeepTaylor(model, LOW, HIGH)
    whole = method.attribute(frozen, 1)
    walker = method.frozen_clips((frozen,), ())
    assert walker is not None
    return walker, clips, whole, frames


def test_every_time(explained: tuple[FrozenClips, Tensor, Tensor, int]) -> None:
    walker, clips, whole, _ = explained
    ((relevance,),) = walker.explain((clips,), [1], (), "all")
    close(relevance, whole)


def test_sums_over_classes_of_equal_times(explained: tuple[FrozenClips, Tensor, Tensor, int]) -> None:
    walker, clips, whole, _ = explained
    ((relevance,),) = walker.explain((clips,), [1], (), "classes")
    close(relevance[:, :, 0], whole.sum(2))


def test_some_times_of_every_clip(explained: tuple[FrozenClips, Tensor, Tensor, int]) -> None:
    walker, clips, whole, frames = explained
    wanted: list[tuple[int, ...]] = [(frames // 2 - 1,), (0, 3, frames - 1)]
    ((relevance,),) = walker.explain((clips,), [1], (), wanted)
    assert relevance.shape[2] == 3
    for row, times in enumerate(wanted):
        close(relevance[row, :, : len(times)], whole[row][:, list(times)])
        assert not relevance[row, :, len(times) :].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c3d", ["1 -> 3", "3 -> 5", "3 -> 5", "5 -> 7", "4 -> 4", "4 -> 4", "2 -> 2", "2 -> 2"]),
        ("r3d_18", ["1 -> 3", "3 -> 5", "5 -> 7", "7 -> 9", "9 -> 11", "11 -> 7", "7 -> 8", "11 -> 6"]),
    ],
)
def test_the_rule_table_says_how_many_times_differ(name: str, expected: list[str]) -> None:
    """Counted by hand: an interior, and one more time at each end for every padded convolution, halved by strides."""
    method = DiscriminativeDeepTaylor(stock_model(name, torch.float32), LOW, HIGH)
    size = 112 if name == "c3d" else 16
    table = method.rule_table(torch.zeros(1, 3, 16, size, size))
    found = [row.times.partition(" of ")[0] for row in table.rows if row.operation == "conv3d"]
    assert found[: len(expected)] == expected
    assert " times " in str(table)


# --- random networks ---------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A random chain of whatever changes a time axis: windows of all kinds, branches, pads, slices, layouts, gates."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, Any]] = []
        self.channels, self.frames, self.size = 2, self.rng.choice((5, 8, 11, 12)), 6
        self.add_convolution()
        for _ in range(self.rng.randint(3, 5)):
            self.rng.choice(
                (
                    self.add_convolution,
                    self.add_convolution,
                    self.add_pool,
                    self.add_branches,
                    self.add_residual,
                    self.add_pad,
                    self.add_slice,
                    self.add_layout,
                    self.add_gate,
                    self.add_unknown,
                    self.add_meeting,
                )
            )()
        self.head = nn.Linear(self.channels, 3)

    def add_convolution(self) -> None:
        rng = self.rng
        groups = rng.choice((1, 1, 2)) if self.channels % 2 == 0 else 1
        kernel = (rng.choice((1, 2, 3, 3, 5)), rng.choice((1, 3)), rng.choice((1, 3)))
        stride = (rng.choice((1, 1, 2, 3)) if self.frames > 6 else 1, 1, rng.choice((1, 2)) if self.size > 3 else 1)
        dilation = (rng.choice((1, 1, 2)), 1, 1)
        padding: Any = (rng.choice((0, 1, 1, kernel[0] // 2)), kernel[1] // 2, kernel[2] // 2)
        if stride == (1, 1, 1) and rng.random() < 0.3:
            padding = "same"
        if (self.frames + 2 * (0 if padding == "same" else padding[0])) < dilation[0] * (kernel[0] - 1) + 1:
            padding = (dilation[0] * (kernel[0] - 1), *((0, 0) if padding == "same" else padding[1:]))
        out = rng.choice((2, 3, 4)) * groups
        bias = rng.random() < 0.7
        conv = nn.Conv3d(self.channels, out, kernel, stride, padding, dilation, groups, bias)
        if conv.bias is not None:
            conv.bias.data.abs_()  # a network of dead units would show nothing
        self.layers.append(nn.Sequential(conv, nn.BatchNorm3d(out) if rng.random() < 0.3 else nn.Identity()))
        self.plan.append(("module, relu" if rng.random() < 0.8 else "module", len(self.layers) - 1))
        self.channels = out
        self.measure()

    def add_pool(self) -> None:
        rng = self.rng
        kernel = (rng.choice((1, 2, 3)), rng.choice((1, 2)), 1)
        stride = (rng.choice((1, 2)), 1, 1)
        padding = (rng.choice((0, kernel[0] // 2)), 0, 0)
        if self.frames + 2 * padding[0] < kernel[0] or self.size < 2:
            return
        if rng.random() < 0.6:
            dilation = (2 if kernel[0] == 2 and self.frames > 3 else 1, 1, 1)
            self.layers.append(nn.MaxPool3d(kernel, stride, padding, dilation, ceil_mode=rng.random() < 0.4))
        else:
            self.layers.append(
                nn.AvgPool3d(
                    kernel,
                    stride,
                    padding,
                    ceil_mode=rng.random() < 0.4,
                    count_include_pad=rng.random() < 0.5,
                    divisor_override=rng.choice((None, None, 3)),
                )
            )
        self.plan.append(("module", len(self.layers) - 1))
        self.measure()

    def add_branches(self) -> None:
        """Inception: branches that feel the ends of the clip differently, joined by channel."""
        for kernel in (1, 3):
            self.layers.append(nn.Conv3d(self.channels, 2, (kernel, 1, 1), padding=(kernel // 2, 0, 0)))
        self.plan.append(("branches", len(self.layers) - 2))
        self.channels = 4 + self.channels

    def add_residual(self) -> None:
        self.layers.append(nn.Conv3d(self.channels, self.channels, (3, 3, 3), padding=1))
        self.plan.append(("residual", len(self.layers) - 1))

    def add_pad(self) -> None:
        self.plan.append(("pad", (self.rng.choice((0, 1, 2)), self.rng.choice((0, 1)), self.rng.choice((0.0, 0.5)))))
        self.measure()

    def add_slice(self) -> None:
        if self.frames >= 4:
            self.plan.append(("slice", (self.rng.choice((0, 1)), self.rng.choice((1, 2)))))
            self.measure()

    def add_layout(self) -> None:
        self.plan.append(("layout", None))

    def add_gate(self) -> None:
        self.layers.append(nn.Linear(self.channels, self.channels))
        self.plan.append(("gate", len(self.layers) - 1))

    def add_meeting(self) -> None:
        """Some times are read by several operations, whose results meet again."""
        which = self.rng.choice(("change", "edges", "shifted"))
        if which == "shifted" and self.frames < 4:
            return
        self.plan.append((which, None))
        self.channels *= 3 if which == "shifted" else 1
        self.measure()

    def add_unknown(self) -> None:
        """An operation that mixes times in a way that is not looked into."""
        self.plan.append(("unknown", None))

    def measure(self) -> None:
        with torch.no_grad():
            shape = self.features(torch.zeros(1, 2, self.first_frames, 6, 6)).shape
        self.frames, self.size = shape[2], min(shape[3:])

    @property
    def first_frames(self) -> int:
        if not hasattr(self, "_first"):
            self._first = self.frames
        return self._first

    def features(self, x: Tensor) -> Tensor:
        for what, item in self.plan:
            if what.startswith("module"):
                x = self.layers[item](x)
                x = F.relu(x) if what.endswith("relu") else x
            elif what == "branches":
                x = torch.cat(
                    [self.layers[item](x), F.relu(self.layers[item + 1](x)), F.max_pool3d(x, (3, 1, 1), 1, (1, 0, 0))],
                    1,
                )
            elif what == "residual":
                x = F.relu(x + self.layers[item](x))
            elif what == "pad":
                front, back, value = item
                x = F.pad(x, (0, 1, 0, 0, front, back), value=value)
            elif what == "slice":
                start, step = item
                x = x[:, :, start::step]
            elif what == "layout":
                n, c, t, h, w = x.shape
                x = x.permute(0, 2, 1, 3, 4).reshape(n, t, c, h * w).reshape(n, t, c, h, w).transpose(1, 2)
                first, second = x.split([1, c - 1], 1)
                x = torch.cat([first, second], 1)
            elif what == "gate":
                gate = torch.sigmoid(self.layers[item](x.mean((2, 3, 4))))
                x = x * gate.reshape(*gate.shape, 1, 1, 1)
            elif what == "change":
                x = x + 0.5 * x[:, :, :1]
            elif what == "edges":
                x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
            elif what == "shifted":
                x = torch.cat([x[:, :, start : start + x.shape[2] - 2] for start in range(3)], 1)
            else:
                x = x.roll(1, 2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3, 4)))


SEEDS = [seed for seed in range(26) if seed != 21]
"""The network of seed 21 has dead units only."""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks(seed: int) -> None:
    model = Random(seed).double().eval()
    x = pixels(2, 2, model.first_frames, 6, 6, seed=seed)
    x[0, :, 2] = x[0, :, 0]  # a frame that is shown twice
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, seed="one")
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, [1, 2], readout, normalize))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
    "plain instance": nn.InstanceNorm3d,
    "tracked instance": lambda channels: nn.InstanceNorm3d(channels, affine=True, track_running_stats=True),
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}
"""Of clips, the last two with channels last."""


class Normed(nn.Module):
    """A norm of whole clips, or of positions, wherever one is usual."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.convs = nn.ModuleList(nn.Conv3d(a, 4, 3, padding=1) for a in (3, 4, 4))
        self.norms = nn.ModuleList(NORMS[norm](4) for _ in range(3))
        self.channels_last = norm in ("layer", "rms")
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for own in self.norms:
                if own.weight is not None:
                    own.weight.copy_(torch.tensor([1.2, -0.8, 0.9, 1.1]))
                if getattr(own, "bias", None) is not None:
                    own.bias.fill_(0.2)

    def normed(self, x: Tensor, number: int) -> Tensor:
        if self.channels_last:
            return self.norms[number](x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return self.norms[number](x)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.normed(self.convs[0](x), 0))
        x = x + self.convs[1](self.normed(x, 1))
        x = F.max_pool3d(F.relu(x), (2, 1, 1))
        return self.head(F.relu(self.normed(self.convs[2](x), 2)).mean((2, 3, 4)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_statistics_of_whole_clips_are_of_every_time_as_often_as_it_occurs(norm: str, backend: Any) -> None:
    model = Normed(norm).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend=backend)
    x = pixels(2, 3, 9, 5, 4)
    table = method.rule_table(x)
    assert {row.times for row in table.rows if "norm" in row.operation} <= {"3 -> 3 of 9", "4 -> 4 of 4"}
    assert any("norm" in row.operation for row in table.rows)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, [1, 2], readout, normalize))


@pytest.mark.parametrize(
    "how",
    [
        lambda a, b: torch.maximum(a, b),
        lambda a, b: torch.stack([a, b], 2).amax(2),
        lambda a, b: torch.stack([a, b], -1).mean(-1),
        lambda a, b: F.normalize(a, dim=1) + b,
        lambda a, b: a * torch.sigmoid(b.mean((2, 3, 4), keepdim=True)).expand_as(a),
        lambda a, b: a + b.mean((1, 3, 4), keepdim=True).expand(a.shape),
        lambda a, b: a * torch.sigmoid(b.mean((2, 3, 4), keepdim=True)).expand(-1, -1, -1, 3, 3),
        lambda a, b: (a - a.mean(1, keepdim=True)) / (a.var(1, keepdim=True, correction=0) + 1e-3).sqrt() + b,
        lambda a, b: (
            (a - a.mean(1, True)) / (a.var(1, unbiased=False, keepdim=True) + a.std((1, 3), keepdim=True) + 1e-3) + b
        ),
        lambda a, b: F.glu(torch.cat([a, b], 1), 1) + F.glu(torch.cat([b, a], -1), -1),
        lambda a, b: a * (a.square().sum((1, 3, 4), keepdim=True) + 1e-3).rsqrt() + b,
    ],
)
def test_what_is_done_at_every_time_alike_is_done_at_distinct_times(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.a, self.b, self.c = (nn.Conv3d(i, 4, (3, 1, 1), padding=(1, 0, 0)) for i in (3, 3, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.c(how(F.relu(self.a(x)), F.relu(self.b(x))))).mean((2, 3, 4)))

    method, x = DiscriminativeDeepTaylor(Joined().double().eval(), LOW, HIGH), pixels(2, 3, 8, 3, 3)
    times = {row.operation: row.times for row in method.rule_table(x).rows if row.module == "c"}
    assert times == {"conv3d": "3 -> 5 of 8"}
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, [1, 2], readout, normalize))


class Watching(nn.Module):
    """Attention between the positions of a frame, then between all positions of a clip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.projections = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def attended(self, x: Tensor, number: int) -> Tensor:
        query, key, value = self.projections[number](self.norm(x)).chunk(3, -1)
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).permute(0, 2, 3, 4, 1).flatten(2, 3)
        x = x + self.attended(x, 0)
        x = x.flatten(1, 2)
        return self.head((x + self.attended(x, 1)).mean(1))


def test_attention_within_frames_and_across_them() -> None:
    method = DiscriminativeDeepTaylor(Watching().double().eval(), LOW, HIGH)
    assert method.rule_table(pixels(2, 3, 7, 4, 3)).rows[0].times == "1 -> 3 of 7"
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(2, 3, 7, 4, 3), [1, 2], readout, normalize))


class Meeting(nn.Module):
    """Times that are read on their own meet others again: on the way back some of them were not asked for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first = nn.Conv3d(3, 6, 3, padding=1)
        self.second = nn.Conv3d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "change of pixels":
            x = x - 0.5 * x[:, :, :1]
        elif self.how == "edges of pixels":
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        x = F.relu(self.first(x))
        if self.how == "edges":
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        elif self.how == "shifted":
            x = torch.cat([x[:, :, start : start + 6, :, :][:, 2 * start : 2 * start + 2] for start in range(3)], 1)
        elif self.how == "differences":
            x = x[:, :, 2:] - x[:, :, :-2]
        elif self.how == "one of them again":
            x = torch.cat([x[:, :, :1], x], 2)
        return self.head(F.relu(self.second(x)).mean((2, 3, 4)))


@pytest.mark.parametrize(
    "how", ["change of pixels", "edges of pixels", "edges", "shifted", "differences", "one of them again"]
)
def test_relevance_of_times_that_nobody_asked_for_is_dropped(how: str) -> None:
    model, x = Meeting(how).double().eval(), pixels(2, 3, 8, 7, 7)
    method = DiscriminativeDeepTaylor(model, LOW, HIGH)
    for readout in ("own", "first"):
        found, expected = both(method, x, [1, 2], readout)
        assert_same(found, expected)
        for size in (1, 2, 3, 5):  # which clips are walked together changes nothing
            assert_same(method.attribute(x, [1, 2], internal_batch_size=size), expected)


TOLD_APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "places": lambda x, place: x + place[:, :1],
    "places of channels": lambda x, place: x + place,
    "places without a dimension for clips": lambda x, place: x + place[0],
    "places alone": lambda x, place: x - place[0, 0],
    "scales": lambda x, place: x * place.abs(),
    "one place for all times": lambda x, place: x + place[:, :, :1],
    "split": lambda x, place: torch.cat(x.split([3, 5], 2)[::-1], 2),
    "split evenly": lambda x, place: torch.cat(x.split(3, 2)[::-1], 2),
    "a part of a split": lambda x, place: x.split([1, 5, 2], 2)[1],
    "chunks, summed": lambda x, place: sum(x.chunk(2, 2)),  # type: ignore[return-value]
    "replicated": lambda x, place: F.pad(x, (0, 0, 0, 0, 2, 1), mode="replicate"),
    "reflected": lambda x, place: F.pad(x, (0, 0, 0, 0, 2, 1), mode="reflect"),
    "replicated in space": lambda x, place: F.pad(x, (1, 0, 0, 2, 0, 0), mode="replicate"),
    "averages, the last of less": lambda x, place: F.avg_pool3d(x, (3, 1, 1), (2, 1, 1), ceil_mode=True),
    "averages, the last of less padding": lambda x, place: F.avg_pool3d(x, (3, 1, 1), (2, 1, 1), (1, 0, 0), True),
    "averages without padding": lambda x, place: F.avg_pool3d(x, (3, 1, 1), 1, (1, 0, 0), False, False),
    "averages with padding": lambda x, place: F.avg_pool3d(x, (3, 1, 1), 1, (1, 0, 0)),
    "averages of as many times as wanted": lambda x, place: F.adaptive_avg_pool3d(x, (3, None, None)),
    "maxima of as many times as wanted": lambda x, place: F.adaptive_max_pool3d(x, (3, None, None)),
    "maxima of channels": lambda x, place: F.max_pool3d(x.transpose(1, 2), (3, 1, 1), 1, (1, 0, 0)).transpose(1, 2),
    "one time": lambda x, place: x.select(2, 1).unsqueeze(2),
    "averages by a given number": lambda x, place: F.avg_pool3d(x, (3, 1, 1), 2, (1, 0, 0), True, False, 2),
    "norms of groups of what is pooled": lambda x, place: F.group_norm(x.mean((3, 4)), 2)[..., None, None],
    "norms of groups of times": lambda x, place: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "expanded in space": lambda x, place: torch.cat([x, x.mean(3, True).expand(-1, -1, -1, 5, -1)], 3),
    "unsqueezed": lambda x, place: x.unsqueeze(1).abs().squeeze(1),
    "one average for all times": lambda x, place: torch.cat(
        [x, F.avg_pool3d(x, (8, 1, 1)).expand(-1, -1, 8, -1, -1)], 3
    ),
    "one average beside all times": lambda x, place: x + F.avg_pool3d(x, (8, 1, 1)),
    "batch norms of times": lambda x, place: F.batch_norm(
        x.transpose(1, 2), place[0, 0, :, 0, 0], place[0, 1, :, 0, 0].abs() + 0.5
    ).transpose(1, 2),
    "slopes of times": lambda x, place: F.prelu(x.transpose(1, 2) - 0.2, place[0, 0, :, 0, 0].abs()).transpose(1, 2),
    "layer norms of clips": lambda x, place: F.layer_norm(x, (8, 5, 5)),
    "a linear layer of times": lambda x, place: F.linear(x.movedim(2, -1), place[0, 0, :, :, 0].expand(8, 8)).movedim(
        -1, 2
    ),
    "a softmax over times": lambda x, place: x * x.mean((3, 4), keepdim=True).softmax(-3),
    "padded by a number": lambda x, place: F.pad(x, (0, 0, 0, 0, 2, 1), value=0.5),
}
"""What may treat equal times unequally, by where in the clip they are; and what resembles it and does not."""


class ToldApart(nn.Module):
    """Something of the kind on pixels, or on features that one convolution along time makes and another reads."""

    def __init__(self, how: str, on_pixels: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.on_pixels = how, on_pixels
        self.place = nn.Parameter(torch.randn(1, 2 if on_pixels else 4, 8, 1, 1))
        self.first, self.second = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = TOLD_APART[self.how](x, self.place) if self.on_pixels else x
        x = F.relu(self.first(x))
        x = x if self.on_pixels else TOLD_APART[self.how](x, self.place)
        return self.head(F.relu(self.second(x)).mean((2, 3, 4)))


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("how", "on_pixels"),
    [(how, False) for how in TOLD_APART]
    + [(how, True) for how in ("places of channels", "split", "replicated", "padded by a number")],
)
def test_equal_times_that_are_told_apart_by_where_they_are(how: str, on_pixels: bool) -> None:
    """Against the definition: each frame is repeated and its clip explained as any, every layer by its formulas."""
    model, x, target = ToldApart(how, on_pixels).double().eval(), pixels(2, 2, 8, 5, 5), [1, 2]
    plain = DeepTaylor(model, LOW, HIGH, seed="one", backend="reference")
    frozen = [x[:, :, t : t + 1].expand(x.shape).contiguous() for t in range(8)]
    whole = torch.stack([plain.attribute(clip, target).sum(1) for clip in frozen], 1)  # (N, frame, time, H, W)
    scaled = whole / whole.abs().amax((2, 3, 4), keepdim=True)
    expected = {
        ("own", "none"): whole.diagonal(dim1=1, dim2=2).movedim(-1, 1),
        ("first", "none"): whole[:, :, 0],
        ("mean", "none"): whole.mean(2),
        ("own", "max"): scaled.diagonal(dim1=1, dim2=2).movedim(-1, 1),
    }
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, seed="one")
    for (method.readout, method.normalize), spatial in expected.items():  # type: ignore[assignment]
        close(method.attribute(x, target).spatial, spatial)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("one place for all times", "3 -> 5 of 8"),
        ("replicated in space", "3 -> 5 of 8"),
        ("expanded in space", "3 -> 5 of 8"),
        ("unsqueezed", "3 -> 5 of 8"),
        ("averages with padding", "5 -> 7 of 8"),
        ("averages by a given number", "4 -> 5 of 5"),
    ],
)
def test_times_that_nothing_tells_apart_are_not_computed_twice(how: str, expected: str) -> None:
    """Of a convolution behind it. Counted by hand, as above."""
    method = DiscriminativeDeepTaylor(ToldApart(how, False).double().eval(), LOW, HIGH)
    times = [row.times for row in method.rule_table(pixels(1, 2, 8, 5, 5)).rows if row.operation == "conv3d"]
    assert times == ["1 -> 3 of 8", expected]


def test_random_networks_are_what_they_are_for() -> None:
    """They reach every kind of operation, and most of them collapse."""
    plans = [Random(seed).plan for seed in SEEDS]
    kinds = {what.partition(",")[0] for plan in plans for what, _ in plan}
    meeting = {"change", "edges", "shifted"}
    assert kinds == {"module", "branches", "residual", "pad", "slice", "layout", "gate", "unknown"} | meeting


OTHER_RULES: dict[str, Any] = {
    "epsilon-gamma-box": "epsilon-gamma-box",
    "bias": {nn.Conv3d: ZPlus(bias="absorbed", stabilizer=0.1), "0": ZBeta(bias="absorbed")},
    "alpha-beta": {nn.Conv3d: AlphaBeta(2.0, 1.0), "0": WSquare()},
    "flat": {nn.Conv3d: Flat()},
    "stabilized pools": {nn.MaxPool3d: Proportional(stabilizer=0.1)},
}


def small(last: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv3d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d((2, 1, 1)),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.ReLU(),
    ]
    return nn.Sequential(
        *layers, last or nn.MaxPool3d((3, 1, 1), 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()


@pytest.mark.parametrize("composite", OTHER_RULES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_other_rules(composite: str, backend: Any) -> None:
    """Several denominators, ones in place of the input, biases in the denominator: padding must stay what it is."""
    rules = OTHER_RULES[composite]
    if composite == "epsilon-gamma-box":  # its winners of equal times would be told apart by rounding alone
        rules = EPSILON_GAMMA_BOX.override({nn.MaxPool3d: Proportional()})
    method = DiscriminativeDeepTaylor(small().eval(), LOW, HIGH, composite=rules, backend=backend, seed="one")
    x = pixels(2, 2, 10, 5, 5)
    for readout in ("own", "mean"):
        assert_same(*both(method, x, 1, readout))


def test_winner_takes_all() -> None:
    """Of equal times the first wins; with whole numbers no rounding tells them apart."""
    model = small().eval()
    for parameter in model[:5].parameters():
        parameter.data = (parameter.data * 16).round()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, composite={nn.MaxPool3d: WinnerTakesAll()}, seed="one")
    x = torch.randint(-1, 2, (2, 2, 10, 5, 5), generator=torch.Generator().manual_seed(1)).double()
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, 1, readout, normalize))


# --- everything that a clip may come with ------------------------------------------------------------------------


def test_several_inputs_and_arguments_of_every_example() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rgb, self.flow = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(2, 4, (5, 3, 3), padding=(2, 1, 1))
            self.joined, self.head = nn.Conv3d(8, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, rgb: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
            x = F.relu(self.joined(torch.cat([F.relu(self.rgb(rgb)), F.relu(self.flow(flow))], 1)))
            return self.head(x.mean((2, 3, 4))) * weight.unsqueeze(1)

    method = DiscriminativeDeepTaylor(TwoStreams().double().eval(), LOW, HIGH)
    x = pixels(2, 3, 7, 5, 5), pixels(2, 2, 7, 5, 5, seed=2)
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for readout in ("own", "mean"):
        for actual, expected in zip(*both(method, x, [0, 2], readout, extra=weight), strict=True):
            assert_same(actual, expected)


def test_bounds_that_vary_over_time_are_explained_at_every_time() -> None:
    low = LOW - torch.rand(8, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method = DiscriminativeDeepTaylor(small().eval(), low, HIGH)
    x = pixels(1, 2, 8, 5, 5)
    assert_same(*both(method, x, 1))
    assert {row.times for row in method.rule_table(x).rows} == {"every time"}


def test_what_mixes_times_in_an_unknown_way_runs_at_every_time_and_says_so() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = small()[:2], small()[3:]

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.before(x).roll(1, 2))  # type: ignore[no-any-return]

    method = DiscriminativeDeepTaylor(Rolled().eval(), LOW, HIGH)
    x = pixels(1, 2, 9, 5, 5)
    assert_same(*both(method, x, 1))
    times = {row.operation: row.times for row in method.rule_table(x).rows[:4]}
    assert times == {"conv3d": "1 -> 3 of 9", "relu": "3 -> 3 of 9", "roll": "every time"} | {
        "conv3d": method.rule_table(x).rows[3].times
    }


class Reordered(nn.Module):
    """Examples leave the first dimension, or time takes their place, for a while; something in between looks along time."""

    def __init__(self, order: tuple[int, ...], last: bool) -> None:
        super().__init__()
        self.order, self.last = order, last

    def forward(self, x: Tensor) -> Tensor:
        there = x.permute(self.order)
        time = self.order.index(2)
        there = torch.relu(there.narrow(time, 1, there.shape[time] - 1))
        if self.last:
            return there.mean(time, keepdim=True).permute([self.order.index(dim) for dim in range(5)])
        return there.permute([self.order.index(dim) for dim in range(5)])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (2, 0, 1, 3, 4), (1, 2, 0, 3, 4), (0, 2, 1, 3, 4), (3, 4, 2, 1, 0)])
def test_examples_that_leave_the_first_dimension(order: tuple[int, ...], last: bool) -> None:
    method = DiscriminativeDeepTaylor(small(Reordered(order, last)).eval(), LOW, HIGH, seed="one")
    x = pixels(3, 2, 10, 5, 5)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, [0, 1, 2], readout, normalize))


@pytest.mark.usefixtures("launched")
def test_examples_that_leave_the_first_dimension_of_a_gpu() -> None:
    test_examples_that_leave_the_first_dimension((2, 0, 1, 3, 4), True)


class Context(nn.Module):
    """Adds to every time what all times have in common, before something else looks along time."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.after(x + 0.5 * x.mean(2, keepdim=True) + x.amax((2, 3, 4), keepdim=True)))


def test_what_is_the_same_at_all_times_is_reached_from_all_of_them() -> None:
    method = DiscriminativeDeepTaylor(small(Context()).eval(), LOW, HIGH, seed="one")
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(2, 2, 10, 5, 5), 1, readout, normalize))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padding_by_name(padding: str, backend: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv3d(3, 4, 3, padding=padding), nn.ReLU(), nn.Conv3d(4, 4, (4, 1, 1), padding=padding), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend=backend)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(1, 3, 9, 5, 5), 1, readout, normalize))


SQUEEZED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.squeeze(2).transpose(2, 3),
    "flipped": lambda x: x.squeeze(2).flip(2),
    "averaged": lambda x: x.mean(2).roll(1, 2),
    "its channel": lambda x: x.squeeze(1).flip(2),
    "channel and time": lambda x: x.squeeze((1, 2)).flip(1),
    "all that may go": lambda x: x.squeeze().flip(1) if x.shape[0] > 1 else x.squeeze((1, 2)).flip(1),
}


@pytest.mark.parametrize("how", SQUEEZED)
@pytest.mark.parametrize("taps", [4, 3])
def test_one_time_that_is_squeezed_away(how: str, taps: int) -> None:
    """With one channel left, dimensions of size 1 are neighbours. With two times nothing of time goes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv3d(2, 1, (taps, 3, 3), padding=(0, 1, 1))
            self.head = nn.Linear(16 * (5 - taps if how != "averaged" else 1), 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(SQUEEZED[how](self.conv(x).relu()).flatten(1))

    method, x = DiscriminativeDeepTaylor(Net().double().eval(), LOW, HIGH), pixels(2, 2, 4, 4, 4)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, [1, 2], readout, normalize))


@pytest.mark.parametrize("rule", [Flat(), WSquare()], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padding_of_an_average_pool_gets_nothing(rule: Any, backend: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 3, 3), nn.ReLU(), nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)), nn.Conv3d(3, 3, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, composite={nn.AvgPool3d: rule}, backend=backend)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(1, 2, 8, 5, 5), 1, readout, normalize))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", [torch.relu, torch.sigmoid])
def test_windows_that_lie_in_the_padding_alone(activation: Callable[[Tensor], Tensor], backend: Any) -> None:
    """Two taps, one before the clip and one behind it."""

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pooled = torch.nn.functional.max_pool3d(x, (2, 1, 1), (1, 1, 1), (1, 0, 0), (x.shape[2] + 1, 1, 1))
            return activation(pooled).mean(2, keepdim=True) + x.mean(2, keepdim=True)

    method = DiscriminativeDeepTaylor(small(Padded()).eval(), LOW, HIGH, seed="one", backend=backend)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(2, 2, 10, 5, 5), 1, readout, normalize))


def test_convolutions_whose_ends_read_the_padding_alone() -> None:
    """All 7 times of what the second one reads differ; of the 9 that it makes the first and the last do not."""
    torch.manual_seed(0)
    layers = [
        nn.Conv3d(2, 3, (7, 1, 1), padding=(3, 0, 0)),
        nn.ReLU(),
        nn.Conv3d(3, 3, 1, padding=(1, 0, 0)),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    x = pixels(1, 2, 7, 3, 3)
    for backend in ("auto", "reference"):
        method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend=backend)  # type: ignore[arg-type]
        for readout, normalize in READ_OUTS:
            assert_same(*both(method, x, 1, readout, normalize))


@pytest.mark.parametrize("layer", ["dilated", "padded"])
def test_layers_without_a_kernel(layer: str) -> None:
    """Windows that are spread in space, and pixels that are padded by a number, which no bounds allow for."""
    torch.manual_seed(0)
    first = {
        "dilated": nn.Conv3d(2, 3, 3, padding=(1, 2, 2), dilation=(1, 2, 2)),
        "padded": nn.Sequential(nn.ConstantPad3d((1, 1, 1, 1, 2, 1), 0.5), nn.Conv3d(2, 3, 3)),
    }
    layers = [first[layer], nn.ReLU(), nn.Conv3d(3, 3, 3, dilation=(1, 2, 1), padding=(1, 2, 1)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend="reference")
    for readout in ("own", "mean"):
        assert_same(*both(method, pixels(1, 2, 9, 5, 5), 1, readout))


def test_times_that_nothing_reads_get_nothing_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results may lie in memory that was something else before."""
    make = room.empty_like
    monkeypatch.setattr(room, "empty_like", lambda x, size: make(x, size).fill_(torch.nan))
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 3, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), nn.Conv3d(3, 3, 1, stride=(2, 1, 1)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend="reference")
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, pixels(2, 2, 10, 3, 3), 1, readout, normalize))


def test_sums_of_taps_are_as_precise_as_relevance() -> None:
    """In a half-precision model, whose activations are whole numbers here: it rounds none of them."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    model[0].weight.data = torch.randint(-1, 2, model[0].weight.shape).float()
    method = DiscriminativeDeepTaylor(model.bfloat16().eval(), -1.0, 1.0, backend="reference")
    x = torch.randint(-1, 2, (1, 2, 10, 5, 5)).bfloat16()
    for readout in ("own", "mean"):
        assert_same(*both(method, x, 1, readout), tolerance=1e-5)


@pytest.mark.parametrize("rule", [Proportional(), WinnerTakesAll()], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_negative_maxima_at_the_ends_are_larger_than_what_is_padded(rule: Any, backend: Any) -> None:
    """With whole numbers: no rounding tells equal times apart."""
    torch.manual_seed(1)
    layers = [nn.Conv3d(2, 3, (3, 1, 1)), nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0)), nn.Conv3d(3, 3, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    for parameter in model[:3].parameters():
        parameter.data = (parameter.data * 8).round()
    model[0].bias.data.fill_(-100)
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, composite={nn.MaxPool3d: rule}, backend=backend)
    x = torch.randint(-1, 2, (2, 2, 9, 3, 3)).double()
    found, expected = both(method, x, 1)
    torch.testing.assert_close(found.spatial, expected.spatial, rtol=0, atol=1e-10)
    assert found.spatial.any() == isinstance(rule, WinnerTakesAll)  # relevance is shared by positive values only


def test_frozen_clips_are_explained_one_by_one() -> None:
    method = DiscriminativeDeepTaylor(small().eval(), LOW, HIGH, backend="reference")
    x = pixels(1, 2, 10, 5, 5)
    _, expected = both(method, x, 1)
    assert_same(method.attribute(x, 1, internal_batch_size=1), expected)


def test_few_equal_times_among_many_count_once_each() -> None:
    """31 of 33 times differ behind a long window, and 31 of 32 behind a short one: taking taps apart saves next to nothing."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 3, (31, 1, 1), padding=(15, 0, 0)), nn.ReLU(), nn.Conv3d(3, 3, (2, 1, 1)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3)).double().eval()
    method = DiscriminativeDeepTaylor(model, LOW, HIGH, backend="reference")
    x = pixels(1, 2, 33, 3, 3)
    assert [row.times for row in method.rule_table(x).rows if row.operation == "conv3d"] == [
        "1 -> 31 of 33",
        "31 -> 31 of 32",
    ]
    for readout in ("mean", "own"):
        assert_same(*both(method, x, 1, readout))


@pytest.mark.parametrize("precision", ["ieee", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_float32(precision: Any, layout: torch.memory_format) -> None:
    method = DiscriminativeDeepTaylor(small().float().eval(), LOW, HIGH, precision=precision)
    x = pixels(2, 2, 10, 6, 6).float().contiguous(memory_format=layout)
    for readout, normalize in READ_OUTS:
        assert_same(*both(method, x, 1, readout, normalize), tolerance=1e-5 if precision == "ieee" else 1e-4)


def test_a_clip_of_one_frame() -> None:
    method = DiscriminativeDeepTaylor(small(nn.Identity()).eval(), LOW, HIGH)
    x = pixels(2, 2, 2, 5, 5)
    assert_same(*both(method, x, 1))


def test_plans_and_routes_that_were_not_used_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips whose frames repeat in their own ways ask for ever new sets of times."""
    plans: list[weakref.ref[Any]] = []
    make = collapse._Plan

    def watched(*given: Any) -> Any:
        plan = make(*given)
        plans.append(weakref.ref(plan))
        return plan

    monkeypatch.setattr(collapse, "_Plan", watched)
    monkeypatch.setattr(collapse, "_MOST_PLANS", 2)
    frozen = DeepTaylor(small().eval(), LOW, HIGH).frozen_clips((pixels(1, 2, 10, 5, 5),), ())
    assert frozen is not None
    for time in range(5):
        frozen.explain((pixels(1, 2, 1, 5, 5),), [1], (), [(time,)])
    gc.collect()
    assert [plan() is not None for plan in plans] == [False, False, False, True, True]
    route = weakref.ref(Route.of([[0]], 10_000))
    for index in range(1, 10_000):
        Route.of([[index]], 10_000)
    gc.collect()
    assert route() is None


# --- several targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composite", ["dtd", "bias", "alpha-beta"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_several_targets_are_what_each_is_alone(composite: str, backend: Any) -> None:
    rules = OTHER_RULES.get(composite, "dtd")
    method = DiscriminativeDeepTaylor(small().eval(), LOW, HIGH, composite=rules, backend=backend)
    x = pixels(2, 2, 10, 5, 5)
    targets: list[Any] = [0, [1, 2], torch.tensor([2, 0])]
    for one in (method, method.method):
        together = one.attribute_targets(x, targets, return_convergence_delta=True)
        assert len(together) == len(targets)
        for (maps, delta), target in zip(together, targets, strict=True):
            expected, expected_delta = one.attribute(x, target, return_convergence_delta=True)
            torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(delta, expected_delta, rtol=1e-8, atol=1e-10)
    cache = FrameCache()
    for maps, target in zip(method.attribute_targets(x, targets, frame_cache=cache), targets, strict=True):
        assert_same(maps, method.attribute(x, target))


def test_no_targets_are_an_error() -> None:
    method = DiscriminativeDeepTaylor(small().eval(), LOW, HIGH)
    for one in (method, method.method):
        with pytest.raises(ValueError, match="targets is empty"):
            one.attribute_targets(pixels(1, 2, 10, 5, 5), [])


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are moved as on a GPU, by one operation for all stretches."""
    monkeypatch.setattr(routes, "_MOVED_IN_RUNS", set())


def test_times_are_moved_the_same_way_by_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for _ in range(200):
        shape = [draw.randint(1, 4), 2, 3, 2, 3]
        dim, size, count = draw.choice([1, 2, 3]), draw.randint(1, 5), draw.randint(1, 7)
        rows = [[draw.randint(-1, size - 1) for _ in range(count)] for _ in range(draw.choice([1, shape[0]]))]
        route = Route.of(rows, size)
        for memory_format in (torch.contiguous_format, torch.channels_last_3d):
            x, relevance = (
                torch.randint(-9, 10, [*shape[:dim], n, *shape[dim + 1 :]])
                .float()
                .contiguous(memory_format=memory_format)
                for n in (size, count)
            )
            relevance = route.gather(torch.ones_like(x), dim, 0.0) * relevance  # what reads nothing gets nothing
            found = []
            for moved_in_runs in ({"cpu"}, set()):
                monkeypatch.setattr(routes, "_MOVED_IN_RUNS", moved_in_runs)
                found.append((route.gather(x, dim, 5.0), route.scatter(relevance.clone(), dim)))
            for one, other in zip(*found, strict=True):
                assert torch.equal(one, other) and one.stride() == other.stride(), route


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_random_networks_whose_times_are_moved_by_one_operation(seed: int) -> None:
    test_random_networks(seed)


class WatchedForWaiting(TorchDispatchMode):
    """Notes what would make a program wait for a GPU: numbers that are read back, and copies to it that block."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        devices = {tensor.device.type for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        if name in ("_to_copy", "copy_") and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and any(args[2:])))
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero") and "meta" in devices:
            self.waits.append(name)
        elif len(devices) > 1 and blocks:
            self.waits.append(f"{name} of {sorted(devices)}")
        return func(*args, **kwargs)


@pytest.fixture(params=STOCK)
def without_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[DeepTaylor, Tensor]:
    """A stock model and two clips, as tensors without data, which stand for those of a GPU."""

    def unchecked(_: DeepTaylor, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return [(part.new_zeros(()).expand(part.shape),) * 2 for part in inputs]

    monkeypatch.setattr(DeepTaylor, "bounds_of", unchecked)  # it reads them, once for a call
    size = 224 if request.param == "s3d" else 112
    model = stock_model(request.param).to("meta")
    return DeepTaylor(model, LOW, HIGH), torch.empty(2, 3, 16, size, size, device="meta")


@pytest.mark.parametrize("wanted", ["all", "classes", [(0,), (1, 2), (3,), (9,)]])
def test_nothing_waits_for_a_gpu(without_data: tuple[DeepTaylor, Tensor], wanted: Any) -> None:
    """While it explains some frozen clips the next ones are prepared."""
    method, clips = without_data
    frozen = method.frozen_clips((clips,), ())
    assert frozen is not None
    frames = clips[:1, :, :1].expand(4, -1, -1, -1, -1)
    for target in (1, [3, 1, 4, 1], torch.tensor([3, 1, 4, 1])):
        with WatchedForWaiting() as watched:
            frozen.explain((frames,), [target], (), wanted)
        assert not watched.waits


def test_nor_does_the_walk_of_whole_clips(without_data: tuple[DeepTaylor, Tensor]) -> None:
    method, clips = without_data
    network = method._network((clips,), ())
    bounds = method.bounds_of((clips,))
    for target in (1, [3, 1], torch.tensor([3, 1])):
        with WatchedForWaiting() as watched:
            method.relevance(network, partial(network.weights, method.model), [clips], [target], bounds)
        assert not watched.waits
