"""Recurrent layers on frames' features: what they are explained as, step by step and gate by gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import between
from torch import Tensor, nn
from torch.nn import functional as F

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, UnsupportedOperationError

LOW, HIGH = -2.0, 2.0
FEATURES, HIDDEN, CLASSES = 6, 8, 3

Parameters = dict[str, Tensor]
Step = Callable[[Parameters, str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Recurrent(nn.Module):
    """Frames' features by a 2D convolution, and logits of the last step of a recurrent layer, or of all steps' mean."""

    def __init__(self, kind: type[nn.Module], by_hand: Step | None = None, every: bool = False, **options: Any) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, FEATURES, 3, padding=1)
        self.layer: Any = kind(FEATURES, HIDDEN, batch_first=True, **options)
        self.options, self.by_hand, self.every = options, by_hand, every
        self.logits = nn.Linear(options.get("proj_size", HIDDEN) * (1 + options.get("bidirectional", False)), CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        n, c, t, h, w = clips.shape
        pictures = clips.transpose(1, 2).reshape(n * t, c, h, w)
        sequence = F.relu(self.features(pictures)).mean((2, 3)).view(n, t, FEATURES)
        steps = self.layer(sequence)[0] if self.by_hand is None else self._by_hand(sequence)
        return self.logits(steps.mean(1) if self.every else steps[:, -1])  # type: ignore[no-any-return]

    def _by_hand(self, sequence: Tensor) -> Tensor:
        assert self.by_hand is not None
        named = dict(self.layer.named_parameters())
        for number in range(self.options.get("num_layers", 1)):
            ways = []
            for way in ("", "_reverse")[: 1 + self.options.get("bidirectional", False)]:
                hidden = cell = sequence.new_zeros(len(sequence), HIDDEN)
                steps = []
                frames = sequence.unbind(1)
                for frame in reversed(frames) if way else frames:
                    hidden, cell = self.by_hand(named, f"_l{number}{way}", frame, hidden, cell)
                    steps.append(hidden)
                ways.append(torch.stack(steps[::-1] if way else steps, 1))
            sequence = torch.cat(ways, 2)
        return sequence


def lstm(p: Parameters, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sums = F.linear(x, p["weight_ih" + name], p["bias_ih" + name])
    sums = F.linear(h, p["weight_hh" + name], p["bias_hh" + name]) + sums
    i, f, g, o = sums.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(p: Parameters, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    of_x = F.linear(x, p["weight_ih" + name], p["bias_ih" + name]).chunk(3, 1)
    of_h = F.linear(h, p["weight_hh" + name], p["bias_hh" + name]).chunk(3, 1)
    r, z = ((b + a).sigmoid() for a, b in zip(of_x[:2], of_h[:2], strict=True))
    n = (of_x[2] + r * of_h[2]).tanh()
    return z * h + (1 - z) * n, c


def rnn(p: Parameters, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sums = F.linear(h, p["weight_hh" + name], p["bias_hh" + name])
    return (sums + F.linear(x, p["weight_ih" + name], p["bias_ih" + name])).tanh(), c


def relu_rnn(p: Parameters, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sums = F.linear(h, p["weight_hh" + name], p["bias_hh" + name])
    return (sums + F.linear(x, p["weight_ih" + name], p["bias_ih" + name])).relu(), c


def model(kind: type[nn.Module], seed: int = 3, **options: Any) -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Recurrent(kind, **options).double().eval()


def clips(frames: int = 3) -> Tensor:
    return between((LOW,) * 3, (HIGH,) * 3, (2, 3, frames, 6, 6), 1, torch.float64)


CASES: dict[str, tuple[type[nn.Module], Step, dict[str, Any]]] = {
    "LSTM": (nn.LSTM, lstm, {}),
    "LSTM, two layers, both ways": (nn.LSTM, lstm, {"num_layers": 2, "bidirectional": True, "every": True}),
    "GRU": (nn.GRU, gru, {}),
    "GRU, two layers": (nn.GRU, gru, {"num_layers": 2, "every": True}),
    "RNN": (nn.RNN, rnn, {}),
    "RNN, both ways": (nn.RNN, rnn, {"bidirectional": True}),
    "RNN of ReLUs": (nn.RNN, relu_rnn, {"nonlinearity": "relu", "every": True}),
}


@pytest.mark.filterwarnings("ignore:more than half", "ignore:the relevance of the input is larger")
@pytest.mark.parametrize("composite", ["dtd", "epsilon-gamma-box"])
@pytest.mark.parametrize("name", CASES)
def test_a_recurrent_layer_is_explained_as_its_steps_written_by_hand(name: str, composite: str) -> None:
    kind, step, options = CASES[name]
    layer, by_hand, x = model(kind, **options), model(kind, by_hand=step, **options), clips()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(x))
    methods = [DeepTaylor(m, LOW, HIGH, composite=composite) for m in (layer, by_hand)]
    found, wanted = (method.attribute_targets(x, list(range(CLASSES))) for method in methods)
    assert any(bool((each != 0).any()) for each in wanted)
    torch.testing.assert_close(found, wanted)


def cells(kind: type[nn.Module], **options: Any) -> Step:
    """The same by torch's own cell, whose parameters are the layer's."""

    def step(p: Parameters, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        weights = (p[part + name] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        if kind is nn.LSTMCell:
            return torch.lstm_cell(x, (h, c), *weights)  # type: ignore[return-value]
        cell = (
            torch.gru_cell if kind is nn.GRUCell else getattr(torch, f"rnn_{options.get('nonlinearity', 'tanh')}_cell")
        )
        return cell(x, h, *weights), c

    return step


@pytest.mark.filterwarnings("ignore:more than half", "ignore:the relevance of the input is larger")
@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("LSTM", cells(nn.LSTMCell)),
        ("GRU", cells(nn.GRUCell)),
        ("RNN", cells(nn.RNNCell)),
        ("RNN of ReLUs", cells(nn.RNNCell, nonlinearity="relu")),
    ],
)
def test_cells_are_steps(name: str, cell: Step) -> None:
    kind, step, options = CASES[name]
    methods = [DeepTaylor(model(kind, by_hand=way, **options), LOW, HIGH) for way in (cell, step)]
    found, wanted = (method.attribute_targets(clips(), list(range(CLASSES))) for method in methods)
    assert any(bool((each != 0).any()) for each in wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:more than half")
def test_frozen_clips_pass_recurrent_layers() -> None:
    x = clips()
    still = x[:, :, 2:3].expand_as(x)
    for kind, step, options in (CASES["LSTM"], CASES["GRU"]):
        layer = DiscriminativeDeepTaylor(model(kind, **options), LOW, HIGH)
        by_hand = DiscriminativeDeepTaylor(model(kind, by_hand=step, **options), LOW, HIGH)
        for found, wanted in zip(layer.attribute(x, 1), by_hand.attribute(x, 1), strict=True):
            torch.testing.assert_close(found, wanted)
        assert not layer.attribute(still, 1).temporal.any()
        whole = DeepTaylor(layer.method.model, LOW, HIGH).attribute(still, 1)
        torch.testing.assert_close(layer.attribute(still, 1).spatial, whole.sum(1))


def positive_shares(inputs: Tensor, weights: Tensor, relevance: Tensor) -> Tensor:
    """z+ of a matrix: each input's positive contributions to an output share its relevance."""
    contributions = (inputs[:, None] * weights).clamp(min=0)
    sums = contributions.sum(2, keepdim=True)
    return (contributions / sums.where(sums > 0, torch.inf) * relevance[:, :, None]).sum(1)


