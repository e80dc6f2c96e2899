"""How fast the CUDA kernels are: against PyTorch's own calls, and against what the GPU can do at all.

    python benchmarks/gpu_bench.py                       # everything, at most --limit seconds
    python benchmarks/gpu_bench.py --only "C3D|pool"     # the cases whose name matches
    python benchmarks/gpu_bench.py --device cpu --smoke  # tiny layers: shows that everything runs, measures nothing

Layers are those of C3D and r3d_18 for a batch of 16 clips. The rivals of a convolution are its z+ composed of F.conv3d,
convolution_backward and elementwise steps, in both layouts; "cuDNN alone" is the two convolutions without the elementwise
steps. All of a rival is in the measured type, relevance too, where ours is float32. Ratios are of medians, best rival over
ours: above 1 the fused operation is faster. Max poolings and additions are told by the bytes that they must move, as a share
of the rate of a plain copy. What decides most comes first; then, as long as there is time, all of it against what torch.compile
makes of the rivals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from gpu import ROOT, Timer, about, device_of, options, write
from torch import Tensor
from workloads import Addition, Convolution, Pooling

from captum_dtd import kernels, ops

aten = torch.ops.aten

LAYOUTS = {"channels last": torch.channels_last_3d, "contiguous": torch.contiguous_format}

Contenders = dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Grade:
    """A precision: the type of activations and weights, what cuDNN may round to, and arithmetics of ours of the same grade."""

    name: str
    dtype: torch.dtype
    tf32: bool
    arithmetics: tuple[str, ...]

    def kernels(self, op: str, device: torch.device) -> list[str]:
        """Those of an operation that the device has; on a CPU, which measures nothing here, whatever serves."""
        if device.type != "cuda":
            return ["auto"]
        names = kernels.available(op, device.type, self.dtype)
        return [name for name in names if name.rpartition("/")[2] in self.arithmetics]


GRADES = (
    Grade("float32", torch.float32, False, ("bf16x3", "tf32x3")),
    Grade("tf32", torch.float32, True, ("tf32",)),
    Grade("bfloat16", torch.bfloat16, True, ("bf16",)),
    Grade("float16", torch.float16, True, ("f16",)),
)


@dataclass(frozen=True)
class MaxPool:
    """A max pooling whose windows may overlap; ``size`` is (T, H, W) of its input."""

    name: str
    channels: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]

    def __str__(self) -> str:
        return f"pool {self.name} {self.channels} {'x'.join(map(str, self.size))}"


def of_c3d(pool: Pooling) -> MaxPool:
    """A pooling of C3D, whose windows do not overlap."""
    return MaxPool(f"C3D {pool.name}", pool.channels, pool.size, pool.kernel, pool.kernel, pool.padding)


POOLINGS = (
    *map(of_c3d, workloads.POOLINGS),
    MaxPool("S3D maxpool 1", 64, (8, 56, 56), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    MaxPool("S3D maxpool 3", 480, (8, 28, 28), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    MaxPool("S3D branch", 480, (4, 14, 14), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
)


@dataclass
class Case:
    """Contenders that compute the same. ``work`` is what one run must do at least: FLOPs, or bytes moved."""

    name: str
    grade: str
    unit: str
    work: int
    ours: Contenders
    rivals: Contenders
    bounds: Contenders = field(default_factory=dict)  # less than the operation: timed to know what is possible
    reference: Callable[[], Tensor | tuple[Tensor, ...]] | None = None


# --- convolutions --------------------------------------------------------------------------------------------------------


def _z_plus(
    u: Tensor, weight: Tensor, relevance: Tensor, stride: list[int], padding: list[int], groups: int = 1
) -> Tensor:
    """z+ as one writes it: two library calls and elementwise steps between."""
    z = F.conv3d(u, weight, None, stride, padding, 1, groups)
    s = torch.where(z == 0, 0, relevance / z)
    return u * _adjoint(u, weight, s, stride, padding, groups)


def _adjoint(u: Tensor, weight: Tensor, s: Tensor, stride: list[int], padding: list[int], groups: int) -> Tensor:
    only_input = [True, False, False]
    pulled: Tensor = aten.convolution_backward(
        s, u, weight, None, stride, padding, [1, 1, 1], False, [0, 0, 0], groups, only_input
    )[0]
    return pulled


def _z_beta(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    relevance: Tensor,
    stride: list[int],
    padding: list[int],
    groups: int,
) -> Tensor:
    """z-beta as z+ of the distances to the box, twice the channels; of one group."""
    assert groups == 1
    first, second = _z_plus(torch.cat([x - low, high - x], 1), weight, relevance, stride, padding).chunk(2, 1)
    return first + second


def _alone(u: Tensor, weight: Tensor, relevance: Tensor, stride: list[int], padding: list[int], groups: int) -> Tensor:
    """The convolution and its adjoint, nothing else."""
    F.conv3d(u, weight, None, stride, padding, 1, groups)
    return _adjoint(u, weight, relevance, stride, padding, groups)


def _compiled_rival(body: Callable[..., Any], arguments: tuple[Any, ...], layout: str) -> Contenders:
    """In the layout that is the faster one, since compiling takes long."""
    if layout != "channels last":
        return {}
    return {f"composed and compiled, {layout}": partial(torch.compile(body, dynamic=False), *arguments)}


def _rival(body: Callable[..., Any], arguments: tuple[Any, ...], layout: str, compiled: bool) -> Contenders:
    if compiled:
        return _compiled_rival(body, arguments, layout)
    return {f"composed, {layout}": partial(body, *arguments)}


def convolution_case(
    layer: Convolution, grade: Grade, batch: int, device: torch.device, compiled: bool, beta: bool
) -> Case:
    """One convolution: z+ of what a ReLU leaves, or z-beta of pixels."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = random(batch, layer.c_in, *layer.size)
    x = (x.clamp(-2, 2) if beta else x.relu()).to(grade.dtype)
    of_group = layer.c_in // layer.groups
    weight = random(layer.c_out, of_group, *layer.kernel) / math.sqrt(of_group * math.prod(layer.kernel))
    weight = weight.to(grade.dtype)
    relevance = random(batch, layer.c_out, *layer.output_size).abs()
    bounds = tuple(torch.full((1, layer.c_in, 1, 1, 1), side, device=device) for side in (-2.5, 2.5)) if beta else ()
    positive = torch.cat([weight.clamp(min=0), -weight.clamp(max=0)], 1) if beta else weight.clamp(min=0)
    geometry = [list(layer.stride), list(layer.padding), layer.groups]
    op = "z_beta_conv3d" if beta else "z_plus_conv3d"
    case = Case(
        f"{layer}{' pixels' if beta else ''}", grade.name, "FLOP", batch * layer.flops * (2 if beta else 1), {}, {}
    )
    for layout, memory_format in LAYOUTS.items():
        there = partial(torch.Tensor.contiguous, memory_format=memory_format)
        u, given = there(x), there(relevance)
        for kernel in grade.kernels(op, device):
            options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            options["kernel"] = kernel
            if not beta:
                options["non_negative"] = True
            case.ours[f"{kernel}, {layout}"] = partial(getattr(ops, op), u, *bounds, weight, given, **options)
        narrow, v = there(given.to(grade.dtype)), there(positive)
        arguments: tuple[Any, ...] = (u, *(b.to(grade.dtype) for b in bounds), v, narrow, *geometry)
        body: Callable[..., Tensor] = _z_beta if beta else _z_plus
        case.rivals |= _rival(body, arguments, layout, compiled)
        if not beta and not compiled:
            case.bounds[f"cuDNN alone, {layout}"] = partial(_alone, *arguments)
    wide = [t[:1].double() for t in (x, relevance)]  # one clip tells whether all compute the same
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups, "kernel": "reference"}
    if not beta:
        options["non_negative"] = True
    case.reference = partial(
        getattr(ops, op), wide[0], *(b.double() for b in bounds), weight.double(), wide[1], **options
    )
    return case


