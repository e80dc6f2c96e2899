"""How far relevance is off in each precision: on networks and clips in which motion matters.

Machines without tensor units have better arithmetic to offer for most, and take it. Here the kernels of plain C++
serve that round as tensor units do.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from models import between
from torch import Tensor, nn

from captum_dtd import DiscriminativeDeepTaylor, SpatioTemporalRelevance, kernels

LOW, HIGH = -1.0, 1.0
SEEDS = range(3)

ALLOWED = {"float32": 1e-4, "mixed": 2e-3, "bfloat16": 5e-2}
"""Relative L2 error of the temporal part, the median over seeds: what the documentation states."""

OF_TOTAL = {"float32": 5e-5, "mixed": 5e-4, "bfloat16": 3e-2}
"""The same error relative to the total."""

KERNELS = [
    ("float32", "generic/winograd"),
    ("float32", "generic/bf16x3"),
    ("mixed", "generic/mixed"),
    ("bfloat16", "generic/bf16"),
    ("bfloat16", "generic/winograd_bf16"),
]


def network(seed: int) -> nn.Module:
    """Eight layers as wide as C3D's: the more channels add up, the less of their rounding is left."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for width, pool in (
        (64, (1, 2, 2)),
        (128, (2, 2, 2)),
        (192, None),
        (192, (2, 2, 2)),
        (256, None),
        (256, (2, 2, 2)),
    ):
        layers += [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)  # type: ignore[arg-type]
        layers += [nn.MaxPool3d(pool, pool)] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 2, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


def clip(seed: int, dtype: torch.dtype) -> Tensor:
    """A texture that moves over another: (1, 3, 16, 16, 16)."""
    ground = between((LOW,) * 3, (HIGH,) * 3, (1, 3, 1, 16, 48), seed, torch.float64)
    patch = between((LOW,) * 3, (HIGH,) * 3, (1, 3, 1, 6, 6), seed + 100, torch.float64)
    frames = []
    for t in range(16):
        frame = ground[..., 2 * t : 2 * t + 16].clone()
        frame[..., t // 2 : t // 2 + 6, 9 - t // 2 : 15 - t // 2] = patch
        frames.append(frame)
    return torch.cat(frames, 2).to(dtype)


@pytest.fixture(scope="module")
def exact() -> list[SpatioTemporalRelevance]:
    return [
        DiscriminativeDeepTaylor(network(seed).double(), LOW, HIGH).attribute(clip(seed, torch.float64), 1)
        for seed in SEEDS
    ]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(("precision", "kernel"), KERNELS)
def test_error_of_every_precision(
    exact: list[SpatioTemporalRelevance], monkeypatch: pytest.MonkeyPatch, precision: Any, kernel: str
) -> None:
    def roughest(op: str, device: str, dtype: torch.dtype, asked: str, *_: Any) -> str:
        if not op.endswith("conv3d"):
            return "generic/ieee"
        return kernel if asked == precision else "generic/bf16x3"  # on the way forward "mixed" is "float32"

    monkeypatch.setattr(kernels, "_choose", roughest)
    of_temporal, of_total = [], []
    for seed, expected in zip(SEEDS, exact, strict=True):
        assert expected.temporal.norm() > 0.1 * expected.total.norm(), "there is no motion to be wrong about"
        method = DiscriminativeDeepTaylor(network(seed), LOW, HIGH, precision=precision)
        actual = method.attribute(clip(seed, torch.float32), 1)
        error = (actual.temporal.double() - expected.temporal).norm()
        of_temporal.append((error / expected.temporal.norm()).item())
        of_total.append((error / expected.total.norm()).item())
    assert 1e-7 < statistics.median(of_temporal) <= ALLOWED[precision], of_temporal
    assert statistics.median(of_total) <= OF_TOTAL[precision], of_total
