"""Models as people write them: the explained score is the model's, and all of it arrives at the input."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import functional as F

import captum_dtd.attribution
from captum_dtd import (
    DeepTaylor,
    DiscriminativeDeepTaylor,
    DiscriminativeRelevance,
    FrameCache,
    UnsupportedOperationError,
    layers,
)
from captum_dtd.composites import DTD
from captum_dtd.inputs import signature_of
from captum_dtd.layers import Elementwise
from captum_dtd.propagate import Network
from captum_dtd.rules import Epsilon, Flat, Group, Rule, Term, ZBeta, ZPlus

LOW, HIGH = -2.0, 2.0


class Layers(nn.Module):
    """A few layers, and a forward that puts them together."""

    def __init__(self, body: Callable[..., Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.body = body
        self.scale = scale
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.block = nn.Conv3d(8, 8, 3, padding=1)
        self.picture = nn.Conv2d(3, 8, 3, padding=1)
        self.logits = nn.Conv3d(8, 5, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, *further: Any) -> Tensor:
        return self.body(self, x, *further)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3, 4)))


def model(body: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Layers:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layers(body).to(dtype).eval()


def clips(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand((count, 3, 8, 10, 10), generator=generator, dtype=torch.float64) * (HIGH - LOW) + LOW


def i3d_head(m: Layers, x: Tensor) -> Tensor:
    """Class maps in time, averaged after two squeezes."""
    return m.logits(F.avg_pool3d(F.relu(m.stem(x)), (2, 10, 10), 1)).squeeze(3).squeeze(3).mean(2)


def frames(m: Layers, x: Tensor) -> Tensor:
    """Logits of every frame by a 2D network, (N, T, classes)."""
    n, c, t, h, w = x.shape
    pictures = x.transpose(1, 2).reshape(n * t, c, h, w)
    return m.fc(F.relu(m.picture(pictures)).mean((2, 3))).view(n, t, -1)


def temporal_shift(m: Layers, x: Tensor) -> Tensor:
    """Channels shifted in time by writing into zeros."""
    y = F.relu(m.stem(x))
    shifted = torch.zeros_like(y)
    shifted[:, :2, :-1] = y[:, :2, 1:]
    shifted[:, 2:4, 1:] = y[:, 2:4, :-1]
    shifted[:, 4:] = y[:, 4:]
    return m.head(F.relu(m.block(shifted)))


def shortcut_by_zeros(m: Layers, x: Tensor) -> Tensor:
    """Channels filled up with zeros, as the parameter-free shortcuts of 3D-ResNets do."""
    y = F.relu(m.stem(x))[:, :6]
    return m.head(torch.cat([y, torch.zeros(x.size(0), 2, *x.shape[2:], dtype=x.dtype)], 1))


def normalised_in_place(m: Layers, x: Tensor) -> Tensor:
    x = x.clone()
    x -= 0.5
    x /= 0.25
    return m.head(F.relu(m.stem(x)))


CASES: dict[str, Callable[..., Tensor]] = {
    "I3D head": i3d_head,
    "frame-wise, mean": lambda m, x: frames(m, x).mean(1),
    "frame-wise, permuted mean": lambda m, x: frames(m, x).permute(0, 2, 1).mean(-1),
    "frame-wise, sum": lambda m, x: frames(m, x).sum(1) / 8,
    "frame-wise, max": lambda m, x: frames(m, x).max(1)[0],
    "frame-wise, max of a stack": lambda m, x: torch.stack(frames(m, x).unbind(1)).amax(0),
    "late fusion": lambda m, x: m.head(F.relu(m.stem(x))) + m.fc(F.relu(m.stem(x.flip(2))).amax((2, 3, 4))),
    "temporal shift in place": temporal_shift,
    "temporal shift by roll": lambda m, x: m.head(F.relu(m.block(torch.roll(F.relu(m.stem(x)), 1, 2)))),
    "shortcut by zeros": shortcut_by_zeros,
    "normalised in place": normalised_in_place,
    "cast at the input": lambda m, x: m.head(F.relu(m.stem(x.float().double()))),
    "loop over examples": lambda m, x: torch.cat([m.head(F.relu(m.stem(clip[None]))) for clip in x]),
    "branch on the batch size": lambda m, x: m.head(F.relu(m.stem(x))) * (2 if x.shape[0] > 2 else 1),
    "inverted gate": lambda m, x: m.head(F.relu(m.block(F.relu(m.stem(x)) * (1 - torch.sigmoid(m.block(m.stem(x))))))),
    "gated convolution": lambda m, x: m.head(F.relu(m.block(torch.tanh(m.stem(x)) * torch.sigmoid(m.stem(x))))),
    "masked": lambda m, x: m.head(F.relu(m.stem(x)).masked_fill(torch.zeros(8, 10, 10, dtype=torch.bool), 0.0)),
    "gate that is averaged": lambda m, x: (
        lambda h: m.head(F.relu(m.block(h * torch.sigmoid(m.block(h)).mean(1, keepdim=True).clamp(min=0.2) ** 2)))
    )(F.relu(m.stem(x))),
    "generalised mean": lambda m, x: m.fc(F.relu(m.stem(x)).clamp(min=1e-6).pow(3).mean((2, 3, 4)).pow(1 / 3)),
    "root": lambda m, x: m.head(
        torch.sqrt(F.relu(m.stem(x))) + torch.log1p(F.relu(m.stem(x))) + m.stem(x).relu().abs()
    ),
    "nearest upsampling": lambda m, x: m.head(F.relu(m.block(F.interpolate(F.relu(m.stem(x)), scale_factor=2)))),
}


@pytest.mark.filterwarnings("ignore:more than half")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_all_of_the_models_own_score_arrives(name: str, count: int) -> None:
    m, x = model(CASES[name]), clips(count)
    method = DeepTaylor(m, LOW, HIGH)
    with torch.no_grad():
        scores = m(x)
    assert bool((scores > 0).any())
    assert bool((scores < 0).any())
    for target in range(5):
        relevance, delta = method.attribute(x, target, return_convergence_delta=True)
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)), scores[:, target], rtol=1e-8, atol=1e-12)
        assert bool((delta.abs() <= 1e-8 * scores[:, target].abs()).all())


def of_rectified(between: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A network with ``between`` behind its first ReLU."""
    return lambda m, x: m.head(F.relu(m.block(between(F.relu(m.stem(x))))))


