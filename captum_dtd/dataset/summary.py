"""What a store says about a model, from its manifest alone: by class, by frame, by clip, and where the model errs.

With ``|spatial|`` and ``|temporal|`` summed over a clip's frames and pixels,

    temporal share = sum |temporal| / (sum |spatial| + sum |temporal|)                 of one clip, 0 ... 1
    net            = sum temporal / sum |spatial + temporal|, both of signed sums      of some clips

The share is how much of what the explanation shows is due to motion; a class's is the mean over its clips, so that each clip
counts alike, whatever its score. The net is what motion adds to the scores, or takes from them where it is negative: relevance
for and against the class cancels in it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from captum_dtd.dataset.reader import Relevance
from captum_dtd.tables import aligned

__all__ = ["ClipShare", "Confusion", "Group", "Quantiles", "Summary", "summarize"]

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 16
_CONFUSIONS_SHOWN = 10


class Quantiles(NamedTuple):
    """Of some clips' temporal shares: 5 %, a quarter, half, three quarters and 95 % of the clips are below."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float


@dataclass(frozen=True)
class Group:
    """The clips that were explained for one class, or all.

    Attributes:
        name: of the class; "all" for all.
        index: which of the model's outputs it is, None for all.
        clips: how many were explained for it.
        videos: from how many videos they are.
        temporal_share: mean over the clips that have any relevance, NaN if none has.
        quantiles: of the same.
        net: see the module.
        spatial_mass, temporal_mass: sum of |relevance| over all clips.
        spatial_sum, temporal_sum: signed sum over all clips.
        spatial_frames, temporal_frames: for each frame its part of a clip's |spatial|, and |temporal|; mean over the clips.
        precision: part of the clips that the model takes for this class, and whose label is known, that are of it. For all:
            part of the clips with a label that the model takes for what they are. None if there is no such clip.
        recall: part of the clips of this class that the model takes for it; None if there is no such clip.
    """

    name: str
    index: int | None
    clips: int
    videos: int
    temporal_share: float
    quantiles: Quantiles
    net: float
    spatial_mass: float
    temporal_mass: float
    spatial_sum: float
    temporal_sum: float
    spatial_frames: tuple[float, ...]
    temporal_frames: tuple[float, ...]
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class ClipShare:
    """One clip.

    Attributes:
        row, id: as in the manifest.
        label: its class, None if unknown.
        explained: the class it was explained for.
        score: that class's logit.
        temporal_share: see the module.
    """

    row: int
    id: str
    label: str | None
    explained: str
    score: float
    temporal_share: float


@dataclass(frozen=True)
class Confusion:
    """Clips of one class that the model takes for one class.

    Attributes:
        label: what they are.
        prediction: what the model takes them for.
        clips: how many.
        temporal_share: mean of theirs, NaN if none has relevance.
    """

    label: str
    prediction: str
    clips: int
    temporal_share: float


