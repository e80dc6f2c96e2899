"""Small data sets, a model that explains a clip in milliseconds, and what a store holds, read without the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray
from videos import Frames, encode

from captum_dtd.recipe import Explainer, Recipe

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3))

def other():
    model = net()
    model[-1].bias.data[0] += 1
    return model

def probabilities():
    return nn.Sequential(*net(), nn.Softmax(1))

def silent():
    model = net()
    model[-1].weight.data.zero_()
    return model

def exploding():
    model = net()
    model[-1].weight.data.mul_(1e38)
    model[-1].bias.data.fill_(3e38)
    return model
"""
MODULE = "tiny_dataset_net"
FRAMES, SIZE = 4, 12
CLASSES = ("bend", "jack", "walk")
PREPROCESSING = {"size": [SIZE], "mean": [0.4], "std": [0.25], "channels": 3, "frames": FRAMES}
RECIPE = Recipe(f"{MODULE}:net", classes=CLASSES, preprocessing=PREPROCESSING)
OPTIONS = [
    *("--model", f"{MODULE}:net", "--size", str(SIZE), "--mean", "0.4", "--std", "0.25", "--channels", "3"),
    *("--frames", str(FRAMES), "--classes", "classes.txt", "--quiet"),
]
"""`RECIPE` on the command line."""


def moving(count: int, seed: int, height: int = 24, width: int = 32) -> Frames:
    """Coloured noise in which a bright square moves."""
    frames = np.random.default_rng(seed).integers(0, 90, (count, height, width, 3), dtype=np.uint8)
    for index in range(count):
        left = (3 * index + seed) % (width - 8)
        frames[index, 6:14, left : left + 8] = (230, 60 + 10 * (seed % 10), 40)
    return frames


def write_avi(path: Path, count: int, seed: int = 0, height: int = 24, width: int = 32) -> Path:
    """A video of so many frames; the same seed gives the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, moving(count, seed, height, width), "mpeg4")


def make_tree(root: Path, counts: dict[str, int]) -> Path:
    """A data set: {"bend/a.avi": number of frames, ...}."""
    for seed, (name, count) in enumerate(counts.items()):
        write_avi(root / name, count, seed)
    return root


_load = Recipe.load
_loaded: dict[str, Explainer] = {}


def load_once(recipe: Recipe, device: str) -> Explainer:
    """In place of `Recipe.load`: each model is traced once for all tests, which takes longer than explaining a data set."""
    key = f"{recipe} {device}"
    if key not in _loaded:
        _loaded[key] = _load(recipe, device)
    return _loaded[key]


def install_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder the working directory, with the model and its class names in it."""
    (folder / f"{MODULE}.py").write_text(MODEL)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(Recipe, "load", load_once)


def frames_of(path: Path) -> Frames:
    """All frames of a file, by PyAV alone."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def stored(out: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """A store's rows in order, and its arrays as they are stored, by pyarrow and zarr alone."""
    parts = sorted((out / "manifest").glob("part-*.parquet"))
    rows = {
        row["row"]: row for part in [out / "manifest" / "all.parquet", *parts] if part.exists() for row in listed(part)
    }
    arrays = {
        name: np.asarray(zarr.open_array(out / "maps.zarr" / name, mode="r")[:])
        for name in configuration(out)["maps"]
        if (out / "maps.zarr" / name / "zarr.json").exists()
    }
    return [rows[number] for number in sorted(rows)], arrays


def listed(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def same(out: Path, other: Path) -> bool:
    """Whether two stores hold the same clips, rows and maps, bit for bit."""
    (rows, arrays), (other_rows, other_arrays) = stored(out), stored(other)
    return (
        listed(out / "clips.parquet") == listed(other / "clips.parquet")
        and repr(rows) == repr(other_rows)
        and arrays.keys() == other_arrays.keys()
        and all(np.array_equal(array, other_arrays[name]) for name, array in arrays.items())
        and configuration(out) == configuration(other)
    )


def configuration(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "configuration.json").read_text())
    return record["configuration"]