def explained_alike(body: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    """One network written in two ways has one explanation, and so have its frozen clips."""
    written, twin, x = model(body), model(plain), clips()
    with torch.no_grad():
        torch.testing.assert_close(written(x), twin(x))
    wanted = DiscriminativeDeepTaylor(twin, LOW, HIGH).attribute(x, 1)
    for found, right in zip(DiscriminativeDeepTaylor(written, LOW, HIGH).attribute(x, 1), wanted, strict=True):
        torch.testing.assert_close(found, right)


WITHOUT_GRADIENTS = {
    "detach": lambda h: h.detach() * 2.0,
    "detach in place": lambda h: h.detach_() * 2.0,
    "a view of a detached tensor": lambda h: h.detach().view(h.size()) * 2.0,
    "Variable": lambda h: torch.autograd.Variable(h) * 2.0,
    "data": lambda h: h.data * 2.0,
    "written over through its data": lambda h: (h.data.mul_(2.0), h)[1],
}
"""Ways to double a tensor without a gradient."""


@pytest.mark.parametrize("way", WITHOUT_GRADIENTS)
def test_what_cuts_gradients_does_not_cut_relevance(way: str) -> None:
    explained_alike(of_rectified(WITHOUT_GRADIENTS[way]), of_rectified(lambda h: h * 2.0))


def test_inputs_that_are_detached_keep_their_bounds() -> None:
    explained_alike(
        lambda m, x: m.head(F.relu(m.stem(torch.autograd.Variable(x).data))), lambda m, x: m.head(F.relu(m.stem(x)))
    )


WEIGHT = torch.linspace(-1.0, 1.3, 64, dtype=torch.float64).view(8, 8)


def _by_convolution(h: Tensor) -> Tensor:
    """Channels mixed by a constant matrix."""
    return F.conv3d(h, WEIGHT.view(8, 8, 1, 1, 1))


def _turned(h: Tensor) -> Tensor:
    return h.transpose(3, 4).flip(3)


def _unshuffled(h: Tensor) -> Tensor:
    """Pixels in blocks of 2 x 2 become channels, of which the first eight are kept."""
    blocks = h.transpose(1, 2).unflatten(3, (5, 2)).unflatten(5, (5, 2))
    return blocks.permute(0, 1, 2, 4, 6, 3, 5).flatten(2, 4)[:, :, :8].transpose(1, 2)


def _frames(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(0, 1)


def _repeated(h: Tensor) -> Tensor:
    return torch.stack([h, h], 3).flatten(2, 3)


def _widened(h: Tensor) -> Tensor:
    """Linear upsampling along W, by its matrix."""
    eye = torch.eye(10, dtype=torch.float64)
    return h @ F.interpolate(eye[:, None], scale_factor=2, mode="linear")[:, 0]


def _copied(h: Tensor, dtype: torch.dtype) -> Tensor:
    """By way of a tensor of another type that is written to."""
    return torch.zeros(h.shape, dtype=dtype).copy_(h * 3).double()


def _written_through_a_view(h: Tensor) -> Tensor:
    y = h + 0.1
    turned, same = y.mT, y.type_as(y)
    turned.mul_(0.5)
    return same.mul_(3.0)


def _written(h: Tensor, places: Tensor) -> Tensor:
    y = h.clone()
    y[:, :, places] = 2 * h[:, :, :2]
    return y


MINUS = torch.linspace(-0.2, 0.5, 10, dtype=torch.float64)

SAME: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "concat": (lambda h: torch.concat([h, 2 * h], 2), lambda h: torch.cat([h, 2 * h], 2)),
    "concatenate": (lambda h: torch.concatenate([h, 2 * h], axis=-1), lambda h: torch.cat([h, 2 * h], -1)),
    "hstack": (lambda h: torch.hstack([h[:, 2:], h[:, :2]]), lambda h: torch.cat([h[:, 2:], h[:, :2]], 1)),
    "type_as": (lambda h: h.float().type_as(WEIGHT), lambda h: h.float().double()),
    "type_as of a signal": (lambda h: h.float().type_as(h), lambda h: h.float().double()),
    "type_as of its own type": (_written_through_a_view, lambda h: (h + 0.1) * 0.5 * 3.0),
    "copy into float16": (lambda h: _copied(h, torch.half), lambda h: (h * 3).half().double()),
    "clip": (lambda h: torch.clip(h - 0.1, 0.0, 0.5), lambda h: torch.clamp(h - 0.1, 0.0, 0.5)),
    "zero_": (lambda h: torch.cat([(h * 2).zero_()[:, :, :1], h], 2), lambda h: F.pad(h, (0, 0, 0, 0, 1, 0))),
    "rsub": (lambda h: torch.rsub(MINUS, h), lambda h: h - MINUS),
    "rsub of a multiple": (lambda h: torch.rsub(MINUS, h, alpha=2), lambda h: h - 2 * MINUS),
    "repeat_interleave": (lambda h: h.repeat_interleave(2, 2), _repeated),
    "nearest-exact": (
        lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
        lambda h: F.interpolate(h, scale_factor=2),
    ),
    "pixel_unshuffle": (
        lambda h: F.pixel_unshuffle(h.transpose(1, 2), 2)[:, :, :8].transpose(1, 2),
        _unshuffled,
    ),
    "unfold": (
        lambda h: F.unfold(_frames(h), 3, padding=1).unflatten(1, (8, 9)).sum(2).view(-1, 8, 8, 10, 10).transpose(1, 2),
        lambda h: torch.stack(
            [F.pad(h, (1, 1, 1, 1))[..., i : i + 10, j : j + 10] for i in range(3) for j in range(3)]
        ).sum(0),
    ),
    "fold": (
        lambda h: (
            F.fold(F.unfold(_frames(h), 3, padding=1), (10, 10), 3, padding=1).view(-1, 8, 8, 10, 10).transpose(1, 2)
        ),
        lambda h: h * F.conv2d(torch.ones_like(h[:1, :1, 0]), torch.ones_like(h[:1, :1, 0, :3, :3]), padding=1),
    ),
    "rot90": (lambda h: torch.rot90(h, 1, (3, 4)), _turned),
    "gather": (
        lambda h: h.gather(2, torch.arange(7, 1, -1).view(1, 1, 6, 1, 1).expand(len(h), 8, 6, 10, 10)),
        lambda h: h[:, :, 2:].flip(2),
    ),
    "diff": (lambda h: torch.diff(h, dim=2), lambda h: h[:, :, 1:] - h[:, :, :-1]),
    "diff, twice, with an end": (
        lambda h: torch.diff(h, 2, 2, append=h[:, :, :1]),
        lambda h: (lambda d: d[:, :, 1:] - d[:, :, :-1])(torch.cat([h[:, :, 1:], h[:, :, :1]], 2) - h),
    ),
    "einsum": (lambda h: torch.einsum("dc,ncthw->ndthw", WEIGHT, h), _by_convolution),
    "matmul": (lambda h: (WEIGHT @ h.flatten(2)).unflatten(2, h.shape[2:]), _by_convolution),
    "tensordot": (lambda h: torch.tensordot(h, WEIGHT, ([1], [1])).permute(0, 4, 1, 2, 3), _by_convolution),
    "threshold": (lambda h: F.threshold(h - 0.1, 0.0, 0.0), lambda h: F.relu(h - 0.1)),
    "rrelu": (lambda h: F.rrelu(h - 0.5), lambda h: F.leaky_relu(h - 0.5, 11 / 48)),
    "rrelu, given slopes": (lambda h: F.rrelu(h - 0.5, 0.1, 0.3), lambda h: F.leaky_relu(h - 0.5, 0.2)),
    "maximum": (lambda h: torch.maximum(torch.zeros(1, dtype=h.dtype), h - 0.1), lambda h: F.relu(h - 0.1)),
    "max of two": (lambda h: torch.max(h - MINUS, torch.zeros_like(MINUS)), lambda h: F.relu(h - MINUS)),
    "minimum": (lambda h: torch.min(h, torch.tensor(0.2, dtype=h.dtype)), lambda h: h.clamp(max=0.2)),
    "larger of two": (
        lambda h: torch.maximum(h, _by_convolution(h)),
        lambda h: torch.stack([h, _by_convolution(h)]).max(0)[0],
    ),
    "glu": (
        lambda h: F.glu(torch.cat([h - 0.1, _by_convolution(h)], 1), 1),
        lambda h: (h - 0.1) * torch.sigmoid(_by_convolution(h)),
    ),
    "gates that are multiplied": (
        lambda h: h * (torch.sigmoid(h) * torch.sigmoid(_by_convolution(h)).flip(2)),
        lambda h: h * torch.sigmoid(h) * torch.sigmoid(_by_convolution(h)).flip(2),
    ),
    "gelu by erf": (lambda h: (h - 0.2) * 0.5 * (1 + torch.erf((h - 0.2) / 2**0.5)), lambda h: F.gelu(h - 0.2)),
    "trilinear": (lambda h: F.interpolate(h, scale_factor=(1, 1, 2), mode="trilinear"), _widened),
    "bilinear": (
        lambda h: F.interpolate(h.flatten(1, 2), scale_factor=(1, 2), mode="bilinear").unflatten(1, (8, 8)),
        _widened,
    ),
    "rms norm": (
        lambda h: (h - 0.1) * torch.rsqrt((h - 0.1).pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda h: F.rms_norm(h - 0.1, (10,), eps=1e-6),
    ),
    "rms norm by a power": (
        lambda h: (lambda y: (y.square().mean(-1, keepdim=True) + 1e-6) ** -0.5 * y)(h - 0.1),
        lambda h: F.rms_norm(h - 0.1, (10,), eps=1e-6),
    ),
    "the largest three": (
        lambda h: (h + MINUS).topk(3)[0],
        lambda h: (h + MINUS).gather(4, (h + MINUS).argsort(4, descending=True)[..., :3]),
    ),
    "the smallest, and where it is": (
        lambda h: (lambda found: found[0] * (found[1] < 5))(h.flatten(2).topk(2, largest=False)).view(
            len(h), 8, 1, 1, 2
        ),
        lambda h: (lambda index: h.flatten(2).gather(2, index) * (index < 5))(h.flatten(2).argsort(2)[:, :, :2]).view(
            len(h), 8, 1, 1, 2
        ),
    ),
    "sorted": (lambda h: h.sort(dim=2)[0], lambda h: h.gather(2, h.argsort(2))),
    "sorted, the last dimension, stably": (
        lambda h: h.sort(stable=True, descending=True)[0],
        lambda h: h.gather(-1, h.argsort(dim=-1, descending=True, stable=True)),
    ),
    "the third smallest": (
        lambda h: (h + MINUS).kthvalue(3)[0].unsqueeze(4),
        lambda h: (h + MINUS).gather(4, (h + MINUS).argsort(4)[..., 2:3]),
    ),
    "median": (
        lambda h: (h + MINUS).median(4, keepdim=True)[0],
        lambda h: (h + MINUS).gather(4, (h + MINUS).argsort(4)[..., 4:5]),
    ),
    "take_along_dim": (
        lambda h: torch.take_along_dim(h, torch.arange(7, 1, -1).view(1, 1, 6, 1, 1), 2),
        lambda h: h[:, :, 2:].flip(2),
    ),
    "written by index": (
        lambda h: _written(h, torch.tensor([1, 4])),
        lambda h: torch.cat([h[:, :, :1], 2 * h[:, :, :1], h[:, :, 2:4], 2 * h[:, :, 1:2], h[:, :, 5:]], 2),
    ),
    "index_copy": (
        lambda h: h.index_copy(2, torch.tensor([1, 4]), 2 * h[:, :, :2]),
        lambda h: torch.cat([h[:, :, :1], 2 * h[:, :, :1], h[:, :, 2:4], 2 * h[:, :, 1:2], h[:, :, 5:]], 2),
    ),
    "scatter": (
        lambda h: h.scatter(2, torch.full_like(h[:, :, :1], 4, dtype=torch.long), 2 * h[:, :, :1]),
        lambda h: torch.cat([h[:, :, :4], 2 * h[:, :, :1], h[:, :, 5:]], 2),
    ),
    "written over twice": (
        lambda h: _written(h, torch.tensor([3, 3])),
        lambda h: torch.cat([h[:, :, :3], 2 * h[:, :, 1:2], h[:, :, 4:]], 2),
    ),
    "index_copy to one place": (
        lambda h: torch.zeros_like(h).index_copy(2, torch.tensor([0, 0, 1]), h[:, :, :3]),
        lambda h: F.pad(h[:, :, 1:3], (0, 0, 0, 0, 0, 6)),
    ),
    "written where a mask is": (
        lambda h: h.index_put(
            (torch.tensor([True, False]).repeat(4)[None, :, None].expand(len(h), 8, 8),), h.new_tensor(0.3)
        ),
        lambda h: h.masked_fill(torch.tensor([True, False]).repeat(4)[:, None, None, None], 0.3),
    ),
    "the smallest along W": (
        lambda h: (h + MINUS).min(4, keepdim=True)[0],
        lambda h: (h + MINUS).gather(4, (h + MINUS).argsort(4)[..., :1]),
    ),
    "lerp": (
        lambda h: torch.lerp(h, _by_convolution(h), torch.sigmoid(h)),
        lambda h: h * (1 - torch.sigmoid(h)) + _by_convolution(h) * torch.sigmoid(h),
    ),
    "lerp by a number": (
        lambda h: torch.lerp(h, _by_convolution(h), 0.3),
        lambda h: h * 0.7 + _by_convolution(h) * 0.3,
    ),
    "lerp by hand": (
        lambda h: h + torch.sigmoid(h) * (_by_convolution(h) - h),
        lambda h: _by_convolution(h) * torch.sigmoid(h) + h * (1 - torch.sigmoid(h)),
    ),
    "lerp by hand, by a number": (
        lambda h: h + 0.3 * (_by_convolution(h) - h),
        lambda h: _by_convolution(h) * 0.3 + h * 0.7,
    ),
    "lerp by hand, in place": (
        lambda h: h.clone().add_((_by_convolution(h) - h) * torch.sigmoid(h)),
        lambda h: _by_convolution(h) * torch.sigmoid(h) + h * (1 - torch.sigmoid(h)),
    ),
    "lerp by hand, from the other end": (
        lambda h: h - (h - _by_convolution(h)) * torch.sigmoid(h),
        lambda h: _by_convolution(h) * torch.sigmoid(h) + h * (1 - torch.sigmoid(h)),
    ),
    "addcmul": (
        lambda h: torch.addcmul(h, _by_convolution(h), torch.sigmoid(h), value=-0.5),
        lambda h: h + _by_convolution(h) * torch.sigmoid(h) * -0.5,
    ),
    "addcdiv": (
        lambda h: torch.addcdiv(h, h.flip(2), 1.5 + MINUS, value=2),
        lambda h: h + h.flip(2) / (1.5 + MINUS) * 2,
    ),
    "baddbmm": (
        lambda h: torch.baddbmm(h.flatten(2), WEIGHT.expand(len(h), 8, 8), h.flatten(2), beta=2).unflatten(
            2, (8, 10, 10)
        ),
        lambda h: h * 2 + _by_convolution(h),
    ),
    "h-swish": (lambda h: h * F.relu6(h + 3) / 6, F.hardswish),
    "h-swish by hardtanh": (lambda h: h * (F.hardtanh(h + 3, 0.0, 6.0) / 6), F.hardswish),
    "relu6 of twice three more": (lambda h: F.relu6(torch.add(h - 4, 3, alpha=2)), lambda h: F.relu6(h + 2)),
    "clamped from one on": (
        lambda h: (h - 4 + 3).clamp(1, 6),
        lambda h: (h - 4 + 3).clamp_min(1).clamp_max(6),
    ),
    "h-swish by clamp": (lambda h: (h + 3).clamp(0, 6) * h * (1 / 6), F.hardswish),
}
"""Ways to write what can be written in plainer operations, and those."""


@pytest.mark.filterwarnings("ignore:more than half")
@pytest.mark.parametrize("what", SAME)
def test_operations_are_what_plainer_ones_make_of_them(what: str) -> None:
    written, plain = SAME[what]
    explained_alike(of_rectified(written), of_rectified(plain))


@pytest.mark.parametrize(
    "what",
    [
        *("concat", "concatenate", "hstack", "type_as", "diff", "threshold", "rrelu", "maximum", "h-swish"),
        *("glu", "gelu by erf", "rms norm", "rms norm by a power"),
    ],
)
def test_frozen_clips_know_those_operations_times(what: str) -> None:
    written, plain = SAME[what]
    tables = (DiscriminativeDeepTaylor(model(of_rectified(f)), LOW, HIGH).rule_table(clips()) for f in (written, plain))
    ours, theirs = ([row.times for row in table.rows].count("every time") for table in tables)
    assert ours == theirs


def test_cosine_similarity_is_a_linear_layer_of_normalised_features() -> None:
    prototypes = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64).sin().view(5, 8)

    def features(m: Layers, x: Tensor) -> Tensor:
        return F.relu(m.stem(x)).mean((3, 4))

    explained_alike(
        lambda m, x: F.cosine_similarity(features(m, x).mean(2)[:, None], prototypes, dim=2),
        lambda m, x: F.linear(F.normalize(features(m, x).mean(2)), F.normalize(prototypes)),
    )
    explained_alike(
        lambda m, x: torch.cosine_similarity(features(m, x)[..., None], prototypes.T[:, None], eps=0.5).mean(1),
        lambda m, x: F.linear(
            (lambda y: y / y.norm(dim=2, keepdim=True).clamp(min=0.5))(features(m, x).transpose(1, 2)),
            prototypes / prototypes.norm(dim=1, keepdim=True).clamp(min=0.5),
        ).mean(1),
    )


def test_cosine_similarity_of_two_types() -> None:
    prototypes = torch.linspace(-1.0, 1.0, 40, dtype=torch.float32).sin().view(5, 8)
    explained_alike(
        lambda m, x: F.cosine_similarity(F.relu(m.stem(x)).mean((2, 3, 4))[:, None], prototypes, dim=2),
        lambda m, x: F.linear(F.normalize(F.relu(m.stem(x)).mean((2, 3, 4))), F.normalize(prototypes.double())),
    )


def test_blends_of_what_are_gates_themselves_stay_what_they_are() -> None:
    """Written out, a sigmoid would stand beside another, and which of the two is the signal could not be told."""

    def body(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        a, b, gate = (torch.sigmoid(each) for each in (m.block(h), _by_convolution(h), h.flip(2)))
        return m.head((a - b) * gate + b)

    x, m = clips(), model(body)
    relevance, delta = DeepTaylor(m, LOW, HIGH).attribute(x, 1, return_convergence_delta=True)
    with torch.no_grad():
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, m(x)[:, 1])
    assert bool((relevance != 0).any())


@pytest.mark.parametrize("trainable", [True, False])
def test_framewise_heads_without_bias(trainable: bool) -> None:
    weight = nn.Parameter(WEIGHT[:5].clone(), requires_grad=trainable)

    def body(m: Layers, x: Tensor) -> Tensor:
        return F.linear(F.relu(m.stem(x)).mean((3, 4)).transpose(1, 2), m.weight).mean(1)

    m, x = model(body), clips()
    m.weight = weight
    m.requires_grad_(trainable)
    with torch.no_grad():
        torch.testing.assert_close(DeepTaylor(m, LOW, HIGH).attribute(x, 4).sum((1, 2, 3, 4)), m(x)[:, 4])


def test_it_does_not_matter_whether_torch_knew_its_operations_before() -> None:
    """They are the same objects, whoever asked for them first: torch.compile may have."""
    code = (
        "import torch\n"
        "names = [(f'conv{n}d', overload) for n in (1, 2, 3) for overload in ('default', 'padding')]\n"
        "known = [getattr(getattr(torch.ops.aten, name), overload) for name, overload in names]\n"
        "from captum_dtd.operations import CONVOLUTIONS\n"
        "assert CONVOLUTIONS == set(known)\n"
        "assert all(getattr(getattr(torch.ops.aten, name), overload) in CONVOLUTIONS for name, overload in names)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_added_to_places_by_index_is_refused() -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        return m.head(h.index_put((torch.arange(2),), h[:2], accumulate=True))

    with pytest.raises(UnsupportedOperationError, match="index_put"):
        DeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)


def test_numbers_that_are_cut_to_integers_on_the_way_are_those_of_the_model() -> None:
    m = model(lambda m, x: m.head(F.relu(m.block(F.relu(m.stem(x)) + _copied(m.stem(x), torch.long)))))
    seeds = DeepTaylor(m, LOW, HIGH).ledger(clips(), 1).seed
    torch.testing.assert_close(seeds, m(clips()).detach()[:, 1])


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "randperm": lambda h: h[:, :, torch.randperm(8)[:4]],
    "rand": lambda h: h + torch.rand(10, 10, dtype=h.dtype),
    "randn_like": lambda h: h + torch.randn_like(h),
    "randint": lambda h: h[:, :, torch.randint(8, (4,), generator=torch.Generator().manual_seed(1))],
}


