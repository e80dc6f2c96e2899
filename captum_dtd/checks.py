"""What the fused operations refuse, the same on every device: definitions and fake kernels check here, compiled kernels in
csrc/checks.h, and one table of tests holds both to the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dtd.reference import accumulator

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Shape of a convolution's output; a dimension that no window fits into is not positive."""
    sizes = [
        (n + padding[2 * a] + padding[2 * a + 1] - dilation[a] * (k - 1) - 1) // stride[a] + 1
        for a, (n, k) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
    ]
    return (x.shape[0], weight.shape[0], *sizes)


def check(condition: bool, message: str) -> None:
    """Refuse, in these words, where the condition does not hold."""
    if not condition:
        raise RuntimeError(message)


def check_tensor(name: str, tensor: Tensor, dims: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor of other dimensions or another type, or on another device than x."""
    shape = tuple(tensor.shape)
    check(tensor.dim() == dims, f"{name} must have {dims} dimensions, got shape {shape}")
    check(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype} of shape {shape}")
    check(tensor.device == device, f"{name} must be on {device} as x is, got {tensor.device}")


def check_numbers(name: str, values: Sequence[int], count: int, least: int) -> None:
    """Refuse a list of another length, and numbers below the least that makes sense or beyond 31 bits."""
    check(len(values) == count, f"{name} must have {count} numbers, got {list(values)}")
    check(all(value >= least for value in values), f"{name} must be at least {least}, got {list(values)}")
    most = 2**31 - 1
    check(all(value <= most for value in values), f"{name} must be at most {most}, got {list(values)}")


def check_padded(x: Tensor, padded: Sequence[int], padding: Sequence[int]) -> None:
    """With this, no product of sizes that a kernel forms leaves 64 bits."""
    check(
        x.shape[1] * math.prod(padded) <= 2**40,
        f"padding {list(padding)} makes an example of x of shape {tuple(x.shape)} larger than 2**40 elements",
    )


def check_x(x: Tensor) -> None:
    """Refuse an input that is no batch of clips, or of a type that no kernel reads."""
    check(x.dim() == 5, f"x must have 5 dimensions (N, C, T, H, W), got shape {tuple(x.shape)}")
    check(x.dtype in _DTYPES, f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relevance: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stabilizer: float,
    times: int | None = None,
) -> tuple[int, ...]:
    """The output's shape. Refuses what is no convolution of x, and relevance not of its output, whose times a table may say."""
    check_x(x)
    check_tensor("weight", weight, 5, x.dtype, x.device)
    check_numbers("weight's kernel", weight.shape[2:], 3, 1)
    check_numbers("stride", stride, 3, 1)
    check_numbers("padding", padding, 6, 0)
    check_numbers("dilation", dilation, 3, 1)
    check(weight.shape[1] >= 1, f"weight must have at least one input channel, got shape {tuple(weight.shape)}")
    check(groups >= 1, f"groups must be at least 1, got {groups}")
    check(
        x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0,
        f"weight of shape {tuple(weight.shape)} does not fit x of shape {tuple(x.shape)} with groups={groups}",
    )
    if bias is not None:
        check_tensor("bias", bias, 1, x.dtype, x.device)
        check(
            bias.shape[0] == weight.shape[0],
            f"bias must have {weight.shape[0]} elements as weight has output channels, got {bias.shape[0]}",
        )
    check(stabilizer >= 0, f"stabilizer must be zero or positive, got {stabilizer}")
    check_padded(x, [n + padding[2 * a] + padding[2 * a + 1] for a, n in enumerate(x.shape[2:])], padding)
    expected = _output_shape(x, weight, stride, padding, dilation)
    if times is not None:
        _check_no_window_in_time(stride[0], padding[0], padding[1], dilation[0])
        expected = (*expected[:2], times, *expected[3:])
    check(
        all(size > 0 for size in expected[2:]),
        f"weight's kernel {tuple(weight.shape[2:])} with dilation {list(dilation)} does not fit into x of shape "
        f"{tuple(x.shape)} with padding {list(padding)}",
    )
    if relevance is not None:
        check_tensor("relevance", relevance, 5, accumulator(x.dtype), x.device)
        check(
            tuple(relevance.shape) == expected,
            f"relevance must have the shape {expected} of the convolution's output, got {tuple(relevance.shape)}",
        )
    return expected


def _check_no_window_in_time(stride: int, front: int, back: int, dilation: int) -> None:
    check(
        (stride, front, back, dilation) == (1, 0, 0, 1),
        "reads takes the place of stride, padding and dilation along T: they must be 1, 0 and 1, got "
        f"{stride}, ({front}, {back}) and {dilation}",
    )


def times_of(relevance: Tensor) -> int:
    """How many times an output has; `check_conv3d` refuses what has other dimensions."""
    return relevance.shape[2] if relevance.dim() == 5 else 1


def check_table(argument: str, table: Sequence[int], n: int, times: int, taps: int, size: int) -> None:
    """Times from -1 to less than ``size``, for every output time and tap, in one row for all examples or a row for each."""
    row = times * taps
    check(size >= 1, f"{argument} must be times of x, and x has none")
    check(
        len(table) in (row, max(n, 1) * row),
        f"{argument} must have {row} numbers, one for each output time and tap, or {n} times as many, got {len(table)}",
    )
    check(
        all(-1 <= time < size for time in table),
        f"{argument} must be times from 0 to {size - 1}, or -1 for none, got {list(table)}",
    )


def check_tables(
    x: Tensor, taps: int, relevance: Tensor, reads: Sequence[int], gives: Sequence[int], times: int
) -> None:
    """Refuse tables that do not fit a layer of so many taps, or say of one time of the result that it stands for two of x."""
    check(times >= 1, f"times must be at least 1, got {times}")
    n, outputs = x.shape[0], relevance.shape[2]
    check_table("reads", reads, n, outputs, taps, x.shape[2])
    check_table("gives", gives, n, outputs, taps, times)
    row = outputs * taps
    for example in range(max(len(reads), len(gives)) // row):
        read, given = (table[example * row :][:row] if len(table) > row else table for table in (reads, gives))
        stored: dict[int, int] = {}
        for source, to in zip(read, given, strict=True):
            if source < 0 or to < 0:
                continue
            known = stored.setdefault(to, source)
            check(
                known == source,
                f"gives must name a time of the result for one time of x only, got {to} for the times {known} and {source}",
            )


def check_bounds(x: Tensor, low: Tensor, high: Tensor, relevance: Tensor) -> None:
    """Refuse pixel bounds that do not broadcast to x."""
    for name, bound in (("low", low), ("high", high)):
        check_tensor(name, bound, bound.dim(), relevance.dtype, x.device)
        fits = bound.dim() <= 5 and all(
            b in (1, n) for b, n in zip(reversed(bound.shape), reversed(x.shape), strict=False)
        )
        check(fits, f"{name} of shape {tuple(bound.shape)} does not broadcast to x of shape {tuple(x.shape)}")


def check_max_pool3d(
    x: Tensor,
    relevance: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    stabilizer: float = 0.0,
    times: int | None = None,
) -> tuple[int, ...]:
    """The output's shape. Refuses what is no pooling of x, and relevance not of its output, whose times a table may say."""
    check_x(x)
    _, channels, frames, height, width = x.shape
    has_times = times is not None or frames > 0  # of a table's it is told what is wrong with it
    check(
        has_times and min(channels, height, width) > 0,
        f"x must have channels, times and positions, got {tuple(x.shape)}",
    )
    check_numbers("kernel_size", kernel_size, 3, 1)
    check_numbers("stride", stride, 3, 1)
    check_numbers("padding", padding, 3, 0)
    check_numbers("dilation", dilation, 3, 1)
    check(
        all(p <= k // 2 for p, k in zip(padding, kernel_size, strict=True)),
        f"padding must be at most half of kernel_size {list(kernel_size)}, got {list(padding)}",
    )
    check(stabilizer >= 0, f"stabilizer must be zero or positive, got {stabilizer}")
    check_padded(x, [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)], padding)
    if relevance is not None:
        check_tensor("relevance", relevance, 5, accumulator(x.dtype), x.device)
    expected = (*x.shape[:2], *map(_pooled, x.shape[2:], kernel_size, stride, padding, dilation, [ceil_mode] * 3))
    if times is not None:
        _check_no_window_in_time(stride[0], padding[0], padding[0], dilation[0])
        expected = (*expected[:2], times, *expected[3:])
    check(
        all(size > 0 for size in expected[2:]),
        f"kernel_size {list(kernel_size)} with dilation {list(dilation)} does not fit into x of shape {tuple(x.shape)} "
        f"with padding {list(padding)}",
    )
    if relevance is not None:
        check(
            tuple(relevance.shape) == expected,
            f"relevance must have the shape {expected} of the pooling's output, got {tuple(relevance.shape)}",
        )
    return expected


def check_add(x: Tensor, other: Tensor, relevance: Tensor, alpha: float, stabilizer: float) -> None:
    """Refuse summands of different shapes or types, and relevance that is not of their sum."""
    check_x(x)
    check_tensor("other", other, 5, x.dtype, x.device)
    shape = tuple(x.shape)
    check(other.shape == x.shape, f"other must have the shape {shape} of x, got {tuple(other.shape)}")
    check(math.isfinite(alpha), f"alpha must be finite, got {alpha}")
    check(stabilizer >= 0, f"stabilizer must be zero or positive, got {stabilizer}")
    check_tensor("relevance", relevance, 5, accumulator(x.dtype), x.device)
    check(
        relevance.shape == x.shape,
        f"relevance must have the shape {shape} of the sum, got {tuple(relevance.shape)}",
    )


def _pooled(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows; with ``ceil_mode`` the last must begin inside the input or its front padding, as torch has it."""
    free = n + 2 * padding - dilation * (kernel - 1) - 1
    count = (free + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= n + padding else count
