"""From a clip's pixels to a model's input, and back: which part of the source frames the model saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from captum_dtd.bounds import pixel_bounds

__all__ = ["Preprocessing"]

# ITU-R BT.601, as in the luma of the videos themselves
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop in the centre, scale and normalise: ``(pixel / 255 * scale - mean) / std``.

    Attributes:
        frames: length of a clip.
        crop: (height, width) of the model's input.
        mean, std: one per channel, in the model's order of channels and in units of ``scale``.
        stride: every stride-th frame of the video.
        resize: (height, width) before the crop, or an int for the shorter side; None resizes the frame, keeping its
            proportions, so that it just covers the crop.
        scale: what white becomes before the mean is subtracted, 1 or 255.
        channels: 3 for RGB, 1 for luma (BT.601).
        antialias: low-pass filter when the frame is made smaller.
        order: "RGB", or "BGR" for models that were trained on frames as OpenCV reads them.

    Raises:
        ValueError: at construction, a value is out of its range.

    Example:
        >>> from captum_dtd.video.synthetic import moving_figure
        >>> prepare = Preprocessing(
        ...     frames=16, crop=(112, 112), resize=(128, 171), mean=(90, 98, 102), std=(1, 1, 1), scale=255
        ... )
        >>> prepare(moving_figure(frames=16).numpy())[None].shape
        torch.Size([1, 3, 16, 112, 112])
        >>> low, high = prepare.bounds
        >>> high.tolist()
        [165.0, 157.0, 153.0]
    """

    frames: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride: int = 1
    resize: tuple[int, int] | int | None = None
    scale: float = 1.0
    channels: int = 3
    antialias: bool = True
    order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        resized = self.resize if isinstance(self.resize, tuple) else () if self.resize is None else (self.resize,)
        sides = (*self.crop, *resized)
        if len(self.crop) != 2 or min(sides) < 1:
            raise ValueError(f"sizes must be (height, width) of at least 1, not crop={self.crop}, resize={self.resize}")
        if self.frames < 1 or self.stride < 1:
            raise ValueError(f"frames and stride must be at least 1, not {self.frames} and {self.stride}")
        if self.scale not in (1, 255):
            raise ValueError(f"scale must be 1 or 255, not {self.scale:g}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (luma) or 3 (RGB), not {self.channels}")
        if self.order not in ("RGB", "BGR") or (self.order == "BGR" and self.channels == 1):
            raise ValueError(f"order must be RGB, or BGR with 3 channels, not {self.order} with {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} needs one value for each of {self.channels} channels, not {list(values)}")
        if not np.isfinite((*self.mean, *self.std)).all() or not min(self.std) > 0:
            raise ValueError(
                f"mean and std must be finite and std positive, not {list(self.mean)} and {list(self.std)}"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """From a plain mapping, as stored beside weights: the attributes' names, with ``size`` for ``crop``.

        One number for mean or std serves all channels, one for size a square. With ``transform``, a torchvision preset,
        that is used instead (see :meth:`from_torchvision`), and only frames and stride are read beside it.

        Raises:
            ValueError: a key is missing or unknown.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        transform = given.pop("transform", None)
        if transform is not None:
            return cls.from_torchvision(transform, given["frames"], given.get("stride", 1))
        if "size" in given:
            given["crop"] = given.pop("size")
        known = {field.name for field in fields(cls)}
        missing = [name for name in ("frames", "crop", "mean", "std") if name not in given]
        if missing or not known.issuperset(given):
            raise ValueError(
                f"preprocessing needs frames, size, mean and std (missing: {missing}) "
                f"and knows no {sorted(given.keys() - known)}"
            )
        channels = int(given.get("channels", 3))
        resize = given.get("resize")
        return cls(
            frames=int(given["frames"]),
            crop=_pair(given["crop"]),
            mean=_per_channel(given["mean"], channels),
            std=_per_channel(given["std"], channels),
            stride=int(given.get("stride", 1)),
            resize=resize if resize is None or isinstance(resize, int) else _pair(resize),
            scale=float(given.get("scale", 1.0)),
            channels=channels,
            antialias=bool(given.get("antialias", True)),
            order=given.get("order", "RGB"),
        )

    @classmethod
    def from_torchvision(cls, transform: Any, frames: int, stride: int = 1) -> Preprocessing:
        """From a torchvision video preset, e.g. ``R3D_18_Weights.KINETICS400_V1.transforms()``; gives what it gives.

        Raises:
            TypeError: it is not a video classification preset with bilinear resizing.
        """
        try:
            resize, crop = list(transform.resize_size), _pair(transform.crop_size)
            mean, std, mode = tuple(transform.mean), tuple(transform.std), transform.interpolation.value
        except AttributeError as error:
            raise TypeError(f"not a torchvision video classification transform: {transform!r}") from error
        if mode != "bilinear":
            raise TypeError(f"only bilinear resizing is supported, not {mode}")
        return cls(
            frames=frames,
            crop=crop,
            mean=mean,
            std=std,
            stride=stride,
            resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
            antialias=False,  # as torchvision's presets resize
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :meth:`from_dict` reads and JSON stores."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["size"] = settings.pop("crop")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(low, high), each (channels,), in the model's order: black and white after normalisation."""
        return pixel_bounds(self.mean, self.std, self.scale)

    def __call__(self, frames: NDArray[np.uint8] | Tensor) -> Tensor:
        """float32 (channels, T, height, width) from uint8 (T, H, W, 3), computed where the frames are.

        Raises:
            TypeError, ValueError: the frames are not uint8 (T, H, W, 3).
        """
        pixels = torch.as_tensor(frames)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8 with values 0 to 255, not {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(f"frames must be (T, H, W, 3), not {tuple(pixels.shape)}")
        (height, width), top, left = self._geometry(pixels.shape[1], pixels.shape[2])
        x = pixels.permute(0, 3, 1, 2).float()
        if (height, width) != x.shape[2:]:
            # whole pixel values again, as an image library would give
            x = interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=self.antialias)
            x = x.round().clamp(0, 255)
        x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        if self.order == "BGR":
            x = x.flip(1)
        if self.channels == 1:
            x = (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if self.scale == 1:
            x = x / 255
        x = (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)
        return x.transpose(0, 1).contiguous()

    def source_crop(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of the frames (T, H, W, 3) that the model sees, (T, h', w', 3), in the video's own resolution."""
        height, width = frames.shape[1:3]
        (new_height, new_width), top, left = self._geometry(height, width)
        rows = [round(y * height / new_height) for y in (top, top + self.crop[0])]
        columns = [round(x * width / new_width) for x in (left, left + self.crop[1])]
        return frames[:, rows[0] : max(rows[1], rows[0] + 1), columns[0] : max(columns[1], columns[0] + 1)]

    def _geometry(self, height: int, width: int) -> tuple[tuple[int, int], int, int]:
        """Size after resizing, and the top and left of the crop in it."""
        if isinstance(self.resize, tuple):
            size = self.resize
        elif self.resize is not None:
            short, long = min(height, width), max(height, width)
            other = int(self.resize * long / short)
            size = (self.resize, other) if height <= width else (other, self.resize)
        else:
            factor = max(self.crop[0] / height, self.crop[1] / width)
            size = (max(self.crop[0], round(height * factor)), max(self.crop[1], round(width * factor)))
        if size[0] < self.crop[0] or size[1] < self.crop[1]:
            raise ValueError(
                f"frames of {height}x{width} are resized to {size[0]}x{size[1]}, less than the crop {self.crop}"
            )
        return size, round((size[0] - self.crop[0]) / 2), round((size[1] - self.crop[1]) / 2)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2):
        raise ValueError(f"a size is one number or (height, width), not {size!r}")
    return int(sides[0]), int(sides[-1])


def _per_channel(values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = (float(values),) if isinstance(values, (int, float)) else tuple(float(value) for value in values)
    return numbers * channels if len(numbers) == 1 else numbers