@pytest.mark.parametrize("what", RANDOM)
def test_random_numbers_in_forward_are_refused(what: str) -> None:
    state = torch.get_rng_state()
    told = f"{what} draws random numbers.*test_user_models.py:"
    # torch.export of torch 2.11 takes no generator.
    with pytest.raises(ValueError, match=f"{told}|cannot trace .*Generator" if what == "randint" else told):
        DeepTaylor(model(of_rectified(RANDOM[what])), LOW, HIGH).attribute(clips(), 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
def test_a_boolean_mask_is_refused_in_a_sentence(method: Any) -> None:
    mask = torch.arange(8) != 3
    by_mask, by_numbers = (of_rectified(lambda h, at=at: h[:, :, at]) for at in (mask, mask.nonzero().flatten()))
    try:
        torch.export.export(model(by_mask), (clips(),))
        told, error = r"index gives depends on values \(test_user_models.py:.*nonzero", UnsupportedOperationError
    except GuardOnDataDependentSymNode:  # in torch 2.11, by the convolution that follows
        told, error = "torch.export cannot trace .*control flow that depends on values", ValueError
    with pytest.raises(error, match=told):
        method(model(by_mask), LOW, HIGH).attribute(clips(), 1)
    explained_alike(by_numbers, of_rectified(lambda h: torch.cat([h[:, :, :3], h[:, :, 4:]], 2)))


class WrittenOut(nn.Module):
    """A batch norm in evaluation mode, computed by hand."""

    def __init__(self, norm: Any, way: str) -> None:
        super().__init__()
        self.norm = norm
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var + norm.eps)
        weight, bias, mean, var = (t.view(-1, *[1] * (x.ndim - 2)) for t in numbers)
        if self.way == "step by step":
            return bias + weight * ((x - mean) / var.sqrt())
        scale = weight * var.rsqrt()
        return x * scale + (bias - mean * scale)


def torchvisions(norm: nn.Module) -> nn.Module:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    frozen = ops.FrozenBatchNorm2d(8)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def in_clips(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(3, 8, 3, padding=1, bias=False), norm(nn.BatchNorm3d(8)), nn.ReLU()),
        *(nn.Conv3d(8, 8, 3, padding=1), norm(nn.BatchNorm3d(8)), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 8), norm(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 5)),
    )


class InFrames(nn.Module):
    """A 2D network on every frame."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(nn.BatchNorm2d(8)), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layers(x.transpose(1, 2).flatten(0, 1)).mean((2, 3))
        return self.fc(features).view(len(x), -1, 5).mean(1)


def with_negative_scales(norm: Any) -> Any:
    norm.weight.data.copy_(torch.linspace(-1.0, 1.0, 8))
    norm.bias.data.copy_(torch.linspace(0.5, -0.3, 8))
    norm.running_mean.copy_(torch.linspace(-0.3, 0.2, 8))
    norm.running_var.copy_(torch.linspace(0.2, 0.7, 8))
    return norm


@pytest.mark.filterwarnings("ignore:more than half")
@pytest.mark.parametrize(
    ("network", "frozen"),
    [
        (in_clips, lambda norm: WrittenOut(norm, "scale and shift")),
        (in_clips, lambda norm: WrittenOut(norm, "step by step")),
        (InFrames, torchvisions),
    ],
)
def test_a_frozen_batch_norm_is_a_batch_norm(network: Any, frozen: Callable[[nn.Module], nn.Module]) -> None:
    x = clips()
    expected, actual = (_explained_everyhow(network, norm, x) for norm in (lambda norm: norm, frozen))
    for found, right in zip(actual, expected, strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def _explained_everyhow(network: Any, norm: Callable[[nn.Module], nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = network(lambda own: norm(with_negative_scales(own))).double().eval()
    absorbed = DeepTaylor(m, LOW, HIGH, composite="epsilon-gamma-box").attribute(x, 1)
    return (*DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1), absorbed)


@pytest.mark.parametrize(
    "between",
    [
        lambda y, given: y * given,  # an argument of forward's
        lambda y, given: (y * given.new_full((1, 8, 1, 1, 1), 0.5)) + y,  # a layer that is read twice
        lambda y, given: y + torch.ones(2, 1, 1, 1, 1, dtype=y.dtype),  # a number for each example
    ],
)
def test_what_is_no_constant_of_a_layers_channels_is_not_folded(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    m, x = model(lambda m, x, given: m.head(F.relu(m.block(F.relu(between(m.stem(x), given)))))), clips()
    given = torch.full((1, 8, 1, 1, 1), 2.0, dtype=torch.float64)
    relevance, delta = DeepTaylor(m, LOW, HIGH).attribute(x, 1, given, return_convergence_delta=True)
    with torch.no_grad():
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, m(x, given)[:, 1])
    assert relevance.abs().max() > 0


def test_a_fixed_batch_size_is_kept_to() -> None:
    m, x = model(CASES["loop over examples"]), clips(3)
    method = DeepTaylor(m, LOW, HIGH)
    one_by_one = method.attribute(x, 1, internal_batch_size=1)
    torch.testing.assert_close(one_by_one, method.attribute(x, 1), rtol=0, atol=1e-14)
    ledger = method.ledger(x, 1)
    torch.testing.assert_close(ledger.explained, one_by_one.sum((1, 2, 3, 4)))
    maps = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1)
    torch.testing.assert_close(maps.total, one_by_one.sum(1), rtol=0, atol=1e-14)


def test_one_trace_serves_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []
    original = captum_dtd.attribution.trace

    def counted(*arguments: Any) -> Any:
        traces.append(1)
        return original(*arguments)

    monkeypatch.setattr(captum_dtd.attribution, "trace", counted)
    m = model(CASES["frame-wise, mean"])
    method = DeepTaylor(m, LOW, HIGH)
    for count in (1, 2, 5):
        assert method.attribute(clips(count), 1).shape == (count, 3, 8, 10, 10)
    assert len(traces) == 1


def test_a_mask_given_as_an_argument() -> None:
    m, x = model(lambda m, x, mask: m.head(F.relu(m.stem(x * mask)))), clips()
    mask = torch.zeros(2, 1, 8, 10, 10, dtype=torch.float64)
    mask[..., 3:7, 3:7] = 1
    relevance = DeepTaylor(m, LOW, HIGH).attribute(x, 1, mask)
    assert bool((relevance[..., 3:7, 3:7] != 0).any())
    assert bool((relevance * (1 - mask) == 0).all())


def test_a_final_sigmoid_is_stepped_over_and_says_so() -> None:
    plain, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    with_sigmoid = nn.Sequential(plain, nn.Sigmoid()).eval()
    with pytest.warns(UserWarning, match="sigmoid"):
        relevance = DeepTaylor(with_sigmoid, LOW, HIGH).attribute(x, 1)
    torch.testing.assert_close(relevance, DeepTaylor(plain, LOW, HIGH).attribute(x, 1))


def test_a_changed_attribute_is_noticed() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x))) * m.scale), clips()
    method = DeepTaylor(m, LOW, HIGH)
    before = method.attribute(x, 1)
    m.scale = 3.0
    torch.testing.assert_close(method.attribute(x, 1), 3 * before)


def test_scores_without_a_row_for_each_example_are_refused() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(x))).squeeze())
    with pytest.raises(ValueError, match="first dimension must be the examples"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(1))


def test_a_branch_through_complex_numbers_is_not_ignored() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(x)) + torch.fft.ifftn(torch.fft.fftn(m.stem(x))).real))
    with pytest.raises(UnsupportedOperationError, match="fft_fftn"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


@pytest.mark.parametrize(
    ("product", "says"),
    [
        (lambda h: h * h, "comes from a sigmoid"),
        (lambda h: h @ h.transpose(-2, -1) @ h, "one a constant or from a softmax"),
        (lambda h: torch.einsum("nctij,nctjk->nctik", h, h), "one a constant or from a softmax"),
        (lambda h: h[:, :8] / (1 + h.square()), "divisor is no constant"),
        (lambda h: h.sigmoid() * h.flip(2).sigmoid().mean(1, keepdim=True), "comes from a sigmoid"),
        (lambda h: h.softmax(-1) @ h.softmax(-2), "one a constant or from a softmax"),
    ],
)
def test_an_ambiguous_product_says_why(product: Callable[[Tensor], Tensor], says: str) -> None:
    m = model(lambda m, x: m.head(F.relu(m.block(product(m.stem(x))))))
    with pytest.raises(UnsupportedOperationError, match=says):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


def made(way: str, whole: nn.Module, x: Tensor) -> nn.Module:
    """What PyTorch's own tools make of a model; its ``eval`` may refuse to be called."""
    if way == "fx":
        return torch.fx.symbolic_trace(whole)
    dynamic = ({0: torch.export.Dim.DYNAMIC},) if way == "exported, any batch" else None
    return torch.export.export(whole, (x,), dynamic_shapes=dynamic).module()


