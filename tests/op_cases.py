# ruff: noqa: N803, N806 - matrices and relevance are named as in the formulas
"""What the fused operations are tested on: shapes chosen by corner, operands, and the oracle's answer with its tolerance.

Every shape meets every kernel with two kinds of operands. *Short* ones have so few bits, and a quotient ``s = R / z`` of so
few, that every arithmetic computes with them exactly: then only the order of sums may show, and one wrong tap does. *Full*
ones have all bits of their type, and every arithmetic is held to its own roundoff.

Nothing here is imported from the package.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from oracle import matrix, neg, pos, share, tuples
from torch import Tensor

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Conv:
    """One convolution: the size of its input (N, C, T, H, W), its output channels, and its geometry."""

    name: str
    x: tuple[int, ...]
    out: int
    kernel: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    frozen: bool = False  # all examples and frames of x are equal

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.out, self.x[1] // self.groups, *tuples(self.kernel, 3))

    @property
    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        padding = self.padding
        if isinstance(padding, tuple) and len(padding) == 6:
            x, padding = F.pad(x, [padding[i] for i in (4, 5, 2, 3, 0, 1)]), 0
        return F.conv3d(x, weight, None, self.stride, padding, self.dilation, self.groups)

    @property
    def spread(self) -> Conv:
        """The convolution over what `read` makes of x."""
        return self

    def read(self, x: Tensor) -> Tensor:
        """What the windows read, and the oracle knows inputs by."""
        return x

    def collect(self, shared: Tensor) -> Tensor:
        """The relevance of x, given that of what was read."""
        return shared


@dataclass(frozen=True)
class Frozen(Conv):
    """A convolution of a frozen clip's layer; stride, padding and dilation are those of H and W.

    The oracle reads every output's window as frames of its own, laid end to end.
    """

    reads: TimeTable = ()
    gives: TimeTable = ()
    times: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Of the relevance rules; forward there is nothing to give."""
        tables = {"reads": self.reads, "gives": self.gives, "times": self.times}
        return (
            tables
            | {name: self._of_space(name) for name in ("stride", "padding", "dilation")}
            | {"groups": self.groups}
        )

    def _of_space(self, name: str) -> Any:
        value = getattr(self, name)
        return value[1:] if isinstance(value, tuple) else value

    @property
    def spread(self) -> Conv:
        n, c, _, h, w = self.x
        taps, outputs = self.weight[2], len(self.reads[0])
        stride, padding, dilation = (self._of_space(name) for name in ("stride", "padding", "dilation"))
        if padding == "same":
            around = [d * (k - 1) for d, k in zip(tuples(dilation, 2), self.weight[3:], strict=True)]
            padding = [side for total in around for side in (total // 2, total - total // 2)]
        else:
            padding = [side for side in tuples(padding, 2) for _ in range(2)]
        stride, padding, dilation = (taps, *tuples(stride, 2)), (0, 0, *padding), (1, *tuples(dilation, 2))
        return Conv(
            self.name, (n, c, outputs * taps, h, w), self.out, self.kernel, stride, padding, dilation, self.groups
        )

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.spread(self.read(x), weight)

    def read(self, x: Tensor) -> Tensor:
        return read_by_table(x, self.reads, 0.0)

    def collect(self, shared: Tensor) -> Tensor:
        return collected_by_tables(shared, self.reads, self.gives, self.times)


TimeTable: TypeAlias = tuple[tuple[tuple[int, ...], ...], ...]


def frames_of(table: TimeTable, examples: int) -> list[list[int]]:
    """For every example and frame of a window."""
    frames = [[time for taps in row for time in taps] for row in table]
    return frames * (examples if len(table) == 1 else 1)


def read_by_table(x: Tensor, table: TimeTable, fill: float) -> Tensor:
    """The frames that windows along T read, end to end."""
    rows = frames_of(table, len(x))
    frames = x.new_full((*x.shape[:2], sum(map(len, table[0])), *x.shape[3:]), fill)
    for n, row in enumerate(rows):
        for frame, time in enumerate(row):
            if time >= 0:
                frames[n, :, frame] = x[n, :, time]
    return frames


def collected_by_tables(shared: Tensor, reads: TimeTable, gives: TimeTable, times: int) -> Tensor:
    """What the frames of windows give to every time."""
    n, c, _, *size = shared.shape
    found = shared.new_zeros(n, c, times, *size)
    for example, (read, given) in enumerate(zip(frames_of(reads, n), frames_of(gives, n), strict=True)):
        for frame, (source, to) in enumerate(zip(read, given, strict=True)):
            if source >= 0 and to >= 0:
                found[example, :, to] += shared[example, :, frame]
    return found


CONVS = (
    Conv("3x3x3", (2, 3, 3, 5, 6), 4, padding=1),
    Conv("unpadded", (1, 2, 4, 5, 5), 3),
    Conv("one example, one channel to one", (1, 1, 3, 4, 5), 1, padding=1),
    Conv("empty batch", (0, 3, 2, 4, 4), 4, padding=1),
    Conv("batch of 3", (3, 2, 2, 4, 4), 5, padding=1),
    Conv("17 channels to 33", (1, 17, 2, 3, 4), 33, padding=1),
    Conv("33 channels to 17", (2, 33, 2, 3, 3), 17, (1, 3, 3), padding=(0, 1, 1)),
    Conv("64 channels to 49", (1, 64, 1, 2, 3), 49, padding=1),
    Conv("48 channels to 80, stride 2", (1, 48, 1, 4, 4), 80, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    Conv("stride 2", (2, 4, 4, 6, 7), 5, stride=2, padding=1),
    Conv("stride 1x2x3", (1, 3, 3, 6, 9), 4, (2, 3, 4), (1, 2, 3), (1, 0, 2)),
    Conv("stride over kernel", (1, 3, 5, 7, 8), 4, (2, 2, 1), (3, 4, 2)),
    Conv("stride over kernel, padded", (2, 2, 4, 7, 7), 3, (1, 2, 1), (2, 3, 3), (0, 1, 0)),
    Conv("shortcut", (2, 5, 4, 6, 5), 8, 1, 2),
    Conv("stride over input", (1, 2, 2, 3, 3), 3, 2, 5, 1),
    Conv("same, even kernel", (2, 3, 4, 5, 6), 4, (2, 4, 2), padding="same"),
    Conv("same, even kernel, dilated", (1, 2, 5, 6, 7), 3, (2, 2, 4), padding="same", dilation=(3, 1, 2)),
    Conv("six paddings", (1, 3, 3, 5, 5), 4, padding=(2, 0, 0, 1, 1, 3), stride=(1, 2, 1)),
    Conv("padding over kernel", (1, 2, 2, 3, 3), 3, (2, 3, 2), padding=(3, 4, 3)),
    Conv("padding over kernel, stride 2", (1, 2, 3, 3, 3), 3, 2, 2, (3, 4, 3)),
    Conv("dilation", (2, 3, 5, 6, 6), 4, padding=2, dilation=2),
    Conv("dilation 2x3x2, stride 2x2x3", (1, 3, 6, 8, 9), 4, 3, (2, 2, 3), 2, (2, 3, 2)),
    Conv("dilation 4x2x3, stride 2x4x6", (1, 2, 9, 7, 13), 3, (3, 3, 4), (2, 4, 6), 1, (4, 2, 3)),
    Conv("along T alone", (2, 5, 9, 1, 1), 6, (3, 1, 1), (2, 1, 1), (2, 0, 0), (2, 1, 1)),
    Conv("along T and H", (2, 5, 3, 7, 1), 4, (2, 3, 1), (1, 2, 1), (0, 1, 0)),
    Conv("depthwise, along H alone", (2, 18, 1, 23, 1), 18, (1, 3, 1), 1, (0, 2, 0), groups=18),
    Conv("dilated beyond the input", (1, 5, 2, 4, 4), 4, 3, padding=5, dilation=5),
    Conv("dilated beyond the input on one side", (1, 5, 2, 4, 3), 4, (2, 3, 3), (1, 1, 2), (2, 4, 0), (3, 4, 1)),
    Conv("2 groups", (2, 6, 3, 4, 4), 4, padding=1, groups=2),
    Conv("2 groups of 17, stride 2", (1, 34, 2, 4, 3), 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), groups=2),
    Conv("2 groups of 32", (1, 64, 1, 3, 3), 64, (1, 2, 2), groups=2),
    Conv("depthwise", (2, 5, 3, 5, 5), 5, padding=1, groups=5),
    Conv("depthwise, two each", (1, 3, 3, 4, 5), 6, (3, 3, 2), (1, 2, 1), 1, groups=3),
    Conv("depthwise, 32 channels", (1, 32, 2, 3, 3), 32, (1, 3, 3), padding=(0, 1, 1), groups=32),
    # Kernels take neighbouring groups together, and the last ones may be fewer.
    Conv("depthwise, 35 channels, stride 2", (2, 35, 2, 4, 5), 35, 2, 2, 1, groups=35),
    Conv("depthwise, 19 channels, dilated", (1, 19, 3, 5, 4), 19, (2, 3, 2), 1, 2, (1, 2, 3), groups=19),
    Conv("depthwise in time", (1, 18, 4, 3, 3), 18, (3, 1, 1), padding=(1, 0, 0), groups=18),
    Conv("18 groups, one to three", (1, 18, 2, 3, 3), 54, (1, 2, 2), padding="same", groups=18),
    Conv("9 groups, three to one", (2, 27, 1, 4, 3), 9, (1, 3, 3), (1, 2, 1), (0, 1, 1), groups=9),
    Conv("9 groups of 2", (1, 18, 2, 3, 4), 18, padding=1, groups=9),
    Conv("7 groups, two to three", (1, 14, 2, 3, 3), 21, (1, 3, 2), padding=(0, 1, 1), groups=7),
    Conv("5 groups, five to two", (1, 25, 2, 3, 3), 10, (2, 2, 2), groups=5),
    Conv("3 groups of 8", (1, 24, 2, 3, 3), 24, (1, 3, 3), padding=(0, 1, 1), groups=3),
    Conv("2 groups, 40 to 2", (1, 80, 1, 2, 3), 4, (1, 2, 2), groups=2),
    Conv("one frame", (2, 3, 1, 7, 7), 4, (1, 3, 3), padding=(0, 1, 1)),
    Conv("one frame, 3 deep", (1, 3, 1, 5, 5), 4, padding=1),
    Conv("frozen clip", (2, 3, 4, 5, 5), 4, padding=1, frozen=True),
    Conv("1x1x1", (2, 17, 2, 3, 3), 33, 1),
    Conv("temporal", (1, 7, 6, 3, 3), 5, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    Conv("linear", (1, 37, 1, 1, 1), 21, 1),
    Conv("linear, batch of 20", (20, 130, 1, 1, 1), 50, 1),
    Conv("linear, batch of 7", (7, 130, 1, 1, 1), 50, 1),
    Conv("linear, one class", (3, 16, 1, 1, 1), 1, 1),
    # So deep that kernels cut the depth, and the taps, into several parts.
    Conv("130 deep", (1, 130, 2, 2, 2), 9, padding=1),
    Conv("70 deep, 5x5", (1, 70, 1, 3, 3), 9, (1, 5, 5), padding=(0, 2, 2)),
    Conv("kernel as large as the input", (2, 4, 2, 3, 3), 7, (2, 3, 3)),
    Conv("7 wide", (1, 3, 2, 3, 7), 8, padding=1),
    Conv("14 wide", (1, 3, 2, 3, 14), 16, padding=1),
    Conv("15 wide", (1, 3, 2, 3, 15), 8, padding=1),
    Conv("28 wide", (1, 3, 2, 3, 28), 8, padding=1),
    Conv("67 wide", (1, 2, 1, 2, 67), 3, (1, 2, 3), padding=1),
    Conv("stem", (1, 3, 4, 9, 10), 6, (3, 7, 7), (1, 2, 2), (1, 3, 3)),
    Conv("stem of one frame", (2, 3, 2, 9, 11), 7, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
)


ENDS = (((-1, 0, 0), (0, 0, 0), (0, 0, -1)),)
"""One frame in a padded clip: the first output time, those in the middle, the last."""
THREE = (((-1, 0, 1), (0, 1, 1), (1, 1, 1), (1, 1, 2), (1, 2, -1)),)
"""Three frames that differ, as ENDS makes them."""
SHIFTED = (((-1, 0), (0, 1), (1, -1)),)
EACH = (((0, 0), (0, 1)), ((-1, 0), (1, 1)), ((1, 1), (1, 0)))
SINGLES = (((0,), (0,)),)

FROZEN = (
    Frozen("frozen 3x3x3", (2, 3, 1, 3, 4), 4, padding=(0, 1, 1), reads=ENDS, gives=ENDS),
    Frozen("frozen three", (1, 2, 3, 3, 3), 5, padding=(0, 1, 1), reads=THREE, gives=THREE, times=3),
    Frozen("frozen, 70 deep", (1, 70, 3, 2, 2), 9, padding=(0, 1, 1), reads=THREE, gives=THREE, times=3),
    Frozen("frozen, 70 deep, 5x5", (3, 70, 2, 3, 3), 5, (2, 5, 5), padding=(0, 2, 2), reads=EACH, gives=EACH, times=2),
    Frozen("frozen, empty batch", (0, 3, 1, 4, 4), 4, reads=ENDS, gives=ENDS),
    Frozen(
        "frozen batch of 3", (3, 5, 2, 3, 3), 5, (2, 3, 3), padding=(0, 1, 1), reads=SHIFTED, gives=SHIFTED, times=2
    ),
    Frozen(
        "frozen, one to several", (1, 2, 1, 4, 4), 3, reads=ENDS, gives=(((-1, 0, 1), (0, 1, 2), (1, 2, -1)),), times=3
    ),
    Frozen("frozen, each its own", (3, 7, 2, 3, 4), 9, (2, 3, 3), padding=(0, 1, 1), reads=EACH, gives=EACH, times=2),
    Frozen(
        "frozen, one reads nothing",
        (2, 3, 1, 4, 4),
        4,
        (2, 3, 3),
        reads=(((-1, -1), (0, 0)),),
        gives=(((-1, 0), (0, 0)),),
    ),
    Frozen(
        "frozen, given to nobody",
        (2, 3, 2, 4, 4),
        4,
        (2, 3, 3),
        reads=(((0, 1), (1, 0)),),
        gives=(((-1, 0), (-1, 1)),),
        times=2,
    ),
    Frozen(
        "frozen, one reads for all",
        (2, 3, 1, 4, 4),
        4,
        (1, 3, 3),
        reads=SINGLES,
        gives=(((0,), (1,)), ((1,), (0,))),
        times=2,
    ),
    Frozen(
        "frozen, stride 2", (2, 5, 2, 5, 6), 7, (2, 3, 3), (1, 2, 2), (0, 1, 1), reads=SHIFTED, gives=SHIFTED, times=2
    ),
    Frozen(
        "frozen, dilated",
        (1, 3, 2, 7, 9),
        4,
        (2, 3, 2),
        1,
        (0, 2, 1),
        (1, 2, 3),
        reads=(((0, 1), (1, 1)),),
        gives=(((0, 1), (1, 1)),),
        times=2,
    ),
    Frozen(
        "frozen, 2 groups",
        (1, 34, 1, 3, 2),
        6,
        (2, 3, 3),
        (1, 2, 1),
        (0, 1, 1),
        groups=2,
        reads=(((-1, 0), (0, 0)),),
        gives=(((-1, 0), (0, 0)),),
    ),
    Frozen("frozen, depthwise", (2, 5, 1, 3, 3), 5, padding=(0, 1, 1), groups=5, reads=ENDS, gives=ENDS),
    Frozen(
        "frozen, 9 groups of 2", (2, 18, 3, 2, 3), 18, padding=(0, 1, 1), groups=9, reads=THREE, gives=THREE, times=3
    ),
    Frozen("frozen, depthwise, of 17", (3, 17, 2, 3, 3), 17, (2, 2, 3), groups=17, reads=EACH, gives=EACH, times=2),
    Frozen(
        "frozen shortcut",
        (2, 5, 2, 6, 5),
        8,
        1,
        (1, 2, 2),
        reads=(((0,), (1,), (0,)),),
        gives=(((0,), (1,), (0,)),),
        times=2,
    ),
    Frozen(
        "frozen, given to one of three",
        (2, 5, 3, 4, 4),
        4,
        padding=(0, 1, 1),
        reads=(((-1, 0, 1), (0, 1, 2), (1, 2, -1)),),
        gives=(((-1, -1, 0), (-1, 0, -1), (0, -1, -1)),),
    ),
    Frozen("frozen, the last of three", (2, 8, 3, 4, 4), 4, 1, reads=(((2,),),), gives=(((0,),),)),
    Frozen("frozen, temporal", (1, 7, 3, 2, 3), 5, (3, 1, 1), reads=THREE, gives=THREE, times=3),
    Frozen(
        "frozen, 40 channels to 50",
        (1, 40, 1, 2, 2),
        50,
        (2, 3, 3),
        padding=(0, 1, 1),
        reads=(((-1, 0), (0, 0)),),
        gives=(((-1, 0), (0, 0)),),
    ),
    Frozen("frozen pixels", (1, 3, 1, 2, 9), 17, padding=(0, 1, 1), reads=ENDS, gives=ENDS),
    Frozen(
        "frozen stem",
        (1, 3, 1, 6, 7),
        6,
        (2, 7, 7),
        (1, 2, 2),
        (0, 3, 3),
        reads=(((-1, 0), (0, 0)),),
        gives=(((-1, 0), (0, 0)),),
    ),
    Frozen(
        "frozen, same",
        (1, 3, 1, 5, 6),
        4,
        (2, 4, 2),
        padding="same",
        reads=(((-1, 0), (0, 0)),),
        gives=(((-1, 0), (0, 0)),),
    ),
)


@dataclass(frozen=True)
class Pool:
    """One max pooling: the size of its input (N, C, T, H, W) and its windows."""

    name: str
    x: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    ceil_mode: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    def __call__(self, x: Tensor) -> Tensor:
        return F.max_pool3d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    @property
    def spread(self) -> Pool:
        """The pooling over what `read` makes of x."""
        return self

    def read(self, x: Tensor, fill: float = -math.inf) -> Tensor:
        """What the windows read, and the oracle knows inputs by."""
        return x

    def collect(self, shared: Tensor) -> Tensor:
        """The relevance of x, given that of what was read."""
        return shared


@dataclass(frozen=True)
class FrozenPool(Pool):
    """A max pooling of a frozen clip's layer; stride, padding and dilation are those of H and W.

    The oracle reads every window along T as frames of its own, laid end to end.
    """

    reads: TimeTable = ()
    gives: TimeTable = ()
    times: int = 1

    @property
    def options(self) -> dict[str, Any]:
        given = super().options
        flat = {name: given[name][1:] for name in ("stride", "padding", "dilation") if isinstance(given[name], tuple)}
        return given | flat | {"reads": self.reads, "gives": self.gives, "times": self.times}

    @property
    def spread(self) -> Pool:
        kernel = tuples(self.kernel, 3)
        stride = kernel if self.stride is None else tuples(self.stride, 3)
        sides = [(first, *tuples(n, 3)[1:]) for first, n in ((0, self.padding), (1, self.dilation))]
        x = (*self.x[:2], len(self.reads[0]) * kernel[0], *self.x[3:])
        return Pool(self.name, x, kernel, (kernel[0], *stride[1:]), *sides, self.ceil_mode)

    def __call__(self, x: Tensor) -> Tensor:
        return self.spread(self.read(x))

    def read(self, x: Tensor, fill: float = -math.inf) -> Tensor:
        return read_by_table(x, self.reads, fill)

    def collect(self, shared: Tensor) -> Tensor:
        return collected_by_tables(shared, self.reads, self.gives, self.times)


SMALL_GROUPS = (
    *(case for case in (*CONVS, *FROZEN) if case.groups > 1),
    # Rows of more positions than registers hold, and of fewer.
    Conv("6 groups of 4, 19 wide", (1, 24, 1, 2, 19), 24, (1, 3, 3), padding=(0, 1, 1), groups=6),
    Conv("depthwise, 7 wide", (1, 17, 1, 2, 34), 17, (1, 2, 7), (1, 2, 1), (0, 1, 3), groups=17),
    Conv("depthwise, 5 wide, stride 3", (1, 17, 1, 1, 37), 17, (1, 1, 5), (1, 1, 3), (0, 0, 4), groups=17),
    Conv("depthwise, padding beyond the input", (1, 20, 1, 2, 2), 20, (2, 3, 5), 1, (1, 3, 6), (1, 2, 1), groups=20),
    Conv("3 groups of 16", (1, 48, 2, 3, 3), 48, (2, 3, 2), (1, 1, 2), (1, 1, 0), (1, 2, 1), groups=3),
    Conv("5 groups of 8, dilated", (1, 40, 2, 2, 4), 40, (2, 2, 3), 1, 1, (1, 1, 2), groups=5),
    Frozen("frozen, depthwise, of 20", (3, 20, 2, 3, 3), 20, (2, 2, 3), groups=20, reads=EACH, gives=EACH, times=2),
    Frozen(
        "frozen, 5 groups of 4", (2, 20, 3, 2, 3), 20, padding=(0, 1, 1), groups=5, reads=THREE, gives=THREE, times=3
    ),
)
"""What kernels read where it lies, with the channels of a position next to each other."""

POOLS = (
    Pool("2x2x2", (2, 3, 4, 6, 6), 2),
    Pool("1x2x2", (1, 17, 2, 6, 4), (1, 2, 2)),
    Pool("leftover rows", (1, 2, 5, 7, 5), 2),
    Pool("overlapping", (2, 3, 3, 6, 7), 3, 2, 1),
    Pool("stride 1", (1, 3, 3, 4, 5), 3, 1, 1),
    Pool("unpadded, overlapping", (1, 2, 5, 5, 6), (2, 3, 3), (1, 2, 1)),
    Pool("stride over kernel", (1, 3, 5, 7, 8), (1, 2, 2), (2, 3, 4)),
    Pool("ceil", (1, 3, 4, 6, 7), 3, 2, 0, 1, True),
    Pool("ceil, padded", (2, 2, 3, 5, 6), 2, 2, 1, 1, True),
    Pool("ceil, last window would begin behind", (1, 2, 3, 4, 5), 1, (2, 3, 4), 0, 1, True),
    Pool("dilated", (1, 3, 5, 6, 7), 2, 1, 0, (2, 3, 2)),
    Pool("dilated, padded, stride 2, ceil", (1, 2, 5, 7, 8), 3, 2, 1, (1, 2, 2), True),
    Pool("one frame", (2, 3, 1, 5, 5), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    Pool("kernel 1", (1, 3, 2, 3, 3), 1),
    Pool("kernel 1, stride 2", (1, 2, 3, 4, 5), 1, 2),
    Pool("whole input", (2, 5, 2, 3, 4), (2, 3, 4)),
    Pool("empty batch", (0, 3, 4, 4, 4), 2),
    Pool("batch of 3, 33 channels", (3, 33, 2, 2, 4), 2),
    Pool("28 wide", (1, 1, 2, 4, 28), (1, 2, 2)),
    Pool("C3D's last", (1, 16, 2, 7, 7), 2, 2, (0, 1, 1)),
    Pool("windows beside the input", (1, 2, 2, 1, 5), (1, 2, 2), 1, (0, 1, 1), (1, 2, 1)),
    Pool("40 channels, stride 1", (1, 40, 4, 3, 4), 3, 1, 1),
    Pool("stride 1, dilated", (2, 3, 5, 4, 5), (3, 2, 3), 1, (1, 0, 1), (2, 1, 1)),
)

FROZEN_POOLS = (
    FrozenPool("frozen pool", (2, 3, 1, 4, 5), 3, 1, 1, reads=ENDS, gives=ENDS),
    FrozenPool("frozen pool of three", (1, 17, 3, 4, 3), 3, 2, 1, reads=THREE, gives=THREE, times=3),
    FrozenPool("frozen pool, batch of 3", (3, 5, 2, 3, 4), (2, 3, 3), 1, (0, 1, 1), reads=EACH, gives=EACH, times=2),
    FrozenPool(
        "frozen pool, clips alike", (3, 5, 2, 3, 4), (2, 3, 3), 1, (0, 1, 1), reads=SHIFTED, gives=SHIFTED, times=2
    ),
    FrozenPool("frozen pool, empty batch", (0, 3, 1, 4, 4), 3, 1, 1, reads=ENDS, gives=ENDS),
    FrozenPool("frozen pool, apart", (2, 3, 2, 4, 6), 2, reads=SHIFTED, gives=SHIFTED, times=2),
    FrozenPool(
        "frozen pool, one to several",
        (1, 40, 1, 3, 3),
        (3, 2, 2),
        1,
        reads=ENDS,
        gives=(((-1, 0, 1), (0, 1, 2), (1, 2, -1)),),
        times=3,
    ),
    FrozenPool(
        "frozen pool, given to nobody",
        (2, 3, 2, 3, 3),
        2,
        1,
        reads=(((0, 1), (1, 0)),),
        gives=(((-1, 0), (-1, -1)),),
        times=2,
    ),
    FrozenPool(
        "frozen pool, nothing read", (2, 3, 1, 3, 3), 2, 1, reads=(((-1, -1), (0, 0)),), gives=(((-1, 0), (0, 0)),)
    ),
    FrozenPool("frozen pool, dilated, ceil", (1, 2, 3, 7, 8), 3, (1, 2, 2), 1, (1, 1, 2), True, THREE, THREE, 3),
)


@dataclass(frozen=True)
class Add:
    """An addition of two summands of one size (N, C, T, H, W); ``frozen``: all frames of the first are equal."""

    name: str
    x: tuple[int, ...]
    frozen: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {}


ADDS = (
    Add("summands", (2, 3, 4, 5, 6)),
    Add("summands of 17 channels", (1, 17, 2, 3, 3)),
    Add("summands in vectors", (2, 16, 2, 3, 4)),
    Add("summands, one element", (1, 1, 1, 1, 1)),
    Add("summands, one channel", (2, 1, 3, 4, 5)),
    Add("summands, empty batch", (0, 3, 2, 4, 4)),
    Add("summands, batch of 3", (3, 5, 2, 3, 3)),
    Add("summands, features", (3, 37, 1, 1, 1)),
    Add("summands, one frame", (2, 3, 1, 7, 7)),
    Add("summands, 28 wide", (1, 1, 2, 3, 28)),
    Add("summands, one frozen", (2, 8, 4, 3, 3), frozen=True),
)

Case: TypeAlias = Conv | Pool | Add


# ------------------------------------------------------------------------------------------------- operands


def draw(case: Case, what: str, shape: Sequence[int], short: bool) -> Tensor:
    """Random numbers that depend on nothing but their name: normal ones, or eighths from -2 to 2."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name}: {what}".encode()))
    if short:
        return torch.randint(-16, 17, tuple(shape), generator=generator).double() / 8
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).double()


@dataclass(frozen=True)
class Problem:
    """One call of an operation, and its answer. Tensors are float64, with values that their later type can hold."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    expected: Tensor
    scale: Tensor  # the sum of |terms| of every element of `expected`

    def on(self, device: str, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Any]:
        """The arguments: x, other, weight and bias of the type, relevance and bounds of its accumulator's."""
        own = ("x", "other", "weight", "bias")
        types = dict.fromkeys(self.tensors, accumulator(dtype)) | dict.fromkeys(own, dtype)
        return self.options | {
            name: lay_out(value.to(device, types[name], copy=True), layout) for name, value in self.tensors.items()
        }


LAYOUTS = ("contiguous", "channels_last", "cut_in_time", "permuted", "cropped", "sliced", "expanded")
CHANNELS_LAST = ("channels_last", "cut_in_time")
"""Layouts whose results are channels_last_3d."""


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between and around the values of a slice is NaN."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor
    if layout == "cut_in_time":
        if tensor.dim() != 5:
            return tensor
        n, c, t, h, w = tensor.shape
        longer = tensor.new_full((n, c, t + 2, h, w), math.nan).contiguous(memory_format=torch.channels_last_3d)
        return longer[:, :, 1:-1].copy_(tensor)
    if layout == "permuted":
        backward = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backward).contiguous().permute(backward)
    if layout in ("cropped", "sliced"):
        step = 2 if layout == "sliced" else 1
        poisoned = tensor.new_full([step * n + 2 for n in tensor.shape], math.nan)
        return poisoned[tuple(slice(1, 1 + step * n, step) for n in tensor.shape)].copy_(tensor)
    if layout == "expanded":
        equal = tensor
        for dim, size in enumerate(tensor.shape):
            first = equal.narrow(dim, 0, min(size, 1))
            equal = first if torch.equal(first.expand_as(equal), equal) else equal
        return equal.contiguous().expand(tensor.shape)
    assert layout == "contiguous"
    return tensor.contiguous()


def kind(op: str) -> str:
    """What an operation on frozen clips is on any clip."""
    return op.removeprefix("frozen_")


FORWARD = ("conv3d", "max_pool3d")
"""Kinds of operations that compute a layer's output, not relevance."""

POOLING = ("max_pool3d", "max_pool3d_relevance")


def explicit(op: str, arguments: dict[str, Any], kernel: str = "auto") -> dict[str, Any]:
    """Arguments of the Python functions as those of the torch operators: nothing left out, every number per dimension."""
    if op == "z_plus_add":
        return {"alpha": 1.0, "stabilizer": 0.0, "kernel": kernel} | arguments
    given = {"kernel": kernel, **arguments}
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "kernel": "auto"}
    if kind(op) in POOLING:
        given["kernel_size"] = list(tuples(given["kernel_size"], 3))
        defaults |= {"stride": given["kernel_size"], "ceil_mode": False}
        defaults |= {"winner_takes_all": False} if kind(op) not in FORWARD else {}
        if kind(op) != op and given.get("stride") is None:
            given["stride"] = given["kernel_size"][1:]
    else:
        defaults |= {"bias": None, "groups": 1} | ({"non_negative": False} if kind(op) == "z_plus_conv3d" else {})
        defaults |= {"divided": False} if kind(op) != "conv3d" else {"relu": False}
    if kind(op) not in FORWARD:
        defaults["stabilizer"] = 0.0
    if kind(op) != op and kind(op) in FORWARD:
        defaults["times"] = len(given["reads"][0])
    for name in ("reads", "gives") if kind(op) != op else ():
        if name in given:
            given[name] = [time for row in given[name] for times in row for time in times]
    if kind(op) != op:
        given |= {
            "stride": (1, *tuples(given.get("stride", 1), 2)),
            "dilation": (1, *tuples(given.get("dilation", 1), 2)),
        }
        given["padding"] = (0, *tuples(given.get("padding", 0), 2))
    given = defaults | {name: value for name, value in given.items() if value is not None}
    for name in ("stride", "padding", "dilation"):
        given[name] = list(tuples(given[name], 3))
    if kind(op) not in POOLING and len(given["padding"]) == 3:
        given["padding"] = [side for side in given["padding"] for _ in range(2)]
    return given


# ------------------------------------------------------------------------------------------------- the oracle's answers


@cache
def connections(case: Conv) -> Tensor:
    """(outputs, inputs) of one example: which weight connects them, counted from 1; 0 where none does."""
    numbers = torch.arange(1.0, math.prod(case.weight) + 1, dtype=torch.float64).view(case.weight)
    return matrix(partial(case, weight=numbers), torch.Size((1, *case.x[1:])))[0].round().long()


@lru_cache(maxsize=8)
def jacobian(case: Conv, dtype: torch.dtype, short: bool) -> tuple[Tensor, Tensor]:
    """The weight, and the convolution's matrix (outputs, inputs)."""
    weight = rounded(draw(case, "weight", case.weight, short), dtype)
    return weight, torch.cat([weight.new_zeros(1), weight.flatten()])[connections(case)]


@dataclass(frozen=True, eq=False)
class Variant:
    """How a rule is asked for: with which options, and of a convolution's operations with which bias and box."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    box: str | None = None
    exact_only: bool = False  # where a denominator of either sign is next to zero, its rounding decides

    @property
    def stabilizer(self) -> float:
        return float(self.options.get("stabilizer", 0.0))


STABLE = {"stabilizer": 0.25}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "z_plus_conv3d": (
        Variant("non-negative", {"non_negative": True}),
        Variant("signed"),
        Variant("signed, bias, stabilizer", STABLE, bias=True),
        Variant("divided", {"divided": True}),
    ),
    "z_beta_conv3d": (
        Variant("box of numbers", box="number"),
        Variant("box of channels, bias", bias=True, box="channel"),
        Variant("box of pixels, stabilizer", STABLE, box="pixel"),
        Variant("pixels outside of their box", STABLE, box="violated", exact_only=True),
        Variant("divided", {"divided": True}, box="channel"),
    ),
    "conv3d": (Variant("no bias"), Variant("bias", bias=True), Variant("rectified", {"relu": True}, bias=True)),
    "max_pool3d": (Variant("largest"),),
    "max_pool3d_relevance": (
        Variant("proportional"),
        Variant("proportional, stabilizer", STABLE),
        Variant("winner", {"winner_takes_all": True}),
    ),
    "z_plus_add": (
        Variant("added"),
        Variant("stabilizer", STABLE),
        Variant("half of it subtracted", {"alpha": -0.5}),
    ),
}


VARIANTS |= {f"frozen_{op}": variants for op, variants in VARIANTS.items() if op != "z_plus_add"}


def box(how: str, x: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Shapes of low and high, which broadcast to x."""
    _, c, *size = x
    return {
        "number": ((), (1,)),
        "channel": ((1, c, 1, 1, 1), (c, 1, 1, 1)),
        "pixel": ((c, *size), tuple(x)),
        "violated": ((1, 1, 1, 1, 1), (size[-1],)),
    }[how]


@lru_cache(maxsize=8)
def problem(
    op: str, case: Case, variant: Variant, dtype: torch.dtype, short: bool, short_quotients: bool = True
) -> Problem:
    """What the operation gets, and what it must answer. Short operands may be had with quotients s that are full."""
    x = draw(case, "x", case.x, short).clamp(-2, 2)
    if variant.options.get("non_negative"):
        x = pos(x)
    if isinstance(case, Pool):
        return pool_problem(op, case, variant, rounded(x, dtype), dtype, short)
    if case.frozen:
        x = x[:1, :, :1].expand(case.x)
    if isinstance(case, Add):
        return add_problem(case, variant, rounded(x, dtype), dtype, short)
    weight, V = jacobian(case.spread, dtype, short)
    tensors = {"x": rounded(x, dtype), "weight": weight}
    if variant.bias:
        tensors["bias"] = rounded(draw(case, "bias", (case.out,), short), dtype)
    if variant.box:
        inside = {"violated": 0.0}.get(variant.box, 2.0 if short else 2.25)
        for name, sign, shape in zip(("low", "high"), (-1, 1), box(variant.box, case.x), strict=True):
            distance = inside + draw(case, name, shape, short).abs()
            tensors[name] = rounded(sign * distance, accumulator(dtype))

    bias = tensors.get("bias", torch.zeros(case.out, dtype=torch.float64))
    out = case(tensors["x"], weight).shape
    b = bias.repeat_interleave(math.prod(out[2:]))
    read = case.read(tensors["x"])
    if kind(op) == "conv3d":
        expected = read.flatten(1) @ V.T + b
        scale = read.flatten(1).abs() @ V.T.abs() + b.abs()
        expected = pos(expected) if variant.options.get("relu") else expected
        return Problem(op, tensors, of_reading(case) | variant.options, expected.view(out), scale.view(out))

    # Z (N, outputs, inputs): what every input gave to every output.
    u = read.flatten(1).unsqueeze(1)
    if variant.box:
        low, high = (case.read(tensors[name].expand(case.x)).flatten(1).unsqueeze(1) for name in ("low", "high"))
        Z = u * V - low * pos(V) - high * neg(V)
    else:
        Z = pos(u) * pos(V) + neg(u) * neg(V)
    R = rounded(draw(case, "relevance", out, short and short_quotients).flatten(1), accumulator(dtype))
    if variant.options.get("divided"):  # R is s: no denominator
        expected, scale = (torch.einsum("noi,no->ni", each, s) for each, s in ((Z, R), (Z.abs(), R.abs())))
    else:
        if short and short_quotients:
            z = Z.sum(2) + pos(b)
            R = rounded(R * (z + torch.where(z < 0, -variant.stabilizer, variant.stabilizer)), torch.float32)
        expected, scale = shared(Z, R, pos(b), variant.stabilizer)
    tensors["relevance"] = R.view(out)
    expected, scale = (case.collect(each.view(read.shape)) for each in (expected, scale))
    return Problem(op, tensors, case.options | variant.options, expected, scale)


def of_reading(case: Case) -> dict[str, Any]:
    """The options that say how a layer reads its input, and not whom it gives relevance to."""
    return {name: value for name, value in case.options.items() if name not in ("gives", "times")}


def shared(Z: Tensor, R: Tensor, bias: Tensor | float, stabilizer: float) -> tuple[Tensor, Tensor]:
    """Relevance by the shares Z (N, outputs, inputs), and the sum of |terms| of each, in which roundoff is counted.

    A denominator whose terms cancel is that much less certain, and so is all that is divided by it.
    """
    expected = [share(one, r, bias, stabilizer) for one, r in zip(Z, R, strict=True)]
    z = (Z.sum(2) + bias).abs() + stabilizer
    doubt = torch.where(z > 0, (Z.abs().sum(2) + bias + stabilizer) / z, 0.0)
    scale = [share(one, r, bias, stabilizer).abs() for one, r in zip(Z.abs(), R.abs() * doubt**2, strict=True)]
    return (torch.stack(each) if each else R.new_zeros(0, Z.shape[2]) for each in (expected, scale))


@cache
def windows(case: Pool) -> Tensor:
    """(outputs, inputs) of one channel: whether the input is in the output's window."""
    plane = torch.zeros(1, 1, *case.x[2:], dtype=torch.float64)
    out = case(plane).shape[2:]
    member = torch.zeros(math.prod(out), *case.x[2:], dtype=torch.bool)
    stride = case.kernel if case.stride is None else case.stride
    axes = [tuples(v, 3) for v in (case.kernel, stride, case.padding, case.dilation)]
    for number, o in enumerate(itertools.product(*map(range, out))):
        for tap in itertools.product(*map(range, axes[0])):
            at = [a * s - p + k * d for a, k, s, p, d in zip(o, tap, *axes[1:], strict=True)]
            if all(0 <= i < n for i, n in zip(at, case.x[2:], strict=True)):
                member[(number, *at)] = True
    return member.flatten(1)


def pool_problem(op: str, case: Pool, variant: Variant, x: Tensor, dtype: torch.dtype, short: bool) -> Problem:
    """Every channel of every example is a plane by itself. Short operands have ties."""
    out, read = case(x).shape, case.read(x)
    R = rounded(draw(case, "relevance", out, short), accumulator(dtype))
    member, u = windows(case.spread), read.reshape(math.prod(read.shape[:2]), 1, math.prod(read.shape[2:]))
    if kind(op) in FORWARD:
        largest = torch.where(member, u, -math.inf).amax(2).view(out)
        return Problem(op, {"x": x}, of_reading(case), largest, largest.abs().nan_to_num(posinf=0.0))
    if variant.options.get("winner_takes_all"):
        candidates = torch.where(member, u, -math.inf)
        highest = member & (candidates == candidates.amax(2, keepdim=True))
        Z = (highest & (highest.cumsum(2) == 1)).double()
    else:
        Z = pos(u) * member
    expected, scale = shared(Z, R.reshape(len(Z), len(member)), 0.0, variant.stabilizer)
    expected, scale = (case.collect(each.view(read.shape)) for each in (expected, scale))
    return Problem(op, {"x": x, "relevance": R}, case.options | variant.options, expected, scale)


def add_problem(case: Add, variant: Variant, x: Tensor, dtype: torch.dtype, short: bool) -> Problem:
    """Every output has two inputs, of weights 1 and alpha; the answer is laid side by side along the channels."""
    other = rounded(draw(case, "other", case.x, short).clamp(-2, 2), dtype)
    ones = torch.eye(x.numel(), dtype=torch.float64)
    V = torch.cat([ones, ones * variant.options.get("alpha", 1.0)], 1)
    u = torch.cat([x.flatten(), other.flatten()])
    Z = pos(u) * pos(V) + neg(u) * neg(V)
    R = rounded(draw(case, "relevance", case.x, short).flatten(), accumulator(dtype))
    if short:
        R = R * (Z.sum(1) + variant.stabilizer)
    sides = [
        torch.cat([part.view(case.x) for part in found[0].split(x.numel())] if x.numel() else [x, x], 1)
        for found in shared(Z[None], R[None], 0.0, variant.stabilizer)
    ]
    return Problem("z_plus_add", {"x": x, "other": other, "relevance": R.view(case.x)}, variant.options, *sides)


# ------------------------------------------------------------------------------------------------- tolerances


SUMS = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Roundoff of a whole sum relative to its |terms|: about 100 (5000) units, where random ones make the root of their number."""

UNITS = {
    "reference": (0.0, 0.0),
    "ieee": (0.0, 0.0),
    "winograd": (2**-17, 2**-17),
    "bf16x3": (2**-16, 2**-16),
    "tf32x3": (2**-22, 2**-22),
    "mixed": (2**-8, 2**-16),
    "tf32": (2**-11, 2**-11),
    "bf16": (2**-8, 2**-8),
    "winograd_bf16": (2**-5, 2**-5),
    "f16": (2**-11, 2**-11),
}
"""What an arithmetic leaves of u and of w, and of s: the largest relative error of one operand.

Half a unit in the last place is 2^-8 for bfloat16, 2^-11 for tf32 and float16; two halves (hi + lo) keep it squared.
Winograd's transforms round by what is largest nearby: test_winograd.py holds them to that.
"""


def tolerance(op: str, kernel: str, dtype: torch.dtype, short: bool, short_quotients: bool = True) -> float:
    """How far a kernel may be off, relative to the sum of |terms|: the roundoff of every operand that is not short."""
    if kind(op) == "max_pool3d":
        return 0.0  # what is there already is told, not computed
    arithmetic = kernel.split("/")[-1]
    operand, quotient = UNITS[arithmetic]
    left_out = operand if arithmetic.endswith("x3") else 0.0  # the product lo lo
    allowed = SUMS[accumulator(dtype)]
    if not short:
        allowed += 2 * operand + left_out
        if kind(op) != "conv3d":
            allowed += operand + quotient + left_out
    elif arithmetic == "winograd_bf16":
        allowed += 3 * operand + quotient  # what is short before transforms is not behind them
    elif not short_quotients:
        allowed += quotient
    if kind(op) == "conv3d":
        allowed += torch.finfo(dtype).eps / 2  # the result has the type of x
    return allowed


def disagreement(actual: Tensor, problem: Problem, tolerance: float) -> str | None:
    """None where every element is within tolerance of its |terms|, else the worst one. What has no terms must be zero."""
    expected, scale = problem.expected, problem.scale
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    found = actual.detach().cpu().double()
    error = torch.where(
        found == expected, 0.0, (found - expected).abs().nan_to_num(math.inf)
    )  # infinities may be equal
    # Shares in float64 are themselves rounded, in the last places of the largest.
    allowed = (tolerance * scale + 1e-15 * scale.amax() * (scale > 0)) if scale.numel() else scale
    wrong = error > allowed
    if not wrong.any():
        return None
    worst = tuple(int(i) for i in torch.unravel_index((error / allowed.clamp(min=1e-300)).argmax(), error.shape))
    terms = scale[worst].item()
    return (
        f"worst of {int(wrong.sum())} (of {error.numel()}) at {worst}: {actual[worst].item():.9g}, expected "
        f"{expected[worst].item():.9g}; off by {error[worst].item():.3g}, its |terms| are {terms:.3g}, tolerance {tolerance:.3g}"
    )
