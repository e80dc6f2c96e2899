"""A data set from end to end: every clip is there, with the maps of a plain loop, whatever its video is like."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
import halves
import pyarrow as pa
import pyarrow.parquet as pq
from data_sets import CLASSES, FRAMES, OPTIONS, RECIPE, frames_of, make_tree, same, stored, write_avi

import captum_dtd.dataset as dataset
import captum_dtd.dataset.clips
import captum_dtd.dataset.work
from captum_dtd import DiscriminativeDeepTaylor, FrameCache
from captum_dtd.cli import main
from captum_dtd.dataset import Entry, StoreError, engine_local, explain_dataset, store
from captum_dtd.dataset.clips import probe_entry
from captum_dtd.dataset.configuration import weights_digest
from captum_dtd.dataset.engine_local import local_engine
from captum_dtd.dataset.run import _fair_share
from captum_dtd.dataset.store import Store
from captum_dtd.dataset.work import VideoMeans
from captum_dtd.models import load_model
from captum_dtd.recipe import Explainer, Recipe
from captum_dtd.video import Preprocessing, WindowReader

TREE = {"bend/a.avi": 9, "bend/b.avi": 13, "jack/a.avi": 4, "jack/c.avi": 6, "walk/d.avi": 17}
"""Clips: 2, 3, 1, 1, 4."""
SETTINGS: dict[str, Any] = {"decoders": 0, "batch_clips": 2, "shard_clips": 4, "encoding": "float32"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_sets.install_model(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def root(folder: Path) -> Path:
    return make_tree(folder / "root", TREE)


@cache
def method() -> DiscriminativeDeepTaylor:
    low, high = Preprocessing.from_dict(RECIPE.preprocessing).bounds
    return DiscriminativeDeepTaylor(load_model(RECIPE.model).model, low, high)


def explained(clip: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The model's outputs for a prepared clip, and the spatial, temporal and total maps of the largest."""
    outputs = method().model(clip)[0].detach()
    return outputs, [part[0] for part in method().attribute(clip, target=int(outputs.argmax()))]


def resized(frames: data_sets.Frames) -> torch.Tensor:
    return Preprocessing.from_dict(RECIPE.preprocessing)(frames)[None]


def test_maps_and_rows_are_those_of_a_plain_loop(root: Path, folder: Path) -> None:
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS)
    assert (outcome.clips, outcome.failed, outcome.warnings, outcome.new) == (11, 0, 0, 11)
    store = dataset.open("out")
    assert store.complete
    rows = store.table.to_pylist()
    number = 0
    for name, count in TREE.items():
        frames = frames_of(root / name)
        assert len(frames) == count
        for start in range(0, count - FRAMES + 1, FRAMES):
            row = rows[number]
            outputs, maps = explained(resized(frames[start : start + FRAMES]))
            assert (row["row"], row["id"], row["path"]) == (number, f"{name}@{start}", name)
            assert (row["path_bytes"], row["frame"]) == (name.encode(), start)
            assert row["start"] == pytest.approx(start / 25)
            assert (row["fps"], row["status"], row["error"], row["looped"]) == (25, "ok", None, False)
            assert row["label"] == name.split("/")[0] == CLASSES[row["label_index"]]
            assert row["shard"] == number // 4
            assert row["prediction"] == row["target"] == int(outputs.argmax())
            assert row["score"] == pytest.approx(float(outputs.max()), rel=1e-5)
            assert row["delta"] == pytest.approx(float(outputs.max() - maps[2].sum()), abs=1e-5)
            for part, expected in zip(("spatial", "temporal", "total"), maps, strict=True):
                got = getattr(store, part)[number]
                assert got.dtype == np.float32
                assert np.abs(got - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())
            for part, expected in zip(("spatial", "temporal"), maps, strict=False):
                by_frame = expected.double().sum((1, 2)).tolist()
                assert row[f"{part}_sums"] == pytest.approx(by_frame, rel=1e-4, abs=1e-6)
                assert row[f"{part}_masses"] == pytest.approx(expected.double().abs().sum((1, 2)).tolist(), rel=1e-4)
                assert row[f"{part}_mass"] == pytest.approx(float(expected.abs().sum()), rel=1e-4)
            number += 1
    assert number == len(rows)


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
@pytest.mark.parametrize("maps", [("spatial", "temporal"), ("spatial", "total"), ("temporal", "total")])
def test_two_maps_are_stored_and_the_third_follows(root: Path, encoding: str, maps: tuple[str, str]) -> None:
    shutil.rmtree(root / "bend")
    settings = {**SETTINGS, "encoding": encoding, "maps": maps}
    explain_dataset(root, "out", RECIPE, **settings)
    store = dataset.open("out")
    _, arrays = stored(Path("out"))
    assert {name: str(array.dtype) for name, array in arrays.items()} == dict.fromkeys(maps, encoding)
    expected = explained(resized(frames_of(root / "jack/a.avi")))[1]
    largest = {
        name: float(part.abs().max()) for name, part in zip(("spatial", "temporal", "total"), expected, strict=True)
    }
    within = {"float32": 1e-5, "float16": 1e-3, "int8": 1 / 250}[encoding]
    for name, part in zip(("spatial", "temporal", "total"), expected, strict=True):
        allowed = largest[name] if name in maps else sum(largest[stored_map] for stored_map in maps)
        assert np.abs(getattr(store, name)[0] - part.numpy()).max() <= within * allowed


def test_no_maps_keeps_the_table_alone(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS, maps=())
    store = dataset.open("out")
    assert len(store.table) == 11
    assert all(mass > 0 for mass in store.table["spatial_mass"].to_pylist())
    assert stored(Path("out"))[1] == {}
    with pytest.raises(StoreError, match="keeps no maps"):
        _ = store.total


