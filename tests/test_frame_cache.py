"""Explanations of frames kept between overlapping windows: what an undisturbed run gives, within a bound, and never stale."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from models import between
from torch import Tensor, nn

from captum_dtd import DiscriminativeDeepTaylor, FrameCache, native
from captum_dtd.composites import EPSILON_GAMMA_BOX
from captum_dtd.frame_cache import digest, weights_of

LOW, HIGH = -1.0, 1.5


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Conv3d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d((2, 1, 1)),
        nn.Conv3d(4, 4, 3, padding=1),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    for layer in (model[0], model[3]):
        layer.bias.data.abs_()
    return model


@pytest.fixture(scope="module")
def method() -> DiscriminativeDeepTaylor:
    return DiscriminativeDeepTaylor(build(), LOW, HIGH)


@pytest.fixture
def video() -> Tensor:
    return between((LOW,) * 3, (HIGH,) * 3, (1, 3, 14, 6, 6), 5, torch.float64)


def windows(video: Tensor, stride: int = 2, length: int = 8) -> list[Tensor]:
    return [video[:, :, start : start + length] for start in range(0, video.shape[2] - length + 1, stride)]


def assert_same(actual: Any, expected: Any) -> None:
    size = expected.total.abs().max().item()
    assert size > 0
    for part, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("readout", ["own", "first", "mean"])
def test_every_readout_and_normalisation_is_made_of_what_is_kept(
    method: DiscriminativeDeepTaylor, video: Tensor, readout: Any, normalize: Any
) -> None:
    method.readout, method.normalize = readout, normalize
    cache = FrameCache()
    for clip in windows(video):
        assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
    assert (len(cache), cache.misses, cache.hits) == (14, 14, 4 * 8 - 14)
    method.readout, method.normalize = "own", "none"


def test_frames_of_one_call_are_shared_too(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    cache = FrameCache()
    clips = torch.cat(windows(video, 1))
    assert_same(method.attribute(clips, 1, frame_cache=cache), method.attribute(clips, 1))
    assert cache.misses == 14


def test_each_target_is_explained_by_itself(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    cache = FrameCache()
    clips = torch.cat([windows(video)[0]] * 2)
    assert_same(method.attribute(clips, [0, 2], frame_cache=cache), method.attribute(clips, [0, 2]))
    assert len(cache) == 16


class Scaled(nn.Module):
    """Its logits times a tensor that is neither a parameter nor a buffer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.factor = torch.ones((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor


@pytest.mark.parametrize(
    "change",
    [
        "optimiser step",
        "data",
        "one number of the data",
        "plain tensor",
        "parameter",
        "composite",
        "low",
        "high",
        "seed",
    ],
)
def test_nothing_stale_is_found(video: Tensor, change: str) -> None:
    model, cache = build(), FrameCache()
    scaled = Scaled(model).eval()
    clip = windows(video)[0]
    options: dict[str, Any] = {"low": LOW, "high": HIGH}
    DiscriminativeDeepTaylor(scaled, **options).attribute(clip, 1, frame_cache=cache)
    if change == "optimiser step":
        with torch.no_grad():
            model[3].weight.mul_(-1)
    elif change == "data":
        model[3].weight.data.mul_(-1)
    elif change == "one number of the data":
        model[3].weight.data[3, 1, 1, 1, 0].add_(1.0)
    elif change == "plain tensor":
        scaled.factor.mul_(3)
    elif change == "parameter":
        model[3].weight = build(1)[3].weight
    elif change == "composite":
        options["composite"] = EPSILON_GAMMA_BOX
    elif change == "low":
        options["low"] = LOW - 1
    elif change == "high":
        options["high"] = HIGH + 1
    else:
        options["seed"] = "one"
    changed = DiscriminativeDeepTaylor(scaled, **options)
    assert_same(changed.attribute(clip, 1, frame_cache=cache), changed.attribute(clip, 1))
    assert cache.hits == 0


@pytest.fixture(params=["as it is", "without kernels"])
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the compiled hash."""
    if request.param == "without kernels":
        monkeypatch.delitem(native.loaded, "cpu", raising=False)


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(7, 3, 3, 3, 3), (64, 32, 3, 3, 3)])
def test_weights_that_only_moved_or_changed_signs_are_others(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    module = nn.Module()
    module.weight = start.clone()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "as it was": lambda w: w,
        "backwards in time": lambda w: w.flip(2),
        "mirrored": lambda w: w.flip(4),
        "other channels": lambda w: w.roll(1, 1),
        "neighbours exchanged": lambda w: w[..., [1, 0, 2]],
        "other signs": lambda w: -w,
        "two other signs": lambda w: torch.cat([-w[:2], w[2:]]),
        "twice as large": lambda w: 2 * w,
    }
    names = {}
    for change, made in changes.items():
        module.weight.data.copy_(made(start))
        names[weights_of(module)] = change
    assert list(names.values()) == list(changes)
    module.weight.data.copy_(start)
    assert names[weights_of(module)] == "as it was"


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_weights_are_told_apart_wherever_they_lie(dtype: torch.dtype) -> None:
    """In a slice of a buffer, by any of their numbers, though torch is told of no write."""
    flat = torch.arange(3001, dtype=torch.float64).remainder(2).to(dtype)
    module = nn.Module()
    module.slice = flat[1:]
    names = {weights_of(module)}
    for at in (0, 700, 2999):
        flat.data[1 + at] = 1 - flat[1 + at].to(torch.uint8)
        names.add(weights_of(module))
    assert len(names) == 4


class Weighted(nn.Module):
    """Scores times weights that are given beside the clips, added up for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.net(x) * weights.reshape(len(x), -1).sum(1, keepdim=True)  # type: ignore[no-any-return]


def test_additional_arguments_are_part_of_what_is_explained(video: Tensor) -> None:
    method, cache = DiscriminativeDeepTaylor(Weighted().eval(), LOW, HIGH), FrameCache()
    clip = windows(video)[0]
    for weight in (torch.tensor([1.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)):
        assert_same(method.attribute(clip, 1, weight, frame_cache=cache), method.attribute(clip, 1, weight))


def test_it_is_bounded_and_the_least_used_go_first(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    one = 8 * 6 * 6 * 8  # bytes of an explanation
    cache = FrameCache(max_bytes=10 * one + 5)
    clips = windows(video)
    for clip in clips[:3]:  # of frames 0 to 11: the last two take the room of the first two
        assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
        assert cache.bytes <= cache.max_bytes
    assert (len(cache), cache.bytes) == (10, 10 * one)
    cache.misses = 0
    method.attribute(clips[2], 1, frame_cache=cache)
    assert cache.misses == 0
    method.attribute(clips[0][:, :, :2].repeat(1, 1, 4, 1, 1), 1, frame_cache=cache)
    assert cache.misses == 2
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_cache_without_room_keeps_nothing_and_harms_nothing(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    cache = FrameCache(max_bytes=0)
    clip = windows(video)[0]
    assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
    assert len(cache) == 0


def test_refusals(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    with pytest.raises(ValueError, match="max_bytes must be zero or positive, got -1"):
        FrameCache(-1)
    with pytest.raises(TypeError, match=r"frame_cache must be a captum_dtd\.FrameCache, got dict"):
        method.attribute(video, 1, frame_cache={})  # type: ignore[arg-type]


def clip(frames: int = 4) -> Tensor:
    return between(LOW, HIGH, (1, 3, frames, 4, 4), 0)


def test_a_model_of_other_modules_is_another() -> None:
    model, cache = build(), FrameCache()
    DiscriminativeDeepTaylor(model, LOW, HIGH).attribute(clip(), 1, frame_cache=cache)
    model[2] = nn.AvgPool3d((2, 1, 1))
    method = DiscriminativeDeepTaylor(model, LOW, HIGH)
    assert_same(method.attribute(clip(), 1, frame_cache=cache), method.attribute(clip(), 1))
    assert cache.hits == 0


@pytest.mark.parametrize(
    ("setting", "values"), [("precision", ("ieee", "float32", "bfloat16")), ("backend", ("auto", "reference"))]
)
def test_another_precision_or_backend_is_another(setting: str, values: tuple[Any, ...]) -> None:
    model, cache = build().float(), FrameCache()
    for value in values:
        method = DiscriminativeDeepTaylor(model, LOW, HIGH, **{setting: value})
        method.attribute(clip().float(), 1, frame_cache=cache)
    assert cache.hits == 0


def test_frames_of_clips_of_another_length_are_others(method: DiscriminativeDeepTaylor) -> None:
    cache, long = FrameCache(), clip(6)
    method.attribute(long, 1, frame_cache=cache)
    assert_same(method.attribute(long[:, :, :4], 1, frame_cache=cache), method.attribute(long[:, :, :4], 1))
    assert cache.hits == 0


def test_what_was_used_last_stays() -> None:
    one, cache = torch.zeros(4), FrameCache(max_bytes=2 * 16)
    cache.put(b"a", (one,))
    cache.put(b"b", (one,))
    assert cache.get(b"a") is not None
    cache.put(b"c", (one,))
    assert cache.get(b"b") is None and cache.get(b"a") is not None


def test_a_model_that_is_in_use_is_known_however_many_others_come() -> None:
    cache = FrameCache()
    number = cache.number_of("in use")
    for other in range(40):
        cache.number_of(other)
        assert cache.number_of("in use") == number


def test_what_is_put_again_is_counted_once_and_kept_apart() -> None:
    kept, cache = torch.zeros(4), FrameCache()
    cache.put(b"a", (kept,))
    cache.put(b"a", (kept,))
    assert cache.bytes == 16
    kept.fill_(1)
    (found,) = cache.get(b"a") or ()
    assert not found.any()


def test_digests_tell_structure_shape_and_type_apart() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6, dtype=torch.int32), torch.zeros(6)]
    nested: list[object] = [[[1, 2], [3]], [[1], [2, 3]], [(1, 2), [3]]]
    values: list[object] = [*([z] for z in zeros), *nested, [(1, 23)], [(12, 3)], ["1", 2, 3], ["12", 3]]
    assert len({digest(value) for value in values}) == len(values)


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_hashes_see_the_last_bytes(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = torch.zeros(7, dtype=dtype)
    before = weights_of(module)
    module.weight.data[6] = 1
    assert weights_of(module) != before


class Threshold:
    """An object that a forward reads and nothing can look into."""

    def __init__(self, k: float) -> None:
        self.k = k


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 3)
        self.threshold = Threshold(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.stem(x) + self.threshold.k).mean((2, 3, 4)))


def test_objects_that_replace_others_are_told_apart(video: Tensor) -> None:
    """Also where Python gives them the place of those that are gone."""
    model, cache, clip = Configured().double().eval(), FrameCache(), video[:, :, :8]
    method = DiscriminativeDeepTaylor(model, LOW, HIGH)
    changes: list[Callable[[int], None]] = [
        lambda i: setattr(model, "threshold", Threshold(0.2 * i)),
        lambda i: setattr(model, "act", (nn.Sigmoid, nn.Softplus)[i % 2]()),
    ]
    for change in changes:
        for i in range(12):
            change(i)
            assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
    hits = cache.hits
    method.attribute(clip, 1, frame_cache=cache)
    assert cache.hits == hits + 8


def test_targets_of_the_same_digits_are_told_apart(video: Tensor) -> None:
    """A target of two indices is explained by itself, though written without what is between them it reads like another."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.fc = nn.Conv3d(3, 4, 3), nn.Linear(4, 13 * 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.stem(x)).mean((2, 3, 4))).view(-1, 13, 24)

    cache, clip = FrameCache(), video[:, :, :8]
    method = DiscriminativeDeepTaylor(Table().double().eval(), LOW, HIGH)
    for target in ((1, 23), (12, 3)):
        assert_same(method.attribute(clip, target, frame_cache=cache), method.attribute(clip, target))
    assert (cache.hits, cache.misses) == (0, 16)


def test_a_used_cache_can_be_sent_elsewhere(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    """Without what it keeps: nobody would find it there."""
    cache, clip = FrameCache(max_bytes=12345678), video[:, :, :8]
    maps = method.attribute(clip, 1, frame_cache=cache)
    sent = pickle.loads(pickle.dumps(cache))
    assert (len(sent), sent.bytes, sent.max_bytes) == (0, 0, cache.max_bytes)
    for hits in (0, 8):
        assert_same(method.attribute(clip, 1, frame_cache=sent), maps)
        assert (sent.hits, sent.misses, sent.bytes) == (hits, 8, cache.bytes)


def test_threads_may_share_a_cache() -> None:
    part = torch.zeros(64)
    cache, interval = FrameCache(max_bytes=3 * 256), sys.getswitchinterval()

    def use(thread: int) -> None:
        for i in range(400):
            key = bytes([(thread * 7 + i) % 5])
            found = cache.get(key)
            assert found is None or len(found) == 1
            cache.put(key, (part,))

    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert (len(cache), cache.bytes, cache.hits + cache.misses) == (3, 3 * 256, 8 * 400)


def test_tensors_of_a_class_are_looked_at(video: Tensor) -> None:
    class Shifted(nn.Module):
        shift = torch.tensor(0.1, dtype=torch.float64)

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv3d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.stem(x) + self.shift).mean((2, 3, 4)))

    cache, clip = FrameCache(), video[:, :, :8]
    method = DiscriminativeDeepTaylor(Shifted().double().eval(), LOW, HIGH)
    for value in (0.1, 5.0):
        Shifted.shift.fill_(value)
        assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))


def test_bounds_may_be_large_arrays(video: Tensor) -> None:
    clip, cache = video[:, :, :8], FrameCache()
    low = torch.full((1, 3, 1, 60, 60), LOW, dtype=torch.float64).numpy()
    clip = clip.repeat(1, 1, 1, 10, 10)
    for change in (0.0, 0.5):
        low[0, 1, 0, 20:40] -= change
        method = DiscriminativeDeepTaylor(build(), low, HIGH)
        assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))


def test_frames_are_those_of_all_inputs(video: Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.fc = nn.Conv3d(6, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(torch.relu(self.stem(torch.cat([x, y], 1))).mean((2, 3, 4)))

    method, cache = DiscriminativeDeepTaylor(Both().double().eval(), (LOW, LOW), (HIGH, HIGH)), FrameCache()
    x, y, z = (video[:, :, start : start + 4] for start in (0, 4, 8))
    for inputs in ((x, y), (x, z), (z, y)):
        found, expected = method.attribute(inputs, 1, frame_cache=cache), method.attribute(inputs, 1)
        for maps, wanted in zip(found, expected, strict=True):
            assert_same(maps, wanted)
    assert cache.hits == 0


def test_arguments_and_bounds_may_lie_in_memory_as_they_like(video: Tensor) -> None:
    """Expanded and transposed ones, and those that want gradients."""
    clip = video[:, :, :8]
    low = np.full((6, 6, 1, 3, 1), LOW).T
    high = torch.full((6, 6), HIGH, dtype=torch.float64, requires_grad=True).t().expand(1, 3, 1, 6, 6)
    weight = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True).transpose(1, 2)
    method, cache = DiscriminativeDeepTaylor(Weighted().eval(), low, high), FrameCache()
    for hits in (0, 8):
        assert_same(method.attribute(clip, 1, weight, frame_cache=cache), method.attribute(clip, 1, weight))
        assert cache.hits == hits


def test_a_model_that_was_built_in_inference_mode_has_weights_too(video: Tensor) -> None:
    """Torch does not count who writes to them; their contents are looked at all the same."""
    with torch.inference_mode():
        model = build()
    method, cache, clip = DiscriminativeDeepTaylor(model, LOW, HIGH), FrameCache(), video[:, :, :8]
    for hits in (0, 8):
        assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
        assert cache.hits == hits
    with torch.inference_mode():
        model[3].weight.mul_(-1)
    assert_same(method.attribute(clip, 1, frame_cache=cache), method.attribute(clip, 1))
    assert cache.hits == 8


def test_a_large_explanation_takes_the_room_of_several() -> None:
    cache = FrameCache(max_bytes=4 * 16)
    for key in (b"a", b"b", b"c", b"d"):
        cache.put(key, (torch.zeros(4),))
    cache.put(b"large", (torch.zeros(12),))
    assert (len(cache), cache.bytes) == (2, 16 + 48)
    assert cache.get(b"d") is not None and cache.get(b"large") is not None and cache.get(b"c") is None
    cache.put(b"too large", (torch.zeros(17),))
    assert (len(cache), cache.bytes) == (0, 0)


def test_counts_outlive_what_is_kept(method: DiscriminativeDeepTaylor, video: Tensor) -> None:
    cache = FrameCache()
    for _ in range(2):
        method.attribute(video[:, :, :8], 1, frame_cache=cache)
    cache.clear()
    assert (len(cache), cache.hits, cache.misses) == (0, 8, 8)


def test_a_cache_holds_a_gibibyte_by_default_and_says_what_it_holds() -> None:
    cache = FrameCache()
    assert cache.max_bytes == 2**30
    cache.put(b"a", (torch.zeros(2**18),))
    cache.get(b"a")
    assert repr(cache) == "FrameCache(1 frames, 1.0 of 1024.0 MiB, 1 hits, 0 misses)"


def test_methods_that_were_not_seen_for_long_are_let_go() -> None:
    class Context:
        """Something that explanations depend on."""

    cache, first = FrameCache(), Context()
    gone = weakref.ref(first)
    cache.number_of(first)
    del first
    for other in range(40):
        cache.number_of(other)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change", ["neighbours", "rows"])
def test_large_weights_without_kernels_are_told_apart_by_where_they_lie(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Of a hash that looks at 2**15 words at once: also those that only moved, within these or to others."""
    monkeypatch.delitem(native.loaded, "cpu", raising=False)
    module = nn.Module()
    module.weight = torch.randn((3, 2**15), generator=torch.Generator().manual_seed(0))
    before = weights_of(module)
    module.weight.data[:2] = module.weight[:2].flip(1 if change == "neighbours" else 0).clone()
    assert weights_of(module) != before


class Interrupted(bytes):
    """A key that lets another thread go first when it is looked up for the so-many-th time, if that may."""

    def __new__(cls, name: bytes, at: int, meanwhile: Callable[[], Any]) -> Interrupted:
        key = super().__new__(cls, name)
        key.left, key.meanwhile = at, meanwhile
        return key

    def __hash__(self) -> int:
        self.left -= 1
        if self.left == 0:
            other = threading.Thread(target=self.meanwhile)
            other.start()
            other.join(0.2)  # it waits for the lock, and so goes last
            self.started = other
        return super().__hash__()


def test_what_one_thread_does_with_a_cache_is_whole_to_others() -> None:
    one, cache = torch.zeros(4), FrameCache()
    key = Interrupted(b"a", 1, lambda: cache.put(b"b", (one,)))
    cache.put(key, (one,))
    key.started.join()
    assert (len(cache), cache.bytes) == (2, 32)

    key = Interrupted(b"a", 2, cache.clear)
    assert cache.get(key) is not None
    key.started.join()
    assert len(cache) == 0

    numbers: list[int] = []
    key = Interrupted(b"c", 2, lambda: numbers.append(cache.number_of(b"c")))
    numbers.append(cache.number_of(key))
    key.started.join()
    assert numbers[0] == numbers[1]
