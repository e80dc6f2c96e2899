"""Explanations of frozen frames, kept for the next clip that shows the same frames.

Windows that overlap share frames, and a frozen clip depends on its frame and its target only. A cache holds each frame's
whole explanation (T, H, W), of which every read-out and normalisation is made. Frames are told apart by their values, so
windows need no bookkeeping: the same frame in another clip, at another time or in another call is found.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from captum_dtd import native
from captum_dtd.locks import Lock
from captum_dtd.structure import own_classes, tensors_in

# How many different methods and models a cache tells apart at once; of others it only forgets that it knew them.
_MOST_CONTEXTS = 16


class FrameCache:
    """A bounded store of frozen frames' explanations; the ones that were not used for longest make room.

    A whole explanation costs more than what one read-out needs of it, so a cache pays where every frame is in more than two
    windows. What is found is exactly what was computed when the frame was first explained, which may differ in
    rounding from what other company in its batch would have given. Threads may share a cache. A copy that is sent elsewhere
    (pickled, or by ``copy.deepcopy``) begins empty: models are known by their objects, which are others there.

    Args:
        max_bytes: the most that the explanations may take.

    Attributes:
        max_bytes: as given.
        bytes: what the explanations take now.
        hits: how many frames were found so far.
        misses: how many were not.

    Raises:
        ValueError: if ``max_bytes`` is negative.

    Example:
        >>> import torch
        >>> from captum_dtd import DiscriminativeDeepTaylor
        >>> from captum_dtd.models import c3d_mini
        >>> method = DiscriminativeDeepTaylor(c3d_mini().eval(), low=0.0, high=1.0)
        >>> video, cache = torch.rand(1, 3, 12, 32, 32), FrameCache()
        >>> for start in (0, 2, 4):
        ...     maps = method.attribute(video[:, :, start : start + 8], target=2, frame_cache=cache)
        >>> len(cache), cache.hits, cache.misses
        (12, 12, 12)
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be zero or positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self._kept: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._numbered = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """How many explanations are kept."""
        return len(self._kept)

    def __repr__(self) -> str:
        return (
            f"FrameCache({len(self)} frames, {self.bytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB, "
            f"{self.hits} hits, {self.misses} misses)"
        )

    def get(self, key: bytes) -> tuple[Tensor, ...] | None:
        """The explanation (T, H, W) of every input, if it is there; counted as a hit or a miss."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found

    def put(self, key: bytes, explanation: tuple[Tensor, ...]) -> None:
        """Keep an explanation, and let others go where it does not fit beside them."""
        own = tuple(part.clone() for part in explanation)
        with self._lock:
            self.bytes += _size(own) - _size(self._kept.pop(key, ()))
            self._kept[key] = own
            while self.bytes > self.max_bytes:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= _size(gone)

    def number_of(self, context: Hashable) -> int:
        """A number for what explanations depend on and no bytes can tell: that of an equal one, or one not given before."""
        with self._lock:
            if context not in self._numbers:
                self._numbered += 1
                self._numbers[context] = self._numbered
            self._numbers.move_to_end(context)
            while len(self._numbers) > _MOST_CONTEXTS:
                self._numbers.popitem(last=False)
            return self._numbers[context]

    def clear(self) -> None:
        """Let all explanations go; the counts stay."""
        with self._lock:
            self._kept.clear()
            self._numbers.clear()
            self.bytes = 0

    def __reduce__(self) -> tuple[type[FrameCache], tuple[int]]:
        return type(self), (self.max_bytes,)


def digest(values: Iterable[Any]) -> bytes:
    """A short name for what values are, tensors and arrays by their contents: equal for equal ones, different for any others."""
    code = hashlib.blake2b(digest_size=16)

    def tell(text: str) -> None:
        told = text.encode()
        code.update(len(told).to_bytes(8, "little") + told)  # so that where one ends is told too

    for value in values:
        leaves, spec = pytree.tree_flatten(value)
        tell(repr(spec))
        for leaf in leaves:
            if isinstance(leaf, np.ndarray):
                leaf = torch.from_numpy(np.array(leaf))
            if isinstance(leaf, Tensor):
                tell(repr((leaf.dtype, tuple(leaf.shape))))
                code.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                tell(repr(leaf))
    return code.digest()


def weights_of(model: nn.Module) -> bytes:
    """A short name for the model's weights as they are: another one after they were written to, in whatever way.

    Tensors, also those that are plain attributes of modules, are named by where they lie, how often torch saw them written to,
    and a hash of their contents, since writes through ``.data`` are not counted.
    """
    known: list[Any] = []
    held: dict[int, Tensor] = {}
    for module in model.modules():
        for each in (module, *own_classes(type(module))):
            held.update((id(leaf), leaf) for value in vars(each).values() for leaf in tensors_in(value))
    for tensor in held.values():
        if is_lazy(tensor):
            continue
        version = None if tensor.is_inference() else tensor._version
        own = tensor.detach()
        known += [tensor.data_ptr(), version, tuple(tensor.shape), native.digest(own) or _sums(own)]
    return digest(known)


_ROW = 2**15  # words of 4 bytes, which stay in the cache with their factors


def _sums(tensor: Tensor) -> Tensor:
    """For every 128 KiB its words of 4 bytes, each times a number of its own, added up to 8 bytes; then the bytes that are left.

    Another content has the same sum in one of 2^32 cases: this is multilinear hashing, with factors as good as random (Carter and
    Wegman 1979). What only moves, or only changes signs, changes sums like anything else.
    """
    content = tensor.contiguous().view(-1).view(torch.uint8)
    content = content.clone() if content.storage_offset() % 4 else content
    words = content[: content.numel() // 4 * 4].view(torch.int32)
    whole = words.numel() // _ROW * _ROW
    factors = _factors(tensor.device)
    at_once = 4 if tensor.device.type == "cpu" else 512
    rows = [(some * factors).sum(1) for some in torch.split(words[:whole].view(whole // _ROW, _ROW), at_once)]
    rest = (words[whole:] * factors[: words.numel() - whole]).sum()
    return torch.cat([*rows, rest.view(1), content[4 * words.numel() :].to(torch.int64)])


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, always the same ones."""
    drawn = torch.empty(_ROW, dtype=torch.int64, device="cpu").random_(generator=torch.Generator().manual_seed(0))
    return (2 * drawn + 1).to(device)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
