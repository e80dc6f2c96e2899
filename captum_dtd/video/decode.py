"""Video files in: frames with their times, decoded by PyAV (the ``video`` extra).

Only what is asked for is converted and kept, so a clip out of a long film costs a clip's memory.
"""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = [
    "Video",
    "VideoError",
    "VideoInfo",
    "WindowReader",
    "frame_at",
    "frame_times",
    "iter_frames",
    "probe",
    "read_video",
    "read_window_at",
    "read_windows",
    "shown_at",
]

Frames = NDArray[np.uint8]

# Below this start a video is decoded from its beginning, which is exact in every container; above it the nearest key
# frame is looked up first.
_SEEK_FROM_SECONDS = 10.0

# A frame counts as shown this much before its time, of the time since the one before it, and at most so many seconds:
# 1.0 means the frame at 1.0004, as files round times.
_EARLY, EARLY_SECONDS = 0.1, 0.01

# No frame takes less of a file: AVI's have a header of so many bytes, MP4's places in its tables.
_LEAST_BYTES = 8


class VideoError(ValueError):
    """A video that cannot be read, or not as asked; the message is one sentence that names the file."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video stream without decoding it.

    Attributes:
        duration: seconds, or None where the file does not say. A damaged file may be shorter.
        fps: average frames per second.
        width, height: stored size in pixels, before any rotation.
    """

    duration: float | None
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class Video:
    """Decoded frames.

    Attributes:
        frames: uint8, (T, H, W, 3), RGB, upright.
        times: float64, (T,), the time of each frame in seconds after the file's first.
        fps: average frames per second of the file.
        path: where they come from.
        last: seconds that the last of them is shown, None for a frame at ``fps``, which PyAV 14 takes for all.
    """

    frames: Frames
    times: NDArray[np.float64]
    fps: float
    path: str
    last: float | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def end(self) -> float:
        """Seconds at which the last of these frames has been shown."""
        return float(self.times[-1]) + (1.0 / self.fps if self.last is None else self.last)

    def shows(self, start: float) -> bool:
        """Whether the first of these frames is shown at ``start`` seconds, as far as times are rounded; see :func:`shown_at`."""
        following = self.end if len(self) == 1 else self.times[1]
        return bool(self.times[0] - EARLY_SECONDS <= start <= following)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's duration, frame rate and size without decoding it.

    Raises:
        VideoError: the file is missing, or no video that can be read.
        ImportError: PyAV is not installed.

    Example::

        probe("hammer.avi")                                    # VideoInfo(duration=4.4, fps=25.0, width=320, height=240)
    """
    container, stream = _open(path)
    with container:
        return VideoInfo(_duration(container, stream), _fps(stream), stream.width, stream.height)


def iter_frames(path: str | os.PathLike[str], start: float = 0.0) -> Generator[tuple[float, Frames], None, None]:
    """Yield (seconds, frame as uint8 (H, W, 3)) one at a time, from the frame shown at ``start`` seconds on.

    Frames are RGB, turned and mirrored where the file says so (phones), and transparent pixels (GIF) are laid on
    white. Where the decoder finds the data damaged, the frames that it gives are yielded and a UserWarning says so.
    Where times begin anew, as in files that were joined, they go on here.

    Raises:
        VideoError: the file is missing, is no video, has no frame that can be decoded, or ends before ``start``.
        ImportError: PyAV is not installed.

    Example::

        for seconds, frame in iter_frames("hammer.avi", start=2.0):
            ...
    """
    for shown, image in _images(path, start):
        yield shown.time, image


def read_video(
    path: str | os.PathLike[str], start: float = 0.0, stop: float | None = None, *, max_frames: int | None = None
) -> Video:
    """Decode a video, or a part of it.

    Args:
        path: an avi, mp4, mkv, webm, mov or gif file, or whatever else FFmpeg reads.
        start: seconds; the first frame is the one shown then, where a time that was rounded finds its frame: 1.0 the one
            at 1.0004.
        stop: seconds; frames from here on are not read. None reads to the end.
        max_frames: read at most so many frames.

    Returns:
        The frames as uint8 (T, H, W, 3), T >= 1, with their times. See :func:`iter_frames` for colours and rotation.

    Raises:
        VideoError: as :func:`iter_frames`; also an empty range.
        ImportError: PyAV is not installed.

    Example::

        video = read_video("hammer.avi", start=1.5, max_frames=16)
        video.frames.shape                                     # (16, 240, 320, 3)
    """
    if max_frames is not None and max_frames < 1:
        raise VideoError(f"max_frames must be at least 1, not {max_frames}, for {os.fspath(path)}")
    if stop is not None and not stop > start:
        raise VideoError(f"stop ({stop:g} s) must come after start ({start:g} s) for {os.fspath(path)}")
    found: list[tuple[_Shown, Frames]] = []
    stream = _images(path, start)
    for shown, image in stream:
        if found and stop is not None and shown.time >= stop:
            break
        found.append((shown, image))
        if len(found) == max_frames:
            break
    stream.close()
    return _video(found, path)


def frame_times(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """When each frame of a video is shown, without decoding any: a few milliseconds for a short video.

    Returns:
        float64 (frames,), seconds after the first frame. Frames that the file's header promises and the file lacks, as
        where it was cut short, are counted too, at the average frame rate.

    Raises:
        VideoError: the file is missing, is no video, or has no frames.
        ImportError: PyAV is not installed.

    Example::

        len(frame_times("hammer.avi"))                         # 187
    """
    return _times(path)[0]


def frame_at(path: str | os.PathLike[str], start: float) -> int:
    """Which frame of a video is shown at ``start`` seconds, by its index; without decoding any.

    Raises:
        VideoError: as :func:`frame_times`; also a start that is no time of the video.
        ImportError: PyAV is not installed.

    Example::

        frame_at("hammer.avi", 1.5)                            # 37
    """
    times, end = _times(path)
    _check_start(path, start, end)
    return shown_at(times, start)


def shown_at(times: NDArray[np.float64], start: float) -> int:
    """Which of the frames at these times is shown at ``start``: the last one that has begun by then.

    Files round their frames' times, and so do people: a frame has begun a tenth of the time since the one before it,
    but no more than 0.01 s, before its time. 0 where none has begun.
    """
    early = np.minimum(_EARLY * np.diff(times), EARLY_SECONDS)
    return int(np.searchsorted(times[1:] - early, start, side="right"))


def read_windows(path: str | os.PathLike[str], starts: Sequence[int], length: int) -> list[Video | VideoError]:
    """Decode runs of consecutive frames, which may overlap, in one pass and on one thread.

    Frames are counted from the beginning of the video, which is exact in every container, and only those asked for are
    converted to RGB.

    Args:
        path: as for :func:`read_video`.
        starts: index of each window's first frame, from 0 on, in any order.
        length: frames of a window.

    Returns:
        For each start its frames, fewer than ``length`` where the video ends; or, where it ends before the start, the
        error that says so.

    Raises:
        VideoError: the file is missing, is no video, or has no frame that can be decoded.
        ImportError: PyAV is not installed.

    Example::

        first, second = read_windows("hammer.avi", [0, 8], length=16)
        first.frames.shape                                     # (16, 240, 320, 3)
    """
    with WindowReader(path) as reader:
        return reader.read(starts, length)


def read_window_at(path: str | os.PathLike[str], start: float, length: int) -> Video:
    """Decode a run of consecutive frames that begins with the one shown at a time, in one pass and on one thread.

    Args:
        path: as for :func:`read_video`.
        start: seconds.
        length: frames.

    Returns:
        The frames, fewer than ``length`` where the video ends.

    Raises:
        VideoError: as :func:`read_video`.
        ImportError: PyAV is not installed.

    Example::

        read_window_at("hammer.avi", 1.5, length=16).frames.shape        # (16, 240, 320, 3)
    """
    stream = _images(path, start, threads=1, seeks=False)
    found = list(islice(stream, length))
    stream.close()
    return _video(found, path)


class WindowReader:
    """Reads windows of one video, time after time, and goes on where the last ones ended: a long video is decoded once.

    Args:
        path: as for :func:`read_video`.

    Use it as a context; at its end the file is closed.

    Example::

        with WindowReader("film.mp4") as reader:
            (first,) = reader.read([0], length=16)
            (second,) = reader.read([16], length=16)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._stream: Generator[_Shown, None, None] | None = None
        self._progress = _Progress()
        self._size: tuple[int, int] | None = None
        self._kept: dict[int, tuple[_Shown, Frames]] = {}  # the last ones, which the next windows may overlap
        self._file = _identity(path)

    def __enter__(self) -> WindowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reads(self, path: str | os.PathLike[str]) -> bool:
        """Whether it reads this file, as it is now."""
        return os.fspath(path) == os.fspath(self._path) and _identity(path) == self._file

    def read(self, starts: Sequence[int], length: int) -> list[Video | VideoError]:
        """As :func:`read_windows`, which also says what is raised."""
        wanted = {index for start in starts for index in range(start, start + length)}
        found = {index: self._kept[index] for index in wanted & self._kept.keys()}
        last = max(wanted, default=-1)
        if self._stream is None or min(wanted - found.keys(), default=last + 1) < self._progress.count:
            self._begin()
        try:
            self._read_to(last, wanted, found)
        except BaseException:
            self.close()
            raise
        count = self._progress.count
        if not count:
            raise VideoError(f"{os.fspath(self._path)} has no frame that can be decoded")
        self._kept = {index: frame for index, frame in found.items() if index >= count - length}
        windows: list[Video | VideoError] = []
        for start in starts:
            window = [found[index] for index in range(start, start + length) if index in found]
            if window:
                windows.append(_video(window, self._path))
            else:
                windows.append(VideoError(f"{os.fspath(self._path)} ends after {count} frames, before frame {start}"))
        return windows

    def close(self) -> None:
        """Close the file; what is read next begins anew."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._kept = {}

    def _begin(self) -> None:
        self.close()
        self._progress = _Progress(is_told=True)
        self._stream = _decode(self._path, None, threads=1, progress=self._progress)

    def _read_to(self, last: int, wanted: set[int], found: dict[int, tuple[_Shown, Frames]]) -> None:
        assert self._stream is not None
        while self._progress.count <= last:
            index = self._progress.count
            shown = next(self._stream, None)
            if shown is None:  # it has said what is the matter, if anything
                self._stream = None
                return
            self._size = self._size or (shown.frame.width, shown.frame.height)
            if index in wanted:
                found[index] = (shown, _rgb(shown.frame, self._size))
        self._progress.tell(self._path)


@dataclass
class _Progress:
    """How far a file is decoded.

    Attributes:
        count: frames so far.
        damaged: places so far at which something could not be decoded.
        is_told: whether whoever decodes it tells of damage by himself.
    """

    count: int = 0
    damaged: int = 0
    is_told: bool = False

    def tell(self, path: str | os.PathLike[str]) -> None:
        if self.damaged:
            _warn(
                f"{os.fspath(path)} is damaged within its first {self.count} frames: some of them could not be decoded"
            )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def require_av() -> Any:
    """The ``av`` module.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing video needs PyAV: pip install 'captum_dtd[video]'") from error
    return av


