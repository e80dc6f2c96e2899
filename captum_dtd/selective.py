"""Which part of one relevance map is due to motion: an answer that needs no frozen clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SelectiveRelevance:
    """The part of a relevance map that changes fast in time (Hiley et al. 2020, arXiv 2003.14285).

    Keeps R where ``d > sigma std(d)`` and is zero elsewhere, with ``d = |Sobel_t(R)|``: the 3x3x3 Sobel derivative along
    time (``[-1, 0, 1]`` in time, ``[1, 2, 1]`` in height and in width, zero padding) and std the standard deviation of d over
    the whole clip (population form).

    Args:
        sigma: how many standard deviations the derivative must exceed; zero or positive.

    Raises:
        ValueError: if ``sigma`` is negative.

    Example:
        >>> import torch
        >>> relevance = torch.zeros(1, 8, 16, 16)
        >>> relevance[0, 3, 4:8, 4:8] = 1.0
        >>> SelectiveRelevance(sigma=1.0)(relevance).shape
        torch.Size([1, 8, 16, 16])
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise ValueError(f"sigma must be zero or positive, got {self.sigma}")

    def __call__(self, relevance: Tensor) -> Tensor:
        """The selected relevance.

        Args:
            relevance: a map (N, T, H, W) by any method, summed over colour channels.

        Returns:
            A map of the same shape: R where its change in time stands out, zero elsewhere.

        Raises:
            ValueError: if the map is not (N, T, H, W), or has NaN or infinite values.
        """
        if relevance.ndim != 4:
            raise ValueError(
                f"relevance must be a map (N, T, H, W), got shape {tuple(relevance.shape)}; sum over channels with .sum(1)"
            )
        if not relevance.isfinite().all():
            raise ValueError(
                "relevance has NaN or infinite values, of which no change in time can be told; look for their origin"
            )
        padded = F.pad(relevance.to(torch.promote_types(relevance.dtype, torch.float32)), (1, 1, 1, 1, 1, 1))
        # along time first: between equal frames that is exactly 0, which sums of their pixels need not be
        change = padded[:, 2:] - padded[:, :-2]
        for axis in (2, 3):
            before, here, after = (change.narrow(axis, place, change.shape[axis] - 2) for place in range(3))
            change = before + 2 * here + after
        change = change.abs()
        spread = change.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
        return torch.where(change > self.sigma * spread, relevance, torch.zeros_like(relevance))
