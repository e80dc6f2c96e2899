"""Every test on a machine with a GPU, where a test that is skipped for lack of CUDA counts as failed.

    python benchmarks/gpu_check.py                   # installs wheels/, builds the kernels in place, runs all tests
    python benchmarks/gpu_check.py -k "cuda or ops"  # what follows goes to pytest
    python benchmarks/gpu_check.py --smoke           # without a GPU: shows that everything runs

What only a GPU shows comes first. A test that would begin later than --minutes after the start fails instead, so that there is
a record of those before.

It needs Python, torch with CUDA, nvcc, a C++ compiler, ninja, pytest with its plugins xdist and timeout, and no network:
packages that are missing are taken from the folder wheels/ (`make gpu-wheels`). compute-sanitizer is used where there is one,
and its absence is a failure too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
STRICT = "FAIL_WITHOUT_CUDA"
END = "GPU_CHECK_ENDS_AT"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """As a plugin of pytest: with FAIL_WITHOUT_CUDA=1 a skip whose reason speaks of CUDA is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get(STRICT) == "1" and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "cuda" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"{STRICT}=1 forbids this skip: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As a plugin of pytest: what only a GPU shows first, the longest before all; what needs none comes last."""

    def rank(item: pytest.Item) -> int:
        if "test_cuda_device" in item.nodeid:
            return 0 if "sanitizer" in item.nodeid else 1
        if "test_cuda" in item.nodeid or "emulator" in item.nodeid:
            return 4
        return 2 if "cuda" in item.nodeid else 3

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """As a plugin of pytest: nothing begins after the end that was set."""
    if time.time() > float(os.environ.get(END, "inf")):
        pytest.fail("not run: --minutes were over", pytrace=False)


def run(step: str, *command: str) -> dict[str, Any]:
    """Run one step with what it needs on its path, and tell how it went."""
    paths = [str(SITE), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment |= {"CAPTUM_DTD_REQUIRE_EXT": "1", "OMP_NUM_THREADS": "1"}
    print(f"--- {step}: {' '.join(command)}", flush=True)
    begun = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
    return {"step": step, "exit_code": code, "seconds": round(time.monotonic() - begun, 1)}


def told(report: Path) -> dict[str, Any]:
    """Counts of the tests, and every failure and skip with its reason."""
    counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if outcome is None else "skipped" if outcome.tag == "skipped" else "failed"
        counts[kind] += 1
        if outcome is not None:
            reasons[kind][name] = (outcome.get("message") or outcome.text or "")[:500]
    return {**counts, "reasons": reasons}


def main() -> int:
    """Install, build, test; write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=str(min(8, os.cpu_count() or 1)), help="test processes at once")
    parser.add_argument("--limit", type=int, default=240, help="seconds that one test may take")
    parser.add_argument("--minutes", type=float, default=6, help="after which no further test begins")
    parser.add_argument("--smoke", action="store_true", help="allow skips for lack of CUDA, and build nothing")
    given, for_pytest = parser.parse_known_args()
    os.environ[STRICT] = "0" if given.smoke else "1"
    os.environ[END] = str(time.time() + 60 * given.minutes)

    steps = []
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    if wheels:
        install = (
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
            "--target",
        )
        steps.append(run("wheels", *install, str(SITE), *wheels))
    if not given.smoke:
        steps.append(run("build", "setup.py", "build_ext", "--inplace"))
    report = ROOT / "build" / "gpu_check.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    if all(step["exit_code"] == 0 for step in steps):
        options = (
            "-p",
            "gpu_check",
            "-q",
            "--timeout",
            str(given.limit),
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        )
        parallel = ("-n", given.jobs, "--dist", "load", "--maxschedchunk", "4")
        steps.append(run("tests", "-m", "pytest", *options, *parallel, *for_pytest))

    sys.path[:0] = [str(SITE), str(ROOT)]
    import torch
    from gpu import about, write

    record = {"about": about(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "smoke": given.smoke}
    record |= {"steps": steps, "tests": told(report) if report.exists() else None}
    if record["tests"]:
        print({name: record["tests"][name] for name in ("passed", "failed", "skipped")})
    write("gpu_check", record)
    return int(any(step["exit_code"] for step in steps))


if __name__ == "__main__":
    raise SystemExit(main())
