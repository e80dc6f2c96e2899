"""A model by name, with its weights, its classes and the preprocessing it was trained with."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from captum_dtd.models.c3d import C3D
from captum_dtd.models.c3d_mini import C3DMini, c3d_mini
from captum_dtd.models.checkpoints import load_checkpoint

__all__ = ["BUNDLED", "LoadedModel", "bundled", "load_model"]

BUNDLED = ("ucf10", "weizmann")
"""Names of the checkpoints of ``c3d_mini`` that come with the package; the first is the default."""

# All four take clips of 16 frames. Their published weights saw 15 frames per second, so of 25 to 30 every other one.
_TORCHVISION = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
_TORCHVISION_CLIP = {"frames": 16, "stride": 2}

# As in the PyTorch ports: 0..255 minus the mean colour of Sports-1M, no division. RGB as in the scripts of the method's
# authors; ports that read frames with OpenCV feed BGR, which no checkpoint shows
_C3D_PREPROCESSING: dict[str, Any] = {
    "frames": 16,
    "stride": 1,
    "resize": [128, 171],
    "size": [112, 112],
    "mean": [90.0, 98.0, 102.0],
    "std": [1.0, 1.0, 1.0],
    "scale": 255,
    "channels": 3,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be explained.

    Attributes:
        model: in evaluation mode.
        name: as it was asked for.
        classes: their names in the order of the outputs, None if they are not known.
        preprocessing: frames, stride, size, resize (where it differs from size), mean, std, scale, channels; for
            torchvision's models also ``transform``, the preset of their published weights; None for your own model.
        weights: where they come from, in words or as a path: "random", "ucf10", "/data/c3d.pth".
    """

    model: nn.Module
    name: str
    classes: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    weights: str


def bundled(name: str = BUNDLED[0]) -> tuple[C3DMini, dict[str, Any]]:
    """A trained ``c3d_mini`` from the package's own files, and what is known about it.

    Args:
        name: "ucf10" (RGB, 10 actions of UCF-101) or "weizmann" (silhouettes, 10 actions).

    Returns:
        the model, float32, in evaluation mode, and its metadata: model, num_classes, in_channels, classes (in the order
        of the outputs), frames, stride, size and resize [height, width], mean, std, scale, channels, description.

    Raises:
        ValueError: no checkpoint of that name.

    Example:
        >>> model, info = bundled("weizmann")
        >>> info["classes"][1]
        'jack'
    """
    if name not in BUNDLED:
        raise ValueError(f"no bundled checkpoint {name!r}: there are {', '.join(BUNDLED)}")
    with _bundled_path(name) as path:
        return _trained_mini(path, _description(path))


