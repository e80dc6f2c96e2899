"""Explanations that repeat on a GPU: recorded once, then launched as a whole.

A walk is hundreds of operations. Where they are small, Python needs longer to ask for them than a GPU to compute them. A CUDA
graph holds them all and is launched at once, on tensors that keep their place: what differs from time to time is copied there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from captum_dtd.locks import Lock

Choose: TypeAlias = Callable[[Tensor], list[Tensor]]
"""Gives masks of an output's shape, for every target one."""

Run: TypeAlias = Callable[[Any, Choose], Any]
"""A computation: ``run(inputs, choose)`` of trees of tensors, where ``choose`` is asked once, with the output."""

# Recordings that are kept. Each holds the memory that its computation needs, so there are few; and since one takes longer to make
# than a computation itself, none has to go for another unless it was not needed for so many computations.
_MOST_RECORDINGS = 4
_IDLE = 32

# Computations that are remembered so that they are recognised the second time.
_MOST_KNOWN = 64


# Torch records one graph at a time.
_recording = Lock()


class CudaGraph:
    """The operations of a function on a GPU.

    Args:
        function: launches work, waits for nothing, and reads nothing back. It has run before.
        device: the GPU. Nobody may wait for the whole of it meanwhile.

    Raises:
        RuntimeError: if what the function does cannot be recorded.
    """

    device_type = "cuda"

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self._device = device
        cuda: Any = torch.cuda  # untyped in some versions of torch
        with _recording, torch.cuda.device(device):
            self._graph = cuda.CUDAGraph()
            self._idle = cuda.Event()
            self._stream = cuda.Stream(device)
            stream = torch.cuda.current_stream()
            # cuBLAS keeps scratch memory for each stream. What is recorded gets its own, which nobody else writes in or frees.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # Whatever other threads ask of the device meanwhile is theirs.
                with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._made = function()
            finally:
                torch.cuda.set_stream(stream)  # which torch forgets where a recording fails
                torch._C._cuda_clearCublasWorkspaces()

    def replay(self, load: Callable[[], None]) -> Any:
        """What the function makes of what ``load`` puts in its place, in new memory; on the current stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._idle)  # another stream may still compute in this memory
            load()
            self._graph.replay()
            made = pytree.tree_map_only(Tensor, torch.clone, self._made)
            self._idle.record(stream)
            return made

    def finish(self) -> None:
        """Wait until nothing is computed in this memory any more."""
        self._idle.synchronize()


class Replay:
    """Runs computations, and from the second time on replays them.

    It is for any number of threads. Results are, to the bit, what the computation itself gives. What cannot be recorded is
    run as ever, and a warning says so.

    Args:
        warn: is told what a user should know.
    """

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether work on a device can be recorded."""
        return device.type == CudaGraph.device_type

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._lock = Lock()
        self._computations = 0
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()  # an output of each
        self._recorded: dict[Hashable, _Recording] = {}
        self._refused: set[Hashable] = set()

    def __call__(self, key: Hashable, run: Run, inputs: Any, choose: Choose, reads: Sequence[Tensor]) -> Any:
        """``run(inputs, choose)``.

        Args:
            key: what the computation depends on besides tensors.
            run: launches work on the device of ``reads``, and waits for nothing from the second time on.
            inputs: a tree of tensors and other things.
            choose: gives masks; all that it depends on is the shape of what it is given.
            reads: further tensors that the computation reads, where they lie: when one is changed in place, that counts;
                another in its place makes another computation.
        """
        of_inputs = ((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) for leaf in _tensors(inputs))
        key = (key, *of_inputs, *((each.data_ptr(), each.stride()) for each in reads))
        with self._lock, torch.no_grad():
            self._computations += 1
            if key in self._known and key not in self._recorded and key not in self._refused and self._has_room():
                self._record(key, run, inputs, choose, reads)
            if key in self._recorded:
                self._recorded[key].last_used = self._computations
                return self._recorded[key].replay(inputs, choose)

        def noted(output: Tensor) -> list[Tensor]:
            with self._lock:
                self._known[key] = torch.empty_like(output)
                while len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
            return choose(output)

        return run(inputs, noted)

    def _record(self, key: Hashable, run: Run, inputs: Any, choose: Choose, reads: Sequence[Tensor]) -> None:
        try:
            self._recorded[key] = _Recording(run, inputs, choose, self._known[key], reads)
        except RuntimeError as error:
            if len(self._refused) == _MOST_KNOWN:
                self._refused.clear()
            self._refused.add(key)
            self._warn(f"this explanation cannot be recorded as a CUDA graph, and runs as without cuda_graphs: {error}")

    def _has_room(self) -> bool:
        """Whether another recording may be made; makes room for it if one has not been used for long."""
        if len(self._recorded) >= _MOST_RECORDINGS:
            oldest = min(self._recorded, key=lambda key: self._recorded[key].last_used)
            if self._computations - self._recorded[oldest].last_used <= _IDLE:
                return False
            self._recorded.pop(oldest).finish()
        return True


class _Recording:
    """A computation in places of its own."""

    last_used = 0

    def __init__(self, run: Run, inputs: Any, choose: Choose, output: Tensor, reads: Sequence[Tensor]) -> None:
        self._output = output
        self._inputs, self._masks = pytree.tree_map_only(Tensor, _place_for, (inputs, choose(output)))

        def computation() -> Any:
            return run(self._inputs, lambda _: self._masks)

        computation()  # what is worked out once, and may have been forgotten since, is there again
        with _Kept(reads) as self._kept:
            self._graph = CudaGraph(computation, output.device)

    def replay(self, inputs: Any, choose: Choose) -> Any:
        given = (inputs, choose(self._output))

        def load() -> None:
            for place, tensor in zip(_tensors((self._inputs, self._masks)), _tensors(given), strict=True):
                _compact(place).copy_(_compact(tensor), non_blocking=True)

        return self._graph.replay(load)

    def finish(self) -> None:
        self._graph.finish()


class _Kept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations read and did not make, at its place for as long as this lives."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = {_address(tensor): tensor for tensor in tensors}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if _address(tensor) not in self._made:
                self._read.setdefault(_address(tensor), tensor)
        made = func(*args, **(kwargs or {}))
        self._made.update({_address(tensor) for tensor in _tensors(made)} - self._read.keys())
        return made


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place_for(tensor: Tensor) -> Tensor:
    """Memory of its own for such a tensor, in its layout."""
    return _compact(tensor).clone().expand(tensor.shape)


def _compact(tensor: Tensor) -> Tensor:
    """A tensor without what only repeats: one place along every dimension that it was expanded along."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