def test_overlapping_clips_and_strides(root: Path) -> None:
    settings = {**SETTINGS, "clip_stride": 3}
    recipe = replace(RECIPE, preprocessing={**RECIPE.preprocessing, "stride": 2})
    explain_dataset(root, "out", recipe, **settings)
    rows, arrays = stored(Path("out"))
    # a clip spans 7 frames
    starts = [(row["path"], row["frame"]) for row in rows]
    expected = [(name, start) for name, count in TREE.items() for start in range(0, max(count - 7, 0) + 1, 3)]
    assert starts == expected
    frames = frames_of(root / "walk/d.avi")
    number = expected.index(("walk/d.avi", 6))
    spatial = explained(resized(frames[6:13:2]))[1][0]
    assert np.abs(arrays["spatial"][number] - spatial.numpy()).max() <= 1e-5 * float(spatial.abs().max())


def test_frames_of_many_clips_are_explained_once_in_each_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[FrameCache] = []

    def recorded() -> FrameCache:
        caches.append(FrameCache())
        return caches[-1]

    monkeypatch.setattr(captum_dtd.dataset.work, "FrameCache", recorded)
    explain_dataset(root, "out", RECIPE, **{**SETTINGS, "clip_stride": 1, "batch_clips": 4})
    rows, arrays = stored(Path("out"))
    starts = [(row["path"], row["frame"]) for row in rows]
    assert starts == [(name, start) for name, count in TREE.items() for start in range(max(count - FRAMES, 0) + 1)]
    frames = frames_of(root / "walk/d.avi")
    for start in (0, 5):
        number = starts.index(("walk/d.avi", start))
        spatial = explained(resized(frames[start : start + FRAMES]))[1][0]
        assert np.abs(arrays["spatial"][number] - spatial.numpy()).max() <= 1e-5 * float(spatial.abs().max())
    shown = FRAMES * sum(row["looped"] is False for row in rows)
    unlooped = [[row for row in rows[at : at + 4] if row["looped"] is False] for at in range(0, len(rows), 4)]
    frames_of_batch = [{(row["path"], row["frame"] + t) for row in batch for t in range(FRAMES)} for batch in unlooped]
    assert [cache.misses for cache in caches] == [len(frames) for frames in frames_of_batch]
    assert sum(cache.misses for cache in caches) < 0.7 * shown


def test_clips_are_classified_in_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matter how many of them a video has, whose class is explained."""
    sizes: list[int] = []
    outputs = Explainer.outputs

    def noted(self: Explainer, clips: torch.Tensor) -> torch.Tensor:
        sizes.append(len(clips))
        return outputs(self, clips)

    monkeypatch.setattr(Explainer, "outputs", noted)
    explain_dataset(root, "out", RECIPE, **SETTINGS, target="video")
    assert max(sizes) == SETTINGS["batch_clips"]


def test_a_video_without_a_clip_that_can_be_decoded_has_no_mean() -> None:
    means = VideoMeans()
    means.add(b"whole.avi", torch.tensor([0.0, 2.0, 1.0]))
    assert means.of([b"whole.avi", b"broken.avi"]).top(b"whole.avi") == 1


def test_targets(root: Path) -> None:
    """Seeds show which class was explained: relevance sums to its logit."""
    for target in ("label", "top1", "video"):
        explain_dataset(root, target, RECIPE, **SETTINGS, target=target)
    outputs = {
        name: [
            explained(resized(frames_of(root / name)[s : s + FRAMES]))[0] for s in range(0, count - FRAMES + 1, FRAMES)
        ]
        for name, count in TREE.items()
    }
    for target in ("label", "top1", "video"):
        rows, arrays = stored(Path(target))
        for row in rows:
            of_video = outputs[row["path"]]
            clip = of_video[row["frame"] // FRAMES]
            expected = {
                "label": row["label_index"],
                "top1": int(clip.argmax()),
                "video": int(torch.stack(of_video).mean(0).argmax()),
            }[target]
            assert row["target"] == expected
            total = (arrays["spatial"] + arrays["temporal"])[row["row"]].sum()
            assert total + row["delta"] == pytest.approx(float(clip[expected]), abs=1e-5)


def test_the_preset_explains_the_videos_class_unless_told_otherwise(root: Path) -> None:
    """As the command line does, and the scripts that the preset is named after."""
    preset = replace(RECIPE, preset="hiley2019")
    for out, recipe, options in [
        ("video", preset, {}),
        ("top1", RECIPE, {}),
        ("label", preset, {"target": "label"}),
    ]:
        explain_dataset(root, out, recipe, **SETTINGS, **options, maps=())
        assert data_sets.configuration(Path(out))["target"] == out


def test_a_tables_column_says_what_is_explained(root: Path, folder: Path) -> None:
    (folder / "clips.csv").write_text(
        "path,start,label,aim\nroot/walk/d.avi,0.21,walk,jack\nroot/bend/a.avi,,0,2\nroot/walk/d.avi,0.21,,bend\n"
    )
    explain_dataset(folder / "clips.csv", "out", RECIPE, **SETTINGS, target="column:aim")
    rows, _ = stored(Path("out"))
    assert [row["target"] for row in rows] == [1, 2, 2, 0]
    assert [row["frame"] for row in rows] == [5, 0, 4, 5]
    assert [row["label"] for row in rows] == ["walk", "bend", "bend", None]
    assert len({row["id"] for row in rows}) == 4
    with pytest.raises(ValueError, match="target label: 1 of 4 clips"):
        explain_dataset(folder / "clips.csv", "other", RECIPE, **SETTINGS, target="label")
    table = pa.table({"path": [b"root/walk/d.avi"], "start": [0.21], "aim": [1]})
    pq.write_table(table, folder / "clips.parquet")
    explain_dataset(folder / "clips.parquet", "again", RECIPE, **{**SETTINGS, "batch_clips": 1}, target="column:aim")
    (row,), _ = stored(Path("again"))
    assert row["score"] == pytest.approx(rows[0]["score"], rel=1e-6)


def test_whatever_goes_wrong_with_a_file_is_its_own_affair(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library raises about a broken file is not always an error that it promised."""
    counted, read = captum_dtd.dataset.clips.frame_times, WindowReader.read

    def frame_times(path: Path) -> Any:
        if path.name == "b.avi":
            raise IndexError("list index out of range")
        return counted(path)

    def read_windows(reader: WindowReader, *arguments: Any) -> Any:
        if os.fspath(reader._path).endswith("c.avi"):
            raise MemoryError("Unable to allocate 8.00 GiB")
        return read(reader, *arguments)

    monkeypatch.setattr(captum_dtd.dataset.clips, "frame_times", frame_times)
    monkeypatch.setattr(WindowReader, "read", read_windows)
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS)
    errors = {row["path"]: row["error"] for row in stored(Path("out"))[0] if row["status"] == "failed"}
    assert errors == {
        "bend/b.avi": "IndexError: list index out of range",
        "jack/c.avi": "MemoryError: Unable to allocate 8.00 GiB",
    }
    assert (outcome.clips, outcome.failed) == (9, 2)


