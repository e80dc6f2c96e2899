"""A whole data set against its explanations alone, and opening a large store.

The explanations alone are a loop over ``attribute()`` on clips that lie in memory, decoded and prepared. The ratio of the two
rates, clips per second, is in the record's ``extra_info``: the part of the machine that decoding, sums, encoding and
writing leave.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("zarr", reason="zarr is not installed (pip install 'captum_dtd[dataset]')")

import captum_dtd.dataset as dataset
from captum_dtd.dataset import Configuration, clips, run, store
from captum_dtd.dataset.progress import Progress
from captum_dtd.dataset.work import Explained
from captum_dtd.recipe import Recipe
from captum_dtd.video import read_video, write_video
from captum_dtd.video.synthetic import ACTIONS, moving_figure

# clips: of each of four videos; batch: explained together; shard: committed together; rounds: of it all, minutes each.
SIZES = {
    "c3d_mini": {"clips": 16, "batch": 4, "shard": 8, "rounds": 3},
    "r3d_18": {"clips": 2, "batch": 1, "shard": 1, "rounds": 1},
}


def make_videos(root: Path, clips_in_each: int, frames: int) -> None:
    """A video of 240 x 320 pixels for each of four actions, with noise: a frame takes as long to decode as UCF-101's."""
    for action in sorted(ACTIONS)[:4]:
        (root / action).mkdir(parents=True)
        pixels = moving_figure(action, clips_in_each * frames, (240, 320))
        pixels += torch.randint(0, 8, pixels.shape, dtype=torch.uint8)
        write_video(root / action / f"{action}.mp4", pixels.numpy(), 25)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("model", ["c3d_mini", "r3d_18"])
def test_end_to_end(
    benchmark: BenchmarkFixture, model: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes, on all cores, from the first batch on, so without starting; in turn with the bare loop."""
    benchmark.group = "data set"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size = {"clips": 2, "batch": 2, "shard": 2} if small else SIZES[model]
    recipe = Recipe(model, preprocessing={"size": [16, 16], "frames": 4} if small else {})
    explainer = recipe.load("cpu")
    prepare = explainer.prepare
    make_videos(tmp_path / "root", size["clips"], prepare.frames * prepare.stride)

    videos = [read_video(path).frames for path in sorted((tmp_path / "root").glob("*/*"))]
    span = prepare.frames * prepare.stride
    inputs = [
        prepare(frames[start : start + span : prepare.stride])
        for frames in videos
        for start in range(0, len(frames) - span + 1, span)
    ]
    batches = [torch.stack(inputs[start : start + size["batch"]]) for start in range(0, len(inputs), size["batch"])]
    targets = [explainer.outputs(batch).argmax(1).tolist() for batch in batches]

    def loop() -> float:
        """Clips per second of all batches but the first."""
        begin = 0.0
        for number, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            explainer.method.attribute(batch, target=target, internal_batch_size=4)
            begin = begin if number else time.perf_counter()
        return (len(inputs) - size["batch"]) / (time.perf_counter() - begin)

    times: list[float] = []

    class Watch(Progress):
        def explained(self, *arguments: Any) -> None:
            times.append(time.perf_counter())
            super().explained(*arguments)

        def committed(self, shard: int) -> None:
            times.append(time.perf_counter())
            super().committed(shard)

    monkeypatch.setattr(run, "Progress", Watch)
    rates: dict[str, list[float]] = {"data set": [], "loop": []}

    def all_of_it() -> None:
        times.clear()
        out = tmp_path / f"out{len(rates['data set'])}"
        outcome = dataset.explain_dataset(
            tmp_path / "root",
            out,
            recipe,
            batch_clips=size["batch"],
            internal_batch_size=4,
            shard_clips=size["shard"],
            decoders=0 if small else None,
        )
        assert (outcome.clips, outcome.failed) == (len(inputs), 0)
        # Every process that explains has a first batch, of which a part may lie before the first message.
        processes = 1 if small else torch.get_num_threads()
        rates["data set"].append((len(inputs) - processes * size["batch"]) / (times[-1] - times[0]))
        rates["loop"].append(loop())

    benchmark.pedantic(all_of_it, rounds=1 if small else size["rounds"], iterations=1)  # type: ignore[no-untyped-call]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    benchmark.extra_info |= {f"clips per second, {name}": round(rate, 3) for name, rate in medians.items()}
    benchmark.extra_info["rounds"] = {name: [round(rate, 3) for rate in found] for name, found in rates.items()}
    benchmark.extra_info["of the bare loop"] = round(medians["data set"] / medians["loop"], 3)
    print(benchmark.extra_info)


def test_open(benchmark: BenchmarkFixture, small: bool, tmp_path: Path) -> None:
    """A store of 20,000 clips, to its table."""
    benchmark.group = "opening a store of 20,000 clips"
    count = 200 if small else 20_000
    recipe = Recipe("c3d_mini")
    explainer = recipe.load("cpu")
    preprocessing = explainer.prepare.to_dict()
    configuration = Configuration(
        recipe=recipe, weights_digest="", preprocessing=preprocessing, classes=explainer.classes, target="top1", lists=(),
        clip_stride=15, maps=("spatial", "temporal"), encoding="float16", batch_clips=4, internal_batch_size=4,
        shard_clips=100, device="cpu", version="",
    )  # fmt: skip
    listed = [
        clips.Clip(row, f"a.avi@{row}", row, b"a.avi", row, None, "a", 0, None, None, None) for row in range(count)
    ]
    store.write_clips(tmp_path, listed)
    store.write_configuration(tmp_path, configuration, tmp_path)
    writing = store.Store(tmp_path, configuration, listed)
    frames = preprocessing["frames"]
    columns = {f"{name}_{kind}": [0.5] * frames for name in ("spatial", "temporal") for kind in ("sums", "masses")}
    for shard in range(count // 100):
        rows = [Explained(clip, {**columns, "status": "ok"}) for clip in listed[100 * shard : 100 * (shard + 1)]]
        writing.commit(shard, rows)
    writing.gather()
    opened = benchmark(dataset.open, tmp_path)
    assert len(opened.table) == count
