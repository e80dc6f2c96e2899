"""r3d_18, mc3_18, r2plus1d_18, s3d and C3D, unchanged, with random weights and random batch-norm statistics."""

from __future__ import annotations

import pytest
import torch
from models import STOCK, between, stock_model
from torch import Tensor, nn

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor

LOW, HIGH = (-1.7, -1.75, -1.7), (2.6, 2.6, 2.4)
PRECISIONS = [torch.float32, torch.float64]


def clip(name: str, dtype: torch.dtype) -> Tensor:
    return between(LOW, HIGH, (1, 3, *STOCK[name]), 1, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("name", STOCK)
def test_relevance_adds_up_to_the_logit_and_has_its_sign(name: str, dtype: torch.dtype) -> None:
    model, x = stock_model(name, dtype), clip(name, dtype)
    with torch.no_grad():
        logits = model(x)[0]
    target = int(logits.abs().argmax())
    relevance, delta = DeepTaylor(model, LOW, HIGH).attribute(x, target, return_convergence_delta=True)
    assert relevance.dtype == dtype
    assert relevance.shape == x.shape
    ratio = relevance.double().sum() / logits[target].double()
    assert abs(ratio.item() - 1) <= (1e-4 if dtype == torch.float32 else 1e-10)
    assert abs(delta.item()) <= (1e-4 if dtype == torch.float32 else 1e-10) * abs(logits[target].item())
    assert (relevance * logits[target].sign()).min() >= -1e-6 * relevance.abs().max()


def small(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model and a clip of one frame repeated; s3d with a last pool that lets the clip be small."""
    model, (frames, height, width) = stock_model(name, dtype), STOCK[name]
    if name == "s3d":
        model.avgpool = nn.AvgPool3d((1, 2, 2), stride=1)
        frames, height, width = 8, 64, 64
    frame = between(LOW, HIGH, (1, 3, 1, height, width), 2, dtype)
    return model, frame.expand(-1, -1, frames, -1, -1).contiguous()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("name", STOCK)
def test_a_clip_without_motion_has_no_temporal_relevance(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the short cut exactly; and, computed from frozen copies it is not told are the clip itself, to rounding.

    Of C3D, the largest, two of the sixteen equal copies are computed, of the others all.
    """
    model, x = small(name, dtype)
    method = DiscriminativeDeepTaylor(model, LOW, HIGH)
    with torch.no_grad():
        target = int(model(x)[0].abs().argmax())
    frames = x.shape[2]
    if dtype == torch.float32:
        spatial, temporal, total = method.attribute(x, target)
        assert torch.equal(spatial, total)
        assert (temporal == 0).all()
        assert (total != 0).any()
    kept = torch.arange(frames) // 8 * 8 if name == "c3d" else torch.arange(frames)
    asked: list[Tensor] = []
    monkeypatch.setattr("captum_dtd.discriminate.distinct_frames", lambda clip: asked.append(clip) or kept)
    spatial, temporal, total = method.attribute(x, target)
    assert len(asked) == 1
    assert spatial.shape == temporal.shape == total.shape == (1, *x.shape[2:])
    largest = total.abs().max().item()
    assert temporal.abs().max().item() <= (1e-5 if dtype == torch.float32 else 1e-12) * largest
