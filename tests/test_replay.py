"""Recorded explanations are those of the walk itself, to the bit, whatever changes between one call and the next.

A CUDA graph repeats operations on memory that stays where it is, and knows nothing of the Python that asked for them. So does
what stands for it here, on the CPU: whatever only Python would notice, it misses too. test_cuda_device.py has the graphs.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from models import ZOO, Case, between, stock_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, replay, routes
from captum_dtd.models import c3d_mini

LOW, HIGH = -1.0, 1.5


class Operations(TorchDispatchMode):
    """Notes operations, and repeats them on the tensors that they were first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view:
            self.all.append((func, args, kwargs or {}, made))
        return made

    def repeat(self) -> None:
        for func, args, kwargs, made in self.all:
            again = func(*args, **kwargs)
            for place, tensor in zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True):
                if place is not tensor and isinstance(place, Tensor) and place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)


class Repeated:
    """What stands for a CUDA graph."""

    device_type = "cpu"
    made = finished = 0

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        assert device.type == "cpu"
        Repeated.made += 1
        with Operations() as self._operations:
            self._results = function()

    def replay(self, load: Callable[[], None]) -> Any:
        load()
        self._operations.repeat()
        return pytree.tree_map_only(Tensor, torch.clone, self._results)

    def finish(self) -> None:
        Repeated.finished += 1


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CudaGraph", Repeated)
    monkeypatch.setattr(Repeated, "made", 0)
    monkeypatch.setattr(Repeated, "finished", 0)
    monkeypatch.setattr(routes, "_MOVED_IN_RUNS", {"meta"})  # times move as they do on a GPU


def clips(*shape: int, seed: int = 0) -> Tensor:
    return between((LOW,) * shape[1], (HIGH,) * shape[1], shape, seed, torch.float32)


def assert_equal(actual: Any, expected: Any) -> None:
    assert pytree.tree_leaves(expected)[0].abs().max() > 0, "equal zeros would show nothing"
    for found, right in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(found, right)


def both(model: nn.Module, **options: Any) -> tuple[DiscriminativeDeepTaylor, DiscriminativeDeepTaylor]:
    """Recording and not."""
    return (
        DiscriminativeDeepTaylor(model, LOW, HIGH, cuda_graphs=True, **options),
        DiscriminativeDeepTaylor(model, LOW, HIGH, **options),
    )


def explainers(model: nn.Module, low: Any = LOW, high: Any = HIGH) -> tuple[DeepTaylor, DeepTaylor]:
    """Likewise, of single explanations."""
    return DeepTaylor(model, low, high, cuda_graphs=True), DeepTaylor(model, low, high)


@pytest.mark.parametrize("precision", ["float32", "ieee"])
@pytest.mark.parametrize(
    "options", [{"readout": "own"}, {"readout": "first"}, {"readout": "mean"}, {"normalize": "max"}]
)
def test_other_clips_and_other_targets(options: Any, precision: str) -> None:
    """What is recorded is the clips' explanation, and that of their frozen clips: two, replayed."""
    recording, plain = both(c3d_mini().eval(), precision=precision, **options)
    for call in range(4):
        x, target = clips(2, 3, 8, 32, 32, seed=call), [call, 9 - call]
        assert_equal(recording.attribute(x, target), plain.attribute(x, target))
        assert Repeated.made == (0 if call == 0 else 2)


def test_branches_that_are_joined() -> None:
    model = stock_model("s3d")
    model.avgpool = nn.AvgPool3d((2, 1, 1), stride=1)
    recording, plain = both(model, readout="own")
    for call in range(3):
        x = clips(1, 3, 16, 32, 32, seed=call)
        expected = plain.attribute(x, call, internal_batch_size=16)
        assert_equal(recording.attribute(x, call, internal_batch_size=16), expected)
    assert Repeated.made == 2


