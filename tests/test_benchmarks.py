"""The benchmarks run, and what they compare computes the same: tiny layers, seconds, and no word about speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captum_dtd import DeepTaylor, native
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


def measured(tmp_path: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """The record of a run in which nothing is timed seriously, which must end with this exit code."""
    out = tmp_path / "measured.json"
    quick = ("--small", "--repetitions", "1", "--seconds", "0", "--out", str(out))
    assert script("measure").main([*quick, *options]) == code
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_every_composition_computes_the_same(tmp_path: Path) -> None:
    record = measured(tmp_path, "--only", " k[1-7]x| add ", "--precision", *TOLERANCE)
    assert len(record["cases"]) == 4 * (22 + 8 + 2 + 5 + 4)
    for case in record["cases"]:
        for name, contender in case["contenders"].items():
            assert contender["error"] <= TOLERANCE[case["case"].split()[-1]], (case["case"], name)
    for row in record["summary"]:
        assert 0 < row["worst"] <= row["geometric_mean"]
    assert {"cpu", "features", "commit", "date", "versions", "threads"} <= set(record["machine"])


def test_compositions_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, which itself is left out: it takes a C++ compiler and a while."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **{**options, "backend": "eager"}))
    record = measured(
        tmp_path, "--precision", "float32", "--compile", "all", "--only", "conv3a|stem|pool2|layer1 .*add"
    )
    compiled = {name for case in record["cases"] for name in case["contenders"] if "compiled" in name}
    assert len(compiled) >= 7


# --- whole explanations ------------------------------------------------------------------------------------------------


@pytest.fixture
def contest() -> Callable[..., Any]:
    """A small workload: a network's name, and who takes part."""

    def made(network: str, *peers: str, precisions: tuple[str, ...] = ()) -> Any:
        networks = script("networks")
        workload = networks.Workload(getattr(networks, network), 16, precisions, peers)
        protocol = script("timing").Protocol(1, 0.0)
        return script("explanations").Contest(workload, protocol, {"float32": 1.0, "bfloat16": 1.0}, True, True)

    return made


def test_explanations_and_jobs_are_measured_and_told(tmp_path: Path) -> None:
    record = measured(tmp_path, "--compile", "nothing", "--only", "^c3d_mini, 16")
    explanation, job = record["cases"]
    assert (explanation["kind"], job["kind"]) == ("explanation", "job")
    assert job["gflop"] == pytest.approx(5 * explanation["gflop"], rel=0.1)  # small clips have four frames
    for case in (explanation, job):
        for precision, tolerance in TOLERANCE.items():
            told = case["contenders"][f"captum_dtd {precision}"]
            assert told["verdict"] == "agrees" and told["error"] <= tolerance
            assert told["sum_over_score"] == pytest.approx(1, abs=1e-2)
        assert case["contenders"]["plain torch"]["verdict"] == "agrees"
        assert case["contenders"]["input x gradient"]["verdict"] == "another question"
        for compared in case["comparisons"]:
            ratio = (
                case["contenders"][compared["rival"]]["median_ms"] / case["contenders"][compared["ours"]]["median_ms"]
            )
            assert compared["ratio"] == pytest.approx(ratio, rel=1e-2)
    table = (tmp_path / "measured.md").read_text()
    assert "### c3d_mini, 16 frames" in table and "| captum_dtd bfloat16 |" in table


def test_a_peer_that_counts_residuals_twice_is_wrong(contest: Callable[..., Any]) -> None:
    pytest.importorskip("zennit", reason="zennit is not installed (pip install zennit)")
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    (record,) = contest("R3D_18", "zennit", "plain torch").records()[:1]
    told = record["contenders"]
    assert told["plain torch"]["verdict"] == "agrees" and told["plain torch"]["error"] < 1e-5
    assert told["zennit"]["verdict"] == "wrong"
    assert told["zennit"]["sum_over_score"] == pytest.approx(2**8, rel=1e-3)  # eight blocks