def sequence(training: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    return whole.double().train(training)


@pytest.mark.parametrize("way", ["fx", "exported", "exported, any batch"])
@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
def test_exported_models_are_explained_as_what_they_were_made_of(way: str, method: Any) -> None:
    whole, x = sequence(), clips()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torch 2.11 deprecates what its own copies use
        found = method(made(way, whole, x), LOW, HIGH).attribute(x, target=1)
    for ours, right in zip(found, method(whole, LOW, HIGH).attribute(x, target=1), strict=True):
        torch.testing.assert_close(ours, right)


def test_a_model_exported_in_training_mode_is_refused() -> None:
    exported = made("exported", sequence(training=True), clips())
    with pytest.raises(UnsupportedOperationError, match="batch_norm"):
        DeepTaylor(exported, LOW, HIGH).attribute(clips(), target=1)


def test_hooks_are_left_out_and_that_is_said_once() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    method = DeepTaylor(m, LOW, HIGH)
    expected = method.attribute(x, 1)
    calls: list[str] = []
    m.stem.register_forward_hook(lambda *_: calls.append("called"))
    with pytest.warns(UserWarning, match="forward hooks") as caught:
        torch.testing.assert_close(method.attribute(x, 1), expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute(x, 1)
    assert not calls


def test_hooks_before_a_forward_are_left_out_and_that_is_said() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    method = DeepTaylor(m, LOW, HIGH)
    expected = method.attribute(x, 1)
    m.stem.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.warns(UserWarning, match=r"forward hooks \(stem\)"):
        torch.testing.assert_close(method.attribute(x, 1), expected)


FILLED = {
    "masked": lambda x: x.masked_fill(torch.arange(x.shape[-1]) < 3, -1.0),
    "where, self": lambda x: torch.where(torch.arange(x.shape[-1]) < 3, -1.0, x),
    "where, other": lambda x: torch.where(torch.arange(x.shape[-1]) >= 3, x, -1.0),
    "filled": lambda x: _filled(x.clone()),
}
"""Ways to put -1 into the first columns."""


def _filled(x: Tensor) -> Tensor:
    x[..., :3].fill_(-1.0)
    return x


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", FILLED)
def test_negative_numbers_put_among_rectified_ones_are_seen(way: str, backend: Any) -> None:
    def padded(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.block(F.pad(F.relu(m.stem(x))[..., 3:], (3, 0), value=-1.0))))

    def filled(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.block(FILLED[way](F.relu(m.stem(x))))))

    expected, actual = (
        DeepTaylor(model(f), LOW, HIGH, backend=backend).attribute(clips(), 1) for f in (padded, filled)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("written", ["new zeros", "a buffer", "zeros like it"])
def test_a_constant_tensor_written_into_a_slice(written: str) -> None:
    def write(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x)).clone()
        new = {
            "new zeros": h.new_zeros(h[:, :, -1:].shape),
            "a buffer": m.zeros,
            "zeros like it": torch.zeros_like(h[:, :, -1:]),
        }
        h[:, :, -1:] = new[written]
        return m.head(F.relu(m.block(h)))

    def number(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x)).clone()
        h[:, :, -1:] = 0.0
        return m.head(F.relu(m.block(h)))

    own = model(write)
    own.register_buffer("zeros", torch.zeros(1, 8, 1, 10, 10, dtype=torch.float64))
    expected = DeepTaylor(model(number), LOW, HIGH).attribute(clips(), 1)
    torch.testing.assert_close(DeepTaylor(own, LOW, HIGH).attribute(clips(), 1), expected)


@pytest.mark.parametrize("dims", [2, (2, 3, 4), -3])
def test_squeezes_that_time_survives(dims: Any) -> None:
    """Frozen clips have one time there; what is squeezed of a clip must not be squeezed of them."""

    def body(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.frame(x))
        return (
            m.head(h.squeeze(dims))
            if isinstance(dims, int)
            else m.fc(h.mean((3, 4), keepdim=True).squeeze(dims).mean(2))
        )

    m = model(body)
    m.frame = nn.Conv3d(3, 8, (1, 3, 3), dtype=torch.float64)
    x = clips()
    maps = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1)
    for t in (0, 5):
        frozen = x[:, :, t : t + 1].expand(x.shape).contiguous()
        expected = DeepTaylor(m, LOW, HIGH).attribute(frozen, 1).sum(1)[:, t]
        torch.testing.assert_close(maps.spatial[:, t], expected)


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_fixes_the_number_of_examples_explains_frozen_clips_too(
    count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    fixed, free = (model(lambda m, x, n=n: m.fc(F.relu(m.stem(x)).mean((2, 3, 4)).view(n, 8))) for n in (count, -1))
    x = clips(count)
    x[0, :, 1] = x[0, :, 0]  # so that the last group of frozen clips is not full
    expected = DiscriminativeDeepTaylor(free, LOW, HIGH).attribute(x, 1)
    actual = DiscriminativeDeepTaylor(fixed, LOW, HIGH).attribute(x, 1)
    torch.testing.assert_close(actual.spatial, expected.spatial)
    torch.testing.assert_close(actual.total, expected.total)
    assert "Traceback" not in capfd.readouterr().err


def test_gates_that_are_sliced_or_joined() -> None:
    def gated(spread: Callable[[Tensor], Tensor]) -> Tensor:
        def body(m: Layers, x: Tensor) -> Tensor:
            h = F.relu(m.stem(x))
            return m.head(h * spread(torch.sigmoid(m.squeeze(h.mean((2, 3, 4))))))

        own = model(body)
        own.squeeze = nn.Linear(8, 8, dtype=torch.float64)
        nn.init.eye_(own.squeeze.weight)
        nn.init.zeros_(own.squeeze.bias)
        return DeepTaylor(own, LOW, HIGH).attribute(clips(), 1)

    expected = gated(lambda gate: gate[..., None, None, None])
    for spread in (
        lambda gate: gate[:, :, None, None, None],
        lambda gate: torch.cat([part[:, :, None, None, None] for part in gate.chunk(2, 1)], 1),
        lambda gate: gate[..., None, None, None].repeat(1, 1, 8, 10, 10),
    ):
        torch.testing.assert_close(gated(spread), expected)


def _explained_with_a_constant(made: Callable[[Layers, Tensor], Tensor], used: Callable[..., Tensor]) -> None:
    """What is made of the input and gets no relevance is as good as a constant, in a clip and in its frozen ones."""

    def rectified(m: Layers, x: Tensor) -> Tensor:
        return F.relu(m.stem(x))

    m, x = model(lambda m, x: m.head(F.relu(used(m, rectified(m, x), made(m, rectified(m, x)))))), clips(1)
    fixed = model(lambda m, x: m.head(F.relu(used(m, rectified(m, x), m.constant))))
    with torch.no_grad():
        fixed.register_buffer("constant", made(m, rectified(m, x)).clone())
    method = DeepTaylor(fixed, LOW, HIGH)

    def expected(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed.constant.copy_(made(m, rectified(m, x)))
        return method.attribute(x, 1)

    relevance = expected(x)
    assert relevance.abs().max() > 0
    torch.testing.assert_close(DeepTaylor(m, LOW, HIGH).attribute(x, 1), relevance)
    frozen = [expected(x[:, :, t : t + 1].expand_as(x).contiguous()).sum(1) for t in range(8)]
    read_out: dict[Any, Callable[[int], Tensor]] = {
        "own": lambda t: frozen[t][:, t],
        "first": lambda t: frozen[t][:, 0],
        "mean": lambda t: frozen[t].mean(1),
    }
    for readout, of in read_out.items():
        spatial = DiscriminativeDeepTaylor(m, LOW, HIGH, readout=readout).attribute(x, 1).spatial
        torch.testing.assert_close(spatial, torch.stack([of(t) for t in range(8)], 1))


ACTIVATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, approximately": lambda g: F.gelu(g, approximate="tanh"),
    "silu by hand": lambda g: g * torch.sigmoid(g),
    "gelu by sigmoid": lambda g: torch.sigmoid(1.702 * g) * g,
    "gelu by erf": lambda g: 0.5 * g * (1 + torch.erf(g / 2**0.5)),
}


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("is_first", [False, True])
def test_the_activated_half_of_a_gated_linear_unit_is_its_gate(activation: str, is_first: bool) -> None:
    """As in SwiGLU and GEGLU (Shazeer 2020): the gate gets nothing, whichever factor it is."""
    _explained_with_a_constant(
        lambda m, h: ACTIVATED[activation](m.block(h)),
        lambda m, h, gate: gate * (_by_convolution(h) - 0.1) if is_first else (_by_convolution(h) - 0.1) * gate,
    )


def test_both_halves_of_a_gated_linear_unit_may_be_parts_of_one_projection() -> None:
    _explained_with_a_constant(
        lambda m, h: 0.5 * F.silu(torch.cat([m.block(h), _by_convolution(h)], 1)).chunk(2, 1)[0],
        lambda m, h, gate: gate * torch.cat([_by_convolution(h), m.block(h)], 1).chunk(2, 1)[0],
    )


def test_halves_of_a_gated_linear_unit_may_be_matrix_products() -> None:
    def projected(h: Tensor) -> Tensor:
        return (WEIGHT @ h.flatten(2)).unflatten(2, h.shape[2:])

    _explained_with_a_constant(
        lambda m, h: F.silu(projected(h.flip(2))),
        lambda m, h, gate: gate * F.linear(h.movedim(1, 4), WEIGHT).movedim(4, 1),
    )


def _gated_in_space(h: Tensor) -> Tensor:
    signal, gate = F.gelu(torch.cat([h, _by_convolution(h)], 1)).chunk(2, 1)
    return signal * _by_convolution(gate)


NO_GATED_LINEAR_UNIT: dict[str, Callable[[Layers, Tensor], Tensor]] = {
    "two gates": lambda m, h: F.silu(m.block(h)) * F.gelu(_by_convolution(h)),
    "a rectified gate": lambda m, h: F.relu(m.block(h)) * _by_convolution(h),
    "no projection is activated": lambda m, h: F.silu(F.max_pool3d(h, 3, 1, 1)) * _by_convolution(h),
    "activations of two streams": lambda m, h: F.silu(m.block(h)) * F.relu(_by_convolution(h)),
    "squeezed and excited": lambda m, h: (
        m.block(h) * torch.sigmoid(m.block(h).mean((2, 3, 4), True)) * _by_convolution(h)
    ),
    "excited by a rectifier": lambda m, h: F.silu(m.block(h)) * (1 + F.relu(_by_convolution(h.mean((2, 3, 4), True)))),
    "modulated by channel": lambda m, h: F.silu(m.block(h)) * (1 + _by_convolution(h.mean((2, 3, 4), True))),
    "attention of large kernels": lambda m, h: (lambda u: u * _by_convolution(m.block(u)))(F.gelu(_by_convolution(h))),
    "a spatial gating unit": lambda m, h: _gated_in_space(m.block(h)),
}


@pytest.mark.parametrize("name", NO_GATED_LINEAR_UNIT)
def test_products_with_an_activation_that_may_be_the_signal_are_refused(name: str) -> None:
    body = NO_GATED_LINEAR_UNIT[name]
    with pytest.raises(UnsupportedOperationError, match=r"mul .*neither factor, or both"):
        DeepTaylor(model(lambda m, x: m.head(body(m, F.relu(m.stem(x))))), LOW, HIGH).attribute(clips(), 1)


def _tokens(h: Tensor) -> Tensor:
    """Two numbers for each of four heads and eight times."""
    return h.mean((3, 4)).unflatten(1, (4, 2)).transpose(2, 3)


def _values(h: Tensor) -> Tensor:
    return h.unflatten(1, (4, 2)).transpose(2, 3).flatten(3)


def _in_place(values: Tensor) -> Tensor:
    return values.unflatten(3, (2, 10, 10)).transpose(2, 3).flatten(1, 2)


MIXED_HEADS: dict[str, tuple[Callable[[Layers, Tensor], Tensor], Callable[..., Tensor]]] = {
    "by a linear layer, before and behind": (
        lambda m, h: F.linear(
            F.linear((_tokens(h) @ _tokens(h).mT).permute(0, 2, 3, 1), WEIGHT[:4, :4]).softmax(2), WEIGHT[4:, 4:]
        ).permute(0, 3, 1, 2),
        lambda m, h, mixed: _in_place(mixed @ _values(h)),
    ),
    "by a convolution, of weights behind the values": (
        lambda m, h: F.conv2d((_tokens(h) @ _tokens(h).mT).softmax(2), WEIGHT[4:, 4:, None, None]),
        lambda m, h, mixed: _in_place((_values(h).mT @ mixed).mT),
    ),
    "in another type, laid out anew, with dropout": (
        lambda m, h: (
            F.dropout(
                F.linear((_tokens(h) @ _tokens(h).mT).softmax(3).transpose(1, 3), WEIGHT[4:, 4:]), 0.1, training=False
            )
            .float()
            .transpose(3, 1)
            .contiguous()
            .clone()
            .double()
        ),
        lambda m, h, mixed: _in_place(mixed @ _values(h)),
    ),
}


@pytest.mark.parametrize("name", MIXED_HEADS)
def test_heads_of_attention_that_are_mixed(name: str) -> None:
    """As in CaiT and DeepViT: what a layer makes of the weights of several heads are weights."""
    _explained_with_a_constant(*MIXED_HEADS[name])


@pytest.mark.parametrize(
    "weights",
    [
        lambda s: F.linear(s.softmax(3), WEIGHT),
        lambda s: F.linear(s.softmax(1).permute(0, 2, 3, 1), WEIGHT[:4, :4]).permute(0, 3, 1, 2),
        lambda s: F.conv2d(s.softmax(3), WEIGHT[:4, :4, None, None].expand(4, 4, 1, 3), padding=(0, 1)),
        lambda s: F.linear(s.log_softmax(3).permute(0, 2, 3, 1), WEIGHT[:4, :4]).permute(0, 3, 1, 2),
    ],
    ids=["over what was normalised", "over other heads", "over neighbours", "logarithms"],
)
def test_what_a_layer_makes_of_normalised_numbers_is_no_attention(weights: Callable[[Tensor], Tensor]) -> None:
    """A code book's words, say: a layer that adds up what a softmax normalised makes signals of it."""

    def body(m: Layers, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        return m.head(F.relu(_in_place(weights(_tokens(h) @ _tokens(h).mT) @ _values(h))))

    with pytest.raises(UnsupportedOperationError, match="not of two factors"):
        DeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)


KERNELS: dict[str, tuple[Callable[[Layers, Tensor], Tensor], Callable[..., Tensor]]] = {
    "of each channel, along time": (
        lambda m, h: torch.softmax(m.block(h).mean((3, 4))[..., :3], -1).view(-1, 1, 3, 1, 1),
        lambda m, h, kernel: F.conv3d(h.flatten(0, 1)[None], kernel, padding=(1, 0, 0), groups=len(kernel)).view(
            h.shape
        ),
    ),
    "of signed numbers, the bias too": (
        lambda m, h: m.block(h).mean((2, 3, 4)).view(1, 8, 1, 1, 1) * m.block.weight,
        lambda m, h, kernel: F.conv3d(h, kernel, kernel.mean((1, 2, 3, 4)), padding=1),
    ),
    "of two dimensions": (
        lambda m, h: m.block(h).mean((2, 3, 4)).view(-1, 1, 1, 1).expand(-1, 1, 3, 3),
        lambda m, h, kernel: F.conv2d(_frames(h), kernel, padding=1, groups=8).unflatten(0, (-1, 8)).transpose(1, 2),
    ),
    "transposed": (
        lambda m, h: torch.sigmoid(m.block(h)).mean((2, 3, 4)).view(8, 1, 1, 1, 1).expand(8, 8, 1, 1, 1),
        lambda m, h, kernel: F.conv_transpose3d(h, kernel),
    ),
}
"""Kernels made of what they are applied to, as in dynamic convolutions, and how they are applied."""


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_is_made_of_the_input_gets_nothing(name: str) -> None:
    _explained_with_a_constant(*KERNELS[name])


@pytest.mark.parametrize("size", [None, 1, 3])
def test_a_kernel_of_every_example_s_own(size: int | None) -> None:
    """As in TANet: examples and channels are groups of one convolution."""
    made, used = KERNELS["of each channel, along time"]
    m = model(lambda m, x: m.head(F.relu(used(m, F.relu(m.stem(x)), made(m, F.relu(m.stem(x)))))))
    method = DiscriminativeDeepTaylor(m, LOW, HIGH, readout="mean")
    together = method.attribute(clips(2), 1, internal_batch_size=size)
    alone = [method.attribute(one[None], 1) for one in clips(2)]
    for found, *expected in zip(together, *alone, strict=True):
        torch.testing.assert_close(found, torch.cat(expected))


def test_a_part_of_a_sigmoid_s_output_beside_a_gate_is_a_signal() -> None:
    """As in a network whose activations are sigmoids."""

    def body(m: Layers, x: Tensor) -> Tensor:
        signal, rest = torch.sigmoid(m.stem(x)).chunk(2, 1)
        return m.fc(torch.cat([signal * torch.sigmoid(rest), rest], 1).mean((2, 3, 4)))

    m, x = model(body), clips()
    relevance, delta = DeepTaylor(m, LOW, HIGH).attribute(x, 1, return_convergence_delta=True)
    with torch.no_grad():
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, m(x)[:, 1])
    assert relevance.abs().max() > 0


