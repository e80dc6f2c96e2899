"""The compiled modules: loaded where they are there, and the reason kept where they are not."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODULES", "load", "loaded", "missing", "unchanging"]

MODULES = {"cpu": "captum_dtd._C", "cuda": "captum_dtd._C_cuda"}
"""Which module holds a device's kernels; importing it registers them with torch's dispatcher."""

loaded: dict[str, ModuleType] = {}
"""The compiled module of every device whose kernels are at hand."""

missing: dict[str, str] = {}
"""Why the others are not."""


def load() -> None:
    """Load the compiled modules; ``CAPTUM_DTD_DISABLE_NATIVE=1`` leaves everything to the definitions in plain ATen."""
    unbuilt = _unbuilt()
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


def _unbuilt() -> dict[str, str]:
    """What the build wrote down about modules that it could not, or should not, make."""
    record = Path(__file__).with_name("_build.json")
    return dict(json.loads(record.read_text())) if record.exists() else {}