@pytest.mark.filterwarnings("ignore:more than half")
def test_of_an_lstm_gates_get_nothing_and_the_cell_carries_relevance_back() -> None:
    """Written out for one layer: what arrives at a step goes to the cell, and there to what was kept and what was let in."""
    m, x = model(nn.LSTM, seed=5), clips()
    p = {key: value.detach() for key, value in m.layer.named_parameters()}
    n, t = x.shape[0], x.shape[2]
    with torch.no_grad():
        pictures = x.transpose(1, 2).flatten(0, 1)
        sequence = F.relu(m.features(pictures)).mean((2, 3)).view(n, t, FEATURES)
        hidden = cell = torch.zeros(n, HIDDEN, dtype=x.dtype)
        kept, let_in, of_x, of_h, before = [], [], [], [], []
        for frame in sequence.unbind(1):
            before.append(hidden)
            own = F.linear(frame, p["weight_ih_l0"], p["bias_ih_l0"])
            past = F.linear(hidden, p["weight_hh_l0"], p["bias_hh_l0"])
            i, f, g, o = (own + past).chunk(4, 1)
            kept.append(f.sigmoid() * cell)
            let_in.append(i.sigmoid() * g.tanh())
            of_x.append(own.chunk(4, 1)[2])
            of_h.append(past.chunk(4, 1)[2])
            cell = kept[-1] + let_in[-1]
            hidden = o.sigmoid() * cell.tanh()
        score = m.logits(hidden)[:, 1]
        in_hidden = positive_shares(hidden, m.logits.weight[1:2], score[:, None])
        in_cell = torch.zeros_like(in_hidden)
        in_sequence = torch.zeros_like(sequence)
        ih, hh = (p[name].chunk(4)[2] for name in ("weight_ih_l0", "weight_hh_l0"))

        def two(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
            sums = a.clamp(min=0) + b.clamp(min=0)
            shares = relevance / sums.where(sums > 0, torch.inf)
            return a.clamp(min=0) * shares, b.clamp(min=0) * shares

        for step in reversed(range(t)):
            arriving = in_hidden + in_cell
            in_cell, in_candidate = two(kept[step], let_in[step], arriving)
            # At the first step nothing varies before it: what is added then is as good as a bias, which gets no share.
            own, past = two(of_x[step], of_h[step], in_candidate) if step else (in_candidate, torch.zeros(()))
            in_sequence[:, step] = positive_shares(sequence[:, step], ih, own)
            in_hidden = positive_shares(before[step], hh, past) if step else in_hidden
    # What the method gives the sequence's features: z-beta and the mean before them keep the sum of every frame.
    method = DeepTaylor(m, LOW, HIGH)
    found = method.attribute(x, 1)
    assert bool((in_sequence.sum(2) != 0).all())
    torch.testing.assert_close(found.sum((1, 3, 4)), in_sequence.sum(2))


@pytest.mark.filterwarnings("ignore:more than half")
def test_an_lstms_projection_is_a_linear_layer_of_its_steps() -> None:
    layer, x = model(nn.LSTM, proj_size=2), clips()
    with torch.no_grad():
        score = layer(x)[:, 0]
    method = DeepTaylor(layer, LOW, HIGH, composite="epsilon-gamma-box")
    relevance, delta = method.attribute(x, 0, return_convergence_delta=True)
    torch.testing.assert_close(relevance.sum((1, 2, 3, 4)) + delta, score)
    assert bool((relevance != 0).any())


def test_recurrent_dropout_in_training_is_refused() -> None:
    m = model(nn.LSTM, num_layers=2, dropout=0.5)
    m.layer.train()
    with pytest.raises(UnsupportedOperationError, match="dropout is active"):
        DeepTaylor(m, LOW, HIGH).attribute(clips(), 0)
