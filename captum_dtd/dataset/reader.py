"""Reading a store: a table with a row for each clip, and maps that are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

from captum_dtd.dataset.configuration import Configuration
from captum_dtd.dataset.encoding import decode_maps
from captum_dtd.dataset.store import (
    StoreError,
    count_clips,
    lost_shards,
    open_arrays,
    read_configuration,
    read_manifest,
    read_root,
    undamaged,
)

__all__ = ["Maps", "Relevance", "open_store"]


_ONLY_CLIPS = "maps are indexed by clips alone: index what that gives for times, heights and widths"


class Maps:
    """One kind of map of all clips, float32 (clips, T, H, W), read when indexed.

    Indexing takes what selects clips: a number, a slice, a sequence or array of numbers, or an array of bools. A clip
    that failed, or is not there yet, has NaN everywhere.

    Attributes:
        shape: (clips, T, H, W).
    """

    def __init__(self, parts: Sequence[tuple[float, zarr.Array[Any], NDArray[np.float32]]], per_shard: int) -> None:
        self._parts = parts
        self._per_shard = per_shard
        self.shape = parts[0][1].shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | NDArray[np.generic]) -> NDArray[np.float32]:
        if isinstance(index, tuple):
            raise IndexError(_ONLY_CLIPS)
        if isinstance(index, (int, np.integer)):
            one: NDArray[np.float32] = self[[int(index)]][0]
            return one
        if not isinstance(index, slice):
            index = np.asarray(index) if len(index) else np.zeros(0, np.int64)
        rows = np.arange(len(self))[index]
        if rows.ndim != 1:
            raise IndexError(_ONLY_CLIPS)
        # each row once and in order, as reading takes them; a run of rows as a slice
        wanted, places = np.unique(rows, return_inverse=True)
        run = len(wanted) and wanted[-1] - wanted[0] == len(wanted) - 1
        result = np.zeros((len(wanted), *self.shape[1:]), np.float32)
        for factor, array, scales in self._parts:
            try:
                stored = array[wanted[0] : wanted[-1] + 1] if run else array.oindex[wanted]
            except (ValueError, RuntimeError):  # a checksum, or what a codec finds
                self._find_damage(array, wanted)
                raise
            result += factor * decode_maps(np.asarray(stored), scales[wanted])
        return result[places]

    def _find_damage(self, array: zarr.Array[Any], rows: NDArray[np.int64]) -> None:
        """Raise StoreError for the first file that cannot be read."""
        shards = rows // self._per_shard
        for shard in np.unique(shards):
            with undamaged(array, int(shard)):
                array.oindex[rows[shards == shard]]


class Relevance:
    """A store that is open to read, also while a run is writing it; what the run adds later is not seen.

    Attributes:
        folder: where it is.
        configuration: what its maps and rows follow from.
        table: a row for each clip that is there, by row; docs/dataset.md says what the columns mean.
        clips: how many clips the store has once its run is complete.
        root: the folder that paths in the table are relative to, where it was when the store was last written to.
    """

    def __init__(self, folder: Path, configuration: Configuration, table: pa.Table, clips: int, root: str) -> None:
        self.folder = folder
        self.configuration = configuration
        self.table = table
        self.clips = clips
        self.root = root
        self._stored: dict[str, tuple[zarr.Array[Any], NDArray[np.float32]]] = {}
        rows = table["row"].to_numpy()
        for name, array in open_arrays(folder, configuration).items():
            scales = np.full(clips, np.nan, np.float32)
            scales[rows] = table[f"{name}_scale"].to_numpy()
            self._stored[name] = array, scales

    @property
    def complete(self) -> bool:
        """Whether every clip has its row."""
        return len(self.table) == self.clips > 0

    @property
    def spatial(self) -> Maps:
        """What each frame alone earns."""
        return self._maps("spatial", {"total": 1.0, "temporal": -1.0})

    @property
    def temporal(self) -> Maps:
        """What is due to motion."""
        return self._maps("temporal", {"total": 1.0, "spatial": -1.0})

    @property
    def total(self) -> Maps:
        """Relevance of the clip, summed over colour channels."""
        return self._maps("total", {"spatial": 1.0, "temporal": 1.0})

    def _maps(self, name: str, sum_of: dict[str, float]) -> Maps:
        """The maps as they are stored, or as a sum of the two that are."""
        if not self.configuration.maps:
            raise StoreError(f"{self.folder} keeps no maps (--maps none)")
        factors = {name: 1.0} if name in self.configuration.maps else sum_of
        for part in factors:
            if lost := lost_shards(self.folder, part, set(self.table["shard"].to_pylist())):
                raise StoreError(
                    f"{self.folder} has lost the {part} maps of shards {', '.join(map(str, sorted(lost)))}: the command that "
                    "made it explains them anew"
                )
            if part not in self._stored:
                raise StoreError(f"{self.folder} has no maps yet")
        parts = [(factor, *self._stored[part]) for part, factor in factors.items()]
        return Maps(parts, self.configuration.shard_clips)


def open_store(folder: str | os.PathLike[str]) -> Relevance:
    """Open a store that :func:`captum_dtd.dataset.explain_dataset` wrote, finished or not.

    Raises:
        StoreError: the folder holds no store, or one that cannot be understood.

    Example::

        store = captum_dtd.dataset.open("out")
        ok = pyarrow.compute.equal(store.table["status"], "ok")
        store.temporal[3]                                      # float32 (16, 112, 112)
    """
    folder = Path(folder)
    configuration = read_configuration(folder)
    if configuration is None:
        raise StoreError(f"{folder} is no store: it has no configuration.json")
    table = read_manifest(folder, configuration)
    return Relevance(folder, configuration, table, count_clips(folder), read_root(folder))
