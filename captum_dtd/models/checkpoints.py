"""Published checkpoints into a model: wrappers taken off, names translated by a table, all copied or nothing."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["CheckpointReport", "load_checkpoint"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # nn.DataParallel, torch.compile
_COUNTER = "num_batches_tracked"  # older batch norms do not store it, and evaluation does not use it

# Each layout is a table of (pattern of a whole key, its name in our model). The one that leaves least missing is taken.
_LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "as named": (),
    "C3D, conv1 and conv2": (
        (r"conv([12])\.(weight|bias)", r"conv\1a.\2"),
    ),
    "C3D, features and classifier": (
        (r"features\.0\.(.+)", r"conv1a.\1"),
        (r"features\.3\.(.+)", r"conv2a.\1"),
        (r"features\.6\.(.+)", r"conv3a.\1"),
        (r"features\.8\.(.+)", r"conv3b.\1"),
        (r"features\.11\.(.+)", r"conv4a.\1"),
        (r"features\.13\.(.+)", r"conv4b.\1"),
        (r"features\.16\.(.+)", r"conv5a.\1"),
        (r"features\.18\.(.+)", r"conv5b.\1"),
        (r"classifier\.0\.(.+)", r"fc6.\1"),
        (r"classifier\.3\.(.+)", r"fc7.\1"),
        (r"classifier\.6\.(.+)", r"fc8.\1"),
    ),
    "C3D, MMAction2": (
        (r"backbone\.(conv\d\w)\.conv\.(.+)", r"\1.\2"),
        (r"backbone\.(fc[67])\.(.+)", r"\1.\2"),
        (r"cls_head\.fc_cls\.(.+)", r"fc8.\1"),
    ),
    "3D-ResNet onto torchvision's names": (
        (r"conv1\.(.+)", r"stem.0.\1"),
        (r"bn1\.(.+)", r"stem.1.\1"),
        (r"(layer\d\.\d+)\.conv(\d)\.(.+)", r"\1.conv\2.0.\3"),
        (r"(layer\d\.\d+)\.bn(\d)\.(.+)", r"\1.conv\2.1.\3"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        layout: the naming that was recognised in the file.
        renamed: {key in the file: name in the model}, for keys that differ.
    """

    layout: str
    renamed: dict[str, str]


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> CheckpointReport:
    """Copy a checkpoint's weights into a model, whatever its wrapper and naming; all of them or none.

    It reads PyTorch files (always with ``weights_only=True``: no code in them is run) and safetensors, told by what
    they hold. Taken off are the wrappers ``{"state_dict": ...}``, ``{"model_state_dict": ...}``, ``{"model": ...}`` and
    the prefixes of DataParallel and torch.compile, one within the other too; sparse tensors become dense. Understood
    are the model's own names, those of the published C3D ports (onto :class:`captum_dtd.models.C3D`), and those of the
    3D-ResNet ports (onto torchvision's video ResNets). A last layer of another name is taken if it has the same shape.
    Values become the model's own dtype, on its own device.

    Equal shapes are no proof of an equal model: the 3D-ResNet ports mostly have a 7x7x7 stem, which is refused, but
    also a max pool after it, which torchvision's r3d_18 lacks and no checkpoint shows.

    Args:
        model: any module; changed only if every key fits.
        path: the checkpoint.

    Returns:
        the recognised layout, and which keys were renamed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of tensors (a pickled whole model, a corrupt file), or keys are missing,
            surplus or of the wrong shape: all of them in one message; or a weight is NaN or infinite. The model is as
            it was.

    Example::

        model = C3D(num_classes=101)
        report = load_checkpoint(model, "ucf101-caffe.pth")
        print(report.layout)                                   # C3D, features and classifier
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    stored = _unwrapped(_read(path), path)
    own = dict(model.state_dict())
    layout, names = _best_layout(stored, own)
    names = _with_renamed_head(names, stored, own)
    state = {names[key]: value for key, value in stored.items()}
    _check(state, own, names, path)
    _check_finite(state, own, names, path)
    # everything fits, so this cannot stop half way; what is missing now are only the counters
    model.load_state_dict({**own, **state})
    return CheckpointReport(layout, {key: name for key, name in names.items() if key != name})


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors" or _begins_as_safetensors(path):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text would suggest weights_only=False, which runs whatever code the file holds
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors ({found[1]}: a whole pickled model, or settings beside the weights) and is "
                "not loaded, since that would run code from it: save model.state_dict() alone"
            ) from error
        raise ValueError(f"{path} is no checkpoint that PyTorch or safetensors wrote") from error
    except (RuntimeError, EOFError, OSError, SafetensorError, LookupError, ValueError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _begins_as_safetensors(path: Path) -> bool:
    """Whatever its name: the length of a header in eight bytes, and the brace that opens it."""
    with path.open("rb") as file:
        return file.read(9)[5:] == b"\0\0\0{"


def _unwrapped(stored: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(stored, Mapping):
        inner = [stored[name] for name in _WRAPPERS if isinstance(stored.get(name), Mapping)]
        if not inner:
            break
        stored = inner[0]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(
            f"{path} holds no state_dict: expected names with tensors, alone or under {', '.join(_WRAPPERS)}"
        )
    state = {str(key): value.to_dense() for key, value in stored.items()}
    while wrapped := [prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)]:
        state = {key.removeprefix(wrapped[0]): value for key, value in state.items()}
    return state


def _best_layout(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """The layout that leaves least missing, and {key in the file: name in the model} under it."""
    candidates = [(layout, {key: _translate(key, table) for key in stored}) for layout, table in _LAYOUTS.items()]
    return min(candidates, key=lambda candidate: len(own.keys() - set(candidate[1].values())))


def _translate(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in table:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key


def _with_renamed_head(
    names: dict[str, str], stored: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, str]:
    """The only layer left over on both sides is one layer under two names, if the shapes agree."""
    missing = {name for name in own.keys() - set(names.values()) if not name.endswith(_COUNTER)}
    surplus = {key for key, name in names.items() if name not in own}
    heads = {name.rpartition(".")[0] for name in missing}
    others = {key.rpartition(".")[0] for key in surplus}
    if len(heads) != 1 or len(others) != 1:
        return names
    head, other = heads.pop(), others.pop()
    pairs = {key: f"{head}.{key.rpartition('.')[2]}" for key in surplus}
    if head != _head(own) or set(pairs.values()) != missing or f"{head}.weight" not in missing:
        return names
    # another number of classes is left to the check, which can then say so
    if stored[f"{other}.weight"].shape[1:] != own[f"{head}.weight"].shape[1:]:
        return names
    return {**names, **pairs}


def _head(own: Mapping[str, Tensor]) -> str:
    """The model's last layer, in the order in which they were defined."""
    return list(own)[-1].rpartition(".")[0]