def test_a_clip_of_a_table_begins_with_the_frame_that_is_shown_then(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file's frames are others than its packets, so that they cannot be counted before they are decoded."""
    (folder / "clips.csv").write_text("path,start\nroot/walk/d.avi,0.21\n")
    explain_dataset(folder / "clips.csv", "right", RECIPE, **SETTINGS)
    monkeypatch.setattr(captum_dtd.dataset.clips, "frame_at", lambda *_: 9)
    outcome = explain_dataset(folder / "clips.csv", "counted", RECIPE, **SETTINGS)
    ((right,), maps), ((counted,), other) = stored(Path("right")), stored(Path("counted"))
    assert (right["start"], right["frame"], counted["start"], counted["frame"]) == (0.2, 5, 0.2, 9)
    assert right["warning"] is None
    assert "not exact" in counted["warning"]
    assert outcome.warnings == 1
    assert np.array_equal(maps["spatial"], other["spatial"])


def test_folders_are_called_by_names_of_classes(folder: Path) -> None:
    """However these are written; numbers are names, too, in the order of numbers."""
    names = ("a\u3000b", "\u00a0c", "d\\e")
    make_tree(folder / "root", {f"{name}/v.avi": FRAMES for name in names} | {"1/v.avi": FRAMES})
    explain_dataset("root", "out", replace(RECIPE, classes=names), **SETTINGS, maps=())
    rows, _ = stored(Path("out"))
    assert {row["label"]: row["label_index"] for row in rows} == {
        "a\\u3000b": 0,
        "\\xa0c": 1,
        "d\\\\e": 2,
        "1": None,
    }
    explain_dataset("root", "cased", replace(RECIPE, classes=("A\u3000B", "x", "y")), **SETTINGS, maps=())
    rows, _ = stored(Path("cased"))
    assert {row["label"]: row["label_index"] for row in rows}["A\\u3000B"] == 0
    make_tree(folder / "numbers", {f"{number}/v.avi": FRAMES for number in (10, 2, 0)})
    explain_dataset("numbers", "numbered", replace(RECIPE, classes=None), **SETTINGS, maps=(), target="label")
    rows, _ = stored(Path("numbered"))
    assert {row["label"]: row["label_index"] for row in rows} == {"0": 0, "2": 1, "10": 2}


def test_videos_in_the_folder_itself_have_no_class(root: Path) -> None:
    loose = write_avi(root / "loose.avi", 2 * FRAMES)
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS, maps=(), target="label")
    assert outcome.passed_over == 1
    assert loose.name not in {row["path"] for row in stored(Path("out"))[0]}
    for folder in root.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    explain_dataset(root, "alone", RECIPE, **SETTINGS, maps=())
    rows = [(row["path"], row["frame"], row["label"], row["status"]) for row in stored(Path("alone"))[0]]
    assert rows == [("loose.avi", 0, None, "ok"), ("loose.avi", FRAMES, None, "ok")]


def test_weights_may_lie_elsewhere_and_so_may_the_videos(root: Path, folder: Path) -> None:
    """Processes find them where they are now."""
    torch.save(load_model(RECIPE.model).model.state_dict(), "my.pth")
    named = replace(RECIPE, weights="my.pth")
    explain_dataset(root, "whole", named, **SETTINGS)
    explain_dataset(root, "out", named, **SETTINGS)
    for part in sorted(Path("out/manifest").glob("*.parquet")):
        part.unlink()
    (folder / "w").mkdir()
    (folder / "my.pth").rename(folder / "w" / "my.pth")
    moved = folder / "moved\u3000to"
    root.rename(moved)
    options = {**SETTINGS, "devices": ["cpu", "cpu"]}
    assert explain_dataset(moved, "out", replace(named, weights="w/my.pth"), **options).new == 11
    assert dataset.open("out").root == str(moved)
    assert same(Path("whole"), Path("out"))
    assert dataset.export_mp4(dataset.open("out"), "videos", [0]).clips == 1


def test_decoding_in_processes_and_several_devices_give_the_same(root: Path) -> None:
    shutil.rmtree(root / "walk")
    explain_dataset(root, "one", RECIPE, **SETTINGS)
    explain_dataset(root, "two", RECIPE, **{**SETTINGS, "decoders": 1})
    explain_dataset(root, "three", RECIPE, **SETTINGS, devices=["cpu", "cpu"])
    assert same(Path("one"), Path("two"))
    assert same(Path("one"), Path("three"))


def test_each_core_explains_by_itself_unless_told_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**22, "SC_PAGE_SIZE": 2**12}.__getitem__)  # 16 GiB
    for threads, devices, decoders, processes, each in (
        (3, None, None, 3, 1),
        (8, None, 1, 4, 2),  # four have 4 GiB
        (1, None, None, 1, 1),
        (3, None, 0, 1, 3),
        (3, ["cpu", "cpu"], 0, 2, 1),
    ):
        torch.set_num_threads(threads)
        with local_engine(RECIPE, devices, decoders) as engine:
            assert engine.explainers == processes
            assert engine.call(lambda *_: torch.get_num_threads()) == each
        assert torch.get_num_threads() == threads


