"""From a video's frames to a model's clip."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captum_dtd.video.decode import EARLY_SECONDS, Video, VideoError, shown_at

__all__ = ["Clip", "iter_clips", "sample_clip"]


class Clip(NamedTuple):
    """A clip cut out of a video.

    Attributes:
        frames: uint8, (frames, H, W, 3).
        indices: int64, (frames,), which of the video's frames they are.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]

    @property
    def looped(self) -> bool:
        """Whether the video was too short and its frames come round again."""
        return bool((np.diff(self.indices) <= 0).any())


def sample_clip(
    video: Video, frames: int, stride: int = 1, start: float | None = None, *, frame: int | None = None
) -> Clip:
    """Cut one clip of ``frames`` frames, every ``stride``-th, out of a video.

    Args:
        video: what :func:`captum_dtd.video.read_video` returned.
        frames: length of the clip.
        stride: 1 takes every frame, 2 every other. Frames are counted, also where the frame rate varies.
        start: seconds in the file; the clip begins with the frame that is shown then.
        frame: the index of the first frame, instead of ``start``. With neither the clip is centred in the video, which
            avoids the titles and fades at its ends.

    Returns:
        The frames and their indices. Where fewer frames are left than the clip needs, those from its first on are
        looped, and a UserWarning says so.

    Raises:
        VideoError: the start lies beyond the end of the video.
        ValueError: ``frames`` or ``stride`` is below 1, or both ``start`` and ``frame`` are given.

    Example::

        clip = sample_clip(read_video("hammer.avi"), frames=16, stride=2)
        clip.frames.shape, clip.indices, clip.looped
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"a clip needs frames >= 1 and stride >= 1, not frames={frames}, stride={stride}")
    if start is not None and frame is not None:
        raise ValueError("give either start (seconds) or frame (an index), not both")
    span = (frames - 1) * stride + 1
    if start is not None:
        if not video.times[0] - EARLY_SECONDS <= start <= video.end:
            raise VideoError(
                f"start {start:g} s is outside {video.path}, which runs from {video.times[0]:.2f} to {video.end:.2f} s"
            )
        first = shown_at(video.times, start)
    elif frame is not None:
        if not 0 <= frame < len(video):
            raise VideoError(f"frame {frame} is outside {video.path}, which has frames 0 to {len(video) - 1}")
        first = frame
    else:
        first = max(0, (len(video) - span) // 2)
    left = len(video) - first
    if left < span:
        warnings.warn(
            f"{video.path} has {left} frames from {video.times[first]:.2f} s on where a clip spans {span} "
            f"({frames} frames, stride {stride}): they are repeated in a loop",
            UserWarning,
            stacklevel=2,
        )
    indices = first + np.arange(frames, dtype=np.int64) * stride % left
    return Clip(video.frames[indices], indices)


def iter_clips(frames: Iterable[NDArray[np.uint8]], length: int, stride: int = 1) -> Iterator[NDArray[np.uint8]]:
    """Cut a stream of frames into clips that follow each other without overlap, holding one clip at a time.

    Args:
        frames: uint8 (H, W, 3) each; a :class:`~captum_dtd.video.Video`'s ``frames`` or any iterator.
        length: frames of a clip.
        stride: every ``stride``-th frame is taken; a clip covers ``length * stride`` frames.

    Yields:
        uint8 (length, H, W, 3). What is left over at the end is dropped; a video in which not even one clip begins and
        ends is looped to one, as :func:`sample_clip` does.

    Raises:
        ValueError: ``length`` or ``stride`` is below 1.

    Example:
        >>> from captum_dtd.video.synthetic import moving_figure
        >>> [clip.shape for clip in iter_clips(moving_figure("walk", frames=40).numpy(), 16)]
        [(16, 144, 180, 3), (16, 144, 180, 3)]
    """
    if length < 1 or stride < 1:
        raise ValueError(f"a clip needs length >= 1 and stride >= 1, not length={length}, stride={stride}")
    clip: list[NDArray[np.uint8]] = []
    short: list[NDArray[np.uint8]] = []  # the whole video, as long as it may be shorter than a clip
    complete = False
    for index, frame in enumerate(frames):
        if not complete:
            short.append(frame)
        if index % stride == 0:
            clip.append(frame)
        if len(clip) == length:
            yield np.stack(clip)
            complete = True
            clip, short = [], []
    if short:
        yield np.stack([short[i * stride % len(short)] for i in range(length)])
