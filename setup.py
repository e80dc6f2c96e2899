"""Build of captum_dtd's compiled kernels. Everything that is declarative stands in pyproject.toml.

Two modules are built by ninja, on Linux: captum_dtd._C with the CPU's kernels, and captum_dtd._C_cuda with CUDA's where an nvcc
is found. Both use libtorch's stable ABI and Python's limited API, so one build serves every Python and torch from the
oldest supported on, with or without CUDA. What cannot be built is left out with a warning, and the reason goes into
captum_dtd/_build.json: the package then computes in plain ATen. What modules were built from is told there, too.

Environment variables:
    CXX, NVCC_CCBIN             the C++ compiler, and nvcc's
    CUDA_HOME                   the CUDA toolkit, if it is not the one of the nvcc on the PATH
    TORCH_CUDA_ARCH_LIST        GPUs to build for, as torch reads it (default "8.0;9.0+PTX")
    MAX_JOBS                    how many compilers run at once
    CAPTUM_DTD_CUDA=0           leave CUDA's kernels out
    CAPTUM_DTD_CPU=0            leave the CPU's out; without both it is pure Python
    CAPTUM_DTD_REQUIRE_EXT=1    fail where a module cannot be built (CUDA's only where there is an nvcc)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = {"cpu": "captum_dtd._C", "cuda": "captum_dtd._C_cuda"}
RECORD = "_build.json"
OLDEST_TORCH = "0x020b000000000000"  # 2.11
OLDEST_PYTHON = "0x030A0000"  # 3.10

CPU_SOURCES = (
    "csrc/cpu/add.cpp",
    "csrc/cpu/buffer.cpp",
    "csrc/cpu/conv3d.cpp",
    "csrc/cpu/features.cpp",
    "csrc/cpu/kernel_bf16_generic.cpp",
    "csrc/cpu/kernel_generic.cpp",
    "csrc/cpu/max_pool3d.cpp",
    "csrc/cpu/max_pool3d_generic.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/streaming.cpp",
    "csrc/cpu/weights.cpp",
    "csrc/cpu/winograd.cpp",
)
CUDA_SOURCES = ("csrc/cuda/add.cu", "csrc/cuda/conv3d.cu", "csrc/cuda/max_pool3d.cu", "csrc/cuda/small_groups.cu")
"""Files that run on any machine. Each module has one more, which alone includes torch's headers and needs C++20."""

HOPPER_SOURCE = "csrc/cuda/warpgroup.cu"
"""For compute capability 9.0 alone; where that is not built for, it says that it has no kernel."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
X86_SOURCES = {
    "csrc/cpu/kernel_avx2.cpp": _AVX2,
    "csrc/cpu/kernel_avx512.cpp": _AVX512,
    "csrc/cpu/kernel_bf16_amx.cpp": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "csrc/cpu/kernel_bf16_avx512.cpp": (*_AVX512, "-mavx512bf16"),
    "csrc/cpu/max_pool3d_avx2.cpp": _AVX2,
    "csrc/cpu/max_pool3d_avx512.cpp": _AVX512,
    "csrc/cpu/winograd_bf16_avx512.cpp": (*_AVX512, "-mavx512bf16"),
}
"""Files of one instruction set and the flags for them alone. Compiled without their flags they say that they have no kernel."""

CUDA_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
"""Generations by the names that TORCH_CUDA_ARCH_LIST may use."""


class CannotBuildError(Exception):
    """Why a module is not built, in words for the user."""


class LeftOutError(CannotBuildError):
    """A module that this machine is not expected to build."""


def torch_folder() -> Path:
    """Where torch's headers and libraries are; it is not imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuildError("torch was not installed when this was built")
    return Path(spec.origin).parent


def cxx() -> list[str]:
    """The command of the C++ compiler."""
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("g++", "c++", "clang++") if shutil.which(c)][:1]
    if not command or shutil.which(command[0]) is None:
        raise CannotBuildError(f"no C++ compiler was found ({command[0] if command else 'g++, c++, clang++'})")
    return command


def nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME, or the one on the PATH. nvcc finds its toolkit itself, also through a script."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if found is None:
        raise LeftOutError(f"no CUDA compiler (nvcc) was found {f'in {home}' if home else 'on the PATH'}")
    return found