def test_shards_are_small_enough_to_keep_every_process_busy(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, decoders=0, batch_clips=1)
    assert [row["shard"] for row in stored(Path("out"))[0]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    configuration, clips = store.read_configuration(Path("out")), store.read_clips(Path("out"))
    assert configuration is not None
    for batch, processes, most in ((1, 2, 2), (2, 2, 2), (1, 100, 1), (4, 1, 4)):
        assert _fair_share(replace(configuration, batch_clips=batch, shard_clips=batch), clips, processes) == most


def test_random_weights_are_the_same_in_every_process(recwarn: pytest.WarningsRecorder) -> None:
    before = torch.random.get_rng_state()
    one, two = (Recipe("c3d", num_classes=3).load("cpu") for _ in range(2))
    assert weights_digest(one.model) == weights_digest(two.model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_process_with_other_weights_ends_the_run(root: Path) -> None:
    Path("tiny_unsteady.py").write_text(data_sets.MODEL.replace("torch.manual_seed(0)", "torch.seed()"))
    recipe = replace(RECIPE, model="tiny_unsteady:net")
    with pytest.raises(ValueError, match=r"the weights here, .*, are not those where the run was started"):
        explain_dataset(root, "out", recipe, **SETTINGS, devices=["cpu", "cpu"])


def test_what_another_process_says_is_told_here() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    messages = engine_local._Messages(theirs)

    class OddError(RuntimeError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    for error, told in (
        (OSError(28, "No space left on device", "out/part"), OSError),
        (ValueError("the model cannot"), ValueError),
        (OddError(1, 2), RuntimeError),
    ):
        messages.error(error)
        name, (received,) = ours.recv()
        assert name == "error" and type(received) is told
        assert str(received) == (str(error) if told is not RuntimeError else "OddError: 1 and 2")


def test_what_another_process_warns_of_is_told_here(root: Path) -> None:
    softened = "\ndef softened():\n    return nn.Sequential(*net(), nn.Softmax(1))\n"
    Path("tiny_softened.py").write_text(data_sets.MODEL + softened)
    recipe = replace(RECIPE, model="tiny_softened:softened")
    with pytest.warns(UserWarning, match="softmax"):
        explain_dataset(root, "out", recipe, **SETTINGS, devices=["cpu", "cpu"])


def test_a_second_run_finds_everything_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    before = {
        path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file() and path.name != "lock"
    }
    monkeypatch.setattr("captum_dtd.dataset.run.probe_entry", lambda *_: pytest.fail("frames are counted again"))
    # what was decided in the first run need not be given again
    outcome = explain_dataset(root, "out", RECIPE, **{**SETTINGS, "shard_clips": None})
    assert (outcome.clips, outcome.new) == (11, 0)
    after = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file() and path.name != "lock"}
    unchanged = {path for path in before if after.get(path) == before[path]}
    assert {path.name for path in set(before) - unchanged} <= {"all.parquet"}


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"encoding": "int8"}, 'encoding: "float32" -> "int8"'),
    ({"maps": ()}, r'maps: \["spatial", "temporal"\] -> \[\]'),
    ({"batch_clips": 4}, "batch_clips: 2 -> 4"),
    ({"shard_clips": 8}, "shard_clips: 4 -> 8"),
    ({"internal_batch_size": 1}, f"internal_batch_size: {2 * FRAMES} -> 1"),
    ({"target": "label"}, 'target: "top1" -> "label"'),
    ({"clip_stride": 2}, "clip_stride: 4 -> 2"),
    ({"recipe": replace(RECIPE, readout="mean")}, 'recipe.readout: null -> "mean"'),
    (
        {"recipe": replace(RECIPE, model=f"{data_sets.MODULE}:other")},
        'weights_digest: "[0-9a-f]{16}" -> "[0-9a-f]{16}"',
    ),
    (
        {"recipe": replace(RECIPE, preprocessing={**RECIPE.preprocessing, "mean": [0.5]})},
        r"preprocessing.mean: \[0.4, 0.4, 0.4\] -> \[0.5, 0.5, 0.5\]",
    ),
]


