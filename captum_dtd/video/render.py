"""Pictures of relevance: side-by-side overlay frames, their video, and a contact sheet.

Every picture of one clip shares one colour scale, so that the maps can be compared: red speaks for the class, blue
against it, and full colour is the scale.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from captum_dtd.video.decode import require_av

__all__ = ["overlay_frames", "shared_scale", "write_contact_sheet", "write_overlay", "write_video"]

Frames = NDArray[np.uint8]
Map = NDArray[np.floating[Any]]

_RED = np.array([255.0, 32.0, 24.0], dtype=np.float32)
_BLUE = np.array([64.0, 128.0, 255.0], dtype=np.float32)
_STRONGEST = 0.85  # opacity of full colour: the frame stays visible below
_SLOW_FPS = 8.0  # slow enough for the eye: a clip of 16 frames lasts two seconds
# Pixels, of either side: below, text is illegible; beyond, players give up.
_SMALLEST_PANEL, _WIDEST_PICTURE = 160, 4096


def shared_scale(maps: Iterable[Map], percentile: float = 99.5) -> float:
    """The |relevance| that gets full colour: a percentile over the values that are not zero of all maps together.

    Half of the pixels of a relevance map are often exactly zero, hence their exclusion. 1.0 where all are zero.

    Raises:
        ValueError: ``percentile`` is not in (0, 100].

    Example:
        >>> shared_scale([np.array([0.0, 0.0, -2.0]), np.array([1.0, 0.0, 0.0])], percentile=100)
        2.0
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, not {percentile:g}")
    values = np.abs(np.concatenate([np.ravel(values) for values in maps]))
    values = values[values > 0]
    return float(np.percentile(values, percentile)) if values.size else 1.0


