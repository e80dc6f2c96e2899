"""The unit of work: the clips of one shard, from files to rows and maps. What it gives depends on nothing but its arguments.

Three functions, so that engines may run them where they like: :func:`decode`, which needs the video files and no model, and
:func:`classify` and :func:`explain`, which need the model and no files. What an engine hands between them can be pickled.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_dtd.dataset.clips import Clip, failure
from captum_dtd.dataset.configuration import Configuration
from captum_dtd.dataset.encoding import encode_maps
from captum_dtd.dataset.sources import escaped
from captum_dtd.discriminate import SpatioTemporalRelevance
from captum_dtd.frame_cache import FrameCache
from captum_dtd.recipe import Explainer
from captum_dtd.video import Video, WindowReader, read_window_at, sample_clip

__all__ = [
    "Decoded",
    "Explained",
    "VideoMeans",
    "Work",
    "classify",
    "decode",
    "explain",
    "plan",
    "release",
    "undecodable",
]


class Decoded(NamedTuple):
    """One clip's pixels, or why there are none.

    Attributes:
        frames: uint8 (T, H, W, 3), None if the clip could not be decoded.
        start: seconds in the video at which it begins.
        fps: frames per second of the video.
        looped: whether the video is too short and its frames come round again.
        warning: what the decoder had to say.
        error: why there are no frames.
    """

    frames: NDArray[np.uint8] | None
    start: float | None = None
    fps: float | None = None
    looped: bool = False
    warning: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Explained:
    """One row of the store.

    Attributes:
        clip: which.
        columns: what the manifest says about it beside what the clip says itself, by name of the column.
        maps: what is stored of its maps, (T, H, W) each, by name; empty if it failed or maps are not stored.
    """

    clip: Clip
    columns: dict[str, Any]
    maps: dict[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What there is to do for one shard.

    Attributes:
        shard: its number.
        batches: clips that are explained together.
        classified: batches to be classified before: all clips of all videos that occur, where their mean is the target.
    """

    shard: int
    batches: tuple[tuple[Clip, ...], ...]
    classified: tuple[tuple[Clip, ...], ...] = ()

    def decodings(self) -> Iterator[tuple[Clip, ...]]:
        """What has to be decoded, in the order in which :func:`explain` takes it: clips of one video each."""
        for batch in (*self.classified, *self.batches):
            for _, clips in groupby(batch, key=lambda clip: clip.path):
                yield tuple(clips)