def test_a_changed_configuration_is_refused_with_the_difference(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    before = stored(Path("out"))
    for change, message in CHANGES:
        settings = {"recipe": RECIPE, **SETTINGS, **change}
        with pytest.raises(StoreError, match=message) as caught:
            explain_dataset(root, "out", **settings)
        assert "another folder" in str(caught.value)
    assert repr(stored(Path("out"))) == repr(before)


def test_changed_videos_are_refused_with_the_difference(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    write_avi(root / "walk" / "new one.avi", 5)
    with pytest.raises(StoreError, match=r"new: walk/new one.avi"):
        explain_dataset(root, "out", RECIPE, **SETTINGS)
    (root / "walk" / "new one.avi").unlink()
    (root / "bend" / "a.avi").rename(root / "bend" / "z.avi")
    with pytest.raises(StoreError, match=r"gone: bend/a.avi; new: bend/z.avi"):
        explain_dataset(root, "out", RECIPE, **SETTINGS)
    (root / "bend" / "z.avi").rename(root / "bend" / "a.avi")
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).new == 0


def test_other_videos_under_the_same_names_are_refused(root: Path, folder: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    write_avi(root / "jack/a.avi", 4, seed=77)
    before = stored(Path("out"))[0]
    with pytest.raises(
        StoreError, match=r"out was begun with other videos: of another size: jack/a\.avi\. Give the same"
    ):
        explain_dataset(root, "out", RECIPE, **SETTINGS)
    assert repr(stored(Path("out"))[0]) == repr(before)
    (root / "jack/a.avi").unlink()  # this is told by its rows, if they are not there yet
    shutil.copytree(root, folder / "moved")
    write_avi(folder / "moved/jack/a.avi", 4, seed=2)
    assert explain_dataset("moved", "out", RECIPE, **SETTINGS).new == 0


def test_rows_of_another_configuration_are_never_taken_over(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    other = replace(RECIPE, model=f"{data_sets.MODULE}:other")
    record = Path("out/configuration.json")
    text = record.read_text()
    record.unlink()
    with pytest.raises(StoreError, match=r"out holds manifest and is no store"):
        explain_dataset(root, "out", other, **SETTINGS)
    assert not record.exists()
    explain_dataset(root, "second", other, **SETTINGS)
    record.write_text(Path("second/configuration.json").read_text())
    with pytest.raises(
        StoreError, match=r"out has rows of another configuration \(\w{16}\) than configuration\.json tells"
    ):
        explain_dataset(root, "out", other, **SETTINGS)
    record.write_text(text)
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).new == 0


def test_maps_that_were_lost_are_explained_anew(root: Path) -> None:
    explain_dataset(root, "whole", RECIPE, **SETTINGS)
    for lost, rows in (
        ("maps.zarr/spatial/c.1.0.0.0", 4),
        ("maps.zarr/temporal", 11),
        ("maps.zarr", 11),
        ("manifest", 11),
    ):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("whole", "out")
        place = Path("out", lost)
        place.unlink() if place.is_file() else shutil.rmtree(place)
        if rows == 4:
            assert dataset.open("out").temporal[:].any()
            with pytest.raises(
                StoreError, match=r"out has lost the spatial maps of shards 1: the command that made it"
            ):
                _ = dataset.open("out").total
        assert explain_dataset(root, "out", RECIPE, **SETTINGS).new == rows
        assert same(Path("out"), Path("whole"))
    # also a shard in which every map is zero has its file
    explain_dataset(root, "nothing", replace(RECIPE, model=f"{data_sets.MODULE}:exploding"), **SETTINGS)
    assert len(list(Path("nothing/maps.zarr/spatial").glob("c.*"))) == 3
    assert explain_dataset(root, "nothing", replace(RECIPE, model=f"{data_sets.MODULE}:exploding"), **SETTINGS).new == 0


def test_a_damaged_file_of_maps_is_named(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    file = Path("out/maps.zarr/spatial/c.1.0.0.0")
    file.write_bytes(file.read_bytes()[:-20])
    store = dataset.open("out")
    assert store.spatial[:4].any()
    with pytest.raises(StoreError, match=r"maps\.zarr/spatial/c\.1\.0\.0\.0 is damaged .* Delete it"):
        store.spatial[5]


def test_files_of_others_are_left_alone(root: Path, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.temporary").write_text("mine")
    with pytest.raises(StoreError, match=r"out holds thesis\.temporary and is no store"):
        explain_dataset(root, "out", RECIPE, **SETTINGS)
    explain_dataset(root, "second", RECIPE, **SETTINGS)
    for name in ("a.temporary", "mine/b.temporary"):
        (folder / "second" / name).parent.mkdir(exist_ok=True)
        (folder / "second" / name).write_text("mine")
    for name in ("clips.parquet.temporary", "manifest/part-00001.parquet.temporary", "maps.zarr/spatial/c.0.temporary"):
        (folder / "second" / name).write_text("of a run that was killed")
    explain_dataset(root, "second", RECIPE, **SETTINGS)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*.temporary")}
    assert left == {"out/thesis.temporary", "second/a.temporary", "second/mine/b.temporary"}


def test_labels_are_no_classes_of_a_model_with_more_outputs(root: Path) -> None:
    """Two folders say nothing about which of three outputs they are."""
    shutil.rmtree(root / "walk")
    nameless = replace(RECIPE, classes=None)
    explain_dataset(root, "out", nameless, **SETTINGS)
    rows, _ = stored(Path("out"))
    assert {(row["label"], row["label_index"]) for row in rows} == {("bend", None), ("jack", None)}
    with pytest.raises(ValueError, match="have no label that is a class of the model"):
        explain_dataset(root, "second", nameless, target="label", **SETTINGS)


def test_the_score_is_a_logit_also_where_the_model_returns_probabilities(root: Path) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS)
    with pytest.warns(UserWarning, match="its logits are explained"):
        explain_dataset(root, "second", replace(RECIPE, model=f"{data_sets.MODULE}:probabilities"), **SETTINGS)
    rows, arrays = stored(Path("second"))
    np.testing.assert_allclose(
        [row["score"] for row in rows], [row["score"] for row in stored(Path("out"))[0]], rtol=1e-4
    )
    sums = (arrays["spatial"] + arrays["temporal"]).sum((1, 2, 3))
    np.testing.assert_allclose([row["score"] - row["delta"] for row in rows], sums, rtol=1e-4)


def test_what_cannot_be_is_refused_before_anything_is_written(root: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="decoders must be at least 0, not -1"):
        explain_dataset(root, "out", RECIPE, decoders=-1)
    with pytest.raises(StoreError, match=r"cannot write to out\\xff: parquet needs a name that is UTF-8"):
        explain_dataset(root, os.fsdecode(b"out\xff"), RECIPE, **SETTINGS)
    assert not [name for name in os.listdir(os.fsencode(folder)) if name.startswith(b"out")]


def test_a_folder_that_is_no_store_is_left_alone(root: Path, folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        explain_dataset(root, "mine", RECIPE, **SETTINGS)
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(StoreError, match="is a file"):
        explain_dataset(root, "classes.txt", RECIPE, **SETTINGS)
    with pytest.raises(StoreError, match="no store"):
        dataset.open("mine")
    for wrong in (
        {"maps": ("spatial",)},
        {"target": "best"},
        {"shard_clips": 3},
        {"batch_clips": 0},
        {"encoding": "int4"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            explain_dataset(root, "out", RECIPE, **{**SETTINGS, **wrong})
    assert not (folder / "out").exists()


def break_videos(root: Path) -> dict[str, str]:
    """Videos with something wrong, beside good ones, and what their rows must say."""
    write_avi(root / "bend" / "one frame.avi", 1)
    write_avi(root / "bend" / "odd.avi", 9, height=33, width=47)
    good = write_avi(root / "jack" / "cut.avi", 40, seed=3).read_bytes()
    (root / "jack" / "cut.avi").write_bytes(good[: len(good) // 2])
    (root / "jack" / "empty.avi").touch()
    (root / "walk" / "folder.avi").mkdir(parents=True)
    (root / "walk" / "loop.avi").symlink_to("loop.avi")
    (root / "walk" / "around").symlink_to("..", target_is_directory=True)
    (root / "walk" / "text.avi").write_text("not a video\n" * 99)
    os.mkfifo(root / "walk" / "pipe.avi")
    return {
        "jack/empty.avi": "empty",
        "walk/folder.avi": "directory",
        "walk/loop.avi": "cannot open",
        "walk/text.avi": "not a video",
        "walk/pipe.avi": "not a regular file",
    }


def test_broken_videos_have_rows_with_errors_and_the_others_are_explained(root: Path) -> None:
    errors = break_videos(root)
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS)
    rows, arrays = stored(Path("out"))
    failed = {row["path"]: row["error"] for row in rows if row["status"] == "failed" and row["frame"] == 0}
    assert failed.keys() == errors.keys()
    assert all(word in failed[path] for path, word in errors.items())
    by_path = {
        name: [row for row in rows if row["path"] == name] for name in [*TREE, "bend/one frame.avi", "bend/odd.avi"]
    }
    assert all(row["status"] == "ok" for of_video in by_path.values() for row in of_video)
    assert [len(of_video) for of_video in by_path.values()] == [2, 3, 1, 1, 4, 1, 2]
    (short,) = by_path["bend/one frame.avi"]
    assert short["looped"] and "repeated in a loop" in short["warning"]
    assert short["temporal_mass"] == 0 and not arrays["temporal"][short["row"]].any()
    # the header promises 40 frames: what is missing is not dropped silently
    cut = [row for row in rows if row["path"] == "jack/cut.avi"]
    assert [row["frame"] for row in cut] == list(range(0, 40, FRAMES))
    assert cut[0]["status"] == "ok" and cut[-1]["status"] == "failed"
    assert "ends after" in cut[-1]["error"]
    assert outcome.failed == len(errors) + sum(row["status"] == "failed" for row in cut)
    assert outcome.warnings >= 1
    store = dataset.open("out")
    for row in rows:
        assert np.isnan(store.temporal[row["row"]]).all() == (row["status"] == "failed")


def test_a_clip_beside_one_that_cannot_begin(root: Path) -> None:
    """Two clips of a video, of which one would begin after its end."""
    (root / "t.csv").write_text("path,start\nbend/a.avi,0\nbend/a.avi,100\nbend/b.avi,0\n")
    explain_dataset(root / "t.csv", "out", RECIPE, **SETTINGS)
    rows, arrays = stored(Path("out"))
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "start 100 s is beyond the end" in rows[1]["error"]
    assert arrays["spatial"][0].any()


def test_a_file_that_may_not_be_read(root: Path) -> None:
    path = Path(tempfile.mkdtemp()) / "v.avi"
    path.parent.chmod(0o755)
    shutil.copy(root / "bend/a.avi", path)
    path.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # everything may be read by root
    try:
        probe = probe_entry(path.parent, Entry(b"v.avi"), FRAMES, 1, FRAMES)
    finally:
        os.seteuid(user)
        shutil.rmtree(path.parent)
    assert probe.starts == [] and "Permission denied" in str(probe.error)


def test_relevance_that_is_not_finite_is_not_stored(root: Path) -> None:
    outcome = explain_dataset(root, "out", replace(RECIPE, model=f"{data_sets.MODULE}:exploding"), **SETTINGS)
    rows, arrays = stored(Path("out"))
    assert outcome.failed == len(rows) == 11
    assert {row["error"] for row in rows} == {"the relevance is not finite"}
    assert not arrays["spatial"].any()
    assert np.isnan(dataset.open("out").total[:]).all()


HOSTILE = [
    b"a b.avi",
    b"it's.avi",
    b'"quoted".avi',
    b"new\nline.avi",
    b"not utf-8 \xff\xfe.avi",
    b"back\\slash.avi",
    b"-x.avi",
    "日本.avi".encode(),
]


def test_hostile_names(folder: Path) -> None:
    root = folder / "root"
    source = write_avi(folder / "source.avi", 5).read_bytes()
    for name in HOSTILE:
        (root / "jack").mkdir(parents=True, exist_ok=True)
        with open(os.path.join(os.fsencode(root), b"jack", name), "wb") as file:
            file.write(source)
    strange = os.path.join(os.fsencode(root), b"cl\xffss\n; rm -rf")
    os.mkdir(strange)
    with open(os.path.join(strange, b"v.avi"), "wb") as file:
        file.write(source)
    empty = b"empty \xff.avi"
    os.close(os.open(os.path.join(os.fsencode(root), b"jack", empty), os.O_CREAT))
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS)
    assert (outcome.clips, outcome.failed) == (len(HOSTILE) + 2, 1)
    assert [row["error"] for row in stored(Path("out"))[0] if row["error"]] == [
        f"{root}/jack/empty \\xff.avi is empty (0 bytes)"
    ]
    rows, _ = stored(Path("out"))
    assert {row["path_bytes"] for row in rows} == {b"jack/" + name for name in (*HOSTILE, empty)} | {
        b"cl\xffss\n; rm -rf/v.avi"
    }
    assert len({row["path"] for row in rows}) == len(rows)
    assert all(row["path"].isprintable() for row in rows)
    assert [row["label_index"] for row in rows if row["path"].startswith("jack")] == [1] * (len(HOSTILE) + 1)
    assert [row["label_index"] for row in rows if row["path"].startswith("cl")] == [None]
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).new == 0


def test_a_class_that_climbs_out_stays_a_name(folder: Path) -> None:
    write_avi(folder / "root" / "v.avi", 5)
    (folder / "root" / "clips.csv").write_text('path,label\nv.avi,"../../x"\n')
    outcome = explain_dataset(folder / "root" / "clips.csv", "deep/out", RECIPE, **SETTINGS)
    assert outcome.failed == 0
    assert stored(Path("deep/out"))[0][0]["label"] == "../../x"
    assert not list(folder.glob("**/x"))
    (folder / "root" / "classInd.txt").write_text("1 ../../x\n2 jack\n")
    (folder / "root" / "list.txt").write_text("../../x/v.avi 1\n")
    with pytest.raises(ValueError, match=r"line 1: \.\./\.\./x/v\.avi leaves"):
        explain_dataset(folder / "root", "other", RECIPE, **SETTINGS, lists=["list.txt"])


def test_failed_clips_are_explained_once_the_video_is_whole(root: Path, folder: Path) -> None:
    make_tree(folder / "good", TREE)
    good = {name: (root / name).read_bytes() for name in ("bend/b.avi", "jack/c.avi")}
    (root / "bend/b.avi").write_bytes(b"")
    (root / "jack/c.avi").write_bytes(b"no video")
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).failed == 2
    before = stored(Path("out"))[0]
    # still broken: nothing changes
    assert explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True).failed == 2
    assert repr(stored(Path("out"))[0]) == repr(before)
    for name, data in good.items():
        (root / name).write_bytes(data)
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).failed == 2  # not asked to try again
    outcome = explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True)
    assert (outcome.failed, outcome.clips) == (0, 11)
    explain_dataset(folder / "good", "whole", RECIPE, **SETTINGS)
    store, whole = dataset.open("out"), dataset.open("whole")
    rows = {row["id"]: row["row"] for row in store.table.to_pylist()}
    for row in whole.table.to_pylist():
        got, expected = store.total[rows[row["id"]]], whole.total[row["row"]]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    # no row that was there has moved
    assert [row["path"] for row in before] == [row["path"] for row in store.table.to_pylist()][: len(before)]
    assert explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True).new == 0


