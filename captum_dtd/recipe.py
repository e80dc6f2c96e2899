"""How clips are explained, by names alone: what a command line gives, a record keeps, and any process can load."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_dtd.discriminate import DiscriminativeDeepTaylor
from captum_dtd.models import load_model
from captum_dtd.video import Preprocessing

__all__ = ["Explainer", "Recipe", "class_index", "device_named", "read_classes"]


def device_named(name: str | torch.device) -> torch.device:
    """A device by its name, be it here or not.

    Raises:
        ValueError: if there is none of that name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:1, ..., not {name!r}") from error


@dataclass(frozen=True)
class Recipe:
    """A model, its preprocessing and the method's settings, by name.

    Attributes:
        model: as :func:`captum_dtd.models.load_model` takes it: "c3d_mini", "r3d_18", "package.module:function", ...
        weights: a checkpoint's path or name; None as for ``load_model``.
        num_classes: number of the model's outputs, where it is not the published one.
        classes: class names in the order of the outputs; None takes those that come with the model.
        preprocessing: what differs from the preprocessing that comes with the model, in the words of
            :meth:`Preprocessing.from_dict`; for a model of your own at least size, mean, std and frames.
        preset, readout, normalize, precision: as for `DiscriminativeDeepTaylor`; None is its default.
        composite: as for `DiscriminativeDeepTaylor`, a name.

    Example:
        >>> explainer = Recipe("c3d_mini", weights="weizmann").load("cpu")
        >>> explainer.classes[1], explainer.prepare.frames
        ('jack', 16)
    """

    model: str
    weights: str | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    readout: str | None = None
    normalize: str | None = None
    composite: str = "dtd"
    precision: str | None = None

    @property
    def default_target(self) -> str:
        """What to explain where nobody says: ``"video"``, as the preset's authors do (see `explain_dataset`), else ``"top1"``."""
        return "video" if self.preset == "hiley2019" else "top1"

    def load(self, device: str | torch.device) -> Explainer:
        """The model on a device, and what else it takes to explain its clips.

        Weights that no checkpoint gives are random, and the same in every process that loads the recipe.

        Raises:
            ValueError, TypeError, OSError, ImportError: as ``load_model``, :class:`Preprocessing` and
                `DiscriminativeDeepTaylor` do, no preprocessing is known for the model, or there is no such device.
        """
        device = device_named(device)
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA raise the latter
            raise ValueError(f"device {str(device)!r} does not compute here: {str(error).splitlines()[0]}") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            named = len(self.classes) if self.classes else None
            loaded = load_model(self.model, self.weights, named if self.num_classes is None else self.num_classes)
        prepare = self._preprocessing(loaded.preprocessing)
        model = loaded.model.to(device).eval()
        settings = {
            name: getattr(self, name)
            for name in ("preset", "readout", "normalize", "precision")
            if getattr(self, name) is not None
        }
        method = DiscriminativeDeepTaylor(model, *prepare.bounds, composite=self.composite, **settings)
        return Explainer(self, method, prepare, self.classes or loaded.classes, loaded.weights, device)

    def _preprocessing(self, known: Mapping[str, Any] | None) -> Preprocessing:
        """What the model's weights come with, changed by what the user gave."""
        given = dict(self.preprocessing)
        settings = Preprocessing.from_dict(known).to_dict() if known else {}
        if "size" in given:
            settings.pop("resize", None)
        settings |= given
        missing = [f"--{name}" for name in ("size", "mean", "std", "frames") if name not in settings]
        if missing:
            raise ValueError(
                f"no preprocessing is known for {self.model}: give {' '.join(missing)} "
                "(and --scale, --stride, --channels, --order where they are not 1, 1, 3, RGB)"
            )
        return Preprocessing.from_dict(settings)