def plan(clips: Sequence[Clip], wanted: Collection[int], configuration: Configuration) -> list[Work]:
    """The work that gives the wanted rows: their whole batches, and nothing else.

    Batches and shards begin at fixed rows, so a row always has the same neighbours, and comes out the same, whatever is
    computed beside it.

    Args:
        clips: all clips of the store, by row.
        wanted: rows to be computed.
        configuration: of the store.
    """
    size, per_shard = configuration.batch_clips, configuration.shard_clips
    batches: dict[int, list[tuple[Clip, ...]]] = {}
    for start in sorted({row - row % size for row in wanted}):
        batches.setdefault(start // per_shard, []).append(tuple(clips[start : start + size]))
    of_video: dict[bytes, list[Clip]] = {}
    if configuration.target == "video":
        for clip in clips:
            of_video.setdefault(clip.path, []).append(clip)
    works = []
    for shard, chosen in batches.items():
        classified = []
        for path in dict.fromkeys(clip.path for batch in chosen for clip in batch):
            siblings = of_video.get(path, [])
            classified += [tuple(siblings[start : start + size]) for start in range(0, len(siblings), size)]
        works.append(Work(shard, tuple(chosen), tuple(classified)))
    return works


def decode(folder: str, clips: Sequence[Clip], frames: int, stride: int) -> list[Decoded]:
    """Decode some clips of one video.

    Args:
        folder: what paths are relative to.
        clips: clips of the same video.
        frames: length of a clip.
        stride: every so many frames of the video.
    """
    path = os.path.join(folder, os.fsdecode(clips[0].path))
    there = [clip.frame for clip in clips if not clip.error]
    span = (frames - 1) * stride + 1
    windows: list[Video | Exception] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            windows = list(_reader(path).read(there, span)) if there else []
        except ImportError:  # PyAV is not there: no fault of the video
            raise
        except Exception as error:  # whatever a decoder makes of a damaged file: the others shall be explained
            windows = [error] * len(there)
    said = [escaped(str(warning.message)) for warning in caught]
    decoded = []
    pending = iter(windows)
    for asked in clips:
        if asked.error:
            decoded.append(Decoded(None, error=asked.error))
            continue
        window = next(pending)
        texts = list(said)
        if isinstance(window, Video) and asked.start is not None and not window.shows(asked.start):
            window, texts = _at(path, asked.start, span, window, texts)
        if isinstance(window, Exception):
            decoded.append(Decoded(None, error=failure(window)))
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            clip = sample_clip(window, frames, stride, frame=0)
        texts += [escaped(str(warning.message)) for warning in caught]
        decoded.append(Decoded(clip.frames, float(window.times[0]), window.fps, clip.looped, "; ".join(texts) or None))
    return decoded


# One of each thread: the next clips that it decodes are mostly those that follow in the same video.
_last = threading.local()


def _reader(path: str) -> WindowReader:
    """What reads a video, where it was left if that is the one that was read last."""
    reader: WindowReader | None = getattr(_last, "reader", None)
    if reader is None or not reader.reads(path):
        if reader is not None:
            reader.close()
        reader = _last.reader = WindowReader(path)
    return reader


_MISCOUNTED = (
    "the file has other frames than its packets tell: the clip begins at its start, but its frame's number is not exact"
)


def _at(path: str, start: float, span: int, counted: Video, said: list[str]) -> tuple[Video | Exception, list[str]]:
    """The frames from a time on, found by their times, and what there is to say; or those that were counted, if it is they."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            found = read_window_at(path, start, span)
        except Exception as error:  # as above
            return error, []
    if found.times[0] == counted.times[0]:
        return counted, said
    return found, [*(escaped(str(warning.message)) for warning in caught), _MISCOUNTED]


def release() -> None:
    """Close the video that this thread decoded last."""
    reader: WindowReader | None = getattr(_last, "reader", None)
    if reader is not None:
        reader.close()


def undecodable(clips: Sequence[Clip], error: str) -> list[Decoded]:
    """What :func:`decode` gives for clips of which none can be decoded, and why."""
    return [Decoded(None, error=error) for _ in clips]


class VideoMeans:
    """The model's mean output over the clips of each video."""

    def __init__(self) -> None:
        self._sums: dict[bytes, Tensor] = {}

    def add(self, path: bytes, output: Tensor) -> None:
        """Count the output, (classes,), for one more clip of the video."""
        self._sums[path] = self._sums.get(path, 0) + output.double().cpu()

    def top(self, path: bytes) -> int:
        """The class that is largest in the mean, and so in the sum."""
        return int(self._sums[path].argmax())

    def of(self, paths: Collection[bytes]) -> VideoMeans:
        """Those of some videos alone; of one that has none, since no clip of it can be decoded, none."""
        some = VideoMeans()
        some._sums = {path: self._sums[path] for path in paths if path in self._sums}
        return some


def classify(
    explainer: Explainer, batches: Iterable[Sequence[Clip]], decoded: Iterable[list[Decoded]]
) -> Iterator[tuple[Clip, Tensor]]:
    """What the model says about clips, batch by batch: each with its output, (classes,).

    Args:
        explainer: the model.
        batches: clips that the model runs on together.
        decoded: what :func:`decode` gave for them; taken as it is needed.

    Yields:
        Clips in their order, but for those that cannot be decoded or prepared.
    """
    pending = iter(decoded)
    for batch in batches:
        ready = _prepared(explainer, batch, _take(batch, pending))
        if ready.clips:
            yield from zip(ready.clips, explainer.outputs(torch.stack(ready.inputs)), strict=True)


def explain(
    explainer: Explainer,
    configuration: Configuration,
    work: Work,
    decoded: Iterable[list[Decoded]],
    known: VideoMeans | None = None,
) -> Iterator[list[Explained]]:
    """Explain a shard's clips, batch by batch.

    Args:
        explainer: the configuration's recipe, loaded.
        configuration: of the store.
        work: the shard, or some of its batches.
        decoded: what :func:`decode` gave for each of ``work.decodings()``; taken as it is needed.
        known: the means of the clips' videos, where they are known already; then ``work.classified`` does not count.

    Yields:
        The rows of each of ``work.batches``. A clip that cannot be decoded or prepared gives a row with the error.

    Raises:
        ValueError, RuntimeError: what the model or the method raises, which is no fault of a clip.
    """
    pending = iter(decoded)
    means = known
    if means is None:
        means = VideoMeans()
        for clip, output in classify(explainer, work.classified, pending):
            means.add(clip.path, output)
    for batch in work.batches:
        pixels = _take(batch, pending)
        ready = _prepared(explainer, batch, pixels)
        measured = _measured(explainer, configuration, ready, means) if ready.clips else {}
        yield [
            _row(clip, shown, measured.get(clip.row), ready.problems.get(clip.row))
            for clip, shown in zip(batch, pixels, strict=True)
        ]


def _take(batch: Sequence[Clip], decoded: Iterator[list[Decoded]]) -> list[Decoded]:
    taken: list[Decoded] = []
    while len(taken) < len(batch):
        taken += next(decoded)
    return taken


class _Ready(NamedTuple):
    """A batch's clips that can be explained, with their inputs, and what is the matter with the others, by row."""

    clips: list[Clip]
    inputs: list[Tensor]
    problems: dict[int, str]


def _prepared(explainer: Explainer, batch: Sequence[Clip], decoded: Sequence[Decoded]) -> _Ready:
    ready = _Ready([], [], {})
    for clip, pixels in zip(batch, decoded, strict=True):
        if pixels.frames is None:
            ready.problems[clip.row] = pixels.error or "no frames"
            continue
        try:
            ready.inputs.append(explainer.prepare(torch.from_numpy(pixels.frames).to(explainer.device)))
            ready.clips.append(clip)
        except ValueError as error:  # a size that does not fit
            ready.problems[clip.row] = str(error)
    return ready


class _Measured(NamedTuple):
    """What came out for one clip: columns of the manifest, and its maps as they are stored."""

    columns: dict[str, Any]
    maps: dict[str, NDArray[np.generic]]


def _measured(
    explainer: Explainer, configuration: Configuration, ready: _Ready, means: VideoMeans
) -> dict[int, _Measured | str]:
    """For each row its results, or why they cannot be stored."""
    inputs = torch.stack(ready.inputs)
    outputs = explainer.outputs(inputs)
    tops = outputs.argmax(1).tolist()
    targets = [_target(configuration, clip, means, top) for clip, top in zip(ready.clips, tops, strict=True)]
    relevance, delta = explainer.method.attribute(
        inputs,
        target=targets,
        return_convergence_delta=True,
        internal_batch_size=configuration.internal_batch_size,
        # One for each batch: what a row holds must not depend on what was explained before its batch.
        frame_cache=FrameCache() if configuration.shares_frames else None,
    )
    finite = torch.stack([torch.isfinite(values).flatten(1).all(1) for values in relevance]).all(0).tolist()
    columns = {"target": targets, "prediction": tops, "delta": delta.tolist(), **_sums(relevance)}
    columns["score"] = explainer.scores(inputs, outputs)[range(len(targets)), targets].tolist()
    stored = {}
    for name in configuration.maps:
        values, scales = encode_maps(getattr(relevance, name), configuration.encoding)
        stored[name], columns[f"{name}_scale"] = values.cpu().numpy(), scales.tolist()
    return {
        clip.row: _Measured(
            {name: values[position] for name, values in columns.items()},
            {name: values[position] for name, values in stored.items()},
        )
        if finite[position]
        else "the relevance is not finite"
        for position, clip in enumerate(ready.clips)
    }


def _row(clip: Clip, pixels: Decoded, measured: _Measured | str | None, problem: str | None) -> Explained:
    shown = {"start": pixels.start, "fps": pixels.fps, "looped": pixels.looped, "warning": pixels.warning}
    if isinstance(measured, _Measured):
        return Explained(clip, {**shown, **measured.columns, "status": "ok", "error": None}, measured.maps)
    return Explained(clip, {**shown, "status": "failed", "error": measured or problem})


def _target(configuration: Configuration, clip: Clip, means: VideoMeans, top: int) -> int:
    if configuration.target == "top1":
        return top
    if configuration.target == "video":
        return means.top(clip.path)
    chosen = clip.label_index if configuration.target == "label" else clip.target
    assert chosen is not None
    return chosen


def _sums(relevance: SpatioTemporalRelevance) -> dict[str, list[Any]]:
    """For each clip its relevance by frame, summed, and its magnitude summed, which is its mass."""
    columns: dict[str, list[Any]] = {}
    for name, values in (("spatial", relevance.spatial), ("temporal", relevance.temporal)):
        values = values.double().flatten(2)
        masses = values.abs().sum(2)
        columns[f"{name}_sums"] = values.sum(2).tolist()
        columns[f"{name}_masses"] = masses.tolist()
        columns[f"{name}_mass"] = masses.sum(1).tolist()
    return columns
