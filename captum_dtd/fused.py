"""The walk's fast lane: which rule on which operation one fused operation serves, and how it is called.

What is not in the table here, or has no compiled kernel, is evaluated by `captum_dtd.layers`, the definition of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from captum_dtd import kernels, native, ops
from captum_dtd.kernels import Precision
from captum_dtd.layers import Call, Limits
from captum_dtd.nodes import operation_name
from captum_dtd.operations import ADDITIONS, AVERAGE_POOLS, CONVOLUTIONS, MAX_POOLS, aten
from captum_dtd.ops import Table
from captum_dtd.reference import accumulator
from captum_dtd.rules import MaxPoolRule, Proportional, Rule, WinnerTakesAll, ZBeta, ZPlus

Kind: TypeAlias = Literal["convolution", "linear", "max pool", "average pool", "addition"]

FUSED: dict[tuple[type, Kind], str] = {
    (ZPlus, "convolution"): "z_plus_conv3d",
    (ZPlus, "linear"): "z_plus_conv3d",
    (ZBeta, "convolution"): "z_beta_conv3d",
    (ZBeta, "linear"): "z_beta_conv3d",
    (Proportional, "max pool"): "max_pool3d_relevance",
    (WinnerTakesAll, "max pool"): "max_pool3d_relevance",
    (ZPlus, "average pool"): "max_pool3d_relevance",
    (ZPlus, "addition"): "z_plus_add",
}
"""Which fused operation serves a rule on a kind of operation. z+ on an average pooling is the proportional rule: its equal
weights cancel."""


def kind_of(node: fx.Node) -> Kind | None:
    """What kind of operation a node is to the table."""
    if node.target in CONVOLUTIONS:
        return "convolution"
    if node.target is aten.linear.default:
        return "linear"
    if node.target in MAX_POOLS:
        return "max pool"
    if node.target in ADDITIONS:
        return "addition"
    return "average pool" if node.target in AVERAGE_POOLS else None


def kernel_for(call: Call, output: Sequence[int], rule: Rule | MaxPoolRule | None, precision: Precision) -> str:
    """Name of the kernel that shares relevance at an operation; "reference" where only the definition does.

    Args:
        call: the operation with its arguments; shapes and types matter, values do not.
        output: shape of its output.
        rule: how relevance is shared.
        precision: how much may be rounded.
    """
    kind = kind_of(call.node)
    op = None if kind is None or rule is None else FUSED.get((type(rule), kind))
    if op is None:
        return "reference"
    if kind == "average pool" and rule.stabilizer:  # type: ignore[union-attr]
        return "reference"  # it is added to a window's average there, not to its sum
    return _choose(op, call, output, precision)


def forward_kernel_for(call: Call, output: Sequence[int], precision: Precision) -> str:
    """Name of the kernel that computes an operation on the way forward; "reference" for torch's own.

    Precision "mixed" is about the walk back only; forward it is "float32".
    """
    kind = kind_of(call.node)
    if kind not in ("convolution", "linear", "max pool"):
        return "reference"
    op = "max_pool3d" if kind == "max pool" else "conv3d"
    return _choose(op, call, output, "float32" if precision == "mixed" else precision)


def redistribute(
    call: Call,
    relevance: Tensor,
    rule: Rule | MaxPoolRule,
    bounds: Limits | None,
    non_negative: bool,
    kernel: str,
    divided: bool = False,
) -> tuple[Tensor, ...]:
    """Relevance of every signal that entered an operation, by the kernel that `kernel_for` named.

    With ``divided`` the relevance of a convolution or linear layer is ``R / z`` already (see `denominator`).
    """
    x = call.signals[0]
    relevance = relevance.to(accumulator(x.dtype))
    if kind_of(call.node) == "addition":
        assert isinstance(rule, ZPlus)
        dims = x.ndim - 2
        u, v, r = (_to_3d(tensor, dims) for tensor in (*call.signals, relevance))
        shares = ops.z_plus_add(u, v, r, alpha=_alpha(call), stabilizer=rule.stabilizer, kernel=kernel)
        return tuple(_from_3d(shared, x, dims) for shared in shares)
    if kind_of(call.node) in ("max pool", "average pool"):
        pool = _Pool.of(call)
        shared = ops.max_pool3d_relevance(
            _to_3d(x, pool.dims),
            _to_3d(relevance, pool.dims),
            **pool.windows,
            winner_takes_all=isinstance(rule, WinnerTakesAll),
            stabilizer=rule.stabilizer if isinstance(rule, Proportional) else 0.0,
            kernel=kernel,
        )
        return (_from_3d(shared, x, pool.dims),)
    assert isinstance(rule, (ZPlus, ZBeta))
    conv = _Convolution.of(call)
    options: dict[str, Any] = {
        **conv.geometry,
        "bias": conv.bias if rule.bias == "absorbed" else None,
        "stabilizer": rule.stabilizer,
        "divided": divided,
        "kernel": kernel,
    }
    u, r = _to_3d(x, conv.dims), _to_3d(relevance, conv.dims)
    if isinstance(rule, ZPlus):
        shared = ops.z_plus_conv3d(u, conv.weight, r, non_negative=non_negative, **options)
    else:
        assert bounds is not None
        # Where a cast leads to the pixel layer, the bounds went through it too.
        low, high = (_to_3d(bound.to(r.dtype), conv.dims) for (bound,) in bounds)
        shared = ops.z_beta_conv3d(u, low, high, conv.weight, r, **options)
    return (_from_3d(shared, x, conv.dims),)


def denominator(
    call: Call, rule: Rule, bounds: Limits | None, non_negative: bool, kernel: str, reads: Table | None = None
) -> Tensor:
    """The denominator z of z+ or z-beta, before the bias, by the kernel that `kernel_for` named.

    With ``reads`` it is that of a frozen clip's layer, which reads times of its input by this table (`ops.frozen_conv3d`).
    """
    (signal,) = call.signals
    conv = _Convolution.of(call)
    x = _to_3d(signal.to(accumulator(signal.dtype)), conv.dims)
    weight = conv.weight.to(x.dtype)
    if isinstance(rule, ZBeta):
        assert bounds is not None
        inputs = [x - _to_3d(bound.to(x.dtype), conv.dims) for (bound,) in bounds]
    else:
        inputs = [x] if non_negative else [x.clamp(min=0), x.clamp(max=0)]
    sides: list[dict[str, Any]] = [{"min": 0}, {"max": 0}]
    z, *rest = (
        _convolve(u, conv, weight.clamp(**side), None, reads, kernel) for u, side in zip(inputs, sides, strict=False)
    )
    return _from_3d(z.add_(rest[0]) if rest else z, signal, conv.dims)


def forward(call: Call, kernel: str, reads: Table | None = None, relu: bool = False) -> Tensor:
    """The output of a convolution, linear layer or max pooling, by the kernel that `forward_kernel_for` named.

    With ``reads`` it is that of a frozen clip's layer, which reads times of its input by this table (`ops.frozen_conv3d`).
    ``relu`` asks for the positive part of a convolution or linear layer.
    """
    (x,) = call.signals
    if kind_of(call.node) == "max pool":
        pool = _Pool.of(call)
        if reads is not None:
            return ops.frozen_max_pool3d(x, pool.kernel_size, reads, **pool.in_space, kernel=kernel)
        return _from_3d(ops.max_pool3d(_to_3d(x, pool.dims), **pool.windows, kernel=kernel), x, pool.dims)
    conv = _Convolution.of(call)
    return _from_3d(_convolve(_to_3d(x, conv.dims), conv, conv.weight, conv.bias, reads, kernel, relu), x, conv.dims)


def serves_frozen(kernel: str, node: fx.Node, x: Tensor) -> bool:
    """Whether a kernel serves such an operation in layers of frozen clips, which read times of x by a table."""
    op = "max_pool3d_relevance" if kind_of(node) in ("max pool", "average pool") else "conv3d"
    with _on_device_of(x):
        return kernel != "reference" and kernel in kernels.available(f"{kernels.FROZEN}{op}", x.device.type, x.dtype)


def redistribute_frozen_pool(
    call: Call, relevance: Tensor, rule: Rule | MaxPoolRule, kernel: str, tables: tuple[Table, Table, int]
) -> Tensor:
    """What `redistribute` is, at a 3D pooling that reads and gives to times by tables (see `ops.frozen_max_pool3d_relevance`).

    Args:
        tables: reads, gives, and how many times the result has.
    """
    (x,) = call.signals
    pool = _Pool.of(call)
    return ops.frozen_max_pool3d_relevance(
        x,
        relevance.to(accumulator(x.dtype)),
        pool.kernel_size,
        *tables,
        **pool.in_space,
        winner_takes_all=isinstance(rule, WinnerTakesAll),
        stabilizer=rule.stabilizer if isinstance(rule, Proportional) else 0.0,
        kernel=kernel,
    )


def redistribute_frozen(
    call: Call,
    relevance: Tensor,
    rule: ZPlus | ZBeta,
    bounds: Limits | None,
    non_negative: bool,
    kernel: str,
    tables: tuple[Table, Table, int],
    divided: bool = False,
) -> Tensor:
    """What `redistribute` is, at a convolution that reads and gives to times by tables (see `ops.frozen_z_plus_conv3d`).

    Args:
        tables: reads, gives, and how many times the result has.
    """
    (x,) = call.signals
    relevance = relevance.to(accumulator(x.dtype))
    conv = _Convolution.of(call)
    options: dict[str, Any] = {
        **conv.in_space,
        "bias": conv.bias if rule.bias == "absorbed" else None,
        "stabilizer": rule.stabilizer,
        "divided": divided,
        "kernel": kernel,
    }
    if isinstance(rule, ZPlus):
        return ops.frozen_z_plus_conv3d(x, conv.weight, relevance, *tables, non_negative=non_negative, **options)
    assert bounds is not None
    low, high = (bound.to(relevance.dtype) for (bound,) in bounds)
    return ops.frozen_z_beta_conv3d(x, low, high, conv.weight, relevance, *tables, **options)


def _convolve(
    x: Tensor,
    conv: _Convolution,
    weight: Tensor,
    bias: Tensor | None,
    reads: Table | None,
    kernel: str,
    relu: bool = False,
) -> Tensor:
    if reads is None:
        return ops.conv3d(x, weight, bias, **conv.geometry, relu=relu, kernel=kernel)
    return ops.frozen_conv3d(x, weight, reads, bias=bias, **conv.in_space, relu=relu, kernel=kernel)


@dataclass(frozen=True)
class _Convolution:
    """A convolution or linear layer (``dims`` 0) as a 3D convolution."""

    dims: int
    weight: Any
    bias: Any
    geometry: dict[str, Any]

    @staticmethod
    def of(call: Call) -> _Convolution:
        _, weight, bias, *geometry_of = call.args
        stride, padding, dilation, groups = geometry_of or (1, 0, 1, 1)  # a linear layer has none
        dims = weight.ndim - 2
        geometry = {
            "stride": _three(stride, dims, 1),
            "padding": padding if padding == "same" else _three(0 if padding == "valid" else padding, dims, 0),
            "dilation": _three(dilation, dims, 1),
            "groups": groups,
        }
        while weight.ndim < 5:
            weight = weight.unsqueeze(2)
        return _Convolution(dims, weight, bias, geometry)

    @property
    def in_space(self) -> dict[str, Any]:
        """The geometry of H and W."""
        sizes = {name: self.geometry[name] for name in ("stride", "padding", "dilation")}
        flat = {name: value if isinstance(value, str) else value[1:] for name, value in sizes.items()}
        return flat | {"groups": self.geometry["groups"]}


@dataclass(frozen=True)
class _Pool:
    """A max or average pooling as one over 3D windows."""

    dims: int
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool

    @staticmethod
    def of(call: Call) -> _Pool:
        dims = int(operation_name(call.node)[-2])
        if call.node.target in AVERAGE_POOLS:  # it has no dilation, and divisors that cancel
            (_, kernel_size, stride, padding, ceil_mode, *_), dilation = call.args, 1
        else:
            _, kernel_size, stride, padding, dilation, ceil_mode = call.args
        return _Pool(
            dims,
            _three(kernel_size, dims, 1),
            _three(stride or kernel_size, dims, 1),
            _three(padding, dims, 0),
            _three(dilation, dims, 1),
            bool(ceil_mode),
        )

    @property
    def windows(self) -> dict[str, Any]:
        """All of it, as arguments."""
        return {"kernel_size": self.kernel_size, **self._geometry(0)}

    @property
    def in_space(self) -> dict[str, Any]:
        """The geometry of H and W."""
        return self._geometry(1)

    def _geometry(self, first: int) -> dict[str, Any]:
        sizes = {name: getattr(self, name)[first:] for name in ("stride", "padding", "dilation")}
        return {**sizes, "ceil_mode": self.ceil_mode}


def _alpha(call: Call) -> float:
    """What the second summand of an addition is multiplied with."""
    sign = 1.0 if call.node.target is aten.add.Tensor else -1.0
    return sign * float(call.kwargs.get("alpha", 1))


def _three(value: Any, dims: int, neutral: int) -> list[int]:
    """Numbers for T, H, W; the dimensions that a layer lacks come first, and are neutral."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * dims if len(values) == 1 else values
    return [neutral] * (3 - dims) + values[:dims]