@dataclass
class Kept:
    """A tensor that is neither parameter nor buffer."""

    scale: Tensor


class Setting:
    """An object that a model reads."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


def _reset(m: Layers, scale: float) -> None:
    m.thing = Setting(scale)


RECONFIGURED: dict[str, tuple[Any, Callable[[Layers], Any], Callable[[Layers], Any]]] = {
    "a private number": (1.0, lambda m: m.thing, lambda m: setattr(m, "thing", 3.0)),
    "a dict": ({"scale": 1.0}, lambda m: m.thing["scale"], lambda m: m.thing.update(scale=3.0)),
    "a set": ({1.0}, lambda m: max(m.thing), lambda m: m.thing.add(3.0)),
    "a tensor in a dict": (
        {"scale": torch.tensor(1.0)},
        lambda m: m.thing["scale"],
        lambda m: m.thing.update(scale=torch.tensor(3.0)),
    ),
    "an array": (np.ones(1), lambda m: float(m.thing[0]), lambda m: m.thing.fill(3.0)),
    "a namespace": (SimpleNamespace(scale=1.0), lambda m: m.thing.scale, lambda m: setattr(m.thing, "scale", 3.0)),
    "argparse's namespace": (Namespace(scale=1.0), lambda m: m.thing.scale, lambda m: setattr(m.thing, "scale", 3.0)),
    "an equal of another type": (
        1,
        lambda m: 3.0 if isinstance(m.thing, bool) else 1.0,
        lambda m: setattr(m, "thing", True),
    ),
    "an object": (Setting(1.0), lambda m: m.thing.scale, lambda m: _reset(m, 3.0)),
    "a tensor in a dataclass": (Kept(torch.ones(())), lambda m: m.thing.scale, lambda m: m.thing.scale.fill_(3.0)),
    "a tensor in a namespace of a list": (
        [SimpleNamespace(scale=torch.ones(()))],
        lambda m: m.thing[0].scale,
        lambda m: m.thing[0].scale.fill_(3.0),
    ),
}


@pytest.mark.parametrize("what", RECONFIGURED)
def test_a_model_that_was_reconfigured_is_traced_anew(what: str) -> None:
    first, read, change = RECONFIGURED[what]
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)) * read(m))), clips()
    m.thing = copy.deepcopy(first)
    method = DeepTaylor(m, LOW, HIGH)
    method.attribute(x, 1)
    split, cache = DiscriminativeDeepTaylor(m, LOW, HIGH), FrameCache()
    split.attribute(x[:1], 1, frame_cache=cache)
    change(m)
    torch.testing.assert_close(method.attribute(x, 1), DeepTaylor(m, LOW, HIGH).attribute(x, 1))
    anew = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x[:1], 1)
    torch.testing.assert_close(split.attribute(x[:1], 1, frame_cache=cache).spatial, anew.spatial)
    with torch.no_grad():
        assert not torch.allclose(m(x)[:, 1], m.head(F.relu(m.stem(x)))[:, 1]), "the change is one"


def test_namespaces_that_hold_themselves_do_no_harm() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    expected = DeepTaylor(m, LOW, HIGH).attribute(x, 1)
    m.thing = SimpleNamespace()
    m.thing.itself = m.thing
    torch.testing.assert_close(DeepTaylor(m, LOW, HIGH).attribute(x, 1), expected)


def test_a_buffer_that_came_to_be_is_traced() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)) if m.maybe is None else F.relu(m.stem(x)) * m.maybe)), clips()
    m.register_buffer("maybe", None)
    method = DeepTaylor(m, LOW, HIGH)
    method.attribute(x, 1)
    m.maybe = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(method.attribute(x, 1), DeepTaylor(m, LOW, HIGH).attribute(x, 1))


def test_objects_that_took_the_place_of_others() -> None:
    """Their numbers (id) are given again."""
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)) * m.thing.scale)), clips()
    method = DeepTaylor(m, LOW, HIGH)
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        m.thing = None
        m.thing = Setting(scale)
        _, delta = method.attribute(x, 1, return_convergence_delta=True)
        with torch.no_grad():
            explained = method.attribute(x, 1).sum((1, 2, 3, 4)) + delta
            torch.testing.assert_close(explained, m(x)[:, 1])


def test_refusals_say_what_to_do() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    for targets in (3, torch.tensor([1, 2]), "13"):
        for method in (DeepTaylor(m, LOW, HIGH), DiscriminativeDeepTaylor(m, LOW, HIGH)):
            with pytest.raises(TypeError, match="targets must be a list"):
                method.attribute_targets(x, targets)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"low of shape \(2, 3, 8, 10, 10\) differs from example to example; .* \(1, C, T, H, W\)"
    ):
        DiscriminativeDeepTaylor(m, torch.full_like(x, LOW), HIGH).attribute(x, 1)


@dataclass
class Answer:
    """What some models return."""

    logits: Tensor


def _takes_a_list(m: Layers, x: Any) -> Tensor:
    return m.head(F.relu(m.stem(x[0]) + m.stem(x[1])))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "active dropout": (
        lambda m, x: m.fc(F.dropout(F.relu(m.stem(x)).mean((2, 3, 4)), 0.5)),
        r"dropout is active although the model is in evaluation mode: pass training=self.training",
    ),
    "active dropout of channels": (lambda m, x: m.head(F.dropout3d(F.relu(m.stem(x)))), "pass training=self.training"),
    "a dataclass": (lambda m, x: Answer(m.head(F.relu(m.stem(x)))), r"must return one tensor of scores"),
    "a decision": (
        lambda m, x: m.head(F.relu(m.stem(x / 255 if x.max() > 1 else x))),
        "control flow that depends on values cannot be explained",
    ),
    "NumPy": (
        lambda m, x: m.head(F.relu(m.stem(torch.from_numpy(x.numpy())))),
        r"numpy\(\) is not supported[^(]*\(see torch.export's documentation\)$",
    ),
}


@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_traced_is_refused_for_its_own_reason(
    what: str, method: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    body, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        method(model(body), LOW, HIGH).attribute(clips(), 1)
    assert not capfd.readouterr().err


def test_what_a_model_writes_while_it_is_traced_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        print("seen", file=sys.stderr)
        return m.head(x if x.max() > 1 else F.relu(m.stem(x)))

    with pytest.raises(ValueError, match=r"torch\.export cannot trace"):
        DeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)
    assert set(capsys.readouterr().err.split()) == {"seen"}


@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
def test_a_model_that_takes_a_list_of_inputs(method: Any) -> None:
    inner, x = model(_takes_a_list), clips()
    inputs = (x, x.flip(2))
    with pytest.raises(ValueError, match=r"forward\(self, slow, fast\) calls model\(\[slow, fast\]\)"):
        method(OfOne(inner).eval(), LOW, HIGH).attribute(inputs, 1)
    relevance = method(model(lambda m, slow, fast: inner([slow, fast])), LOW, HIGH).attribute(inputs, 1)
    assert len(relevance) == 2


class OfOne(nn.Module):
    """A model of one argument."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
def test_torchscript_is_refused_wherever_it_is(method: Any) -> None:
    x, m = clips(), model(lambda m, x: m.head(F.relu(m.stem(x))))
    traced = torch.jit.trace(nn.Sequential(nn.Conv3d(3, 4, 1), nn.Flatten()).eval(), x.float())
    with pytest.raises(TypeError, match=r"the model is a TorchScript module.*give the nn.Module it was made of"):
        method(traced, LOW, HIGH).attribute(x, 1)
    m.stem = torch.jit.script(m.stem)
    with pytest.raises(TypeError, match=r"stem is a TorchScript module.*give the nn.Module it was made of"):
        method(m, LOW, HIGH).attribute(x, 1)
    m = model(lambda m, x: m.head(m.activation(m.stem(x))))
    m.activation = torch.jit.trace(F.relu, x)
    with pytest.raises(ValueError, match="a TorchScript function by the Python function that it was made of"):
        method(m, LOW, HIGH).attribute(x, 1)


def test_mostly_lost_relevance_is_said() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    with torch.no_grad():
        m.fc.weight.copy_(-m.fc.weight.abs())
    with pytest.warns(UserWarning, match="more than half of the relevance was lost"):
        _, delta = DeepTaylor(m, LOW, HIGH).attribute(x, 1, return_convergence_delta=True)
    with torch.no_grad():
        torch.testing.assert_close(delta, m(x)[:, 1])


def test_half_precision_convolutions_with_full_precision_batch_norm() -> None:
    norm = nn.BatchNorm3d(8)
    m = model(lambda m, x: m.head(F.relu(norm(m.stem(x.bfloat16()))).float()), torch.float32)
    m.norm = norm.eval()
    m.stem.bfloat16()
    relevance = DeepTaylor(m, LOW, HIGH).attribute(clips().float(), 1)
    assert relevance.dtype == torch.float32
    assert bool(torch.isfinite(relevance).all())
    assert relevance.abs().max() > 0


