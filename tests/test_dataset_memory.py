"""Memory stays flat however many clips there are."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
from data_sets import FRAMES, RECIPE, write_avi
from test_memory import MIB, resident

import captum_dtd.dataset as dataset
from captum_dtd.dataset import explain_dataset
from captum_dtd.dataset.progress import Progress

CLIPS, VIDEOS = 20_000, 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_20000_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sets.install_model(tmp_path, monkeypatch)
    source = write_avi(tmp_path / "source.avi", CLIPS // VIDEOS + FRAMES - 1)
    for number in range(VIDEOS):
        video = tmp_path / "root" / data_sets.CLASSES[number % 3] / f"{number}.avi"
        video.parent.mkdir(parents=True, exist_ok=True)
        video.symlink_to(source)
    sizes: list[int] = []
    committed = Progress.committed

    def sample(self: Progress, shard: int) -> None:
        committed(self, shard)
        sizes.append(resident())

    monkeypatch.setattr(Progress, "committed", sample)
    outcome = explain_dataset("root", "out", RECIPE, maps=(), clip_stride=1, shard_clips=40, decoders=1)
    assert (outcome.clips, outcome.failed) == (CLIPS, 0)
    assert len(sizes) == CLIPS // 40
    print([round(size / MIB) for size in sizes[::25]])
    # the first fifth fills the caches of allocators
    begun = max(sizes[: len(sizes) // 5])
    assert max(sizes[len(sizes) // 5 :]) - begun < 32 * MIB
    assert len(dataset.open("out").table) == CLIPS
