"""From a folder of videos to a store: list the clips, decide the configuration or check it, and let an engine do the work."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from captum_dtd.dataset.clips import (
    Clip,
    Probe,
    add_repaired,
    clips_of,
    differences,
    probe_entry,
    resized,
    with_new_sizes,
)
from captum_dtd.dataset.configuration import Configuration, Encoding, target_column, weights_digest
from captum_dtd.dataset.engine_local import local_engine
from captum_dtd.dataset.job import Engine, Job
from captum_dtd.dataset.processes import Processes
from captum_dtd.dataset.progress import Progress
from captum_dtd.dataset.sources import Source, escaped, find_videos
from captum_dtd.dataset.store import (
    Store,
    StoreError,
    map_shape,
    read_clips,
    read_configuration,
    read_manifest,
    read_root,
    running_alone,
    write_clips,
    write_configuration,
)
from captum_dtd.dataset.work import Work, decode, explain, plan, release, undecodable
from captum_dtd.inputs import check_option
from captum_dtd.recipe import Explainer, Recipe
from captum_dtd.version import __version__

__all__ = ["EngineName", "Outcome", "explain_dataset"]

EngineName: TypeAlias = Literal["local", "ray"]
"""Where clips are explained: on this machine, or on a Ray cluster."""

# What a shard should take, and the most that its maps may take in memory.
_SHARD_SECONDS = 60.0
_SHARD_BYTES = 256 * 2**20
# So many shards, at least, for each process that explains.
_SHARDS_EACH = 4
# Larger batches need memory and gain no speed: what fills a GPU are their frozen clips.
_BATCH_CLIPS = 4
_NAMED = 3  # of clips with labels that are unknown
_TO_BE_RETRIED = "--retry-failed was to explain this clip anew and was interrupted before it did: give it again"


@dataclass(frozen=True)
class Outcome:
    """What a store holds after a run.

    Attributes:
        clips: how many clips there are, all of which have a row now.
        failed: how many of them could not be explained; their rows say why.
        warnings: how many were explained, but with a warning in their rows.
        new: how many this run explained.
        passed_over: how many files of the data set are no videos by their endings, or in no class's folder.
    """

    clips: int
    failed: int
    warnings: int
    new: int
    passed_over: int


def explain_dataset(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    target: str | None = None,
    lists: Sequence[str] = (),
    clip_stride: int | None = None,
    maps: Sequence[str] = ("spatial", "temporal"),
    encoding: Encoding = "float16",
    batch_clips: int = _BATCH_CLIPS,
    internal_batch_size: int | None = None,
    shard_clips: int | None = None,
    engine: EngineName = "local",
    devices: Sequence[str] | None = None,
    decoders: int | None = None,
    retry_failed: bool = False,
    show_progress: bool = False,
) -> Outcome:
    """Explain every clip of a data set, or go on where an earlier run with the same arguments stopped.

    A run may be killed at any moment. What is committed stays; the next run with the same arguments computes the rest, and
    ends with the rows and maps of a run that was not killed.

    Args:
        root: a folder with a subfolder for each class, a UCF-101 tree, or a table; see
            :func:`captum_dtd.dataset.find_videos`.
        out: folder of the store; made if it is not there.
        recipe: model, preprocessing and method.
        target: what is explained: "label"; "top1", the model's class for the clip; "video", its class for the mean over
            the video's clips, as the method's authors do, or over those that a table names; or "column:NAME" of a table, a
            class name or index. By default "top1", and "video" where the recipe's preset is "hiley2019".
        lists: as for ``find_videos``.
        clip_stride: frames of the video from the start of one clip to the start of the next; by default clips follow each
            other without overlap.
        maps: two of "spatial", "temporal", "total", from which the third follows; none keeps the manifest alone.
        encoding: "float32", "float16" or "int8"; see :mod:`captum_dtd.dataset.encoding`.
        batch_clips: clips explained together.
        internal_batch_size: how many of their frozen clips are explained together; by default as many as memory allows and
            the device gains from (`DiscriminativeDeepTaylor.frozen_batch`). Decided once for a store.
        shard_clips: clips committed together; by default about a minute of work, less where there are too few clips to
            keep all processes busy, and at most 256 MiB of maps. Decided once for a store.
        engine: "local" for this machine, or "ray" for a Ray cluster: the one that the caller is connected to, that
            RAY_ADDRESS names or that runs on this machine, or else a new one. Both write the same store.
        devices: "cpu", "cuda:0", ...; a process for each, so that ``["cpu", "cpu"]`` shares the cores between two. By
            default every GPU, or the CPU with a process for each core (of ``torch.get_num_threads()``) that has 4 GiB. For a
            cluster "cpu" or "cuda"; by default its GPUs if it has any.
        decoders: processes that decode for each device; 0 decodes in the explaining process, of which there is by default
            one then, which is this one: a script without ``if __name__ == "__main__":`` needs that. A cluster needs at
            least 1.
        retry_failed: explain again the videos of which a clip failed.
        show_progress: show a progress bar: clips per second, the time left, the stage that takes most of it.

    Returns:
        Counts; ``captum_dtd.dataset.open(out)`` reads the store.

    Raises:
        StoreError: another run is writing to ``out``, it holds something else, or it was begun with other arguments or
            other videos; the message shows the difference.
        ValueError, TypeError, OSError, ImportError: as ``find_videos`` and ``Recipe.load``, or a full disk. What is committed
            stays.
        RuntimeError: as the model raises, or a process died again and again.

    Example::

        outcome = explain_dataset("UCF-101", "out", Recipe("c3d", "ucf101.pth"), target="video", lists=["testlist01.txt"])
        outcome.failed                                         # 0
    """
    check_option("engine", engine, get_args(EngineName))
    if decoders is not None and decoders < 0:
        raise ValueError(f"decoders must be at least 0, not {decoders}")
    out = Path(out)
    target = recipe.default_target if target is None else target
    source = find_videos(root, lists, target_column(target))
    with _engine(engine)(recipe, devices, decoders) as team:
        explainer, prepare = team.explainer, team.explainer.prepare
        outputs = explainer.outputs(_example(explainer)).shape[1]
        classes = explainer.classes or source.classes
        names = classes if classes and len(classes) == outputs else None
        asked = Configuration(
            recipe=recipe,
            weights_digest=weights_digest(explainer.model),
            preprocessing=prepare.to_dict(),
            classes=tuple(map(escaped, names)) if names else None,
            target=target,
            lists=tuple(lists),
            clip_stride=prepare.frames * prepare.stride if clip_stride is None else clip_stride,
            maps=tuple(maps),
            encoding=encoding,
            batch_clips=batch_clips,
            internal_batch_size=1 if internal_batch_size is None else internal_batch_size,
            shard_clips=batch_clips if shard_clips is None else shard_clips,
            device=team.device,
            version=__version__,
        )
        with running_alone(out):
            look = partial(_probed, source, asked, team.processes, show_progress)
            stored = read_configuration(out)
            if stored is None:
                clips = clips_of(source, list(look(range(len(source.entries))).values()), names, outputs)
                _check_targets(asked, clips)
                if names is not None:
                    _tell_unknown_labels(clips)
                if internal_batch_size is None:
                    asked = replace(asked, internal_batch_size=team.call(partial(_frozen_clips, asked)))
                if shard_clips is None:
                    minute = team.call(partial(_minute_of_clips, asked, os.fspath(source.folder), clips))
                    asked = replace(asked, shard_clips=min(minute, _fair_share(asked, clips, team.explainers)))
                write_clips(out, clips)
                write_configuration(out, asked, source.folder)
            else:
                same_weights = stored.weights_digest == asked.weights_digest  # wherever the file lies now
                asked = replace(
                    asked,
                    recipe=replace(recipe, weights=stored.recipe.weights if same_weights else recipe.weights),
                    internal_batch_size=internal_batch_size or stored.internal_batch_size,
                    shard_clips=shard_clips or stored.shard_clips,
                )
                _check_same(out, "another configuration", stored.differences(asked))
                clips = read_clips(out)
                failed = _videos_that_failed(read_manifest(out, stored))  # they may have been mended since
                changed = differences(clips, source, names, outputs) or resized(clips, source.folder, failed)
                _check_same(out, "other videos", changed)
                if read_root(out) != os.fspath(source.folder.absolute()):
                    write_configuration(out, asked, source.folder)
                if retry_failed and failed:
                    broken = {clip.entry for clip in clips if clip.error}
                    repaired = {entry: probe for entry, probe in look(broken).items() if probe.error is None}
                    # Before the new sizes are written: what is there of the old files must not pass for the new ones'.
                    Store(out, asked, clips).fail(failed, _TO_BE_RETRIED)
                    clips = with_new_sizes(add_repaired(clips, repaired), source.folder, failed)
                    write_clips(out, clips)
            job = Job(os.fspath(source.folder), out, asked, clips, recipe)
            store = job.store()
            rows = store.manifest()
            works = plan(clips, _missing(clips, rows, retry_failed), asked)
            new = sum(len(batch) for work in works for batch in work.batches)
            with Progress(len(clips), len(clips) - new, show_progress) as progress:
                try:
                    team.run(job, works, progress)
                finally:
                    release()
            store.gather()
            rows = store.manifest()
    ok = pc.equal(rows["status"], "ok")
    warned = pc.and_(ok, pc.is_valid(rows["warning"]))
    return Outcome(
        clips=len(rows),
        failed=len(rows) - pc.sum(ok).as_py(),
        warnings=pc.sum(warned).as_py(),
        new=new,
        passed_over=source.passed_over,
    )


def _engine(name: EngineName) -> Callable[..., AbstractContextManager[Engine]]:
    if name == "local":
        return local_engine
    from captum_dtd.dataset.engine_ray import ray_engine  # an extra of its own

    return ray_engine


def _probed(
    source: Source, configuration: Configuration, processes: Processes, show_progress: bool, entries: Collection[int]
) -> dict[int, Probe]:
    """Where the clips of some videos begin, by number of the video."""
    preprocessing = configuration.preprocessing
    frames, stride = preprocessing["frames"], preprocessing["stride"]
    tasks = ((source.folder, source.entries[entry], frames, stride, configuration.clip_stride) for entry in entries)
    lost = Probe([], "the process that looked into this video died, twice")
    found = processes.map(probe_entry, tasks, lambda task: lost)
    bar = tqdm(found, desc="counting frames", unit="video", total=len(entries), disable=not show_progress, leave=False)
    return dict(zip(entries, bar, strict=True))


def _check_targets(configuration: Configuration, clips: Sequence[Clip]) -> None:
    """Raise ValueError if some clip says not which class to explain."""
    if configuration.target == "label":
        without = [clip for clip in clips if clip.label_index is None]
        what = "no label that is a class of the model (--classes FILE names the classes in the order of the outputs)"
    elif column := target_column(configuration.target):
        without = [clip for clip in clips if clip.target is None]
        what = f"nothing in the column {column}"
    else:
        return
    if without:
        example = f"{without[0].id}, label {without[0].label}"
        raise ValueError(f"target {configuration.target}: {len(without)} of {len(clips)} clips have {what}: {example}")


def _tell_unknown_labels(clips: Sequence[Clip]) -> None:
    """Warn of labels that no class of the model has: how often it is right, is not known of their clips."""
    unknown = [clip for clip in clips if clip.label is not None and clip.label_index is None]
    if unknown:
        some = ", ".join(dict.fromkeys(escaped(str(clip.label)) for clip in unknown[:_NAMED]))
        warnings.warn(
            f"{len(unknown)} of {len(clips)} clips have labels that are no class of the model ({some}): they count as not "
            "labelled; --classes FILE names the classes in the order of the outputs",
            UserWarning,
            stacklevel=3,
        )


def _check_same(out: Path, what: str, differences: Sequence[str]) -> None:
    if differences:
        raise StoreError(
            f"{out} was begun with {what}: {'; '.join(differences)}. Give the same again, or another folder for the output"
        )


def _example(explainer: Explainer) -> Tensor:
    """An input of the model, black."""
    prepare = explainer.prepare
    return torch.zeros(1, prepare.channels, prepare.frames, *prepare.crop, device=explainer.device)


def _frozen_clips(configuration: Configuration, explainer: Explainer, _: Processes) -> int:
    """How many frozen clips are explained together: no more than a batch of clips has."""
    most = configuration.batch_clips * explainer.prepare.frames
    return min(most, explainer.method.frozen_batch((_example(explainer),)))


def _minute_of_clips(
    configuration: Configuration, folder: str, clips: Sequence[Clip], explainer: Explainer, processes: Processes
) -> int:
    """How many clips a shard should hold, from how long the first takes that can be explained."""
    size = configuration.batch_clips
    frames, stride = explainer.prepare.frames, explainer.prepare.stride
    most = _SHARD_BYTES // (4 * math.prod(map_shape(configuration)))
    for clip in clips:
        tasks = [(folder, (clip,), frames, stride)]
        (decoded,) = processes.map(decode, tasks, lambda task: undecodable(task[1], "not decoded"))
        pixels = decoded[0].frames
        if pixels is None:
            continue
        alone = replace(configuration, target="top1", maps=())
        still = decoded[0]._replace(frames=np.repeat(pixels[:1], frames, axis=0))
        seconds = 0.0
        # A still clip first: it costs little, and the model is traced.
        for shown in (still, decoded[0]):
            begin = time.monotonic()
            list(explain(explainer, alone, Work(0, ((clip,),)), [[shown]]))
            seconds = time.monotonic() - begin
        most = min(most, int(_SHARD_SECONDS / seconds))
        break
    return max(1, most // size) * size


def _fair_share(configuration: Configuration, clips: Sequence[Clip], explainers: int) -> int:
    """The most clips a shard may hold if each of some processes is to get several of them, so that all end together."""
    batches = math.ceil(len(clips) / configuration.batch_clips)
    return math.ceil(batches / (_SHARDS_EACH * explainers)) * configuration.batch_clips


def _missing(clips: Sequence[Clip], rows: pa.Table, retry_failed: bool) -> set[int]:
    """Rows that are not there; to retry, also those that failed, as then all do of a video that may have changed."""
    there = rows.filter(pc.equal(rows["status"], "ok")) if retry_failed else rows
    return set(range(len(clips))) - set(there["row"].to_pylist())


def _videos_that_failed(rows: pa.Table) -> set[bytes]:
    """Of which a clip could not be explained, by path."""
    return set(rows.filter(pc.not_equal(rows["status"], "ok"))["path_bytes"].to_pylist())