def test_verdicts() -> None:
    verdict = script("explanations").verdict
    right = torch.tensor([3.0, 1.0], dtype=torch.float64)
    told = verdict(torch.tensor([3.0, 1.04]), "shares", 0.02, 4.0, lambda: right)
    assert told["verdict"] == "agrees" and told["error"] == pytest.approx(0.04 / 10**0.5, rel=1e-2)
    assert verdict(torch.tensor([6.0, 2.0]), "winners", 0.02, 4.0, lambda: right) == {
        "verdict": "wrong",
        "error": 1.0,
        "sum_over_score": 2.0,
    }
    assert verdict(torch.tensor([torch.nan, 1.0]), "shares", 0.02, 4.0, lambda: right)["verdict"] == "wrong"
    assert verdict(torch.tensor([1.0, 3.0]), "sum", 0.02, 4.0, lambda: right)["verdict"] == "agrees"
    assert verdict(torch.tensor([1.0, 2.0]), "sum", 0.02, 4.0, lambda: right)["verdict"] == "wrong"
    assert verdict(torch.tensor([9.0, 9.0]), "other", 0.02, 4.0, lambda: right) == {"verdict": "another question"}


def test_a_slow_peers_job_is_extrapolated_and_says_so(
    contest: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    posed = contest("C3D_MINI", "plain torch", precisions=("ieee",))
    for short, extrapolated in ((0.0, True), (1e9, False)):
        monkeypatch.setattr(script("explanations"), "SHORT", short)
        one, job = (record["contenders"] for record in posed.records())
        times = job["plain torch"]["median_ms"] / one["plain torch"]["median_ms"]
        assert (times == pytest.approx(1 + 4, rel=1e-3)) == extrapolated
        assert job["plain torch"]["extrapolated"] == extrapolated
        assert "extrapolated" not in job["captum_dtd ieee"]


def test_a_wrong_answer_of_ours_fails_the_run_and_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    networks, memory = script("networks"), script("memory")
    monkeypatch.setattr(networks, "WORKLOADS", (networks.Workload(networks.C3D_MINI, 16, ("ieee",), memory=True),))
    monkeypatch.setattr(script("explanations"), "ALLOWED", dict.fromkeys(TOLERANCE, 0.0))
    peaks = {
        kind: {"captum_dtd ieee": {"peak_mib": peak, "kept_mib": 3.0}}
        for kind, peak in (("explanation", 11), ("job", 22))
    }
    monkeypatch.setattr(memory, "peaks", lambda workload, small: peaks)
    monkeypatch.setattr(memory, "MEASURABLE", True)
    record = measured(tmp_path, "--only", "^c3d_mini, 16", code=1)
    told = [case["contenders"]["captum_dtd ieee"] for case in record["cases"]]
    assert [each["verdict"] for each in told] == ["wrong", "wrong"]
    assert [each["peak_mib"] for each in told] == [11, 22]
    assert "c3d_mini, 16 frames, job: captum_dtd ieee is off by" in capsys.readouterr().out
    table = (tmp_path / "measured.md").read_text()
    assert "**wrong**" in table and "| 11 + 3, 22 + 3 |" in table


def test_what_there_is_no_time_for_is_left_out_and_told(tmp_path: Path) -> None:
    record = measured(tmp_path, "--minutes", "-1", "--only", "c3d_mini|conv3a")
    assert record["cases"] == []
    assert record["left_out"][0].startswith("C3D conv3a")
    assert record["left_out"][2:4] == ["c3d_mini, 16 frames", "c3d_mini, 32 frames"]
    assert "C3D conv3a" in (tmp_path / "measured.md").read_text()


class Branches(nn.Module):
    """What the plain walk covers beside C3D and r3d_18: parallel branches, padded and average pools, a mean of class maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 4, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(4), nn.ReLU(inplace=True)
        )
        self.left = nn.Sequential(nn.Conv3d(4, 2, 1), nn.ReLU())
        self.right = nn.Sequential(nn.MaxPool3d(3, 1, 1), nn.Conv3d(4, 3, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU())
        self.pool = nn.AvgPool3d((2, 3, 3), 1)
        self.head = nn.Sequential(nn.Dropout(), nn.Conv3d(5, 6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.head(self.pool(torch.cat([self.left(x), self.right(x)], 1)))
        return torch.mean(x, dim=(2, 3, 4))


def test_the_plain_walk_is_deep_taylor() -> None:
    model = Branches().double().eval()
    model.stem[1].running_var.uniform_(0.5, 2)
    low, high = (-1.0, -1.5, -2.0), (2.0, 1.5, 1.0)
    bounds = (torch.tensor(bound, dtype=torch.float64).view(3, 1, 1, 1) for bound in (low, high))
    x = torch.lerp(*bounds, torch.rand(2, 3, 4, 9, 11, dtype=torch.float64))
    expected = DeepTaylor(model, low, high, backend="reference").attribute(x, 4)
    with torch.no_grad():
        actual = script("plain_walk").PlainWalk(model, low, high)(x, 4)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    with pytest.raises(ValueError, match=r"does not cover Sigmoid"):
        script("plain_walk").PlainWalk(nn.Sequential(nn.Conv3d(3, 4, 1), nn.Sigmoid()), low, high)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="peaks of memory are reset by writing to /proc/self/clear_refs, which this system lacks or forbids",
)
def test_peak_memory_is_that_of_the_activations() -> None:
    """The first of c3d_mini's blocks makes 16 channels of a clip of 16 x 56 x 56 pixels."""
    workload = script("networks").named("c3d_mini, 16 frames")
    found = script("memory").peak(workload, "plain torch", "explanation", small=False)
    block = 4 * 16 * 16 * 56 * 56 / 2**20
    assert 2 * block < found["peak_mib"] < 40 * block


# --- what is made of records -------------------------------------------------------------------------------------------


def record_of(ratio: float = 4.0, spread: float = 0.02, runs: int = 3, peak: float = 100.0) -> dict[str, Any]:
    """A record of one comparison: ours takes 1 s, the rival ``ratio``; quartiles lie ``spread`` apart, relatively."""

    def timing(median: float) -> dict[str, Any]:
        quartiles = (median * (1 - spread / 2), median, median * (1 + spread / 2))
        names = ("first_quartile_ms", "median_ms", "third_quartile_ms")
        return {**dict(zip(names, quartiles, strict=True)), "runs": runs}

    compared = {"kind": "job of net / zennit", "precision": "ieee", "ratio": ratio}
    compared |= {"ours": "captum_dtd ieee", "rival": "zennit"}
    contenders = {"captum_dtd ieee": {**timing(1.0), "peak_mib": peak}, "zennit": timing(ratio)}
    cases = [{"case": "net, job", "comparisons": [compared], "contenders": contenders}]
    return {"machine": {"cpu": "a", "feature_level": "b", "threads": 1}, "cases": cases}


@pytest.mark.parametrize(
    ("old", "new", "regressed"),
    [
        ({}, {}, False),
        ({}, {"ratio": 5.0}, False),
        ({}, {"ratio": 3.9}, False),  # 5 % are always noise
        ({}, {"ratio": 3.6}, True),
        ({"spread": 0.2}, {"ratio": 3.6}, False),  # either record's spread is
        ({}, {"ratio": 3.6, "spread": 0.2}, False),
        ({"spread": 0.2}, {"ratio": 2.0}, True),
        ({}, {"peak": 105.0}, False),
        ({}, {"peak": 120.0}, True),
    ],
)
def test_a_regression_is_what_noise_does_not_explain(
    old: dict[str, float], new: dict[str, float], regressed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, options in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(record_of(**options)))
    assert script("compare").main([*map(str, paths)]) == int(regressed)
    assert ("regression: net, job" in capsys.readouterr().out) == regressed


def test_a_contender_that_ran_once_has_the_widest_spread() -> None:
    """Its own quartiles are one number, which tells nothing."""
    compare, old, new = script("compare"), record_of(spread=0.0, runs=1), record_of(3.2, spread=0.0, runs=1)
    assert len(compare.regressions(old, new)) == 1
    noisy = record_of(spread=0.3)["cases"][0]
    old["cases"].append({**noisy, "case": "another", "comparisons": []})
    assert compare.regressions(old, new) == []


def test_records_of_other_machines_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(record_of()))
    with pytest.raises(SystemExit):
        measured(tmp_path, "--compare", str(old))
    assert "cannot be compared: cpu was 'a'" in capsys.readouterr().err