@dataclass(frozen=True)
class Explainer:
    """A loaded :class:`Recipe`.

    Attributes:
        recipe: what it was loaded from.
        method: the attribution method, holding the model.
        prepare: from a clip's pixels to the model's input.
        classes: class names in the order of the outputs, None if they are not known.
        weights: where they come from, in words or as a path.
        device: where the model is.
    """

    recipe: Recipe
    method: DiscriminativeDeepTaylor
    prepare: Preprocessing
    classes: tuple[str, ...] | None
    weights: str
    device: torch.device

    @property
    def model(self) -> nn.Module:
        """The network, in evaluation mode."""
        return self.method.model

    def outputs(self, inputs: Tensor) -> Tensor:
        """(clips, classes): what the model says about prepared clips.

        Raises:
            ValueError: the model cannot run on them, or does not return one row of class scores for each.
        """
        try:
            with torch.no_grad():
                outputs = self.model(inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the model cannot run on a clip of shape {tuple(inputs.shape)}: {reason}") from error
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"the model must return a tensor (clips, classes), not {shape}")
        if self.classes and len(self.classes) != outputs.shape[1]:
            raise ValueError(
                f"there are {len(self.classes)} class names, but {self.recipe.model} has {outputs.shape[1]} outputs"
            )
        return outputs

    def scores(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """(clips, classes): what is explained of prepared clips: logits, also where the model's outputs are probabilities."""
        logits = self.method.method.logits(inputs)
        return outputs if logits is None else logits


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a file, one per line, in the order of the model's outputs.

    Where every line begins with a number, and they run from 0 or from 1 on, as in UCF-101's classInd.txt, these are the order,
    whatever the lines' is, and no part of the names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text file, or there are no names in it.
    """
    try:
        # Windows' editors put a mark in front
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path} is not a text file") from error
    if not lines:
        raise ValueError(f"--classes {path} has no names in it")
    matches = [re.fullmatch(r"(\d+)\s+(.+)", line) for line in lines]
    numbered = {int(match[1]): match[2] for match in matches if match}
    if any(sorted(numbered) == list(range(first, first + len(lines))) for first in (0, 1)):
        return tuple(numbered[number] for number in sorted(numbered))
    return tuple(lines)


def classes_named(text: str, classes: Sequence[str]) -> list[int]:
    """The indices of the classes of this name; upper and lower case count only where classes differ in nothing else.

    Example:
        >>> classes_named("jump rope", ["Bowling", "Jump Rope"]), classes_named("0", ["Bowling", "Jump Rope"])
        ([1], [])
    """
    exact = [index for index, name in enumerate(classes) if name == text]
    return exact or [index for index, name in enumerate(classes) if name.casefold() == text.casefold()]


def class_index(text: str, classes: Sequence[str] | None, count: int, given_as: str = "--target") -> int:
    """The index of a class that is given by its name, or by its index.

    Upper and lower case count only where classes differ in nothing else.

    Args:
        text: name or index.
        classes: the names, None if they are not known.
        count: number of classes.
        given_as: what the error message calls the text.

    Raises:
        ValueError: there is no such class, or there are several.

    Example:
        >>> class_index("jump rope", ["Bowling", "Jump Rope"], 2), class_index("0", None, 2)
        (1, 0)
    """
    found = classes_named(text, classes or ())
    if len(found) > 1:
        raise ValueError(f"{given_as} {text}: classes {', '.join(map(str, found))} are called so; give an index")
    if found:
        return found[0]
    if re.fullmatch(r"-?\d+(\.0+)?", text):  # pandas writes the numbers of a column with gaps like 3.0
        index = int(text.partition(".")[0])
        if not 0 <= index < count:
            raise ValueError(f"{given_as} {text} is out of range: the model has classes 0 to {count - 1}")
        return index
    if not classes:
        raise ValueError(f"{given_as} {text}: this model's class names are not known; give an index or --classes FILE")
    names = {name.casefold(): name for name in reversed(classes)}
    close = difflib.get_close_matches(text.casefold(), names, n=3, cutoff=0.5)
    shown = [names[name] for name in close] or list(classes[:10])
    raise ValueError(
        f"{given_as} {text} is no class of this model; {'did you mean' if close else 'classes are'}: "
        f"{', '.join(shown)}{'' if close or count <= 10 else ', ...'}"
    )
