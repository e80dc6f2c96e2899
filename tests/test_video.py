"""Videos in and out: what is decoded, sampled, fed to a model and drawn, checked against known pixels."""

from __future__ import annotations

import re
import struct
import warnings
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import captum_dtd.video.decode
from captum_dtd.video import (
    Preprocessing,
    Video,
    VideoError,
    WindowReader,
    frame_at,
    frame_times,
    iter_clips,
    iter_frames,
    overlay_frames,
    probe,
    read_video,
    read_windows,
    sample_clip,
    shared_scale,
    write_contact_sheet,
    write_video,
)

av = pytest.importorskip("av", reason="PyAV is not installed")

from videos import Frames, encode, numbered  # noqa: E402


def brightness(frames: Frames) -> NDArray[np.float64]:
    """Of the upper half, where the number is."""
    return frames[:, 4 : frames.shape[1] // 2 - 4].mean(axis=(1, 2, 3), dtype=np.float64)


CONTAINERS = [
    ("clip.avi", "mpeg4", "yuv420p"),
    ("clip.mp4", "libx264", "yuv420p"),
    ("clip.mkv", "libx264", "yuv420p"),
    ("ten_bit.mkv", "libx264", "yuv420p10le"),
    ("full_colour.mp4", "libx264", "yuv444p"),
    ("clip.webm", "libvpx", "yuv420p"),
    ("clip9.webm", "libvpx-vp9", "yuv420p"),
    ("lossless.mkv", "ffv1", "bgr0"),
    ("clip.gif", "gif", "rgb8"),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), CONTAINERS)
def test_every_container_gives_the_frames_that_went_in(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no file to read can be made: FFmpeg in this PyAV was built without the encoder {codec}")
    frames = numbered(12)
    video = read_video(encode(tmp_path / name, frames, codec, pix_fmt))
    tolerance = 12 if name.endswith("gif") else 6  # GIF: 256 colours, dithered
    assert video.frames.shape == frames.shape
    assert video.frames.dtype == np.uint8
    assert np.abs(brightness(video.frames) - brightness(frames)).max() < tolerance
    assert np.abs(video.frames[:, 28:44, 4:28].mean(axis=(1, 2)) - (220, 30, 30)).max() < tolerance
    assert np.abs(video.frames[:, 28:44, 36:60].mean(axis=(1, 2)) - (30, 30, 220)).max() < tolerance
    assert video.times == pytest.approx(np.arange(12) / 25, abs=2e-3)
    assert video.fps == pytest.approx(25, rel=0.01)


def test_grey_video_and_odd_sizes(tmp_path: Path) -> None:
    frames = np.repeat(numbered(4, 33, 47).mean(axis=3, keepdims=True), 3, axis=3).astype(np.uint8)
    video = read_video(encode(tmp_path / "grey.mkv", frames, "ffv1", "gray"))
    assert video.frames.shape == (4, 33, 47, 3)
    assert np.abs(video.frames.astype(int) - frames).max() <= 2


def test_variable_frame_rate_keeps_the_times(tmp_path: Path) -> None:
    pts = [0, 4, 8, 30, 34, 60]
    video = read_video(encode(tmp_path / "vfr.mkv", numbered(6), "libx264", pts=pts))
    assert video.times == pytest.approx(np.array(pts) / 100, abs=2e-3)
    clip = sample_clip(video, frames=2, start=0.31)
    assert clip.indices.tolist() == [3, 4]


def test_a_start_may_be_rounded(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(50), "libx264")
    for start, first in ((1.0, 1.0), (1.01, 1.0), (1.035, 1.0), (1.038, 1.04)):
        assert read_video(path, start=start, max_frames=1).times == pytest.approx([first], abs=1e-3)


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_start_finds_the_frame_that_is_shown_then(tmp_path: Path, name: str) -> None:
    """The fourth frame stands from 0.3 to 5.3 s."""
    pts = [0, 10, 20, 30, 530, 540, 550]
    path = encode(tmp_path / name, numbered(7), "libx264", pts=pts)
    whole = read_video(path)
    expected = {0: 0, 0.05: 0, 0.085: 0, 0.095: 1, 0.3: 3, 0.31: 3, 2.9: 3, 5.2: 3, 5.28: 3, 5.295: 4, 5.5: 6}
    for start, index in expected.items():
        video = read_video(path, start, max_frames=1)
        assert np.array_equal(video.frames[0], whole.frames[index]), start
        assert video.times == pytest.approx([pts[index] / 100], abs=2e-3)
        assert frame_at(path, start) == sample_clip(whole, 1, start=start).indices[0] == index
    for start, message in ((7.0, r"start 7 s is beyond the end"), (-1, "start"), (float("nan"), "start")):
        with pytest.raises(VideoError, match=message):
            frame_at(path, start)


@pytest.mark.skipif(not hasattr(av.VideoFrame, "duration"), reason="this PyAV does not tell how long a frame is shown")
def test_the_last_frame_of_a_gif_is_shown_as_long_as_the_file_says(tmp_path: Path) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in numbered(5))
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=others, duration=[100, 100, 3000, 100, 2000])
    video = read_video(path)
    assert video.end == pytest.approx(5.3)
    for start, index in ((0.5, 2), (1.9, 2), (4.5, 4), (5.2, 4)):
        assert read_video(path, start).times[0] == video.times[index]
        assert frame_at(path, start) == sample_clip(video, 1, start=start).indices[0] == index
    for ask in (lambda: read_video(path, 5.5), lambda: frame_at(path, 5.5)):
        with pytest.raises(VideoError, match=r"start 5\.5 s is beyond the end of .*, which is 5\.30 s long"):
            ask()


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 8, 16))
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(tmp_path / "a.gif", save_all=True, append_images=[other], duration=[100, 400], disposal=2)
    video = read_video(tmp_path / "a.gif")
    assert video.frames[0, 8, 2].tolist() == [200, 0, 0]
    assert video.frames[0, 8, 13].tolist() == [255, 255, 255]
    assert video.frames[1, 8, 2].tolist() == [255, 255, 255]
    assert video.frames[1, 8, 13].tolist() == [200, 0, 0]
    assert video.times == pytest.approx([0.0, 0.1])


