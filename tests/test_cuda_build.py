"""What nvcc makes of the CUDA kernels, read from the machine code: registers, no spills, tensor cores, wide accesses.

A GPU is not needed; the code is that of the package's module where it was built from these sources, else compiled anew.
Each budget leaves as many blocks on a multiprocessor as the kernel is meant to have: a change that exceeds one is slower
in a way that no other test here can see.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cu")])
HOPPER = "warpgroup"
"""The file, and part of its kernels' names, that is compiled for Hopper's warpgroups alone."""
ARCHITECTURES = ("sm_80", "sm_90")
EVERY = (*ARCHITECTURES, "sm_90a")


def gencode(source: Path) -> list[str]:
    """For which GPUs a file is compiled."""
    if source.stem == HOPPER:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    kinds = (("80", "sm"), ("90", "sm"), ("90", "compute"))
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in kinds]


REGISTERS = {
    "multiply_sweep": 168,  # three blocks of 128 threads; tiles of more threads say by themselves how many blocks they want
    "add_splits": 96,
    "arrange_input": 64,
    "arrange_planes": 64,
    "lift_input": 64,
    "write_numbers": 32,
    "pack_weights": 64,
    "sum_groups": 80,  # three blocks of 256 threads
    "lay_weights": 32,
    "relevance_of_cells": 80,
    "summarize_windows": 80,
    "gather_from_windows": 64,
    "largest_of_windows": 64,
    "share_between_summands": 64,
}
"""The most registers of a thread, for every kernel."""

Instructions = dict[str, Counter[str]]


def kernel_name(symbol: str) -> str:
    """A kernel's own name in its mangled symbol."""
    found = [name for name in REGISTERS if name in symbol]
    assert len(found) == 1, f"the kernel {symbol} has no budget: add it to REGISTERS"
    return found[0]


def built() -> list[Path]:
    """The package's own module, if it was built from the sources as they are, for these architectures."""
    modules = [*(ROOT / "captum_dtd").glob("_C_cuda*.so")]
    newest = max(source.stat().st_mtime for source in SOURCES)
    fresh = [module for module in modules if module.stat().st_mtime > newest]
    return fresh if fresh and all(f".{a}.cubin" in cuobjdump("-lelf", str(fresh[0])) for a in EVERY) else []


def compiled_anew() -> list[Path]:
    """Every .cu file compiled as the package compiles it, once for each state of the sources."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        pytest.skip("no CUDA compiler (nvcc) was found: what it makes of the kernels is not checked")
    command = [nvcc, "-O3", "-DNDEBUG", "-std=c++17", "-c"]
    state = hashlib.sha256(" ".join(command).encode() + subprocess.check_output([nvcc, "--version"]))
    for source in SOURCES:
        state.update(source.read_bytes())
    folder = ROOT / "build" / "cuda" / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    targets = {source: folder / f"{source.stem}.o" for source in SOURCES if source.suffix == ".cu"}
    with open(folder / "lock", "w") as lock:  # test processes share the objects
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source, target in targets.items():
            if not target.exists():
                unfinished = target.with_suffix(".tmp.o")
                subprocess.run([*command, *gencode(source), str(source), "-o", str(unfinished)], check=True)
                unfinished.rename(target)
    return list(targets.values())


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump says: the CUDA toolkit's, or the one that comes with triton."""
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(carried) if carried.exists() else None
    if tool is None:
        pytest.skip("cuobjdump is neither on the PATH nor part of triton: the kernels' machine code is not checked")
    return subprocess.check_output([tool, *arguments], text=True)


@pytest.fixture(scope="module")
def compiled() -> list[Path]:
    return built() or compiled_anew()


def machine_code(compiled: list[Path], architecture: str) -> Instructions:
    """How often each instruction stands in each kernel."""
    counts: Instructions = defaultdict(Counter)
    for path in compiled:
        for block in re.split(r"\n\s*Function : ", cuobjdump("-arch", architecture, "-sass", str(path)))[1:]:
            symbol, _, code = block.partition("\n")
            counts[symbol.strip()].update(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code))
    return counts


GROUPS = "GroupTile"
"""In the names of warpgroups' kernels."""


