"""Train c3d_mini on the silhouettes of the Weizmann actions; one seed takes some minutes.

python benchmarks/train/weizmann.py --data FOLDER --seed 0 --out FOLDER

FOLDER/weizmann_silhouettes/mask.mat holds one mask (144, 180, T) per person and action. Held out are all sequences of
three of the nine people; they are looked at once, after the last step. Needs scipy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import scipy.io
import torch
from torch import Tensor
from torch.nn import functional as F
from training import Recipe, arguments, between, chance, prepared, run

HELD_OUT = ("lyova", "moshe", "shahar")
RECIPE = Recipe(steps=2000)
INFO: dict[str, Any] = {
    "model": "c3d_mini",
    "num_classes": 10,
    "in_channels": 1,
    "classes": ["bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2"],
    "frames": 16,
    "stride": 2,
    "resize": [48, 60],
    "size": [48, 60],
    "mean": [0.0],
    "std": [1.0],
    "scale": 1,
    "channels": 1,
    "description": "White silhouettes on black, 25 frames per second, of the ten Weizmann actions.",
}


def sequences(path: Path, held_out: bool) -> tuple[list[Tensor], list[int]]:
    """Each sequence (1, T, 48, 60), 0 black to 1 white, and its label."""
    masks = scipy.io.loadmat(path)["original_masks"][0, 0]
    videos, labels = [], []
    for name in masks.dtype.names:
        person, _, action = name.partition("_")
        if (person in HELD_OUT) == held_out:
            mask = torch.from_numpy(masks[name]).permute(2, 0, 1) * 255
            videos.append(prepared(mask[..., None].expand(-1, -1, -1, 3), INFO))
            # whoever repeated an action has it numbered, unlike the actions wave1 and wave2
            labels.append(INFO["classes"].index(action if action in INFO["classes"] else action.rstrip("12")))
    return videos, labels


def augmented(video: Tensor, generator: torch.Generator) -> Tensor:
    """A random clip of a sequence: where it begins, speed, place, size, proportions, mirroring, thickness, noise."""
    length = video.shape[1]
    times = torch.arange(INFO["frames"]) * INFO["stride"] * between(0.8, 1.25, generator)
    start = chance(max(1, length - int(times[-1])), generator)
    clip = video[:, (start + times.round().long()) % length]
    size = between(0.8, 1.25, generator)
    stretch = between(0.9, 1.1, generator)
    shift_x, shift_y = between(-0.3, 0.3, generator), between(-0.2, 0.2, generator)
    mirror = 1 - 2 * chance(2, generator)
    theta = torch.tensor([[mirror * size * stretch, 0, shift_x], [0, size / stretch, shift_y]])
    grid = F.affine_grid(theta.expand(INFO["frames"], 2, 3), [INFO["frames"], 1, *INFO["size"]], align_corners=False)
    clip = F.grid_sample(clip.transpose(0, 1), grid, align_corners=False).transpose(0, 1)
    # a silhouette cut out a little too tightly or too widely, with edges sharp or soft
    blurred = F.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    clip = clip + between(-1, 1, generator) * (blurred - clip)
    clip = ((clip - between(0.2, 0.5, generator)) * between(1, 2.5, generator) + 0.4) * (clip > 0.02)
    clip = clip + 0.03 * between(0, 1, generator) * torch.randn(clip.shape, generator=generator)
    return clip.clamp(0, 1)


def main() -> None:
    given = arguments("Train c3d_mini on the Weizmann silhouettes.")
    path = given.data / "weizmann_silhouettes" / "mask.mat"
    videos, labels = sequences(path, held_out=False)
    target = torch.tensor(labels)

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(videos), (RECIPE.batch,), generator=generator)
        return torch.stack([augmented(videos[i], generator) for i in chosen]), target[chosen]

    run("weizmann", INFO, RECIPE, batches, sequences(path, held_out=True), given)


if __name__ == "__main__":
    main()