def test_a_run_is_compared_with_an_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--only", "C3D conv3a", "--precision", "ieee")
    record = measured(tmp_path, *options)
    for compared in record["cases"][0]["comparisons"]:
        compared["ratio"] *= 1e6
    old = tmp_path / "old.json"
    old.write_text(json.dumps(record))
    measured(tmp_path, *options, "--compare", str(old), code=1)
    assert "regression: C3D conv3a" in capsys.readouterr().out


def test_whoever_has_run_for_long_sits_out() -> None:
    timing = script("timing")
    runs = {"quick": lambda: None, "slow": lambda: time.sleep(0.02)}
    timings = timing.interleaved(runs, timing.Protocol(5, 0.0, patience=0.01))
    assert {name: len(found.samples) for name, found in timings.items()} == {"quick": 5, "slow": 1}


def test_curves_are_drawn_where_a_number_varies_alone(tmp_path: Path) -> None:
    report, timing = script("report"), {"median_ms": 5.0}
    cases = [
        {"kind": "job", "network": "C3D", "frames": t, "size": 112, "clips": 1, "contenders": {"zennit": timing}}
        for t in (16, 32)
    ]
    cases += [
        {
            "kind": "explanation",
            "network": "r3d_18",
            "frames": 16,
            "size": p,
            "clips": n,
            "contenders": {"zennit": timing},
        }
        for p, n in ((112, 1), (56, 1), (56, 2))
    ]
    drawn = {curve.name: report.drawn(cases, curve, tmp_path / "record.json") for curve in report.CURVES}
    assert all(path.read_text().startswith("<?xml") for path in drawn.values())
    frames, pixels, clips = report.CURVES
    assert report._points(cases, frames, "C3D") == {"zennit": [(16, 0.005), (32, 0.005)]}
    assert report._points(cases, pixels, "r3d_18") == {"zennit": [(112, 0.005), (56, 0.005)]}
    assert report._points(cases, clips, "r3d_18") == {"zennit": [(1, 0.005), (2, 0.0025)]}
    assert report.drawn(cases[:1], frames, tmp_path / "record.json") is None


