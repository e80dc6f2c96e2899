"""How maps are stored, and what a reader gets: of a finished store, an unfinished one, one that is being written."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("zarr", reason="zarr is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import data_sets
from data_sets import RECIPE, SIZE, make_tree, stored

import captum_dtd.dataset as dataset
from captum_dtd.dataset import StoreError, explain_dataset
from captum_dtd.dataset import store as writing
from captum_dtd.dataset.encoding import decode_maps, encode_maps
from captum_dtd.dataset.store import Store, read_clips, read_configuration, running_alone, write_durably
from captum_dtd.dataset.work import Explained


@pytest.mark.parametrize(("encoding", "within"), [("float32", 0.0), ("float16", 1 / 4096), ("int8", 1 / 253.9)])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-4, 1.0, 1e30])
def test_every_encoding_keeps_small_and_large_maps(
    encoding: str, within: float, size: float, generator: torch.Generator
) -> None:
    values = size * torch.randn(5, 7, 6, generator=generator) ** 3
    values[3] *= 1e-3
    encoded, scales = encode_maps(values, encoding)  # type: ignore[arg-type]
    assert str(encoded.dtype) == f"torch.{encoding}"
    back = decode_maps(encoded.numpy(), scales.numpy())
    assert (np.abs(back - values.numpy()).max((1, 2)) <= within * values.abs().amax((1, 2)).numpy()).all()


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_no_relevance_stays_none(encoding: str) -> None:
    for values in (torch.zeros(3, 4, 4), torch.full((3, 4, 4), 1e-45)):
        encoded, scales = encode_maps(values, encoding)  # type: ignore[arg-type]
        assert np.abs(decode_maps(encoded.numpy(), scales.numpy())).max() <= 1e-44
        assert (scales > 0).all()


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_maps_of_double_precision_are_stored_like_those_of_single(encoding: str) -> None:
    values = torch.rand(2, 3, 3)
    for given, expected in zip(encode_maps(values.double(), encoding), encode_maps(values, encoding), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_relevance_that_is_too_small_for_an_exact_scale_keeps_its_sign() -> None:
    encoded, _ = encode_maps(torch.full((1, 3, 3), 190 * 2.0**-149), "int8")
    assert (encoded == 127).all()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dataset.Relevance:
    data_sets.install_model(tmp_path, monkeypatch)
    make_tree(tmp_path / "root", {"bend/a.avi": 9, "jack/b.avi": 13, "walk/c.avi": 5})
    (tmp_path / "root" / "jack" / "a.avi").touch()
    explain_dataset("root", "out", RECIPE, decoders=0, batch_clips=1, shard_clips=2, encoding="int8")
    return dataset.open("out")


def test_maps_are_indexed_like_arrays(store: dataset.Relevance) -> None:
    rows, arrays = stored(store.folder)
    scales = np.array([row["spatial_scale"] or np.nan for row in rows], np.float32)
    expected = arrays["spatial"].astype(np.float32) * scales[:, None, None, None]
    maps = store.spatial
    assert maps.shape == expected.shape == (7, data_sets.FRAMES, SIZE, SIZE)
    assert len(maps) == store.clips == 7
    chosen = np.array([True, False, True, False, False, False, True])
    for index in (
        0,
        6,
        -1,
        np.int64(3),
        slice(None),
        slice(1, 6, 2),
        slice(5, 1, -1),
        slice(3, 3),
        [4, 0, 0],
        [],
        chosen,
    ):
        got = maps[index]  # type: ignore[index]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected[index if not (isinstance(index, list) and not index) else slice(0)])
    np.testing.assert_allclose(store.total[:], store.spatial[:] + store.temporal[:])
    for wrong in (7, [0, 9], np.zeros((2, 2), int), (3, 0), (0, slice(None))):
        with pytest.raises(IndexError):
            maps[wrong]  # type: ignore[index]


def test_maps_that_are_stored_can_be_read_with_zarr_alone(store: dataset.Relevance) -> None:
    """One file for each shard, one chunk for each clip, zstd."""
    import zarr

    array = zarr.open_group(store.folder / "maps.zarr", mode="r")["temporal"]
    assert array.metadata.zarr_format == 3
    assert array.shards == (2, data_sets.FRAMES, SIZE, SIZE)
    assert array.chunks == (1, data_sets.FRAMES, SIZE, SIZE)
    assert "zstd" in str(array.metadata.to_dict()["codecs"])
    assert array.metadata.dimension_names == ("clip", "time", "height", "width")
    assert len(list((store.folder / "maps.zarr" / "temporal").glob("c*"))) == 4


def test_an_unfinished_store_is_open_to_read(store: dataset.Relevance, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is as in the end; what is not is NaN."""
    commits = 0
    commit = writing.Store.commit

    def stop(self: writing.Store, shard: int, rows: list[object]) -> None:
        nonlocal commits
        if commits == 2:
            raise OSError("the lights went out")
        commits += 1
        commit(self, shard, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(writing.Store, "commit", stop)
    with pytest.raises(OSError, match="the lights went out"):
        explain_dataset("root", "half", RECIPE, decoders=0, batch_clips=1, shard_clips=2, encoding="int8")
    half = dataset.open("half")
    assert not half.complete and store.complete
    assert (len(half.table), half.clips, half.total.shape) == (4, 7, store.total.shape)
    np.testing.assert_array_equal(half.total[:4], store.total[:4])
    assert np.isnan(half.total[4:]).all()
    assert half.table["id"].to_pylist() == store.table["id"].to_pylist()[:4]


def test_a_store_without_any_maps_says_so(store: dataset.Relevance) -> None:
    """As a run that has just begun leaves it."""
    for name in ("maps.zarr", "manifest"):
        shutil.rmtree(store.folder / name)
    begun = dataset.open(store.folder)
    for name in ("spatial", "temporal", "total"):
        with pytest.raises(StoreError, match="has no maps yet"):
            getattr(begun, name)


def test_no_row_is_named_while_its_maps_are_replaced(store: dataset.Relevance, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration, clips = read_configuration(store.folder), read_clips(store.folder)
    assert configuration is not None

    def full(path: Path, data: bytes) -> None:
        if "maps.zarr/temporal" in str(path):
            raise OSError("the disk is full")
        write_durably(path, data)

    maps: dict[str, Any] = {name: np.ones((data_sets.FRAMES, SIZE, SIZE), np.int8) for name in configuration.maps}
    monkeypatch.setattr(writing, "write_durably", full)
    with pytest.raises(OSError, match="the disk is full"):
        Store(store.folder, configuration, clips).commit(0, [Explained(clips[1], {"status": "ok"}, maps)])
    assert dataset.open(store.folder).table["row"].to_pylist() == [0, 2, 3, 4, 5, 6]


def test_parts_are_gathered_without_a_change(store: dataset.Relevance, monkeypatch: pytest.MonkeyPatch) -> None:
    from captum_dtd.dataset import engine_local

    monkeypatch.setattr(engine_local, "MOST_PARTS", 2)
    seen = set()
    gather = Store.gather

    def watched(self: Store, *, at_least: int = 1) -> None:
        gather(self, at_least=at_least)
        left = [path.name for path in (self.folder / "manifest").iterdir()]
        seen.add(len(left))
        assert len(dataset.open(self.folder).table) in (2, 4, 6, 7)

    monkeypatch.setattr(Store, "gather", watched)
    explain_dataset("root", "again", RECIPE, decoders=0, batch_clips=1, shard_clips=2, encoding="int8")
    assert seen == {1, 2}
    assert data_sets.same(Path("again"), store.folder)


def test_files_that_cannot_be_understood_are_named(store: dataset.Relevance) -> None:
    out = store.folder
    for file, data in (
        ("manifest/all.parquet", b"torn"),
        ("configuration.json", b"{"),
        ("configuration.json", b'{"a": 1}'),
    ):
        before = (out / file).read_bytes()
        (out / file).write_bytes(data)
        with pytest.raises(StoreError, match=Path(file).name):
            dataset.open(out)
        (out / file).write_bytes(before)
    assert len(dataset.open(out).table) == 7


@pytest.mark.parametrize("file", ["part-00000", "all"])
def test_a_link_to_rows_that_are_not_there_is_named(store: dataset.Relevance, file: str) -> None:
    part = store.folder / "manifest" / f"{file}.parquet"
    part.unlink(missing_ok=True)
    part.symlink_to("annexed/part.parquet")
    with pytest.raises(StoreError, match=rf"{file}\.parquet is a link to what is not there"):
        dataset.open(store.folder)


@pytest.mark.parametrize("file", ["clips.parquet", "maps.zarr/spatial/zarr.json"])
def test_files_that_were_cut_short_are_named(store: dataset.Relevance, file: str) -> None:
    path = store.folder / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match=rf"{Path(file).name} cannot be understood"):
        dataset.open(store.folder)


@pytest.mark.parametrize("file", ["maps.zarr/zarr.json", "maps.zarr/spatial/zarr.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"null"])
def test_a_run_names_what_it_cannot_understand(store: dataset.Relevance, file: str, content: bytes) -> None:
    """And goes on once that is deleted."""
    whole = (store.folder / file).read_bytes()
    (store.folder / file).write_bytes(content)
    with pytest.raises(StoreError, match=rf"{file} cannot be understood.*Delete it"):
        explain_dataset("root", "out", RECIPE, decoders=0, batch_clips=1, shard_clips=2, encoding="int8")
    (store.folder / file).unlink()
    explain_dataset("root", "out", RECIPE, decoders=0, batch_clips=1, shard_clips=2, encoding="int8")
    assert (store.folder / file).read_bytes() == whole


def test_an_empty_file_of_maps_is_one_that_is_gone(store: dataset.Relevance) -> None:
    (store.folder / "maps.zarr/temporal/c.1.0.0.0").write_bytes(b"")
    with pytest.raises(StoreError, match="shard"):
        dataset.open(store.folder).temporal[:]


def test_a_file_that_a_run_is_writing_may_go_while_others_are_read(
    store: dataset.Relevance, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.folder / "maps.zarr/temporal/c.9.0.0.0.temporary").write_bytes(b"half")
    stat = Path.stat

    def renamed_before(path: Path, **options: Any) -> Any:
        if path.name.endswith(".temporary"):
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", renamed_before)
    assert dataset.open(store.folder).temporal[:].any()


def test_damage_is_found_in_its_file(store: dataset.Relevance) -> None:
    path = store.folder / "maps.zarr/temporal/c.1.0.0.0"
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"temporal/c\.1\.0\.0\.0 is damaged"):
            dataset.open(store.folder).temporal[:]
    path.write_bytes(data)
    dataset.open(store.folder).temporal[:]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "deep" / "file", b"before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_durably(tmp_path / "deep" / "file", b"after")
    assert (tmp_path / "deep" / "file").read_bytes() == b"before"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_who_holds_a_store_is_named_and_none_that_held_it_before(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 123456789 on a machine of a much longer name")
    holder = re.escape(f"(process {os.getpid()} on {socket.gethostname()})")
    with (
        running_alone(tmp_path),
        pytest.raises(StoreError, match=rf"another run is writing to .* {holder}$"),
        running_alone(tmp_path),
    ):
        pass


@pytest.mark.parametrize("missing", ["zarr", "pyarrow"])
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, missing: str) -> None:
    script = f"""
    import sys
    sys.modules[{missing!r}] = None
    from captum_dtd.cli import main
    sys.exit(main(["dataset", "root", "--model", "c3d_mini", "-o", "out"]))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "pip install 'captum_dtd[dataset]'" in run.stderr
    assert run.stderr.count("\n") == 1
