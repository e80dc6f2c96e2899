"""The command line: ``captum-dtd explain``, ``dataset``, ``summary``, ``export`` and ``doctor``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from captum_dtd import __version__, doctor
from captum_dtd.kernels import Precision
from captum_dtd.recipe import Explainer, Recipe, class_index, read_classes
from captum_dtd.video import (
    Clip,
    Preprocessing,
    Video,
    VideoError,
    iter_clips,
    iter_frames,
    probe,
    read_video,
    read_windows,
    sample_clip,
    shared_scale,
    write_contact_sheet,
    write_overlay,
)
from captum_dtd.video.synthetic import ACTIONS, moving_figure

__all__ = ["main"]

RELEVANCE, OVERLAY, SHEET = "relevance.safetensors", "overlay.mp4", "contact_sheet.png"

_GENERATED, _ACTION = "generated", "jack"
_GENERATED_FRAMES, _GENERATED_FPS = 64, 25.0
# Options that are a recipe's attributes, and those that change its preprocessing
_NAMED = ("model", "weights", "num_classes", "preset", "readout", "normalize", "composite", "precision")
_PREPROCESSING = ("size", "mean", "std", "scale", "channels", "order", "frames", "stride")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0: all is well. 1: doctor found a fault, or some clips of a data set failed or were left out. 2: an error, told in one line.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Example::

        main(["explain", "generated:jack", "--model", "c3d_mini", "--weights", "weizmann", "-o", "out"])
    """
    with _outlasting_readers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = _show_warning
        try:
            args = _parser().parse_args(argv)
            code: int = args.run(args)
            return code
        except SystemExit as done:  # --help and --version
            return int(done.code or 0)
        except KeyboardInterrupt:
            print("captum-dtd: interrupted, nothing was written", file=sys.stderr)
            return 130
        except Exception as error:  # whatever a user's model raises too: one line, no traceback
            expected = isinstance(error, (ValueError, TypeError, ImportError, OSError))
            text = " ".join(str(error).split()) or type(error).__name__
            print("captum-dtd: error: " + (text if expected else f"{type(error).__name__}: {text}"), file=sys.stderr)
            return 2


