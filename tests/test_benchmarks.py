"""The benchmarks run, and what they compare computes the same: tiny layers, seconds, and no word about speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from captum_dtd import native
from captum_dtd.models import C3D

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

# Relative L2 distance from the definition; bfloat16 rounds to 8 bits, and the compositions round relevance as well.
TOLERANCE = {"ieee": 1e-5, "float32": 1e-4, "mixed": 1e-2, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are scripts: they import one another by name."""
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def measured(tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "measured.json"
    script("measure").main(["--small", "--repetitions", "1", "--seconds", "0", "--out", str(out), *options])
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_every_contender_computes_the_same(tmp_path: Path) -> None:
    precisions = ["--precision", *TOLERANCE]
    record = measured(tmp_path, "--no-compile", "--only", "^(?!C3D explained)", *precisions)
    assert len(record["cases"]) == 4 * (22 + 2 + 5)
    for case in record["cases"]:
        for name, contender in case["contenders"].items():
            assert contender["error"] <= TOLERANCE[case["precision"]], (case["case"], case["precision"], name)
    for row in record["summary"]:
        assert 0 < row["worst"] <= row["geometric_mean"]
    assert {"cpu", "features", "commit", "date", "versions", "threads"} <= set(record["machine"])


def test_compositions_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, which itself is left out: it takes a C++ compiler and a while."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **{**options, "backend": "eager"}))
    record = measured(tmp_path, "--precision", "float32", "--only", "conv3a|stem|pool2")
    compiled = {name for case in record["cases"] for name in case["contenders"] if "compiled" in name}
    assert len(compiled) >= 6


def test_explanations_are_compared(tmp_path: Path) -> None:
    record = measured(tmp_path, "--precision", "float32", "--only", "C3D explained")
    assert {case["precision"] for case in record["cases"]} == {"float32", "ieee"}
    assert {"C3D explained, plain torch", "C3D explained, captum"} <= {case["case"] for case in record["cases"]}
    for case in record["cases"]:
        assert case["contenders"][f"captum_dtd {case['precision']}"]["error"] <= 1e-4


def test_pytest_benchmarks_run() -> None:
    chosen = "conv3a or stem or fc8 or pool2 or pool5 or (test_others and zennit) or (test_captum_dtd and float32)"
    chosen += " or test_open or (test_end_to_end and c3d_mini)"
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--small", "--benchmark-disable", "-q", "-k", chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=FOLDER.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tuning_fills_the_table(tmp_path: Path) -> None:
    if "cpu" not in native.loaded:
        pytest.skip(f"the compiled CPU kernels are not loaded: {native.missing['cpu']}")
    kernels, out = importlib.import_module("captum_dtd.kernels"), tmp_path / "table.json"
    elsewhere = {"cpu": {"riscv": {"conv3d": {"ieee": {"dense": "rvv/ieee"}}}}, "cuda": {"sm_90": {}}}
    out.write_text(json.dumps({"kernels": elsewhere}))
    script("tune").main(["--small", "--repetitions", "1", "--seconds", "0", "--out", str(out)])
    table = json.loads(out.read_text())["kernels"]
    assert table["cuda"] == elsewhere["cuda"] and table["cpu"]["riscv"] == elsewhere["cpu"]["riscv"]
    mine = table["cpu"][kernels.feature_level("cpu")]
    assert set(mine) == {"z_plus_conv3d", "z_beta_conv3d", "conv3d", "max_pool3d_relevance"}
    assert set(mine["z_plus_conv3d"]) == set(TOLERANCE)
    available = kernels.available("z_plus_conv3d", "cpu", torch.float32)
    assert set(mine["z_plus_conv3d"]["float32"].values()) <= set(available)


def test_tuning_needs_compiled_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setitem(native.missing, "cpu", "not built")
    with pytest.raises(SystemExit):
        script("tune").main([])
    assert "not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "times", "best"),
    [
        ("float32", [{"avx512/ieee": 2.0, "amx/bf16x3": 1.0, "amx/bf16": 0.3}], "amx/bf16x3"),
        ("ieee", [{"avx512/ieee": 2.0, "amx/bf16x3": 1.0, "reference": 3.0}], "avx512/ieee"),
        ("float32", [{"amx/bf16x3": 1.0, "avx512/ieee": 1.04}], "avx512/ieee"),
        ("bfloat16", [{"avx512/bf16": 1.0, "avx512/mixed": 1.04, "generic/ieee": 9.0}], "avx512/mixed"),
        ("bfloat16", [{"avx512/ieee": 1.0, "amx/bf16": 3.0}, {"avx512/ieee": 2.0, "amx/bf16": 0.2}], "amx/bf16"),
        ("mixed", [{"avx512/ieee": 1.0, "generic/ieee": 0.5}, {"avx512/ieee": 1.0}], "avx512/ieee"),
    ],
)
def test_the_fastest_kernel_is_entered(precision: str, times: list[dict[str, float]], best: str) -> None:
    """By the geometric mean over the layers it was timed on; of about equal ones the most precise; never a hopeless one."""
    assert script("tune").fastest(times, precision) == best


def test_a_kernel_stays_in_the_race_while_a_precision_may_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tune, timing = script("tune"), script("timing")
    seconds = {"avx512/ieee": 10.0, "avx512/bf16": 1.0, "generic/ieee": 90.0, "generic/bf16": 5.0}

    def interleaved(runs: dict[str, Any], protocol: Any) -> dict[str, Any]:
        return {name: timing.Timing((seconds[name],)) for name in runs}

    monkeypatch.setattr(tune, "interleaved", interleaved)
    (times,) = tune.compared([lambda name: torch.empty(0)], list(seconds), ["ieee", "bfloat16"], timing.Protocol())
    assert set(times) == {"avx512/ieee", "avx512/bf16"}


def convolutions_of(model: nn.Module) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv3d):
            geometry = (module.kernel_size, module.stride, module.padding)
            found.add((module.in_channels, module.out_channels, tuple(inputs[0].shape[2:]), *geometry))
        else:
            pool: Any = module
            kernel, padding = ((n,) * 3 if isinstance(n, int) else n for n in (pool.kernel_size, pool.padding))
            found.add((inputs[0].shape[1], tuple(inputs[0].shape[2:]), kernel, padding, tuple(output.shape[2:])))

    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.MaxPool3d)):
            module.register_forward_hook(note)
    model.eval()(torch.zeros(1, 3, 16, 112, 112, device="meta"))
    return found


def test_workloads_are_the_networks() -> None:
    """Every convolution and pooling of C3D and r3d_18 is among the workloads, and no other."""
    workloads = script("workloads")
    with torch.device("meta"):
        c3d = C3D()
    pools = {(p.channels, p.size, p.kernel, p.padding, p.output_size) for p in workloads.POOLINGS}
    assert convolutions_of(c3d) == geometries(workloads.C3D_CONVOLUTIONS) | pools
    video = pytest.importorskip("torchvision.models.video", reason="torchvision is not installed")
    with torch.device("meta"):
        r3d_18 = video.r3d_18()
    assert convolutions_of(r3d_18) == geometries(workloads.R3D_18_CONVOLUTIONS)


def geometries(layers: Any) -> set[tuple[Any, ...]]:
    return {(c.c_in, c.c_out, c.size, c.kernel, c.stride, c.padding) for c in layers}