def test_a_profile_tells_kinds_of_operations(capsys: pytest.CaptureFixture[str]) -> None:
    profile_job = script("profile_job")
    profile_job.main(["c3d_mini, 16 frames", "--small", "--precision", "ieee"])
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    assert float(rows["forward"][2]) > 0
    assert sum(
        float(row[1].split()[0]) for name, row in rows.items() if name not in ("operations", "---")
    ) == pytest.approx(100, abs=1)


def test_operations_are_counted_as_torch_counts_them() -> None:
    """Of a convolution; z+ is two of them, z-beta two with twice the channels, and one where z is divided by already."""
    flops_of = script("profile_job").flops_of
    x, weight = torch.zeros(2, 3, 5, 9, 8), torch.zeros(4, 3, 3, 2, 3)
    with FlopCounterMode(display=False) as counter:
        out = torch.conv3d(x, weight, None, [1, 2, 1], [1, 0, 2], [1, 2, 1])
    expected = counter.get_total_flops()
    given = {"input": x, "x": x, "weight": weight, "relevance": out}
    for name in ("aten::convolution", "captum_dtd::conv3d"):
        assert flops_of(name, given, out) == expected
    for divided in (False, True):
        passes = 1 if divided else 2
        assert flops_of("captum_dtd::z_plus_conv3d", given | {"divided": divided}, x) == passes * expected
        assert flops_of("captum_dtd::z_beta_conv3d", given | {"divided": divided}, x) == 2 * passes * expected
    assert flops_of("aten::mul", given, out) == 0


