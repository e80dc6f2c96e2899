"""Deep Taylor decomposition as one writes it in plain PyTorch, without captum_dtd: what its speed is measured against.

The forward pass keeps what the way back reads. Then each layer takes its relevance R to its inputs u: a convolution with
v+ = max(v, 0) for the denominators z, a division, and the convolution's adjoint; z-beta, with three of each, at the pixels;
shares by positive parts in sums and pools. `torch.fx` tells the order of the layers, and batch norms are folded.

It covers what the benchmarked networks are made of, clips (N, C, T, H, W) after a ReLU, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn import grad
from torch.nn.utils.fusion import fuse_conv_bn_eval

aten = torch.ops.aten

adjoint: Callable[..., Tensor] = grad.conv3d_input
"""Of a convolution: the shape of its input, its weights, what is pulled back, and its geometry."""


@dataclass(frozen=True)
class Layer:
    """One operation.

    Attributes:
        run: its inputs to its output.
        share: relevance of the output and the inputs to relevance of each input.
        reads: whether `share` reads the inputs' values, or their shapes alone.
    """

    run: Callable[..., Tensor]
    share: Callable[..., tuple[Tensor, ...]]
    reads: bool = True


@dataclass(frozen=True)
class Step:
    """A layer at its place: the names of its output and of its inputs."""

    name: str
    sources: tuple[str, ...]
    layer: Layer
    last_reads: tuple[str, ...]  # values that nothing needs any more once it has run


class PlainWalk:
    """A network, ready to be explained.

    Args:
        model: a 3D CNN in evaluation mode that `torch.fx` can trace.
        low: darkest possible pixel, one value per channel.
        high: brightest possible pixel.

    Raises:
        ValueError: for an operation that is not covered.

    Example::

        walk = PlainWalk(r3d_18().eval(), low=(-2.0,) * 3, high=(2.0,) * 3)
        walk(torch.rand(1, 3, 16, 112, 112), target=7).shape  # (1, 3, 16, 112, 112)
    """

    def __init__(self, model: nn.Module, low: tuple[float, ...], high: tuple[float, ...]) -> None:
        traced = fx.GraphModule(model, _Tracer().trace(model))
        _fold_batch_norms(traced)
        _average_before_the_head(traced)
        weight = next(model.parameters())
        bounds = tuple(weight.new_tensor(bound).view(1, -1, 1, 1, 1) for bound in (low, high))
        nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
        (self._input,) = (node.name for node in traced.graph.nodes if node.op == "placeholder")
        layers = {node: _layer(traced, node, bounds) for node in nodes}
        kept = {source for node in nodes if layers[node].reads for source in node.all_input_nodes}
        last = {source: node for node in nodes for source in node.all_input_nodes}
        self._steps = [
            Step(
                node.name,
                tuple(source.name for source in node.all_input_nodes),
                layers[node],
                tuple(s.name for s in node.all_input_nodes if last[s] is node and s not in kept),
            )
            for node in nodes
        ]

    def __call__(self, clip: Tensor, target: int) -> Tensor:
        """Relevance of every pixel of clips (N, C, T, H, W) for one class, from its logit."""
        values = {self._input: clip}
        for step in self._steps:
            values[step.name] = step.layer.run(*(values[source] for source in step.sources))
            for name in step.last_reads:  # the way back needs their shapes alone
                values[name] = values[name].new_empty(()).expand_as(values[name])
        logits = values[self._steps[-1].name]
        chosen = F.one_hot(torch.tensor(target, device=logits.device), logits.shape[1])
        relevance = {self._steps[-1].name: chosen.to(logits.dtype) * logits}
        for step in reversed(self._steps):
            shares = step.layer.share(relevance.pop(step.name), *(values[source] for source in step.sources))
            for source, share in zip(step.sources, shares, strict=True):
                relevance[source] = relevance[source] + share if source in relevance else share
            del values[step.name]
        return relevance[self._input]


class _Tracer(fx.Tracer):
    """Convolutions of a class of their own, as torchvision's, are one step too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv3d) or super().is_leaf_module(module, name)


def _fold_batch_norms(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.BatchNorm3d):
            (convolution,) = node.all_input_nodes
            unfolded: Any = traced.get_submodule(str(convolution.target))
            folded = fuse_conv_bn_eval(unfolded, module)
            convolution.target = f"{convolution.target}_folded".replace(".", "_")
            traced.add_module(convolution.target, folded)
            node.replace_all_uses_with(convolution)
            traced.graph.erase_node(node)


def _average_before_the_head(traced: fx.GraphModule) -> None:
    """A mean over class maps goes in front of the 1x1x1 convolution that makes them: logits of either sign share nothing."""
    for node in traced.graph.nodes:
        if node.target is not torch.mean:
            continue
        (head,) = node.all_input_nodes
        with traced.graph.inserting_before(head):
            mean = traced.graph.call_function(torch.mean, (head.args[0], (2, 3, 4), True))
        head.args = (mean,)
        node.target, node.args, node.kwargs = torch.flatten, (head, 1), {}


