"""Which networks of other libraries can be explained, how much of the score arrives, and how long that takes.

    pip install torchvision pytorchvideo transformers timm monai     # those that are not there are left out
    python benchmarks/model_zoo.py
    python benchmarks/model_zoo.py --only "timm|x3d" --out zoo.md

Every network has random weights and explains its score of class 0 on one random clip by the default rules. A row says what part
of the score arrives at the pixels (z+ conserves it where activations are not negative), or which operations are refused. Networks
of images see every frame by itself, and their logits are averaged.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import Tensor, nn

from captum_dtd import DeepTaylor, UnsupportedOperationError

CLASSES = 7
_LITTLE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "num_labels": CLASSES}


@dataclass(frozen=True)
class Entry:
    """A network: its library, its name, what makes it, and frames, height and width of its clips."""

    library: str
    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.library} {self.name}"


class Frames(nn.Module):
    """A network of images as one of clips: the mean of its logits over the frames."""

    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of clips (N, 3, T, H, W)."""
        logits: Tensor = self.images(x.transpose(1, 2).flatten(0, 1))
        return logits.view(len(x), -1, logits.shape[1]).mean(1)


class Logits(nn.Module):
    """A network of transformers, which takes frames before channels, by name, and returns its logits in an object."""

    def __init__(self, network: nn.Module, argument: str = "pixel_values") -> None:
        super().__init__()
        self.network = network
        self.argument = argument

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of clips (N, 3, T, H, W)."""
        logits: Tensor = self.network(**{self.argument: x.transpose(1, 2)}).logits
        return logits


class Pathways(nn.Module):
    """A SlowFast network, which is given every fourth frame apart."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of clips (N, 3, T, H, W)."""
        logits: Tensor = self.network([x[:, :, ::4], x])
        return logits


def torchvision() -> Iterator[Entry]:
    """Every network for videos, by its name."""
    models: Any = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models.video):
        size = (16, 224, 224) if name.startswith(("mvit", "s3d")) else (16, 112, 112)
        yield Entry("torchvision", name, partial(models.get_model, name, weights=None), size)


def pytorchvideo() -> Iterator[Entry]:
    """Those of its hub that take one tensor, and SlowFast."""
    hub: Any = importlib.import_module("pytorchvideo.models.hub")
    frames = {"slow_r50": 8, "i3d_r50": 8, "c2d_r50": 8, "x3d_xs": 4, "csn_r101": 32, "r2plus1d_r50": 16}
    for name, count in frames.items():
        size = 160 if name.startswith("x3d") else 224
        yield Entry("pytorchvideo", name, partial(getattr(hub, name), pretrained=False), (count, size, size))
    yield Entry("pytorchvideo", "slowfast_r50", lambda: Pathways(hub.slowfast_r50(pretrained=False)), (32, 224, 224))


def transformers() -> Iterator[Entry]:
    """Its video classifiers, little ones."""
    library: Any = importlib.import_module("transformers")
    patches: dict[str, dict[str, Any]] = {
        "VideoMAE": {"image_size": 32, "num_frames": 8},
        "Timesformer": {"image_size": 32, "num_frames": 8},
        "Vivit": {"image_size": 32, "num_frames": 8, "tubelet_size": [2, 16, 16]},
    }
    for name, options in patches.items():
        network, config = (getattr(library, f"{name}{end}") for end in ("ForVideoClassification", "Config"))
        make = partial(_of_transformers, network, config, "pixel_values", options | {"intermediate_size": 96} | _LITTLE)
        yield Entry("transformers", name, make, (8, 32, 32))
    predictor = {f"pred_{name}": value for name, value in _LITTLE.items() if name != "num_labels"}
    options = {"crop_size": 32, "frames_per_clip": 8, "mlp_ratio": 2, "num_pooler_layers": 1} | predictor | _LITTLE
    make = partial(
        _of_transformers,
        library.VJEPA2ForVideoClassification,
        library.VJEPA2Config,
        "pixel_values_videos",
        options,
    )
    yield Entry("transformers", "VJEPA2", make, (8, 32, 32))


def _of_transformers(network: Any, config: Any, argument: str, options: dict[str, Any]) -> nn.Module:
    return Logits(network(config(**options)), argument)


