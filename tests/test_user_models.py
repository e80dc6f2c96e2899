"""Models as people write them: the explained score is the model's, and all of it arrives at the input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import captum_dtd.attribution
from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, UnsupportedOperationError

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


def test_an_ambiguous_product_says_why() -> None:
    m = model(lambda m, x: m.head(F.relu(m.block(m.stem(x) * m.stem(x)))))
    with pytest.raises(UnsupportedOperationError, match="comes from a sigmoid"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 1)


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