def _layer(traced: fx.GraphModule, node: fx.Node, bounds: tuple[Tensor, ...]) -> Layer:
    operation: Any = traced.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    if isinstance(operation, nn.Conv3d):
        first = node.all_input_nodes[0].op == "placeholder"
        return _pixel_convolution(operation, *bounds) if first else _convolution(operation)
    if isinstance(operation, nn.Linear):
        return _linear(operation)
    if isinstance(operation, nn.MaxPool3d):
        return Layer(partial(F.max_pool3d, **_window(operation)), partial(_share_pool, **_window(operation)))
    if isinstance(operation, nn.AvgPool3d):
        return Layer(partial(F.avg_pool3d, **_window(operation)), partial(_share_pool, **_window(operation)))
    to_one = isinstance(operation, nn.AdaptiveAvgPool3d) and _triple(operation.output_size) == (1, 1, 1)
    if to_one or operation is torch.mean:
        return Layer(partial(torch.mean, dim=(2, 3, 4), keepdim=True), _share_mean)
    if isinstance(operation, nn.ReLU):
        return Layer(F.relu, _pass, reads=False)
    if isinstance(operation, nn.Dropout):
        return Layer(nn.Identity(), _pass, reads=False)
    if operation in (operator.add, operator.iadd):
        return Layer(torch.add, _share_sum)
    if operation is torch.cat:
        return Layer(lambda *parts: torch.cat(parts, 1), _split, reads=False)
    if operation in ("flatten", torch.flatten):
        return Layer(partial(torch.flatten, start_dim=1), _unflatten, reads=False)
    raise ValueError(f"the plain walk does not cover {operation}, {node.name} of the traced model")


def _triple(numbers: Any) -> tuple[int, int, int]:
    first, second, third = (numbers,) * 3 if isinstance(numbers, int) else numbers
    return first, second, third


def _window(pool: Any) -> dict[str, Any]:
    return {name: _triple(getattr(pool, name)) for name in ("kernel_size", "stride", "padding")}


def _divide(relevance: Tensor, z: Tensor) -> Tensor:
    """R / z, and zero where z is zero."""
    return relevance / z.masked_fill(z == 0, torch.inf)


def _convolution(module: Any) -> Layer:
    v = module.weight.detach()
    positive = v.clamp(min=0)
    geometry = (module.stride, module.padding, module.dilation, module.groups)

    def share(relevance: Tensor, u: Tensor) -> tuple[Tensor]:
        s = _divide(relevance, F.conv3d(u, positive, None, *geometry))
        return (u * adjoint(u.shape, positive, s, *geometry),)

    bias = None if module.bias is None else module.bias.detach()
    return Layer(lambda u: F.conv3d(u, v, bias, *geometry), share)


def _pixel_convolution(module: Any, low: Tensor, high: Tensor) -> Layer:
    v = module.weight.detach()
    positive, negative = v.clamp(min=0), v.clamp(max=0)
    geometry = (module.stride, module.padding, module.dilation, module.groups)

    def share(relevance: Tensor, x: Tensor) -> tuple[Tensor]:
        darkest, brightest = low.expand_as(x), high.expand_as(x)
        z = F.conv3d(x, v, None, *geometry)
        z = z - F.conv3d(darkest, positive, None, *geometry) - F.conv3d(brightest, negative, None, *geometry)
        s = _divide(relevance, z)
        pulled = (adjoint(x.shape, w, s, *geometry) for w in (v, positive, negative))
        return (x * next(pulled) - darkest * next(pulled) - brightest * next(pulled),)

    bias = None if module.bias is None else module.bias.detach()
    return Layer(lambda x: F.conv3d(x, v, bias, *geometry), share)


def _linear(module: nn.Linear) -> Layer:
    v = module.weight.detach()
    positive = v.clamp(min=0)

    def share(relevance: Tensor, u: Tensor) -> tuple[Tensor]:
        return (u * (_divide(relevance, u @ positive.T) @ positive),)

    return Layer(lambda u: F.linear(u, v, module.bias.detach()), share)


def _share_pool(relevance: Tensor, u: Tensor, kernel_size: Any, stride: Any, padding: Any) -> tuple[Tensor]:
    """Shares by value in every window, of a maximum and of a mean alike."""
    t, h, w = padding
    padded = F.pad(u, (w, w, h, h, t, t))
    window = (kernel_size, stride, (0, 0, 0), False, True, 1)
    s = _divide(relevance, F.avg_pool3d(padded, *window))
    shares = padded * aten.avg_pool3d_backward(s, padded, *window)
    return (F.pad(shares, (-w, -w, -h, -h, -t, -t)),)


def _share_mean(relevance: Tensor, u: Tensor) -> tuple[Tensor]:
    return (u * _divide(relevance, u.sum((2, 3, 4), keepdim=True)),)


def _share_sum(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.clamp(min=0), b.clamp(min=0)
    s = _divide(relevance, a + b)
    return a * s, b * s


def _pass(relevance: Tensor, u: Tensor) -> tuple[Tensor]:
    return (relevance,)


def _split(relevance: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    return torch.split(relevance, [part.shape[1] for part in parts], 1)


def _unflatten(relevance: Tensor, u: Tensor) -> tuple[Tensor]:
    return (relevance.view(u.shape),)
