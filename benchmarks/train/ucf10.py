"""Train c3d_mini on ten classes of UCF-101, 64 x 64 pixels, 30 frames a video; one seed takes a quarter of an hour.

python benchmarks/train/ucf10.py --data FOLDER --seed 0 --out FOLDER

FOLDER/ucf10_64px holds trainlist.txt, vallist.txt, classInd.txt and the videos. Nothing is chosen by the validation
list: it is classified once, after the last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from training import Recipe, arguments, between, chance, prepared, run

from captum_dtd.video import read_video

RECIPE = Recipe(steps=4200, weight_decay=0.2, mixup=0.4)


def listed(folder: Path, name: str) -> tuple[list[Tensor], list[int]]:
    """Frames, uint8 (30, 64, 64, 3), and label of each video in a list."""
    lines = [line.split() for line in (folder / name).read_text().splitlines()]
    return [torch.from_numpy(read_video(folder / path).frames) for path, _ in lines], [int(c) - 1 for _, c in lines]


def augmented(video: Tensor, generator: torch.Generator) -> Tensor:
    """A random clip of a video: beginning, speed, crop, zoom, mirroring, brightness, contrast and tint; (3, T, H, W)."""
    stride = INFO["stride"] if between(0, 1, generator) < 0.6 else 1
    start = chance(len(video) - (INFO["frames"] - 1) * stride, generator)
    clip = video[start::stride][: INFO["frames"]].permute(3, 0, 1, 2)
    zoom = between(0.6, 1, generator)
    height, width = (round(64 * zoom * between(0.9, 1, generator)) for _ in range(2))
    top, left = chance(65 - height, generator), chance(65 - width, generator)
    clip = clip[:, :, top : top + height, left : left + width].float() / 255
    clip = F.interpolate(clip, INFO["size"], mode="bilinear", align_corners=False)
    if chance(2, generator):
        clip = clip.flip(-1)
    if between(0, 1, generator) < 0.2:
        clip = clip.mean(0, keepdim=True).expand_as(clip)
    tint = torch.rand(3, 1, 1, 1, generator=generator) / 10 - 1 / 20
    clip = (clip - 0.4) * between(0.7, 1.3, generator) + 0.4 + between(-0.15, 0.15, generator) + tint
    mean, std = (torch.tensor(INFO[name]).view(3, 1, 1, 1) for name in ("mean", "std"))
    return (clip.clamp(0, 1) - mean) / std


INFO: dict[str, Any] = {
    "model": "c3d_mini",
    "num_classes": 10,
    "in_channels": 3,
    "frames": 15,
    "stride": 2,
    "resize": [64, 64],
    "size": [56, 56],
    "mean": [0.43, 0.40, 0.38],
    "std": [0.25, 0.25, 0.25],
    "scale": 1,
    "channels": 3,
    "description": "Ten actions of UCF-101, videos of 30 frames at 64x64. Not an official split of UCF-101.",
}


def main() -> None:
    given = arguments("Train c3d_mini on ten classes of UCF-101.")
    folder = given.data / "ucf10_64px"
    classes = [line.split()[1] for line in (folder / "classInd.txt").read_text().splitlines()]
    videos, labels = listed(folder, "trainlist.txt")
    target = torch.tensor(labels)
    order: list[int] = []

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if len(order) < RECIPE.batch:
            order[:] = torch.randperm(len(videos), generator=generator).tolist()
        chosen = [order.pop() for _ in range(RECIPE.batch)]
        return torch.stack([augmented(videos[i], generator) for i in chosen]), target[chosen]

    held_out, truth = listed(folder, "vallist.txt")
    info = INFO | {"classes": classes}
    run("ucf10", info, RECIPE, batches, ([prepared(video, info) for video in held_out], truth), given)


if __name__ == "__main__":
    main()
