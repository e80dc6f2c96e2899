"""The README's example does what the README says; the documentation knows every module, and what it points at is there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
DOCS = sorted((README.parent / "docs").glob("*.md"))


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


def test_links_lead_to_files() -> None:
    for page in (README, *DOCS):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name} leads nowhere: {missing}"


def test_every_module_is_described() -> None:
    """In the tables of docs/architecture.md and docs/kernels.md, each by its name or that of a family (``winograd*``)."""
    named = re.findall(r"`([\w*./]+)`", "".join(page.read_text(encoding="utf-8") for page in DOCS))
    package = README.parent / "captum_dtd"
    modules = [*package.glob("*.py"), *package.glob("dataset/*.py"), *README.parent.glob("csrc/*.*")]
    modules += README.parent.glob("csrc/*/*.*")
    forgotten = [
        str(module.relative_to(README.parent))
        for module in modules
        if module.name not in ("__init__.py", "version.py")
        and not any(fnmatch(name, each) for each in named for name in (module.name, module.stem))
    ]
    assert not forgotten, forgotten
