"""r3d_18, mc3_18, r2plus1d_18, s3d and C3D, unchanged, with random weights and random batch-norm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from models import STOCK, between, stock_model
from torch import Tensor, nn

from captum_dtd import DiscriminativeDeepTaylor

LOW, HIGH = (-1.7, -1.75, -1.7), (2.6, 2.6, 2.4)
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

Stock = tuple[str, nn.Module, DiscriminativeDeepTaylor]


# In float64 these two take longer than all others: the residual networks tell what rounding hides.
SLOW = ("c3d-float64", "s3d-float64")
CASES = [
    pytest.param(case, marks=pytest.mark.slow if case in SLOW else ())
    for case in (f"{name}-{precision}" for name in STOCK for precision in PRECISIONS)
]


@pytest.fixture(scope="module", params=CASES)
def stock(request: pytest.FixtureRequest) -> Stock:
    """A model and one method that explains it in every test, as a user's would: what it traced, it keeps."""
    name, precision = request.param.split("-")
    model = stock_model(name, PRECISIONS[precision])
    return name, model, DiscriminativeDeepTaylor(model, LOW, HIGH)


def test_relevance_adds_up_to_the_logit_and_has_its_sign(stock: Stock) -> None:
    name, model, method = stock
    dtype = next(model.parameters()).dtype
    x = between(LOW, HIGH, (1, 3, *STOCK[name]), 1, dtype)
    with torch.no_grad():
        logits = model(x)[0]
    target = int(logits.abs().argmax())
    relevance, delta = method.method.attribute(x, target, return_convergence_delta=True)
    assert relevance.dtype == dtype
    assert relevance.shape == x.shape
    ratio = relevance.double().sum() / logits[target].double()
    assert abs(ratio.item() - 1) <= (1e-4 if dtype == torch.float32 else 1e-10)
    assert abs(delta.item()) <= (1e-4 if dtype == torch.float32 else 1e-10) * abs(logits[target].item())
    assert (relevance * logits[target].sign()).min() >= -1e-6 * relevance.abs().max()


def shortened(stock: Stock) -> tuple[nn.Module, DiscriminativeDeepTaylor, tuple[int, int, int]]:
    """The model for clips that take little time, and their size: s3d with another last pool, C3D with another fc6."""
    name, model, method = stock
    if name not in ("s3d", "c3d"):
        return model, method, STOCK[name]
    model = copy.deepcopy(model)
    if name == "s3d":
        model.avgpool = nn.AvgPool3d((1, 2, 2), stride=1)
    else:
        model.fc6 = nn.Linear(512 * 2 * 2, 4096).to(model.fc6.weight).eval()
    return model, DiscriminativeDeepTaylor(model, LOW, HIGH), (8, 64, 64) if name == "s3d" else (16, 32, 32)


def test_a_clip_without_motion_has_no_temporal_relevance(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the short cut exactly; and, computed from two frozen copies it is not told are the clip itself, to rounding."""
    model, method, (frames, height, width) = shortened(stock)
    dtype = next(model.parameters()).dtype
    x = between(LOW, HIGH, (1, 3, 1, height, width), 2, dtype).expand(-1, -1, frames, -1, -1).contiguous()
    with torch.no_grad():
        target = int(model(x)[0].abs().argmax())
    if dtype == torch.float32:
        spatial, temporal, total = method.attribute(x, target)
        assert torch.equal(spatial, total)
        assert (temporal == 0).all()
        assert (total != 0).any()
    kept = torch.arange(frames) // (frames // 2) * (frames // 2)
    asked: list[Tensor] = []
    monkeypatch.setattr("captum_dtd.discriminate.distinct_frames", lambda clip: asked.append(clip) or kept)
    spatial, temporal, total = method.attribute(x, target)
    assert len(asked) == 1
    assert spatial.shape == temporal.shape == total.shape == (1, *x.shape[2:])
    largest = total.abs().max().item()
    assert temporal.abs().max().item() <= (1e-5 if dtype == torch.float32 else 1e-12) * largest
