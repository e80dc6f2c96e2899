"""Which kernel serves which operation: a committed table by device and shape, never a timing at run time.

A kernel is named ``"<instruction set>/<arithmetic>"``: ``"avx512/ieee"``, ``"amx/bf16x3"``, ``"cuda/tf32x3"``, ``"wgmma/bf16"``
(``wgmma`` are the products of Hopper's warpgroups); ``"reference"`` is the definition in plain ATen. How a kernel multiplies is
its *arithmetic*; sums are always taken in float32 (float64 for float64):

=============  ==================================================================================  ===============
arithmetic     products                                                                            precision
=============  ==================================================================================  ===============
ieee           in the type of the sums                                                             ieee
winograd       in the type of the sums, of transformed tiles (3x3, stride 1): a quarter as many    float32
bf16x3         of bfloat16 halves: hi hi + hi lo + lo hi                                           float32
tf32x3         of tf32 halves, likewise                                                            float32
mixed          of bfloat16, with ``s = R / z`` kept in two halves                                  mixed
tf32           of tf32                                                                             bfloat16
bf16           of bfloat16                                                                         bfloat16
winograd_bf16  of bfloat16; of transformed tiles on the walk back, and forward as winograd         bfloat16
f16            of float16                                                                          bfloat16
=============  ==================================================================================  ===============

A precision allows every kernel of its own row and of finer ones; the table, or where it has no entry the order written
down here, says which of those is fastest. The table is written by ``make tune`` on each kind of machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from captum_dtd import native

__all__ = [
    "ARITHMETICS",
    "TRANSFORMED",
    "Precision",
    "available",
    "choose",
    "feature_level",
    "shape_class",
    "transforms",
]

Precision: TypeAlias = Literal["ieee", "float32", "mixed", "bfloat16"]
"""How much a kernel may round: not beyond its own sums; within 1e-4 of that; bfloat16 products with s in two halves;
bfloat16 products."""

ARITHMETICS: dict[str, Precision] = {
    "ieee": "ieee",
    "winograd": "float32",
    "bf16x3": "float32",
    "tf32x3": "float32",
    "mixed": "mixed",
    "tf32": "bfloat16",
    "bf16": "bfloat16",
    "winograd_bf16": "bfloat16",
    "f16": "bfloat16",
}
"""Every arithmetic and the precision it needs leave for."""

_PRECISIONS: tuple[Precision, ...] = ("ieee", "float32", "mixed", "bfloat16")

CPU_LEVELS = ("amx_bf16", "avx512_fp16", "avx512_bf16", "avx512", "avx2", "generic")
"""What CPUs are told apart by, from the most capable to the least."""

ShapeClass: TypeAlias = Literal["grouped", "pixels", "linear", "pointwise", "strided", "small", "dense"]
"""What convolutions are told apart by; none of it depends on the batch."""

_FEW = 16
"""Channels of a group, of which several fill a register; more fill it by themselves."""

FROZEN = "frozen_"
"""What operations on layers of frozen clips begin with; the rest is what they are named on any clip."""

TRANSFORMED: tuple[ShapeClass, ...] = ("small", "dense")
"""Where "winograd" may differ from "ieee", and "winograd_bf16" from "bf16"; whether they do, kernels decide by what the
transforms cost and save."""


def available(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that can serve an operation on a device ("cpu" or "cuda") for inputs of a type, best first.

    Example:
        >>> available("z_plus_conv3d", "cpu", torch.float64)[-1]
        'reference'
    """
    module = native.loaded.get(device)
    if module is None or native.refusal(device):
        return ["reference"]
    pools = dict.fromkeys(("max_pool3d", "max_pool3d_relevance"), module.max_pool3d_kernels)
    lists = {**pools, "z_plus_add": module.add_kernels}
    names = lists.get(op.removeprefix(FROZEN), module.conv3d_kernels)(str(dtype).removeprefix("torch."))
    return [*names, "reference"]


def transforms(kernel: str) -> bool:
    """Whether a kernel computes by transformed tiles where that pays, and otherwise as one of the same products would.

    Example:
        >>> transforms("avx2/winograd"), transforms("avx2/ieee")
        (True, False)
    """
    return kernel.partition("/")[2].startswith("winograd")


