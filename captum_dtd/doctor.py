"""What ``captum-dtd doctor`` prints: the environment, and whether explanations come out right in it."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path

import torch
from torch import nn

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, __version__, native
from captum_dtd.kernels import available

__all__ = ["run", "self_check"]

_NEEDED = ("torch", "captum", "numpy", "safetensors", "tqdm")
_OPTIONAL = {
    "av": ("reads and writes video", "pip install 'captum_dtd[video]'"),
    "matplotlib": ("draws pictures", "pip install 'captum_dtd[video]'"),
    "PIL": ("draws pictures", "pip install 'captum_dtd[video]'"),
    "torchvision": ("has r3d_18, mc3_18, r2plus1d_18, s3d", "pip install 'captum_dtd[models]'"),
    "zarr": ("stores the maps of data sets, on Python 3.11 or newer", "pip install 'captum_dtd[dataset]'"),
    "pyarrow": ("stores the rows of data sets", "pip install 'captum_dtd[dataset]'"),
    "ray": ("explains data sets on a cluster", "pip install 'captum_dtd[ray]'"),
}
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")


def run() -> int:
    """Print the report; returns 0 if the self-check passed, else 1."""
    print(f"captum_dtd {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            print(f"  {name:12} {getattr(importlib.import_module(name), '__version__', '(version unknown)')}")
        except ImportError:
            purpose, install = _OPTIONAL[name]
            print(f"  {name:12} not installed ({purpose}): {install}")
        except Exception as error:  # what is installed may fit nothing else that is
            print(f"  {name:12} BROKEN, its import fails: {type(error).__name__}: {' '.join(str(error).split())}")
    print("devices")
    print(f"  cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(_cpu_features())}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"  cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("  cuda: none")
    print("kernels")
    for device in native.MODULES:
        print(f"  {device}: {_kernels(device)}")
    print("self-check")
    try:
        findings = self_check()
    except Exception as error:  # the report is for finding out what is broken, whatever it is
        print(f"  FAILED: {type(error).__name__}: {error}")
        return 1
    for claim, passed in findings:
        print(f"  {'ok' if passed else 'FAILED'}: {claim}")
    return 0 if all(passed for _, passed in findings) else 1


def self_check() -> list[tuple[str, bool]]:
    """Explain a tiny random network; returns (what was found, whether that is as it should be).

    Checks that relevance sums to the logit within 1e-4, and that a clip without motion has no temporal relevance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 8, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()
        clip = torch.rand(1, 3, 8, 16, 16)
    target = int(model(clip).abs().argmax())
    relevance, delta = DeepTaylor(model, 0.0, 1.0).attribute(clip, target=target, return_convergence_delta=True)
    lost = abs(float(delta[0]) / float(relevance.sum() + delta[0]))
    frozen = clip[:, :, :1].expand(-1, -1, clip.shape[2], -1, -1).contiguous()
    parts = DiscriminativeDeepTaylor(model, 0.0, 1.0).attribute(frozen, target=target)
    motion = float(parts.temporal.abs().max() / parts.total.abs().max())
    return [
        (f"relevance sums to the logit (off by {lost:.1e}, at most 1e-4)", lost <= 1e-4),
        (f"a frozen clip has no temporal relevance ({motion:.1e} of the total, at most 1e-5)", motion <= 1e-5),
    ]


def _kernels(device: str) -> str:
    if device in native.missing:
        return f"reference (plain ATen), because compiled kernels are not at hand: {native.missing[device]}"
    if reason := native.refusal(device):
        return f"reference (plain ATen), because compiled kernels do not run on this GPU: {reason}"
    names = ", ".join(available("z_plus_conv3d", device, torch.float32))
    return names if device == "cpu" or torch.cuda.is_available() else f"compiled for {names}; idle, as there is no GPU"


def _cpu_features() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [torch.backends.cpu.get_cpu_capability(), *(name for name in _CPU_FEATURES if name in flags)]