def forward_case(layer: Convolution, grade: Grade, batch: int, device: torch.device) -> Case:
    """The convolution alone, as on the way forward, against torch's."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, layer.c_in, *layer.size, generator=generator, device=device).to(grade.dtype)
    of_group = layer.c_in // layer.groups
    weight = torch.randn(layer.c_out, of_group, *layer.kernel, generator=generator, device=device).to(grade.dtype)
    geometry: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    case = Case(f"{layer} forward", grade.name, "FLOP", batch * layer.flops // 2, {}, {})
    for layout, memory_format in LAYOUTS.items():
        u = x.contiguous(memory_format=memory_format)
        for kernel in grade.kernels("conv3d", device):
            case.ours[f"{kernel}, {layout}"] = partial(ops.conv3d, u, weight, None, **geometry, kernel=kernel)
        case.rivals[f"F.conv3d, {layout}"] = partial(F.conv3d, u, weight, None, **geometry)
    case.reference = partial(F.conv3d, x[:1].double(), weight.double(), None, **geometry)
    return case


# --- max pooling ---------------------------------------------------------------------------------------------------------


def _pooled(u: Tensor, relevance: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Proportional max pooling by average pooling, which adds up windows, and its adjoint."""
    window = (kernel, stride, padding, False, True, 1)
    z = F.avg_pool3d(u, *window)
    pulled: Tensor = aten.avg_pool3d_backward(torch.where(z == 0, 0, relevance / z), u, *window)
    return u * pulled