def load_model(spec: str, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None) -> LoadedModel:
    """The model that ``--model`` and ``--weights`` name, in evaluation mode.

    Args:
        spec: "c3d_mini", "c3d", a video model of torchvision ("r3d_18", "mc3_18", "r2plus1d_18", "s3d"), or
            "package.module:function" for a function of your own that returns an nn.Module, or for such a module itself; the
            current directory is searched too.
        weights: the path of a checkpoint (see :func:`load_checkpoint`); for c3d_mini also "ucf10" (what None means),
            "weizmann", or a file that benchmarks/train wrote. Nothing is ever downloaded: without weights C3D and
            torchvision's models are random, and a UserWarning says so; your own model is as your function made it.
        num_classes: where it differs from the published models' (C3D 101, torchvision 400, c3d_mini 10). A function
            of your own gets it as a keyword if it has a parameter of that name.

    Raises:
        ValueError: an unknown name, no such module or function, or weights that do not fit.
        TypeError: the function returns something that is not an nn.Module.
        FileNotFoundError: there is no such checkpoint.
        ModuleNotFoundError: a torchvision model is asked for and torchvision is not installed.

    Example::

        loaded = load_model("c3d", weights="ucf101-caffe.pth")
        loaded.preprocessing["size"]                           # [112, 112]
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if spec == "c3d_mini":
        return _load_mini(weights, num_classes)
    classes = preprocessing = None
    if spec == "c3d":
        model: nn.Module = C3D(num_classes or 101)
        preprocessing = dict(_C3D_PREPROCESSING)
    elif spec in _TORCHVISION:
        model, classes, preprocessing = _from_torchvision(spec, num_classes)
    elif ":" in spec:
        model = _from_function(spec, num_classes)
    else:
        raise ValueError(
            f"no model {spec!r}: give c3d_mini, c3d, {', '.join(_TORCHVISION)}, or package.module:function for your own"
        )
    source = "as made by its function" if ":" in spec else "random"
    if weights is not None:
        load_checkpoint(model, weights)
        source = os.fspath(weights)
    elif source == "random":
        warnings.warn(
            f"{spec} has random weights: nothing is downloaded, so give a checkpoint to explain a trained model",
            UserWarning,
            stacklevel=2,
        )
    return LoadedModel(model.eval(), spec, classes, preprocessing, source)


def _bundled_path(name: str) -> AbstractContextManager[Path]:
    return resources.as_file(resources.files("captum_dtd.models") / "weights" / f"{name}.safetensors")


_PREPROCESSING = ("frames", "stride", "resize", "size", "mean", "std", "scale", "channels")
_DESCRIBED = {"classes", "num_classes", "in_channels", *_PREPROCESSING}
"""What benchmarks/train writes about a checkpoint into its metadata."""


def _description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What benchmarks/train wrote about a checkpoint into its metadata; empty for any other file."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not metadata.keys() >= _DESCRIBED:  # another program's, which may use some of these words
        return {}
    try:
        described = {key: json.loads(value) for key, value in metadata.items()}
        counts = described["num_classes"], described["in_channels"], len(described["classes"])
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(f"num_classes, in_channels and the number of classes are {counts}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} says of itself what cannot be read ({error}); save its tensors without metadata"
        ) from error
    return described


def _trained_mini(path: str | os.PathLike[str], info: dict[str, Any]) -> tuple[C3DMini, dict[str, Any]]:
    model = c3d_mini(info["num_classes"], info["in_channels"])
    load_checkpoint(model, path)
    return model.eval(), info


def _load_mini(weights: str | os.PathLike[str] | None, num_classes: int | None) -> LoadedModel:
    source = BUNDLED[0] if weights is None else os.fspath(weights)
    if source in BUNDLED:
        model, info = bundled(source)
    elif info := _description(source):
        model, info = _trained_mini(source, info)
    else:
        model = c3d_mini(num_classes or 10)
        load_checkpoint(model, source)
        return LoadedModel(model.eval(), "c3d_mini", None, None, source)
    if num_classes not in (None, info["num_classes"]):
        raise ValueError(f"num_classes must be {info['num_classes']} for the weights {source!r}, not {num_classes}")
    preprocessing = {key: info[key] for key in _PREPROCESSING}
    return LoadedModel(model, "c3d_mini", tuple(info["classes"]), preprocessing, source)


def _from_torchvision(name: str, num_classes: int | None) -> tuple[nn.Module, tuple[str, ...] | None, dict[str, Any]]:
    try:
        from torchvision.models import get_model, get_model_weights
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the model {name} needs torchvision: pip install torchvision") from error
    published = get_model_weights(name).DEFAULT
    categories = tuple(published.meta["categories"])
    transform = published.transforms()
    preprocessing = {
        **_TORCHVISION_CLIP,
        "resize": list(transform.resize_size),
        "size": list(transform.crop_size),
        "mean": list(transform.mean),
        "std": list(transform.std),
        "scale": 1,
        "channels": 3,
        "transform": transform,
    }
    model = get_model(name, weights=None, num_classes=num_classes or len(categories))
    return model, categories if num_classes in (None, len(categories)) else None, preprocessing


def _from_function(spec: str, num_classes: int | None) -> nn.Module:
    module_name, _, function_name = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # a console script, unlike python -m, does not search there
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        if isinstance(function, nn.Module):
            return function  # made already
        takes_it = num_classes is not None and "num_classes" in inspect.signature(function).parameters
        model = function(num_classes=num_classes) if takes_it else function()
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the user's module imports
        raise ValueError(f"no module {module_name!r} for the model {spec!r}") from error
    except AttributeError as error:
        if error.name != function_name:
            raise  # inside the user's function
        raise ValueError(f"module {module_name!r} has no function {function_name!r}") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} must return an nn.Module, not {type(model).__name__}")
    return model
