"""Exports hold the store's maps, whatever the videos are called, and write nowhere but in their folder."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
import pyarrow as pa
import pyarrow.parquet as pq
from data_sets import FRAMES, PREPROCESSING, RECIPE, SIZE, frames_of, make_tree, stored, write_avi
from numpy.typing import NDArray
from safetensors import safe_open

import captum_dtd.dataset as dataset
from captum_dtd.cli import main
from captum_dtd.dataset import explain_dataset, export_mp4, export_safetensors, export_webdataset
from captum_dtd.dataset.export import file_name

TREE = {"bend/a.avi": 9, "jack/b c.avi": 13, "walk/d.avi": 4}
KINDS = ("safetensors", "webdataset", "mp4")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_sets.install_model(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def store(folder: Path) -> dataset.Relevance:
    """Six clips of three videos, and a video that cannot be read."""
    make_tree(folder / "root", TREE)
    (folder / "root" / "walk" / "broken.avi").touch()
    explain_dataset("root", "out", RECIPE, decoders=0, encoding="float16", batch_clips=2, shard_clips=4)
    return dataset.open("out")


def maps_of(row: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """A clip's maps by what is stored and the formula of the documentation."""
    maps = {
        name: arrays[name][row["row"]].astype(np.float32) * row[f"{name}_scale"] for name in ("spatial", "temporal")
    }
    return {**maps, "total": maps["spatial"] + maps["temporal"]}


def assert_same_maps(given: dict[str, NDArray[np.float32]], expected: dict[str, NDArray[np.float32]]) -> None:
    for name, values in expected.items():
        assert given[name].dtype == np.float32 and given[name].shape == (FRAMES, SIZE, SIZE)
        assert np.abs(values).max() > 0
        np.testing.assert_allclose(given[name], values, rtol=1e-6, atol=1e-6 * np.abs(values).max())


def without_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "path_bytes"}


def test_safetensors_hold_a_video_each(store: dataset.Relevance) -> None:
    exported = export_safetensors(store, "files")
    rows, arrays = stored(Path("out"))
    assert (exported.clips, exported.files) == (6, 3)
    assert list(exported.left_out) == ["walk/broken.avi@0"]
    files = sorted(path for path in Path("files").rglob("*") if path.is_file())
    assert files == [Path("files", f"{name}.safetensors") for name in TREE]
    for name, file in zip(TREE, files, strict=True):
        of_video = [row for row in rows if row["path"] == name]
        with safe_open(file, "numpy") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        assert metadata["video"] == name
        assert json.loads(metadata["clips"]) == [without_bytes(row) for row in of_video]
        assert json.loads(metadata["configuration"]) == data_sets.configuration(Path("out"))
        assert {len(values) for values in tensors.values()} == {len(of_video)}
        for position, row in enumerate(of_video):
            given = {name: values[position] for name, values in tensors.items()}
            assert_same_maps(given, maps_of(row, arrays))