def _times(path: str | os.PathLike[str]) -> tuple[NDArray[np.float64], float]:
    """What :func:`frame_times` says, and when the last frame has been shown."""
    av = require_av()
    container, stream = _open(path)
    with container:
        fps, promised, is_avi = _fps(stream), _promised(container, stream), container.format.name == "avi"
        stamps: list[float | None] = []
        lasts: list[float] = []
        fillers = 0
        clock = _Clock(fps)
        try:
            for packet in _packets(container, stream):
                if packet.is_discard:
                    promised -= 1
                elif packet.size:
                    turn = (
                        None if packet.dts is None or packet.time_base is None else float(packet.dts * packet.time_base)
                    )
                    stamps.append(clock.going_on(_stamp(packet, is_avi), turn))
                    lasts.append(_lasts(packet, fps))
                    fillers += is_avi and packet.size == 1
        except (av.error.FFmpegError, OSError):
            pass  # what is missing is counted by the header's promise
        if is_avi:
            promised -= _dropped(stamps, fps) + fillers
            # DivX writes a byte where it has no frame yet, as the next packet holds two: frames are shown a place earlier.
            stamps = stamps[: len(stamps) - fillers]
        count = max(len(stamps), promised)
        if not count:
            raise VideoError(f"{os.fspath(path)} has no frames")
        times = np.arange(count) / fps
        last = 1.0 / fps
        if stamps and None not in stamps:
            # packets are in the order of decoding
            order = np.argsort(np.array(stamps, dtype=np.float64))
            shown = np.array(stamps, dtype=np.float64)[order]
            times[: len(shown)] = shown - shown[0]
            times[len(shown) :] += times[len(shown) - 1] - (len(shown) - 1) / fps
            if count == len(shown):
                last = lasts[order[-1]]
        return times, float(times[-1]) + last