def test_products_that_several_times_share_are_counted_once() -> None:
    flops_of = script("profile_job").flops_of
    weight, out = torch.zeros(4, 3, 3, 2, 3), torch.zeros(2, 4, 3, 5, 6)
    one = 2 * 2 * out[0, 0, 0].numel() * weight[:, :, 0].numel()  # a tap of both examples
    ends = [-1, 0, 0, 0, 0, 0, 0, 0, -1]
    alone = [-1, 0, 1, 0, 1, 2, 1, 2, -1]
    given = {"weight": weight, "relevance": out, "reads": ends, "gives": alone, "divided": False}
    assert flops_of("captum_dtd::frozen_conv3d", given, out) == 3 * one
    assert flops_of("captum_dtd::frozen_conv3d", given | {"reads": alone}, out) == 7 * one
    assert flops_of("captum_dtd::frozen_conv3d", given | {"reads": ends + alone}, out) == 5 * one
    assert flops_of("captum_dtd::frozen_z_plus_conv3d", given, out) == 10 * one
    assert flops_of("captum_dtd::frozen_z_beta_conv3d", given | {"divided": True}, out) == 14 * one


# --- pytest-benchmark, and the table of kernels ------------------------------------------------------------------------


@pytest.mark.slow
def test_pytest_benchmarks_run() -> None:
    chosen = "conv3a or layer1 or stem or fc8 or pool2 or pool5 or (c3d_mini and 16 and (zennit or float32))"
    chosen += " or test_open or (test_end_to_end and c3d_mini)"
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--small", "--benchmark-disable", "-q", "-k", chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=FOLDER.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tuning_fills_the_table(tmp_path: Path, cpu_kernels: Any) -> None:
    kernels, out = importlib.import_module("captum_dtd.kernels"), tmp_path / "table.json"
    elsewhere = {"cpu": {"riscv": {"conv3d": {"ieee": {"dense": "rvv/ieee"}}}}, "cuda": {"sm_90": {}}}
    out.write_text(json.dumps({"kernels": elsewhere}))
    script("tune").main(["--small", "--repetitions", "1", "--seconds", "0", "--out", str(out)])
    table = json.loads(out.read_text())["kernels"]
    assert table["cuda"] == elsewhere["cuda"] and table["cpu"]["riscv"] == elsewhere["cpu"]["riscv"]
    mine = table["cpu"][kernels.feature_level("cpu")]
    assert set(mine) == {"z_plus_conv3d", "z_beta_conv3d", "conv3d", "max_pool3d", "max_pool3d_relevance", "z_plus_add"}
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
        ("ieee", [{"cuda/tf32": 1.0}], None),
    ],
)
def test_the_fastest_kernel_is_entered(precision: str, times: list[dict[str, float]], best: str | None) -> None:
    """By the geometric mean over the layers it was timed on; of about equal ones the most precise; never a hopeless one."""
    assert script("tune").fastest(times, precision) == best


def test_a_kernel_stays_in_the_race_while_a_precision_may_choose_it() -> None:
    tune = script("tune")
    seconds = {"avx512/ieee": 10.0, "avx512/bf16": 1.0, "generic/ieee": 90.0, "generic/bf16": 5.0}

    def times(runs: dict[str, Any]) -> dict[str, float]:
        return {name: seconds[name] for name in runs if name in seconds}

    clock, names = tune.Clock(times, times), [*seconds, "generic/fails"]
    (found,) = tune.compared([tune.Run(lambda name: torch.empty(0))], names, ["ieee", "bfloat16"], clock)
    assert set(found) == {"avx512/ieee", "avx512/bf16"}


def test_a_gpu_is_timed_by_its_own_clock(capsys: pytest.CaptureFixture[str]) -> None:
    """Here by that of a CPU, through the same code; what does not run is told and left out."""
    tune, timing, device = script("tune"), script("timing"), torch.device("cpu")
    clock = tune.clock_of_gpu(device, timing.Protocol(repetitions=2))

    def fails() -> None:
        raise RuntimeError("out of memory")

    runs = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.02), "fails": fails}
    for times in (clock.look(runs), clock.race(runs)):
        assert set(times) == {"short", "long"} and 0.001 <= times["short"] < times["long"]
    assert capsys.readouterr().out.count("fails failed: RuntimeError: out of memory") == 2
    first, *_, last = tune.tuned(clock, script("workloads").Batch(2, device), small=True)
    assert set(first) == {"z_plus_conv3d"}  # what was found is told at once, since time on a GPU may end
    assert set(last["z_plus_conv3d"]) == set(TOLERANCE) and "z_plus_add" in last