@pytest.mark.parametrize("still", [False, True])
def test_clips_that_the_model_itself_reorders_are_refused(still: bool) -> None:
    def reordering(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.stem(x.permute(0, 2, 1, 3, 4))))

    def by_frames(m: Layers, x: Tensor) -> Tensor:
        seen = F.relu(m.picture(x.flatten(0, 1))).mean((2, 3))
        return m.fc(seen.view(len(x), -1, 8).mean(1))

    inputs = clips().permute(0, 2, 1, 3, 4)
    inputs = inputs[:, :, :1].expand_as(inputs) if still else inputs  # grey: all channels are equal, as frames would be
    for body, layer in ((reordering, "stem (conv3d)"), (by_frames, "picture (conv2d)")):
        method = DiscriminativeDeepTaylor(model(body), LOW, HIGH)
        with pytest.raises(
            ValueError, match=r"of clips \(N, 8, 3, 10, 10\) the model takes dimension 2 for channels"
        ) as raised:
            method.attribute(inputs, target=1)
        assert layer in str(raised.value) and "inputs.permute(0, 2, 1, 3, 4)" in str(raised.value)
        with pytest.raises(ValueError, match="dimension 2 for channels"):
            method.rule_table(inputs)


def test_clips_with_channels_last_are_refused_and_moved_times_told() -> None:
    """Repeating dimension 2 would repeat a row."""

    def channels_last(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.stem(x.permute(0, 4, 1, 2, 3))))

    def channels_last_by_frames(m: Layers, x: Tensor) -> Tensor:
        seen = F.relu(m.picture(x.permute(0, 1, 4, 2, 3).flatten(0, 1))).mean((2, 3))
        return m.fc(seen.view(len(x), -1, 8).mean(1))

    def time_last(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.stem(x.permute(0, 1, 4, 2, 3))))

    plain = DeepTaylor(model(lambda m, x: m.head(F.relu(m.stem(x)))), LOW, HIGH).attribute(clips(), 1)
    last = clips().permute(0, 2, 3, 4, 1)
    for body in (channels_last, channels_last_by_frames):
        with pytest.raises(ValueError, match=r"dimension 4 for channels, as of \(N, T, H, W, C\)") as raised:
            DiscriminativeDeepTaylor(model(body), LOW, HIGH).attribute(last, 1)
        assert "model(x.permute(0, 2, 3, 4, 1)), on inputs.permute(0, 4, 1, 2, 3)" in str(raised.value)
    permuted = DeepTaylor(model(channels_last), LOW, HIGH).attribute(last, 1)
    torch.testing.assert_close(permuted, plain.permute(0, 2, 3, 4, 1))
    with pytest.warns(
        UserWarning, match=r"moves it to dimension 3 .* if its clips are \(N, C, H, W, T\), explain"
    ) as told:
        DiscriminativeDeepTaylor(model(time_last), LOW, HIGH).attribute(clips().permute(0, 1, 3, 4, 2), 1)
    assert "model(x.permute(0, 1, 3, 4, 2)), on inputs.permute(0, 1, 4, 2, 3)" in str(told[0].message)


def test_a_module_that_reorders_clips_back_is_explained() -> None:
    inner = model(lambda m, x: m.head(F.relu(m.block(F.relu(m.stem(x.permute(0, 2, 1, 3, 4)))))))
    plain = model(lambda m, x: m.head(F.relu(m.block(F.relu(m.stem(x))))))
    wrapped = model(lambda m, x: inner(x.permute(0, 2, 1, 3, 4)))
    wanted = DiscriminativeDeepTaylor(plain, LOW, HIGH).attribute(clips(), target=1)
    for maps, expected in zip(
        DiscriminativeDeepTaylor(wrapped, LOW, HIGH).attribute(clips(), target=1), wanted, strict=True
    ):
        torch.testing.assert_close(maps, expected)


def test_frames_of_one_channel_may_be_channels_of_a_2d_network() -> None:
    def stacked(m: Layers, x: Tensor) -> Tensor:
        return m.fc(F.relu(m.picture(x.squeeze(1))).mean((2, 3)))

    inputs = clips()[:, :1, :3]
    spatial, temporal, total = DiscriminativeDeepTaylor(model(stacked), LOW, HIGH).attribute(inputs, target=1)
    assert total.shape == (2, 3, 10, 10)
    torch.testing.assert_close(spatial + temporal, total)


def test_so_may_all_colours_of_all_frames() -> None:
    m, x = model(lambda m, x: m.fc(F.relu(m.picture(x.flatten(1, 2))).mean((2, 3)))), clips()
    m.picture = nn.Conv2d(24, 8, 3, padding=1, dtype=torch.float64)
    found = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1)
    expected = DeepTaylor(m, LOW, HIGH).attribute(x[:, :, 3:4].expand_as(x), 1).sum(1)[:, 3]
    torch.testing.assert_close(found.spatial[:, 3], expected)


def test_a_maximum_whose_place_is_read_is_refused() -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        values, places = F.relu(m.stem(x)).max(2, keepdim=True)
        return m.head(values * places)

    with pytest.raises(UnsupportedOperationError, match="max"):
        DeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)


@pytest.mark.parametrize(
    "stacked", [lambda x: x[:, 1, :3], lambda x: x.mean(1)[:, :3], lambda x: x[:, :, :1].flatten(1, 2)]
)
def test_so_may_frames_of_one_colour_or_all_that_a_clip_shows(stacked: Callable[[Tensor], Tensor]) -> None:
    """Nothing is said of clips in another order."""
    m, x = model(lambda m, x: m.fc(F.relu(m.picture(stacked(x))).mean((2, 3)))), clips()
    plain = DeepTaylor(m, LOW, HIGH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1)
    for time in (0, 1, 5):
        expected = plain.attribute(x[:, :, time : time + 1].expand_as(x), 1).sum(1)[:, time]
        torch.testing.assert_close(found.spatial[:, time], expected)


# ------------------------------------------------------------------------------------------------ in and around the forward


class Settings:
    slope = 0.1


class Sloped(Settings, nn.Module):
    """What its classes say is part of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.leaky_relu(self.stem(x), self.slope).mean((2, 3, 4)))


def test_what_a_class_says_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Sloped().double().eval(), clips()
    method = DeepTaylor(net, LOW, HIGH)

    def assert_is_explained() -> Tensor:
        relevance, score = method.attribute(x, 1), net(x)[:, 1]
        torch.testing.assert_close(relevance.flatten(1).sum(1), score, rtol=1e-9, atol=0)
        return score

    first = assert_is_explained()
    monkeypatch.setattr(Settings, "slope", 1.0)
    second = assert_is_explained()
    monkeypatch.setattr(Sloped, "forward", lambda self, x: self.fc(F.softplus(self.stem(x)).mean((2, 3, 4))))
    third = assert_is_explained()
    assert not torch.isclose(first, second).any() and not torch.isclose(second, third).any()


@dataclass(slots=True)
class Slotted:
    slope: float = 0.1


class Configured(Sloped):
    """What it holds says what it computes."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @property
    def slope(self) -> float:  # type: ignore[override]
        return float(self.settings[0] if isinstance(self.settings, deque) else self.settings.slope)


@pytest.mark.parametrize("settings", [Slotted(), deque([0.1])], ids=["a dataclass with slots", "a deque"])
def test_what_a_module_holds_is_read_anew(settings: Any) -> None:
    net, x = Configured(settings).double().eval(), clips()
    method = DeepTaylor(net, LOW, HIGH)
    first = method.attribute(x, 1)
    if isinstance(settings, deque):
        settings[0] = 1.0
    else:
        settings.slope = 1.0
    second = method.attribute(x, 1)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, DeepTaylor(net, LOW, HIGH).attribute(x, 1))


def test_a_layer_that_was_pruned_is_traced_anew() -> None:
    def scaled(m: Layers, x: Tensor) -> Tensor:
        return (
            F.linear(F.relu(m.stem(x)).mean((2, 3, 4))[:, : m.fc.weight.shape[1]], m.fc.weight) / m.fc.weight.shape[1]
        )

    m, x = model(scaled), clips()
    method = DeepTaylor(m, LOW, HIGH)
    method.attribute(x, 1)
    m.fc.weight = nn.Parameter(m.fc.weight[:, :3])
    torch.testing.assert_close(method.attribute(x, 1).flatten(1).sum(1), m(x).detach()[:, 1])


def test_a_model_that_casts_its_inputs_is_traced_anew_where_its_type_changes() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x.to(m.stem.weight.dtype))))), clips()
    method = DeepTaylor(m, LOW, HIGH)
    method.attribute(x, 1)
    m.float()
    torch.testing.assert_close(method.attribute(x, 1), DeepTaylor(m, LOW, HIGH).attribute(x, 1))


FURTHER: dict[str, tuple[Callable[[Any], Tensor | int], Any, Any]] = {
    "of another type": (lambda a: 2 if a is True else 1, 1, True),
    "for all examples alike": (lambda a: a if a.ndim == 2 else 2 * a, torch.ones(2, 5), torch.ones(5)),
}
"""What is made of a further argument, one of which that is 1, and an equal one of which that is 2."""


@pytest.mark.parametrize("what", FURTHER)
def test_further_arguments_that_differ_in_kind_alone_are_told_apart(what: str) -> None:
    made, first, second = FURTHER[what]
    m, x = model(lambda m, x, a: m.head(F.relu(m.stem(x))) * made(a)), clips()
    method = DeepTaylor(m, LOW, HIGH)
    once = method.attribute(x, 1, first)
    torch.testing.assert_close(method.attribute(x, 1, second), 2 * once)


def test_a_trace_is_of_a_device() -> None:
    here, there = (signature_of((torch.zeros(2, 3, device=device),), 2) for device in ("cpu", "meta"))
    assert here != there


class Described(Sloped):
    """Python makes its forward anew whenever it is asked for."""

    forward = functools.partialmethod(Sloped.forward)


class Counted(Sloped):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize("cls", [Sloped, Described, Counted])
def test_a_trace_is_found_again(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    traces, real = [], captum_dtd.attribution.trace
    monkeypatch.setattr(captum_dtd.attribution, "trace", lambda *given: traces.append(given) or real(*given))
    method = DeepTaylor(cls().double().eval(), LOW, HIGH)
    for _ in range(3):
        method.attribute(clips(), 1)
    assert len(traces) == 1


@pytest.mark.parametrize("method", [DeepTaylor, DiscriminativeDeepTaylor])
def test_traces_are_few_and_the_least_used_go_first(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Network]] = []

    def watched(*given: Any) -> Network:
        network = Network(*given)
        made.append(weakref.ref(network))
        return network

    monkeypatch.setattr(captum_dtd.attribution, "Network", watched)
    monkeypatch.setattr(captum_dtd.attribution, "_MOST_TRACES", 2)
    explainer = method(Sloped().double().eval(), LOW, HIGH)
    for length, traces in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
        explainer.attribute(clips()[:, :, :length], 1)
        assert len(made) == traces
    gc.collect()
    assert sum(network() is not None for network in made) == 2