def _check_start(path: str | os.PathLike[str], start: float, end: float = math.inf) -> None:
    if not (math.isfinite(start) and start >= 0):
        raise VideoError(f"start must be a time in seconds from 0 on, not {start}, for {os.fspath(path)}")
    if start > end:
        raise VideoError(f"start {start:g} s is beyond the end of {os.fspath(path)}, which is {end:.2f} s long")


def _open(path: str | os.PathLike[str]) -> tuple[InputContainer, VideoStream]:
    name = os.fspath(path)
    if not name:
        raise VideoError("no video is named: its path is empty")
    try:
        status = Path(name).stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VideoError(f"cannot open the video {name}: {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{name} is a directory, not a video")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name} is not a regular file")
    if status.st_size == 0:
        raise VideoError(f"{name} is empty (0 bytes)")
    av = require_av()
    try:
        # Metadata that is not UTF-8 is common in old AVI files and says nothing about the picture; PyAV 19 ignores it.
        options = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        container: InputContainer = av.open(name, **options)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{name} is not a video that can be read ({reason})") from error
    if container.format.name == "tty":  # FFmpeg draws text files as terminal screens
        container.close()
        raise VideoError(f"{name} is a text file, not a video")
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        container.close()
        raise VideoError(f"{name} has no video stream")
    if streams[0].codec_context is None:
        container.close()
        raise VideoError(f"{name} is encoded in a way that this FFmpeg cannot decode")
    return container, streams[0]


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet[Any]]:
    """A stream's packets, and an empty one at the end, which gives the decoder's last frames."""
    packet: av.Packet[Any] | None = None
    try:
        for packet in container.demux(stream):
            yield packet
    except IndexError:  # PyAV's, of streams that turned up on the way, once it has given all packets
        if packet is None or packet.size:
            packet = require_av().Packet()
            packet.stream = stream
            yield packet


