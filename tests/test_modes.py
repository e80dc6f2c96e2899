"""Relevance does not depend on the switches that let torch round floats, and leaves them as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, os, sys, threading
import torch
from captum_dtd import modes

torch.cuda.is_available = lambda: True  # the switches are there without a GPU

def told():
    found = {}
    for name, read in {
        "convolutions": lambda: torch.backends.cudnn.conv.fp32_precision,
        "products": lambda: torch.backends.cuda.matmul.fp32_precision,
        "oneDNN's convolutions": lambda: torch.backends.mkldnn.conv.fp32_precision,
        "oneDNN's products": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "older, convolutions": lambda: torch.backends.cudnn.allow_tf32,
        "older, products": lambda: torch.get_float32_matmul_precision(),
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "refused"
    return found

def look(setting):
    exec(setting)
    before = told()
    with modes.exact_products():
        inside = told()
        with modes.exact_products():
            pass
        still = told()

        def other():
            with modes.exact_products():
                entered.set()
                left.wait()

        entered, left = threading.Event(), threading.Event()
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
    between = told()  # one thread has left, the other has not
    left.set()
    thread.join()
    return {"before": before, "inside": inside, "still": still, "between": between, "after": told()}

# The switches are the process's, and not all can be turned back: each setting has a process of its own.
for setting in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        print(json.dumps(look(setting)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print("null", flush=True)
"""

SETTINGS = {
    "torch's own": "",
    "older, high": "torch.set_float32_matmul_precision('high')",
    "older, medium": "torch.set_float32_matmul_precision('medium')",
    "older, each": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "newer, products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, convolutions": "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "newer, oneDNN's convolutions": "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "newer, oneDNN's products": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "newer, all bfloat16": "torch.backends.fp32_precision = 'bf16'",
    "newer, exact": "torch.backends.fp32_precision = 'ieee'",
}


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What torch says of its switches, before, inside, between and after, under each setting."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *SETTINGS.values()], capture_output=True, text=True)
    print(done.stderr)  # of processes that failed
    return dict(zip(SETTINGS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_inside_and_as_they_were_after(told: dict[str, Any], setting: str) -> None:
    assert told[setting] is not None, "its process failed"
    for moment in ("inside", "still", "between"):
        products = {value for name, value in told[setting][moment].items() if "older" not in name}
        assert products <= {"ieee", "none"}, (moment, told[setting])
    assert told[setting]["after"] == told[setting]["before"]