def _to_3d(tensor: Any, dims: int) -> Any:
    """A view (N, C, T, H, W) of a layer's input or output; for a linear layer N is everything but the features."""
    if dims == 0:
        return tensor.reshape(-1, tensor.shape[-1], 1, 1, 1)
    for _ in range(3 - dims):
        tensor = tensor.unsqueeze(2)
    return tensor


def _from_3d(tensor: Tensor, x: Tensor, dims: int) -> Tensor:
    if dims == 0:
        return tensor.reshape(*x.shape[:-1], tensor.shape[1])
    return tensor.squeeze(tuple(range(2, 5 - dims))) if dims < 3 else tensor


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """GPUs of one machine may be of several kinds: kernels are those of the current one."""
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.device_count() > 1 else nullcontext()


def _choose(op: str, call: Call, output: Sequence[int], precision: Precision) -> str:
    with _on_device_of(call.signals[0]):
        return _chosen(op, call, output, precision)


def _chosen(op: str, call: Call, output: Sequence[int], precision: Precision) -> str:
    x = call.signals[0]
    if x.device.type not in native.loaded:
        return "reference"
    if kind_of(call.node) == "addition":
        alike = all(signal.shape == x.shape and signal.dtype == x.dtype for signal in call.signals)
        return kernels.choose(op, x.device.type, x.dtype, precision) if alike and 2 <= x.ndim <= 5 else "reference"
    if len(call.signals) != 1:
        return "reference"
    if kind_of(call.node) in ("max pool", "average pool"):
        batched = x.ndim == _Pool.of(call).dims + 2
        return kernels.choose(op, x.device.type, x.dtype, precision) if batched else "reference"
    conv = _Convolution.of(call)
    if conv.weight.dtype != x.dtype or (conv.dims and x.ndim != conv.dims + 2):
        return "reference"
    size = output[2:] if conv.dims else ()
    shape = kernels.shape_class(size, conv.weight.shape, conv.geometry["stride"], conv.geometry["groups"])
    return kernels.choose(op, x.device.type, x.dtype, precision, shape)