def shape_class(size: Sequence[int], weight: Sequence[int], stride: Sequence[int], groups: int = 1) -> ShapeClass:
    """What kind of convolution this is to a kernel.

    Args:
        size: of the output, (T, H, W).
        weight: its shape, (C_out, C_in / groups, kT, kH, kW).
        stride: of the convolution.
        groups: of the convolution.

    Example:
        >>> shape_class((16, 112, 112), (64, 3, 3, 3, 3), (1, 1, 1))
        'pixels'
        >>> shape_class((16, 56, 56), (64, 1, 3, 3, 3), (1, 1, 1), groups=64)
        'grouped'
    """
    if groups > 1 and max(weight[0] // groups, weight[1]) <= _FEW:
        return "grouped"
    if weight[1] <= 4:
        return "pixels"
    if math.prod(weight[2:]) == 1:
        return "linear" if math.prod(size) == 1 else "pointwise"
    if max(stride) > 1:
        return "strided"
    return "small" if math.prod(size) <= 1024 else "dense"


def feature_level(device: str) -> str:
    """What the machine's kernels depend on: the best of `CPU_LEVELS` it has, or the GPU's compute capability ("sm_90")."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    module = native.loaded.get("cpu")
    features = module.cpu_features().split() if module is not None else []
    return next((level for level in CPU_LEVELS if level in features), "generic")


def choose(op: str, device: str, dtype: torch.dtype, precision: Precision, shape: ShapeClass | None = None) -> str:
    """The kernel that serves an operation: the table's where it has an entry, else the first that the precision allows.

    The convolution on the way forward is torch's own where the table has no entry and neither Winograd's transforms serve nor a
    CPU's kernels for groups nor a GPU's tensor units. Those torch gives to halves, so there it always is, but not to floats. At
    pixels "mixed" is "float32".

    Args:
        op: its name, a key of `captum_dtd.ops.SCHEMAS`.
        device: "cpu" or "cuda".
        dtype: of the operation's input.
        precision: how much may be rounded.
        shape: of a convolution, by `shape_class`.

    Example:
        >>> choose("max_pool3d_relevance", "meta", torch.float32, "float32")
        'reference'
    """
    if precision == "mixed" and shape == "pixels":
        precision = "float32"  # the walk's last step: what it rounds is not averaged over any layer after it
    return _choose(op, device, dtype, precision, shape, feature_level(device) if device in native.loaded else "")


@cache
def _choose(
    op: str, device: str, dtype: torch.dtype, precision: Precision, shape: ShapeClass | None, level: str
) -> str:
    names = available(op, device, dtype)
    op = op.removeprefix(FROZEN)
    entry = _table().get(device, {}).get(level, {}).get(op, {}).get(precision, {}).get(shape or "any")
    unmeasured = dtype == torch.float64 or (device == "cuda" and op == "conv3d" and dtype != torch.float32)
    if entry in names and not unmeasured:
        return str(entry)
    allowed = _PRECISIONS[: _PRECISIONS.index(precision) + 1]
    usable = [name for name in names if name == "reference" or ARITHMETICS[name.split("/")[1]] in allowed]
    if shape not in TRANSFORMED or (op == "conv3d" and dtype != torch.float32):
        usable = [name for name in usable if not transforms(name)]
    if op == "conv3d" and dtype != torch.float64:
        # What torch calls was tuned for this machine, but multiplies by definition, and floats not on a GPU's tensor units. Of
        # groups it is fast on whole windows of one channel, not on those of a few channels or along T.
        on_tensor_units = device == "cuda" and dtype == torch.float32 and shape != "linear"
        of_groups = device == "cpu" and shape == "grouped"
        usable = [name for name in usable if transforms(name) or on_tensor_units or of_groups or name == "reference"]
    return min(usable, key=lambda name: _unmeasured_order(name, shape))


# Cheapest first. Tensor units gain even from three products; vector units of bfloat16 only from fewer than two.
_CHEAPEST_FIRST = {
    "wgmma": ("f16", "bf16", "bf16x3"),
    "cuda": ("f16", "bf16", "tf32", "mixed", "bf16x3", "tf32x3", "ieee"),
    "amx": ("bf16", "winograd_bf16", "mixed", "bf16x3"),
    "avx512": ("winograd_bf16", "winograd", "bf16", "mixed", "ieee", "bf16x3"),
    "avx2": ("winograd", "ieee"),
    "generic": ("winograd", "ieee", "bf16", "winograd_bf16", "mixed", "bf16x3"),
}


def _unmeasured_order(name: str, shape: ShapeClass | None) -> tuple[int, int]:
    """Where the table is silent: the best instruction set by its cheapest arithmetic; tensor units not for thin shapes."""
    instruction_set, _, arithmetic = name.partition("/")
    if name == "reference" or (instruction_set == "amx" and shape in ("grouped", "pixels", "linear")):
        return len(_CHEAPEST_FIRST), 0
    return list(_CHEAPEST_FIRST).index(instruction_set), _CHEAPEST_FIRST[instruction_set].index(arithmetic)


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, dict[str, str]]]]]:
    path = Path(__file__).with_name("kernel_table.json")
    return dict(json.loads(path.read_text())["kernels"]) if path.exists() else {}
