"""The fused operations: how relevance crosses a convolution, a pooling or an addition, in one operation each.

Every operation is a torch operator (``torch.ops.captum_dtd.*``) with a schema, a fake kernel and a definition in plain
ATen (`captum_dtd.reference`), which serves wherever no compiled kernel does; the compiled modules add CPU and CUDA
kernels (`captum_dtd.kernels` says which there are). The functions here call them with the defaults of
``torch.nn.functional``.

Shapes and types: ``x`` (N, C, T, H, W), ``weight`` (C_out, C / groups, kT, kH, kW), ``bias`` (C_out,), ``relevance`` as the
layer's output. ``x``, ``weight`` and ``bias`` have one type: float32, bfloat16, float16 or float64. Relevance, pixel bounds,
every sum and the result are float32, or float64 for float64. Strides are free; the result is laid out channels_last_3d
where the frames of ``x`` are, else contiguous. A 2D layer is a 3D one with T = 1; a linear layer a 1x1x1 convolution of one
position. Nothing here is differentiable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from captum_dtd import native, reference
from captum_dtd.checks import (
    check,
    check_add,
    check_bounds,
    check_conv3d,
    check_max_pool3d,
    check_table,
    check_tables,
    times_of,
)
from captum_dtd.modes import exact_products

__all__ = [
    "SCHEMAS",
    "conv3d",
    "frozen_conv3d",
    "frozen_max_pool3d",
    "frozen_max_pool3d_relevance",
    "frozen_z_beta_conv3d",
    "frozen_z_plus_conv3d",
    "max_pool3d",
    "max_pool3d_relevance",
    "z_beta_conv3d",
    "z_plus_add",
    "z_plus_conv3d",
]

_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
_TABLES = "int[] reads, int[] gives, int times"

SCHEMAS = {
    "z_plus_conv3d": f"(Tensor x, Tensor weight, Tensor? bias, Tensor relevance, {_GEOMETRY}, int groups, "
    "bool non_negative, float stabilizer, bool divided, str kernel) -> Tensor",
    "z_beta_conv3d": "(Tensor x, Tensor low, Tensor high, Tensor weight, Tensor? bias, Tensor relevance, "
    f"{_GEOMETRY}, int groups, float stabilizer, bool divided, str kernel) -> Tensor",
    "max_pool3d_relevance": f"(Tensor x, Tensor relevance, int[] kernel_size, {_GEOMETRY}, bool ceil_mode, "
    "bool winner_takes_all, float stabilizer, str kernel) -> Tensor",
    "z_plus_add": "(Tensor x, Tensor other, Tensor relevance, float alpha, float stabilizer, str kernel) -> (Tensor, Tensor)",
    "conv3d": f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, int groups, bool relu, str kernel) -> Tensor",
    "max_pool3d": f"(Tensor x, int[] kernel_size, {_GEOMETRY}, bool ceil_mode, str kernel) -> Tensor",
    "frozen_z_plus_conv3d": f"(Tensor x, Tensor weight, Tensor? bias, Tensor relevance, {_TABLES}, {_GEOMETRY}, int groups, "
    "bool non_negative, float stabilizer, bool divided, str kernel) -> Tensor",
    "frozen_z_beta_conv3d": "(Tensor x, Tensor low, Tensor high, Tensor weight, Tensor? bias, Tensor relevance, "
    f"{_TABLES}, {_GEOMETRY}, int groups, float stabilizer, bool divided, str kernel) -> Tensor",
    "frozen_max_pool3d_relevance": f"(Tensor x, Tensor relevance, {_TABLES}, int[] kernel_size, {_GEOMETRY}, bool ceil_mode, "
    "bool winner_takes_all, float stabilizer, str kernel) -> Tensor",
    "frozen_conv3d": f"(Tensor x, Tensor weight, Tensor? bias, int[] reads, int times, {_GEOMETRY}, int groups, bool relu, "
    "str kernel) -> Tensor",
    "frozen_max_pool3d": f"(Tensor x, int[] reads, int times, int[] kernel_size, {_GEOMETRY}, bool ceil_mode, str kernel) "
    "-> Tensor",
}
"""Every operation. A convolution's ``padding`` is (front, back) of T, then of H, then of W; ``kernel`` names the kernel that
shall serve, ``"auto"`` leaves it to the device."""

Triple = int | Sequence[int]
Pair = int | Sequence[int]
Table = Sequence[Sequence[Sequence[int]]]
"""For one example, or each of a batch: a time for every output time and tap along T; -1 is none."""


def z_plus_conv3d(
    x: Tensor,
    weight: Tensor,
    relevance: Tensor,
    *,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Triple | Literal["same"] = 0,
    dilation: Triple = 1,
    groups: int = 1,
    non_negative: bool = False,
    stabilizer: float = 0.0,
    divided: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of a convolution's input by z+: ``R_in = x+ adj_v+(s) + x- adj_v-(s)``.

    ``s = R / (conv_v+(x+) + conv_v-(x-) + bias+)``; a zero denominator passes nothing (Montavon et al. 2017).

    Args:
        x: the input (N, C, T, H, W).
        weight: (C_out, C / groups, kT, kH, kW), of the type of ``x``.
        relevance: of the output, (N, C_out, T', H', W').
        bias: its positive part joins the denominator and keeps its share; None: ignored.
        stride: of the convolution, one number or one per dimension.
        padding: zeros around the input: one number, one per dimension, six (front and back of T, of H, of W), or "same".
        dilation: of the convolution.
        groups: of the convolution.
        non_negative: a promise that ``x`` has no negative element; then it is read as it is, and x- is not looked at.
        stabilizer: added to the denominator, away from zero.
        divided: ``relevance`` is s already, for denominators known from elsewhere (shared by several targets or by equal
            times): what is left is the adjoint. ``bias`` and ``stabilizer`` are of no use then.
        kernel: which kernel shall serve, one of `captum_dtd.kernels.available`, or "auto".

    Returns:
        Relevance of the input, shaped like ``x``; it sums to that of the output but for what the bias, the stabilizer and
        zero denominators kept.

    Raises:
        RuntimeError: if shapes, types or devices do not fit, or there is no such kernel; the message names the argument.

    Example:
        >>> x, weight = torch.rand(1, 3, 4, 8, 8), torch.randn(5, 3, 3, 3, 3)
        >>> relevance = torch.rand(1, 5, 4, 8, 8)
        >>> shared = z_plus_conv3d(x, weight, relevance, padding=1)
        >>> bool((shared.sum() / relevance.sum() - 1).abs() < 1e-4)
        True
    """
    geometry = _geometry(stride, padding, dilation, weight)
    options = (groups, non_negative, stabilizer, divided)
    return _call("z_plus_conv3d", x, weight, bias, relevance, *geometry, *options, kernel)


