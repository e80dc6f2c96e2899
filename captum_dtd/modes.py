"""Torch's modes and switches: set aside while models are traced and relevance computed, which the caller's must not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["exact_modes", "exact_products", "plain_modes"]


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


_lock = threading.Lock()
_inside = 0
_restore: list[Callable[[], None]] = []


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