def test_webdataset_reads_its_archives(store: dataset.Relevance) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    exported = export_webdataset(store, "archives")
    assert (exported.clips, exported.files, len(exported.left_out)) == (6, 2, 1)
    archives = sorted(Path("archives").iterdir())
    assert [path.name for path in archives] == ["relevance-00000.tar", "relevance-00001.tar"]
    rows, arrays = stored(Path("out"))
    samples = list(webdataset.WebDataset([str(path) for path in archives], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{row['row']:08d}" for row in rows if row["status"] == "ok"]
    for sample in samples:
        row = rows[sample["json"]["row"]]
        assert sample["json"] == without_bytes(row)
        given = {name: sample[f"{name}.npy"] for name in ("spatial", "temporal", "total")}
        assert_same_maps(given, maps_of(row, arrays))
    before = [path.read_bytes() for path in archives]
    export_webdataset(store, "archives")
    assert [path.read_bytes() for path in archives] == before
    with pytest.raises(ValueError, match=r"archives of another export.*\(relevance-00001\.tar\): name another folder"):
        export_webdataset(store, "archives", rows=[0])
    assert [path.read_bytes() for path in archives] == before


def test_mp4_leaves_out_clips_of_a_video_that_was_replaced(store: dataset.Relevance) -> None:
    data_sets.write_avi(Path("root/bend/a.avi"), 9, seed=7)
    exported = export_mp4(store, "videos")
    of_it = [row["id"] for row in store.table.to_pylist() if row["path"] == "bend/a.avi"]
    assert of_it and {exported.left_out[name] for name in of_it} == {
        "its video is of another size than when it was explained"
    }
    assert exported.clips == exported.files == 6 - len(of_it)
    assert not list(Path("videos").glob("bend/*"))


def test_mp4_shows_the_clip_beside_its_relevance(store: dataset.Relevance) -> None:
    exported = export_mp4(store, "videos")
    assert (exported.clips, exported.files, len(exported.left_out)) == (6, 6, 1)
    rows, arrays = stored(Path("out"))
    for row in rows:
        if row["status"] != "ok":
            continue
        pictures = frames_of(Path("videos", f"{row['id']}.mp4")).astype(float)
        assert len(pictures) == FRAMES
        line, panel, gap = 24, 168, 4  # titles above; 24x24 seen of 24x32, seven times as large
        clip = frames_of(Path("root") / row["path"])[row["frame"] :][:FRAMES, :, 4:28].astype(float)
        shown = pictures[:, line : line + panel, :panel].reshape(FRAMES, 24, 7, 24, 7, 3).mean((2, 4))
        assert np.abs(shown - clip).mean() < 12
        relevance = {}
        for number, name in enumerate(("total", "spatial", "temporal"), start=1):
            left = number * (panel + gap)
            coloured = pictures[:, line : line + panel, left : left + panel]
            relevance[name] = (coloured[..., 0] - coloured[..., 2]).mean((1, 2))
            signed = np.array([frame.sum() for frame in maps_of(row, arrays)[name]])
            assert np.corrcoef(relevance[name], signed)[0, 1] > 0.5


def test_mp4_shows_the_frames_that_were_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other one of the video's, also of a clip that a table names twice."""
    write_avi(folder / "root" / "a.avi", 20)
    (folder / "root" / "t.csv").write_text("path,start\na.avi,0.2\na.avi,0.2\na.avi,0\n")
    recipe = replace(RECIPE, preprocessing={**PREPROCESSING, "stride": 2})
    explain_dataset("root/t.csv", "out", recipe, decoders=0, batch_clips=1, shard_clips=3)
    shown: list[dict[str, Any]] = []

    def noted(path: Path, frames: Any, maps: Any, **options: Any) -> None:
        Path(path).touch()
        shown.append({"frames": frames, **options})

    monkeypatch.setattr("captum_dtd.dataset.export.write_overlay", noted)
    exported = export_mp4(dataset.open("out"), "videos")
    assert (exported.files, len(list(Path("videos").rglob("*.mp4")))) == (3, 3)
    rows, _ = stored(Path("out"))
    whole = frames_of(Path("root/a.avi"))
    assert [row["frame"] for row in rows] == [5, 5, 0]
    for row, one in zip(rows, shown, strict=True):
        assert np.array_equal(one["frames"], whole[row["frame"] :: 2][:FRAMES, :, 4:28])
        assert one["share"] == row["temporal_mass"] / (row["spatial_mass"] + row["temporal_mass"])
        assert one["fps"] == row["fps"] / 2


def test_mp4_shows_a_clip_without_relevance_too(folder: Path) -> None:
    make_tree(folder / "root", {"bend/a.avi": 4})
    explain_dataset("root", "out", replace(RECIPE, model=f"{data_sets.MODULE}:silent"), decoders=0)
    exported = export_mp4(dataset.open("out"), "videos")
    assert (exported.files, exported.left_out) == (1, {})


def test_what_is_left_out_and_what_is_refused(store: dataset.Relevance, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["export", "out", "--to", "mp4", "-o", "some", "--rows", "1", "0", "--quiet"]) == 0
    assert capsys.readouterr() == ("some: 2 clips in 2 files, 0 left out\n", "")
    assert sorted(path.name for path in Path("some/bend").iterdir()) == ["a.avi@0.mp4", "a.avi@4.mp4"]
    (broken,) = (row["row"] for row in store.table.to_pylist() if row["status"] != "ok")
    for kind in KINDS:
        assert main(["export", "out", "--to", kind, "-o", "less", "--rows", "0", str(broken), "--quiet"]) == 1
        out, err = capsys.readouterr()
        assert "left out walk/broken.avi@0: " in err and "1 clips in 1 files, 1 left out" in out
    os.rename("root", "moved")
    Path("moved/bend/a.avi").unlink()
    for options, message in (
        (["--to", "mp4"], "--videos"),
        (["--to", "mp4", "--videos", "moved", "--rows", "99"], "out has no row 99"),
        (["--to", "safetensors", "--rows", "-1"], "out has no row -1"),
        (["--to", "webdataset", "--videos", "moved"], "--videos goes with --to mp4"),
        (["--to", "zip"], "invalid choice"),
    ):
        assert main(["export", "out", *options, "-o", "nothing"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    explain_dataset("moved", "bare", RECIPE, decoders=0, maps=(), batch_clips=2, shard_clips=4)
    for kind in KINDS:
        assert main(["export", "bare", "--to", kind, "-o", "nothing"]) == 2
        assert "keeps no maps" in capsys.readouterr().err
    assert not Path("nothing").exists()
    exported = export_mp4(store, "rest", videos="moved")
    assert exported.files == 4
    assert sorted(exported.left_out) == ["bend/a.avi@0", "bend/a.avi@4", "walk/broken.avi@0"]
    assert "another size" not in exported.left_out["bend/a.avi@0"]


def test_a_file_that_cannot_be_written_leaves_none_behind(
    store: dataset.Relevance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    export_safetensors(store, "files", [0])
    before = {path: path.read_bytes() for path in Path("files").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for export in (export_safetensors, export_webdataset, export_mp4):
            with pytest.raises(OSError, match="the disk is full"):
                export(store, "files")
    assert {path: path.read_bytes() for path in Path("files").rglob("*") if path.is_file()} == before


HOSTILE = (
    *(
        b"../../outside.avi",
        b"../outside.avi",
        b"a\nb.avi",
        b"a%0Ab.avi",
        b"a\\nb.avi",
        b"\xff.avi",
        b"%FF.avi",
        b"dot./v.avi",
    ),
    *(
        b" .avi",
        b"quote'\".avi",
        b"x.avi",
        b"x.avi.safetensors/y.avi",
        b"x.avi@0.mp4/y.avi",
        b"-o.avi",
        "höhe.avi".encode(),
    ),
    *(b"n" * 250 + b".avi", b"n" * 249 + b"m.avi", b"x.avi.safetensors.temporary/z.avi"),
)


def test_hostile_names_neither_escape_nor_collide(folder: Path) -> None:
    place = folder / "deep" / "table"
    place.mkdir(parents=True)
    for seed, name in enumerate(HOSTILE):
        video = Path(os.fsdecode(os.path.join(os.fsencode(place), name)))
        video.parent.mkdir(parents=True, exist_ok=True)
        os.rename(write_avi(folder / "a.avi", 4, seed), video)
    absolute = os.fsencode(folder / "absolute.avi")
    write_avi(folder / "absolute.avi", 4, 99)
    names = [*HOSTILE, absolute]
    pq.write_table(pa.table({"path": pa.array(names, pa.binary())}), place / "table.parquet")
    assert explain_dataset(place / "table.parquet", "out", RECIPE, decoders=0, batch_clips=4, shard_clips=8).failed == 0
    store = dataset.open("out")
    before = {path for path in folder.rglob("*") if not path.is_dir()}
    (folder / "a" / "b" / "c").mkdir(parents=True)
    inside = folder / "a" / "b" / "c" / "files"
    for export, suffix in ((export_safetensors, ".safetensors"), (export_mp4, ".mp4"), (export_webdataset, ".tar")):
        exported = export(store, inside / suffix[1:])
        assert (exported.clips, exported.left_out) == (len(names), {})
        files = [path for path in (inside / suffix[1:]).rglob("*") if path.is_file()]
        assert len(files) == exported.files
        assert {path.suffix for path in files} == {suffix}
    after = {path for path in folder.rglob("*") if not path.is_dir()}
    assert all(path.is_relative_to(inside) for path in after - before)
    videos = []
    for path in (inside / "safetensors").rglob("*.safetensors"):
        with safe_open(path, "numpy") as content:
            videos.append(content.metadata()["video"])
    assert sorted(videos) == sorted(store.table["path"].to_pylist())


def test_names_of_files_differ_stay_inside_and_fit() -> None:
    pieces = (
        b"",
        b".",
        b"..",
        b"a",
        b"a%",
        b"%",
        b"a.mp4",
        b"a.temporary",
        b"a@0.mp4.temporary",
        b"\xff",
        b"%FF",
        b"\n",
        b"\\",
        b":",
        b"~",
        b"@1",
    )
    pieces += ("ü".encode(), "ü".encode() * 130, b"n" * 255, b"n" * 254 + b"\xff", b"\xff" * 255, "\u202e".encode())
    paths = [b"/".join(parts) for count in (1, 2, 3) for parts in itertools.product(pieces, repeat=count)]
    names = {file_name(path, tail, ".mp4") for path in paths for tail in ("@0", "@1")}
    assert len(names) == 2 * len(paths)
    folders = set()
    for name in names:
        parts = PurePosixPath(name).parts
        assert "/".join(parts) == name
        assert not set(parts) & {".", "..", "/"}
        assert all(len(os.fsencode(part)) <= 255 for part in parts)
        assert len(os.fsencode(parts[-1] + ".temporary")) <= 255
        assert name.isprintable() and "\\" not in name and name.endswith(".mp4")
        folders |= {str(parent) for parent in PurePosixPath(name).parents}
    assert not folders & names
    assert not folders & {f"{name}.temporary" for name in names}
