"""What setup.py makes of a machine: kernels where it can, else a package that computes in plain ATen and says why."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.build import compiler

from captum_dtd import kernels, native
from captum_dtd.ops import SCHEMAS

ROOT = Path(__file__).parents[1]

USE = """
import torch
from captum_dtd import kernels, native, ops

x, relevance = torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2), torch.tensor([8.0]).view(1, 1, 1, 1, 1)
assert ops.max_pool3d_relevance(x, relevance, (1, 1, 2)).flatten().tolist() == [2, 6]
assert kernels.available("max_pool3d_relevance", "cpu", x.dtype) == ["reference"]
assert not native.loaded
try:
    ops.max_pool3d_relevance(x, relevance, (1, 1, 2), kernel="generic/ieee")
except RuntimeError as error:
    print(error)
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CAPTUM_DTD_")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def setup() -> dict[str, Any]:
    """What setup.py defines, without building anything."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is needed to build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def checkout(tmp_path: Path, setup: dict[str, Any]) -> Path:
    """A copy of the sources with nothing built in it."""
    unbuilt = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "weights")
    for folder in ("captum_dtd", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unbuilt)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_loaded_modules_have_registered_every_operation_of_their_device() -> None:
    if not native.loaded:
        pytest.skip(f"this installation has no compiled kernels to register: {'; '.join(native.missing.values())}")
    for device in native.loaded:
        for op in SCHEMAS:
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"captum_dtd::{op}", device.upper())
            assert found, (device, op)


def test_devices_are_loaded_or_have_a_reason() -> None:
    assert native.loaded.keys() | native.missing.keys() == native.MODULES.keys()
    assert not native.loaded.keys() & native.missing.keys()
    assert all(native.missing.values())


def test_kernels_of_the_cpu_are_those_of_its_features(cpu_kernels: Any) -> None:
    features = cpu_kernels.cpu_features().split()
    names = kernels.available("max_pool3d_relevance", "cpu", torch.float32)
    assert names == [*(f"{isa}/ieee" for isa in ("avx512", "avx2") if isa in features), "generic/ieee", "reference"]
    with pytest.raises(ValueError, match=r"dtype must be 'float32'.*got 'int8'"):
        cpu_kernels.conv3d_kernels("int8")


def test_kernels_can_be_turned_off() -> None:
    done = run("-c", USE, cwd=ROOT, CAPTUM_DTD_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "cpu kernels are not loaded (turned off by CAPTUM_DTD_DISABLE_NATIVE)" in done.stdout


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="setup.py builds kernels on Linux only: elsewhere no compiler is called that could fail",
)
@pytest.mark.parametrize(
    ("cxx", "reason"),
    [("/bin/false", "its compilation failed"), ("no-such-compiler", "no C++ compiler was found")],
)
def test_without_a_working_compiler_the_package_is_pure_and_says_why(checkout: Path, cxx: str, reason: str) -> None:
    for stale in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (checkout / "captum_dtd" / stale).touch()
    done = run("setup.py", "build_ext", "--inplace", cwd=checkout, CXX=cxx, CAPTUM_DTD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "captum_dtd._C is left out, plain ATen will serve" in done.stderr
    assert not list(checkout.rglob("*.so"))
    record = json.loads((checkout / "captum_dtd" / "_build.json").read_text())["missing"]
    assert reason in record["cpu"] and "CAPTUM_DTD_CUDA=0" in record["cuda"]

    # Without the site module, an editable installation of the original is not found.
    folders = os.pathsep.join([str(checkout), str(Path(torch.__file__).parents[1])])
    done = run("-S", "-c", USE, cwd=checkout, PYTHONPATH=folders)
    assert done.returncode == 0, done.stderr
    assert f"cpu kernels are not loaded ({record['cpu']})" in done.stdout


def test_kernels_of_other_sources_are_told(checkout: Path) -> None:
    if not native.loaded:
        pytest.skip(
            f"this installation has no kernels that could be older than their sources: {'; '.join(native.missing.values())}"
        )
    for built in ("_build.json", *(f"{native.MODULES[device].rpartition('.')[2]}.abi3.so" for device in native.loaded)):
        shutil.copy(ROOT / "captum_dtd" / built, checkout / "captum_dtd")
    folders = os.pathsep.join([str(checkout), str(Path(torch.__file__).parents[1])])
    source = checkout / "csrc" / "ops.cpp"
    for edit, told in (("", False), ("\n", True)):
        source.write_text(source.read_text() + edit)
        done = run("-S", "-c", "from captum_dtd import native; print(*native.loaded)", cwd=checkout, PYTHONPATH=folders)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == list(native.loaded)
        assert ("not built from what" in done.stderr) == told, done.stderr


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="setup.py builds kernels on Linux only: elsewhere no compiler is called that could fail",
)
def test_required_kernels_that_cannot_be_built_are_an_error(checkout: Path) -> None:
    switches = {"CXX": "/bin/false", "CAPTUM_DTD_CUDA": "0", "CAPTUM_DTD_REQUIRE_EXT": "1"}
    done = run("setup.py", "build_ext", "--inplace", cwd=checkout, **switches)
    assert done.returncode != 0
    assert "captum_dtd._C: its compilation failed" in done.stderr
    assert not (checkout / "captum_dtd" / "_build.json").exists()


def test_every_source_of_a_module_is_listed(setup: dict[str, Any]) -> None:
    cpu = {"csrc/ops.cpp", *setup["CPU_SOURCES"], *setup["X86_SOURCES"]}
    cuda = {"csrc/cuda/dispatch.cpp", setup["HOPPER_SOURCE"], *setup["CUDA_SOURCES"]}
    there = {path.relative_to(ROOT).as_posix() for kind in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{kind}")}
    assert cpu | cuda == there


@pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="the flags are of x86 instruction sets: on other processors setup.py gives none",
)
def test_flags_that_the_compiler_does_not_know_are_left_out(
    setup: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = script(tmp_path / "g++-8", 'case "$*" in *amx*) exit 1;; esac')
    flags = setup["x86_flags"]([old])
    assert setup["X86_SOURCES"].keys() - flags.keys() == {"csrc/cpu/kernel_bf16_amx.cpp"}
    assert "kernel_bf16_amx.cpp is built without its kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "expected", "warpgroups"),
    [
        ("", ["80/sm_80", "90/sm_90", "90/compute_90"], True),
        ("9.0a", ["90a/sm_90a"], True),
        ("8.6+PTX 12.0", ["86/sm_86", "86/compute_86", "120/sm_120"], False),
        ("Ampere;Hopper", ["80/sm_80", "86/sm_86", "86/compute_86", "90/sm_90", "90/compute_90"], True),
    ],
)
def test_gpus_are_those_of_torch_cuda_arch_list(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str], warpgroups: bool
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    pairs = [entry.split("/") for entry in expected]
    every = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]
    assert setup["gencode"]() == every
    hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
    assert setup["hopper_flags"]() == (hopper if warpgroups else [*every, "-DCAPTUM_DTD_WITHOUT_WARPGROUPS"])


def test_an_unknown_gpu_is_named(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Fermi")
    with pytest.raises(setup["CannotBuildError"], match="TORCH_CUDA_ARCH_LIST has 'Fermi'"):
        list(setup["gencode"]())


def test_nvcc_is_that_of_cuda_home_before_the_path(
    setup: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        script(tmp_path / name / "bin" / "nvcc", "true")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert setup["nvcc"]() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup["nvcc"]() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup["LeftOutError"], match="no CUDA compiler"):
        setup["nvcc"]()


def test_files_of_an_instruction_set_compile_without_it(setup: dict[str, Any], tmp_path: Path) -> None:
    """As on other architectures, which lack its header, too: one that did not would cost the whole module there."""
    (tmp_path / "immintrin.h").write_text("#error not on this architecture\n")
    for source in setup["X86_SOURCES"]:
        command = [
            compiler(),
            "-std=c++17",
            "-fsyntax-only",
            "-w",
            "-U__SSE2__",
            "-I",
            str(tmp_path),
            str(ROOT / source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "functions"), [("conv3d.cpp", ["SlabRunner"]), ("kernel_generic.cpp", ["3dotIf", "6spreadIf"])]
)
def test_what_is_read_next_is_fetched_ahead(source: str, functions: list[str]) -> None:
    """A compiler that sees no effect in prefetching may drop whatever does nothing else, and results would not tell."""
    command = [compiler(), "-std=c++17", "-O3", "-S", "-o", "-", str(ROOT / "csrc" / "cpu" / source)]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"^(\w+):", assembly, flags=re.MULTILINE)
    fetching = [
        name for name, body in zip(bodies[1::2], bodies[2::2], strict=True) if re.search(r"\b(prefetch|prfm)", body)
    ]
    for function in functions:
        assert any(function in name for name in fetching), (function, fetching)


@pytest.mark.slow
def test_the_whole_module_is_right_on_emulated_tiles(checkout: Path, tmp_path: Path, cpu_kernels: Any) -> None:
    """AMX beyond its register tile, on processors that have all else it needs: a compiler that is told what tiles do."""
    if "avx512_bf16" not in cpu_kernels.cpu_features().split():
        pytest.skip(
            "kernels for AMX end in AVX-512 and its bfloat16, which this processor lacks: here they cannot be run"
        )
    for tests in ("tests", "benchmarks"):
        shutil.copytree(ROOT / tests, checkout / tests, ignore=shutil.ignore_patterns("__pycache__", "results"))
    pretended = tmp_path / "pretended.h"
    pretended.write_text(
        "#include <cpuid.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"
        "#define __get_cpuid_count(leaf, part, a, b, c, d) (*(d) = ~0u, 1)\n#define syscall(...) 0\n"
    )
    told = script(
        tmp_path / "told",
        f'case "$*" in\n'
        f'*kernel_bf16_amx.cpp*) exec {compiler()} -include {ROOT / "tests" / "emulator" / "amx_emulation.h"} "$@" ;;\n'
        f'*features.cpp*) exec {compiler()} -include {pretended} "$@" ;;\n'
        f'*) exec {compiler()} "$@" ;;\nesac',
    )
    built = run(
        "setup.py",
        *("-q", "build_ext", "--inplace"),
        cwd=checkout,
        CXX=told,
        CAPTUM_DTD_CUDA="0",
        CAPTUM_DTD_REQUIRE_EXT="1",
    )
    assert built.returncode == 0, built.stderr
    tested = run("-m", "pytest", "-q", "-k", "amx", "tests/test_winograd.py", "tests/test_fused.py", cwd=checkout)
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout and "skipped" not in tested.stdout, tested.stdout