class _Outlasting:
    """A standard stream whose reader may leave, as in "| head -1": what is written then goes nowhere.

    ``left`` is what says so; of a terminal that is gone, any error.
    """

    def __init__(self, stream: TextIO, left: type[OSError]) -> None:
        self._stream = stream
        self._left = left

    def write(self, text: str) -> int:
        with self._without_a_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_a_reader():
            self._stream.flush()

    @contextmanager
    def _without_a_reader(self) -> Iterator[None]:
        try:
            yield
        except self._left:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _outlasting_readers() -> Iterator[None]:
    """Work is done, and an exit code tells how, whoever reads what is printed meanwhile."""
    with open(os.devnull, "w") as nowhere:  # streams that were closed before are None
        # What is printed may be a result, which a full disk must not swallow.
        out, err = _Outlasting(sys.stdout or nowhere, BrokenPipeError), _Outlasting(sys.stderr or nowhere, OSError)
        with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                out.flush()
                err.flush()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="captum-dtd", description="Explain video classifiers by deep Taylor decomposition.")
    parser.add_argument("--version", action="version", version=f"captum-dtd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{explain,dataset,summary,export,doctor}")

    explain = commands.add_parser("explain", help="explain one clip: relevance, an overlay video, a contact sheet")
    explain.set_defaults(run=_explain)
    explain.add_argument("video", metavar="VIDEO", help=f"a file, or generated[:ACTION] ({', '.join(ACTIONS)})")
    explain.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder (default: captum_dtd_VIDEO)")
    explain.add_argument(
        "--target",
        metavar="NAME|INDEX",
        help="class to explain (default: the clip's top class, under --preset the video's)",
    )
    explain.add_argument("--start", type=float, metavar="SECONDS", help="of the clip (default: in the middle)")
    explain.add_argument("--percentile", type=float, default=99.5, help="of |relevance| that gets full colour")
    explain.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    _add_recipe(explain)

    dataset = commands.add_parser("dataset", help="explain every clip of a data set; go on where a run stopped")
    dataset.set_defaults(run=_dataset)
    dataset.add_argument(
        "root", metavar="ROOT", help="a folder with a folder per class, UCF-101, or a CSV or parquet table"
    )
    dataset.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder of the store")
    dataset.add_argument("--list", metavar="FILE", nargs="+", default=[], help="take only these videos: testlist01.txt")
    dataset.add_argument(
        "--target",
        metavar="WHICH",
        help="label, top1 of the clip, video (top-1 of its clips' mean), column:NAME (default: top1, or video by --preset)",
    )
    dataset.add_argument("--clip-stride", type=int, metavar="N", help="frames from clip to clip (default: no overlap)")
    dataset.add_argument(
        "--maps", metavar="A,B", default="spatial,temporal", help="two of spatial,temporal,total; none keeps statistics"
    )
    dataset.add_argument("--encoding", choices=["float32", "float16", "int8"], default="float16", help="of maps")
    dataset.add_argument("--batch-clips", type=int, metavar="N", default=4, help="clips explained together")
    dataset.add_argument("--shard-clips", type=int, metavar="N", help="clips committed together (default: a minute's)")
    dataset.add_argument(
        "--device", nargs="+", help="a process each: cuda:0 cuda:1, cpu cpu (default: every GPU or core)"
    )
    dataset.add_argument("--decoders", type=int, metavar="N", help="processes that decode, for each device")
    dataset.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a Ray cluster")
    dataset.add_argument("--retry-failed", action="store_true", help="explain videos again of which a clip failed")
    _add_recipe(dataset)

    summary = commands.add_parser("summary", help="what a data set's store says, by class, by frame and by clip")
    summary.set_defaults(run=_summary)
    summary.add_argument("store", metavar="OUT", type=Path, help="folder that dataset wrote, finished or not")
    summary.add_argument(
        "--top", type=int, metavar="N", default=10, help="how many clips most driven by motion, and not"
    )
    summary.add_argument("--csv", metavar="FILE", type=Path, help="also write a line for each class")
    summary.add_argument("--json", metavar="FILE", type=Path, help="also write everything")
    summary.add_argument("--plots", metavar="DIR", type=Path, help="also draw it")

    export = commands.add_parser("export", help="a data set's maps as safetensors, WebDataset archives or videos")
    export.set_defaults(run=_export)
    export.add_argument("store", metavar="OUT", type=Path, help="folder that dataset wrote, finished or not")
    export.add_argument("--to", choices=["safetensors", "webdataset", "mp4"], required=True, help="a kind of files")
    export.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder for the files")
    export.add_argument("--rows", type=int, nargs="+", metavar="N", help="only these clips (default: all)")
    export.add_argument("--videos", metavar="DIR", type=Path, help="mp4: ROOT, if it is not where it was")
    export.add_argument("--quiet", action="store_true", help="no progress bar")

    check = commands.add_parser("doctor", help="versions, devices, kernels, and a self-check")
    check.set_defaults(run=lambda args: doctor.run())
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """What says how clips are explained, whatever they come from."""
    parser.add_argument("-m", "--model", required=True, help="c3d_mini, c3d, a torchvision name, module:function")
    parser.add_argument("-w", "--weights", help="a checkpoint file, or a name (c3d_mini: ucf10, weizmann)")
    parser.add_argument("--preset", choices=["hiley2019"], help="all settings of the method's authors")
    parser.add_argument("--readout", choices=["own", "first", "mean"], help="slice of a frozen clip (default: own)")
    parser.add_argument("--normalize", choices=["none", "max", "sum"], help="before subtracting (default: none)")
    parser.add_argument("--composite", choices=["dtd", "epsilon-gamma-box"], default="dtd", help="which rules")
    parser.add_argument("--precision", choices=get_args(Precision), help="what kernels may round (default: float32)")
    parser.add_argument("--internal-batch-size", type=int, metavar="N", help="frozen clips explained at once")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    own = parser.add_argument_group("models whose preprocessing is not known (or to change it)")
    own.add_argument("--size", type=int, nargs="+", metavar="N", help="input HEIGHT WIDTH, or one number for a square")
    own.add_argument(
        "--mean", type=float, nargs="+", metavar="X", help="subtracted, one for each channel, in --order, or for all"
    )
    own.add_argument("--std", type=float, nargs="+", metavar="X", help="divided by, one for each channel or for all")
    own.add_argument("--scale", type=int, choices=[1, 255], help="white, before the mean is subtracted (default: 1)")
    own.add_argument("--channels", type=int, choices=[1, 3], help="1 for grey, 3 for RGB (default: 3)")
    own.add_argument(
        "--order", choices=["RGB", "BGR"], help="of channels; BGR if OpenCV read the frames (default: RGB)"
    )
    own.add_argument("--frames", type=int, metavar="N", help="length of a clip")
    own.add_argument("--stride", type=int, metavar="N", help="every so many frames of the video (default: 1)")
    own.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    own.add_argument("--num-classes", type=int, metavar="N", help="number of the model's outputs")


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.size and len(args.size) > 2:
        raise ValueError(f"--size takes HEIGHT WIDTH or one number, not {len(args.size)} numbers")
    preprocessing = {name: getattr(args, name) for name in _PREPROCESSING if getattr(args, name) is not None}
    return Recipe(
        classes=read_classes(args.classes) if args.classes else None,
        preprocessing=preprocessing,
        **{name: getattr(args, name) for name in _NAMED},
    )


