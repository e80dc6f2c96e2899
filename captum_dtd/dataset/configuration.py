"""Everything that decides what is in a store: written down, hashed, and compared before a run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from captum_dtd.inputs import check_option
from captum_dtd.recipe import Recipe

__all__ = ["MAPS", "Configuration", "Encoding", "target_column", "weights_digest"]

MAPS = ("spatial", "temporal", "total")
"""The three maps of a clip, of which two are stored: total = spatial + temporal."""

Encoding: TypeAlias = Literal["float32", "float16", "int8"]
"""How a map's values are stored; see `captum_dtd.dataset.encoding`."""


@dataclass(frozen=True)
class Configuration:
    """What a store's maps and rows follow from, beside the videos.

    Attributes:
        recipe: model, preprocessing and method.
        weights_digest: see `weights_digest`.
        preprocessing: the recipe's, completed by what comes with the model.
        classes: class names in the order of the model's outputs, None if not known.
        target: "label", "top1" (the model's class for the clip), "video" (its class for the mean over the video's clips) or
            "column:NAME".
        lists: the lists of videos that were taken, none for all.
        clip_stride: frames of the video from the start of one clip to the start of the next.
        maps: the two maps that are stored, or none.
        encoding: how.
        batch_clips: clips explained together.
        internal_batch_size: how many of their frozen clips are explained together.
        shard_clips: clips committed together, a multiple of ``batch_clips``.
        device: "cpu" or "cuda": their results differ in the last bits.
        version: of captum_dtd.

    Raises:
        ValueError: an option that does not exist, a number below 1, or shards that batches would cross.
    """

    recipe: Recipe
    weights_digest: str
    preprocessing: Mapping[str, Any]
    classes: tuple[str, ...] | None
    target: str
    lists: tuple[str, ...]
    clip_stride: int
    maps: tuple[str, ...]
    encoding: Encoding
    batch_clips: int
    internal_batch_size: int
    shard_clips: int
    device: str
    version: str

    def __post_init__(self) -> None:
        if target_column(self.target) is None:
            check_option("target", self.target, ("label", "top1", "video", "column:NAME"))
        check_option("encoding", self.encoding, get_args(Encoding))
        if self.maps and (len(set(self.maps)) != 2 or not set(self.maps) <= set(MAPS)):
            raise ValueError(f"maps must be two of {', '.join(MAPS)}, or none, not {', '.join(self.maps)}")
        for name in ("clip_stride", "batch_clips", "internal_batch_size", "shard_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.shard_clips % self.batch_clips:
            raise ValueError(
                f"shard_clips ({self.shard_clips}) must be a multiple of batch_clips ({self.batch_clips}): batches do not "
                "cross shards"
            )

    @property
    def shares_frames(self) -> bool:
        """Whether clips overlap so far that every frame is in more than two of them, and is better explained once for all."""
        frames, stride = int(self.preprocessing["frames"]), int(self.preprocessing["stride"])
        clips_of_a_frame = frames * stride / math.lcm(self.clip_stride, stride)
        return clips_of_a_frame > 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON stores and :meth:`from_dict` reads."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Configuration:
        """From what :meth:`to_dict` gave.

        Raises:
            ValueError: values are missing or unknown, as in a store that another version made.
        """
        known = {field.name for field in fields(cls)}
        if known != set(values):
            raise ValueError(f"not a configuration that this version knows: {sorted(known ^ set(values))} differ")
        recipe = {**values["recipe"], "classes": _names(values["recipe"]["classes"])}
        return cls(
            **{
                **values,
                "recipe": Recipe(**recipe),
                "classes": _names(values["classes"]),
                "lists": tuple(values["lists"]),
                "maps": tuple(values["maps"]),
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 16 hexadecimal digits: what the rows of the manifest name."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Configuration) -> list[str]:
        """What ``other`` has changed, as "name: before -> after"."""
        before, after = _flat(self.to_dict()), _flat(other.to_dict())
        names = sorted(before.keys() | after.keys())
        return [
            f"{name}: {json.dumps(before.get(name))} -> {json.dumps(after.get(name))}"
            for name in names
            if before.get(name) != after.get(name)
        ]


def target_column(target: str) -> str | None:
    """The table's column that holds targets, None if the target is no column.

    Example:
        >>> target_column("column:action"), target_column("top1")
        ('action', None)
    """
    return target.removeprefix("column:") if target.startswith("column:") else None


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers with their names and types, 16 hexadecimal digits.

    Example:
        >>> from captum_dtd.models import c3d_mini
        >>> model = c3d_mini()
        >>> digest = weights_digest(model)
        >>> model.fc2.bias.data[0] += 1
        >>> weights_digest(model) == digest
        False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _names(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"preprocessing.frames": 16, ...}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