def overlay_frames(frames: Frames, maps: Mapping[str, Map], scale: float, caption: Sequence[str]) -> Frames:
    """Draw the clip and its maps side by side, one picture per frame.

    Args:
        frames: the part of the source the model saw, uint8 (T, H, W, 3).
        maps: title to relevance (T, h, w), of any h and w: stretched over the frames.
        scale: relevance of full colour.
        caption: lines of text below, drawn as they are; the last one goes on with the frame's number, from 1 on.

    Returns:
        uint8 (T, height, width, 3), height and width even. A panel has the frames' size, times a whole number if that
        is under 160 pixels, so that its title can be read, and divided by one if the picture, or a panel's height, would
        pass 4096.

    Example:
        >>> from captum_dtd.video.synthetic import moving_figure
        >>> frames = moving_figure(frames=2, size=(160, 200)).numpy()
        >>> overlay_frames(frames, {"total": np.zeros((2, 40, 50))}, scale=1.0, caption=["jack"]).shape
        (2, 214, 404, 3)
    """
    height, width = _panel_size(frames.shape[1], frames.shape[2], 1 + len(maps))
    size = max(12, min(width // 11, 40))
    gap, line = 4, round(1.5 * size)
    total_width = (1 + len(maps)) * (width + gap) - gap
    title_font = _font(max(maps, key=len, default="clip"), size, width)
    longest = max(_page(caption, len(frames), len(frames)), key=len, default="")
    caption_font = _font(longest, round(0.8 * size), total_width - 4 * gap)
    total_height = line + height + len(caption) * round(1.25 * size) + gap
    pictures = []
    for number, frame in enumerate(frames):
        clip = Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (total_width + total_width % 2, total_height + total_height % 2), (16, 16, 16))
        draw = ImageDraw.Draw(canvas)
        grey = 0.45 * np.asarray(clip.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2)
        panels = {"clip": clip}
        for title, values in maps.items():
            panels[title] = Image.fromarray(_blend(grey, values[number], scale))
        for column, (title, panel) in enumerate(panels.items()):
            left = column * (width + gap)
            draw.text((left + width // 2, line // 2), title, fill=(240, 240, 240), font=title_font, anchor="mm")
            canvas.paste(panel, (left, line))
        for row, text in enumerate(_page(caption, number + 1, len(frames))):
            place = (gap * 2, line + height + gap + row * round(1.25 * size))
            draw.text(place, text, fill=(225, 225, 225), font=caption_font)
        pictures.append(np.asarray(canvas))
    return np.stack(pictures)


def write_overlay(
    path: str | os.PathLike[str],
    frames: Frames,
    maps: Mapping[str, Map],
    *,
    scale: float,
    headline: str,
    share: float,
    fps: float,
) -> None:
    """Write an MP4 of a clip beside its total, spatial and temporal relevance, with a caption.

    Args:
        path: the MP4.
        frames: the part of the source the model saw, uint8 (T, H, W, 3).
        maps: "total", "spatial" and "temporal" relevance (T, h, w).
        scale: relevance of full colour.
        headline: the caption's first line.
        share: temporal part of |relevance|, 0 to 1, for the second line.
        fps: the clip's frames per second; it is shown at 8 at most.
    """
    titles = {"total": "total", "spatial": "spatial (looks)", "temporal": "temporal (moves)"}
    panels = {title: maps[name] for name, title in titles.items()}
    legend = f"temporal {share:.0%}   red: for the class, blue: against"
    write_video(path, overlay_frames(frames, panels, scale, (headline, legend)), min(fps, _SLOW_FPS))


def write_video(path: str | os.PathLike[str], pictures: Frames, fps: float) -> str:
    """Write uint8 (T, H, W, 3), H and W even, as an MP4 that every player shows; returns the encoder's name.

    H.264 (libx264), or MPEG-4 part 2 with a UserWarning where this build of FFmpeg lacks it.

    Raises:
        ImportError: PyAV is not installed.
    """
    av = require_av()
    encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    if encoder == "mpeg4":
        warnings.warn("no libx264 in this PyAV: the video is MPEG-4 part 2, which browsers do not play", stacklevel=2)
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "medium"} if encoder == "libx264" else {"qmin": "2", "qmax": "3"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return encoder


def write_contact_sheet(
    path: str | os.PathLike[str], frames: Frames, maps: Mapping[str, Map], scale: float, title: str, columns: int = 8
) -> None:
    """Write a PNG in the style of the DTD papers: the frames above, a row per map below.

    Args:
        path: the PNG.
        frames: uint8 (T, H, W, 3), the part of the source the model saw.
        maps: row label to relevance (T, h, w), drawn in ``seismic``, divided by ``scale``, limits (-1, 1).
        scale: relevance of full colour.
        title: above the picture.
        columns: how many frames, evenly spread over the clip.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    cell = 1.5
    height = cell * frames.shape[1] / frames.shape[2]
    rows = 1 + len(maps)
    figure = Figure(figsize=(cell * len(chosen) + 1.7, rows * height + 0.75), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)  # names of classes may hold dollar signs
    axes = figure.subplots(rows, len(chosen), squeeze=False)
    image = None
    for column, index in enumerate(chosen):
        axes[0, column].imshow(frames[index], aspect="auto")
        axes[0, column].set_title(f"frame {index + 1}", fontsize=8)
        for row, values in enumerate(maps.values(), start=1):
            image = axes[row, column].imshow(values[index] / scale, cmap="seismic", vmin=-1, vmax=1, aspect="auto")
    for row, label in enumerate(("frame", *maps)):
        axes[row, 0].set_ylabel(label, fontsize=10, parse_math=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if image is not None:
        bar = figure.colorbar(image, ax=axes, pad=0.01, shrink=0.6, aspect=30, ticks=[-1, 0, 1])
        bar.set_label(f"relevance / {scale:.3g}", fontsize=9)
    figure.savefig(os.fspath(path), format="png")


def _page(caption: Sequence[str], number: int, count: int) -> list[str]:
    return [*caption[:-1], *(f"{line}   frame {number} of {count}" for line in caption[-1:])]


def _blend(grey: NDArray[np.float32], values: Map, scale: float) -> Frames:
    """Red and blue over the grey frame (H, W, 3), as opaque as the relevance is strong."""
    height, width = grey.shape[:2]
    small = Image.fromarray(np.asarray(values, dtype=np.float32) / np.float32(scale))
    strength = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)).clip(-1, 1)[..., None]
    colour = np.where(strength > 0, _RED, _BLUE)
    opacity = _STRONGEST * np.abs(strength)
    picture: Frames = np.rint(grey * (1 - opacity) + colour * opacity).astype(np.uint8)
    return picture


def _font(text: str, size: int, width: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font at this size, or smaller where the text would pass the width."""
    size = max(12, size)
    length = ImageFont.load_default(size).getlength(text)
    return ImageFont.load_default(size if length <= width else max(8, int(size * width / length)))


def _panel_size(height: int, width: int, panels: int) -> tuple[int, int]:
    up = max(1, -(-_SMALLEST_PANEL // min(height, width)))
    down = max(1, -(-max(panels * width, height) * up // _WIDEST_PICTURE))
    return max(1, height * up // down), max(1, width * up // down)