def _check(state: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Mapping[str, str], path: Path) -> None:
    """Raise one error that names every key that is missing, surplus or misshapen."""
    origin = {name: key for key, name in names.items()}
    missing = [name for name in own if name not in state and not name.endswith(_COUNTER)]
    surplus = [origin[name] for name in state if name not in own]
    misshapen = [name for name in state if name in own and state[name].shape != own[name].shape]
    clashing = [key for key, name in names.items() if origin[name] != key]
    if not (missing or surplus or misshapen or clashing):
        return
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if surplus:
        parts.append(f"surplus: {', '.join(surplus)}")
    if misshapen:
        shapes = [f"{origin[name]} is {list(state[name].shape)}, not {list(own[name].shape)}" for name in misshapen]
        parts.append(f"of another shape: {', '.join(shapes)}")
    if clashing:
        parts.append(f"the same weights twice: {', '.join(f'{key} and {origin[names[key]]}' for key in clashing)}")
    head = _head(own)
    if misshapen and not missing and not surplus and all(name.rpartition(".")[0] == head for name in misshapen):
        parts.append(
            f"the file has {len(state[misshapen[0]])} classes: give the model num_classes={len(state[misshapen[0]])}"
        )
    raise ValueError(f"{path} does not fit the model ({'; '.join(parts)})")


def _check_finite(state: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Mapping[str, str], path: Path) -> None:
    """Raise an error that names the first tensor with a NaN or an infinity that is none of the model's own, as in masks."""
    for key, name in names.items():
        spoilt = ~state[name].to(own[name].dtype).isfinite()
        if spoilt.any() and own[name].cpu()[spoilt].isfinite().any():
            raise ValueError(f"{path} has NaN or infinite values in {key}: give a checkpoint of finite weights")