@pytest.mark.parametrize("target", ["top1", "video"])
def test_a_clip_that_failed_comes_out_as_if_it_had_not(root: Path, folder: Path, target: str) -> None:
    """A video cut short has rows for what its header promises; whole again, all is as in a run over whole videos."""
    explain_dataset(root, "whole", RECIPE, **SETTINGS, target=target)
    data = (root / "walk/d.avi").read_bytes()
    (root / "walk/d.avi").write_bytes(data[: len(data) // 2])
    failed = explain_dataset(root, "out", RECIPE, **SETTINGS, target=target).failed
    assert 0 < failed < 4
    (root / "walk/d.avi").write_bytes(data)
    assert explain_dataset(root, "out", RECIPE, **SETTINGS, target=target, retry_failed=True).failed == 0
    assert same(Path("out"), Path("whole"))


@pytest.mark.parametrize("committed", [0, 1, 2])
def test_a_retry_that_is_interrupted_is_one_all_the_same(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, committed: int
) -> None:
    """Rows of a video that was replaced are of the new one, those that were explained before it, too.

    Until they are, those that had failed say why.
    """

    def errors() -> dict[str, str]:
        return {row["id"]: row["error"] for row in stored(Path("out"))[0] if row["status"] == "failed"}

    whole = (root / "walk/d.avi").read_bytes()
    (root / "walk/d.avi").write_bytes(whole[: len(whole) // 2])
    assert 0 < explain_dataset(root, "out", RECIPE, **SETTINGS).failed < 4
    reasons = errors()
    shutil.copytree("out", "undisturbed")
    write_avi(root / "walk/d.avi", 4 * data_sets.FRAMES, seed=99)
    assert explain_dataset(root, "undisturbed", RECIPE, **SETTINGS, retry_failed=True).failed == 0

    commit, done = Store.commit, itertools.count()

    def dies(store: Store, shard: int, rows: Any) -> None:
        if next(done) == committed:
            raise OSError("the disk is gone")
        commit(store, shard, rows)

    monkeypatch.setattr(Store, "commit", dies)
    with suppress(OSError):
        explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True)
    assert committed or reasons.items() <= errors().items()
    monkeypatch.setattr(Store, "commit", commit)
    assert explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True).failed == 0
    assert same(Path("out"), Path("undisturbed"))


def test_clips_follow_each_other_at_any_stride(root: Path) -> None:
    strided = replace(RECIPE, preprocessing={**data_sets.PREPROCESSING, "stride": 2})
    explain_dataset(root, "out", strided, **SETTINGS)
    rows, _ = stored(Path("out"))
    assert [row["frame"] for row in rows if row["path"] == "walk/d.avi"] == [0, 2 * FRAMES]


def test_scores_are_those_of_the_explained_class(root: Path) -> None:
    rows = []
    for name in CLASSES:
        (root / "t.csv").write_text(f"path,aim\nbend/a.avi,{name}\n")
        explain_dataset(root / "t.csv", name, RECIPE, target="column:aim", **SETTINGS)
        rows.append(stored(Path(name))[0][0])
    outputs = explained(resized(frames_of(root / "bend/a.avi")[:FRAMES]))[0]
    np.testing.assert_allclose([row["score"] for row in rows], outputs.numpy(), rtol=1e-4, atol=1e-6)
    assert [row["target"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("changed", ["bend/a.avi,0.2,walk", "bend/a.avi,0,jack"])
def test_a_table_that_asks_for_something_else_is_refused(root: Path, changed: str) -> None:
    table = root / "t.csv"
    table.write_text("path,start,aim\nbend/a.avi,0,walk\n")
    explain_dataset(table, "out", RECIPE, target="column:aim", **SETTINGS)
    table.write_text(f"path,start,aim\n{changed}\n")
    with pytest.raises(StoreError, match="other videos"):
        explain_dataset(table, "out", RECIPE, target="column:aim", **SETTINGS)


@pytest.mark.parametrize("maps", [("spatial", "spatial"), ("spatial", "saptial"), ("spatial", "temporal", "total")])
def test_maps_are_two_different_ones(root: Path, maps: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="maps must be two of"):
        explain_dataset(root, "out", RECIPE, maps=maps, **SETTINGS)
    assert not Path("out").exists()


def test_processes_that_die_while_they_start_are_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more clips to tell them of than a pipe holds."""
    (root / "t.csv").write_text("path,start\n" + "bend/a.avi,0\n" * 2000)
    monkeypatch.setattr(engine_local, "_serve", halves.die_at_once)
    with pytest.raises(RuntimeError, match=r"the process for cpu died 3 times in a row \(exit code 9\)"):
        explain_dataset(root / "t.csv", "out", RECIPE, **{**SETTINGS, "shard_clips": 100}, devices=["cpu", "cpu"])


def test_labels_that_are_no_class_of_the_model_are_told(root: Path, folder: Path) -> None:
    (root / "bend").rename(root / "run")
    with pytest.warns(UserWarning, match=r"5 of 11 clips have labels that are no class of the model \(run\)"):
        explain_dataset(root, "out", RECIPE, **SETTINGS)
    assert [row["label_index"] for row in stored(Path("out"))[0] if row["label"] == "run"] == [None] * 5


def test_a_retry_names_maps_that_are_damaged(root: Path) -> None:
    (root / "walk/broken.avi").touch()
    assert explain_dataset(root, "out", RECIPE, **SETTINGS).failed == 1
    row = next(row for row in stored(Path("out"))[0] if row["status"] != "ok")
    file = Path(f"out/maps.zarr/spatial/c.{row['shard']}.0.0.0")
    file.write_bytes(file.read_bytes()[:-20])
    write_avi(root / "walk/broken.avi", FRAMES)
    with pytest.raises(StoreError, match=rf"out/maps\.zarr/spatial/{file.name} is damaged .* Delete it"):
        explain_dataset(root, "out", RECIPE, **SETTINGS, retry_failed=True)


def without_a_terminal() -> TextIO:
    """What a stream is whose terminal is gone: writing to it is an input/output error."""
    ours, theirs = os.openpty()
    os.close(ours)
    return os.fdopen(theirs, "w", buffering=1)


def without_a_reader() -> TextIO:
    """What a stream is whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


@pytest.mark.parametrize("stderr", [without_a_reader, without_a_terminal, lambda: None], ids=["left", "gone", "closed"])
@pytest.mark.parametrize("stdout", [without_a_reader, lambda: None], ids=["left", "closed"])
def test_a_run_outlasts_who_reads_what_it_prints(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    stdout: Callable[[], TextIO | None],
    stderr: Callable[[], TextIO | None],
) -> None:
    (root / "jack" / "empty.avi").touch()
    monkeypatch.setattr(sys, "stdout", stdout())
    monkeypatch.setattr(sys, "stderr", stderr())
    options = [option for option in OPTIONS if option != "--quiet"]
    assert main(["dataset", str(root), *options, "-o", "out", "--decoders", "0", "--batch-clips", "2"]) == 1
    rows, _ = stored(Path("out"))
    assert [row["status"] for row in rows].count("ok") == 11 and len(rows) == 12


def test_the_command_and_its_exit_codes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dataset", str(root), *OPTIONS, "-o", "out", "--batch-clips", "2", "--decoders", "0"]
    assert main([*command, "--target", "label", "--encoding", "int8"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("11 clips, 11 of them new: 11 explained, 0 failed\n")
    assert err == ""
    assert dataset.open("out").configuration.shard_clips % 2 == 0
    assert main([*command, "--target", "top1", "--encoding", "int8"]) == 2
    assert 'target: "label" -> "top1"' in capsys.readouterr().err
    (root / "jack" / "empty.avi").touch()
    (root / "jack" / "notes.txt").touch()
    command[command.index("out")] = "second"
    assert main(command) == 1
    out, _ = capsys.readouterr()
    assert "12 clips, 12 of them new: 11 explained, 1 failed" in out
    assert "--retry-failed" in out
    assert "1 files were passed over" in out
    write_avi(root / "jack" / "empty.avi", 4)
    assert main([*command, "--retry-failed"]) == 0
    for wrong, message in (
        (["nowhere", *OPTIONS], "nowhere"),
        ([str(root), *OPTIONS, "--maps", "spatial"], "maps must be two of"),
        ([str(root), *OPTIONS, "--list", "testlist09.txt"], "testlist09.txt"),
        ([str(root), *OPTIONS, "--target", "column:x"], "column:x"),
        ([str(root), *OPTIONS, "--internal-batch-size", "0"], "internal_batch_size"),
    ):
        assert main(["dataset", *wrong, "-o", "third"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path("third").exists()


def test_progress_names_the_bottleneck(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_dataset(root, "out", RECIPE, **SETTINGS, show_progress=True)
    err = capsys.readouterr().err
    assert "11/11" in err
    assert "bottleneck: " in err
    assert "clip/s" in err or "s/clip" in err


def against_a_loop(stores: dict[Path, float], data: Path) -> None:
    """Compare stores of the same UCF-10 videos with explanations one by one, each within a part of a map's maximum."""
    loaded = load_model("c3d_mini", "ucf10")
    prepare = Preprocessing.from_dict(loaded.preprocessing or {})
    loop = DiscriminativeDeepTaylor(loaded.model, *prepare.bounds)
    opened = {dataset.open(out): within for out, within in stores.items()}
    for row in next(iter(opened)).table.to_pylist():
        frames = frames_of(data / "ucf10_64px" / row["path"])[row["frame"] :]
        clip = prepare(frames[: prepare.frames * prepare.stride : prepare.stride])[None]
        maps = loop.attribute(clip, target=int(loaded.model(clip).argmax()))
        for name in ("spatial", "temporal"):
            expected = getattr(maps, name)[0].numpy()
            for opened_store, within in opened.items():
                assert (
                    np.abs(getattr(opened_store, name)[row["row"]] - expected).max() <= within * np.abs(expected).max()
                )


UCF10 = Recipe("c3d_mini", weights="ucf10")


def test_some_of_ucf10_against_a_plain_loop(data: Path, tmp_path: Path) -> None:
    videos = (data / "ucf10_64px" / "vallist.txt").read_text().splitlines()
    chosen = [next(line for line in videos if line.endswith(f" {number}")) for number in range(1, 11)]
    (tmp_path / "some.txt").write_text("\n".join(chosen))
    settings: dict[str, Any] = {"lists": [str(tmp_path / "some.txt")], "encoding": "float16", "decoders": 0}
    outcome = explain_dataset(data / "ucf10_64px", tmp_path / "out", UCF10, **settings)
    assert (outcome.clips, outcome.failed) == (10, 0)
    against_a_loop({tmp_path / "out": 1e-3}, data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_of_ucf10_in_every_encoding(data: Path, tmp_path: Path) -> None:
    listed = [line.split()[0] for line in (data / "ucf10_64px" / "vallist.txt").read_text().splitlines()]
    for encoding in ("float32", "float16", "int8"):
        settings: dict[str, Any] = {"lists": ["vallist.txt"], "encoding": encoding}
        assert explain_dataset(data / "ucf10_64px", tmp_path / encoding, UCF10, **settings).failed == 0
        # every other frame of 30: one clip of 15
        assert [row["path"] for row in stored(tmp_path / encoding)[0]] == listed
    against_a_loop({tmp_path / "float32": 1e-5, tmp_path / "float16": 1e-3, tmp_path / "int8": 1 / 250}, data)
