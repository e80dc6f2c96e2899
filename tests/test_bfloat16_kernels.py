"""The bfloat16 microkernels, called one by one: against float64, on poisoned memory, and under the sanitizers.

They are compiled here, so that AMX can run in emulation (tests/emulator/amx_emulation.h) on machines without tiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from emulator.build import compiler

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc" / "cpu"
EMULATION = TESTS / "emulator" / "amx_emulation.h"
FRONT = TESTS / "emulator" / "bfloat16_front.cpp"
X86 = platform.machine() in ("x86_64", "AMD64")
FUNCTIONS = {
    "generic": "bfloat16_kernel_generic",
    "avx512": "bfloat16_kernel_avx512",
    "amx": "bfloat16_kernel_amx",
    "amx column": "bfloat16_column_kernel_amx",
}
EMULATED = ["amx emulated", "amx column emulated"]
KERNELS = [*FUNCTIONS, *EMULATED]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
FLAGS = {"generic": [], "avx512": [*AVX512, "-mavx512bf16"], "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"]}


def instructions(isa: str) -> list[str]:
    """The flags of an instruction set, if the compiler knows it."""
    command = [compiler(), *FLAGS[isa], "-fsyntax-only", "-xc++", "-"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
        pytest.skip(
            f"cannot be compiled: {compiler()} does not know the flags of {isa}, {' '.join(FLAGS[isa])}; a newer one does"
        )
    return FLAGS[isa]


def compile_source(source: Path, output: Path, *flags: str) -> None:
    command = [compiler(), "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", *flags, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def build(folder: Path, kernel: str, *flags: str) -> Path:
    """A kernel and the front as one library, kept in `folder` for as long as their sources stay the same."""
    function = FUNCTIONS[kernel.removesuffix(" emulated")]
    isa, emulated = kernel.partition(" ")[0], kernel in EMULATED
    source = SOURCES / f"kernel_bf16_{isa}.cpp"
    sources = [source, FRONT] if emulated else [source, FRONT, SOURCES / "features.cpp"]
    inputs = [Path(__file__), EMULATION, SOURCES / "features.h", SOURCES / "microkernel.h", *sources]
    state = [compiler(), kernel, flags, *(file.read_bytes() for file in inputs)]
    library = folder / (hashlib.sha256(repr(state).encode()).hexdigest()[:16] + ".so")
    if library.exists():
        return library
    special = [] if emulated else instructions(isa)
    pretend = ["-include", str(EMULATION), "-DEMULATE_AMX"] if emulated else []
    work = folder / f"{library.stem}.{os.getpid()}"
    work.mkdir()
    for file in sources:
        own = special if file == source else [f"-DKERNEL={function}"] if file == FRONT else []
        compile_source(file, work / f"{file.stem}.o", "-c", "-fPIC", *own, *pretend, *flags)
    link = [compiler(), "-shared", *map(str, work.glob("*.o")), *flags, "-o", str(work / library.name)]
    subprocess.run(link, check=True)
    (work / library.name).rename(library)  # whole or not at all, also where several processes test at once
    shutil.rmtree(work)
    return library


class Kernel:
    """The microkernel of a library; not `available` where this machine cannot run it."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.describe.restype = ctypes.c_bool
        self.library.run.restype = ctypes.c_char_p
        numbers = [ctypes.c_int() for _ in range(3)]
        self.available: bool = self.library.describe(*map(ctypes.byref, numbers))
        self.max_positions, self.channels, self.depth_multiple = (number.value for number in numbers)
        if self.available:
            self.library.begin()

    def run(self, problem: Problem, positions: slice = slice(None)) -> np.ndarray:
        """The sums of these positions, after a look at the memory around them."""
        rows = range(problem.start.shape[0])[positions]
        before = np.frombuffer(b"\xc5" * 4 * problem.margin * self.channels, np.float32).reshape(-1, self.channels)
        memory = np.concatenate([before, problem.start[positions], before])
        error = self.library.run(
            len(rows),
            ctypes.c_void_p(problem.a.ctypes.data + 2 * (problem.origin + rows.start * problem.position_stride)),
            ctypes.c_int64(problem.position_stride),
            ctypes.c_void_p(problem.offsets.ctypes.data),
            ctypes.c_int64(len(problem.offsets)),
            ctypes.c_int64(problem.depth),
            ctypes.c_void_p(problem.b.ctypes.data + 2 * problem.margin),
            ctypes.c_void_p(memory.ctypes.data + before.nbytes),
            ctypes.c_bool(problem.accumulate),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        above, sums, below = np.split(memory, [problem.margin, problem.margin + len(rows)])
        assert above.tobytes() == before.tobytes() == below.tobytes(), "written out of bounds"
        return sums


@dataclass
class Problem:
    """What a microkernel is given. `margin` elements (of `start`: rows) of poison surround every array."""

    a: np.ndarray  # bits of bfloat16, NaN wherever no tap reads
    origin: int  # where in a the first position is
    position_stride: int
    offsets: np.ndarray
    depth: int
    b: np.ndarray
    start: np.ndarray  # the sums before: poison unless accumulated upon
    accumulate: bool
    margin: int

    @property
    def indices(self) -> np.ndarray:
        """What every position reads of a: (positions, taps, depth)."""
        positions = np.arange(self.start.shape[0]) * self.position_stride
        return self.origin + positions[:, None, None] + self.offsets[:, None] + np.arange(self.depth)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums in float64, and the rounding errors that float32 may make in any order of adding."""
        channels = self.start.shape[1]
        terms = len(self.offsets) * self.depth
        a = widened(self.a)[self.indices].reshape(len(self.start), terms)
        b = widened(self.b[self.margin : len(self.b) - self.margin])
        b = b.reshape(-1, channels, 2).transpose(0, 2, 1).reshape(terms, channels)
        start = self.start.astype(np.float64) if self.accumulate else np.zeros(self.start.shape)
        with np.errstate(invalid="ignore"):
            sums = start + np.einsum("pk,kc->pc", a, b)
            size = np.abs(start) + np.einsum("pk,kc->pc", np.abs(a), np.abs(b))
        return sums, (terms + 2) * 2.0**-24 * size


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16; towards zero, which is as good as any way for drawing numbers."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


NAN = np.uint16(0x7FC0)


def draw(rng: np.random.Generator, kernel: Kernel, *, margin: int = 64) -> Problem:
    positions = int(rng.integers(1, kernel.max_positions + 1))
    taps = int(rng.choice([0, 1, 2, 9, 27]))
    depth = kernel.depth_multiple * int(rng.choice([1, 2, 3, 9, 15, 16, 17, 24, 32, 43]))
    # Less than the depth where a tap reads several neighbours at once, more where positions are strided.
    position_stride = int(rng.choice([1, 3, depth, 2 * depth, depth + 5]))
    problem = Problem(
        a=np.empty(0, np.uint16),
        origin=0,
        position_stride=position_stride,
        offsets=rng.integers(-300, 300, taps),
        depth=depth,
        b=np.full(taps * depth * kernel.channels + 2 * margin, NAN),
        start=np.full((positions, kernel.channels), np.nan, np.float32),
        accumulate=bool(rng.integers(2)),
        margin=margin,
    )
    read = problem.indices
    if read.size:
        problem.origin = margin - int(read.min())
        problem.a = np.full(int(np.ptp(read)) + 1 + 2 * margin, NAN)
        values = rng.standard_normal(problem.a.size)
        problem.a[problem.indices] = rounded(values)[problem.indices]
    problem.b[margin : len(problem.b) - margin] = rounded(rng.standard_normal(len(problem.b) - 2 * margin))
    if problem.accumulate:
        problem.start = rng.standard_normal(problem.start.shape).astype(np.float32)
    return problem


def check(kernel: Kernel, problem: Problem) -> np.ndarray:
    sums = kernel.run(problem)
    expected, bound = problem.expected()
    finite = np.isfinite(expected)
    assert np.array_equal(sums[~finite], expected[~finite].astype(np.float32), equal_nan=True)
    with np.errstate(invalid="ignore"):
        excess = np.where(finite, np.abs(sums - expected) - bound, 0)
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"{sums[worst]} for {expected[worst]} at {worst} of {problem}"
    return sums


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("bfloat16_kernels"))


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, folder: Path) -> Kernel:
    if not X86 and request.param != "generic":
        pytest.skip(
            f"cannot be compiled: {request.param} is an x86-64 instruction set, and this machine is {platform.machine()}"
        )
    found = Kernel(build(folder, request.param))
    if not found.available:
        emulated = f"; the same source runs as '{request.param} emulated'" if request.param.startswith("amx") else ""
        pytest.skip(f"cannot be run: this processor lacks the bfloat16 instructions of {request.param}{emulated}")
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_matches_float64(kernel: Kernel, rng: np.random.Generator) -> None:
    for _ in range(40):
        check(kernel, draw(rng, kernel))


def test_nan_and_infinity_reach_their_sums_and_no_others(kernel: Kernel, rng: np.random.Generator) -> None:
    for _ in range(20):
        problem = draw(rng, kernel)
        for array, where in [(problem.a, problem.indices.ravel()), (problem.b, np.arange(64, len(problem.b) - 64))]:
            if where.size:
                array[rng.choice(where)] = rounded(rng.choice([np.nan, np.inf, -np.inf], 1))[0]
        check(kernel, problem)


def test_a_sum_is_the_same_bits_in_any_company(kernel: Kernel, rng: np.random.Generator) -> None:
    """Repeated, or with fewer positions beside it: how the work is divided leaves no trace in the relevance."""
    for _ in range(10):
        problem = draw(rng, kernel)
        whole = kernel.run(problem)
        assert kernel.run(problem).tobytes() == whole.tobytes()
        cut = int(rng.integers(0, len(whole)))
        parts = [slice(0, cut), slice(cut, len(whole))] if cut else [slice(0, len(whole))]
        assert np.concatenate([kernel.run(problem, part) for part in parts]).tobytes() == whole.tobytes()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("amx")], indirect=True)
def test_tiles_round_as_the_manual_says(kernel: Kernel) -> None:
    """Even and odd channels are summed apart: 2**24 + 1 rounds to 2**24, 1 - 2**24 is exact. Denormals are zero."""

    def sums(a: list[float], b: list[float], start: float) -> np.ndarray:
        spread = np.repeat(np.array(b).reshape(-1, 1, 2), kernel.channels, axis=1)
        begin = np.full((1, kernel.channels), start, np.float32)
        offsets = np.zeros(1, np.int64)
        bits = [rounded(np.array(a)), rounded(spread.ravel())]
        return kernel.run(Problem(bits[0], 0, len(a), offsets, len(a), bits[1], begin, accumulate=True, margin=0))

    assert (sums([1, 1, 1, 1], [2.0**24, 1, 1, -(2.0**24)], 0) == 1).all()
    assert (sums([2.0**-70, 1], [2.0**-70, 0], 0) == 0).all()
    assert (sums([2.0**-130, 0], [2.0**100, 0], 0) == 0).all()
    assert (sums([0, 0], [0, 0], 2.0**-130) == 0).all()


class TestEmulation:
    @pytest.mark.parametrize("kernel", ["amx emulated"], indirect=True)
    def test_refuses_what_the_processor_refuses(self, kernel: Kernel, rng: np.random.Generator) -> None:
        problem = draw(rng, kernel)
        problem.start = np.zeros((kernel.max_positions + 1, kernel.channels), np.float32)
        problem.offsets = np.zeros(0, np.int64)
        with pytest.raises(RuntimeError, match="is larger than a register"):
            kernel.run(problem)

    @pytest.mark.parametrize("kernel", EMULATED, indirect=True)
    def test_others_may_release_the_tiles_before_it_begins(self, kernel: Kernel, rng: np.random.Generator) -> None:
        problem = draw(rng, kernel)
        sums = kernel.run(problem)
        kernel.library.release_tiles()
        kernel.library.begin()
        assert kernel.run(problem).tobytes() == sums.tobytes()


def test_stays_in_bounds_under_the_sanitizers(folder: Path) -> None:
    """In a process of its own, as AddressSanitizer must be loaded first; arrays end where the last element does."""
    runtime = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"out-of-bounds accesses cannot be seen: {compiler()} has no AddressSanitizer (install libasan)")
    kernels = ["generic", "avx512", *EMULATED] if X86 else ["generic"]
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [sys.executable, __file__, *(str(build(folder, kernel, *flags)) for kernel in kernels)],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def assembly(tmp_path: Path) -> Callable[[str], str]:
    def compile_to_assembly(isa: str) -> str:
        compile_source(SOURCES / f"kernel_bf16_{isa}.cpp", tmp_path / "kernel.s", "-S", *instructions(isa))
        return (tmp_path / "kernel.s").read_text()

    return compile_to_assembly


def test_amx_spills_no_tile(assembly: Callable[[str], str]) -> None:
    """Sums of one half and of two, or of one to four parts, are loaded and stored once; in between are the loads and products
    of one step."""
    text = assembly("amx")
    sums, steps = (2 + 4) + (1 + 2 + 3 + 4), (3 + 4) + (2 + 3 + 4 + 5)
    expected = {"tdpbf16ps": sums, "tilestored": sums, "tilezero": sums, "tileloadd": sums + steps}
    assert {name: len(re.findall(rf"\b{name}\b", text)) for name in expected} == expected


def test_avx512_spills_no_sum(assembly: Callable[[str], str]) -> None:
    """Every number of positions has its own loop, with two products a position and nothing moved to the stack; and where
    positions are in lanes, every number of channels and vectors, as many as leave a register for a weight."""
    text = assembly("avx512")
    of_positions = 2 * sum(range(1, 14 + 1))
    of_planes = sum(channels * sum(range(1, min(8, 31 // (channels + 1)) + 1)) for channels in range(1, 6 + 1))
    assert len(re.findall(r"\bvdpbf16ps\b", text)) == of_positions + of_planes
    assert not re.findall(r"vmov\w+\s+%zmm\d+, -?\d*\(%r[sb]p\)", text)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        candidate = Kernel(Path(path))
        generator = np.random.default_rng(1)
        for _ in range(25 if candidate.available else 0):
            check(candidate, draw(generator, candidate, margin=0))