@dataclass(frozen=True)
class _Source:
    """A video file or a generated clip."""

    name: str
    generated: Video | None

    @classmethod
    def find(cls, name: str) -> _Source:
        word, colon, action = name.partition(":")
        if word != _GENERATED:
            probe(name)
            return cls(name, None)
        frames = moving_figure(action if colon else _ACTION, _GENERATED_FRAMES).numpy()
        return cls(name, Video(frames, np.arange(len(frames)) / _GENERATED_FPS, _GENERATED_FPS, name))

    @property
    def stem(self) -> str:
        return self.name.replace(":", "_") if self.generated else Path(self.name).stem

    def clip(self, prepare: Preprocessing, start: float | None) -> tuple[Video, Clip]:
        """The clip at ``start``, or the one in the middle; only about its frames are held in memory."""
        span = (prepare.frames - 1) * prepare.stride + 1
        if self.generated:
            return self.generated, sample_clip(self.generated, prepare.frames, prepare.stride, start)
        if start is not None:
            video = read_video(self.name, start, max_frames=span)
            return video, sample_clip(video, prepare.frames, prepare.stride, frame=0)
        info = probe(self.name)
        if info.duration is not None and info.duration * info.fps > 4 * span:
            with warnings.catch_warnings(), suppress(ValueError):
                warnings.simplefilter("ignore")  # if this part is damaged, the whole is read below, with its warning
                video = read_video(self.name, 0.5 * (info.duration - span / info.fps), max_frames=span)
                if len(video) == span:
                    return video, sample_clip(video, prepare.frames, prepare.stride, frame=0)
        # short, or shorter than its header says: count the frames first
        count = sum(1 for _ in iter_frames(self.name))
        (window,) = read_windows(self.name, [max(0, (count - span) // 2)], span)
        if isinstance(window, VideoError):
            raise window
        return window, sample_clip(window, prepare.frames, prepare.stride, frame=0)

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """All frames, one at a time."""
        return iter(self.generated.frames) if self.generated else (frame for _, frame in iter_frames(self.name))


def _explain(args: argparse.Namespace) -> int:
    source = _Source.find(args.video)
    directory: Path = args.output or Path(f"captum_dtd_{source.stem}")
    with _staging(directory) as staging:
        explainer = _recipe(args).load(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        classes, prepare, device = explainer.classes, explainer.prepare, explainer.device

        video, clip = source.clip(prepare, args.start)
        inputs = prepare(clip.frames)[None].to(device)
        outputs = explainer.outputs(inputs)
        if args.target is not None:
            target = class_index(args.target, classes, outputs.shape[1])
        elif explainer.recipe.default_target == "video":
            target = int(_mean_outputs(explainer, source, args.quiet).argmax())
        else:
            target = int(outputs.argmax())
        relevance, delta = explainer.method.attribute(
            inputs,
            target=target,
            return_convergence_delta=True,
            internal_batch_size=args.internal_batch_size,
            show_progress=not args.quiet,
        )

        maps = {name: getattr(relevance, name)[0].float().cpu().numpy() for name in ("total", "spatial", "temporal")}
        if not all(np.isfinite(values).all() for values in maps.values()):
            raise ValueError(
                f"the relevance of {args.video} is not finite: look for NaN, infinite or very large numbers in the weights "
                f"of {args.model} and in what it computes"
            )
        rules = explainer.method.method.rule_table(inputs)
        moves, looks = np.abs(maps["temporal"]).sum(), np.abs(maps["spatial"]).sum()
        record = {
            "version": __version__,
            "torch": torch.__version__,
            "source": os.fsencode(Path(args.video).name).decode(errors="backslashreplace"),
            "fps": video.fps,
            "start": float(video.times[clip.indices[0]]),
            "times": [round(float(video.times[index]), 6) for index in clip.indices],
            "indices_from_start": (clip.indices - clip.indices[0]).tolist(),
            "loop_padded": clip.looped,
            "model": args.model,
            "weights": explainer.weights,
            "target": target,
            "class": classes[target] if classes else f"class {target}",
            "score": float(explainer.scores(inputs, outputs)[0, target]),
            "probability": float(_probabilities(outputs, bool(rules.notes))[0, target]),
            "preset": args.preset or "none",
            "readout": explainer.method.readout,
            "normalize": explainer.method.normalize,
            "seed": explainer.method.method.seed,
            "composite": args.composite,
            "precision": explainer.method.method.precision,
            "kernels": sorted({row.kernel for row in rules.rows}),
            "low": prepare.bounds[0].tolist(),
            "high": prepare.bounds[1].tolist(),
            "preprocessing": prepare.to_dict(),
            "delta": float(delta[0]),
            "temporal_share": float(moves / max(moves + looks, np.finfo(np.float32).tiny)),
            "percentile": args.percentile,
            "colour_scale": shared_scale(maps.values(), args.percentile),
            "device": str(device),
        }
        _write(staging, prepare.source_crop(clip.frames), maps, record, video.fps / prepare.stride)
    _report(directory, maps["total"].shape, record)
    return 0


def _dataset(args: argparse.Namespace) -> int:
    from captum_dtd.dataset import explain_dataset  # an extra: other commands run without it

    try:
        outcome = explain_dataset(
            args.root,
            args.output,
            _recipe(args),
            target=args.target,
            lists=args.list,
            clip_stride=args.clip_stride,
            maps=() if args.maps == "none" else tuple(name.strip() for name in args.maps.split(",")),
            encoding=args.encoding,
            batch_clips=args.batch_clips,
            internal_batch_size=args.internal_batch_size,
            shard_clips=args.shard_clips,
            engine=args.engine,
            devices=args.device,
            decoders=args.decoders,
            retry_failed=args.retry_failed,
            show_progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print("captum-dtd: interrupted: what is committed stays, and the same command goes on", file=sys.stderr)
        return 130
    print(
        f"{outcome.clips} clips, {outcome.new} of them new: {outcome.clips - outcome.failed} explained, {outcome.failed} failed"
    )
    if outcome.warnings:
        print(f"{outcome.warnings} were explained with a warning: see the column warning")
    if outcome.passed_over:
        print(
            f"{outcome.passed_over} files were passed over: they are no videos by their endings, or in no class's folder"
        )
    if outcome.failed:
        print("the column error says what failed; the same command with --retry-failed tries again")
    print(f"{args.output}: captum_dtd.dataset.open({str(args.output)!r}) reads it")
    return 1 if outcome.failed else 0


def _summary(args: argparse.Namespace) -> int:
    from captum_dtd import dataset

    summary = dataset.summarize(dataset.open(args.store), args.top)
    # Files first: whoever reads what is printed may stop.
    if args.csv:
        summary.write_csv(args.csv)
    if args.json:
        summary.write_json(args.json)
    plots = dataset.write_plots(summary, args.plots) if args.plots else []
    print(summary)
    if plots:
        print("\n" + "\n".join(map(str, plots)))
    return 0


def _export(args: argparse.Namespace) -> int:
    from captum_dtd import dataset

    if args.videos and args.to != "mp4":
        raise ValueError(f"--videos goes with --to mp4, not {args.to}")
    store, progress = dataset.open(args.store), not args.quiet
    try:
        if args.to == "mp4":
            exported = dataset.export_mp4(store, args.output, args.rows, videos=args.videos, show_progress=progress)
        else:
            export = dataset.export_safetensors if args.to == "safetensors" else dataset.export_webdataset
            exported = export(store, args.output, args.rows, show_progress=progress)
    except KeyboardInterrupt:
        print("captum-dtd: interrupted: the files that are whole stay", file=sys.stderr)
        return 130
    for name, why in exported.left_out.items():
        print(f"captum-dtd: left out {name}: {why}", file=sys.stderr)
    print(f"{args.output}: {exported.clips} clips in {exported.files} files, {len(exported.left_out)} left out")
    return 1 if exported.left_out else 0


def _write(
    folder: Path, frames: NDArray[np.uint8], maps: dict[str, NDArray[np.float32]], record: dict[str, Any], fps: float
) -> None:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
    (folder / RELEVANCE).write_bytes(save({name: np.ascontiguousarray(maps[name]) for name in maps}, metadata))
    scale, share = record["colour_scale"], record["temporal_share"]
    headline = f"{record['class']}   score {record['score']:.3g}   probability {record['probability']:.3f}"
    write_overlay(folder / OVERLAY, frames, maps, scale=scale, headline=headline, share=share, fps=fps)
    rows = {"DTD": maps["total"], "spatial": maps["spatial"], "temporal": maps["temporal"]}
    write_contact_sheet(folder / SHEET, frames, rows, scale, f"{headline}   temporal {share:.0%}")


def _report(directory: Path, shape: tuple[int, ...], record: dict[str, Any]) -> None:
    print(
        f"class: {record['class']} (index {record['target']}), score {record['score']:.4g}, "
        f"probability {record['probability']:.3f}"
    )
    print(f"temporal: {record['temporal_share']:.1%} of |relevance|, sum|temporal| / (sum|temporal| + sum|spatial|)")
    for name, shows in (
        (RELEVANCE, f"total, spatial and temporal relevance, {shape} each; every setting in its metadata"),
        (OVERLAY, f"clip, total, spatial, temporal; full colour is |relevance| >= {record['colour_scale']:.3g}"),
        (SHEET, "frames over their total (DTD), spatial and temporal relevance, on the same colour scale"),
    ):
        print(f"{directory / name}: {shows}")


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder to write into. Its files move to ``directory`` at the end; if anything fails, nothing is left."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot write to {directory}: it is a file")
    for name in (RELEVANCE, OVERLAY, SHEET):
        if (directory / name).is_dir():
            raise ValueError(f"cannot write {directory / name}: a folder of that name is in the way")
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    home = missing[-1].parent if missing else directory
    try:
        staging = Path(tempfile.mkdtemp(prefix=".captum-dtd-", dir=home))
    except OSError as error:
        raise ValueError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        yield staging
        directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(staging.iterdir()):
            os.replace(file, directory / file.name)
    except BaseException:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _mean_outputs(explainer: Explainer, source: _Source, quiet: bool) -> Tensor:
    """(1, classes): the mean over the video's clips, which follow each other without overlap."""
    prepare = explainer.prepare
    clips = iter_clips(source.frames(), prepare.frames, prepare.stride)
    outputs = [
        explainer.outputs(prepare(clip)[None].to(explainer.device))
        for clip in tqdm(clips, desc="classifying", unit="clip", disable=quiet, leave=False)
    ]
    return torch.stack(outputs).mean(0)


def _probabilities(outputs: Tensor, ends_in_them: bool) -> Tensor:
    """Softmax, unless the model ends in one, or in a sigmoid for each class; of a log-softmax it is the exponential."""
    done = ends_in_them and bool((outputs >= 0).all())
    return outputs if done else outputs.softmax(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print("captum-dtd: warning: " + " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
