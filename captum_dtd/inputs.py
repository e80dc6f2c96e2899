"""What a caller gives, looked at before anything is done with it: inputs, targets, further arguments, options.

Errors name the argument, what was given and what to do.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from captum._utils.common import _select_targets
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Target: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
"""What is explained, in Captum's forms: an index for all examples, one per example, or tuples of indices."""


def check_option(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_batch_size(internal_batch_size: int | None) -> None:
    """Raise TypeError unless the batch size is None or an integer, ValueError if it is below 1."""
    if internal_batch_size is not None and not isinstance(internal_batch_size, (int, np.integer)):
        raise TypeError(f"internal_batch_size must be an integer or None, got {internal_batch_size!r}")
    if internal_batch_size is not None and internal_batch_size < 1:
        raise ValueError(f"internal_batch_size must be at least 1, got {internal_batch_size}")


def check_targets(targets: Sequence[Target]) -> None:
    """Raise TypeError unless these are several targets, ValueError if there are none."""
    if isinstance(targets, (str, Tensor)) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list with a target for each explanation ([3, 7], say), got {targets!r}")
    if not targets:
        raise ValueError("targets is empty; give at least one")


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors.

    Raises:
        TypeError: if they are not tensors.
        ValueError: if there are none.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(tensor).__name__}")
    if not tensors:
        raise ValueError("inputs is an empty tuple; give at least one tensor")
    return tensors


def as_arguments(additional_forward_args: Any) -> tuple[Any, ...]:
    """Additional forward arguments as a tuple, as Captum reads them: None is none, anything else but a tuple is one."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def checked_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple of finite floating-point tensors with the same number of examples.

    Raises:
        TypeError: if they are not tensors.
        ValueError: if they are anything else than that.
    """
    tensors = as_tuple(inputs)
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout} on {tensor.device}"
            raise TypeError(
                f"inputs must be dense tensors that hold numbers, got {kind}; convert with .to_dense(), or move it to a device"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"inputs must be floating point, got {tensor.dtype} of shape {tuple(tensor.shape)}; convert with .float(), "
                f"scale and normalise it as the model expects, and order it (N, C, T, H, W){order_hint(tensor)}"
            )
        if tensor.ndim < 2:
            raise ValueError(f"inputs must have a batch dimension, (N, C, ...), got shape {tuple(tensor.shape)}")
        if len(tensor) != len(tensors[0]):
            raise ValueError(f"inputs have different numbers of examples: {[len(tensor) for tensor in tensors]}")
        # The extremes of what has NaN are NaN.
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise ValueError(f"inputs of shape {tuple(tensor.shape)} contain NaN or infinity; nothing can be explained")
    return tensors


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise ValueError if the model is in training mode: dropout and batch statistics would make relevance random.

    Modules of torch that behave alike in both modes may carry either flag: a layer just put into the model, say, or what
    torch.export and torch.fx made of one, which do what they did when they were made.
    """

    def matters(module: nn.Module) -> bool:
        own = not type(module).__module__.startswith(("torch.nn.modules.", "torch.fx.", "torch.export.", "torch.ao."))
        return own or isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU))

    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training and matters(m)]
    if training:
        raise ValueError(f"the model is in training mode ({', '.join(training[:3])}); call model.eval() first")


def order_hint(tensor: Tensor, channels: Sequence[int] = (3, 1), rank: int = 5) -> str:
    """How to bring a tensor into the order (N, C, ...) of this rank, if its shape suggests that it is in another one."""
    shape = tuple(tensor.shape)
    if len(shape) == rank and shape[1] in channels:
        return ""
    if len(shape) == rank == 5 and shape[2] in channels:
        return "; it looks like (N, T, C, H, W): pass inputs.permute(0, 2, 1, 3, 4)"
    if len(shape) == rank and shape[-1] in channels:
        order = ", ".join(map(str, (0, rank - 1, *range(1, rank - 1))))
        return f"; channels seem to come last: pass inputs.permute({order})"
    if len(shape) == rank - 1 and shape[0] in channels and shape[1] not in channels:  # else it is a batch of images
        return "; the batch dimension seems to be missing: pass inputs.unsqueeze(0)"
    if len(shape) == rank - 1 and shape[-1] in channels:
        order = ", ".join(map(str, (rank - 2, *range(rank - 2))))
        return f"; it looks like one example with channels last: pass inputs.permute({order}).unsqueeze(0)"
    if len(shape) == rank + 1 and shape[2] in channels:
        return "; it looks like several views of each example: pass inputs.flatten(0, 1), to a model that takes those"
    return ""


def layout_hint(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """What may be wrong with inputs that the model does not run on: their precision, or the order of their dimensions."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if own is not None and all(tensor.dtype != own for tensor in inputs):
        return f"; inputs are {inputs[0].dtype}, the model is {own}: convert one with .to({own})"
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if first is None:
        return ""
    names = {3: "(N, C, T)", 4: "(N, C, H, W)", 5: "(N, C, T, H, W)"}[first.weight.ndim]
    expected = f"; the model's first convolution takes {names} with C={first.in_channels}"
    # Which convolution reads which further input is not known, so their channels are guessed.
    hints = [
        order_hint(tensor, (first.in_channels,) if i == 0 else (3, 1, 2), first.weight.ndim)
        for i, tensor in enumerate(inputs)
    ]
    return expected + next(filter(None, hints), "")


