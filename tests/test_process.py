"""What else goes on in a process, before an explanation, around it and beside it, changes nothing of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, pixel_bounds
from captum_dtd.modes import exact_products


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv3d(16, 32, 3, padding=1, bias=False), nn.BatchNorm3d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).relu()).mean((2, 3, 4)))  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def clips() -> Tensor:
    return torch.rand((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))


def explained(model: nn.Module) -> Tensor:
    return DeepTaylor(model, 0.0, 1.0).attribute(clips(), 2)  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Tensor) -> None:
    assert bool((wanted != 0).any())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="forks processes, which this system cannot (os.fork is of Linux and macOS)"
)


def wrapped(model: nn.Module) -> None:
    """Its forward, by a function that calls the old one."""
    forward = model.forward
    model.forward = lambda *args: forward(*args)  # type: ignore[method-assign]


REPLACED: dict[str, Callable[[Net, Net], Any]] = {
    "assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "parameters": lambda model, other: (
        setattr(model, "stem", other.stem),
        setattr(model.head, "weight", other.head.weight),
    ),
    "data": lambda model, other: [
        setattr(p, "data", q.data) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    ],
    "in place": lambda model, other: model.load_state_dict(other.state_dict()),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("what", ["all", "a part"])
def test_weights_are_read_anew_where_a_forward_is_wrapped(how: str, what: str) -> None:
    model, other = net(), net(1)
    wrapped(model if what == "all" else model.block)
    method = DeepTaylor(model, 0.0, 1.0)
    method.attribute(clips(), 2)
    REPLACED[how](model, other)
    plain = net()
    REPLACED[how](plain, other)
    close(method.attribute(clips(), 2), explained(plain))


def test_who_writes_to_weights_meanwhile_spoils_no_later_explanation() -> None:
    """Packed weights are found by contents: those that another thread has just changed must not be kept under the old ones'."""
    model, untouched = net(), net()

    class Racy(DeepTaylor):
        """Something writes to the weights, as another thread may, between the way forward and the way back."""

        def seed_of(self, output: Tensor, chosen: Tensor) -> Tensor:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            return super().seed_of(output, chosen)

    for precision in ("ieee", "float32", "bfloat16"):
        model.load_state_dict(untouched.state_dict())
        # Of other weights than any before, so that nothing of them has been kept.
        with torch.no_grad():
            for one, other in zip(model.parameters(), untouched.parameters(), strict=True):
                other.mul_(1.25)
                one.copy_(other)
        reference = DeepTaylor(untouched, 0.0, 1.0, backend="reference").attribute(clips(), 2)
        Racy(model, 0.0, 1.0, precision=precision).attribute(clips(), 2)
        found = DeepTaylor(untouched, 0.0, 1.0, precision=precision).attribute(clips(), 2)
        tolerance = 5e-2 if precision == "bfloat16" else 1e-4
        torch.testing.assert_close(found, reference, rtol=0, atol=tolerance * reference.abs().max().item())


@pytest.mark.timeout(60)
def test_an_explanation_inside_of_a_trace_is_refused() -> None:
    other = net(1)

    class Explains(Net):
        def forward(self, x: Tensor) -> Tensor:
            explained(other)
            return super().forward(x)

    with pytest.raises(ValueError, match="cannot be explained while another is traced"):
        explained(Explains().eval())
    close(explained(net()), explained(copy.deepcopy(net())))


@pytest.mark.timeout(60)
@forks
def test_a_process_forked_while_another_thread_traces_has_locks_of_its_own() -> None:
    tracing, forked = threading.Event(), threading.Event()

    class Waits(Net):
        def forward(self, x: Tensor) -> Tensor:
            tracing.set()
            forked.wait(30)
            return super().forward(x)

    method = DeepTaylor(Waits().eval(), 0.0, 1.0)
    thread = threading.Thread(target=lambda: method.attribute(clips(), 2))
    thread.start()
    assert tracing.wait(30)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # ends a process that waits for ever
        forked.set()
        method.rule_table(clips())
        with exact_products():
            pass
        os._exit(0)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


SWITCHES = [
    f"{switch} = '{precision}'"
    for switch, other in (
        ("fp32_precision", "bf16"),
        ("cudnn.conv.fp32_precision", "tf32"),
        ("mkldnn.fp32_precision", "bf16"),
        ("mkldnn.matmul.fp32_precision", "bf16"),
    )
    for precision in ("ieee", other)
]

UNDER_SWITCHES = """
import os, sys
import torch
from test_process import explained, net

wanted = torch.load(sys.argv[1])
switches = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
# They are the process's, and not all can be turned back: each setting has a process of its own.
for setting in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        exec(f"torch.backends.{setting}")
        before = [each.fp32_precision for each in switches]
        torch.testing.assert_close(explained(net()), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
        assert [each.fp32_precision for each in switches] == before, setting
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


@forks
def test_the_newer_switches_of_precision(tmp_path: Path) -> None:
    torch.save(explained(net()), tmp_path / "wanted.pt")
    command = [sys.executable, "-c", UNDER_SWITCHES, str(tmp_path / "wanted.pt"), *SWITCHES]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inside_of_a_compiled_function() -> None:
    model = net()
    for method in (DeepTaylor(model, 0.0, 1.0), DiscriminativeDeepTaylor(model, 0.0, 1.0)):
        found = torch.compile(lambda x, method=method: method.attribute(x, 2), backend="eager")(clips())
        torch.testing.assert_close(found, method.attribute(clips(), 2))


def test_another_default_device() -> None:
    wanted = DiscriminativeDeepTaylor(net(), 0.0, 1.0, composite="epsilon-gamma-box").attribute(clips(), 2)
    model, x = net(), clips()
    with torch.device("meta"):
        low, high = pixel_bounds((0.5,), (0.5,))
        found = DiscriminativeDeepTaylor(model, 0.0, 1.0, composite="epsilon-gamma-box").attribute(x, 2)
    assert (low.item(), high.item()) == (-1.0, 1.0)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_layers_that_torch_fused() -> None:
    class Fusible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3, 4)))  # type: ignore[no-any-return]

    model = Fusible().eval()
    fused = torch.ao.quantization.fuse_modules(model, [["conv", "norm", "relu"]])
    close(explained(fused), explained(model))


def test_other_threads_write_to_stderr_while_a_model_is_traced(capfd: pytest.CaptureFixture[str]) -> None:
    traced, written = threading.Event(), threading.Event()
    handlers: list[logging.Handler] = []

    class Waits(Net):
        def forward(self, x: Tensor) -> Tensor:
            print("from the model", file=sys.stderr)
            traced.set()
            assert written.wait(30)
            return super().forward(x)

    def writes() -> None:
        assert traced.wait(30)
        before = sys.stderr
        print("from beside it", file=sys.stderr)
        assert before.fileno() >= 0
        handlers.append(logging.StreamHandler())
        written.set()

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))))
        stream, thread = sys.stderr, threading.Thread(target=writes)
        thread.start()
        explained(Waits().eval())
        thread.join()
        assert sys.stderr is stream
        handlers[0].emit(logging.makeLogRecord({"msg": "from a handler that was made meanwhile"}))
    said = capfd.readouterr().err
    for text in ("from the model", "from beside it", "from a handler that was made meanwhile"):
        assert text in said


def test_an_interrupt_that_torch_turned_into_another_error_is_one() -> None:
    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("Trying to pop empty mode stack")  # noqa: B904

    with pytest.raises(KeyboardInterrupt):
        explained(Interrupted().eval())