@pytest.mark.parametrize(("beta", "alpha"), [(3.0, 2.0), (0, 1), (1, -2), (-0.5, 0.5)])
@pytest.mark.parametrize("rule", [ZPlus(), ZPlus("absorbed"), Epsilon(1e-9)])
def test_addmm_scales_its_bias_and_its_product(rule: Rule, beta: float, alpha: float) -> None:
    def linear(m: Layers, x: Tensor) -> Tensor:
        return F.linear(F.relu(m.stem(x)).mean((2, 3, 4)), alpha * m.fc.weight, beta * m.fc.bias)

    def addmm(m: Layers, x: Tensor) -> Tensor:
        return torch.addmm(m.fc.bias, F.relu(m.stem(x)).mean((2, 3, 4)), m.fc.weight.t(), beta=beta, alpha=alpha)

    composite = dataclasses.replace(DTD, linear=rule)
    found, expected = (
        DeepTaylor(model(body), LOW, HIGH, composite=composite).attribute(clips(), 1) for body in (addmm, linear)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def framewise(m: Layers, x: Tensor) -> Tensor:
    """(N, T, classes), of each frame's picture."""
    frames = x.transpose(1, 2).flatten(0, 1)
    return m.fc(F.relu(m.picture(frames)).mean((2, 3))).view(len(x), x.shape[2], 5)


@pytest.mark.parametrize("dim", [-1, 1])
def test_a_softmax_of_frames_is_stepped_over_however_its_dimension_is_counted(dim: int) -> None:
    def of_rows(m: Layers, x: Tensor) -> Tensor:
        return framewise(m, x).flatten(0, 1).softmax(dim).view(len(x), x.shape[2], 5).mean(1)

    x = clips()
    with pytest.warns(UserWarning, match="logits are explained"):
        found = DeepTaylor(model(of_rows), LOW, HIGH).attribute(x, 1)
    expected = DeepTaylor(model(lambda m, x: framewise(m, x).mean(1)), LOW, HIGH).attribute(x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("length", [1, 4])
def test_a_softmax_before_an_average_of_few_is_stepped_over(length: int) -> None:
    x = clips()[:, :, :length]
    of_frames = model(lambda m, x: framewise(m, x).softmax(-1).view(len(x), x.shape[2], 5).mean(1))
    of_clips = model(lambda m, x: m.head(F.relu(m.stem(x))).softmax(-1).unsqueeze(1).mean(1))
    for net in (of_frames, of_clips):
        with pytest.warns(UserWarning, match="logits are explained"):
            assert DeepTaylor(net, LOW, HIGH).attribute(x, 1).abs().max() > 0


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.adaptive_avg_pool1d(framewise(m, x).transpose(1, 2).softmax(2), 1).flatten(1),
        lambda m, x: framewise(m, x).softmax(1).mean(1),
        lambda m, x: framewise(m, x).permute(0, 2, 1).softmax(2).mean(2),
        lambda m, x: framewise(m, x).unsqueeze(1).softmax(-2).sum(-2).squeeze(1),
        lambda m, x: framewise(m, x).flatten(0, 1).softmax(0).view(len(x), -1, 5).mean(1),
    ],
)
def test_a_softmax_over_what_is_averaged_then_is_not_over_classes(body: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedOperationError, match="softmax"):
        DeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)


def test_a_score_of_all_examples_is_refused_for_that() -> None:
    with pytest.raises(UnsupportedOperationError, match="sum"):
        DeepTaylor(model(lambda m, x: m.head(F.relu(m.stem(x))).sum().softmax(0)), LOW, HIGH).attribute(clips(), None)


TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean of everything": lambda y: y / y.mean(),
    "a maximum of everything": lambda y: y / y.max(),
    "a norm": lambda y: y / y.norm(),
    "a mean of examples": lambda y: y / (1 + y.mean(0)),
    "a sum of examples, kept": lambda y: y / (1 + y.sum(0, keepdim=True)),
    "the first example": lambda y: y / (1 + y[0].amax()),
    "a softmax over examples": lambda y: y * y.softmax(0),
    "neighbours": lambda y: y + y.roll(1, 0),
    "the larger ones first": lambda y: y + y.sort(0)[0],
    "a place of one example": lambda y: y.index_put((torch.tensor([0]),), torch.zeros((), dtype=y.dtype)),
    "written over others": lambda y: (
        y
        + torch.zeros_like(y).scatter(
            0, (y.shape[0] - 1 - torch.arange(y.shape[0])).view(-1, 1, 1, 1, 1).expand_as(y), y
        )
    ),
    "the other way round": lambda y: y + y.flip(0),
    "every pair": lambda y: (
        y * (1 + (y.flatten(1) @ y.flatten(1).t()).softmax(1).diagonal().view(-1, 1, 1, 1, 1)).sigmoid()
    ),
}


@pytest.mark.parametrize("how", TOGETHER)
def test_frozen_clips_keep_apart_where_a_model_takes_examples_together(how: str) -> None:
    """Each as if it were alone, however many are asked for at once: their frames are of one clip."""
    m, x = model(lambda m, x: m.head(TOGETHER[how](F.relu(m.stem(x))))), clips(1)
    x[:, :, 4:] *= 0.2
    method = DiscriminativeDeepTaylor(m, LOW, HIGH)
    with pytest.warns(UserWarning, match=r"is made of all examples together.*Name the dimensions"):
        found = [method.attribute(x, 1, internal_batch_size=size) for size in (None, 1, 4)]
    alone = DeepTaylor(m, LOW, HIGH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for time in range(x.shape[2]):
            frozen = x[:, :, time : time + 1].expand_as(x)
            expected = alone.attribute(frozen, 1).sum(1)[:, time]
            for one in found:
                torch.testing.assert_close(one.spatial[:, time], expected)


def test_examples_that_keep_apart_are_not_said_to_be_together() -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x))
        empty = y.new_zeros(8)
        return m.head(
            y / (1 + y.flatten(1).mean(1).view(-1, 1, 1, 1, 1)) + (empty + torch.ones_like(empty)).view(8, 1, 1, 1)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiscriminativeDeepTaylor(model(body), LOW, HIGH).attribute(clips(), 1)


@pytest.mark.parametrize("frames", [2, 8])
def test_frozen_clips_keep_their_places_where_a_model_takes_so_many(frames: int) -> None:
    """A table that is read by place, written for batches of two: each clip is explained in its own row."""

    def body(m: Layers, x: Tensor) -> Tensor:
        return m.head(
            F.relu(m.stem(x)).reshape(2, 8, frames, 10, 10) * torch.tensor([0.5, 2.0]).double().view(2, 1, 1, 1, 1)
        )

    m, x = model(body), clips(4)[:, :, :frames]
    found = DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1, internal_batch_size=2)
    alone = DeepTaylor(m, LOW, HIGH)
    for time in range(frames):
        frozen = x[:, :, time : time + 1].expand_as(x)
        expected = alone.attribute(frozen, 1, internal_batch_size=2).sum(1)[:, time]
        torch.testing.assert_close(found.spatial[:, time], expected)


def test_one_score_of_all_examples_is_told_from_one_of_each() -> None:
    with pytest.raises(ValueError, match=r"a score for each example.*sum joins all examples \(test_user_models.py:"):
        DeepTaylor(model(lambda m, x: m.head(F.relu(m.stem(x)))[:, 1].sum()), LOW, HIGH).attribute(clips())


def test_hooks_of_all_modules_are_read_anew() -> None:
    """They run in a trace, so that what they do is part of the model as long as they are there."""
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    method = DeepTaylor(m, LOW, HIGH)
    plain = method.attribute(x, 1)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 3 * output if isinstance(module, nn.Linear) else None
    )
    try:
        hooked = method.attribute(x, 1)
    finally:
        hook.remove()
    torch.testing.assert_close(hooked, 3 * plain)
    torch.testing.assert_close(method.attribute(x, 1), plain)


def test_lazy_layers() -> None:
    """One that nothing has run yet is named; one that forward never runs does no harm."""
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    expected = DeepTaylor(m, LOW, HIGH).attribute(x, 1)
    m.never_run = nn.LazyLinear(3)
    torch.testing.assert_close(DeepTaylor(m, LOW, HIGH).attribute(x, 1), expected)
    DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(x, 1, frame_cache=FrameCache())
    lazy = nn.Sequential(nn.LazyConv3d(4, 3), nn.Flatten(), nn.LazyLinear(5)).double().eval()
    with pytest.raises(
        ValueError, match=r"lazy parameters without a shape \(0.weight, 0.bias, 2.weight\): run it once"
    ):
        DeepTaylor(lazy, LOW, HIGH).attribute(x, 1)
    assert nn.parameter.is_lazy(lazy[0].weight), "nothing was made of the caller's model"


def test_what_cannot_be_copied_is_named() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(x))))
    m.block.guard = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"cannot be copied for tracing \(block.guard: .*lock"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