def test_the_table_keeps_what_other_devices_measured() -> None:
    table = {"kernels": {"cpu": {"avx2": {"conv3d": {}}}}, "measured on": {"avx2": {"cpu": "some"}}}
    merged = script("tune").merged(table, "cuda", "sm_90", {"z_plus_add": {}}, {"name": "a GPU"})
    assert merged["kernels"] == {"cpu": {"avx2": {"conv3d": {}}}, "cuda": {"sm_90": {"z_plus_add": {}}}}
    assert merged["measured on"] == {"avx2": {"cpu": "some"}, "sm_90": {"name": "a GPU"}}


def test_the_table_keeps_kinds_of_shape_that_were_not_timed_again() -> None:
    tune, timing, device = script("tune"), script("timing"), torch.device("cpu")
    *_, found = tune.tuned(
        tune.clock_of_cpu(timing.Protocol(repetitions=1)), script("workloads").Batch(1, device), True, "grouped"
    )
    assert set(found) == {"z_plus_conv3d", "conv3d"}
    assert all(set(kinds) == {"grouped"} for each in found.values() for kinds in each.values())
    table = {"kernels": {"cpu": {"avx2": {"conv3d": {"ieee": {"dense": "a", "grouped": "b"}}}}}}
    kept = tune.merged(table, "cpu", "avx2", {"conv3d": {"ieee": {"grouped": "c"}}}, {})["kernels"]["cpu"]["avx2"]
    assert kept == {"conv3d": {"ieee": {"dense": "a", "grouped": "c"}}}


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
    """Every convolution, pooling and residual addition of C3D and r3d_18 is among the workloads, and no other."""
    workloads = script("workloads")
    with torch.device("meta"):
        c3d = C3D()
    pools = {(p.channels, p.size, p.kernel, p.padding, p.output_size) for p in workloads.POOLINGS}
    assert convolutions_of(c3d) == geometries(workloads.C3D_CONVOLUTIONS) | pools
    video = pytest.importorskip("torchvision.models.video", reason="torchvision is not installed")
    with torch.device("meta"):
        r3d_18 = video.r3d_18()
    sums: set[tuple[Any, ...]] = set()
    for module in r3d_18.modules():
        if isinstance(module, video.resnet.BasicBlock):  # ends in an addition
            module.register_forward_hook(lambda _, __, output: sums.add(tuple(output.shape[1:])))
    assert convolutions_of(r3d_18) == geometries(workloads.R3D_18_CONVOLUTIONS)
    assert sums == {(each.channels, *each.size) for each in workloads.ADDITIONS}


def geometries(layers: Any) -> set[tuple[Any, ...]]:
    return {(c.c_in, c.c_out, c.size, c.kernel, c.stride, c.padding) for c in layers}


def test_the_model_zoo_says_what_arrives_and_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = script("model_zoo")

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(3, 4, 1), nn.Conv3d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) * self.b(x)).mean((2, 3, 4))

    def torch_() -> Any:
        layers = nn.Conv3d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
        layers[-1].weight.data.fill_(1.0)
        yield zoo.Entry("torch", "plain", lambda: nn.Sequential(*layers), (2, 6, 5))
        yield zoo.Entry("torch", "product", Product, (2, 6, 5))
        yield zoo.Entry("torch", "left out", Product, (2, 6, 5))

    torch_.__name__ = "torch"

    def absent() -> Any:
        raise AssertionError("it is not installed")

    monkeypatch.setattr(zoo, "LIBRARIES", (torch_, absent))
    zoo.main(["--only", "plain|product", "--out", str(tmp_path / "zoo.md")])
    written = (tmp_path / "zoo.md").read_text()
    assert written.strip() == capsys.readouterr().out.strip()
    assert "| torch | plain | 2x6x5 | 100 % of the score |" in written
    assert "| torch | product | 2x6x5 | refused: mul (1) |" in written
    assert "left out" not in written and torch.__version__.split("+")[0] in written
