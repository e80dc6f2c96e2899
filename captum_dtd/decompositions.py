"""Operations that are written out in plainer ones, which have rules, when a model is recorded.

Recurrent layers become their steps in time, gate by gate: what a gate lets through goes to the signal, none to the gate (Arras
et al. 2017, *Explaining recurrent neural network predictions in sentiment analysis*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from captum_dtd.operations import aten

RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
"""Layers that go through a sequence step by step. Sequences of several lengths in one tensor have other operations."""


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
    rank = max(one.ndim, other.ndim)
    one, other = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (one, other))
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
    **dict.fromkeys((aten.lerp.Tensor, aten.lerp.Scalar), _lerp),
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.baddbmm.default: _baddbmm,
    aten.cosine_similarity.default: _cosine_similarity,
}
"""What export writes out, beside what it does by itself."""