class _Clock:
    """Times that go on where a file's begin anew, as in files that were joined."""

    _LEAST = 1.0  # seconds that times fall back then, or jump
    _ASTRAY = 16  # frames of which damage may have made the times too late

    def __init__(self, fps: float) -> None:
        self._frame = 1.0 / fps
        self._offset = 0.0
        self._latest = self._turn = -math.inf
        self._before_jump = math.inf, -math.inf  # the turn and the latest time then
        self._since_jump = 0

    def going_on(self, time: float | None, turn: float | None) -> float | None:
        """When a frame is shown, by when the file says so and by its turn, which grows until times begin anew."""
        if time is None:
            return None
        if turn is not None:
            self._since_jump += 1
            if turn > self._turn + self._LEAST:
                self._before_jump, self._since_jump = (self._turn, self._latest), 0
            elif turn < self._turn - self._LEAST:
                before, latest = self._before_jump
                if turn >= before and self._since_jump <= self._ASTRAY:
                    self._latest = latest  # only some frames' times were wrong
                else:
                    self._offset = self._latest + self._frame - time
            self._turn = turn
        self._latest = max(self._latest, time + self._offset)
        return time + self._offset


def _is_cover(stream: VideoStream) -> bool:
    """Whether it is the picture that a song or a film comes with, which is no video."""
    disposition = getattr(stream, "disposition", None)  # not in PyAV 14.0
    return disposition is not None and bool(disposition & type(disposition).attached_pic)