def gpus() -> Iterator[tuple[str, bool]]:
    """Every GPU that TORCH_CUDA_ARCH_LIST names, as "90" or "90a", and whether later ones shall have its code."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    for name, numbers in CUDA_ARCHITECTURES.items():
        names = names.replace(name, numbers)
    for entry in re.split("[;, ]+", names.strip()):
        parsed = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)*", entry)
        if parsed is None:
            known = ", ".join(CUDA_ARCHITECTURES)
            raise CannotBuildError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}: it takes 9.0, 9.0a, 9.0+PTX or names ({known})"
            )
        yield parsed[1] + parsed[2], bool(parsed[3])


def gencode() -> list[str]:
    """The flags of nvcc for all of them."""
    flags = []
    for number, for_later in gpus():
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if for_later:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def hopper_flags() -> list[str]:
    """The flags of `HOPPER_SOURCE`."""
    if any(number in ("90", "90a") for number, _ in gpus()):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    return [*gencode(), "-DCAPTUM_DTD_WITHOUT_WARPGROUPS"]


def ninja() -> list[str]:
    """The command of ninja: the package's, or the system's."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuildError("ninja was not installed when this was built")
    return [found]


class NinjaFile:
    """What ninja shall do to build one module; depfiles make it rebuild what an edit touches, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.objects: list[str] = []

    def rule(self, name: str, *command: str, depfile: bool) -> None:
        """Say how to make $out of $in."""
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}", "  description = $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def compile(self, source: str, *flags: str) -> None:
        """Have one file of the repository compiled."""
        self.objects.append(f"{source}.o")
        path = re.sub("([$ :])", r"$\1", str(ROOT / source))
        self.lines += [f"build {source}.o: compile {path}", f"  flags = {' '.join(flags)}"]

    def run(self, output: str, *needed: str) -> Path:
        """Compile, and link everything to a shared library; a failure is raised with its first error."""
        self.lines += [f"build {output}: link {' '.join(self.objects)} | {' '.join(needed)}", ""]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        told = []
        with subprocess.Popen(
            [*ninja(), "-C", str(self.folder), *jobs, output],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                told.append(line.strip())
        if process.returncode:
            errors = [line for line in told if "error:" in line] or [line for line in told if "FAILED" in line] or told
            raise CannotBuildError(f"its compilation failed: {errors[0]}")
        return self.folder / output


def torch_flags() -> list[str]:
    """What the files that include torch and Python need."""
    includes = (torch_folder() / "include", Path(sysconfig.get_path("include")))
    versions = (f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-DPy_LIMITED_API={OLDEST_PYTHON}")
    return ["-std=c++20", *(f"-isystem {shlex.quote(str(path))}" for path in includes), *versions]


def torch_library() -> str:
    """What both modules are linked with; it is loaded by torch itself, which is always imported first."""
    return f"-L{shlex.quote(str(torch_folder() / 'lib'))} -ltorch_cpu"


def x86_flags(compiler: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The flags of `X86_SOURCES`, where this is such a machine and the compiler knows them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    known = {}
    for flags in set(X86_SOURCES.values()):
        command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", "/dev/null"]
        known[flags] = not subprocess.run(command, capture_output=True, check=False).returncode
    for source, flags in X86_SOURCES.items():
        if not known[flags]:
            print(f"{source} is built without its kernels: {compiler[0]} does not know {' '.join(flags)}")
    return {source: flags for source, flags in X86_SOURCES.items() if known[flags]}


def alignment_flags(compiler: Sequence[str]) -> list[str]:
    """Keep jumps within 32 bytes, where the assembler can: Intel's CPUs of 2015 to 2020 decode others anew every time.

    How fast the innermost loops are would depend on where they happen to lie (Intel, Mitigations for Jump Conditional Code
    Erratum, 2019).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    for flag in ("-Wa,-mbranches-within-32B-boundaries", "-mbranches-within-32B-boundaries"):
        command = [*compiler, flag, "-Werror", "-c", "-x", "c++", os.devnull, "-o", os.devnull]
        if not subprocess.run(command, capture_output=True, check=False).returncode:
            return [flag]
    return []


