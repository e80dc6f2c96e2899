"""Memory: flat over many calls, bounded by the internal batch size, freed while relevance walks back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import captum_dtd.discriminate
from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor
from captum_dtd.attribution import free_memory

MIB = 2**20


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def deep(layers: int = 24, channels: int = 8) -> nn.Sequential:
    """Many layers of equal activations and small kernels, so that activations are all the memory there is."""
    torch.manual_seed(0)
    chain: list[nn.Module] = [nn.Conv3d(1, channels, 1), nn.ReLU()]
    for _ in range(layers - 1):
        chain += [nn.Conv3d(channels, channels, 1), nn.ReLU()]
    return nn.Sequential(*chain, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, 3)).eval()


def resident() -> int:
    """Resident set size of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    # type(): asking isinstance of everything alive would run __class__ of other people's proxies
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def allocations(run: Callable[[], object]) -> list[int]:
    """The bytes live on the CPU, relative to the start, after each allocation and release while `run` runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, trace = 0, []
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        trace.append(live)
    return trace


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc/self/statm, which only Linux has"
)
@pytest.mark.parametrize("cls", [pytest.param(DeepTaylor, marks=pytest.mark.slow), DiscriminativeDeepTaylor])
def test_a_thousand_calls_leave_nothing_behind(cls: type) -> None:
    method = cls(tiny(), 0, 1)
    x = torch.rand(1, 3, 2, 32, 32)
    for _ in range(50):
        method.attribute(x, 1)
    tensors, memory = live_tensors(), resident()
    for _ in range(1000):
        method.attribute(x, 1)
    # One input kept per call would be 24 KiB x 1000 = 23 MiB.
    assert live_tensors() <= tensors
    assert resident() - memory < 8 * MIB


GROWING = """
import os, torch
from pathlib import Path
from captum_dtd import ops

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def make(mebibytes):  # of which no other result is half, so that none can lie where another was
    ops.conv3d(torch.ones(1).expand(1, 1, mebibytes, 512, 512), torch.ones(1, 1, 1, 1, 1))

make(1)
before = resident()
for mebibytes in (100, 210, 430):
    make(mebibytes)
    print(resident() - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc/self/statm, which only Linux has"
)
def test_memory_that_waits_for_results_is_a_part_of_what_they_once_took(cpu_kernels: Any) -> None:
    """Blocks of 740 MiB in all, of which no two were ever in use at once."""
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, check=True)
    for taken, largest in zip(map(float, done.stdout.split()), (100, 210, 430), strict=True):
        assert largest <= taken + 8 and taken < max(192, 1.25 * largest) + 32


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_nothing_holds_on_to_the_input_or_the_result(cls: type) -> None:
    method = cls(tiny(), 0, 1)
    method.attribute(torch.rand(2, 3, 4, 16, 16), 1)
    x = torch.rand(2, 3, 4, 16, 16)
    result = method.attribute(x, 1)
    parts = [result] if isinstance(result, Tensor) else result
    references = [weakref.ref(x), *(weakref.ref(part) for part in parts)]
    del x, result, parts
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_an_error_holds_on_to_nothing_either(cls: type) -> None:
    method = cls(tiny(), 0, 1)
    x = torch.rand(2, 3, 4, 16, 16)
    method.attribute(x, 1)
    reference = weakref.ref(x)
    with pytest.raises((ValueError, TypeError)) as error:
        method.attribute(x, 99)
    del x, error
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_only_the_result_stays_allocated(cls: type) -> None:
    method = cls(tiny(), 0, 1)
    method.attribute(torch.rand(2, 3, 4, 32, 32), 1)
    kept = []
    trace = allocations(lambda: kept.append(method.attribute(torch.rand(2, 3, 4, 32, 32), 1)))
    (result,) = kept
    size = sum(part.numel() * 4 for part in ([result] if isinstance(result, Tensor) else result))
    assert max(trace) > size
    assert trace[-1] == pytest.approx(size, abs=1024)


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_internal_batch_size_bounds_the_peak(cls: type) -> None:
    method = cls(deep(), 0, 1)
    x = torch.rand(4, 1, 4, 24, 24)
    peaks = {}
    for size in (1, 2, 4):
        method.attribute(x, 1, internal_batch_size=size)
        peaks[size] = max(allocations(partial(method.attribute, x, 1, internal_batch_size=size)))
    assert peaks[1] < 0.4 * peaks[4]
    assert peaks[2] < 0.65 * peaks[4]


def test_large_frozen_clips_are_explained_four_at_a_time_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(captum_dtd.discriminate._ENOUGH, "cpu", (4, 1))  # so that these count as large
    method = DiscriminativeDeepTaylor(deep(), 0, 1)
    x = torch.rand(1, 1, 12, 16, 16)
    explained: list[int] = []
    seed_of = DeepTaylor.seed_of
    monkeypatch.setattr(
        DeepTaylor, "seed_of", lambda m, output, t: (explained.append(len(output)), seed_of(m, output, t))[1]
    )
    method.attribute(x, 1)
    assert explained == [1, 4, 4, 4]


@pytest.mark.parametrize(
    ("affordable", "frames", "expected"), [(64, 16, 64), (64, 24, 48), (55, 16, 48), (10, 16, 10), (3, 2, 2)]
)
def test_more_frozen_clips_than_a_clip_has_frames_are_those_of_whole_clips(
    monkeypatch: pytest.MonkeyPatch, affordable: int, frames: int, expected: int
) -> None:
    monkeypatch.setattr(DeepTaylor, "affordable_batch", lambda *_, **__: affordable)
    method = DiscriminativeDeepTaylor(deep(), 0, 1)
    assert method.frozen_batch((torch.zeros(1, 1, frames, 8, 8),)) == expected


def test_memory_that_torch_keeps_for_the_next_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or chunks would shrink from one call to the next."""
    told = {"mem_get_info": (70, 80), "memory_reserved": 9, "memory_allocated": 4}
    for name, number in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    assert free_memory(torch.device("cuda")) == 75


@pytest.mark.parametrize("readout", ["own", "mean"])
def test_frozen_clips_take_no_more_memory_than_the_clip(readout: str) -> None:
    """One at a time, they need their distinct times only; what stays is the three maps."""
    x = torch.rand(1, 1, 16, 24, 24)
    one, all_of_it = DeepTaylor(deep(), 0, 1), DiscriminativeDeepTaylor(deep(), 0, 1, readout=readout)  # type: ignore[arg-type]
    peaks = []
    for method, options in ((one, {}), (all_of_it, {"internal_batch_size": 1})):
        method.attribute(x, 1, **options)
        peaks.append(max(allocations(partial(method.attribute, x, 1, **options))))
    assert peaks[1] <= peaks[0] + 4 * x.numel() * 4


def test_activations_are_freed_while_relevance_walks_back() -> None:
    layers, channels = 24, 8
    method = DeepTaylor(deep(layers, channels), 0, 1)
    x = torch.rand(1, 1, 8, 32, 32)
    activation = channels * x.numel() * 4
    method.attribute(x, 1)
    trace = allocations(lambda: method.attribute(x, 1))
    # One activation per layer, and a handful of temporaries: not the relevance of every layer beside it.
    assert layers * activation * 0.9 < max(trace) < (layers + 10) * activation
    # When the last activation-sized piece is allocated, deep in the walk, most activations are gone already.
    large = [after for before, after in zip([0, *trace], trace, strict=False) if after - before >= activation]
    assert large[-1] < max(trace) / 2
