"""Every test on a machine with a GPU, where a test that is skipped for lack of CUDA counts as failed.

    python benchmarks/gpu_check.py                   # installs wheels/, builds the kernels in place, runs all tests
    python benchmarks/gpu_check.py --gpu-alone       # leaves out what needs no GPU, and was seen without one
    python benchmarks/gpu_check.py --built           # with the kernels that are there, which were built elsewhere
    python benchmarks/gpu_check.py -k "cuda or ops"  # what follows goes to pytest
    python benchmarks/gpu_check.py --smoke           # without a GPU: shows that everything runs

What only a GPU shows comes first, compute-sanitizer beside it. A test that would begin later than --minutes after the build
fails instead, and after --limit more everything is stopped. What was found until then is in the record, and line by line in
gpu_check_tests.jsonl beside it while tests still run. After an error that leaves the device unusable the process that made it
ends, so that no other test fails for it.

It needs Python, torch with CUDA, nvcc, a C++ compiler, ninja, pytest with its plugins xdist and timeout, and no network:
packages that are missing are taken from the folder wheels/ (`make gpu-wheels`). compute-sanitizer is used where there is one,
and its absence is a failure too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from gpu import about, folder, write

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
STRICT = "FAIL_WITHOUT_CUDA"
END = "GPU_CHECK_ENDS_AT"
ALONE = "GPU_CHECK_GPU_ALONE"
LOG = "GPU_CHECK_LOG"

# --- as a plugin of pytest ---------------------------------------------------------------------------------------------


_process: dict[str, Any] = {"is_worker": False, "log": None}


def pytest_configure(config: pytest.Config) -> None:
    """Whether this process runs tests for another one, and where it writes what it knows: not what tests start by themselves."""
    _process["is_worker"] = hasattr(config, "workerinput")
    _process["log"] = os.environ.pop(LOG, None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """With FAIL_WITHOUT_CUDA=1 a skip whose reason speaks of CUDA is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get(STRICT) == "1" and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "cuda" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"{STRICT}=1 forbids this skip: {reason}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only a GPU shows first; what needs none comes last, or is left out."""

    def rank(item: pytest.Item) -> int:
        if "test_cuda_device" in item.nodeid:
            return 0
        if "test_cuda" in item.nodeid or "emulator" in item.nodeid:
            return 3
        return 1 if "cuda" in item.nodeid else 2

    items.sort(key=rank)
    if os.environ.get(ALONE) == "1":
        left_out = [item for item in items if rank(item) > 1]
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[: len(items) - len(left_out)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Nothing begins after the end that was set."""
    if time.time() > float(os.environ.get(END, "inf")):
        pytest.fail("not run: --minutes were over", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Where a test left the device unusable its process ends, and another takes its place."""
    if not _process["is_worker"]:
        return
    cuda: Any = torch.cuda  # untyped in some versions of torch
    if not cuda.is_initialized():
        return
    try:
        cuda.synchronize()
    except RuntimeError as error:
        sys.stderr.write(f"{nodeid} left the device unusable: {error}\n")
        sys.stderr.flush()
        time.sleep(1)  # the report of the test is on its way
        os._exit(70)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What is known so far is written down at once."""
    log = _process["log"]
    decisive = report.when == "call" or report.outcome != "passed"
    if log is None or not decisive:
        return
    told = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        told["reason"] = str(reason)[-2000:]
    with open(log, "a") as file:
        file.write(json.dumps(told) + "\n")


# --- the script --------------------------------------------------------------------------------------------------------


class Step:
    """A command in the background, with what it needs on its path; it ends at its time at the latest.

    Args:
        name: what it is called in the record.
        command: the program and its arguments.
        seconds: how long it may take.
        output: where its output goes; None: to the terminal.
        variables: of its environment.
    """

    running: ClassVar[list[Step]] = []

    def __init__(
        self,
        name: str,
        command: list[str],
        seconds: float,
        output: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        paths = [str(SITE), str(ROOT), *(str(ROOT / part) for part in ("benchmarks", "tests"))]
        paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(variables or {})}
        environment |= {"CAPTUM_DTD_REQUIRE_EXT": "1", "OMP_NUM_THREADS": "1"}
        self._name, self._begun, self._output = name, time.monotonic(), output
        self._end = self._begun + seconds
        print(f"--- {name}: {' '.join(command)}", flush=True)
        with open(output, "w") if output else nullcontext() as to:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=to, stderr=to, start_new_session=True
            )
        Step.running.append(self)

    def told(self) -> dict[str, Any]:
        """How it went, once it has ended."""
        try:
            code: int | str = self._process.wait(max(1.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            code = "stopped: its time was over"
        Step.running.remove(self)
        found: dict[str, Any] = {"step": self._name, "exit_code": code}
        found["seconds"] = round(time.monotonic() - self._begun, 1)
        if self._output is not None:
            found["output"] = self._output.read_text()[-4000:]
        return found

    def stop(self) -> None:
        """End it, with all that it started, which would stay on the GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def sanitizers(seconds: float) -> list[Step | dict[str, Any]]:
    """Every kernel once, on small operands, under compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return [{"step": "sanitizers", "exit_code": "compute-sanitizer is not on the PATH"}]
    script = "import test_cuda_device; test_cuda_device.small_layers()"
    # Our kernels only, and not what torch asks the driver for, which may be newer than it is.
    options = ["--error-exitcode", "86", "--report-api-errors", "no", "--kernel-regex", "kns=captum_dtd"]
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has its own bounds
    return [
        Step(
            tool,
            [program, "--tool", tool, *options, sys.executable, "-c", script],
            seconds,
            folder() / f"{tool}.log",
            alone,
        )
        for tool in ("memcheck", "synccheck", "racecheck")
    ]


def summary(log: Path) -> dict[str, Any]:
    """Counts of the tests, and every failure and skip with its reason."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "reasons": {"failed": {}, "skipped": {}}}
    for line in log.read_text().splitlines():
        told = json.loads(line)
        found[told["outcome"]] += 1
        if "reason" in told:
            found["reasons"][told["outcome"]][told["test"]] = told["reason"]
    return found


def main() -> int:
    """Install, build, test; write the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=str(min(8, os.cpu_count() or 1)), help="test processes at once")
    parser.add_argument("--limit", type=int, default=90, help="seconds that one test may take")
    parser.add_argument("--minutes", type=float, default=5, help="after which no further test begins")
    parser.add_argument("--gpu-alone", action="store_true", help="leave out what needs no GPU")
    parser.add_argument("--built", action="store_true", help="build nothing: the kernels were brought along")
    parser.add_argument("--smoke", action="store_true", help="allow skips for lack of CUDA, and build nothing")
    given, for_pytest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped from outside"))
    try:
        return check(given, for_pytest)
    finally:
        for step in Step.running:
            step.stop()


def check(given: argparse.Namespace, for_pytest: list[str]) -> int:
    """The same, given the options and what is pytest's."""
    steps: list[dict[str, Any]] = []
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    if wheels:
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
            "--target",
        ]
        steps.append(Step("wheels", [sys.executable, *install, str(SITE), *wheels], 120).told())
    if not given.smoke and not given.built:
        steps.append(Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 300).told())
    end = time.time() + 60 * given.minutes
    log = folder() / "gpu_check_tests.jsonl"
    log.unlink(missing_ok=True)
    log.touch()
    if all(step["exit_code"] == 0 for step in steps):
        rest = end - time.time() + given.limit
        beside = [] if given.smoke else sanitizers(rest)
        timeout = ("--timeout", str(given.limit), "--timeout-method", "thread")
        parallel = ("-n", given.jobs, "--dist", "load", "--maxschedchunk", "4")
        command = [sys.executable, "-m", "pytest", "-p", "gpu_check", "-q", *timeout, *parallel, *for_pytest]
        variables = {STRICT: "0" if given.smoke else "1", END: str(end), LOG: str(log)}
        variables[ALONE] = "1" if given.gpu_alone else "0"
        steps.append(Step("tests", command, rest, variables=variables).told())
        steps += [each.told() if isinstance(each, Step) else each for each in beside]

    record = {"about": about(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "smoke": given.smoke}
    record |= {"gpu_alone": given.gpu_alone, "steps": steps, "tests": summary(log)}
    print({name: record["tests"][name] for name in ("passed", "failed", "skipped")})
    for step in steps:
        print(f"{step['step']}: {step['exit_code']}")
    write("gpu_check", record)
    return int(any(step["exit_code"] != 0 for step in steps))


if __name__ == "__main__":
    raise SystemExit(main())
