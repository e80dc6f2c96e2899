"""A summary as pictures: temporal share by class, which frames carry relevance, and confusion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captum_dtd.dataset.summary import Group, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["write_plots"]

_LINE, _TALLEST = 0.28, 14.0  # inches for a class's line, and for all; more than that, and lines are thinner
_MOST_NUMBERED = 25  # classes, beyond which numbers in a confusion matrix cannot be read


def write_plots(summary: Summary, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``temporal_share.png``, ``frames.png`` and, if some label is known, ``confusion.png``; returns their paths.

    Raises:
        OSError: the folder cannot be written.

    Example::

        write_plots(captum_dtd.dataset.summarize(captum_dtd.dataset.open("out")), "plots")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"temporal_share": _shares(summary), "frames": _frames(summary)}
    if summary.confusion:
        figures["confusion"] = _confusion(summary)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], format="png")
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shares(summary: Summary) -> Figure:
    """A box for each class, from a quarter to three quarters of its clips, whiskers from 5 to 95 %, a triangle at the mean."""
    groups = [group for group in reversed(summary.classes) if not np.isnan(group.temporal_share)]
    figure = _figure(8, 1.3 + _height(len(groups)))
    axes = figure.subplots()
    boxes = [
        {
            "mean": group.temporal_share,
            "whislo": group.quantiles.p5,
            "q1": group.quantiles.p25,
            "med": group.quantiles.p50,
            "q3": group.quantiles.p75,
            "whishi": group.quantiles.p95,
        }
        for group in groups
    ]
    if boxes:
        axes.bxp(
            boxes, positions=range(len(boxes)), orientation="horizontal", showfliers=False, showmeans=True, widths=0.6
        )
    axes.axvline(summary.overall.temporal_share, color="grey", linestyle=":", zorder=0)
    _name_lines(axes, [_label(group) for group in groups])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("temporal share of a clip's |relevance|; dotted: mean over all clips")
    return figure


def _frames(summary: Summary) -> Figure:
    """Each class's |relevance| by frame, spatial and temporal; above, all clips'."""
    groups = summary.classes
    height = _height(len(groups))
    figure = _figure(10, 3.2 + height)
    top, below = figure.subplots(2, 2, sharex=True, height_ratios=[2.2, height], squeeze=False)
    profiles = {
        "spatial": np.array([group.spatial_frames for group in groups]),
        "temporal": np.array([group.temporal_frames for group in groups]),
    }
    frames = np.arange(1, len(summary.overall.spatial_frames) + 1)
    highest = max(float(values.max()) for values in profiles.values()) or 1.0
    overall = (summary.overall.spatial_frames, summary.overall.temporal_frames)
    image = None
    for column, (name, values) in enumerate(profiles.items()):
        top[column].bar(frames, overall[column], color="grey")
        top[column].set_ylim(0, 1.1 * max(max(part) for part in overall) or 1.0)  # where no clip has relevance
        top[column].set_title(f"|{name}|")
        image = below[column].imshow(
            values,
            aspect="auto",
            vmin=0,
            vmax=highest,
            cmap="viridis",
            extent=(0.5, len(frames) + 0.5, len(groups) - 0.5, -0.5),
        )
        below[column].set_xlabel("frame")
        below[column].xaxis.get_major_locator().set_params(integer=True)
        _name_lines(below[column], [group.name for group in groups] if column == 0 else [""] * len(groups))
    top[0].set_ylabel("all clips")
    if image is not None:
        _add_colours(figure, image, list(below), "part of the clip's")
    return figure


def _confusion(summary: Summary) -> Figure:
    """How many clips of each class the model takes for each; colours are parts of a line."""
    names = sorted({pair.label for pair in summary.confusion} | {pair.prediction for pair in summary.confusion})
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for pair in summary.confusion:
        counts[place[pair.label], place[pair.prediction]] += pair.clips
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.0 + _height(len(names))
    figure = _figure(size + 1.6, size)
    axes = figure.subplots()
    image = axes.imshow(parts, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= _MOST_NUMBERED:
        for row, column in np.argwhere(counts):
            colour = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    _name_lines(axes, names)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=_font_size(len(names)), parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    _add_colours(figure, image, [axes], "of the label's clips")
    return figure


def _height(lines: int) -> float:
    """Inches for so many classes."""
    return max(1.0, min(_LINE * lines, _TALLEST))


def _font_size(lines: int) -> float:
    return min(8.0, 60 * _height(lines) / max(lines, 1))


def _name_lines(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=_font_size(len(names)), parse_math=False)


def _add_colours(figure: Figure, image: AxesImage, axes: list[Axes], text: str) -> None:
    bar = figure.colorbar(
        image, ax=axes, pad=0.01, fraction=0.05, aspect=25, format=lambda part, _: f"{100 * part:g} %"
    )
    bar.set_label(text, fontsize=9)


def _label(group: Group) -> str:
    return f"{group.name} ({group.clips})"
