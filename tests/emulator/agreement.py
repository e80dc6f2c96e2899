"""What the emulated kernels of every operation in IEEE arithmetic are held to; ``run`` is the operation by such a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from op_cases import DTYPES, VARIANTS, Case, Variant, disagreement, problem, tolerance
from torch import Tensor

Run = Callable[..., Tensor]


def assert_agrees(op: str, case: Case, run: Run) -> None:
    """With the oracle, in every variant, type and layout."""
    failures = []
    for variant, short in itertools.product(VARIANTS[op], (True, False)):
        for dtype in DTYPES:
            posed = problem(op, case, variant, dtype, short)
            for layout in ("contiguous", "channels_last"):
                actual = run(**posed.on("cpu", dtype, layout), out=layout)
                wrong = disagreement(actual, posed, tolerance(op, "cuda/ieee", dtype, short))
                if wrong:
                    failures.append(f"{dtype} {variant.name}, {layout}: {wrong}")
    assert not failures, "\n".join(failures)


def assert_same_bits(
    op: str, case: Case, variants: Sequence[Variant], layout: str, threads: int, run: Run, front: ModuleType
) -> None:
    """In whatever order threads run, and by launches of so many of them."""
    for variant in variants:
        arguments = problem(op, case, variant, torch.float32, False).on("cpu", torch.float32, layout)
        first = run(**arguments, out=layout)
        for seed, most in itertools.product((0, 1, 2), (1 << 30, threads)):
            front.set_seed(seed)
            again = run(**arguments, out=layout, threads=most)
            front.set_seed(0)
            assert torch.equal(first, again)
