"""A procedural clip: an articulated figure performing one of the Weizmann actions, for demos and tests without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIONS", "moving_figure"]


class _Limb(NamedTuple):
    """A capsule from (x0, y0) to (x1, y1), in body heights: the origin on the ground below the figure, y upward."""

    x0: float
    y0: float
    x1: float
    y1: float
    radius: float


# The skeleton, in body heights
_HIP, _SHOULDER, _HEAD = 0.48, 0.79, 0.925
_ARM, _FOREARM, _THIGH, _SHIN = 0.17, 0.19, 0.23, 0.22


def _chain(x: float, y: float, first: float, second: float, lengths: tuple[float, float], radius: float) -> list[_Limb]:
    """Two capsules joined at elbow or knee; angles in radians from straight down, positive toward +x."""
    x1, y1 = x + lengths[0] * math.sin(first), y - lengths[0] * math.cos(first)
    x2, y2 = x1 + lengths[1] * math.sin(second), y1 - lengths[1] * math.cos(second)
    return [_Limb(x, y, x1, y1, radius), _Limb(x1, y1, x2, y2, 0.85 * radius)]


def _frontal(
    arms: tuple[float, float], forearms: tuple[float, float], legs: float = 0.06, x: float = 0.0, lift: float = 0.0
) -> list[_Limb]:
    """Facing the camera; angles of the left and right arm, and of both legs, away from the body."""
    # spread legs are shorter in height, so the body comes down: the feet stay on the ground
    hip = lift + (_THIGH + _SHIN) * math.cos(legs) + 0.03
    up = hip - _HIP
    parts = [
        _Limb(x, hip + 0.02, x, _SHOULDER - 0.05 + up, 0.085),
        _Limb(x - 0.06, _SHOULDER - 0.02 + up, x + 0.06, _SHOULDER - 0.02 + up, 0.05),
        _Limb(x, _SHOULDER + up, x, _HEAD + up, 0.035),
        _Limb(x, _HEAD + up, x, _HEAD + 0.02 + up, 0.062),
    ]
    for side, arm, forearm in ((-1, arms[0], forearms[0]), (1, arms[1], forearms[1])):
        parts += _chain(x + side * 0.09, _SHOULDER + up, side * arm, side * forearm, (_ARM, _FOREARM), 0.036)
        parts += _chain(x + side * 0.045, hip, side * legs, side * legs, (_THIGH, _SHIN), 0.048)
    return parts


def _profile(
    x: float,
    arms: tuple[float, float],
    legs: tuple[float, float],
    shins: tuple[float, float],
    lean: float = 0.0,
    elbow: float = 0.25,
    lift: float = 0.0,
) -> list[_Limb]:
    """Seen from the side, walking toward +x; angles forward from straight down, the body leaning forward by lean."""
    reach = max(_THIGH * math.cos(thigh) + _SHIN * math.cos(shin) for thigh, shin in zip(legs, shins, strict=True))
    hip = lift + reach + 0.03

    def along(height: float) -> tuple[float, float]:
        return x + (height - _HIP) * math.sin(lean), hip + (height - _HIP) * math.cos(lean)

    shoulder, head = along(_SHOULDER - 0.02), along(_HEAD + 0.01)
    parts = [
        _Limb(x, hip + 0.01, *shoulder, 0.075),
        _Limb(*shoulder, *head, 0.035),
        _Limb(*head, *head, 0.066),
    ]
    for arm, thigh, shin in zip(arms, legs, shins, strict=True):
        parts += _chain(*shoulder, arm, arm + elbow, (_ARM, _FOREARM), 0.034)
        parts += _chain(x, hip, thigh, shin, (_THIGH, _SHIN), 0.05)
    return parts


def _jack(t: float) -> list[_Limb]:
    swing = 0.5 - 0.5 * math.cos(math.tau * t / 26)  # 0: arms down, feet together; 1: arms up, legs apart
    arm = 0.2 + 2.7 * swing
    return _frontal((arm, arm), (arm, arm), legs=0.05 + 0.3 * swing, lift=0.05 * math.sin(math.tau * t / 26) ** 2)


def _wave1(t: float) -> list[_Limb]:
    arm = 2.2 - 0.6 * math.cos(math.tau * t / 26)
    return _frontal((arm, 0.12), (arm + 0.25, 0.1))


def _wave2(t: float) -> list[_Limb]:
    arm = 2.25 - 0.7 * math.cos(math.tau * t / 28)
    return _frontal((arm, arm), (arm + 0.1, arm + 0.1))


def _pjump(t: float) -> list[_Limb]:
    return _frontal((0.12, 0.12), (0.08, 0.08), lift=0.16 * abs(math.sin(math.pi * t / 16)))


def _walk(t: float) -> list[_Limb]:
    phase = math.tau * t / 26
    legs = (0.45 * math.sin(phase), -0.45 * math.sin(phase))
    # a knee bends while its leg swings forward
    shins = (legs[0] - 0.7 * max(0.0, math.cos(phase)), legs[1] - 0.7 * max(0.0, -math.cos(phase)))
    return _profile(0.033 * (t - 16), (0.8 * legs[1], 0.8 * legs[0]), legs, shins, lean=0.05)


def _run(t: float) -> list[_Limb]:
    phase = math.tau * t / 18
    legs = (0.7 * math.sin(phase), -0.7 * math.sin(phase))
    shins = (legs[0] - 1.3 * max(0.1, math.cos(phase)), legs[1] - 1.3 * max(0.1, -math.cos(phase)))
    lift = 0.05 * abs(math.sin(phase))
    return _profile(0.075 * (t - 16), (1.1 * legs[1], 1.1 * legs[0]), legs, shins, lean=0.18, elbow=1.2, lift=lift)


def _bend(t: float) -> list[_Limb]:
    down = 0.5 - 0.5 * math.cos(math.tau * t / 64)
    arm = 0.1 + 0.5 * down
    return _profile(0.12 * down, (arm, arm), (-0.1 * down, 0.0), (-0.1 * down, 0.0), lean=2.1 * down, elbow=0.1)


ACTIONS: dict[str, Callable[[float], list[_Limb]]] = {
    "bend": _bend,
    "jack": _jack,
    "pjump": _pjump,
    "run": _run,
    "walk": _walk,
    "wave1": _wave1,
    "wave2": _wave2,
}


def _draw(limbs: list[_Limb], size: tuple[int, int], figure: float) -> Tensor:
    """Coverage of each pixel, 0 to 1, (H, W): the union of the limbs with edges one pixel soft."""
    rows = torch.arange(size[0], dtype=torch.float64).view(-1, 1) + 0.5
    columns = torch.arange(size[1], dtype=torch.float64).view(1, -1) + 0.5
    x, y = (columns - size[1] / 2) / figure, (0.78 * size[0] - rows) / figure
    distance = torch.full(size, math.inf, dtype=torch.float64)
    for x0, y0, x1, y1, radius in limbs:
        dx, dy = x1 - x0, y1 - y0
        along = ((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-12)
        along = along.clamp(0, 1)
        gap = torch.hypot(x - x0 - along * dx, y - y0 - along * dy) - radius
        distance = torch.minimum(distance, gap)
    return (0.5 - distance * figure).clamp(0, 1)


def moving_figure(action: str = "jack", frames: int = 32, size: tuple[int, int] = (144, 180)) -> Tensor:
    """A white figure on black that performs an action, as in the silhouettes of the Weizmann data set; always the same.

    The figure is half as tall as the frame. At 25 frames per second it moves about as fast as a person.

    Args:
        action: one of :data:`ACTIONS`, by its Weizmann name ("jack" is a jumping jack, "pjump" a jump on the spot).
        frames: number of frames T, at least 1.
        size: (height, width) in pixels, each at least 16.

    Returns:
        uint8 tensor (T, H, W, 3), 0 black to 255 white, edges anti-aliased.

    Raises:
        ValueError: an unknown action, no frames, or a size too small for a figure.

    Example:
        >>> moving_figure("walk", frames=48).shape
        torch.Size([48, 144, 180, 3])
    """
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    if len(size) != 2 or min(size) < 16:
        raise ValueError(f"size must be (height, width) of at least 16 pixels each, not {tuple(size)}")
    drawn = [_draw(ACTIONS[action](t), (size[0], size[1]), 0.5 * size[0]) for t in range(frames)]
    grey = (torch.stack(drawn) * 255).round().to(torch.uint8)
    return grey[..., None].expand(-1, -1, -1, 3).contiguous()
