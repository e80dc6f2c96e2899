"""Compiles a front (a pybind11 module around kernels of csrc/cuda) for the emulator, once for each state of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CACHE = ROOT / "build" / "emulator"
FOLDERS = [ROOT / "csrc" / "cuda", FOLDER]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZE = ["-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    """The C++ compiler of ``CXX``, or g++; the test that asks is skipped where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip(
            "the kernels' source is compiled to be tested, and there is no C++ compiler: install g++ or set CXX"
        )
    return found


def sources(file: Path, seen: set[Path]) -> list[Path]:
    """A file and what it includes, of the project's own."""
    if file in seen or not file.exists():
        return []
    seen.add(file)
    names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
    candidates = [(folder / name).resolve() for name in names for folder in (file.parent, *FOLDERS)]
    return [file, *(found for candidate in candidates for found in sources(candidate, seen))]


def build(front: str, sanitize: bool = False) -> Path:
    """The compiled module of ``tests/emulator/<front>.cpp``; with ``sanitize``, under the address and UB sanitizers."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to emulate the CUDA kernels")
    cxx = compiler()
    includes = [*FOLDERS, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    command = [cxx, *FLAGS, *(SANITIZE if sanitize else []), *(f"-I{folder}" for folder in includes)]
    state = hashlib.sha256(" ".join([sys.version, *command]).encode())
    for source in sources(FOLDER / f"{front}.cpp", set()):
        state.update(source.read_bytes())
    module = CACHE / state.hexdigest()[:16] / f"{front}.so"
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(module.with_suffix(".lock"), "w") as lock:  # test processes share the cache
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            unfinished = module.with_suffix(".tmp")
            subprocess.run([*command, str(FOLDER / f"{front}.cpp"), "-o", str(unfinished)], check=True)
            unfinished.rename(module)
    return module


def load(front: str) -> ModuleType:
    """The module ``front``, compiled and imported."""
    spec = importlib.util.spec_from_file_location(front, build(front))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_array(tensor: Tensor) -> Any:
    """As NumPy sees it: narrow types as their bits."""
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


def run_sanitized(front: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, in which ``import <front>`` gives the sanitized module."""
    module = build(front, sanitize=True)
    libraries = [
        subprocess.check_output([compiler(), f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "PYTHONPATH": f"{module.parent}{os.pathsep}{FOLDER.parent}",
    }
    return subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
