"""Relevance does not depend on the switches that let torch round floats, and leaves them as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys, threading
import torch
from captum_dtd import modes

torch.cuda.is_available = lambda: True  # the switches are there without a GPU

def told():
    found = {}
    for name, read in {
        "convolutions": lambda: torch.backends.cudnn.conv.fp32_precision,
        "products": lambda: torch.backends.cuda.matmul.fp32_precision,
        "older, convolutions": lambda: torch.backends.cudnn.allow_tf32,
        "older, products": lambda: torch.get_float32_matmul_precision(),
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "refused"
    return found

exec(sys.argv[1])
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
print(json.dumps({"before": before, "inside": inside, "still": still, "between": between, "after": told()}))
"""

SETTINGS = {
    "torch's own": "",
    "older, high": "torch.set_float32_matmul_precision('high')",
    "older, medium": "torch.set_float32_matmul_precision('medium')",
    "older, each": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "newer, products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, convolutions": "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "newer, exact": "torch.backends.fp32_precision = 'ieee'",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_inside_and_as_they_were_after(setting: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, SETTINGS[setting]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    for moment in ("inside", "still", "between"):
        assert {told[moment]["convolutions"], told[moment]["products"]} <= {"ieee", "none"}, (moment, told)
    assert told["after"] == told["before"]