def _origin(stream: VideoStream) -> float:
    """Seconds that the file's clock shows at the first frame."""
    return float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None:
        return None
    # Matroska tells the end, on the file's clock
    late = _origin(stream) if "matroska" in container.format.name else 0.0
    return max(0.0, container.duration / 1e6 - late)


def _length(container: InputContainer, stream: VideoStream) -> float:
    """How long the frames of a file should last that does not count them, such as Matroska; 0 if it does not say."""
    if stream.duration is not None:
        return 0.0
    told = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if told is not None:
        hours, minutes, seconds = map(float, told.groups())
        return max(0.0, 3600 * hours + 60 * minutes + seconds - _origin(stream))
    # Sound may go on longer than the picture.
    return (_duration(container, stream) or 0.0) if len(container.streams) == 1 else 0.0


def _fps(stream: VideoStream) -> float:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate:
            return float(rate)
    return 25.0


def _lasts(what: av.Packet[Any] | av.VideoFrame, fps: float) -> float:
    """How many seconds a frame, or a packet's, is shown."""
    ticks = getattr(what, "duration", None)  # frames have none in PyAV 14
    return float(ticks * what.time_base) if ticks and what.time_base else 1.0 / fps


def _seeks(container: InputContainer, stream: VideoStream) -> bool:
    """Whether the frames that follow a seek can be told by their times.

    MPEG program streams have no index and few times; AVI has places instead of times, which B-frames leave.
    """
    return container.format.name != "mpeg" and not (
        container.format.name == "avi" and stream.codec_context.has_b_frames
    )


def _promised(container: InputContainer, stream: VideoStream) -> int:
    """How many frames a file should hold, 0 if it does not say.

    A trimmed MP4 counts those too that its edit list leaves out; FFmpeg's index of it has none of them, or discards them.
    """
    if stream.frames > container.size // _LEAST_BYTES:
        return 0  # damage, or what FFmpeg writes to an AVI that it cannot go back in
    index = getattr(stream, "index_entries", None)  # not in PyAV 14
    return min(stream.frames, len(index)) if index and "mp4" in container.format.name else stream.frames


def _stamp(packet: av.Packet[Any], is_avi: bool) -> float | None:
    """When a packet's frame is shown, in seconds.

    AVI stores no times of presentation, and what is guessed for it jumps back and forth at B-frames: there it is when the
    packet's turn is, which among frames in the order of showing belongs to the one of the same number.
    """
    ticks, unit = packet.dts if is_avi else packet.pts, packet.time_base
    return None if ticks is None or unit is None else float(ticks * unit)


def _dropped(stamps: Sequence[float | None], fps: float) -> int:
    """How many frames an AVI file's header counts that were dropped in recording: the one before stays in their place."""
    if not stamps or stamps[0] is None or stamps[-1] is None:
        return 0
    return max(0, round((stamps[-1] - stamps[0]) * fps) + 1 - len(stamps))


class _Shown(NamedTuple):
    """A decoded frame, when it is shown in seconds after the file's first, for how long, and the file's frames per second."""

    time: float
    frame: av.VideoFrame
    lasts: float
    fps: float


def _video(found: Sequence[tuple[_Shown, Frames]], path: str | os.PathLike[str]) -> Video:
    last = found[-1][0]
    times = np.array([shown.time for shown, _ in found])
    return Video(np.stack([image for _, image in found]), times, last.fps, os.fspath(path), last.lasts)


def _images(
    path: str | os.PathLike[str], start: float, threads: int = 0, seeks: bool = True
) -> Generator[tuple[_Shown, Frames], None, None]:
    """What :func:`iter_frames` yields, with all that is known of each frame."""
    size: tuple[int, int] | None = None
    for shown in _from(path, start, threads, seeks):
        image = _rgb(shown.frame, size)
        size = size or (shown.frame.width, shown.frame.height)
        yield shown, image