def timm() -> Iterator[Entry]:
    """One network for images of each of many kinds."""
    library: Any = importlib.import_module("timm")
    kinds = {
        192: ("mobilenetv3_small_050", "regnetx_002", "ghostnet_050", "densenet121", "dla34", "hrnet_w18_small"),
        224: (
            *("resnet18", "resnetv2_50", "skresnet18", "ecaresnet50t", "nfnet_f0", "vovnet39a", "tresnet_m"),
            *("efficientnet_b0", "inception_v3", "hgnetv2_b0", "repvit_m0_9", "fastvit_t8", "starnet_s1"),
            *("convnext_atto", "convmixer_768_32", "poolformer_s12", "mambaout_femto", "focalnet_tiny_srf"),
            *("vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"),
            *("swin_tiny_patch4_window7_224", "twins_svt_small", "pvt_v2_b0", "xcit_nano_12_p16_224", "levit_128s"),
            *("mvitv2_tiny", "davit_tiny", "tiny_vit_5m_224", "visformer_tiny", "volo_d1_224", "efficientvit_b0"),
            *("coatnet_pico_rw_224", "edgenext_xx_small", "mobilevit_xxs", "gmlp_s16_224", "resmlp_12_224"),
        ),
        240: ("crossvit_tiny_240",),
        256: ("gcresnet33ts", "halonet26t", "botnet26t_256", "lambda_resnet26t", "maxvit_rmlp_pico_rw_256"),
    }
    for size, names in kinds.items():
        for name in names:
            yield Entry("timm", name, partial(_of_timm, library, name), (2, size, size))


def _of_timm(library: Any, name: str) -> nn.Module:
    return Frames(library.create_model(name, num_classes=CLASSES))


def monai() -> Iterator[Entry]:
    """Its classifiers of volumes."""
    nets: Any = importlib.import_module("monai.networks.nets")
    three = {"spatial_dims": 3}
    yield Entry(
        "monai", "resnet18", lambda: nets.resnet18(**three, n_input_channels=3, num_classes=CLASSES), (8, 32, 32)
    )
    yield Entry(
        "monai",
        "DenseNet121",
        lambda: nets.DenseNet121(**three, in_channels=3, out_channels=CLASSES),
        (32, 32, 32),
    )
    yield Entry(
        "monai", "SEResNet50", lambda: nets.SEResNet50(**three, in_channels=3, num_classes=CLASSES), (32, 64, 64)
    )
    yield Entry(
        "monai",
        "EfficientNetBN b0",
        lambda: nets.EfficientNetBN("efficientnet-b0", **three, pretrained=False, in_channels=3, num_classes=CLASSES),
        (32, 64, 64),
    )


LIBRARIES = (torchvision, pytorchvideo, transformers, timm, monai)
"""What yields the entries of a library, under its name."""


@dataclass(frozen=True)
class Row:
    """What came of an entry: ``found`` says it in words."""

    entry: Entry
    found: str
    seconds: float

    def __str__(self) -> str:
        clip = "x".join(map(str, self.entry.size))
        return f"| {self.entry.library} | {self.entry.name} | {clip} | {self.found} | {self.seconds:.1f} |"


def explained(entry: Entry) -> Row:
    """Explain the network's score of class 0, or find out what is refused."""
    torch.manual_seed(0)
    with redirect_stderr(StringIO()):
        model = entry.make().eval()
    x = torch.rand(1, 3, *entry.size)
    begun = time.perf_counter()
    try:
        relevance, delta = DeepTaylor(model, 0.0, 1.0).attribute(x, 0, return_convergence_delta=True)
        arrived = float(relevance.sum())
        score = arrived + float(delta)
        share = "score 0" if score == 0 else f"{round(100 * arrived / score)} % of the score"
        found = share if bool(torch.isfinite(relevance).all()) else "not finite"
    except UnsupportedOperationError as refusal:
        names = Counter(re.findall(r"^  (\w+) +in ", str(refusal), re.MULTILINE))
        found = "refused: " + ", ".join(f"{name} ({count})" for name, count in names.items())
    return Row(entry, found, time.perf_counter() - begun)


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown."""
    libraries = dict.fromkeys(row.entry.library for row in rows)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", *libraries))
    about = machine()
    yield f"One explanation each on {about['cpu']} ({about['feature_level']}), {about['threads']} thread(s), {about['date']};"
    yield f"commit {about['commit']}, {', '.join(versions)}. Seconds are of one run and include tracing."
    yield ""
    yield "| library | network | clip | arrives at the pixels | s |"
    yield "| --- | --- | --- | --- | --- |"
    yield from map(str, rows)


def main(arguments: list[str] | None = None) -> None:
    """Explain what is installed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="of 'library network'")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for library in LIBRARIES:
        if importlib.util.find_spec(library.__name__) is None:
            continue
        for entry in library():
            if re.search(given.only, str(entry)):
                rows.append(explained(entry))
                print(rows[-1], file=sys.stderr, flush=True)
    lines = "\n".join(table(rows)) + "\n"
    print(lines)
    if given.out:
        given.out.write_text(lines)


if __name__ == "__main__":
    main()
