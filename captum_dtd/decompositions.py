"""Operations that are written out in plainer ones, which have rules, when a model is recorded.

Recurrent layers become their steps in time, gate by gate: what a gate lets through goes to the signal, none to the gate (Arras
et al. 2017, *Explaining recurrent neural network predictions in sentiment analysis*). Only where a gate scales a state that is
constant, as the first one is, there is no other signal than the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions

from captum_dtd.operations import aten

RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
"""Layers that go through a sequence step by step. Sequences of several lengths in one tensor have other operations."""


def _sums(
    x: Tensor, state: Tensor, of_x: Tensor, of_state: Tensor, bias: Tensor | None, bias_of_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return F.linear(x, of_x, bias), F.linear(state, of_state, bias_of_state)


def _lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    hidden, cell = state
    of_x, of_hidden = _sums(x, hidden, *weights)
    let_in, kept, candidate, shown = (of_hidden + of_x).chunk(4, -1)
    cell = kept.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def _gru_cell(x: Tensor, hidden: Tensor, *weights: Any) -> Tensor:
    of_x, of_hidden = (sums.chunk(3, -1) for sums in _sums(x, hidden, *weights))
    reset, kept = ((b + a).sigmoid() for a, b in zip(of_x[:2], of_hidden[:2], strict=True))
    candidate = (of_x[2] + of_hidden[2] * reset).tanh()
    return kept * hidden + (1 - kept) * candidate


def _rnn_tanh_cell(x: Tensor, hidden: Tensor, *weights: Any) -> Tensor:
    of_x, of_hidden = _sums(x, hidden, *weights)
    return (of_hidden + of_x).tanh()


def _rnn_relu_cell(x: Tensor, hidden: Tensor, *weights: Any) -> Tensor:
    of_x, of_hidden = _sums(x, hidden, *weights)
    return (of_hidden + of_x).relu()


def _lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return start * (1 - weight) + end * weight


def _addcmul(x: Tensor, one: Tensor, other: Tensor, *, value: float = 1) -> Tensor:
    return x + (one * other if value == 1 else one * other * value)


def _addcdiv(x: Tensor, one: Tensor, other: Tensor, *, value: float = 1) -> Tensor:
    return x + (one / other if value == 1 else one / other * value)


def _baddbmm(x: Tensor, one: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = one @ other if alpha == 1 else (one @ other) * alpha
    if beta == 0:  # then it is not read
        return product
    return product + (x if beta == 1 else x * beta)


def _cosine_similarity(one: Tensor, other: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """As a matrix product, so that a constant factor is what weights are to a linear layer."""
    rank, dtype = max(one.ndim, other.ndim), torch.result_type(one, other)
    one, other = (x.to(dtype).reshape((1,) * (rank - x.ndim) + x.shape) for x in (one, other))
    size = max(one.shape[dim], other.shape[dim])
    sizes = [-1] * rank
    sizes[dim] = size
    first, second = (
        (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)).movedim(dim, -1)
        for x in (one.expand(sizes), other.expand(sizes))
    )
    products: Tensor = first.unsqueeze(-2) @ second.unsqueeze(-1)
    return products.squeeze(-1).squeeze(-1)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions([*RECURRENT]),
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _gru_cell,
    aten.rnn_tanh_cell.default: _rnn_tanh_cell,
    aten.rnn_relu_cell.default: _rnn_relu_cell,
    **dict.fromkeys((aten.lerp.Tensor, aten.lerp.Scalar), _lerp),
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.baddbmm.default: _baddbmm,
    aten.cosine_similarity.default: _cosine_similarity,
}
"""What export writes out, beside what it does by itself."""