@pytest.fixture(scope="module")
def every_instruction(compiled: list[Path]) -> dict[str, Instructions]:
    """By architecture; of sm_90 cuobjdump shows the code of sm_90a too."""
    return {architecture: machine_code(compiled, architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def instructions(request: pytest.FixtureRequest, every_instruction: dict[str, Instructions]) -> Instructions:
    return {symbol: each for symbol, each in every_instruction[request.param].items() if GROUPS not in symbol}


@pytest.fixture(scope="module")
def of_warpgroups(every_instruction: dict[str, Instructions]) -> Instructions:
    found = {symbol: each for symbol, each in every_instruction["sm_90"].items() if GROUPS in symbol}
    assert found
    return found


def having(counts: Instructions, kernel: str) -> Instructions:
    found = {symbol: each for symbol, each in counts.items() if kernel_name(symbol) == kernel}
    assert found, f"there is no kernel {kernel} in the machine code"
    return found


def test_registers_are_in_budget_and_nothing_is_spilled(compiled: list[Path]) -> None:
    wrong, seen = [], set()
    for path in compiled:
        architecture = ""
        for line in re.findall(r"arch = \w+|Function \w+:\s+REG:.*", cuobjdump("-res-usage", str(path))):
            if line.startswith("arch"):
                architecture = line.removeprefix("arch = ")
                continue
            symbol = line.split()[1].rstrip(":")
            used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            kernel = kernel_name(symbol)
            seen.add((kernel, architecture))
            # A block of warpgroups may be the only one; how many there are it says by itself.
            budget = 255 if GROUPS in symbol else REGISTERS[kernel]
            if used["REG"] > budget or used["STACK"] or used["LOCAL"]:
                wrong.append(f"{architecture} {symbol}: {used}, budget {budget} registers")
    assert not wrong, "\n".join(wrong)
    assert seen >= {(kernel, architecture) for kernel in REGISTERS for architecture in ARCHITECTURES}
    assert ("multiply_sweep", "sm_90a") in seen


def test_there_is_code_for_later_gpus(compiled: list[Path]) -> None:
    for path in (path for path in compiled if path.stem != HOPPER):
        assert re.search(r"sm_90\.ptx", cuobjdump("-lptx", str(path))), f"{path.stem} has no PTX"


def test_no_kernel_touches_local_memory(instructions: Instructions, of_warpgroups: Instructions) -> None:
    local = {
        symbol: name
        for symbol, each in {**instructions, **of_warpgroups}.items()
        for name in each
        if name.startswith(("STL", "LDL"))
    }
    assert not local


def test_convolutions_use_tensor_cores_and_asynchronous_copies(instructions: Instructions) -> None:
    for symbol, each in having(instructions, "multiply_sweep").items():
        names = {name.split(".")[0] for name in each}
        assert {"HMMA", "LDGSTS", "LDSM"} <= names, f"{symbol}: {sorted(names)}"


def test_warpgroups_multiply_what_was_copied_past_the_registers(of_warpgroups: Instructions) -> None:
    """Six products of a stage where operands have halves, otherwise four."""
    for symbol, each in of_warpgroups.items():
        products = {name: count for name, count in each.items() if name.startswith("HGMMA")}
        assert len(products) == 1 and sum(products.values()) == (6 if "Bf16x3" in symbol else 4), (
            f"{symbol}: {products}"
        )
        assert {name for name in each if name.startswith("LDGSTS")} == {"LDGSTS.E.128", "LDGSTS.E.BYPASS.128"}, symbol


def test_what_is_about_memory_reads_and_writes_vectors(instructions: Instructions) -> None:
    """Four neighbours at once, or, in the kernels for layouts without vectors, one."""
    for kernel in ("relevance_of_cells", "summarize_windows", "gather_from_windows", "share_between_summands"):
        for symbol, each in having(instructions, kernel).items():
            in_vectors = f"{kernel}ILi4E" in symbol
            stores = {name for name in each if name.startswith("STG")}
            assert stores in ([{"STG.E.128"}] if in_vectors else [{"STG.E"}, {"STG.E.64"}]), f"{symbol}: {stores}"
            loads = {name.removeprefix("LDG.E").removesuffix(".CONSTANT") for name in each if name.startswith("LDG")}
            tables = {".U16", ".S16"} if re.search(r"_windowsILi\dELb\dELb1E", symbol) else set()
            assert not in_vectors or loads <= {".64", ".128"} | tables, f"{symbol}: {loads}"
