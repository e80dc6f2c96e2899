"""What both training scripts share: the optimisation, the evaluation, the checkpoint and the record of the result."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from captum_dtd.models import C3DMini, c3d_mini
from captum_dtd.video.preprocess import Preprocessing

# A clip (C, T, H, W) with its motion changed: what is left of the accuracy tells how much of it was motion.
ALTERATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "as recorded": lambda clip, generator: clip,
    "frozen": lambda clip, generator: clip[:, clip.shape[1] // 2, None].expand_as(clip),
    "shuffled": lambda clip, generator: clip[:, torch.randperm(clip.shape[1], generator=generator)],
    "reversed": lambda clip, generator: clip.flip(1),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; AdamW under a one-cycle schedule, and what the last step leaves is the result."""

    steps: int
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0  # parameter of the beta distribution that clips and labels are mixed by; 0: not mixed


def arguments(description: str) -> argparse.Namespace:
    """--data, --seed and --out of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=os.environ.get("CAPTUM_DTD_DATA"), help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the result")
    given = parser.parse_args()
    if given.data is None:
        parser.error("say where the data is: --data, or the environment variable CAPTUM_DTD_DATA")
    given.data = Path(given.data)
    return given


def fit(model: C3DMini, batches: Callable[[torch.Generator], tuple[Tensor, Tensor]], recipe: Recipe, seed: int) -> None:
    """Train in place. ``batches`` draws one batch (clips, labels) from a generator that the seed determines."""
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last_3d)
    # biases and batch norms are not shrunk
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.2
    )
    begun, running = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        clips, labels = batches(generator)
        if recipe.mixup:
            clips, labels = _mixed(clips, F.one_hot(labels, model.num_classes).float(), recipe.mixup)
        # bfloat16 and channels last together halve the time of a step
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(clips.contiguous(memory_format=torch.channels_last_3d))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        running += (loss.item() - running) / min(step, 100)
        if step % 200 == 0:
            print(f"step {step} of {recipe.steps}, loss {running:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


def _mixed(clips: Tensor, targets: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): the batch and the same batch in another order, in random proportion."""
    share = torch.distributions.Beta(concentration, concentration).sample()
    other = torch.randperm(len(clips))
    return torch.lerp(clips[other], clips, share), torch.lerp(targets[other], targets, share)


def accuracies(model: nn.Module, videos: list[Tensor], labels: list[int], info: dict[str, Any]) -> dict[str, float]:
    """Fraction of videos (C, T, H, W), not yet cropped, classified rightly, with their motion as recorded and altered.

    A video's class is that of the mean probability over its first, middle and last clip, each cropped in the middle and
    at the corners, and mirrored. ``one view`` is the middle of the middle clip alone, which is what the command line
    explains.
    """
    right = dict.fromkeys([*ALTERATIONS, "one view"], 0)
    for video, label in zip(videos, labels, strict=True):
        spare = max(0, video.shape[1] - (info["frames"] - 1) * info["stride"] - 1)
        for name, alter in ALTERATIONS.items():
            generator = torch.Generator().manual_seed(0)
            views = []
            for start in dict.fromkeys((spare // 2, 0, spare)):
                indices = start + torch.arange(info["frames"]) * info["stride"] % (video.shape[1] - start)
                views += _crops(alter(video[:, indices], generator), info["size"])
            batch = torch.stack(views)
            with torch.no_grad():
                probability = model(torch.cat([batch, batch.flip(-1)])).softmax(1)
            right[name] += int(probability.mean(0).argmax() == label)
            if name == "as recorded":
                right["one view"] += int(probability[0].argmax() == label)
    return {name: count / len(videos) for name, count in right.items()}


def _crops(clip: Tensor, size: list[int]) -> list[Tensor]:
    """The middle first, then the four corners, unless they are the same."""
    spare_y, spare_x = clip.shape[-2] - size[0], clip.shape[-1] - size[1]
    places = [(spare_y // 2, spare_x // 2), (0, 0), (0, spare_x), (spare_y, 0), (spare_y, spare_x)]
    return [clip[..., y : y + size[0], x : x + size[1]] for y, x in dict.fromkeys(places)]


def run(
    name: str,
    info: dict[str, Any],
    recipe: Recipe,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    held_out: tuple[list[Tensor], list[int]],
    given: argparse.Namespace,
) -> None:
    """Train one seed, evaluate its last step on the held-out videos, write the checkpoint and the result."""
    torch.manual_seed(given.seed)
    model = c3d_mini(info["num_classes"], info["in_channels"])
    begun = time.monotonic()
    fit(model, batches, recipe, given.seed)
    seconds = time.monotonic() - begun
    given.out.mkdir(parents=True, exist_ok=True)
    _save(model, info, given.out / f"{name}_seed{given.seed}.safetensors")
    result = accuracies(model, *held_out, info)
    print(json.dumps(result))
    record = {"accuracy": result, "seconds": round(seconds), "threads": torch.get_num_threads()}
    _record(given.out / f"train_{name}.json", given.seed, record, recipe, len(held_out[0]))


def _save(model: C3DMini, info: dict[str, Any], path: Path) -> None:
    """Write float16 weights, and round the model's own to them, so that what is evaluated is what is stored."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    state = {key: value.contiguous() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(state, path, metadata={key: json.dumps(value) for key, value in info.items()})
    model.load_state_dict(state, strict=False)


def _record(path: Path, seed: int, record: dict[str, Any], recipe: Recipe, held_out: int) -> None:
    """Add a seed's result to the file of all seeds, and bring their mean and spread up to date."""
    runs = json.loads(path.read_text())["seeds"] if path.exists() else {}
    runs[str(seed)] = record
    names = record["accuracy"]
    table = {name: [run["accuracy"][name] for run in runs.values()] for name in names}
    result = {
        "held_out": held_out,
        "mean": {name: round(statistics.mean(values), 4) for name, values in table.items()},
        "standard_deviation": {name: round(statistics.pstdev(values), 4) for name, values in table.items()},
        "seeds": dict(sorted(runs.items())),
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def _cpu() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def between(low: float, high: float, generator: torch.Generator) -> float:
    """A number drawn evenly between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def chance(n: int, generator: torch.Generator) -> int:
    """An integer drawn evenly from 0 to n - 1."""
    return int(torch.randint(n, (), generator=generator))


def prepared(frames: Any, info: dict[str, Any]) -> Tensor:
    """All frames (T, H, W, 3) of a video as the package itself prepares them, but not cropped: (C, T, h, w)."""
    keys = ("frames", "stride", "resize", "mean", "std", "scale", "channels")
    return Preprocessing.from_dict({"size": info["resize"], **{key: info[key] for key in keys}})(frames)