def test_batch_norm_of_the_batch_says_what_it_lacks() -> None:
    m = model(lambda m, x: m.head(m.norm(F.relu(m.stem(x)))))
    m.norm = nn.BatchNorm3d(8, track_running_stats=False).double().eval()
    with pytest.raises(UnsupportedOperationError, match="normalises by the examples of the batch"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


def test_the_model_of_a_discrimination_may_be_changed() -> None:
    first, second = (model(lambda m, x, k=k: k * m.head(F.relu(m.stem(x)))) for k in (1.0, 2.0))
    method, x = DiscriminativeDeepTaylor(first, LOW, HIGH), clips()
    before = method.attribute(x, 1, internal_batch_size=np.int64(2))  # type: ignore[arg-type]
    method.model = second
    assert method.model is second
    torch.testing.assert_close(method.attribute(x, 1).total, 2 * before.total)


@dataclass(frozen=True)
class OwnBox(Rule):
    """z-beta, written by a user."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term("x-low", "v+"), Term("x-high", "v-"))),)


def test_a_rule_of_ones_own_may_read_pixel_bounds() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.block(F.relu(m.stem(x)))))), clips()
    found = DeepTaylor(m, LOW, HIGH, composite={"stem": OwnBox()}).attribute(x, 1)
    torch.testing.assert_close(found, DeepTaylor(m, LOW, HIGH, composite={"stem": ZBeta()}).attribute(x, 1))
    with pytest.raises(ValueError, match=r"OwnBox\(\) needs pixel bounds, and block .* is a hidden layer"):
        DeepTaylor(m, LOW, HIGH, composite={"block": OwnBox()}).attribute(x, 1)


def test_a_mean_over_one_frame_still_casts() -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        return m.fc(F.relu(m.stem(x)).mean(2, dtype=torch.float64).mean((2, 3)))

    net = model(body).float()
    net.fc.double()
    for frames in (1, 4):
        x = clips()[:, :, :frames].float()
        relevance, score = DeepTaylor(net, LOW, HIGH).attribute(x, 1), net(x)[:, 1]
        torch.testing.assert_close(relevance.flatten(1).sum(1), score.to(relevance.dtype), rtol=1e-4, atol=0)


def both(net: nn.Module, x: Tensor, target: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Spatial relevance at distinct times only, and by whole frozen clips."""
    method = DiscriminativeDeepTaylor(net, LOW, HIGH, **options)
    whole = DiscriminativeRelevance(DeepTaylor(net, LOW, HIGH, **options))
    return method.attribute(x, target).spatial, whole.attribute(x, target).spatial


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_of_frames_may_be_rectified_sums(backend: Any) -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x)).mean((3, 4)).transpose(1, 2)
        return F.relu(m.fc(y) + F.linear(y, m.fc.weight.abs()))

    found, expected = both(model(body), clips(), (2, 1), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_may_be_of_a_wider_type_than_the_network(backend: Any) -> None:
    net = model(lambda m, x: m.head(F.relu(m.stem(x))).double()).float()
    found, expected = both(net, clips().float(), 1, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert expected.abs().max() > 0


def along_time(y: Tensor) -> Tensor:
    """Max pooling of every pixel's times by themselves, which leaves as many."""
    n, c, t, h, w = y.shape
    pooled = F.max_pool1d(y.permute(0, 3, 4, 1, 2).reshape(n, h * w * c, t), 3, 1, 1)
    return pooled.view(n, h, w, c, t).permute(0, 3, 4, 1, 2)


def pictures(m: Layers, x: Tensor) -> Tensor:
    """Class maps of pictures as high and wide as a clip is long."""
    return m.logits(F.relu(m.picture(x[..., :8, :8].transpose(1, 2).flatten(0, 1))).unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("examples", [1, 2])
def test_a_model_of_so_many_examples_is_given_so_many(examples: int) -> None:
    def body(m: Layers, x: Tensor) -> Tensor:
        return m.head(F.relu(m.stem(x.view(examples, 3, *x.shape[2:]))))

    x, fixed = clips(2 * examples), DiscriminativeDeepTaylor(model(body), LOW, HIGH)
    free = DiscriminativeDeepTaylor(model(lambda m, x: m.head(F.relu(m.stem(x)))), LOW, HIGH)
    found = fixed.attribute(x, 1, internal_batch_size=examples)
    for part, expected in zip(found, free.attribute(x, 1), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-13)


def chosen_frames(h: Tensor, way: int) -> Tensor:
    """The two frames in which most happens, or the one."""
    mass = h.sum((1, 3, 4))
    places = mass.topk(2, 1)[1]
    if way == 1:
        return h.gather(2, places[:, None, :, None, None].expand(-1, 8, -1, *h.shape[3:]))
    if way == 2:
        return torch.take_along_dim(h, places[:, None, :, None, None], 2)
    return h[torch.arange(h.shape[0]), :, mass.argmax(1)].unsqueeze(2)


@pytest.mark.parametrize(
    ("body", "composite", "place"),
    [
        (lambda m, x: m.head(along_time(F.relu(m.stem(x)))), "epsilon-gamma-box", "max_pool1d"),
        (lambda m, x: pictures(m, x).amax((2, 3)).view(len(x), x.shape[2], 5).mean(1), "dtd", None),
        (lambda m, x: m.head(F.max_pool3d(F.relu(m.stem(x)), 2)), "epsilon-gamma-box", "max_pool3d"),
        (lambda m, x: framewise(m, x).amax(1), "dtd", "maximum_over"),
        (lambda m, x: framewise(m, x).topk(3, 1)[0].mean(1), "dtd", "topk (test_user_models.py:"),
        (lambda m, x: framewise(m, x).sort(1, descending=True)[0][:, :2].mean(1), "dtd", "sort (test_user_models.py:"),
        (lambda m, x: framewise(m, x).sort(1)[0].mean(1), "dtd", None),
        (lambda m, x: framewise(m, x).median(1)[0], "dtd", "median (test_user_models.py:"),
        (lambda m, x: framewise(m, x).mean(1).topk(5, 1)[0], "dtd", None),
        (lambda m, x: m.head(chosen_frames(F.relu(m.stem(x)), 1)), "dtd", "topk (test_user_models.py:"),
        (lambda m, x: m.head(chosen_frames(F.relu(m.stem(x)), 2)), "dtd", "topk (test_user_models.py:"),
        (lambda m, x: m.head(chosen_frames(F.relu(m.stem(x)), 3)), "dtd", "argmax (test_user_models.py:"),
        (lambda m, x: m.head(F.max_pool3d(F.relu(m.stem(x)), 2)), "dtd", None),
        (lambda m, x: m.head(F.max_pool3d(F.relu(m.stem(x)), (1, 2, 2))), "epsilon-gamma-box", None),
        (lambda m, x: m.logits(F.relu(m.stem(x)).mean(2, keepdim=True)).amax((3, 4)).squeeze(2), "dtd", None),
        (lambda m, x: m.fc(F.max_pool2d(F.relu(m.stem(x)).mean(1), 2).mean((2, 3))), "epsilon-gamma-box", None),
        (lambda m, x: m.head(F.relu(m.stem(x[:, :, :1])).amax(2, keepdim=True)), "dtd", None),
    ],
)
def test_times_that_compete_in_a_frozen_clip_are_warned_of(
    body: Callable[..., Tensor], composite: Any, place: str | None
) -> None:
    method = DiscriminativeDeepTaylor(model(body), LOW, HIGH, composite=composite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.attribute(clips(), 1)
        method.attribute(clips(), 2)
    told = [str(each.message) for each in caught if "several times" in str(each.message)]
    assert len(told) == (place is not None)
    assert place is None or place in told[0]


def test_scores_that_are_no_numbers_are_warned_of() -> None:
    net = model(lambda m, x: m.head(F.relu(m.stem(x))))
    net.fc.weight.data[1, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinite"):
        DeepTaylor(net, LOW, HIGH).attribute(clips(), 1)


FUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda p, q: (p.softmax(1) + q.softmax(1)) / 2,
    "weighted": lambda p, q: torch.add(p.softmax(1), q.softmax(1), alpha=0.5) * 0.7,
    "stack": lambda p, q: torch.stack([p.softmax(-1), q.softmax(-1)]).mean(0),
    "python's sum": lambda p, q: sum([p.softmax(1), q.softmax(1)]) / 2,
    "stack behind": lambda p, q: torch.stack([p.sigmoid(), q.sigmoid()], -1).mean(-1),
}
WITHOUT_PROBABILITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda p, q: (p + q) / 2,
    "weighted": lambda p, q: torch.add(p, q, alpha=0.5) * 0.7,
    "stack": lambda p, q: torch.stack([p, q]).mean(0),
    "python's sum": lambda p, q: (p + q) / 2,
    "stack behind": lambda p, q: torch.stack([p, q], -1).mean(-1),
}


@pytest.mark.parametrize("way", FUSED)
def test_averages_of_several_networks_probabilities_are_explained_by_their_logits(way: str) -> None:
    def streams(m: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.head(F.relu(m.stem(x))), m.fc(F.relu(m.block(F.relu(m.stem(x.flip(2))))).amax((2, 3, 4)))

    probabilities, logits = (
        model(lambda m, x, f=f: f(*streams(m, x))) for f in (FUSED[way], WITHOUT_PROBABILITIES[way])
    )
    with pytest.warns(UserWarning, match="its logits are explained"):
        found = DeepTaylor(probabilities, LOW, HIGH).attribute(clips(), 1)
    torch.testing.assert_close(found, DeepTaylor(logits, LOW, HIGH).attribute(clips(), 1))


def cascade(m: Layers, x: Tensor) -> Tensor:
    """The second stage reads the first one's probabilities."""
    seen = F.relu(m.stem(x)).mean((2, 3, 4))
    first = m.fc(seen).softmax(1)
    return first + m.fc(torch.cat([seen[:, :3], first], 1)).softmax(1)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.head(F.relu(m.stem(x))).softmax(1) + m.head(F.relu(m.block(F.relu(m.stem(x))))),
        lambda m, x: m.head(F.relu(m.stem(x))).softmax(1) - m.head(F.relu(m.block(F.relu(m.stem(x))))).softmax(1),
        lambda m, x: m.head(F.relu(m.stem(x))).softmax(1) * -1.0,
        lambda m, x: torch.add(m.head(m.stem(x).relu()).softmax(1), m.head(m.stem(x).abs()).softmax(1), alpha=-0.5),
        lambda m, x: m.head(F.relu(m.stem(x))).softmax(1) + m.fc.bias,
        cascade,
    ],
)
def test_what_is_more_than_an_average_of_probabilities_is_not_stepped_over(body: Callable[..., Tensor]) -> None:
    m = model(body)
    with pytest.raises(UnsupportedOperationError, match="softmax"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


def test_single_weights_of_an_interpolation_are_not_known() -> None:
    m = model(of_rectified(SAME["trilinear"][0]))
    with pytest.raises(ValueError, match=r"Flat.* needs single weights, and upsample_trilinear3d.* interpolates"):
        DeepTaylor(m, LOW, HIGH, composite={"upsample*": Flat()}).rule_table(clips())


def test_what_keeps_the_first_layer_from_pixels_is_named() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(x.clamp(-1, 1)))))
    with pytest.raises(ValueError, match="in the way: clamp in forward"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


@pytest.mark.parametrize("score", [1, -1])
@pytest.mark.parametrize(
    ("weight", "bias", "told"),
    [
        (1.5, -2.0, "larger than the score, or of the other sign"),
        (0.875, -0.75, "larger than the score, or of the other sign"),
        (-0.25, 1.5, "larger than the score, or of the other sign"),
        (-0.5, 2.0, "larger than the score, or of the other sign"),
        (0.1, 0.8, "more than half of the relevance was lost"),
        (0.4, 0.2, ""),
    ],
)
def test_relevance_that_grew_or_turned_is_not_called_lost(weight: float, bias: float, told: str, score: int) -> None:
    """Of a score of 1 the inputs' part is twice the weight, and the rest the bias's; all of them may be negative."""
    m = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 1))
    for parameter, value in zip(m.parameters(), (1.0, score * weight, score * bias), strict=True):
        parameter.data.fill_(value)
    method = DeepTaylor(m.eval(), 0.0, 1.0, composite={"4": Epsilon(stabilizer=0.0)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        relevance = method.attribute(torch.ones(2, 1, 2, 3, 3), 0)
    torch.testing.assert_close(relevance.sum((1, 2, 3, 4)), torch.full((2,), 2 * score * weight))
    assert [told in str(warning.message) for warning in caught] == ([True] if told else [])


def test_a_maximum_with_an_argument_that_is_not_explained_passes() -> None:
    m, x = model(lambda m, x, least: m.head(F.relu(m.block(torch.maximum(F.relu(m.stem(x)), least))))), clips()
    whole = DeepTaylor(m, LOW, HIGH).attribute(x, 1, torch.full((2, 8, 8, 10, 10), 0.01, dtype=torch.float64))
    single = DeepTaylor(m, LOW, HIGH).attribute(x, 1, torch.full((2, 1, 1, 1, 1), 0.01, dtype=torch.float64))
    torch.testing.assert_close(whole, single)


def test_pixels_that_the_model_resizes_are_still_pixels() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")))))
    rules = {row.operation: row.rule for row in DeepTaylor(m, LOW, HIGH).rule_table(clips()).rows}
    assert rules["conv3d"].startswith("ZBeta") and rules["upsample_trilinear3d"].startswith("ZBeta")
    relevance = DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)
    with torch.no_grad():
        torch.testing.assert_close(relevance.sum((1, 2, 3, 4)), m(clips())[:, 1], rtol=1e-8, atol=1e-12)


def test_hints_for_inputs_of_several_views_and_of_different_lengths() -> None:
    m = model(lambda m, x: m.head(F.relu(m.stem(x))))
    with pytest.raises(ValueError, match=r"several views of each example: pass inputs.flatten\(0, 1\)"):
        DiscriminativeDeepTaylor(m, LOW, HIGH).attribute(clips(4).view(2, 2, 3, 8, 10, 10), 1)
    two = model(lambda m, x, y: m.head(F.relu(m.stem(x)).mean(2, True) + F.relu(m.stem(y)).mean(2, True)))
    with pytest.raises(ValueError, match="picks those of each input itself"):
        DiscriminativeDeepTaylor(two, LOW, HIGH).attribute((clips(), clips()[:, :, ::4]), 1)


def test_lost_and_grown_examples_of_one_batch_are_told_apart() -> None:
    m = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 1))
    for parameter, value in zip(m.parameters(), (1.0, 1.0, -1.0), strict=True):
        parameter.data.fill_(value)
    x = torch.ones(2, 1, 2, 3, 3)
    x[1] = 0  # its score is the bias alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DeepTaylor(m.eval(), 0.0, 1.0, composite={"4": Epsilon(stabilizer=0.0)}).attribute(x, 0)
    assert ["was lost" in str(each.message) for each in caught] == [True, False]


def test_a_product_with_a_weight_follows_the_rule_of_linear_layers() -> None:
    def rules(body: Callable[..., Tensor]) -> list[str]:
        table = DeepTaylor(model(body), LOW, HIGH, composite="epsilon-gamma-box").rule_table(clips())
        return [row.rule for row in table.rows if row.operation in ("linear", "matmul", "einsum")]

    written = (
        lambda m, x: F.relu(m.stem(x)).mean((2, 3, 4)) @ m.fc.weight.T,
        lambda m, x: torch.einsum("nc,oc->no", F.relu(m.stem(x)).mean((2, 3, 4)), m.fc.weight),
    )
    (wanted,) = rules(lambda m, x: F.linear(F.relu(m.stem(x)).mean((2, 3, 4)), m.fc.weight))
    assert wanted.startswith("Epsilon")
    assert all(rules(body) == [wanted] for body in written)


class Halved(Elementwise):
    """A layer of a user's own."""


def test_a_layer_of_ones_own_is_in_the_rule_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(m: Layers, x: Tensor) -> Tensor:
        return m.head(torch.ldexp(F.relu(m.stem(x)), torch.tensor(-1)))

    monkeypatch.setitem(layers._FACTORIES, torch.ops.aten.ldexp.Tensor, lambda node, signals: Halved())
    method = DeepTaylor(model(halved), LOW, HIGH)
    assert "passes" in [row.rule for row in method.rule_table(clips()).rows if row.operation == "ldexp"]
    torch.testing.assert_close(method.attribute(clips(), 1).flatten(1).sum(1), method.model(clips()).detach()[:, 1])


@pytest.mark.parametrize(("given", "explained"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_relevance_of_no_examples_has_its_type_too(given: torch.dtype, explained: torch.dtype) -> None:
    method = DeepTaylor(model(lambda m, x: m.head(F.relu(m.stem(x))), given), LOW, HIGH)
    x = clips().to(given)
    assert method.attribute(x, 1).dtype == method.attribute(x[:0], 1).dtype == explained


def test_bounds_may_be_tuples_of_numpys_numbers() -> None:
    m, x = model(lambda m, x: m.head(F.relu(m.stem(x)))), clips()
    high = tuple(np.full(3, HIGH, np.float32))
    torch.testing.assert_close(
        DeepTaylor(m, LOW, high).attribute(x, 1), DeepTaylor(m, LOW, float(high[0])).attribute(x, 1)
    )
