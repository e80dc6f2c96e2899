"""The README's example does what the README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_its_shapes_are_true() -> None:
    pytest.importorskip("torchvision", reason="the README's example explains a torchvision model")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    # One clip of four frames tells as much as two of eight.
    example = example.replace("torch.rand(2, 3, 8, 64, 64)", "torch.rand(1, 3, 4, 32, 32)")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    for part in ("spatial", "temporal", "total"):
        assert names[part].shape == (1, 4, 32, 32)
    assert torch.equal(names["total"] - names["spatial"], names["temporal"])
    assert names["total"].abs().max() > 0


def test_the_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert len(pictures) == 2
    assert all((README.parent / picture).is_file() for picture in pictures)