def _winner(u: Tensor, relevance: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Winner takes all, by max pooling and its adjoint."""
    _, indices = aten.max_pool3d_with_indices(u, kernel, stride, padding)
    pulled: Tensor = aten.max_pool3d_with_indices_backward(
        relevance, u, kernel, stride, padding, [1, 1, 1], False, indices
    )
    return pulled


def pooling_case(
    pool: MaxPool, dtype: torch.dtype, winner: bool, batch: int, device: torch.device, compiled: bool
) -> Case:
    """One max pooling; ``work`` is what it must read and write at least: x, relevance and the result, once each."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, pool.channels, *pool.size, generator=generator, device=device).relu().to(dtype)
    windows = list(pool.kernel), list(pool.stride), list(pool.padding)
    options: dict[str, Any] = {"kernel_size": pool.kernel, "stride": pool.stride, "padding": pool.padding}
    options["winner_takes_all"] = winner
    relevance = torch.rand_like(F.max_pool3d(x.float(), *windows))
    work = x.numel() * (x.element_size() + 4) + relevance.numel() * 4
    rule = "winner takes all" if winner else "proportional"
    case = Case(f"{pool} {rule}", str(dtype).removeprefix("torch."), "byte", work, {}, {})
    for layout, memory_format in LAYOUTS.items():
        u, given = (t.contiguous(memory_format=memory_format) for t in (x, relevance))
        case.ours[f"ours, {layout}"] = partial(ops.max_pool3d_relevance, u, given, **options)
        body: Callable[..., Tensor] = _winner if winner else _pooled
        arguments: tuple[Any, ...] = (u, given.to(dtype), *windows)
        case.rivals |= _rival(body, arguments, layout, compiled)
    clip = x[:1].double(), relevance[:1].double()
    case.reference = partial(ops.max_pool3d_relevance, *clip, **options, kernel="reference")
    return case


# --- additions -------------------------------------------------------------------------------------------------------------


def _summands(x: Tensor, other: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """z+ on an addition, in elementwise steps."""
    u, v = x.clamp(min=0), other.clamp(min=0)
    z = u + v
    s = torch.where(z == 0, 0, relevance / z)
    return u * s, v * s


def addition_case(layer: Addition, dtype: torch.dtype, batch: int, device: torch.device, compiled: bool) -> Case:
    """The end of a residual block; ``work`` is what it must read and write at least: summands, relevance and two results."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, layer.channels, *layer.size)
    x, other = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    relevance = torch.rand(shape, generator=generator, device=device)
    work = 2 * x.nbytes + 3 * relevance.nbytes
    case = Case(str(layer), str(dtype).removeprefix("torch."), "byte", work, {}, {})
    for layout, memory_format in LAYOUTS.items():
        u, v, given = (t.contiguous(memory_format=memory_format) for t in (x, other, relevance))
        case.ours[f"ours, {layout}"] = partial(ops.z_plus_add, u, v, given)
        arguments = (u, v, given.to(dtype))
        case.rivals |= _rival(_summands, arguments, layout, compiled)
    clip = (t[:1].double() for t in (x, other, relevance))
    case.reference = partial(ops.z_plus_add, *clip, kernel="reference")
    return case


# --- what the device can do ------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, timer: Timer, small: bool) -> dict[str, Any]:
    """Rates of a large copy, of large matrix products, and of mma.sync alone."""
    numbers = 2**12 if small else 2**29
    source = torch.rand(numbers, device=device)
    target = torch.empty_like(source)
    side = 64 if small else 8192
    runs: Contenders = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        runs[f"matmul {name}"] = partial(torch.mm, a, b)
    found: dict[str, Any] = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    times = timer.times(runs)
    torch.backends.cuda.matmul.allow_tf32 = True
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    times |= timer.times({"matmul tf32": partial(torch.mm, a, b)})
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, timing in times.items():
        work = 2 * source.nbytes if name == "copy" else 2 * side**3
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        found[name] = {**timing, unit: _digits(work / timing["median_ms"] / 1e9)}
    if device.type == "cuda":
        found["mma.sync TFLOP/s"] = _mma_rate()
    return found


def _mma_rate() -> dict[str, float] | str:
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "mma_rate"))
        source = ROOT / "benchmarks" / "mma_rate.cu"
        flags = ["-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-I", str(ROOT / "csrc" / "cuda")]
        try:
            subprocess.run(["nvcc", *flags, str(source), "-o", program], check=True, capture_output=True, text=True)
            told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            return f"not measured: {error} {getattr(error, 'stderr', '')}"
        return dict(json.loads(told))


# --- measuring -------------------------------------------------------------------------------------------------------------


def cases(
    device: torch.device, batch: int, small: bool, compiles: bool, wanted: Callable[[str], bool]
) -> Iterator[Callable[[], Case]]:
    """Every case, made when it is asked for."""
    decisive, others = ("float32", "bfloat16"), ("tf32", "float16")
    layers = [layer for layer in workloads.CONVOLUTIONS if layer.c_in > 3]
    plain_and_pixels = [(layer, False) for layer in layers] + [(layer, True) for layer in workloads.PIXEL_LAYERS]
    grouped = [(layer, False) for layer in workloads.GROUPED_LAYERS]

    def convolutions(
        some: list[tuple[Convolution, bool]], grades: tuple[str, ...], compiled: bool
    ) -> Iterator[Callable[[], Case]]:
        for grade in (each for each in GRADES if each.name in grades):
            for layer, beta in some:
                if wanted(f"{layer} {grade.name}{' pixels' if beta else ''}"):
                    one = workloads.reduced(layer) if small else layer
                    yield partial(convolution_case, one, grade, batch, device, compiled, beta)

    def poolings(winner: bool, compiled: bool) -> Iterator[Callable[[], Case]]:
        for pool, dtype in itertools.product(POOLINGS, (torch.float32, torch.bfloat16)):
            if wanted(f"{pool} {dtype} {'winner takes all' if winner else 'proportional'}"):
                one = replace(pool, channels=4, size=(4, 8, 8)) if small else pool
                yield partial(pooling_case, one, dtype, winner, batch, device, compiled)

    def additions(compiled: bool) -> Iterator[Callable[[], Case]]:
        for addition, dtype in itertools.product(workloads.ADDITIONS, (torch.float32, torch.bfloat16)):
            if wanted(f"{addition} {dtype}"):
                one = workloads.reduced_addition(addition) if small else addition
                yield partial(addition_case, one, dtype, batch, device, compiled)

    def forwards() -> Iterator[Callable[[], Case]]:
        for layer, grade in itertools.product(layers, GRADES):
            if grade.name in decisive and wanted(f"{layer} {grade.name} forward"):
                yield partial(forward_case, workloads.reduced(layer) if small else layer, grade, batch, device)

    for compiled in (False, True) if compiles else (False,):
        yield from convolutions(plain_and_pixels, decisive, compiled)
        yield from poolings(False, compiled)
        yield from additions(compiled)
        if not compiled:
            yield from forwards()
        yield from convolutions(grouped, decisive, compiled)
        yield from convolutions(plain_and_pixels, others, compiled)
        yield from poolings(True, compiled)


def measured(case: Case, timer: Timer, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Time a case; everything that is known about it afterwards."""
    tf32 = case.grade != "float32"
    torch.backends.cudnn.allow_tf32 = tf32
    assert case.reference is not None
    torch.backends.cudnn.benchmark = False  # nobody waits for the best way to compute it once
    right = workloads.joined(case.reference())
    torch.backends.cudnn.benchmark = True
    errors = {name: _error(workloads.joined(run())[:1], right) for name, run in case.ours.items()}
    contenders = {**case.ours, **case.rivals, **case.bounds}
    times = timer.times(contenders)
    for timing in times.values():
        if "median_ms" in timing:
            timing[f"T{case.unit}/s"] = _digits(case.work / timing["median_ms"] / 1e9)

    def best(names: Contenders) -> str | None:
        ran = [name for name in names if "median_ms" in times[name]]
        return min(ran, key=lambda name: float(times[name]["median_ms"])) if ran else None

    found: dict[str, Any] = {
        "case": case.name,
        "grade": case.grade,
        "work": case.work,
        "unit": case.unit,
        "contenders": times,
    }
    found["errors"] = {name: _digits(error) for name, error in errors.items()}
    ours, rival, bound = best(case.ours), best(case.rivals), best(case.bounds)
    if ours:
        found["ours"] = ours
        for what, name in (("rival", rival), ("bound", bound)):
            if name:
                found[what] = name
                found[f"ratio to {what}"] = round(times[name]["median_ms"] / times[ours]["median_ms"], 3)
        rate = ceiling["copy"]["TB/s"] if case.unit == "byte" else _matmul_rate(case.grade, ceiling)
        found["share of copy" if case.unit == "byte" else "share of matmul"] = round(
            times[ours][f"T{case.unit}/s"] / rate, 3
        )
    return found


def _matmul_rate(grade: str, ceiling: dict[str, Any]) -> float:
    """float32 grade is judged by tf32: it is made of three such products."""
    name = {"float32": "matmul tf32", "tf32": "matmul tf32"}.get(grade, f"matmul {grade}")
    return float(ceiling[name]["TFLOP/s"])


def _digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


def _error(result: Tensor, right: Tensor) -> float:
    return float((result.double() - right).norm() / right.norm())


def show(found: dict[str, Any]) -> None:
    """One line of what is known about a case."""
    if "ours" not in found:
        print(
            f"{found['case']:58} {found['grade']:9} ours failed: {next(iter(found['contenders'].values()))}", flush=True
        )
        return
    timing = found["contenders"][found["ours"]]
    spread = timing["third_quartile_ms"] - timing["first_quartile_ms"]
    ratios = "  ".join(
        f"{what} {found[key]:5.2f}"
        for what, key in (("rival", "ratio to rival"), ("cuDNN", "ratio to bound"))
        if key in found
    )
    share = found.get("share of copy", found.get("share of matmul"))
    print(
        f"{found['case']:58} {found['grade']:9} {timing['median_ms']:9.4f} ms +- {spread:7.4f}  {share:6.1%}  {ratios}  "
        f"error {max(found['errors'].values()):.1e}",
        flush=True,
    )


def _kind(case: dict[str, Any]) -> str:
    if case["unit"] != "byte":
        if re.search(r" g\d+ k", case["case"]):
            return "grouped"
        return "forward" if case["case"].endswith(" forward") else "convolution"
    return "addition" if " add " in case["case"] else "pooling"


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worst ratio and geometric mean of every grade, of every kind of operation."""
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for case in found:
        if "ratio to rival" in case:
            groups.setdefault((_kind(case), case["grade"], "compiled" in case["rival"]), []).append(case)
    rows = []
    for (kind, grade, compiled), members in groups.items():
        worst = min(members, key=lambda case: float(case["ratio to rival"]))
        mean = math.exp(sum(math.log(case["ratio to rival"]) for case in members) / len(members))
        shares = sorted(float(case.get("share of copy") or case["share of matmul"]) for case in members)
        rows.append(
            {
                "kind": kind,
                "grade": grade,
                "against": "compiled" if compiled else "composed",
                "cases": len(members),
                "worst ratio": worst["ratio to rival"],
                "worst case": worst["case"],
                "geometric mean": round(mean, 3),
                "median share of the ceiling": shares[len(shares) // 2],
            }
        )
        print(rows[-1])
    return rows


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the record; its path."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, limit=540, repetitions=15)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args(arguments)
    device = device_of(given, parser)
    torch.backends.cudnn.benchmark = True
    timer = Timer(device, 2 if given.smoke else given.repetitions, 0 if given.smoke else 2.0)
    pattern = re.compile(given.only)
    record: dict[str, Any] = {"about": about(device), "batch": given.batch, "smoke": given.smoke}
    record["kernels"] = {op: kernels.available(op, device.type, torch.float32) for op in ops.SCHEMAS}
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    left_out = 0
    with torch.no_grad():
        record["ceilings"] = ceilings(device, timer, given.smoke)
        print(json.dumps(record["ceilings"], indent=1))
        every = cases(
            device,
            2 if given.smoke else given.batch,
            given.smoke,
            not given.no_compile,
            lambda name: bool(pattern.search(name)),
        )
        for make in every:
            if time.monotonic() - begun > given.limit:
                left_out += 1
                continue
            try:
                found.append(measured(make(), timer, record["ceilings"]))
                show(found[-1])
            except Exception as error:  # a finding, not the end of the measurement
                failed.append(f"{type(error).__name__}: {str(error)[:500]}")
                print(f"a case failed: {failed[-1]}", flush=True)
            write("gpu_bench", record | {"cases": found, "failed": failed}, done=False)
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    record |= {"summary": summary(found), "cases": found, "failed": failed, "left out for lack of time": left_out}
    if left_out:
        print(f"{left_out} cases were left out: --limit was reached; measure them with --only")
    return write("gpu_bench", record)


if __name__ == "__main__":
    main()
