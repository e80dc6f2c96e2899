"""Videos whose every frame can be told, written by PyAV itself."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def numbered(count: int, height: int = 48, width: int = 64) -> Frames:
    """Frames that tell their number by their brightness, with a red left and a blue right half at the bottom."""
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    for index in range(count):
        frames[index] = 20 + 200 * index // max(1, count - 1)
    frames[:, height // 2 :, : width // 2] = (220, 30, 30)
    frames[:, height // 2 :, width // 2 :] = (30, 30, 220)
    return frames


def encode(
    path: Path,
    frames: Frames,
    codec: str,
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    pts: list[int] | None = None,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames to a file; with pts (in hundredths of a second) at a variable frame rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "4"}
        elif codec == "mpeg4":
            stream.options = {"qmin": "2", "qmax": "2"}
        elif codec.startswith("libvpx"):
            stream.options = {"crf": "4", "b": "2M", "deadline": "realtime", "cpu-used": "8"}
        stream.options = {**stream.options, **(options or {})}
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