def test_a_phones_rotation_is_undone(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("no rotated file to read can be made: this PyAV has no set_display_rotation")
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.set_display_rotation(90)
        image = np.zeros((32, 48, 3), dtype=np.uint8)
        image[:16, :24] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "phone.mp4")) as container:
        turns = next(container.decode(video=0)).rotation // 90
    frame = read_video(tmp_path / "phone.mp4").frames[0]
    assert turns in (-1, 1)
    assert frame.shape == (48, 32, 3)
    assert np.abs(frame.astype(int) - np.rot90(image, turns)).mean() < 8


@pytest.mark.parametrize(
    ("matrix", "row", "column"),
    [
        ((1, 0, 0, 1), 0, 0),
        ((-1, 0, 0, -1), 1, 1),
        ((0, 1, -1, 0), 0, 1),
        ((0, -1, 1, 0), 1, 0),
        ((-1, 0, 0, 1), 0, 1),
        ((1, 0, 0, -1), 1, 0),
        ((0, 1, 1, 0), 0, 0),
        ((0, -1, -1, 0), 1, 1),
    ],
)
def test_frames_are_turned_and_mirrored_as_the_file_says(
    tmp_path: Path, matrix: tuple[int, int, int, int], row: int, column: int
) -> None:
    """The corner at the upper left is white; matrices are those of ISO 14496-12."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48] = 255
    path = encode(tmp_path / "a.mp4", np.stack([image] * 2), "libx264")
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = read_video(path).frames[1]
    assert frame.shape == ((64, 96, 3) if a else (96, 64, 3))
    corners = frame[8 :: len(frame) - 17, 8 :: frame.shape[1] - 17].mean(axis=2) > 128
    assert np.argwhere(corners).tolist() == [[row, column]]


def test_metadata_that_is_not_utf8(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", numbered(5), "mpeg4")
    data = path.read_bytes()
    assert data.count(b"Lavf") >= 1
    path.write_bytes(data.replace(b"Lavf", b"\xff\xfe\xe9\x80", 1))
    assert len(read_video(path)) == 5


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    frames = numbered(50)
    path = encode(tmp_path / "a.mp4", frames, "libx264")
    video = read_video(path, start=1.0, stop=1.4)
    assert video.times == pytest.approx(np.arange(25, 35) / 25, abs=1e-3)
    assert np.abs(brightness(video.frames) - brightness(frames[25:35])).max() < 6
    assert read_video(path, start=1.0, max_frames=3).times == pytest.approx([1.0, 1.04, 1.08], abs=1e-3)
    assert probe(path).duration == pytest.approx(2.0, abs=0.05)
    assert (probe(path).width, probe(path).height) == (64, 48)


@pytest.mark.parametrize(
    ("name", "codec", "fps", "options"),
    [
        ("a.mp4", "libx264", 10, {}),
        ("a.avi", "mpeg4", 10, {}),
        ("b_frames.avi", "mpeg4", 10, {"g": "30", "bf": "2"}),
        ("b_frames.avi", "libx264", 10, {"g": "25", "bf": "3"}),
        ("a.mkv", "libx264", 10, {}),
        ("a.mpg", "mpeg2video", 25, {"qmin": "2", "qmax": "2", "g": "30", "bf": "2"}),
        ("a.mpg", "mpeg1video", 25, {"qmin": "2", "qmax": "2", "g": "30", "bf": "2"}),
    ],
)
def test_a_late_start_is_found_exactly(
    tmp_path: Path, name: str, codec: str, fps: int, options: dict[str, str]
) -> None:
    path = encode(tmp_path / name, numbered(round(16 * fps), 32, 32), codec, fps=fps, options=options)
    whole = read_video(path)
    for index in (11 * fps + 3, 12 * fps + 5, 15 * fps):
        video = read_video(path, start=whole.times[index], max_frames=4)
        assert np.array_equal(video.times, whole.times[index : index + 4])
        assert np.array_equal(video.frames, whole.frames[index : index + 4])


def test_a_late_start_is_in_seconds_after_the_first_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(200, 32, 32), "libx264", fps=10)
    video = read_video(path, start=15.0, max_frames=4)
    assert video.times == pytest.approx([15.0, 15.1, 15.2, 15.3], abs=2e-3)
    assert np.array_equal(video.frames, read_video(path).frames[150:154])


def test_a_cut_off_file_gives_what_can_be_decoded_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.mp4", frames, "libx264", container_options={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.warns(UserWarning, match=r"a\.mp4 is damaged or cut short"):
        video = read_video(path)
    assert 5 < len(video) < 20
    path = encode(tmp_path / "a.avi", frames, "mpeg4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"a\.avi is damaged or cut short"):
        video = read_video(path)
    assert 5 < len(video) < 20


def test_damage_is_told_by_whoever_reads_past_it(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", numbered(24), "mpeg4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][5]
    data = bytearray(path.read_bytes())
    data[packet.pos : packet.pos + packet.size + 8] = bytes(packet.size + 8)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_video(path, max_frames=3)) == 3
        assert len(read_windows(path, [0], 3)) == 1
    for read in (lambda: read_video(path, max_frames=8), lambda: read_windows(path, [6], 2)):
        with pytest.warns(UserWarning, match=r"a\.avi is damaged within its first 8 frames"):
            read()


def test_frames_that_were_dropped_in_recording_are_gaps_in_time(tmp_path: Path) -> None:
    """AVI has empty places for them, which its header counts."""
    pts = [*range(8), *range(20, 31)]
    frames = np.random.default_rng(0).integers(0, 256, (len(pts), 48, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.avi", frames, "mpeg4", fps=100, pts=pts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = read_video(path)
        late = read_video(path, start=0.236, max_frames=2)
        (window,) = read_windows(path, [7], 3)
    assert isinstance(window, Video)
    assert video.times == pytest.approx(np.array(pts) / 100)
    assert frame_times(path) == pytest.approx(video.times)
    assert late.times == pytest.approx([0.23, 0.24]) and window.times == pytest.approx([0.07, 0.2, 0.21])
    # cut short, what is missing is counted all the same, and no more than that
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    times = frame_times(path)
    assert len(pts) <= len(times) <= pts[-1] + 1 and times[:8] == pytest.approx(video.times[:8])


def test_a_matroska_file_that_begins_late_is_whole(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", numbered(50), "libx264", pts=[500 + 4 * index for index in range(50)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = read_video(path)
    assert video.times == pytest.approx(np.arange(50) / 25, abs=2e-3)
    assert frame_times(path) == pytest.approx(video.times)
    assert probe(path).duration == pytest.approx(2.0, abs=0.05)


@pytest.mark.skipif(not hasattr(av.stream, "Disposition"), reason="this PyAV does not tell what is cover art")
def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover, song = container.add_stream("png", rate=25), container.add_stream("aac", rate=44100)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        container.mux(cover.encode(None))
        sound = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
        sound.sample_rate = 44100
        for plane in sound.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(song.encode(sound))
        container.mux(song.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    for read in (read_video, probe, frame_times):
        with pytest.raises(VideoError, match=r"song\.mp4 has no video stream"):
            read(path)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_trimmed_file_has_the_frames_that_are_shown(tmp_path: Path, codec: str) -> None:
    """As telephones trim: the edit list leaves frames out that the file still holds."""
    path = encode(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (48, 48, 64, 3), dtype=np.uint8), codec)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"elst") + 12  # of version and flags, and the number of edits, which is 1
    duration, begin = struct.unpack(">Ii", whole[place : place + 8])
    with av.open(str(path)) as container:
        unit = container.streams.video[0].time_base
    assert unit is not None
    for name, edit, shown in (("end", (duration // 2, begin), 24), ("begin", (duration, begin + int(0.4 / unit)), 38)):
        whole[place : place + 8] = struct.pack(">Ii", *edit)
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(read_video(path)) == shown
        if hasattr(av.VideoStream, "index_entries") or codec == "libx264":
            assert len(frame_times(path)) == shown


def test_packed_frames_are_counted_once(tmp_path: Path) -> None:
    """DivX puts a frame and the B-frame after it into one packet, and a byte into the place that this leaves."""
    path = encode(tmp_path / "a.avi", numbered(12), "mpeg4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.avi"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            late = packet.dts > 0
            if packet.dts == 1:
                filler = av.Packet(b"\x7f")
                filler.dts = filler.pts = 1
                filler.time_base, filler.stream = packet.time_base, stream
                target.mux(filler)
            packet.dts += late
            packet.pts += late
            packet.stream = stream
            target.mux(packet)
    with av.open(str(tmp_path / "b.avi")) as container:
        assert container.streams.video[0].frames == 13
    assert frame_times(tmp_path / "b.avi") == pytest.approx(np.arange(12) / 25)


def test_sound_that_joins_late_ends_no_video(tmp_path: Path) -> None:
    """As in live recordings: a stream that turns up after the file was opened confuses PyAV once all packets were given."""
    whole, late = tmp_path / "whole.flv", tmp_path / "late.flv"
    with av.open(str(whole), "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.height, picture.width, picture.pix_fmt, picture.options = 48, 64, "yuv420p", {"bf": "0", "crf": "4"}
        sound = container.add_stream("aac", rate=44100)
        for image in numbered(1000):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(picture.encode(None))
        for start in range(44100 * 30, 44100 * 40, 1024):
            silence = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            silence.sample_rate, silence.pts = 44100, start
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    data, place = whole.read_bytes(), 13
    kept, header = bytearray(data[:13]), None
    kept[4] = 1  # says that there are pictures alone
    while place < len(data) - 11:
        kind, size = data[place], int.from_bytes(data[place + 1 : place + 4], "big")
        tag = bytearray(data[place : place + 11 + size + 4])
        place += len(tag)
        if kind == 18:  # what a live recording does not know when it begins
            continue
        if kind == 8 and int.from_bytes(tag[4:7], "big") < 20000:
            header = tag  # of the sound, moved to where it begins
            continue
        if kind == 8 and header is not None:
            header[4:7] = tag[4:7]
            kept += header
            header = None
        kept += tag
    late.write_bytes(kept)
    assert len(frame_times(late)) == 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = read_video(late)
    assert len(video) == 1000
    assert (np.diff(brightness(video.frames)) > -2).all()
    assert frame_at(late, 39.0) == 975


def test_a_codec_that_ffmpeg_does_not_know_is_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(10), "libx264")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"brxq"))
    for read in (probe, frame_times, read_video):
        with pytest.raises(VideoError, match=r"a\.mp4 .* cannot decode"):
            read(path)


def test_a_placeholder_is_no_number_of_frames(tmp_path: Path) -> None:
    """FFmpeg writes 2^30 to an AVI that goes to a pipe."""

    class Pipe:
        def __init__(self, file: BinaryIO) -> None:
            self.write = file.write

    path = tmp_path / "pipe.avi"
    with path.open("wb") as file, av.open(Pipe(file), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in numbered(100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 10**6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(frame_times(path)) == len(read_video(path)) == 100


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_joined_files_have_one_time(tmp_path: Path, name: str, codec: str) -> None:
    """Where times begin anew, every way to a frame goes on counting."""
    halves = [
        encode(tmp_path / f"{half}{name}", frames, codec, options={"bf": "2"})
        for half, frames in enumerate(np.split(numbered(400), 2))
    ]
    path = tmp_path / name
    path.write_bytes(b"".join(half.read_bytes() for half in halves))
    times, frames = frame_times(path), list(iter_frames(path))
    assert len(times) == len(frames) == 400
    first, second = map(frame_times, halves)
    np.testing.assert_allclose(times, np.concatenate([first, first[-1] + 0.04 + second]), atol=0.011)
    np.testing.assert_allclose([time for time, _ in frames], times, atol=0.09)
    for start in (1.0, 3.0, 7.5, 8.5, 9.0, 12.0, 15.0):
        (counted,) = read_windows(path, [frame_at(path, start)], 1)
        assert isinstance(counted, Video)
        assert counted.shows(start)
        found = read_video(path, start, max_frames=1)
        np.testing.assert_allclose(brightness(found.frames), brightness(counted.frames), atol=2)
        np.testing.assert_allclose(found.times[0], start, atol=0.05)


@pytest.mark.filterwarnings("ignore:.* is damaged or cut short")
def test_joined_files_of_two_sizes_are_as_large_as_the_first(tmp_path: Path) -> None:
    parts = [
        encode(tmp_path / f"{height}.ts", numbered(6, height, width), "libx264").read_bytes()
        for height, width in ((48, 64), (96, 128))
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    assert read_video(tmp_path / "joined.ts").frames.shape == (12, 48, 64, 3)


def noisy(count: int) -> Frames:
    """Numbered frames that take some room."""
    frames = numbered(count, 96, 128)
    return (frames // 2 + np.random.default_rng(0).integers(0, 100, frames.shape)).astype(np.uint8)


def test_one_time_that_is_wrong_moves_no_other_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.ts", numbered(300), "libx264", options={"bf": "0"})
    right = frame_times(path)
    data = bytearray(path.read_bytes())
    header = [found.start() for found in re.finditer(b"\0\0\1\xe0", data)][120]
    data[header + 9] ^= 0x08  # a high bit of its time
    path.write_bytes(data)
    times = frame_times(path)
    assert len(times) == 300
    np.testing.assert_allclose(times[:299], np.delete(right, 120), atol=0.011)
    for start in (1.0, 4.0, 6.0, 9.0):
        (counted,) = read_windows(path, [frame_at(path, start)], 1)
        assert isinstance(counted, Video)
        assert (
            abs(brightness(counted.frames)[0] - brightness(read_windows(path, [round(start * 25)], 1)[0].frames)[0]) < 3
        )


def test_damage_that_only_the_decoder_sees_is_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", noisy(100), "libx264", options={"g": "50"})
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 4, len(data), 10000):
        data[place : place + 200] = np.random.default_rng(place).bytes(200)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        assert len(read_video(path)) == 100


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx")])
def test_sound_may_go_on_after_the_picture(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        picture = container.add_stream(codec, rate=25)
        picture.height, picture.width, picture.pix_fmt = 96, 128, "yuv420p"
        sound = container.add_stream("libopus", rate=48000)
        packets = []
        for image in noisy(100):
            packets += picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
        packets += picture.encode(None)
        for start in range(0, 8 * 48000, 960):
            silence = av.AudioFrame(format="flt", layout="stereo", samples=960)
            silence.planes[0].update(bytes(silence.planes[0].buffer_size))
            silence.sample_rate, silence.pts = 48000, start
            packets += sound.encode(silence)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    untold = tmp_path / f"untold{path.suffix}"  # nothing in it says how long the picture alone lasts
    untold.write_bytes(path.read_bytes().replace(b"DURATION", b"WHATEVER"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_video(path)) == len(read_video(untold)) == 100
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cut short"):
        assert 0 < len(read_video(path)) < 90


def test_a_start_beyond_any_clock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="beyond the end"):
        read_video(encode(tmp_path / "a.mp4", numbered(10), "libx264"), start=1e30)


def test_a_tall_panel_fits_players() -> None:
    picture = overlay_frames(np.zeros((1, 1600, 12, 3), np.uint8), {"total": np.zeros((1, 1600, 12))}, 1.0, ["a"])
    assert max(picture.shape[1:3]) < 4200


def test_an_intact_file_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_video(encode(tmp_path / "a.avi", numbered(20), "mpeg4"))
        read_video(encode(tmp_path / "a.mp4", numbered(20), "libx264"))


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "noise", "no_index", "sound", "ansi_text"])
def test_what_is_no_video_is_one_sentence_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("note.nfo" if kind == "ansi_text" else "clip.mp4")
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind in ("text", "ansi_text"):
        path.write_text("This is not a video.\n" * 50)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "no_index":
        encode(path, numbered(20), "libx264")
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with pytest.raises(VideoError) as caught:
        read_video(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def test_a_start_beyond_the_end_tells_the_duration(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(50), "libx264")
    for start in (3.0, 60.0):
        with pytest.raises(VideoError, match=r"start .* beyond the end .*2\.00 s"):
            read_video(path, start=start)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(VideoError, match="start"):
            read_video(path, start=wrong)
    with pytest.raises(VideoError, match="stop"):
        read_video(path, start=1.0, stop=0.5)


def ramp(count: int, path: str = "ramp") -> Video:
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), dtype=np.uint8)
    return Video(frames, np.arange(count) / 10, 10.0, path)


def test_sampling_is_centred_or_starts_where_told() -> None:
    video = ramp(40)
    clip = sample_clip(video, frames=8, stride=2)
    assert clip.indices.tolist() == list(range(12, 28, 2))
    assert not clip.looped
    assert clip.frames[:, 0, 0, 0].tolist() == clip.indices.tolist()
    assert sample_clip(video, 4, start=1.04).indices.tolist() == [10, 11, 12, 13]
    assert sample_clip(video, 4, 3, frame=5).indices.tolist() == [5, 8, 11, 14]
    with pytest.raises(VideoError, match=r"4\.00 s"):
        sample_clip(video, 4, start=4.5)
    with pytest.raises(VideoError, match="frames 0 to 39"):
        sample_clip(video, 4, frame=40)
    with pytest.raises(ValueError, match="not both"):
        sample_clip(video, 4, start=1.0, frame=3)
    with pytest.raises(ValueError, match="stride"):
        sample_clip(video, 4, 0)


def test_a_start_before_what_was_read_is_refused() -> None:
    """Of a video that was read from 5 s on."""
    part = Video(ramp(40).frames, 5 + np.arange(40) / 10, 10.0, "part")
    assert sample_clip(part, 4, start=4.995).indices.tolist() == [0, 1, 2, 3]  # which times in files are rounded to
    with pytest.raises(VideoError, match=r"from 5\.00 to 9\.00 s"):
        sample_clip(part, 4, start=1.0)


def test_a_short_video_is_looped_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"ramp has 3 frames .* repeated in a loop"):
        clip = sample_clip(ramp(3), frames=8)
    assert clip.looped
    assert clip.indices.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.warns(UserWarning, match="loop"):
        clip = sample_clip(ramp(10), frames=4, frame=8)
    assert clip.looped
    assert clip.indices.tolist() == [8, 9, 8, 9]
    with pytest.warns(UserWarning, match="loop"):
        clip = sample_clip(ramp(5), frames=4, stride=2)
    assert clip.looped  # though no frame is shown twice
    assert clip.indices.tolist() == [0, 2, 4, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sample_clip(ramp(8), frames=8).looped
        assert not sample_clip(ramp(1), frames=1).looped


def test_clips_follow_each_other() -> None:
    def firsts(count: int, length: int, stride: int = 1) -> list[list[int]]:
        return [clip[:, 0, 0, 0].tolist() for clip in iter_clips(ramp(count).frames, length, stride)]

    assert firsts(11, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert firsts(12, 3, 2) == [[0, 2, 4], [6, 8, 10]]
    assert firsts(3, 4) == [[0, 1, 2, 0]]
    assert list(iter_clips(iter([]), 4)) == []


@pytest.mark.parametrize(("count", "length", "stride"), [(7, 8, 2), (5, 4, 2), (3, 4, 1), (1, 2, 3), (10, 4, 3)])
def test_a_short_video_is_looped_alike_by_clips_that_follow_each_other(count: int, length: int, stride: int) -> None:
    video = ramp(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (clip,) = iter_clips(video.frames, length, stride)
        assert np.array_equal(clip, sample_clip(video, length, stride).frames)


def test_a_stream_of_frames_equals_the_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", numbered(9), "mpeg4")
    streamed = list(iter_frames(path))
    video = read_video(path)
    assert np.array_equal(np.stack([frame for _, frame in streamed]), video.frames)
    assert [time for time, _ in streamed] == video.times.tolist()


@pytest.mark.parametrize("model", ["R3D_18", "S3D", "MViT_V2_S"])
@pytest.mark.parametrize("size", [(240, 320), (61, 53), (300, 171)])
def test_torchvisions_own_preprocessing_is_reproduced(model: str, size: tuple[int, int]) -> None:
    video_models = pytest.importorskip("torchvision", reason="torchvision is not installed").models.video
    transform = getattr(video_models, f"{model}_Weights").DEFAULT.transforms()
    frames = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepare = Preprocessing.from_torchvision(transform, frames=3)
    torch.testing.assert_close(prepare(frames), transform(frames.permute(0, 3, 1, 2)), rtol=0, atol=1e-6)
    assert Preprocessing.from_dict({"transform": transform, "frames": 3}) == prepare
    with pytest.raises(TypeError, match="torchvision"):
        Preprocessing.from_torchvision(torch.nn.Identity(), frames=3)
    transform.interpolation = transform.interpolation.BICUBIC
    with pytest.raises(TypeError, match="only bilinear resizing is supported, not bicubic"):
        Preprocessing.from_torchvision(transform, frames=3)


def test_bounds_are_black_and_white() -> None:
    prepare = Preprocessing(frames=2, crop=(8, 8), mean=(90, 98, 102), std=(1, 2, 4), scale=255)
    low, high = prepare.bounds
    for value, bound in ((0, low), (255, high)):
        x = prepare(np.full((2, 8, 8, 3), value, dtype=np.uint8))
        assert x.shape == (3, 2, 8, 8)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.amax((1, 2, 3)), bound.float())
        torch.testing.assert_close(x.amin((1, 2, 3)), bound.float())
    assert low.tolist() == [-90, -49, -25.5]
    assert high.tolist() == [165, 78.5, 38.25]


def test_the_order_of_channels_is_the_models() -> None:
    settings = {"frames": 1, "size": [1, 2], "mean": [1, 2, 3], "std": [1, 2, 4], "scale": 255, "order": "BGR"}
    prepare = Preprocessing.from_dict(settings)
    assert Preprocessing.from_dict(prepare.to_dict()) == prepare
    frames = np.array([[[[200, 120, 40], [255, 0, 255]]]], dtype=np.uint8)
    assert prepare(frames)[:, 0, 0].T.tolist() == [[39, 59, 197 / 4], [254, -1, 252 / 4]]
    low, high = prepare.bounds
    assert low.tolist() == [-1, -1, -0.75] and high.tolist() == [254, 126.5, 63]
    assert np.array_equal(prepare.source_crop(frames), frames)  # what is drawn stays as it is
    assert Preprocessing.from_dict({**settings, "order": "RGB"})(frames)[0, 0, 0, 0] == 199


def test_luma() -> None:
    prepare = Preprocessing(frames=1, crop=(1, 3), mean=(0,), std=(1,), scale=255, channels=1)
    x = prepare(np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]], dtype=np.uint8))
    torch.testing.assert_close(x, 255 * torch.tensor([[[[0.299, 0.587, 0.114]]]]))


def test_without_a_resize_the_frame_just_covers_the_crop() -> None:
    prepare = Preprocessing(frames=1, crop=(4, 4), mean=(0, 0, 0), std=(1, 1, 1), scale=255)
    frame = np.zeros((1, 8, 16, 3), dtype=np.uint8)
    frame[:, :, 2:14] = 200
    assert prepare(frame).unique().tolist() == [200.0]
    assert prepare.source_crop(frame).shape == (1, 8, 8, 3)
    assert np.unique(prepare.source_crop(frame)).tolist() == [200]


def test_the_source_crop_is_what_the_model_sees() -> None:
    prepare = Preprocessing(frames=1, crop=(112, 112), resize=(128, 171), mean=(0, 0, 0), std=(1, 1, 1), scale=255)
    ramp_down = np.linspace(0, 255, 240)[:, None] * np.ones((1, 320))
    ramp_right = np.ones((240, 1)) * np.linspace(0, 255, 320)
    frame = np.stack([ramp_down, ramp_right, 0 * ramp_down], axis=-1).round().astype(np.uint8)[None]
    seen, model = prepare.source_crop(frame)[0], prepare(frame)[:, 0]
    assert seen.shape == (210, 210, 3)
    for channel in (0, 1):
        assert abs(seen[..., channel].min() - model[channel].min().item()) < 3
        assert abs(seen[..., channel].max() - model[channel].max().item()) < 3


def test_preprocessing_survives_a_dict() -> None:
    settings = {"frames": 8, "stride": 2, "size": [48, 60], "resize": [50, 70], "mean": 0.5, "std": [0.2]}
    settings["channels"] = 1
    prepare = Preprocessing.from_dict(settings)
    assert prepare.crop == (48, 60)
    assert prepare.mean == (0.5,)
    assert prepare.scale == 1
    assert Preprocessing.from_dict(prepare.to_dict()) == prepare
    assert Preprocessing.from_dict({**settings, "scale": None, "order": None}) == prepare


@pytest.mark.parametrize("name", ["size", "resize"])
def test_a_size_of_a_clip_is_no_size_of_frames(name: str) -> None:
    good = {"frames": 8, "size": 4, "mean": 0.5, "std": 0.5}
    with pytest.raises(ValueError, match=r"one number or \(height, width\), not \[16, 112, 112\]"):
        Preprocessing.from_dict({**good, name: [16, 112, 112]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean needs one value for each of 3 channels"),
        ({"std": (0.5, 0, 0.5)}, "std positive"),
        ({"scale": 2}, "scale"),
        ({"channels": 2}, "channels"),
        ({"frames": 0}, "frames"),
        ({"stride": 0}, "stride"),
        ({"scale": 0}, "scale"),
        ({"channels": 0}, "channels"),
        ({"order": "GBR"}, "order must be RGB, or BGR"),
        ({"order": "BGR", "channels": 1, "mean": (0.5,), "std": (0.5,)}, "order must be RGB, or BGR with 3 channels"),
        ({"crop": (0, 4)}, "sizes"),
        ({"resize": 0}, "sizes"),
        ({"std": (0.5, float("inf"), 0.5)}, "must be finite"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    good = {"frames": 8, "crop": (4, 4), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**good, **settings})
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict({**good, **settings})


def test_frames_of_another_layout_are_refused() -> None:
    prepare = Preprocessing(frames=2, crop=(4, 4), mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(TypeError, match="uint8"):
        prepare(torch.rand(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\)"):
        prepare(np.zeros((2, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="less than the crop"):
        Preprocessing(frames=2, crop=(9, 9), resize=8, mean=(0, 0, 0), std=(1, 1, 1))(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="missing"):
        Preprocessing.from_dict({"frames": 2, "size": 4})
    with pytest.raises(ValueError, match="colour"):
        Preprocessing.from_dict({**prepare.to_dict(), "colour": 1})


def test_the_shared_scale_is_a_percentile_of_all_maps() -> None:
    first, second = np.zeros((2, 4, 4)), np.linspace(-10, -1, 32).reshape(2, 4, 4)
    assert shared_scale([first, second], 100) == 10
    assert shared_scale([first, second], 50) == pytest.approx(5.5)
    assert shared_scale([first], 99) == 1
    with pytest.raises(ValueError, match="percentile"):
        shared_scale([first], 0)


def panels(picture: Frames, count: int) -> list[Frames]:
    """The panels of one overlay frame, found by their columns: titles above, caption below."""
    width = (picture.shape[1] - 4 * (count - 1)) // count
    return [picture[:, i * (width + 4) : i * (width + 4) + width].astype(int) for i in range(count)]


def test_overlay_is_red_for_and_blue_against_on_one_scale() -> None:
    frames = np.full((2, 64, 80, 3), 120, dtype=np.uint8)
    strong, weak = np.zeros((2, 8, 10)), np.zeros((2, 8, 10))
    strong[0, 2, 2], strong[0, 5, 7] = 1.0, -1.0
    weak[0] = strong[0] / 4
    drawn = overlay_frames(frames, {"strong": strong, "weak": weak}, 1.0, ("class 3", "red: for the class"))
    assert drawn.shape[0] == 2
    assert drawn.shape[1] % 2 == 0
    assert drawn.shape[2] % 2 == 0
    line = round(1.5 * max(12, min(80 * 3 // 11, 40)))
    clip, left, right = (panel[line : line + 192] for panel in panels(drawn[0], 3))
    assert np.abs(clip - 120).max() <= 1
    for_it, against = (60, 60), (132, 180)  # centres of the two cells, 24 pixels each
    assert left[for_it][0] > 200
    assert left[for_it][2] < 60
    assert left[against][2] > 200
    assert left[against][0] < 80
    assert left[20, 200].tolist() == [54, 54, 54]
    rise = left[for_it][0] - 54, right[for_it][0] - 54
    assert rise[1] == pytest.approx(rise[0] / 4, abs=4)
    assert not np.array_equal(drawn[0][line + 192 :], drawn[1][line + 192 :])  # the frame's number


@pytest.mark.parametrize("name", ["{frame}", "{title}", r"\n $\low$"])
def test_captions_are_drawn_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    drawn: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def noted(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, **options: object) -> None:
        drawn.append(text)
        draw_text(draw, place, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    overlay_frames(np.zeros((2, 64, 80, 3), np.uint8), {"total": np.zeros((2, 4, 4))}, 1.0, (name, "legend"))
    page = ["clip", "total", name]
    assert drawn == [*page, "legend   frame 1 of 2", *page, "legend   frame 2 of 2"]


@pytest.mark.parametrize("name", ["counting $5 and $10 bills", r"cost$\low$", "frame {frame}", r"a\b", "half $"])
def test_a_contact_sheet_draws_names_as_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    plain: list[str] = []
    save = Figure.savefig

    def noted(self: Any, *arguments: object, **options: object) -> None:
        plain.extend(text.get_text() for text in self.findobj(Text) if not text.get_parse_math())
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    write_contact_sheet(tmp_path / "a.png", np.zeros((2, 8, 8, 3), np.uint8), {name: np.zeros((2, 8, 8))}, 1.0, name)
    assert plain.count(name) == 2


def test_a_large_source_keeps_its_size_and_a_huge_one_fits_players() -> None:
    maps = {name: np.zeros((1, 4, 4)) for name in "abc"}
    assert overlay_frames(np.zeros((1, 210, 211, 3), np.uint8), maps, 1.0, ())[0].shape[1] == 4 * 211 + 3 * 4
    assert overlay_frames(np.zeros((1, 1900, 1900, 3), np.uint8), maps, 1.0, ())[0].shape[1] <= 4096


def test_written_video_reads_back(tmp_path: Path) -> None:
    frames = numbered(6)
    assert write_video(tmp_path / "a.mp4", frames, 8) in ("libx264", "mpeg4")
    video = read_video(tmp_path / "a.mp4")
    assert video.frames.shape == frames.shape
    assert video.fps == pytest.approx(8)
    assert np.abs(brightness(video.frames) - brightness(frames)).max() < 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_without_h264_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", set(av.codecs_available) - {"libx264"})
    with pytest.warns(UserWarning, match="libx264"):
        assert write_video(tmp_path / "a.mp4", numbered(3), 8) == "mpeg4"
    assert len(read_video(tmp_path / "a.mp4")) == 3


def test_contact_sheet_colours(tmp_path: Path) -> None:
    from PIL import Image

    frames = np.full((4, 32, 32, 3), (0, 160, 0), dtype=np.uint8)
    positive, negative = np.full((4, 8, 8), 2.0), np.full((4, 8, 8), -2.0)
    write_contact_sheet(tmp_path / "a.png", frames, {"DTD": positive, "temporal": negative}, 2.0, "jack")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0, 160, 0), (128, 0, 0), (0, 0, 76)):  # the frame, and the ends of seismic
        assert (np.abs(pixels - colour).max(axis=1) <= 1).mean() > 0.1


def test_a_sheet_of_fewer_columns_than_frames_shows_each_frames_own_map(tmp_path: Path) -> None:
    from PIL import Image

    relevance = np.zeros((16, 8, 8))
    relevance[15], relevance[3] = 2, -2  # of the frames 1, 6, 11 and 16 that are shown, the last speaks for the class
    write_contact_sheet(
        tmp_path / "a.png", np.zeros((16, 32, 32, 3), np.uint8), {"DTD": relevance}, 2.0, "jack", columns=4
    )
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3).astype(int)
    red, blue = ((np.abs(pixels - colour).max(axis=1) <= 1).mean() for colour in ((128, 0, 0), (0, 0, 76)))
    assert red > 0.03 and blue < 0.01


def test_real_recordings(data: Path) -> None:
    folder = data / "clips"
    counts = {
        "ucf101/v_ApplyEyeMakeup_g01_c01.avi": 164,
        "ucf101/v_CricketShot_g04_c01_rgb.gif": 79,
        "hmdb51/TrumanShow_wave_f_nm_np1_fr_med_26.avi": 48,
        "weizmann_rgb/lyova_walk.mkv": 50,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, count in counts.items():
            video = read_video(folder / name)
            assert len(video) == count
            assert (np.diff(video.times) > 0).all()
            assert video.times[0] == 0
            assert video.frames.std() > 10


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), CONTAINERS)
def test_frames_are_counted_and_timed_without_decoding(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no file to read can be made: FFmpeg in this PyAV was built without the encoder {codec}")
    path = encode(tmp_path / name, numbered(23), codec, pix_fmt)
    assert frame_times(path) == pytest.approx(read_video(path).times, abs=2e-3)


def test_frames_that_a_cut_file_lacks_are_counted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "cut.avi", noise, "mpeg4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert frame_times(path) == pytest.approx(np.arange(60) / 25)
    with pytest.raises(VideoError, match=r"none\.avi"):
        frame_times(tmp_path / "none.avi")


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), CONTAINERS)
def test_windows_are_runs_of_the_videos_frames(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no file to read can be made: FFmpeg in this PyAV was built without the encoder {codec}")
    path = encode(tmp_path / name, numbered(12), codec, pix_fmt)
    video = read_video(path)
    windows = read_windows(path, [7, 0, 2, 10], 4)
    for start, window in zip([7, 0, 2, 10], windows, strict=True):
        assert isinstance(window, Video)
        assert np.array_equal(window.frames, video.frames[start : start + 4])
        assert np.array_equal(window.times, video.times[start : start + 4])
        assert window.fps == video.fps
    beyond, first = read_windows(path, [12, 0], 2)
    assert isinstance(first, Video) and len(first) == 2
    assert isinstance(beyond, VideoError) and f"{name} ends after 12 frames, before frame 12" in str(beyond)
    with pytest.raises(VideoError, match="is a directory"):
        read_windows(tmp_path, [0], 2)
    with pytest.raises(VideoError, match="no video is named: its path is empty"):
        read_windows("", [0], 2)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_reader_goes_on_where_it_was(tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it gives, and warns of, what one that begins anew does; but it decodes no frame twice that it still has."""
    path = encode(tmp_path / "a.mkv", noisy(100), "libx264", options={"g": "20"})
    if damaged:
        data = bytearray(path.read_bytes())
        for place in range(len(data) // 4, len(data), 10000):
            data[place : place + 200] = np.random.default_rng(place).bytes(200)
        path.write_bytes(data)
    begun, decode = [], captum_dtd.video.decode._decode

    def counted(*arguments: Any, **options: Any) -> Any:
        begun.append(arguments)
        return decode(*arguments, **options)

    monkeypatch.setattr(captum_dtd.video.decode, "_decode", counted)
    with WindowReader(path) as reader:
        for starts, times, *length in (
            ([0, 8], 1),
            ([16, 20], 1),
            ([24], 1),  # of which the last one had some
            ([4], 2),  # behind it
            ([60, 50], 2),
            ([61], 3, 4),  # shorter, and not to where it is
            ([97], 3),
            ([100], 4),  # it has ended
        ):
            said = []
            for read in (reader.read, partial(read_windows, path)):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    said.append((read(starts, *length or [8]), [str(warning.message) for warning in caught]))
                if read == reader.read:
                    assert len(begun) == times
                    begun_so_far = len(begun)
            del begun[begun_so_far:]
            (windows, warned), (expected, warned_anew) = said
            assert warned == warned_anew
            assert bool(warned) <= damaged
            for window, other in zip(windows, expected, strict=True):
                assert type(window) is type(other)
                if isinstance(window, Video) and isinstance(other, Video):
                    np.testing.assert_array_equal(window.frames, other.frames)
                    np.testing.assert_array_equal(window.times, other.times)
                else:
                    assert str(window) == str(other)
        assert reader.reads(path)
        encode(path, noisy(50), "libx264")
        assert not reader.reads(path)
