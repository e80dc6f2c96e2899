"""The store of a run: what is in its folder, and in which order it gets there, so that a kill at any moment loses nothing.

A folder holds::

    configuration.json           everything that decides what is in the store
    clips.parquet                which clip each row is
    maps.zarr/spatial, temporal  Zarr v3 arrays (clips, T, H, W); one file for each shard, one chunk for each clip
    manifest/part-00007.parquet  the rows of shard 7: a shard without this file does not exist
    manifest/all.parquet         the rows of many shards, gathered; a part that is there counts before it
    lock                         held by the run that writes

Every file is written under a temporary name, brought to the disk (fsync), renamed, and the folder is brought to the disk
too. A shard's maps come first, and its part of the manifest last: what the manifest names is on the disk. A part is renamed
as a whole, so a shard is there or it is not, and one that is not is computed again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from captum_dtd.dataset.clips import Clip, clip_table, clips_of_table
from captum_dtd.dataset.configuration import MAPS, Configuration
from captum_dtd.dataset.sources import escaped
from captum_dtd.dataset.work import Explained
from captum_dtd.version import __version__

__all__ = [
    "MOST_PARTS",
    "Store",
    "StoreError",
    "count_clips",
    "lost_shards",
    "map_shape",
    "open_arrays",
    "read_clips",
    "read_configuration",
    "read_manifest",
    "read_root",
    "running_alone",
    "undamaged",
    "write_clips",
    "write_configuration",
]

_CONFIGURATION, _CLIPS, _ARRAYS, _MANIFEST, _LOCK = (
    "configuration.json",
    "clips.parquet",
    "maps.zarr",
    "manifest",
    "lock",
)
_NAMES = (_CONFIGURATION, _CLIPS, _ARRAYS, _MANIFEST, _LOCK)
_ALL, _PART = "all.parquet", "part-{:05d}.parquet"
_MAPS_OF_SHARD = "c.{}.0.0.0"
_ZARR = "zarr.json"
_TEMPORARY = ".temporary"
# What a row of the manifest says of its clip, explained or not.
_IDENTITY = ["row", "id", "path", "path_bytes", "frame", "label", "label_index", "shard", "configuration"]

MOST_PARTS = 256
"""So many parts are gathered: opening thousands takes seconds, and gathering each by itself would rewrite all rows each time."""


class StoreError(ValueError):
    """A folder that is no store, is in use, or belongs to another run; the message says what to do."""


class Store:
    """A store to write to, for as long as the lock is held.

    Attributes:
        folder: where it is.
        configuration: what it was begun with.
        clips: which clip each row is.
        shape: (T, H, W) of a map.

    Raises:
        StoreError: a file of the store cannot be understood, or it has rows of another configuration.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, configuration: Configuration, clips: Sequence[Clip]) -> None:
        self.folder = folder
        self.configuration = configuration
        self.clips = clips
        self.shape = map_shape(configuration)
        rows = self.manifest()
        others = set(rows["configuration"].to_pylist()) - {configuration.digest}
        if others:
            raise StoreError(
                f"{folder} has rows of another configuration ({', '.join(sorted(others))}) than {_CONFIGURATION} tells "
                f"({configuration.digest}): give another folder for the output"
            )
        _make_folder(folder / _ARRAYS)
        with _understood(folder / _ARRAYS / _ZARR):
            zarr.open_group(_DurableStore(folder / _ARRAYS), mode="a")
        self._arrays = {name: self._array(name) for name in configuration.maps}
        self._shards = set(rows["shard"].to_pylist())
        for shard in sorted(set().union(*(lost_shards(folder, name, self._shards) for name in configuration.maps))):
            self._write_part(shard, rows.slice(0, 0))  # without its maps a shard does not exist

    def _array(self, name: str) -> zarr.Array[Any]:
        """A map's array, made or made longer if need be."""
        store = _DurableStore(self.folder / _ARRAYS)
        shape = (len(self.clips), *self.shape)
        with zarr.config.set({"array.write_empty_chunks": True}):  # so that a shard's file is there, or is lost
            try:
                with _understood(self.folder / _ARRAYS / name / _ZARR):
                    array = zarr.open_array(store, path=name, mode="r+")
            except FileNotFoundError:
                return zarr.create_array(
                    store,
                    name=name,
                    shape=shape,
                    chunks=(1, *self.shape),
                    shards=(self.configuration.shard_clips, *self.shape),
                    dtype=self.configuration.encoding,
                    compressors=ZstdCodec(level=3, checksum=True),
                    fill_value=0,
                    chunk_key_encoding={"name": "default", "separator": "."},
                    dimension_names=("clip", "time", "height", "width"),
                )
        if array.shape != shape:
            array.resize(shape)
        return array

    def manifest(self) -> pa.Table:
        """The rows that are there, by row."""
        return read_manifest(self.folder, self.configuration)

    def commit(self, shard: int, rows: Sequence[Explained]) -> None:
        """Write rows of one shard, maps first; rows of the shard that are there already and not given stay.

        Raises:
            OSError: the disk is full, say; then no row names what was not written.
        """
        first = shard * self.configuration.shard_clips
        stop = min(first + self.configuration.shard_clips, len(self.clips))
        table = self._table(shard, rows)
        before = self._part(shard)
        if before is not None:
            # What is replaced must not be named while its maps change: until all is written it is not there.
            before = before.filter(pc.invert(pc.is_in(before["row"], table["row"])))
            self._write_part(shard, before)
            table = pa.concat_tables([before, table]).sort_by("row")
        for name, array in self._arrays.items():
            block = np.zeros((stop - first, *self.shape), array.dtype)
            if before is not None:
                with undamaged(array, shard):
                    block = np.asarray(array[first:stop])
            for row in rows:
                block[row.clip.row - first] = row.maps.get(name, 0)
            array[first:stop] = block
        self._write_part(shard, table)

    def gather(self, *, at_least: int = 1) -> None:
        """Move the parts of the manifest into one file, if there are so many; what the store holds does not change."""
        if len(_parts(self.folder)) >= at_least:
            self._gather(self.manifest())

    def fail(self, videos: Collection[bytes], error: str) -> None:
        """Let the rows of some videos, by path, be failed, those that were explained with this error, until they are again.

        Those that had failed still are if this is interrupted, so whoever begins anew finds the same videos.
        """
        rows = self.manifest()
        doubtful = pc.and_(
            pc.is_in(rows["path_bytes"], pa.array(videos, pa.binary())),
            pc.equal(rows["status"], "ok"),
        )
        blank = dict.fromkeys(rows.column_names)
        failed = [
            {**blank, **row, "status": "failed", "error": error}
            for row in rows.filter(doubtful).select(_IDENTITY).to_pylist()
        ]
        kept = rows.filter(pc.invert(doubtful))
        self._gather(pa.concat_tables([kept, pa.Table.from_pylist(failed, rows.schema)]).sort_by("row"))

    def _gather(self, rows: pa.Table) -> None:
        """Let one file hold these rows, which are all."""
        parts = _parts(self.folder)
        write_durably(self.folder / _MANIFEST / _ALL, _parquet(rows))
        for part in parts:
            part.unlink()
        _sync(self.folder / _MANIFEST)

    def _write_part(self, shard: int, table: pa.Table) -> None:
        write_durably(self.folder / _MANIFEST / _PART.format(shard), _parquet(table))
        self._shards.add(shard)

    def _part(self, shard: int) -> pa.Table | None:
        """The shard's rows, None if there are none."""
        if shard not in self._shards:
            return None
        rows = self.manifest()
        return rows.filter(pc.equal(rows["shard"], shard))

    def _table(self, shard: int, rows: Sequence[Explained]) -> pa.Table:
        schema = _schema(self.configuration)
        records = []
        for row in sorted(rows, key=lambda row: row.clip.row):
            clip = row.clip
            named = {
                "row": clip.row,
                "id": clip.id,
                "path": escaped(clip.path),
                "path_bytes": clip.path,
                "frame": clip.frame,
                "label": clip.label,
                "label_index": clip.label_index,
                "shard": shard,
                "configuration": self.configuration.digest,
            }
            records.append(dict.fromkeys(schema.names) | named | row.columns)
        return pa.Table.from_pylist(records, schema)