def build_cpu(folder: Path, output: str) -> Path:
    """Build captum_dtd._C; returns the shared library."""
    compiler = cxx()
    command = " ".join(map(shlex.quote, compiler))
    file = NinjaFile(folder)
    file.rule(
        "compile",
        command,
        "-O3 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -fno-trapping-math",
        *alignment_flags(compiler),
        f"-Wall -Wextra -ffile-prefix-map={shlex.quote(str(ROOT))}=. -MMD -MF $out.d $flags -c $in -o $out",
        depfile=True,
    )
    file.rule("link", command, "-shared -s $in -o $out", torch_library(), depfile=False)
    file.compile("csrc/ops.cpp", *torch_flags())
    flags = x86_flags(compiler)
    for source in (*CPU_SOURCES, *X86_SOURCES):
        file.compile(source, "-std=c++17", *flags.get(source, ()))
    return file.run(output)


def build_cuda(folder: Path, output: str) -> Path:
    """Build captum_dtd._C_cuda; returns the shared library.

    It needs no CUDA build of torch: an empty libtorch_cuda.so stands in for the one that the module will find loaded, and
    makes importing it fail where there is none. The CUDA runtime is linked in, so torch may have another.
    """
    compiler = shlex.quote(nvcc())
    file = NinjaFile(folder)
    host = "-O3 -DNDEBUG -Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"
    file.rule("compile", compiler, host, "-MMD -MF $out.d $flags -c $in -o $out", depfile=True)
    stub = "libtorch_cuda.so"
    empty = f"-shared -x c++ /dev/null -Wl,-soname,{stub} -o $out"
    file.rule("empty", " ".join(map(shlex.quote, cxx())), empty, depfile=False)
    file.lines.append(f"build {stub}: empty")
    libraries = f"-L. -Xlinker=--no-as-needed,-s -ltorch_cuda {torch_library()}"
    file.rule("link", compiler, "-shared -cudart=static $in -o $out", libraries, depfile=False)
    file.compile("csrc/cuda/dispatch.cpp", *torch_flags())
    for source in CUDA_SOURCES:
        file.compile(source, "-std=c++17", *gencode())
    file.compile(HOPPER_SOURCE, "-std=c++17", *hopper_flags())
    return file.run(output, stub)


BUILDS = {"cpu": build_cpu, "cuda": build_cuda}


class BuildKernels(build_ext):
    """Builds the modules that can be built; leaves the others out and records why."""

    def run(self) -> None:
        """Build in build/kernels-*, where the next run finds what is up to date, then put the modules in place."""
        wanted = {extension.name: extension for extension in self.extensions}
        work = ROOT / "build" / f"kernels-{sys.implementation.cache_tag}"
        places = [Path(self.build_lib, "captum_dtd"), *([ROOT / "captum_dtd"] if self.inplace else [])]
        missing: dict[str, str] = {}
        for device, name in MODULES.items():
            filename = f"{name.rpartition('.')[2]}.abi3.so"
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
            try:
                if name not in wanted:
                    raise LeftOutError(f"left out by CAPTUM_DTD_{device.upper()}=0 when this was built")
                library = _build(device, work / device, filename)
            except CannotBuildError as reason:
                missing[device] = str(reason)
                for place in places:
                    (place / filename).unlink(missing_ok=True)
            else:
                for place in places:
                    _replace(library, place / filename)
        digest = runpy.run_path(str(ROOT / "captum_dtd" / "kernel_sources.py"))["digest"]
        record = {"missing": missing, "sources": digest(ROOT / "csrc")}
        for place in places:
            (place / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        self.extensions: list[Extension] = [wanted[name] for device, name in MODULES.items() if device not in missing]


def _build(device: str, folder: Path, filename: str) -> Path:
    try:
        if sys.platform != "linux":
            raise CannotBuildError(f"compiled kernels are built on Linux only so far, not on {sys.platform}")
        return BUILDS[device](folder, filename)
    except LeftOutError as reason:
        print(f"{MODULES[device]}: {reason}")
        raise
    except CannotBuildError as reason:
        if os.environ.get("CAPTUM_DTD_REQUIRE_EXT", "") not in ("", "0"):
            raise SystemExit(f"{MODULES[device]}: {reason} (CAPTUM_DTD_REQUIRE_EXT is set)") from reason
        warnings.warn(f"{MODULES[device]} is left out, plain ATen will serve: {reason}", stacklevel=2)
        raise


def _replace(library: Path, target: Path) -> None:
    """Copy without writing into a file that a running process may have mapped."""
    fresh = target.with_suffix(".new")
    shutil.copy2(library, fresh)
    fresh.replace(target)


setup(
    ext_modules=[
        Extension(name, [], py_limited_api=True)
        for device, name in MODULES.items()
        if os.environ.get(f"CAPTUM_DTD_{device.upper()}") != "0"
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
