"""A store's maps in files that other programs read: safetensors by video, WebDataset archives, overlay videos by clip.

Names of files follow from the videos' names, which may be anything: `file_name` gives each another one, none of which leads
out of the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm import tqdm

from captum_dtd.dataset.clips import of_another_size
from captum_dtd.dataset.configuration import MAPS
from captum_dtd.dataset.reader import Relevance
from captum_dtd.dataset.sources import escaped
from captum_dtd.dataset.store import read_clips
from captum_dtd.dataset.work import Work, decode, release
from captum_dtd.video import Preprocessing, shared_scale, write_overlay

__all__ = ["Exported", "export_mp4", "export_safetensors", "export_webdataset", "file_name"]

_TEMPORARY = ".temporary"
_LONGEST_NAME = 255
# Clips whose maps, or frames, are in memory together.
_TOGETHER = 16


@dataclass
class Exported:
    """What an export has written.

    Attributes:
        clips: how many are in the files.
        files: how many files.
        left_out: by their ids, clips that are not in them, and why.
    """

    clips: int = 0
    files: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def export_safetensors(
    store: Relevance, folder: str | os.PathLike[str], rows: Sequence[int] | None = None, *, show_progress: bool = False
) -> Exported:
    """Write a file for each video: ``spatial``, ``temporal`` and ``total``, float32 (clips, T, H, W), and what the manifest says.

    The metadata are ``video``, its escaped path; ``clips``, the rows of the manifest as a JSON list, in the order of the
    maps; and ``configuration``, JSON.

    Args:
        store: what `captum_dtd.dataset.open` gave.
        folder: for the files; made if it is not there. Files of an earlier export are replaced.
        rows: which clips; None for all that were explained.
        show_progress: show a progress bar.

    Raises:
        ValueError: the store keeps no maps, or has no such row.
        OSError: a file cannot be written; those before it stay.

    Example::

        export_safetensors(captum_dtd.dataset.open("out"), "files", rows=[0, 7])
    """
    exported, chosen = _chosen(store, rows)
    by_video: dict[bytes, list[dict[str, Any]]] = {}
    for clip in chosen:
        by_video.setdefault(clip["path_bytes"], []).append(clip)
    configuration = json.dumps(store.configuration.to_dict())
    with tqdm(total=len(chosen), unit="clip", disable=not show_progress) as bar:
        for path, clips in by_video.items():
            metadata = {
                "video": escaped(path),
                "clips": json.dumps([_plain(clip) for clip in clips]),
                "configuration": configuration,
            }
            with _new_file(Path(folder, file_name(path, "", ".safetensors"))) as file:
                save_file(_maps(store, clips), file, metadata)
            exported.files += 1
            exported.clips += len(clips)
            bar.update(len(clips))
    return exported


def export_webdataset(
    store: Relevance, folder: str | os.PathLike[str], rows: Sequence[int] | None = None, *, show_progress: bool = False
) -> Exported:
    """Write archives ``relevance-00000.tar``, ... that the library webdataset reads, one for each of the store's shards.

    A clip's key is its row; it has ``spatial.npy``, ``temporal.npy`` and ``total.npy``, float32 (T, H, W), and ``json``, what
    the manifest says. The same store gives the same bytes. The rest is as for `export_safetensors`.

    Example::

        for sample in webdataset.WebDataset("out/relevance-{00000..00041}.tar", shardshuffle=False).decode():
            sample["temporal.npy"], sample["json"]["label"]
    """
    exported, chosen = _chosen(store, rows)
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for clip in chosen:
        by_shard.setdefault(clip["shard"], []).append(clip)
    of_others = sorted({path.name for path in Path(folder).glob("relevance-*.tar")} - set(map(_archive, by_shard)))
    if of_others:
        some = ", ".join(of_others[:3]) + (", ..." if len(of_others) > 3 else "")
        raise ValueError(
            f"{escaped(os.fspath(folder))} has archives of another export, which would be read with these ({some}): name another "
            "folder, or remove them"
        )
    with tqdm(total=len(chosen), unit="clip", disable=not show_progress) as bar:
        for shard, clips in by_shard.items():
            with _new_file(Path(folder, _archive(shard))) as file, tarfile.open(file, "w") as archive:
                for clip, maps in _each(store, clips):
                    for name, values in maps.items():
                        array = io.BytesIO()
                        np.save(array, values)
                        _add(archive, f"{clip['row']:08d}.{name}.npy", array.getvalue())
                    _add(archive, f"{clip['row']:08d}.json", json.dumps(_plain(clip)).encode())
                    bar.update()
            exported.files += 1
            exported.clips += len(clips)
    return exported


def export_mp4(
    store: Relevance,
    folder: str | os.PathLike[str],
    rows: Sequence[int] | None = None,
    *,
    videos: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> Exported:
    """Write a video for each clip: its frames beside total, spatial and temporal relevance, as `captum-dtd explain` does.

    The clip is decoded again; one that cannot be any more, or whose file is of another size by now, is left out. The rest is as
    for `export_safetensors`.

    Args:
        store: what `captum_dtd.dataset.open` gave.
        folder: for the files.
        rows: which clips; None for all that were explained.
        videos: the folder that the clips' paths are relative to; None for where it was when they were explained.
        show_progress: show a progress bar.

    Raises:
        ValueError: the store keeps no maps, has no such row, or the videos are not there.
        OSError: a file cannot be written; those before it stay.

    Example::

        export_mp4(captum_dtd.dataset.open("out"), "videos", rows=[0, 7])
    """
    source = os.fspath(store.root if videos is None else videos)
    if not os.path.isdir(source):
        raise ValueError(
            f"the videos are not in {escaped(source)}: name the folder that their paths are relative to (--videos)"
        )
    exported, chosen = _chosen(store, rows)
    prepare = Preprocessing.from_dict(store.configuration.preprocessing)
    listed = read_clips(store.folder)
    replaced = set(of_another_size([listed[clip["row"]] for clip in chosen], Path(source)))
    for clip in chosen:
        if clip["path_bytes"] in replaced:
            exported.left_out[clip["id"]] = "its video is of another size than when it was explained"
    chosen = [clip for clip in chosen if clip["id"] not in exported.left_out]
    clips = [listed[clip["row"]] for clip in chosen]
    work = Work(0, tuple(tuple(clips[start : start + _TOGETHER]) for start in range(0, len(clips), _TOGETHER)))
    shown = _each(store, chosen)
    with tqdm(total=len(chosen), unit="clip", disable=not show_progress) as bar:
        for part in work.decodings():
            for pixels in decode(source, part, prepare.frames, prepare.stride):
                clip, maps = next(shown)
                bar.update()
                if pixels.frames is None:
                    exported.left_out[clip["id"]] = pixels.error or "no frames"
                    continue
                tail = clip["id"].removeprefix(clip["path"])
                with _new_file(Path(folder, file_name(clip["path_bytes"], tail, ".mp4"))) as file:
                    write_overlay(
                        file,
                        prepare.source_crop(pixels.frames),
                        maps,
                        scale=shared_scale(maps.values()),
                        headline=_headline(store, clip),
                        share=clip["temporal_mass"] / ((clip["spatial_mass"] + clip["temporal_mass"]) or 1.0),
                        fps=clip["fps"] / prepare.stride,
                    )
                exported.files += 1
                exported.clips += 1
    release()
    return exported


def _archive(shard: int) -> str:
    return f"relevance-{shard:05d}.tar"


def file_name(path: bytes, tail: str, suffix: str) -> str:
    """A name, below any folder, for a file that belongs to a video; another one for every other path and tail.

    What is not printable UTF-8, or means something to a file system, is written as in URLs. Folders that would lead
    elsewhere, or could be taken for a file, get a "%" behind, and a name that is too long a digest in place of its end.

    Args:
        path: the video's name, with "/" between folders.
        tail: what follows it.
        suffix: of the file, with its dot.

    Example:
        >>> file_name(b"HammerThrow/v 1.avi", "@16", ".mp4"), file_name(b"../../\\xff\\n", "", ".mp4")
        ('HammerThrow/v 1.avi@16.mp4', '..%/..%/%FF%0A.mp4')
    """
    *folders, name = os.fsdecode(path).split("/")
    parts = [_component(folder, _LONGEST_NAME - 1) for folder in folders]
    parts = [f"{part}%" if part in ("", ".", "..") or part.endswith((suffix, _TEMPORARY)) else part for part in parts]
    room = _LONGEST_NAME - len(suffix) - len(_TEMPORARY)
    return "/".join([*parts, _component(name + tail, room) + suffix])


def _component(name: str, longest: int) -> str:
    safe = "".join(
        character
        if character.isprintable() and character not in '%\\:*?"<>|'
        else quote(os.fsencode(character), safe="")
        for character in name
    )
    if len(safe.encode()) <= longest:
        return safe
    digest = f"%-{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}"
    return safe.encode()[: longest - len(digest)].decode(errors="ignore") + digest


def _chosen(store: Relevance, rows: Sequence[int] | None) -> tuple[Exported, list[dict[str, Any]]]:
    """The rows of the manifest to export, and those that cannot be, having failed."""
    if not store.configuration.maps:
        raise ValueError(f"{store.folder} keeps no maps (--maps none), so there is nothing to export")
    table = store.table
    if rows is not None:
        unknown = sorted(set(rows) - set(table["row"].to_pylist()))
        if unknown:
            raise ValueError(f"{store.folder} has no row {', '.join(map(str, unknown[:5]))}, or has it not yet")
        table = table.filter(pc.is_in(table["row"], value_set=pa.array(rows, pa.int64())))
    ok = pc.equal(table["status"], "ok")
    failed = table.filter(pc.invert(ok))
    left_out = dict(zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True))
    return Exported(left_out=left_out), table.filter(ok).to_pylist()


def _maps(store: Relevance, clips: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.float32]]:
    rows = [clip["row"] for clip in clips]
    return {name: getattr(store, name)[rows] for name in MAPS}


def _each(
    store: Relevance, clips: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, NDArray[np.float32]]]]:
    """Each clip with its maps, (T, H, W)."""
    for start in range(0, len(clips), _TOGETHER):
        some = clips[start : start + _TOGETHER]
        maps = _maps(store, some)
        for position, clip in enumerate(some):
            yield clip, {name: values[position] for name, values in maps.items()}


def _plain(clip: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it; its escaped path says what the raw one does."""
    return {name: value for name, value in clip.items() if name != "path_bytes"}


def _headline(store: Relevance, clip: dict[str, Any]) -> str:
    names, target, label = store.configuration.classes, clip["target"], clip["label"]
    explained = names[target] if names else f"class {target}"
    known = f"   is {label}" if label not in (None, explained) else ""
    return f"{explained}   score {clip['score']:.3g}   at {clip['start']:.2f} s{known}"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its own once it is whole, and is not there if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
