"""Whole networks whose explanations are measured: with which weights, on which clips, by which contenders.

Weights and clips are random, from one seed. `WORKLOADS` is the registry, in the order in which it is measured; `CURVES` adds
the sizes and numbers of clips over which cost is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workloads import HIGH, LOW

from captum_dtd import pixel_bounds
from captum_dtd.kernels import Precision
from captum_dtd.models import C3D, c3d_mini

SEED = 0


@dataclass(frozen=True)
class Network:
    """A network, its pixels, and the size of its clips.

    Attributes:
        name: as in the tables.
        build: makes it, for this number of frames and these pixels, or thin, of the same kind but with few channels.
        size: height and width of its clips.
        small: frames, height and width of a clip in a smoke test.
        low: the darkest possible pixel, one value per channel.
        high: the brightest possible pixel.
    """

    name: str
    build: Callable[[int, bool], nn.Module]
    size: int
    small: tuple[int, int]
    low: tuple[float, ...]
    high: tuple[float, ...]


def _c3d(frames: int, thin: bool) -> nn.Module:
    """C3D; thin, with a sixteenth of the channels, and for clips of 32 x 32 pixels."""
    with torch.device("meta" if thin else "cpu"):
        model = C3D(frames=frames)
    for name, module in model.named_children() if thin else ():
        if isinstance(module, nn.Conv3d):
            setattr(model, name, nn.Conv3d(max(3, module.in_channels // 16), module.out_channels // 16, 3, padding=1))
        elif isinstance(module, nn.Linear):
            inputs = module.in_features // 16 // (4 if name == "fc6" else 1)
            setattr(model, name, nn.Linear(inputs, module.out_features if name == "fc8" else module.out_features // 16))
    return model


def _torchvision(name: str, frames: int, thin: bool) -> nn.Module:
    """A video model of torchvision's, as it is; s3d, when thin, with a last pool that lets the clip be small."""
    from torchvision.models import video

    model: Any = getattr(video, name)(weights=None)
    if name == "s3d" and thin:
        model.avgpool = nn.AvgPool3d((1, 2, 2), stride=1)
    return model  # type: ignore[no-any-return]


def _kinetics(name: str, size: int, small: tuple[int, int]) -> Network:
    """One of torchvision's networks, whose pixels are normalised as for Kinetics."""
    low, high = pixel_bounds((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    return Network(name, partial(_torchvision, name), size, small, tuple(low.tolist()), tuple(high.tolist()))


C3D_ = Network("C3D", _c3d, 112, (16, 32), LOW, HIGH)
R3D_18 = _kinetics("r3d_18", 112, (2, 16))
R2PLUS1D_18 = _kinetics("r2plus1d_18", 112, (2, 16))
S3D = _kinetics("s3d", 224, (8, 64))
C3D_MINI = Network("c3d_mini", lambda frames, thin: c3d_mini(), 56, (4, 16), (0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class Question:
    """What every contender is asked: the relevance of some clips' pixels for one class.

    Attributes:
        model: in evaluation mode.
        clips: (N, C, T, H, W).
        target: the class of the first clip's highest score.
        score: of the target, summed over the clips.
        low: the darkest possible pixel, one value per channel.
        high: the brightest possible pixel.
        flops: of the model's convolutions and linear layers, forward.
    """

    model: nn.Module
    clips: Tensor
    target: int
    score: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    flops: int

    @property
    def frames(self) -> int:
        """T."""
        return self.clips.shape[2]

    def frozen(self, frame: int) -> Tensor:
        """The clips that repeat this frame."""
        return self.clips[:, :, frame : frame + 1].expand_as(self.clips).contiguous()


ALL = get_args(Precision)


@dataclass(frozen=True)
class Workload:
    """A network on clips of a size, and who explains them.

    Attributes:
        network: of `Network`.
        frames: T.
        precisions: of ours.
        peers: names in `peers.PEERS`.
        size: height and width, if not the network's own.
        clips: N.
        job: whether the whole job, the clip and its T frozen clips, is measured too.
        memory: whether peak memory is measured, in processes of their own.
    """

    network: Network
    frames: int
    precisions: tuple[Precision, ...] = ALL
    peers: tuple[str, ...] = ()
    size: int | None = None
    clips: int = 1
    job: bool = True
    memory: bool = False

    def __str__(self) -> str:
        size = f" of {self.size} pixels" if self.size else ""
        clips = f", {self.clips} clips" if self.clips > 1 else ""
        return f"{self.network.name}, {self.frames} frames{size}{clips}"

    def posed(self, small: bool = False) -> Question:
        """The question, from the seed alone; ``small`` asks it of a thin network and a small clip."""
        network = self.network
        frames, size = network.small if small else (self.frames, self.size or network.size)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            model = _with_statistics(network.build(frames, small)).eval()
            low, high = (torch.tensor(bound).view(1, -1, 1, 1, 1) for bound in (network.low, network.high))
            clips = low + (high - low) * torch.rand(self.clips, 3, frames, size, size)
            with FlopCounterMode(display=False) as counter:
                scores = model(clips)
        target = int(scores[0].argmax())
        score = float(scores[:, target].double().sum())
        return Question(model, clips, target, score, network.low, network.high, counter.get_total_flops())


def _with_statistics(model: nn.Module) -> nn.Module:
    """The model with batch norms as after training: freshly made ones would change nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.7, 1.4)
            module.bias.normal_(0.1, 0.1)
    return model


OUTER: tuple[Precision, ...] = ("ieee", "bfloat16")
USUAL = ("zennit", "plain torch", "captum LRP", "input x gradient")
EVERYBODY = (*USUAL, "plain torch, compiled", "integrated gradients")

WORKLOADS = (
    Workload(C3D_, 16, peers=EVERYBODY, memory=True),
    Workload(R3D_18, 16, ("ieee", "float32", "bfloat16"), USUAL),
    Workload(C3D_, 32, peers=("zennit", "plain torch")),
    Workload(S3D, 16, ("ieee", "float32", "bfloat16"), USUAL),
    Workload(R2PLUS1D_18, 16, OUTER, USUAL),
    Workload(C3D_MINI, 16, peers=EVERYBODY),
    *(Workload(C3D_MINI, frames, peers=USUAL) for frames in (32, 64)),
    Workload(R3D_18, 32, OUTER, ("plain torch",)),
)

CURVES = (
    *(Workload(R3D_18, 16, OUTER, ("plain torch",), size, job=False) for size in (56, 160)),
    *(Workload(R3D_18, 16, OUTER, ("plain torch",), 56, clips, job=False) for clips in (2, 4, 8)),
    Workload(C3D_, 64, ("bfloat16",), ("plain torch",)),
    Workload(R3D_18, 64, ("bfloat16",), ("plain torch",)),
    *(Workload(network, frames, OUTER, ("plain torch",)) for network in (S3D, R2PLUS1D_18) for frames in (32, 64)),
)
"""Beside `WORKLOADS`: cost against pixels, clips at once, and more frames."""


def named(name: str) -> Workload:
    """The workload of that name."""
    return next(workload for workload in (*WORKLOADS, *CURVES) if str(workload) == name)