def test_weights_that_are_edited_where_they_lie() -> None:
    """Training steps, folded batch norms among them: weights are read when a recording is replayed."""
    model = stock_model("r3d_18")
    recording, plain = both(model)
    for call in range(3):
        x = clips(1, 3, 8, 16, 16, seed=call)
        expected = plain.attribute(x, 3, internal_batch_size=8)
        assert_equal(recording.attribute(x, 3, internal_batch_size=8), expected)
        with torch.no_grad():
            for number, tensor in enumerate([*model.parameters(), *model.buffers()]):
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.05 * torch.rand_like(tensor)).add_(1e-3 * number)
    assert Repeated.made == 2


def test_weights_that_others_take_the_place_of() -> None:
    model = c3d_mini().eval()
    recording, plain = both(model)
    x = clips(1, 3, 8, 32, 32)
    for _ in range(3):
        assert_equal(recording.attribute(x, 3), plain.attribute(x, 3))
    for parameter in list(model.parameters()):
        parameter.data = parameter.detach() + 0.01 * torch.rand_like(parameter)
    gc.collect()
    for _ in range(3):
        assert_equal(recording.attribute(x, 3), plain.attribute(x, 3))
    assert Repeated.made == 4


def test_recordings_are_few_and_go_only_when_they_are_idle() -> None:
    method, plain = explainers(c3d_mini().eval())

    def explain(shapes: list[tuple[int, ...]], seed: int) -> None:
        for shape in shapes:
            x = clips(*shape, seed=seed)
            assert_equal(method.attribute(x, 1), plain.attribute(x, 1))

    shapes = [(count, 3, 4, 16, 16) for count in range(1, 7)]
    for seed in range(4):
        explain(shapes, seed)
        assert Repeated.made == (0 if seed == 0 else replay._MOST_RECORDINGS)
    for seed in range(replay._IDLE):
        explain(shapes[-2:-1], seed)
    assert Repeated.made == replay._MOST_RECORDINGS + 1 == len(method._replay._recorded) + 1
    assert Repeated.finished == 1


def times_a_mask(inputs: Tensor, choose: replay.Choose) -> Tensor:
    return choose(inputs)[0] * inputs


def compute(kept: replay.Replay, key: Hashable, run: Callable[..., Tensor] = times_a_mask) -> None:
    """A computation under a key, whose result is three times its input."""
    assert_equal(
        kept(key, run, torch.ones(2), lambda output: [torch.full_like(output, 3.0)], []), torch.full((2,), 3.0)
    )


def test_a_recording_that_is_in_use_stays_and_the_one_that_was_idle_longest_goes() -> None:
    kept = replay.Replay(pytest.fail)
    for key in "ABCD" * 2 + "EE":
        compute(kept, key)
    for _ in range(15):  # B, C and D are in use as long as E waits for a place; A last was as the fifth computation
        for key in "BCDE":
            compute(kept, key)
        if kept._computations <= 5 + replay._IDLE:
            assert Repeated.made == 4
    assert (Repeated.made, Repeated.finished) == (5, 1)
    for key in "BCDE":
        compute(kept, key)
    assert Repeated.made == 5
    compute(kept, "A")
    assert Repeated.made == 5, "nothing has to go for it yet"


def test_a_recording_goes_after_so_many_computations_and_no_sooner() -> None:
    kept = replay.Replay(pytest.fail)
    for key in "ABCDABCD":
        compute(kept, key)
    for _ in range(replay._IDLE - 3):  # after A three others were
        compute(kept, "E")
    assert (Repeated.made, Repeated.finished) == (4, 0)
    compute(kept, "E")
    assert (Repeated.made, Repeated.finished) == (5, 1)


def test_computations_that_are_remembered_are_few_and_the_oldest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = replay.Replay(pytest.fail)
    for key in range(2 * replay._MOST_KNOWN):
        compute(kept, key)
    assert len(kept._known) == replay._MOST_KNOWN
    compute(kept, 0)  # forgotten: this is its first time again
    assert Repeated.made == 0
    compute(kept, 2 * replay._MOST_KNOWN - 1)
    assert Repeated.made == 1

    def refuse(self: Any, function: Any, device: Any) -> None:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(Repeated, "__init__", refuse)
    kept = replay.Replay(lambda _: None)
    for key in range(replay._MOST_KNOWN + 10):
        for _ in range(2):
            compute(kept, key)
    assert 0 < len(kept._refused) <= replay._MOST_KNOWN