@contextmanager
def running_alone(folder: Path) -> Iterator[None]:
    """Hold a store's lock; the folder is made if need be. The system releases the lock of a process that is killed.

    Raises:
        StoreError: another process holds it, or the folder holds something that is no store.
        OSError: the folder cannot be written.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise StoreError(f"cannot write to {escaped(os.fspath(folder))}: parquet needs a name that is UTF-8") from None
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"cannot write to {folder}: it is a file")
    _make_folder(folder)
    before = (
        _LOCK,
        _CLIPS,
        _CLIPS + _TEMPORARY,
        _CONFIGURATION + _TEMPORARY,
    )  # all that is there before the configuration is
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in before)
    if strangers and not (folder / _CONFIGURATION).exists():
        raise StoreError(f"{folder} holds {escaped(strangers[0])} and is no store: give a new or an empty folder")
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            raise StoreError(f"another run is writing to {folder} ({holder or 'it has just begun'})") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for left_over in _left_over(folder):
            left_over.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _left_over(folder: Path) -> list[Path]:
    """Temporary files of a run that was killed."""
    inside = [path for name in (_ARRAYS, _MANIFEST) for path in (folder / name).rglob(f"*{_TEMPORARY}")]
    return [*(folder / (name + _TEMPORARY) for name in _NAMES), *inside]


def write_configuration(folder: Path, configuration: Configuration, root: Path) -> None:
    """Begin a store whose clips are written: from here on the folder belongs to this configuration."""
    record = {
        "configuration": configuration.to_dict(),
        "digest": configuration.digest,
        "root": os.fspath(root.absolute()),
        "software": {"captum_dtd": __version__, "torch": torch.__version__, "zarr": zarr.__version__},
    }
    write_durably(folder / _CONFIGURATION, json.dumps(record, indent=2).encode())


def read_configuration(folder: Path) -> Configuration | None:
    """What a store was begun with, None if it was not begun yet.

    Raises:
        StoreError: the file cannot be understood.
    """
    try:
        record = json.loads((folder / _CONFIGURATION).read_bytes())
        return Configuration.from_dict(record["configuration"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / _CONFIGURATION} cannot be understood: {error}") from error


def read_root(folder: Path) -> str:
    """The folder that paths are relative to, where it was when the store was last written to."""
    root: str = json.loads((folder / _CONFIGURATION).read_bytes())["root"]
    return root


def write_clips(folder: Path, clips: Sequence[Clip]) -> None:
    """Write what the rows are."""
    write_durably(folder / _CLIPS, _parquet(clip_table(clips)))


def read_clips(folder: Path) -> list[Clip]:
    """What the rows of a store that was begun are.

    Raises:
        StoreError: the file is gone or cannot be understood.
    """
    path = _clips_file(folder)
    table = _read_parquet(path)
    try:
        return clips_of_table(table)
    except ValueError as error:
        raise StoreError(f"{path} cannot be understood: {error}") from error


def count_clips(folder: Path) -> int:
    """How many rows a store that was begun has once it is complete.

    Raises:
        StoreError: as `read_clips`.
    """
    path = _clips_file(folder)
    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException as error:
        raise StoreError(f"{path} cannot be understood: {error}") from error


def _clips_file(folder: Path) -> Path:
    path = folder / _CLIPS
    if not path.exists():
        raise StoreError(f"{path}, which says what the store's rows are, is gone")
    return path


def read_manifest(folder: Path, configuration: Configuration) -> pa.Table:
    """All rows that a store has, by row; also while a run is writing.

    Raises:
        StoreError: a file of the manifest cannot be understood.
    """
    while True:
        parts = _parts(folder)
        gathered = folder / _MANIFEST / _ALL
        if lost := next((each for each in (*parts, gathered) if each.is_symlink() and not each.exists()), None):
            raise StoreError(f"{lost} is a link to what is not there: get the file, or take the link away")
        try:
            tables = [_read_parquet(part) for part in parts]
            if gathered.exists():
                newer = pa.array([int(part.stem.removeprefix("part-")) for part in parts], pa.int32())
                rows = _read_parquet(gathered)
                tables.append(rows.filter(pc.invert(pc.is_in(rows["shard"], newer))))
        except FileNotFoundError:
            continue  # a part was gathered while we read
        return pa.concat_tables([_schema(configuration).empty_table(), *tables]).sort_by("row")


def open_arrays(folder: Path, configuration: Configuration) -> dict[str, zarr.Array[Any]]:
    """The stored maps, to read; none while a run has not come so far.

    Raises:
        StoreError: what describes them cannot be understood.
    """
    arrays = {}
    for name in configuration.maps:
        with suppress(FileNotFoundError), _understood(folder / _ARRAYS / name / _ZARR):
            arrays[name] = zarr.open_array(LocalStore(folder / _ARRAYS, read_only=True), path=name, mode="r")
    return arrays


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Raise StoreError where what describes arrays is no such description; that there is none is another thing."""
    try:
        yield
    except FileNotFoundError:  # in zarr a kind of ValueError, too
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StoreError(
            f"{path} cannot be understood: {error}. Delete it, and the command that made the store writes it anew"
        ) from error