def _from(
    path: str | os.PathLike[str], start: float, threads: int = 0, seeks: bool = True
) -> Generator[_Shown, None, None]:
    """The frame that is shown at ``start`` and those that follow; see :func:`shown_at`."""
    _check_start(path, start)
    for seek in (start, None) if seeks and start > _SEEK_FROM_SECONDS else (None,):
        before: _Shown | None = None
        begun = False
        for shown in _decode(path, seek, threads):
            if not begun and shown.time < start:
                before = shown  # whether it is still shown then is for the next one to say
                continue
            if not begun and before is None and seek is not None and shown.time > start:
                break  # the seek overshot (no index in the file): decode from the beginning instead
            if not begun and before is not None and not shown_at(np.array([before.time, shown.time]), start):
                yield before
            begun = True
            yield shown
        if begun:
            return
        end = 0.0 if before is None else before.time + before.lasts
        if before is not None and start <= end:
            yield before
            return
    if before is None:
        raise VideoError(f"{os.fspath(path)} has no frame that can be decoded")
    _check_start(path, start, end)


def _decode(
    path: str | os.PathLike[str], seek: float | None, threads: int = 0, progress: _Progress | None = None
) -> Generator[_Shown, None, None]:
    """Frames from the key frame before ``seek`` on, or all where a seek is not exact; 0 threads is one per core."""
    av = require_av()
    name = os.fspath(path)
    progress = progress or _Progress()
    discarded = 0
    end = 0.0
    container, stream = _open(path)
    with container:
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        fps, is_avi = _fps(stream), container.format.name == "avi"
        origin = _origin(stream)
        first: float | None = None
        clock = _Clock(fps)
        stamps: list[float | None] = []  # of AVI's packets, in whose order frames are shown
        seek = seek if _seeks(container, stream) else None
        if seek is not None:
            try:
                container.seek(int((seek + origin) * 1_000_000))
            except (av.error.FFmpegError, OverflowError):
                return
        packets = _packets(container, stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.error.FFmpegError, OSError):
                progress.damaged += 1
                break
            progress.damaged += packet.is_corrupt
            discarded += packet.is_discard
            if is_avi and packet.size:
                stamps.append(_stamp(packet, is_avi))
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                progress.damaged += 1
                del stamps[-1:]
                continue
            for frame in frames:
                progress.damaged += frame.is_corrupt
                told = stamps[progress.count] if progress.count < len(stamps) else frame.time
                shown_at = clock.going_on(told, told)
                if shown_at is None and first is None and seek is not None:
                    return  # without a time stamp the place in the file is unknown
                if first is None:
                    origin = origin if seek is not None or shown_at is None else shown_at
                    first = 0.0 if shown_at is None else shown_at - origin
                time = first + progress.count / fps if shown_at is None else shown_at - origin
                progress.count += 1
                lasts = _lasts(frame, fps)
                end = max(end, time + lasts)
                try:
                    yield _Shown(time, frame, lasts, fps)
                except GeneratorExit:  # nobody wants the rest
                    if not progress.is_told:
                        progress.tell(path)
                    raise
        promised = _promised(container, stream) - discarded - (_dropped(stamps, fps) if is_avi else 0)
        length = 0.0 if promised or (seek is not None and not progress.count) else _length(container, stream)
    if progress.damaged or (seek is None and progress.count < 0.9 * promised) or end < 0.9 * length:
        of = f" of {promised}" if promised else ""
        _warn(f"{name} is damaged or cut short: {progress.count}{of} frames could be decoded")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _rgb(frame: av.VideoFrame, size: tuple[int, int] | None) -> Frames:
    """Upright uint8 (H, W, 3); ``size`` (width, height) is that of the first frame, as streams may change theirs."""
    width, height = size or (frame.width, frame.height)
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", width=width, height=height).astype(np.float32)
        alpha = rgba[..., 3:] / 255.0
        image: Frames = np.rint(rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)
    else:
        image = np.asarray(frame.to_ndarray(format="rgb24", width=width, height=height), dtype=np.uint8)
    return _upright(image, frame)


def _upright(image: Frames, frame: av.VideoFrame) -> Frames:
    """Turned and mirrored by quarters as the file's display matrix says: phones, cameras that face their owner."""
    side_data: Any = frame.side_data
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # to the right goes a times the way right plus c times the way down; down goes b times right plus d times down
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    right, down = a, d
    if abs(b) > abs(a):
        image, right, down = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])
