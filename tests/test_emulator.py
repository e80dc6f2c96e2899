"""The emulator of the CUDA device: kernels with a planted bug must be caught, the same kernels without must pass."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from emulator.build import load, run_sanitized

LANES = np.arange(64, dtype=np.float32)


@pytest.fixture
def front() -> Iterator[ModuleType]:
    module = load("emulator_front")
    yield module
    module.set_seed(0)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_number_formats_are_those_of_torch(front: ModuleType, name: str) -> None:
    dtype = getattr(torch, name)
    bits = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(2**16, dtype=np.float32)
    getattr(front, f"widen_{name}")(bits, wide)
    np.testing.assert_array_equal(wide, torch.from_numpy(bits).view(dtype).float().numpy())

    # Every number of the format, its neighbours in float32, and what lies halfway to the next.
    patterns = torch.from_numpy(wide).view(torch.int32).long()
    halfway = 2**15 if name == "bfloat16" else 2**12
    near = torch.cat([patterns + d for d in (-1, 0, 1, halfway - 1, halfway, halfway + 1)])
    values = near.clamp(-(2**31), 2**31 - 1).int().view(torch.float32).contiguous()
    narrow = np.empty(values.numel(), dtype=np.uint16)
    getattr(front, f"narrow_{name}")(values.numpy(), narrow)
    torch.testing.assert_close(torch.from_numpy(narrow).view(dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_missing_barrier_reads_poison(front: ModuleType) -> None:
    out = np.zeros(64, np.float32)
    front.neighbour(out, True)
    np.testing.assert_array_equal(out, np.roll(LANES, -1))
    front.neighbour(out, False)
    assert np.isnan(out).sum() == 63


def test_missing_barrier_between_rounds_overwrites_what_is_still_read(front: ModuleType) -> None:
    out = np.zeros(128, np.float32)
    expected = np.concatenate([np.roll(LANES, -1), np.roll(LANES + 100, -1)])
    for seed in range(4):
        front.set_seed(seed)
        front.two_rounds(out, True)
        np.testing.assert_array_equal(out, expected)
        front.two_rounds(out, False)
        assert (out != expected).any()


def test_copy_is_not_there_before_its_wait(front: ModuleType) -> None:
    out = np.zeros(64, np.float32)
    front.copied(LANES + 5, out, True)
    assert out[0] == 0  # a copy that is not present fills with zeros
    np.testing.assert_array_equal(out[1:], LANES[1:] + 5)
    front.copied(LANES + 5, out, False)
    assert np.isnan(out).all()


def test_divergence_is_an_error(front: ModuleType) -> None:
    out = np.zeros(64, np.float32)
    front.uneven(False)
    front.summed(out, False)
    np.testing.assert_array_equal(out, np.repeat([np.sum(LANES[:32]), np.sum(LANES[32:])], 32))
    with pytest.raises(RuntimeError, match="left the kernel while others wait"):
        front.uneven(True)
    with pytest.raises(RuntimeError, match="warp-wide operation waits"):
        front.summed(out, True)
    front.uneven(False)  # it runs again after an error


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 0), (64, 48), (80, 0), (128, 112)])
def test_bank_conflicts_are_counted(front: ModuleType, pitch: int, conflicts: int) -> None:
    """Two warps store rows of 16 bytes and load them as matrices, eight rows at a time."""
    out = np.zeros(64, np.float32)
    front.take_bank_conflicts()
    front.rows(out, pitch)
    assert front.take_bank_conflicts() == conflicts


def test_mistakes_with_warpgroups_are_caught(front: ModuleType) -> None:
    """Products may be taken late or at once: with half of the seeds what is not waited for is not there."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, size).astype(np.float32) for size in ((64, 64), (16, 64)))
    for seed in range(4):
        front.set_seed(seed)
        out = np.zeros((64, 16), np.float32)
        front.grouped(a, b, out, "")
        np.testing.assert_array_equal(out, a @ b.T)
        front.grouped(a, b, out, "overwritten")
        assert (out != a @ b.T).any()
        front.grouped(a, b, out, "not waited for")
        assert (out != a @ b.T).any() == (seed % 2 == 0)
        with pytest.raises(RuntimeError, match="without being shown to tensor cores"):
            front.grouped(a, b, out, "not shown")
        with pytest.raises(RuntimeError, match="does not begin where its pattern does"):
            front.grouped(a, b, out, "between patterns")


def test_overrun_of_shared_memory_is_caught() -> None:
    script = """if True:
        import sys, numpy as np, emulator_front
        out = np.zeros(64, np.float32)
        emulator_front.neighbour(out, True)
        emulator_front.summed(out, False)
        emulator_front.overrun(out, int(sys.argv[1]))
    """
    last = run_sanitized("emulator_front", script, "63")
    assert last.returncode == 0, last.stderr
    over = run_sanitized("emulator_front", script, "64")
    assert over.returncode != 0
    assert "heap-buffer-overflow" in over.stderr
