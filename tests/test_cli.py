"""The command line from end to end, in process: what it writes, what it prints, and what it leaves after an error."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from captum_dtd import __version__, cli, doctor, native
from captum_dtd.cli import main
from captum_dtd.video import Preprocessing, iter_clips, read_video, write_video

av = pytest.importorskip("av", reason="PyAV is not installed")

from videos import encode  # noqa: E402

MODEL = """
import torch
from torch import nn

def net(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, num_classes))

class Brightest(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv3d(3, 3, 1, bias=False), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self[0].weight.data.copy_(torch.eye(3).view(3, 3, 1, 1, 1))

class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1)
    def forward(self, x):
        return torch.cumsum(self.conv(x), 2).amax((2, 3, 4))

def spoilt():
    model = net()
    model[7].bias.data.fill_(float("nan"))
    return model

def broken():
    raise KeyError("no such\\nlayer")

def features():
    return nn.Conv3d(3, 3, 1)
"""
SETTINGS = ["--size", "16", "--mean", "0.4", "--std", "0.2", "--frames", "4", "--quiet"]
OWN = ["--model", "tiny_video_net:net", *SETTINGS]
FILES = ["contact_sheet.png", "overlay.mp4", "relevance.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and a video of 20 frames, red at first and green then, where a bar moves."""
    (tmp_path / "tiny_video_net.py").write_text(MODEL)
    frames = np.zeros((20, 32, 40, 3), dtype=np.uint8)
    frames[:8], frames[8:] = (200, 20, 20), (20, 200, 20)
    for index in range(20):
        frames[index, :, 2 * index : 2 * index + 2] = 255
    write_video(tmp_path / "clip.mp4", frames, 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The maps, and the metadata as values."""
    with safe_open(directory / "relevance.safetensors", framework="pt") as file:
        record = {}
        for key, value in file.metadata().items():
            try:
                record[key] = json.loads(value)
            except json.JSONDecodeError:
                record[key] = value
        return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def fails(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run, expect an error and no trace of the run; returns the message."""
    before = left_over(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("captum-dtd: warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("captum-dtd: error: ")
    assert out == ""
    assert left_over(folder) == before
    return lines[0]


def test_explain_writes_three_files_and_says_what_they_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "clip.mp4", *OWN, "-o", "deep/out"]) == 0
    out, err = capsys.readouterr()
    assert left_over(folder) == ["clip.mp4", "deep", "tiny_video_net.py"]
    assert left_over(folder / "deep") == ["out"]
    assert left_over(folder / "deep" / "out") == FILES
    assert all(stat.S_IMODE((folder / "deep/out" / name).stat().st_mode) & 0o600 == 0o600 for name in FILES)
    lines = out.splitlines()
    assert lines[0].startswith("class: class ")
    assert "sum|temporal| / (sum|temporal| + sum|spatial|)" in lines[1]
    assert [line.split(": ")[0] for line in lines[2:]] == [f"deep/out/{name}" for name in reversed(FILES)]
    assert err == ""

    maps, record = read(folder / "deep" / "out")
    assert set(maps) == {"total", "spatial", "temporal"}
    assert all(m.shape == (4, 16, 16) for m in maps.values())
    torch.testing.assert_close(maps["total"], maps["spatial"] + maps["temporal"])
    moves, looks = maps["temporal"].abs().sum(), maps["spatial"].abs().sum()
    assert record["temporal_share"] == pytest.approx(float(moves / (moves + looks)), rel=1e-4)
    assert moves > 0
    assert f"{record['temporal_share']:.1%}" in lines[1]
    assert maps["total"].sum().item() + record["delta"] == pytest.approx(record["score"], rel=1e-4)
    assert record["version"] == __version__
    assert record["source"] == "clip.mp4"
    assert record["model"] == OWN[1]
    assert record["indices_from_start"] == [0, 1, 2, 3]
    assert record["start"] == pytest.approx(0.8)
    assert not record["loop_padded"]
    assert record["precision"] == "float32"
    assert (set(record["kernels"]) > {"reference"}) == ("cpu" in native.loaded)
    assert record["readout"] == "own"
    assert record["normalize"] == "none"
    assert record["preset"] == "none"
    assert record["low"] == pytest.approx([-2.0] * 3)
    assert record["high"] == pytest.approx([3.0] * 3)
    assert Preprocessing.from_dict(record["preprocessing"]).crop == (16, 16)

    overlay = read_video(folder / "deep/out/overlay.mp4")
    assert len(overlay) == 4
    assert overlay.fps == pytest.approx(8)
    assert overlay.frames.shape[2] > 4 * 160
    with Image.open(folder / "deep/out/contact_sheet.png") as sheet:
        assert sheet.width > 400
        assert sheet.height > 400


def test_the_maps_are_those_of_the_library(folder: Path) -> None:
    from captum_dtd import DiscriminativeDeepTaylor

    assert main(["explain", "clip.mp4", *OWN, "--start", "0.5", "--target", "1", "--readout", "mean", "-o", "out"]) == 0
    maps, record = read(folder / "out")
    assert record["target"] == 1
    assert record["start"] == pytest.approx(0.5)
    assert record["readout"] == "mean"
    prepare = Preprocessing(frames=4, crop=(16, 16), mean=(0.4,) * 3, std=(0.2,) * 3)
    clip = prepare(read_video("clip.mp4").frames[5:9])[None]
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    explainer = DiscriminativeDeepTaylor(namespace["net"]().eval(), *prepare.bounds, readout="mean")
    expected = explainer.attribute(clip, target=1)
    for name, values in maps.items():
        torch.testing.assert_close(values, getattr(expected, name)[0], rtol=1e-4, atol=1e-7)


def test_a_name_that_is_no_text_is_escaped(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    (folder / "clip.mp4").rename(folder / name)
    assert main(["explain", name, *OWN, "-o", "out"]) == 0
    _, record = read(folder / "out")
    assert record["source"] == r"caf\xe9.mp4"


def test_the_top_class_is_explained_and_hileys_preset_takes_the_videos(folder: Path) -> None:
    arguments = ["--model", "tiny_video_net:Brightest", *SETTINGS, "--start", "0"]
    assert main(["explain", "clip.mp4", *arguments, "-o", "clip"]) == 0
    assert main(["explain", "clip.mp4", *arguments, "--preset", "hiley2019", "-o", "video"]) == 0
    assert read(folder / "clip")[1]["target"] == 0  # it begins red
    record = read(folder / "video")[1]
    prepare = Preprocessing.from_dict(record["preprocessing"])
    means = [prepare(clip).mean((1, 2, 3)) for clip in iter_clips(read_video("clip.mp4").frames, 4)]
    assert len(means) == 5
    assert record["target"] == torch.stack(means).mean(0).argmax().item() == 1  # and is green for longer
    assert (record["preset"], record["seed"]) == ("hiley2019", "one")
    assert (record["readout"], record["normalize"]) == ("first", "max")


@pytest.mark.parametrize("video", ["generated", "generated:walk", "generated:wave2"])
def test_the_generated_figure_is_recognised_and_moves(folder: Path, video: str) -> None:
    arguments = ["--model", "c3d_mini", "--weights", "weizmann", "--quiet", "-o", "out"]
    assert main(["explain", video, *arguments]) == 0
    maps, record = read(folder / "out")
    assert record["class"] == (video.partition(":")[2] or "jack")
    assert record["source"] == video
    assert record["weights"] == "weizmann"
    assert record["temporal_share"] > 0.1
    assert maps["total"].sum().item() == pytest.approx(record["score"], rel=1e-3)


def test_without_weights_the_bundled_ones_are_taken(folder: Path) -> None:
    assert main(["explain", "clip.mp4", "--model", "c3d_mini", "--quiet", "-o", "out"]) == 0
    assert read(folder / "out")[1]["weights"] == "ucf10"


def test_class_names_come_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.txt").write_text("1 Bowling\n2 Jump Rope\n3 Rowing\n")
    named = ["explain", "clip.mp4", *OWN, "--classes", "names.txt", "-o", "out"]
    assert main([*named, "--target", "jump rope"]) == 0
    assert read(folder / "out")[1]["class"] == "Jump Rope"
    assert main([*named, "--target", "2"]) == 0
    assert read(folder / "out")[1]["class"] == "Rowing"
    capsys.readouterr()
    assert "did you mean: Bowling" in fails(folder, capsys, [*named, "--target", "Bowlin"])
    assert "classes 0 to 2" in fails(folder, capsys, [*named, "--target", "3"])
    assert "classes 0 to 2" in fails(folder, capsys, [*named, "--target", "-1"])
    assert "Bowling, Jump Rope, Rowing" in fails(folder, capsys, [*named, "--target", "zzz"])
    assert "--classes FILE" in fails(folder, capsys, ["explain", "clip.mp4", *OWN, "--target", "Rowing", "-o", "out"])
    Path("names.txt").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in fails(folder, capsys, named)


def test_a_short_video_is_looped_and_said_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video("short.mp4", read_video("clip.mp4").frames[:3], 10)
    assert main(["explain", "short.mp4", *OWN, "-o", "out"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("captum-dtd: warning: short.mp4 has 3 frames")
    assert err.count("\n") == 1
    record = read(folder / "out")[1]
    assert record["loop_padded"] is True
    assert record["indices_from_start"] == [0, 1, 2, 0]


def test_the_clip_is_centred_in_a_long_video_without_decoding_it_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise AssertionError("all frames are decoded")

    frames = np.random.default_rng(0).integers(0, 256, (150, 32, 32, 3), dtype=np.uint8)
    write_video("long.mp4", frames, 5)
    monkeypatch.setattr(cli, "iter_frames", fail)
    assert main(["explain", "long.mp4", *OWN, "-o", "out"]) == 0
    assert read(folder / "out")[1]["start"] == pytest.approx((30 - 4 / 5) / 2, abs=0.11)


def test_the_clip_of_a_short_video_is_centred_by_its_frames_where_the_rate_varies(folder: Path) -> None:
    pts = np.cumsum([50 if index % 5 == 0 else 3 for index in range(14)])
    frames = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
    path = encode(Path("bursts.mp4"), frames, "libx264", pts=[int(tick) for tick in pts])
    assert main(["explain", "bursts.mp4", *OWN, "-o", "out"]) == 0
    assert read(folder / "out")[1]["times"] == pytest.approx(read_video(path).times[5:9], abs=1e-5)


def test_a_video_shorter_than_its_header_says_is_explained_where_it_has_frames(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with av.open("cut.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for image in np.random.default_rng(0).integers(0, 256, (150, 32, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    data = Path("cut.mkv").read_bytes()
    Path("cut.mkv").write_bytes(data[: len(data) // 3])
    assert main(["explain", "cut.mkv", *OWN, "-o", "out"]) == 0
    assert "captum-dtd: warning: cut.mkv is damaged or cut short" in capsys.readouterr().err
    record = read(folder / "out")[1]
    assert 0 < record["start"] < 10
    assert record["loop_padded"] is False


def test_the_order_of_channels_is_told(folder: Path) -> None:
    for order in ("RGB", "BGR"):
        frames = np.zeros((4, 16, 16, 3), np.uint8)
        frames[..., 0] = 200
        write_video("red.mp4", frames, 10)
        arguments = ["--model", "tiny_video_net:Brightest", *SETTINGS, "--order", order]
        assert main(["explain", "red.mp4", *arguments, "-o", "out"]) == 0
        record = read(folder / "out")[1]
        assert (record["target"], record["preprocessing"]["order"]) == (order.index("R"), order)
        red, _, blue = np.asarray(Image.open("out/contact_sheet.png").convert("RGB")).reshape(-1, 3).astype(int).T
        assert (red - blue > 100).mean() > 0.05  # the frames are shown in their own colours


def test_known_preprocessing_can_be_changed(folder: Path) -> None:
    changed = ["--model", "c3d_mini", "--frames", "8", "--size", "40", "48", "--quiet"]
    assert main(["explain", "clip.mp4", *changed, "-o", "out"]) == 0
    maps, record = read(folder / "out")
    assert maps["total"].shape == (8, 40, 48)
    assert record["preprocessing"]["frames"] == 8
    assert record["preprocessing"]["channels"] == 3


def test_progress_is_shown_unless_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = ["explain", "clip.mp4", *OWN[:-1], "--preset", "hiley2019", "-o", "out"]
    assert main(loud) == 0
    assert "classifying" in capsys.readouterr().err
    assert main([*loud, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


BAD: list[tuple[list[str], str]] = [
    (["missing.mp4", *OWN], "missing.mp4"),
    ([".", *OWN], "directory"),
    (["empty.mp4", *OWN], "empty.mp4 is empty"),
    (["text.mp4", *OWN], "text.mp4 is not a video"),
    (["generated:sleep", *OWN], "jack"),
    (["clip.mp4", "--model", "r4d_18"], "r4d_18"),
    (["clip.mp4", "--model", "tiny_video_net:nothing", *SETTINGS], "nothing"),
    (["clip.mp4", "--model", "tiny_video_net:net"], "give --size --mean --std --frames"),
    (["clip.mp4", "--model", "tiny_video_net:net", "--size", "16", "--frames", "4"], "give --mean --std"),
    (["clip.mp4", "--model", "tiny_video_net:broken", *SETTINGS], "KeyError"),
    (
        ["clip.mp4", "--model", "tiny_video_net:spoilt", *SETTINGS],
        r"the relevance of clip\.mp4 is not finite: .*spoilt",
    ),
    (["clip.mp4", "--model", "tiny_video_net:features", *SETTINGS], r"\(clips, classes\)"),
    (["clip.mp4", "--model", "tiny_video_net:Unsupported", *SETTINGS], "cumsum"),
    (["clip.mp4", *OWN, "--frames", "1"], r"cannot run on a clip of shape \(1, 3, 1, 16, 16\)"),
    (["clip.mp4", *OWN, "--weights", "other.safetensors"], "other.safetensors"),
    (["clip.mp4", *OWN, "--weights", "pickle.pt"], "pickle.pt"),
    (["clip.mp4", *OWN, "--weights", "nowhere.pt"], "nowhere.pt"),
    (["clip.mp4", *OWN, "--start", "2.5"], r"beyond the end of clip.mp4, which is 2\.00 s"),
    (["clip.mp4", *OWN, "--start", "-1"], "start"),
    (["clip.mp4", *OWN, "--preset", "hiley2019", "--readout", "own"], "hiley2019"),
    (["clip.mp4", *OWN, "--mean", "0.1", "0.2"], "mean needs one value"),
    (["clip.mp4", *OWN, "--std", "0"], "std"),
    (["clip.mp4", *OWN, "--stride", "0"], "stride must be at least 1, not 4 and 0"),
    (["clip.mp4", *OWN, "--num-classes", "0"], "num_classes must be at least 1, not 0"),
    (["clip.mp4", *OWN, "--size", "1", "2", "3"], "--size"),
    (["clip.mp4", *OWN, "--percentile", "0"], "percentile"),
    (["clip.mp4", *OWN, "--internal-batch-size", "0"], "internal_batch_size"),
    (["clip.mp4", *OWN, "--classes", "missing.txt"], "missing.txt"),
    (["clip.mp4", *OWN, "--device", "toaster"], "device must be cpu, cuda, cuda:1, ..., not 'toaster'"),
    (["clip.mp4", *OWN, "--device", "meta"], "device 'meta' does not compute here: "),
    (["clip.mp4", *OWN, "--readout", "last"], "--readout"),
    (["clip.mp4", *OWN, "--frames", "four"], "--frames"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(map(str, case[0][-2:])) for case in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from safetensors.torch import save_file

    Path("empty.mp4").touch()
    Path("text.mp4").write_text("not a video\n" * 99)
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    torch.save(nn.Linear(2, 2), "pickle.pt")
    assert re.search(message, fails(folder, capsys, ["explain", *arguments, "-o", "new/out"]))


@pytest.mark.parametrize("output", ["clip.mp4", "clip.mp4/out", "taken"])
def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    (folder / "taken" / "overlay.mp4").mkdir(parents=True)
    assert output in fails(folder, capsys, ["explain", "clip.mp4", *OWN, "-o", output])


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_late_in_the_run_leaves_the_folder_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    Path("old").mkdir()
    Path("old/overlay.mp4").write_text("from before")
    monkeypatch.setattr(cli, "write_contact_sheet", fail)
    before = left_over(folder)
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    for output in ("old", "new/out"):
        assert main(["explain", "clip.mp4", *OWN, "-o", output]) == code
        assert capsys.readouterr().err.count("\n") == 1
        assert left_over(folder) == before
    assert left_over(folder / "old") == ["overlay.mp4"]
    assert Path("old/overlay.mp4").read_text() == "from before"


def test_files_of_an_earlier_run_are_replaced(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("keep")
    for _ in range(2):
        assert main(["explain", "clip.mp4", *OWN, "-o", "out"]) == 0
    assert left_over(folder / "out") == sorted([*FILES, "notes.txt"])


def test_without_an_output_folder_one_is_named_after_the_video(folder: Path) -> None:
    assert main(["explain", "clip.mp4", *OWN]) == 0
    assert left_over(folder / "captum_dtd_clip") == FILES


def test_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "VIDEO" in fails(folder, capsys, ["explain"])
    assert "explain" in fails(folder, capsys, [])
    assert "dance" in fails(folder, capsys, ["dance"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"captum-dtd {__version__}\n"
    assert main(["explain", "--help"]) == 0
    assert "--preset" in capsys.readouterr().out


def test_precision_is_recorded_and_changes_little(folder: Path) -> None:
    assert main(["explain", "clip.mp4", *OWN, "--quiet", "--precision", "bfloat16", "-o", "rough"]) == 0
    assert main(["explain", "clip.mp4", *OWN, "--quiet", "--precision", "ieee", "-o", "exact"]) == 0
    (rough, record), (exact, _) = read(folder / "rough"), read(folder / "exact")
    assert record["precision"] == "bfloat16"
    distance = (rough["total"] - exact["total"]).norm() / exact["total"].norm()
    assert distance <= 0.05


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in (f"captum_dtd {__version__}", "torch", "captum", "cpu:", "ok: relevance sums"):
        assert line in out
    for device in ("cpu", "cuda"):  # its compiled kernels, or why there are none
        (kernels,) = [line for line in out.splitlines() if line.startswith(f"  {device}: ") and "reference" in line]
        assert native.missing.get(device, "/ieee" if device == "cpu" else "cuda/") in kernels
    assert out.count("ok: ") == 2
    assert "FAILED" not in out
    monkeypatch.setitem(doctor._OPTIONAL, "no_such_module", ("does nothing", "pip install nothing"))
    monkeypatch.setattr(doctor, "self_check", lambda: [("relevance sums to the logit", False)])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: relevance sums to the logit" in out
    assert "pip install nothing" in out


def test_doctor_goes_on_where_an_import_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "unfitting.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(doctor._OPTIONAL, "unfitting", ("does nothing", "pip install nothing"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "unfitting    BROKEN, its import fails: RuntimeError: operator nms does not exist" in out
    assert "ok: relevance sums" in out


@pytest.mark.parametrize("last", ["Sigmoid()", "Softmax(1)", "LogSoftmax(1)", "Identity()"])
def test_probabilities_are_the_models_own(folder: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    (folder / "ends.py").write_text(
        "from torch import nn\nfrom captum_dtd.models import c3d_mini\n"
        f"def build():\n    return nn.Sequential(c3d_mini(num_classes=3), nn.{last})\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "ends", raising=False)
    torch.manual_seed(0)
    options = ["--size", "32", "32", "--mean", "0.5", "--std", "0.5", "--frames", "4", "--target", "1", "--quiet"]
    assert main(["explain", "generated:jack", "--model", "ends:build", *options, "-o", "out"]) == 0
    _, record = read(folder / "out")
    torch.manual_seed(0)
    monkeypatch.setattr(cli, "_probabilities", lambda outputs, _: outputs)
    assert main(["explain", "generated:jack", "--model", "ends:build", *options, "-o", "again"]) == 0
    own = read(folder / "again")[1]["probability"]  # the model's output
    if last == "Identity()":
        assert record["probability"] != own and 0 < record["probability"] < 1
    else:
        assert record["probability"] == pytest.approx(math.exp(own) if last == "LogSoftmax(1)" else own)


def test_real_clips(folder: Path, data: Path) -> None:
    right = 0
    names = [line.split()[0] for line in (data / "ucf10_64px" / "vallist.txt").read_text().splitlines()]
    chosen = names[5 :: len(names) // 5][:5]
    for name in chosen:
        assert main(["explain", str(data / "ucf10_64px" / name), "--model", "c3d_mini", "--quiet", "-o", "out"]) == 0
        maps, record = read(folder / "out")
        assert maps["total"].sum().item() == pytest.approx(record["score"], rel=1e-3)
        assert record["low"] == pytest.approx(Preprocessing.from_dict(record["preprocessing"]).bounds[0].tolist())
        right += record["class"] == name.split("/")[0]
    assert len(chosen) == 5
    assert right >= 3