@dataclass(frozen=True)
class Summary:
    """What a store says; print it.

    Attributes:
        clips: how many the store has once it is complete.
        failed: how many could not be explained.
        target: which class of a clip was explained, as the configuration says.
        overall: all clips.
        classes: each class that some clip was explained for, the largest temporal share first.
        most_temporal, most_spatial: the clips with the largest and the smallest temporal share.
        confusion: every pair of a label and a prediction that occurs, the most frequent first.
    """

    clips: int
    failed: int
    target: str
    overall: Group
    classes: tuple[Group, ...]
    most_temporal: tuple[ClipShare, ...]
    most_spatial: tuple[ClipShare, ...]
    confusion: tuple[Confusion, ...]

    def __str__(self) -> str:
        explained = self.overall.clips
        missing = self.clips - explained - self.failed
        lines = [
            f"{explained} clips of {self.overall.videos} videos explained for the target {self.target}"
            + (f", {self.failed} failed" if self.failed else "")
            + (f", {missing} not there yet" if missing else ""),
            "share: sum|temporal| / (sum|spatial| + sum|temporal|), the mean over clips, and its quartiles",
            "net: what motion adds to the score; |spatial|, |temporal|: by frame",
            "",
            *aligned([_HEADINGS, *(_cells(group) for group in (*self.classes, self.overall))]),
        ]
        for title, clips in (("motion", self.most_temporal), ("appearance", self.most_spatial)):
            if clips:
                lines += ["", f"most driven by {title}:", *aligned([_clip_cells(clip) for clip in clips])]
        wrong = [pair for pair in self.confusion if pair.label != pair.prediction]
        if wrong:
            lines += ["", "most often taken for another class:"]
            lines += aligned([_confusion_cells(pair) for pair in wrong[:_CONFUSIONS_SHOWN]])
            if len(wrong) > _CONFUSIONS_SHOWN:
                lines.append(f"... and {len(wrong) - _CONFUSIONS_SHOWN} pairs more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them: NaN is None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write all of it."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each class, and the last one for all clips."""
        lines = [_flat(group) for group in (*self.classes, self.overall)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def summarize(store: Relevance, top: int = 10) -> Summary:
    """Summarize a store that is open, finished or not; its maps are not read.

    Args:
        store: what `captum_dtd.dataset.open` gave.
        top: how many of the most motion- and appearance-driven clips.

    Raises:
        ValueError: no clip was explained yet, or ``top`` is negative.

    Example::

        summary = captum_dtd.dataset.summarize(captum_dtd.dataset.open("out"))
        print(summary)
        summary.classes[0].name                                # 'JumpingJack', of the largest temporal share
    """
    if top < 0:
        raise ValueError(f"top must be at least 0, not {top}")
    table = store.table.filter(pc.equal(store.table["status"], "ok"))
    if not len(table):
        raise ValueError(f"{store.folder} has no clip that was explained")
    names = store.configuration.classes
    clips = _Clips.of(table)

    def name(index: int) -> str:
        return names[index] if names else f"class {index}"

    groups = [
        clips.group(clips.target == index, name(int(index)), int(index)) for index in np.unique(clips.target).tolist()
    ]
    order = np.argsort(clips.share, kind="stable")
    order = order[~np.isnan(clips.share[order])]

    def shares(positions: NDArray[np.int64]) -> tuple[ClipShare, ...]:
        chosen = table.take(positions).select(["row", "id", "label", "target", "score"]).to_pylist()
        return tuple(
            ClipShare(row["row"], row["id"], row["label"], name(row["target"]), row["score"], float(share))
            for row, share in zip(chosen, clips.share[positions], strict=True)
        )

    return Summary(
        clips=store.clips,
        failed=len(store.table) - len(table),
        target=store.configuration.target,
        overall=clips.group(np.ones(len(table), bool), "all", None),
        classes=tuple(sorted(groups, key=lambda group: -np.nan_to_num(group.temporal_share, nan=-1))),
        most_temporal=shares(order[::-1][:top]),
        most_spatial=shares(order[:top]),
        confusion=tuple(
            Confusion(name(label), name(prediction), count, share)
            for label, prediction, count, share in clips.confusion()
        ),
    )


@dataclass(frozen=True)
class _Clips:
    """Columns of the clips that were explained; labels are -1 where they are not known."""

    video: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    label: NDArray[np.int64]
    masses: dict[str, NDArray[np.float64]]
    sums: dict[str, NDArray[np.float64]]
    share: NDArray[np.float64]

    @classmethod
    def of(cls, table: pa.Table) -> _Clips:
        parts = ("spatial", "temporal")
        masses = {part: _by_frame(table[f"{part}_masses"]) for part in parts}
        temporal, spatial = masses["temporal"].sum(1), masses["spatial"].sum(1)
        with np.errstate(invalid="ignore"):  # a clip without relevance has no share
            share = temporal / (spatial + temporal)
        return cls(
            video=table["path_bytes"].combine_chunks().dictionary_encode().indices.to_numpy(),
            target=table["target"].to_numpy(),
            prediction=table["prediction"].to_numpy(),
            label=pc.fill_null(table["label_index"], -1).to_numpy(),
            masses=masses,
            sums={part: _by_frame(table[f"{part}_sums"]).sum(1) for part in parts},
            share=share,
        )

    def group(self, chosen: NDArray[np.bool_], name: str, index: int | None) -> Group:
        share = self.share[chosen & ~np.isnan(self.share)]
        quantiles = np.quantile(share, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(share) else [float("nan")] * 5
        spatial, temporal = self.sums["spatial"][chosen], self.sums["temporal"][chosen]
        whole = float(np.abs(spatial + temporal).sum())
        right, known = self.prediction == self.label, self.label >= 0
        taken, such = (known, known) if index is None else (known & (self.prediction == index), self.label == index)
        return Group(
            name=name,
            index=index,
            clips=int(chosen.sum()),
            videos=len(np.unique(self.video[chosen])),
            temporal_share=float(share.mean()) if len(share) else float("nan"),
            quantiles=Quantiles(*quantiles),
            net=float(temporal.sum()) / whole if whole else float("nan"),
            spatial_mass=float(self.masses["spatial"][chosen].sum()),
            temporal_mass=float(self.masses["temporal"][chosen].sum()),
            spatial_sum=float(spatial.sum()),
            temporal_sum=float(temporal.sum()),
            spatial_frames=_profile(self.masses["spatial"][chosen]),
            temporal_frames=_profile(self.masses["temporal"][chosen]),
            precision=_part(right, taken),
            recall=_part(right, such),
        )

    def confusion(self) -> list[tuple[int, int, int, float]]:
        """(label, prediction, clips, mean share), the most frequent first."""
        known = self.label >= 0
        pairs = np.stack([self.label[known], self.prediction[known]], 1)
        found, which = np.unique(pairs, axis=0, return_inverse=True)
        which, share = which.ravel(), self.share[known]
        valid = ~np.isnan(share)
        with np.errstate(invalid="ignore"):  # no clip of the pair has a share
            means = np.bincount(which[valid], share[valid], len(found)) / np.bincount(
                which[valid], minlength=len(found)
            )
        rows = zip(found.tolist(), np.bincount(which, minlength=len(found)).tolist(), means.tolist(), strict=True)
        return sorted(((*pair, count, mean) for pair, count, mean in rows), key=lambda row: -row[2])


def _by_frame(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """(clips, T) from a column of lists of T numbers."""
    lists = column.combine_chunks()
    values: NDArray[np.float64] = lists.flatten().to_numpy().reshape(len(lists), -1)
    return values


def _profile(masses: NDArray[np.float64]) -> tuple[float, ...]:
    """What part of its mass a clip has in each frame, mean over those that have any; zeros if none has."""
    totals = masses.sum(1)
    parts = masses[totals > 0] / totals[totals > 0, None]
    return tuple((parts.mean(0) if len(parts) else masses.sum(0)).tolist())


def _part(right: NDArray[np.bool_], of: NDArray[np.bool_]) -> float | None:
    return float(right[of].mean()) if of.any() else None


_HEADINGS = (
    "class",
    "clips",
    "share",
    "quartiles",
    "net",
    "precision",
    "recall",
    "|spatial|",
    "|temporal|",
)


def _cells(group: Group) -> tuple[str, ...]:
    return (
        group.name,
        f"{group.clips:5d}",
        f"{group.temporal_share:5.1%}",
        f"{group.quantiles.p25:.0%} {group.quantiles.p50:.0%} {group.quantiles.p75:.0%}",
        f"{group.net:+6.1%}",
        "-" if group.precision is None else f"{group.precision:4.0%}",
        "-" if group.recall is None else f"{group.recall:4.0%}",
        _bars(group.spatial_frames),
        _bars(group.temporal_frames),
    )


def _clip_cells(clip: ClipShare) -> tuple[str, ...]:
    label = "" if clip.label in (None, clip.explained) else f"is {clip.label}"
    return f"{clip.temporal_share:6.1%}", clip.id, clip.explained, f"score {clip.score:.3g}", f"row {clip.row}", label


def _confusion_cells(pair: Confusion) -> tuple[str, ...]:
    return f"{pair.clips:5d}", pair.label, f"taken for {pair.prediction}", f"share {pair.temporal_share:.1%}"


def _bars(values: Sequence[float]) -> str:
    """Values from 0 to the largest as a row of bars, neighbours taken together where they are many."""
    means = [float(part.mean()) for part in np.array_split(np.asarray(values), min(len(values), _MOST_BARS))]
    largest = max(means) or 1.0
    return "".join(_BARS[round(mean / largest * (len(_BARS) - 1))] for mean in means)


def _flat(group: Group) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in asdict(group).items():
        if key == "quantiles":
            line |= {f"share_{name}": part for name, part in zip(Quantiles._fields, value, strict=True)}
        elif key.endswith("_frames"):
            line |= {f"{key.removesuffix('s')}_{number}": part for number, part in enumerate(value, start=1)}
        else:
            line["class" if key == "name" else key] = value
    return line


def _plain(value: Any) -> Any:
    if isinstance(value, Quantiles):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and np.isnan(value) else value
