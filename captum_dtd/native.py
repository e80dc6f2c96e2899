"""The compiled modules: loaded where they are there, and the reason kept where they are not."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from captum_dtd import kernel_sources

__all__ = ["MODULES", "digest", "load", "loaded", "missing", "refusal", "unchanging"]

MODULES = {"cpu": "captum_dtd._C", "cuda": "captum_dtd._C_cuda"}
"""Which module holds a device's kernels; importing it registers them with torch's dispatcher."""

_CHECKOUT = Path(__file__).parents[1]  # if it is one

loaded: dict[str, ModuleType] = {}
"""The compiled module of every device whose kernels are at hand."""

missing: dict[str, str] = {}
"""Why the others are not."""


def load() -> None:
    """Load the compiled modules; ``CAPTUM_DTD_DISABLE_NATIVE=1`` leaves everything to the definitions in plain ATen.

    Warns where they were built from other sources than those that lie beside the package.
    """
    record = _record()
    unbuilt = record.get("missing", {})
    for device, name in MODULES.items():
        if os.environ.get("CAPTUM_DTD_DISABLE_NATIVE", "") not in ("", "0"):
            missing[device] = "turned off by CAPTUM_DTD_DISABLE_NATIVE"
            continue
        try:
            loaded[device] = importlib.import_module(name)
        except ModuleNotFoundError:
            missing[device] = unbuilt.get(device, "they are not part of this installation")
        except ImportError as error:
            missing[device] = unbuilt.get(device, str(error))
    if (
        loaded
        and record
        and (_CHECKOUT / "setup.py").exists()
        and record.get("sources") != kernel_sources.digest(_CHECKOUT / "csrc")
    ):
        warnings.warn(
            f"{' and '.join(MODULES[device] for device in loaded)}: not built from what {_CHECKOUT / 'csrc'} holds now. Build "
            "again (make demo, or pip install --no-build-isolation --editable .), or kernels may be called wrongly",
            RuntimeWarning,
            stacklevel=2,
        )


def refusal(device: str) -> str:
    """Why a device's compiled kernels do not run on it, though they are at hand; empty where they do.

    A GPU may be older than they are made for (compute capability 8.0), or its driver older than CUDA's runtime in them. A
    warning says so once for each device.
    """
    if device != "cuda" or device not in loaded or not torch.cuda.is_available():
        return ""
    return _refusal(torch.cuda.current_device())


@cache
def _refusal(_: int) -> str:
    reason: str = loaded["cuda"].refusal()
    if reason:
        warnings.warn(
            f"the compiled CUDA kernels do not run on this GPU ({reason}): PyTorch's own operations serve, which takes longer "
            "and more memory",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


@contextmanager
def unchanging(weights: Iterable[Any]) -> Iterator[None]:
    """Promise that nothing is written to weights meanwhile: this thread's kernels look through each of them once.

    Without it they do at every call, which costs as much time as reading all of a weight does.
    """
    module = loaded.get("cpu")
    if module is None:
        yield
        return
    plain = [each for each in weights if type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided]
    places = [(each.data_ptr(), each.nbytes) for each in plain if each.device.type == "cpu" and each.is_contiguous()]
    try:
        module.hold(*places)  # in here, so that no interrupt leaves them held; to release what is not held does nothing
        yield
    finally:
        module.release(*places)


def digest(tensor: Tensor) -> bytes | None:
    """16 bytes that tell a tensor's contents, at the speed of memory; the same on one machine only.

    None on other devices than the CPU, and where its module is not loaded. Of two changes one in 2^32 is not seen; one is always.
    """
    module = loaded.get("cpu")
    if module is None or tensor.device.type != "cpu":
        return None
    tensor = tensor.contiguous()
    found: bytes = module.digest(tensor.data_ptr(), tensor.nbytes)
    return found


def _record() -> dict[str, Any]:
    """What the build wrote down: why modules are missing that it could not, or should not, make, and what it made others of."""
    record = Path(__file__).with_name("_build.json")
    return dict(json.loads(record.read_text())) if record.exists() else {}
