"""Which clips there are, and so what each row of a store means: decided before the first is explained, and kept.

A clip's number is its row. The list follows from the videos' names, their numbers of frames and the configuration; it is
stored, so that a run that goes on counts no frames again and finds every row where it was.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from captum_dtd.dataset.sources import Entry, Source, escaped
from captum_dtd.recipe import class_index, classes_named
from captum_dtd.video import VideoError, frame_at, frame_times

__all__ = [
    "Clip",
    "Probe",
    "add_repaired",
    "clip_table",
    "clips_of",
    "clips_of_table",
    "differences",
    "failure",
    "of_another_size",
    "probe_entry",
    "resized",
    "with_new_sizes",
]


@dataclass(frozen=True)
class Clip:
    """One row.

    Attributes:
        row: its number, from 0 on.
        id: its name, unique in the store: the video's escaped path, "@", its first frame.
        entry: number of its video in the source's list.
        path: the file's name as the system stores it, relative to the source's folder.
        frame: index of its first frame in the video.
        start: seconds at which a table asks for it, None if it is one of the video's clips at a stride.
        label: its class's name, None if unknown.
        label_index: which of the model's outputs that is, None if unknown.
        target: the output to explain that the table names, None if it names none.
        error: why the video could not be opened; then this is its only clip.
        size: bytes of the video's file, None if it could not be opened: another size is another video.
    """

    row: int
    id: str
    entry: int
    path: bytes
    frame: int
    start: float | None
    label: str | None
    label_index: int | None
    target: int | None
    error: str | None
    size: int | None


_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("entry", pa.int64()),
        ("path", pa.binary()),
        ("frame", pa.int64()),
        ("start", pa.float64()),
        ("label", pa.string()),
        ("label_index", pa.int32()),
        ("target", pa.int32()),
        ("error", pa.string()),
        ("size", pa.int64()),
    ]
)


class Probe(NamedTuple):
    """What a look at a video found: the first frames of its clips, or why there are none, and the size of its file."""

    starts: list[int]
    error: str | None
    size: int | None = None


def probe_entry(folder: Path, entry: Entry, frames: int, stride: int, clip_stride: int) -> Probe:
    """Where the clips of a video begin; nothing is decoded.

    Args:
        folder: what the entry's path is relative to.
        entry: the video.
        frames: length of a clip.
        stride: every so many frames of the video.
        clip_stride: frames of the video from one clip's start to the next one's.

    Returns:
        The first frames of all clips that fit into the video, of one clip if it is shorter, or of the one that begins
        with the frame shown at the entry's start.
    """
    path = folder / os.fsdecode(entry.path)
    try:
        if entry.start is not None:
            starts = [frame_at(path, entry.start)]
        else:
            last = len(frame_times(path)) - ((frames - 1) * stride + 1)
            starts = list(range(0, max(last, 0) + 1, clip_stride))
        return Probe(starts, None, path.stat().st_size)
    except ImportError:  # PyAV is not there: no fault of the video
        raise
    except Exception as error:  # whatever a decoder makes of a damaged file: the others shall be explained
        return Probe([], failure(error))


def failure(error: Exception) -> str:
    """Why a video cannot be read, for its row: in the words of what refused it, or with the name of what went wrong there."""
    known = isinstance(error, (VideoError, OSError))
    return escaped(str(error) if known else f"{type(error).__name__}: {error}")


def clips_of(source: Source, probes: Sequence[Probe], classes: Sequence[str] | None, count: int) -> list[Clip]:
    """All clips, in the order of their videos; a video that could not be opened has one, with the error.

    Args:
        source: the videos.
        probes: what was found in each.
        classes: names of the model's outputs, None if not known; then a table's labels are indices, and others match nothing.
        count: number of the model's outputs.

    Raises:
        ValueError: a table's target is no class.
    """
    names = tuple(classes or ())
    labels = {text: _label(text, names, count, source) for text in {entry.label for entry in source.entries}}
    ids: set[str] = set()
    clips: list[Clip] = []
    for number, (entry, probe) in enumerate(zip(source.entries, probes, strict=True)):
        target = None
        if entry.target is not None:
            target = class_index(entry.target, names or None, count, f"row {number + 1} of the table: target")
        for frame in probe.starts or [0]:
            name = _unique(f"{escaped(entry.path)}@{frame}", ids)
            clips.append(
                Clip(
                    len(clips),
                    name,
                    number,
                    entry.path,
                    frame,
                    entry.start,
                    *labels[entry.label],
                    target,
                    probe.error,
                    probe.size,
                )
            )
    return clips


def add_repaired(clips: Sequence[Clip], probes: dict[int, Probe]) -> list[Clip]:
    """The clips after some videos could be opened that could not be before: no row moves, further clips come last.

    Args:
        clips: all clips.
        probes: what was found, by number of the video, where it could be opened now.
    """
    result = list(clips)
    ids = {clip.id for clip in clips}
    for clip in clips:
        if clip.error is None or clip.entry not in probes:
            continue
        path = escaped(clip.path)
        (first, *others), _, size = probes[clip.entry]
        name = clip.id if first == clip.frame else _unique(f"{path}@{first}", ids)
        result[clip.row] = replace(clip, id=name, frame=first, error=None, size=size)
        for frame in others:
            name = _unique(f"{path}@{frame}", ids)
            result.append(replace(clip, row=len(result), id=name, frame=frame, error=None, size=size))
    return result


def with_new_sizes(clips: Sequence[Clip], folder: Path, changing: Collection[bytes]) -> list[Clip]:
    """The clips, those of some videos, by path, with the sizes that these have now: they are explained anew as they are."""
    sizes = {path: _size(folder, path) for path in changing}
    return [replace(clip, size=sizes[clip.path]) if clip.path in sizes and not clip.error else clip for clip in clips]


def resized(clips: Sequence[Clip], folder: Path, changing: Collection[bytes]) -> list[str]:
    """Which videos are `of_another_size`, but for some, by path; in words."""
    told = _some("of another size", (path for path in of_another_size(clips, folder) if path not in changing))
    return [told] if told else []


def of_another_size(clips: Sequence[Clip], folder: Path) -> list[bytes]:
    """Which videos are not of the size they had when the clips were listed, by path.

    A video that is gone is none of them: its clips get rows that say so.
    """
    sizes = {clip.path: clip.size for clip in clips if clip.size is not None}
    return [path for path, size in sizes.items() if _size(folder, path) not in (None, size)]


def _size(folder: Path, path: bytes) -> int | None:
    try:
        return (folder / os.fsdecode(path)).stat().st_size
    except OSError:
        return None


def differences(clips: Sequence[Clip], source: Source, classes: Sequence[str] | None, count: int) -> list[str]:
    """How a source differs from the one that a list of clips was made of, in words; the rest as for :func:`clips_of`."""
    listed = clips_of(source, [Probe([], None)] * len(source.entries), classes, count)
    before = {clip.entry: _asked_for(clip) for clip in clips}
    after = {clip.entry: _asked_for(clip) for clip in listed}
    if before == after:
        return []
    old, new = Counter(asked[0] for asked in before.values()), Counter(asked[0] for asked in after.values())
    changed = [asked[0] for number, asked in after.items() if number in before and before[number] != asked]
    if old != new:
        return [text for text in (_some("gone", (old - new).elements()), _some("new", (new - old).elements())) if text]
    return [_some("of another order, start, label or target", changed)]


def _asked_for(clip: Clip) -> tuple[bytes, float | None, str | None, int | None, int | None]:
    return clip.path, clip.start, clip.label, clip.label_index, clip.target


def clip_table(clips: Sequence[Clip]) -> pa.Table:
    """A list of clips as a table that parquet stores."""
    return pa.table({name: [getattr(clip, name) for clip in clips] for name in _COLUMNS.names}, schema=_COLUMNS)


def clips_of_table(table: pa.Table) -> list[Clip]:
    """What :func:`clip_table` was given.

    Raises:
        ValueError: it is no such table.
    """
    if table.column_names != _COLUMNS.names:
        raise ValueError(f"columns {', '.join(table.column_names)} are not those of this version's lists of clips")
    columns = (table[name].to_pylist() for name in table.column_names)
    return [Clip(*values) for values in zip(*columns, strict=True)]


def _label(text: str | None, names: Sequence[str], count: int, source: Source) -> tuple[str | None, int | None]:
    """A label's name and index, as far as they are known; a class that the model does not have is no error.

    A table may give its index; a folder is called by the class's name.
    """
    if text is None:
        return None, None
    if source.classes is not None:
        found = classes_named(text, names)
        return (escaped(names[found[0]]), found[0]) if len(found) == 1 else (escaped(text), None)
    try:
        index = class_index(text, names or None, count)
    except ValueError:
        return escaped(text), None
    return escaped(names[index] if names else text), index


def _unique(name: str, taken: set[str]) -> str:
    """The name, or if it is taken the name with a number; taken from now on."""
    candidates = (name if number == 1 else f"{name}#{number}" for number in itertools.count(1))
    chosen = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(chosen)
    return chosen


def _some(what: str, paths: Iterable[bytes]) -> str:
    names = [escaped(path) for path in paths]
    return f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else ""
