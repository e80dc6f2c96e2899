"""Video in and out: decoding, clip sampling, preprocessing, and pictures of relevance."""

from __future__ import annotations

from captum_dtd.video.decode import (
    Video,
    VideoError,
    VideoInfo,
    WindowReader,
    frame_at,
    frame_times,
    iter_frames,
    probe,
    read_video,
    read_window_at,
    read_windows,
)
from captum_dtd.video.preprocess import Preprocessing
from captum_dtd.video.render import (
    overlay_frames,
    shared_scale,
    write_contact_sheet,
    write_overlay,
    write_video,
)
from captum_dtd.video.sampling import Clip, iter_clips, sample_clip

__all__ = [
    "Clip",
    "Preprocessing",
    "Video",
    "VideoError",
    "VideoInfo",
    "WindowReader",
    "frame_at",
    "frame_times",
    "iter_clips",
    "iter_frames",
    "overlay_frames",
    "probe",
    "read_video",
    "read_window_at",
    "read_windows",
    "sample_clip",
    "shared_scale",
    "write_contact_sheet",
    "write_overlay",
    "write_video",
]