@contextmanager
def undamaged(array: zarr.Array[Any], shard: int) -> Iterator[None]:
    """Raise StoreError, which names the file, where a shard's maps cannot be read: by a checksum, or by what a codec finds."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise StoreError(
            f"{str(array.store_path).removeprefix('file://')}/{_MAPS_OF_SHARD.format(shard)} is damaged ({error}). Delete it, "
            "and the command that made the store explains its clips anew"
        ) from error


def lost_shards(folder: Path, name: str, shards: Collection[int]) -> set[int]:
    """Of shards that the manifest names, those whose file of maps is gone, or empty, as a full disk leaves a copy."""
    return {shard for shard in shards if not _has_content(folder / _ARRAYS / name / _MAPS_OF_SHARD.format(shard))}


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def map_shape(configuration: Configuration) -> tuple[int, int, int]:
    """(T, H, W) of a clip's maps."""
    height, width = configuration.preprocessing["size"]
    return configuration.preprocessing["frames"], height, width


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is on the disk, whole, once this returns, and as it was before if the machine stops earlier."""
    _make_folder(path.parent)
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


class _DurableStore(LocalStore):
    """Zarr's own store of files, but a file is on the disk once it is set."""

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(write_durably, self.root / key, value.as_numpy_array().data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)


def _make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in, so that they are on the disk."""
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(exist_ok=True)
        _sync(missing.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / _MANIFEST).glob(_PART.format(0).replace("00000", "*")))


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except pa.ArrowException as error:
        raise StoreError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error


def _schema(configuration: Configuration) -> pa.Schema:
    """The manifest's columns; docs/dataset.md says what each means."""
    frames = pa.list_(pa.float64(), configuration.preprocessing["frames"])
    return pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("path", pa.string()),
            ("path_bytes", pa.binary()),
            ("frame", pa.int64()),
            ("start", pa.float64()),
            ("fps", pa.float64()),
            ("looped", pa.bool_()),
            ("label", pa.string()),
            ("label_index", pa.int32()),
            ("prediction", pa.int32()),
            ("target", pa.int32()),
            ("score", pa.float32()),
            ("delta", pa.float32()),
            ("spatial_mass", pa.float64()),
            ("temporal_mass", pa.float64()),
            *((f"{name}_{kind}", frames) for name in ("spatial", "temporal") for kind in ("masses", "sums")),
            *((f"{name}_scale", pa.float32()) for name in MAPS),
            ("shard", pa.int32()),
            ("status", pa.string()),
            ("warning", pa.string()),
            ("error", pa.string()),
            ("configuration", pa.string()),
        ]
    )
