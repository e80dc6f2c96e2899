"""Whole walks as a GPU would be asked for them, on tensors that have a device, a shape and a type, but no numbers.

What is seen: which operations and kernels serve, that nothing mixes devices, and that nothing crosses from one to the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import stock_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd import DeepTaylor, kernels, layers, native, routes
from captum_dtd.collapse import FrozenNetwork

LOW, HIGH = -1.0, 1.5
SIZES = {"c3d": 112, "r3d_18": 32, "s3d": 224}


class Operations(TorchDispatchMode):
    """Counts operations, and the kernels that ours are given; notes whatever reads or writes two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.crossings: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func)
        self.counts[name] += 1
        if name.startswith("captum_dtd"):
            self.kernels[args[-1]] += 1
        devices = {t.device.type for t in pytree.tree_leaves((args, kwargs, made)) if isinstance(t, Tensor) and t.dim()}
        if len(devices) > 1 or "_local_scalar_dense" in name:
            self.crossings.append(f"{name} {sorted(devices)}")
        return made


@pytest.fixture(scope="module", params=SIZES)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, stock_model(request.param)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "cuda" not in native.loaded:
        pytest.skip(f"asks which CUDA kernels serve, and there are none here: {native.missing['cuda']}")
    monkeypatch.setattr(kernels, "feature_level", lambda device: "sm_90" if device == "cuda" else "generic")
    monkeypatch.setattr(kernels, "_table", dict)
    # Differentiating asks for a driver.
    monkeypatch.setattr(layers, "adjoint", lambda outputs, leaves, _: tuple(torch.zeros_like(leaf) for leaf in leaves))
    kernels._choose.cache_clear()
    routes._route.cache_clear()
    yield
    kernels._choose.cache_clear()
    routes._route.cache_clear()


def walked(named: tuple[str, Any], precision: Any, wanted: Any) -> tuple[Tensor, Operations]:
    """Relevance of three clips, or of what is wanted of three frozen ones, and what was asked of the device for it."""
    name, model = named
    method = DeepTaylor(model, LOW, HIGH, precision=precision)
    shape = (3, 3, 16, SIZES[name], SIZES[name])
    network: Any = method._network((torch.zeros(shape),), ())
    weights = network.weights(model)
    if wanted is not None:
        network, shape = FrozenNetwork(network, 16), (3, 3, 1, *shape[3:])
    with FakeTensorMode():
        there = {node: torch.empty(w.shape, dtype=w.dtype, device="cuda") for node, w in weights.items()}
        x = torch.empty(shape, device="cuda")
        bounds = [(torch.empty((), device="cuda").expand(shape),) * 2]
        chosen = torch.empty((3, 10), dtype=torch.bool, device="cuda")
        with Operations() as operations:
            activations = network.forward(there, [x])
            seeds = [method.seed_of(activations.output, chosen)]
            ((relevance,),) = network.backward(activations, seeds, bounds, wanted)
        return relevance, operations


@pytest.mark.parametrize(
    ("precision", "kernel", "wanted"),
    [
        ("float32", "cuda/tf32x3", None),
        ("bfloat16", "cuda/bf16", "all"),
        ("float32", "cuda/tf32x3", "classes"),
        ("bfloat16", "cuda/bf16", [(0,), (1, 2), (9,)]),
    ],
)
def test_walks_stay_on_the_device_and_are_served_there(
    named: tuple[str, Any], precision: str, kernel: str, wanted: Any
) -> None:
    relevance, operations = walked(named, precision, wanted)
    assert relevance.device.type == "cuda" and relevance.shape[:2] == (3, 3)
    # Where times are read by a table, it is brought there once.
    moved = [each for each in operations.crossings if not each.startswith("aten._to_copy")]
    assert not moved
    assert {kernel, "cuda/ieee"} == set(operations.kernels)
    own = operations.counts["aten.convolution.default"] + operations.counts["aten.convolution_backward.default"]
    assert own == (1 if named[0] == "s3d" else 0), (
        "torch's own: of S3D the head, at one position, as of others linear layers"
    )
    if wanted == "classes":
        frozen = {name.split(".")[1] for name in operations.counts if "captum_dtd.frozen" in name}
        assert {"frozen_conv3d", "frozen_z_plus_conv3d", "frozen_max_pool3d_relevance"} - frozen <= (
            {"frozen_max_pool3d_relevance"} if "_18" in named[0] else set()
        )


def test_ieee_convolutions_are_torchs_own() -> None:
    """As there is none on tensor units."""
    for op in ("conv3d", "z_plus_conv3d", "z_beta_conv3d"):
        assert kernels._choose(op, "cuda", torch.float32, "ieee", "dense", "sm_90") == "reference"


def test_grouped_convolutions_are_served_like_others_until_they_are_measured() -> None:
    for op in ("conv3d", "z_plus_conv3d"):
        found = [
            kernels._choose(op, "cuda", torch.float32, "float32", shape, "sm_90") for shape in ("grouped", "dense")
        ]  # type: ignore[arg-type]
        assert found == ["cuda/tf32x3"] * 2


def test_the_table_decides_where_torch_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the convolution on the way forward it measured floats; halves torch gives to tensor units itself."""
    kinds = {op: {"bfloat16": {"dense": "cuda/tf32"}} for op in ("conv3d", "z_plus_conv3d")}
    monkeypatch.setattr(kernels, "_table", lambda: {"cuda": {"sm_90": kinds}})

    def chosen(op: str, dtype: torch.dtype) -> str:
        return kernels._choose.__wrapped__(op, "cuda", dtype, "bfloat16", "dense", "sm_90")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen("z_plus_conv3d", dtype) == "cuda/tf32"
        assert chosen("conv3d", dtype) == ("cuda/tf32" if dtype == torch.float32 else "reference")
    assert chosen("z_plus_conv3d", torch.float64) == "reference"