def z_beta_conv3d(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    relevance: Tensor,
    *,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Triple | Literal["same"] = 0,
    dilation: Triple = 1,
    groups: int = 1,
    stabilizer: float = 0.0,
    divided: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of pixels in a box by z-beta: ``R_in = x adj_v(s) - low adj_v+(s) - high adj_v-(s)``.

    ``s = R / (conv_v(x) - conv_v+(low) - conv_v-(high) + bias+)`` (Montavon et al. 2017). It is computed as z+ of the two
    distances ``x - low`` (with v+) and ``high - x`` (with -v-), which is the same sum without its cancellation.

    Args:
        x: pixels (N, C, T, H, W).
        low: the darkest possible pixel, of the type of ``relevance``; any shape that broadcasts to that of ``x``.
        high: the brightest possible pixel, likewise.
        weight: as in `z_plus_conv3d`, and so are all further arguments, the result and the errors.

    Example:
        >>> x, weight = torch.rand(1, 3, 4, 8, 8), torch.randn(5, 3, 3, 3, 3)
        >>> low, high = torch.zeros(1), torch.ones(3, 1, 1, 1)
        >>> z_beta_conv3d(x, low, high, weight, torch.rand(1, 5, 4, 8, 8), padding="same").shape
        torch.Size([1, 3, 4, 8, 8])
    """
    geometry = _geometry(stride, padding, dilation, weight)
    options = (groups, stabilizer, divided)
    return _call("z_beta_conv3d", x, low, high, weight, bias, relevance, *geometry, *options, kernel)


def max_pool3d_relevance(
    x: Tensor,
    relevance: Tensor,
    kernel_size: Triple,
    *,
    stride: Triple | None = None,
    padding: Triple = 0,
    dilation: Triple = 1,
    ceil_mode: bool = False,
    winner_takes_all: bool = False,
    stabilizer: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of a max pooling's input: ``R_in = sum over windows of x+ / (sum of x+ in the window) R``.

    This is the proportional rule of Hiley et al. 2019, and also what z+ does on an average pooling, whose equal weights
    cancel. Windows without a positive element pass nothing.

    Args:
        x: the pooling's input (N, C, T, H, W).
        relevance: of its output.
        kernel_size: of the windows, one number or one per dimension.
        stride: between windows; None: ``kernel_size``.
        padding: around the input; padded elements take no share.
        dilation: between the elements of a window.
        ceil_mode: whether a last window may reach over the input's end, as in ``torch.nn.functional.max_pool3d``.
        winner_takes_all: give each window's relevance to its maximum (of equals the first, as torch's indices) instead.
        stabilizer: added to each window's sum; of no use with ``winner_takes_all``.
        kernel: which kernel shall serve, one of `captum_dtd.kernels.available`, or "auto".

    Returns:
        Relevance of the input, shaped like ``x``.

    Raises:
        RuntimeError: if shapes, types or devices do not fit, or there is no such kernel; the message names the argument.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 0.0, -2.0]).view(1, 1, 1, 1, 4)
        >>> max_pool3d_relevance(x, torch.tensor([8.0, 5.0]).view(1, 1, 1, 1, 2), (1, 1, 2)).flatten()
        tensor([2., 6., 0., 0.])
    """
    geometry = _pooling(kernel_size, stride, padding, dilation)
    return _call("max_pool3d_relevance", x, relevance, *geometry, ceil_mode, winner_takes_all, stabilizer, kernel)


def z_plus_add(
    x: Tensor,
    other: Tensor,
    relevance: Tensor,
    *,
    alpha: float = 1.0,
    stabilizer: float = 0.0,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Relevance of the summands of ``x + alpha other`` by z+: to each its positive part's share, ``u / (sum of u) R``.

    Where no summand is positive nothing is passed.

    Args:
        x: the first summand (N, C, T, H, W).
        other: the second one, of the type and shape of ``x``.
        relevance: of the sum.
        alpha: what ``other`` is multiplied with, as in ``torch.add``; -1 for a subtraction.
        stabilizer: added to the denominator.
        kernel: which kernel shall serve, one of `captum_dtd.kernels.available`, or "auto".

    Returns:
        Relevance of ``x`` and of ``other``, both laid out as results of ``x`` are.

    Raises:
        RuntimeError: if shapes, types or devices do not fit, or there is no such kernel; the message names the argument.

    Example:
        >>> x, other = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3.0, 5.0, -4.0])
        >>> views = (x.view(1, 1, 1, 1, 3), other.view(1, 1, 1, 1, 3), torch.full((1, 1, 1, 1, 3), 8.0))
        >>> [shared.flatten().tolist() for shared in z_plus_add(*views)]
        [[2.0, 0.0, 8.0], [6.0, 8.0, 0.0]]
    """
    of_x, of_other = _dispatch("z_plus_add", x, other, relevance, float(alpha), stabilizer, kernel)
    return of_x, of_other


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = 1,
    padding: Triple | Literal["same"] = 0,
    dilation: Triple = 1,
    groups: int = 1,
    relu: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The convolution itself, by the same kernels, for the way forward; the result has the type of ``x``.

    Args:
        x: the input (N, C, T, H, W).
        weight: as in `z_plus_conv3d`, and so are all further arguments and the errors.
        bias: (C_out,), added to the result.
        relu: whether of the result only what is positive is wanted, zero elsewhere.

    Example:
        >>> conv3d(torch.ones(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1, 2)).flatten()
        tensor([2., 2., 2.])
    """
    geometry = _geometry(stride, padding, dilation, weight)
    return _call("conv3d", x, weight, bias, *geometry, groups, relu, kernel)


