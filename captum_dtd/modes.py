"""Torch's modes and switches: set aside while models are traced and relevance computed, which the caller's must not change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from captum_dtd.locks import Lock

__all__ = ["exact_modes", "exact_products", "plain_modes", "readable_switches", "uncompiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """The same, which torch.compile leaves alone where a function calls it that is compiled: models are traced in here.

    `torch.compiler.disable` would import the compiler at once; this does where it is called, as a trace does.
    """
    disable: Any = torch._disable_dynamo  # type: ignore[attr-defined]
    disabled: _Function = disable(function)
    return disabled


@contextmanager
def plain_modes() -> Iterator[None]:
    """No gradients, no inference tensors, no autocast."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        modes.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            modes.enter_context(torch.autocast("cuda", enabled=False))
        yield


@contextmanager
def exact_modes() -> Iterator[None]:
    """`plain_modes`, and products of floats as they are."""
    with plain_modes(), exact_products():
        yield


_lock = Lock()
_inside = 0
_restore: list[Callable[[], None]] = []


def _reset_after_fork() -> None:
    """A forked process has one thread: those that were inside are gone, and leave no more."""
    global _inside
    _inside = 0
    while _restore:
        _restore.pop()()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


@contextmanager
def readable_switches() -> Iterator[None]:
    """Where the newer of torch's two interfaces was used it refuses to read the older one, as torch.export does."""
    cudnn: Any = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        precisions = [(switch, switch.fp32_precision) for switch in (cudnn.conv, cudnn.rnn)]
        torch._C._set_cudnn_allow_tf32(False)
        try:
            yield
        finally:
            for switch, precision in precisions:
                switch.fp32_precision = precision
    else:
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 and no bfloat16 in products of floats, as long as any thread is inside; the caller's settings come back after.

    They are switches of the whole process, by whichever of torch's two interfaces they were set.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _restore.extend(_set_aside())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while _inside == 0 and _restore:
                _restore.pop()()


def _set_aside() -> Iterator[Callable[[], None]]:
    """Turn everything off; how to have each switch as it was.

    The older interface first, and the newer where that does not suffice: torch refuses to read the older one, as
    `torch.export` does in any other thread, once the newer has said something else.
    """
    cudnn: Any = torch.backends.cudnn  # in part untyped
    products = torch.backends.cuda.matmul
    if torch.cuda.is_available():
        if _says_yes(lambda: cudnn.allow_tf32):
            yield partial(setattr, cudnn, "allow_tf32", True)
            cudnn.allow_tf32 = False
        if cudnn.conv.fp32_precision == "tf32":
            yield partial(setattr, cudnn.conv, "fp32_precision", "tf32")
            cudnn.conv.fp32_precision = "ieee"
    onednn: Any = torch.backends.mkldnn
    for switch in (onednn.conv, onednn.matmul):
        if switch.fp32_precision not in ("ieee", "none"):
            yield partial(setattr, switch, "fp32_precision", switch.fp32_precision)
            switch.fp32_precision = "ieee"
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface was used
        yield partial(setattr, products, "fp32_precision", products.fp32_precision)
        products.fp32_precision = "ieee"
        return
    if precision != "highest":
        own = onednn.matmul.fp32_precision  # which the older interface sets as well as the GPU's
        yield partial(setattr, onednn.matmul, "fp32_precision", own)
        yield partial(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")


def _says_yes(switch: Callable[[], bool]) -> bool:
    try:
        return switch()
    except RuntimeError:  # the newer interface has said something else
        return False
