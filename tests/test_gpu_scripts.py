"""The scripts for a machine with a GPU run without one as far as they can: so that no minute on the GPU is lost to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPU_CHECK_")}
    variables = {**inherited, "OUT": str(folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True)


def measured(folder: Path, script: str, only: str) -> dict[str, Any]:
    """The record of a smoke test on the CPU."""
    options = ("--device", "cpu", "--smoke", "--no-compile", "--only", only)
    done = run(folder, str(SCRIPTS / f"{script}.py"), *options)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob(f"{script}_*.json")
    record: dict[str, Any] = json.loads(written.read_text())
    return record


def test_gpu_bench_measures_every_kind_of_case(tmp_path: Path) -> None:
    record = measured(
        tmp_path, "gpu_bench", "pool2.*float32|S3D branch|layer2 .*add|conv3a|stem.*pixels|conv4a.*forward|X3D-M res3"
    )
    assert {"machine", "device"} <= set(record["about"]) and record["smoke"]
    assert {"copy", "matmul tf32", "matmul bfloat16"} <= set(record["ceilings"])
    assert len(record["cases"]) == 2 + 4 + 2 + (4 + 2) + 4 + 2 + 2
    for case in record["cases"]:
        timing = case["contenders"][case["ours"]]
        assert timing["first_quartile_ms"] <= timing["median_ms"] <= timing["third_quartile_ms"]
        rounded = case["case"].endswith("forward") and case["grade"] == "bfloat16"  # so is its result
        assert max(case["errors"].values()) < (5e-3 if rounded else 1e-5), case["case"]
    assert {row["kind"] for row in record["summary"]} == {"pooling", "addition", "convolution", "forward", "grouped"}


def test_gpu_jobs_rates_everybody_who_can_be_asked(tmp_path: Path) -> None:
    (case,) = measured(tmp_path, "gpu_jobs", "C3D, 16")["cases"]
    assert {"captum_dtd ieee", "captum_dtd bfloat16", "captum_dtd bfloat16, replayed", "plain torch"} <= set(
        case["contenders"]
    )
    for name, found in case["contenders"].items():
        assert found["verdict"] == "agrees", name
        fastest = max(one["clips_per_second"] for one in found["rates"])
        assert found["best_clips_per_second"] == fastest
        assert found["minutes_for_data_set"] == pytest.approx(150_000 / fastest / 60, rel=1e-2)
        for one in found["rates"]:  # of a clip: a job of ours, or 1 + T of a peer's explanations
            assert one["clips_per_second"] == pytest.approx(one["clips"] / one["median_ms"] * 1e3, rel=1e-2)
            assert one["extrapolated"] == (not name.startswith("captum_dtd"))
    assert len(case["comparisons"]) == 2 * 4 * sum(not name.startswith("captum_dtd") for name in case["contenders"])


def test_gpu_check_forbids_skips_for_lack_of_cuda(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "def test_lacks_a_device(): pytest.skip('there is no CUDA device')\n"
        "def test_lacks_a_network(): pytest.skip('no network')\n"
        "def test_passes(): pass\n"
    )
    plugin = ("-m", "pytest", "-q", "-p", "gpu_check", "-p", "no:cacheprovider", "test_skips.py")
    assert "1 passed, 2 skipped" in run(tmp_path, *plugin, FAIL_WITHOUT_CUDA="0").stdout
    strict = run(tmp_path, *plugin, FAIL_WITHOUT_CUDA="1")
    assert "1 failed, 1 passed, 1 skipped" in strict.stdout and strict.returncode == 1


def test_gpu_check_begins_with_the_gpu_and_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_something(): pass\n")
    (tmp_path / "test_cuda_add.py").write_text("def test_emulated(): pass\n")
    (tmp_path / "test_cuda_device.py").write_text("def test_kernel(): pass\ndef test_graph(): pass\n")
    plugin = ("-m", "pytest", "-v", "-p", "gpu_check", "-p", "no:cacheprovider", ".")
    told = run(tmp_path, *plugin).stdout
    order = [told.index(name) for name in ("test_kernel", "test_something", "test_emulated")]
    assert order == sorted(order) and "4 passed" in told
    alone = run(tmp_path, *plugin, GPU_CHECK_GPU_ALONE="1").stdout
    assert "2 passed, 2 deselected" in alone and "test_kernel" in alone
    late = run(tmp_path, *plugin, GPU_CHECK_ENDS_AT="1")
    assert "4 errors" in late.stdout and "not run: --minutes were over" in late.stdout


@pytest.mark.slow
def test_gpu_check_writes_what_it_found(tmp_path: Path) -> None:
    options = ("--smoke", "--jobs", "1", "-k", "forbids_skips", str(ROOT / "tests" / "test_gpu_scripts.py"))
    done = run(tmp_path, str(SCRIPTS / "gpu_check.py"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("gpu_check_*.json")
    record = json.loads(written.read_text())
    assert record["tests"]["passed"] == 1 and record["tests"]["failed"] == 0
    assert [step["step"] for step in record["steps"]][-1] == "tests"
    (line,) = (tmp_path / "gpu_check_tests.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"] == "passed"


@pytest.mark.parametrize("program", ["mma_rate", "tile_rates"])
def test_programs_that_measure_compile(tmp_path: Path, program: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("compiles a CUDA program, and no CUDA compiler (nvcc) is on the PATH")
    source, include = SCRIPTS / f"{program}.cu", f"-I{ROOT / 'csrc' / 'cuda'}"
    target = str(tmp_path / program)
    subprocess.run([nvcc, "-std=c++17", "-arch=sm_80", include, "-c", str(source), "-o", target], check=True)