def max_pool3d(
    x: Tensor,
    kernel_size: Triple,
    *,
    stride: Triple | None = None,
    padding: Triple = 0,
    dilation: Triple = 1,
    ceil_mode: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The max pooling itself, for the way forward: every window's largest element, or NaN where it has one; the type of ``x``.

    Windows that lie in the padding alone are -inf.

    Args:
        x: the input (N, C, T, H, W).
        kernel_size: of the windows, one number or one per dimension.
        stride: as in `max_pool3d_relevance`, and so are all further arguments and the errors.

    Example:
        >>> max_pool3d(torch.tensor([1.0, 3.0, 0.0, -2.0]).view(1, 1, 1, 1, 4), (1, 1, 2)).flatten()
        tensor([3., 0.])
    """
    return _call("max_pool3d", x, *_pooling(kernel_size, stride, padding, dilation), ceil_mode, kernel)


def frozen_z_plus_conv3d(
    x: Tensor,
    weight: Tensor,
    relevance: Tensor,
    reads: Table,
    gives: Table,
    times: int,
    *,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | Literal["same"] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    non_negative: bool = False,
    stabilizer: float = 0.0,
    divided: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of a convolution's input by z+, in a layer of a frozen clip, whose equal times are kept once.

    Output time q reads by tap j time ``reads[q][j]`` of ``x`` (zeros for -1), and passes what falls to it on to time
    ``gives[q][j]`` of the result (to nobody for -1)::

        s[q]    = R[q] / sum over j of  A_j(x[reads[q][j]])
        R_in[t] = x * sum over q and j with gives[q][j] = t of  adjoint(A_j)(s[q])

    A product that several q share is taken once. One time of ``x`` may stand for several of the result, never the other way
    round.

    Args:
        x: the input (N, C, times that differ, H, W).
        weight: (C_out, C / groups, kT, kH, kW), of the type of ``x``.
        relevance: of the output, (N, C_out, Q, H', W').
        reads: times of ``x``, as (1 or N, Q, kT).
        gives: times of the result, likewise.
        times: how many times the result has.
        stride: of the convolution along H and W, one number or two.
        padding: zeros around H and W: one number, two, four (front and back of H, of W), or "same".
        dilation: of the convolution along H and W.
        bias: as in `z_plus_conv3d`, and so are all further arguments and the errors.

    Returns:
        Relevance of the input, (N, C, times, H, W).

    Example:
        >>> x, weight = torch.rand(1, 3, 1, 8, 8), torch.randn(5, 3, 3, 3, 3)  # eight equal frames, padded by one
        >>> reads = [[(-1, 0, 0), (0, 0, 0), (0, 0, -1)]]  # the first output time, all in the middle, the last
        >>> frozen_z_plus_conv3d(x, weight, torch.rand(1, 5, 3, 8, 8), reads, reads, 1, padding=1).shape
        torch.Size([1, 3, 1, 8, 8])
    """
    geometry = _flat_geometry(stride, padding, dilation, weight)
    options = (groups, non_negative, stabilizer, divided)
    tables = (_flat("reads", reads), _flat("gives", gives), times)
    return _call("frozen_z_plus_conv3d", x, weight, bias, relevance, *tables, *geometry, *options, kernel)


def frozen_z_beta_conv3d(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    relevance: Tensor,
    reads: Table,
    gives: Table,
    times: int,
    *,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | Literal["same"] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    stabilizer: float = 0.0,
    divided: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of pixels in a box by z-beta, in a layer of a frozen clip, whose equal times are kept once.

    Args:
        x: pixels (N, C, times that differ, H, W).
        low: the darkest possible pixel, as in `z_beta_conv3d`.
        high: the brightest possible pixel, likewise.
        weight: as in `frozen_z_plus_conv3d`, and so are all further arguments, the result and the errors.

    Example:
        >>> x, weight = torch.rand(1, 3, 1, 8, 8), torch.randn(5, 3, 3, 3, 3)
        >>> reads, gives = [[(-1, 0, 0), (0, 0, 0)]], [[(-1, 0, 1), (0, 1, 2)]]
        >>> low, high = torch.zeros(1), torch.ones(1)
        >>> frozen_z_beta_conv3d(x, low, high, weight, torch.rand(1, 5, 2, 8, 8), reads, gives, 3, padding=1).shape
        torch.Size([1, 3, 3, 8, 8])
    """
    geometry = _flat_geometry(stride, padding, dilation, weight)
    options = (groups, stabilizer, divided)
    tables = (_flat("reads", reads), _flat("gives", gives), times)
    return _call("frozen_z_beta_conv3d", x, low, high, weight, bias, relevance, *tables, *geometry, *options, kernel)


def frozen_max_pool3d_relevance(
    x: Tensor,
    relevance: Tensor,
    kernel_size: Triple,
    reads: Table,
    gives: Table,
    times: int,
    *,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    winner_takes_all: bool = False,
    stabilizer: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """Relevance of a max pooling's input, in a layer of a frozen clip, whose equal times are kept once.

    Window q reads by tap j along T time ``reads[q][j]`` of ``x`` (nothing for -1), and passes what falls to it on to time
    ``gives[q][j]`` of the result (to nobody for -1).

    Args:
        x: the pooling's input (N, C, times that differ, H, W).
        relevance: of its output (N, C, Q, H', W').
        kernel_size: of the windows, one number or one per dimension.
        reads: times of ``x``, as (1 or N, Q, kT).
        gives: times of the result, likewise.
        times: how many times the result has.
        stride: between windows along H and W, one number or two; None: that of ``kernel_size``.
        padding: around H and W; padded elements take no share.
        dilation: between the elements of a window along H and W.
        ceil_mode: as in `max_pool3d_relevance`, and so are all further arguments and the errors.

    Returns:
        Relevance of the input, (N, C, times, H, W).

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
        >>> reads = [[(-1, 0), (0, 0), (0, 1)]]
        >>> frozen_max_pool3d_relevance(x, torch.full((1, 1, 3, 1, 1), 8.0), (2, 1, 1), reads, reads, 2).flatten()
        tensor([18.,  6.])
    """
    kernel_size, *geometry = _flat_pooling(kernel_size, stride, padding, dilation)
    tables = (_flat("reads", reads), _flat("gives", gives), times)
    options = (winner_takes_all, stabilizer)
    return _call(
        "frozen_max_pool3d_relevance", x, relevance, *tables, kernel_size, *geometry, ceil_mode, *options, kernel
    )


def frozen_conv3d(
    x: Tensor,
    weight: Tensor,
    reads: Table,
    *,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | Literal["same"] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    relu: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The convolution of a frozen clip's layer, whose equal times are kept once: ``out[q] = sum over j of A_j(x[reads[q][j]])``.

    Args:
        x: the input (N, C, times that differ, H, W).
        weight: as in `frozen_z_plus_conv3d`, and so are all further arguments.
        reads: times of ``x``, as (1 or N, Q, kT).
        bias: (C_out,), added to the result.
        relu: whether of the result only what is positive is wanted, zero elsewhere.

    Returns:
        (N, C_out, Q, H', W').

    Example:
        >>> frames = torch.tensor([1.0, 5.0]).view(1, 1, 2, 1, 1)
        >>> reads = [[(-1, 0), (0, 0), (0, 1)]]
        >>> frozen_conv3d(frames, torch.ones(1, 1, 2, 1, 1), reads).flatten()
        tensor([1., 2., 6.])
    """
    geometry = _flat_geometry(stride, padding, dilation, weight)
    times = len(reads[0]) if len(reads) else 0
    return _call("frozen_conv3d", x, weight, bias, _flat("reads", reads), times, *geometry, groups, relu, kernel)


def frozen_max_pool3d(
    x: Tensor,
    kernel_size: Triple,
    reads: Table,
    *,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The max pooling of a frozen clip's layer, whose equal times are kept once: window q reads times ``reads[q]`` of ``x``.

    Args:
        x: the input (N, C, times that differ, H, W).
        kernel_size: of the windows, one number or one per dimension.
        reads: times of ``x``, as (1 or N, Q, kT); -1 for none.
        stride: as in `frozen_max_pool3d_relevance`, and so are all further arguments and the errors.

    Returns:
        (N, C, Q, H', W').

    Example:
        >>> frames = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
        >>> frozen_max_pool3d(frames, (2, 1, 1), [[(-1, 0), (0, 0), (0, 1)]]).flatten()
        tensor([1., 1., 3.])
    """
    times = len(reads[0]) if len(reads) else 0
    geometry = _flat_pooling(kernel_size, stride, padding, dilation)
    return _call("frozen_max_pool3d", x, _flat("reads", reads), times, *geometry, ceil_mode, kernel)


def _call(name: str, *arguments: Any) -> Tensor:
    """An operator of one result."""
    result = _dispatch(name, *arguments)
    assert isinstance(result, Tensor)
    return result


def _dispatch(name: str, *arguments: Any) -> Any:
    """The operator; kernel "reference" (always the last argument) asks for its definition, on any device."""
    x, kernel = arguments[0], arguments[-1]
    # CUDA's convolutions run on tensor cores, which float64 would gain nothing from.
    uncompiled = x.is_cuda and x.dtype == torch.float64 and name.endswith("conv3d")
    if kernel == "reference" or (kernel == "auto" and uncompiled):
        with torch.no_grad():
            return _DEFINITIONS[name](*arguments)
    return getattr(torch.ops.captum_dtd, name).default(*arguments)


def _triple(name: str, value: Triple) -> list[int]:
    values = [value] * 3 if isinstance(value, int) else list(value)
    if len(values) != 3:
        raise RuntimeError(f"{name} must be one number or three (T, H, W), got {value!r}")
    return values


def _geometry(
    stride: Triple, padding: Triple | Literal["same"], dilation: Triple, weight: Tensor
) -> tuple[list[int], list[int], list[int]]:
    stride, dilation = _triple("stride", stride), _triple("dilation", dilation)
    check(weight.dim() == 5, f"weight must have 5 dimensions, got shape {tuple(weight.shape)}")
    if isinstance(padding, str):
        check(padding == "same", f"padding must be numbers or 'same', got {padding!r}")
        check(stride == [1, 1, 1], f"padding='same' needs stride 1, got {stride}")
        around = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return stride, [side for total in around for side in (total // 2, total - total // 2)], dilation
    if isinstance(padding, int) or len(padding) == 3:
        return stride, [side for side in _triple("padding", padding) for _ in range(2)], dilation
    if len(padding) != 6:
        raise RuntimeError(f"padding must be one, three or six numbers or 'same', got {padding!r}")
    return stride, list(padding), dilation


def _flat_geometry(
    stride: Pair, padding: Pair | Literal["same"], dilation: Pair, weight: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """That of a convolution which by itself does nothing along T."""
    check(weight.dim() == 5, f"weight must have 5 dimensions, got shape {tuple(weight.shape)}")
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if not isinstance(padding, (int, str)) and len(padding) == 4:
        sides: Sequence[int] | Literal["same"] = [0, 0, *padding]
    elif isinstance(padding, str):
        sides = padding
    else:
        sides = [0, *_pair("padding", padding)]
    return _geometry([1, *stride], sides, [1, *dilation], weight[:, :, :1])


def _pooling(kernel_size: Triple, stride: Triple | None, padding: Triple, dilation: Triple) -> tuple[list[int], ...]:
    size = _triple("kernel_size", kernel_size)
    steps = size if stride is None else _triple("stride", stride)
    return size, steps, _triple("padding", padding), _triple("dilation", dilation)


def _flat_pooling(kernel_size: Triple, stride: Pair | None, padding: Pair, dilation: Pair) -> tuple[list[int], ...]:
    """Kernel size, stride, padding and dilation of windows that by themselves do nothing along T."""
    size = _triple("kernel_size", kernel_size)
    steps = size[1:] if stride is None else _pair("stride", stride)
    return size, [1, *steps], [0, *_pair("padding", padding)], [1, *_pair("dilation", dilation)]


def _pair(name: str, value: Pair) -> list[int]:
    values = [value] * 2 if isinstance(value, int) else list(value)
    if len(values) != 2:
        raise RuntimeError(f"{name} must be one number or two (H, W), got {value!r}")
    return values


def _flat(name: str, table: Table) -> list[int]:
    sizes = {(len(row), len(times)) for row in table for times in row} | {
        (len(row), 0) for row in table if not len(row)
    }
    check(len(sizes) == 1, f"{name} must have the same number of output times and taps in every row, got {table}")
    return [time for row in table for times in row for time in times]


def memory_format(x: Tensor) -> torch.memory_format:
    """What results are laid out in: channels_last_3d where each frame of x is (and x is not contiguous as well), else contiguous.

    Frames may be apart, or one and the same, as in a slice along time or a frozen clip.

    Example:
        >>> x = torch.rand(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
        >>> memory_format(x[:, :, 1:3]), memory_format(x[:, :, :1].expand(2, 3, 4, 5, 6))
        (torch.channels_last_3d, torch.channels_last_3d)
    """
    if x.ndim != 5 or not x.numel() or x[:1].is_contiguous():
        return torch.contiguous_format
    is_channels_last = x[:1, :, :1].is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if is_channels_last else torch.contiguous_format


def empty_like_x(x: Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
    """A result in x's layout, not yet written."""
    return torch.empty(
        x.shape if shape is None else shape, dtype=dtype, device=x.device, memory_format=memory_format(x)
    )


def _only_definition(kernel: str) -> None:
    check(
        kernel in ("auto", "reference"),
        f"kernel {kernel!r} does not exist here: there is 'reference'"
        + "".join(f"; the compiled {device} kernels are not loaded ({why})" for device, why in native.missing.items()),
    )


def _fake(schema: str) -> Callable[..., Any]:
    """The fake kernel of an operation: checks whatever its schema says that it is given, and makes room for the result."""
    names = re.findall(r"(\w+)[,)]", schema.partition(" -> ")[0])

    def fake(*arguments: Any) -> Any:
        given = dict(zip(names, arguments, strict=True))
        x, stabilizer = given["x"], given.get("stabilizer", 0.0)
        relevance: Any = given.get("relevance")
        if "other" in given:
            check_add(x, given["other"], relevance, given["alpha"], stabilizer)
            return empty_like_x(x, relevance.dtype), empty_like_x(x, relevance.dtype)
        is_frozen = "reads" in given
        times = None if not is_frozen else given["times"] if relevance is None else times_of(relevance)
        geometry = given["stride"], given["padding"], given["dilation"]
        if "weight" in given:
            weight, bias, groups = given["weight"], given["bias"], given["groups"]
            shape = check_conv3d(x, weight, bias, relevance, *geometry, groups, stabilizer, times)
            taps = weight.shape[2]
        else:
            size, ceil_mode = given["kernel_size"], given["ceil_mode"]
            shape = check_max_pool3d(x, relevance, size, *geometry, ceil_mode, stabilizer, times)
            taps = size[0]
        if relevance is None:
            if times is not None:
                check_table("reads", given["reads"], x.shape[0], times, taps, x.shape[2])
            return empty_like_x(x, x.dtype, shape)
        if "low" in given:
            check_bounds(x, given["low"], given["high"], relevance)
        if not is_frozen:
            return empty_like_x(x, relevance.dtype)
        check_tables(x, taps, relevance, given["reads"], given["gives"], given["times"])
        return empty_like_x(x, relevance.dtype, (*x.shape[:2], given["times"], *x.shape[3:]))

    return fake


def _definition(fake: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operator in plain ATen: the checks and the layout of its fake kernel, filled in."""

    def define(*arguments: Any) -> Any:
        _only_definition(arguments[-1])
        with exact_products():
            return tree_map(Tensor.copy_, fake(*arguments), compute(*arguments[:-1]))

    return define


_FAKES = {name: _fake(schema) for name, schema in SCHEMAS.items()}
_DEFINITIONS = {name: _definition(fake, getattr(reference, name)) for name, fake in _FAKES.items()}

_Library: Any = torch.library.Library
_library = _Library("captum_dtd", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(_name, _DEFINITIONS[_name], "CompositeExplicitAutograd")
    # Without this, torch hands out results that require grad and have none.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"captum_dtd::{_name}", _FAKES[_name], lib=_library)

native.load()