def take(tensors: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    """Some examples of every tensor."""
    return tuple(tensor[rows] for tensor in tensors)


def take_arguments(extra: tuple[Any, ...], rows: slice | list[int], count: int) -> tuple[Any, ...]:
    """Some examples of additional arguments: tensors with one row per example are indexed, everything else is as it was."""

    def picked(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == count else leaf

    return tuple(pytree.tree_map(picked, argument) for argument in extra)


def take_target(target: Target, rows: Sequence[int], count: int) -> Target:
    """The target of some examples: one per example is indexed, one for all stays.

    Raises:
        ValueError: if there is neither one target for all nor one per example.
    """
    per_example = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
    if not per_example:
        return target
    assert isinstance(target, (list, Tensor))
    if len(target) != count:
        raise ValueError(f"target has {len(target)} entries for {count} examples; give one for all or one for each")
    if isinstance(target, Tensor):
        return target[torch.as_tensor(list(rows), dtype=torch.long, device=target.device)]
    return cast(Target, [target[i] for i in rows])


def target_mask(scores: Tensor, target: Target) -> Tensor:
    """Where the target is, as a mask of the output's shape; Captum's own selection decides, applied to positions.

    On the CPU, wherever the scores are: reading an index back from a GPU waits for all that it has yet to do.
    """
    positions = torch.arange(scores.numel(), device="cpu").view(scores.shape)
    count = len(scores)
    if target is None and scores.numel() != count:
        raise ValueError(
            f"target is None, but the model returns {tuple(scores.shape[1:])} scores per example; name the one to explain"
        )
    if isinstance(target, Tensor) and target.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ):
        raise ValueError(f"target must hold integers, got a tensor of {target.dtype}")
    if target is not None and not isinstance(target, (tuple, list, Tensor)):
        try:
            target = int(operator.index(target))
        except TypeError:
            raise TypeError(
                f"target must be an index, one index per example, or tuples of indices, got {type(target).__name__}"
            ) from None
    try:
        picked = _select_targets(positions, target.long().cpu() if isinstance(target, Tensor) else target)
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        classes = f"; classes are 0 to {scores.shape[-1] - 1}" if scores.ndim == 2 else ""
        raise ValueError(
            f"target {target!r} does not fit an output of shape {tuple(scores.shape)}{classes} ({error})"
        ) from None
    if picked.numel() != count:
        raise ValueError(
            f"target {target!r} names {picked.numel() // max(count, 1)} of the {tuple(scores.shape[1:])} scores per example; "
            f"name one, with a tuple of {scores.ndim - 1} indices"
        )
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device="cpu")
    mask[picked.flatten()] = True
    return mask.view(scores.shape).to(scores.device, non_blocking=True)


def signature_of(arguments: tuple[Any, ...], count: int) -> tuple[object, ...]:
    """What a trace depends on: shapes (but for the batch), types and devices of tensors, and the other arguments' values."""

    def of(leaf: Any) -> object:
        if not isinstance(leaf, Tensor):
            return (type(leaf), leaf) if getattr(type(leaf), "__hash__", None) else (type(leaf), repr(leaf))
        batched = leaf.ndim > 0 and len(leaf) == count
        return (batched, tuple(leaf.shape[1:] if batched else leaf.shape), leaf.dtype, leaf.device)

    leaves, spec = pytree.tree_flatten(arguments)
    return (str(spec), *(of(leaf) for leaf in leaves))