def test_what_is_worked_out_once_is_worked_out_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number back from a GPU, say, which nothing that is recorded may do; it may have been forgotten since."""
    recording, worked_out = [False], [False]

    class Strict(Repeated):
        def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
            recording[0] = True
            super().__init__(function, device)
            recording[0] = False

    monkeypatch.setattr(replay, "CudaGraph", Strict)

    def run(inputs: Tensor, choose: replay.Choose) -> Tensor:
        if not worked_out[0]:
            assert not recording[0]
            worked_out[0] = True
        return times_a_mask(inputs, choose)

    kept = replay.Replay(pytest.fail)
    for _ in range(3):
        compute(kept, "key", run)
        worked_out[0] = False
    assert Repeated.made == 1


def test_what_is_made_on_the_way_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once:
        """Holds no more than a CUDA graph does: what its function made, in memory of its own."""

        device_type = "cpu"

        def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
            self._made = function()

        def replay(self, load: Callable[[], None]) -> Any:
            load()
            return self._made.clone()

    monkeypatch.setattr(replay, "CudaGraph", Once)
    on_the_way: list[Any] = []

    def run(inputs: Any, choose: replay.Choose) -> Tensor:
        doubled = inputs * 2
        on_the_way.append(weakref.ref(doubled))
        return choose(doubled)[0] + doubled.exp()

    kept = replay.Replay(pytest.fail)
    for _ in range(2):
        kept("key", run, torch.ones(2), lambda output: [torch.zeros_like(output)], [])
    gc.collect()
    assert len(on_the_way) >= 2 and all(each() is None for each in on_the_way)


def test_bounds_that_change_in_kind_from_one_call_to_the_next() -> None:
    """Numbers, then one per pixel, and back: of one method, whose recordings copy what differs to their places."""
    recording, plain = explainers(c3d_mini().eval())
    x = clips(2, 3, 4, 16, 16)
    per_pixel = x.amin(0, keepdim=True) - 0.1, x.amax(0, keepdim=True) + 0.1
    for low, high in ((LOW, HIGH), (LOW, HIGH), per_pixel, per_pixel, (LOW, HIGH), per_pixel):
        for method in (recording, plain):
            method.low, method.high = low, high
        assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))


def test_weights_that_are_read_in_another_order() -> None:
    """In the same place, of the same shape: a square matrix, transposed."""
    model = nn.Sequential(nn.Conv3d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model = model.extend([nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]).eval()
    for layer in (model[0], model[4], model[6]):
        layer.weight.data.uniform_(0.1, 1.0)  # of positive sums, so that something is left of every score
    recording, plain = explainers(model)
    x = clips(1, 3, 4, 8, 8)
    for _ in range(3):
        for _ in range(3):
            assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))
        model[4].weight.data = model[4].weight.data.t()


def test_what_a_recording_reads_stays_while_it_lives() -> None:
    reads = [torch.rand(3), torch.rand(3)]
    gone = [weakref.ref(tensor) for tensor in reads]
    kept = replay.Replay(pytest.fail)

    def run(inputs: Any, choose: replay.Choose) -> Tensor:
        return choose(inputs[0])[0] * inputs[0] + reads[1] * 2

    def choose(output: Tensor) -> list[Tensor]:
        return [torch.full_like(output, 3.0)]

    expected = 3 * torch.ones(3) + 2 * reads[1]
    for _ in range(2):
        assert_equal(kept("key", run, [torch.ones(3)], choose, reads[:1]), expected)
    reads.clear()
    gc.collect()
    assert all(each() is not None for each in gone)
    del kept
    gc.collect()
    assert all(each() is None for each in gone)


def test_bounds_of_every_kind() -> None:
    """Numbers, one per channel, and one per pixel, which another method object has: replayed as they are."""
    model, x = c3d_mini().eval(), clips(2, 3, 4, 16, 16)
    low, high = x.amin(0, keepdim=True) - 0.1, x.amax(0, keepdim=True) + 0.1
    for bounds in ((LOW, HIGH), ([-1.0, -1.1, -1.2], [1.5, 1.6, 1.7]), (low, high)):
        recording, plain = explainers(model, *bounds)
        for _ in range(3):
            assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_models_of_every_kind_and_several_targets(case: Case) -> None:
    recording, plain = explainers(case.model(), case.low, case.high)
    extra = case.args or None
    for seed in range(3):
        x, targets = case.inputs(3, seed), [[0, 1, seed], 2]
        found = recording.attribute_targets(x, targets, extra, return_convergence_delta=True)
        assert_equal(found, plain.attribute_targets(x, targets, extra, return_convergence_delta=True))
    assert Repeated.made == 1


def test_errors_are_those_of_the_first_time_and_change_nothing() -> None:
    recording, plain = explainers(c3d_mini().eval())
    x = clips(1, 3, 4, 16, 16)
    for _ in range(3):
        assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))
        with pytest.raises(ValueError, match="classes are 0 to 9"):
            recording.attribute(x, 10)


def test_what_cannot_be_recorded_runs_as_ever_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recording, plain = explainers(c3d_mini().eval())
    x = clips(1, 3, 4, 16, 16)

    def refuse(function: Callable[[], Any], device: torch.device) -> None:
        Repeated.made += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay.CudaGraph, "__init__", lambda self, function, device: refuse(function, device))
    assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))
    with pytest.warns(
        UserWarning, match="cannot be recorded as a CUDA graph, and runs as without cuda_graphs: operation"
    ) as told:
        assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(recording.attribute(x, 1), plain.attribute(x, 1))
    assert Repeated.made == 1


def test_callers_tensors_are_left_alone() -> None:
    """Also those that want gradients, and those that were made where none are taken."""
    recording, plain = explainers(c3d_mini().eval())
    with torch.inference_mode():
        inferred = clips(1, 3, 4, 16, 16)
    wanting = clips(1, 3, 4, 16, 16).requires_grad_()
    for x in (inferred, wanting, inferred, wanting):
        before = x.detach().clone()
        result = recording.attribute(x, 1)
        assert_equal(result, plain.attribute(x, 1))
        assert not result.requires_grad and torch.equal(x.detach(), before)
        result.zero_()  # it is the caller's: the next result does not suffer


def test_threads_get_their_own_answers() -> None:
    method, plain = explainers(c3d_mini().eval())
    inputs = [clips(1, 3, 4, 16, 16, seed=seed) for seed in range(4)]
    expected = [plain.attribute(x, 1) for x in inputs]
    method.attribute(inputs[0], 1)
    found: dict[int, list[Tensor]] = {number: [] for number in range(4)}

    def work(number: int) -> None:
        for _ in range(3):
            found[number].append(method.attribute(inputs[number], 1))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        assert len(results) == 3
        for result in results:
            assert_equal(result, expected[number])


def test_copies_have_recordings_of_their_own() -> None:
    method = DeepTaylor(c3d_mini().eval(), LOW, HIGH, cuda_graphs=True)
    x = clips(1, 3, 4, 16, 16)
    method.attribute(x, 1)
    expected = method.attribute(x, 1)
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other.cuda_graphs
        assert_equal(other.attribute(x, 1), expected)
    assert Repeated.made == 1


def test_the_ledger_is_never_recorded() -> None:
    method = DeepTaylor(c3d_mini().eval(), LOW, HIGH, cuda_graphs=True)
    x = clips(1, 3, 4, 16, 16)
    tables = [str(method.ledger(x, 1)) for _ in range(3)]
    assert tables[0] == tables[1] == tables[2] and Repeated.made == 0


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    method = DeepTaylor(c3d_mini().eval(), LOW, HIGH)
    for _ in range(3):
        method.attribute(clips(1, 3, 4, 16, 16), 1)
    assert Repeated.made == 0


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="cuda_graphs must be True or False, got"):
        DeepTaylor(c3d_mini().eval(), LOW, HIGH, cuda_graphs=value)
