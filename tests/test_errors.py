"""Bad input gets an error that says what is wrong, what was given and what to do, and changes nothing."""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import Attribution, Saliency
from torch import Tensor, nn
from torch.nn import functional as F

from captum_dtd import DeepTaylor, DiscriminativeDeepTaylor, DiscriminativeRelevance, pixel_bounds
from captum_dtd.bounds import lies_within
from captum_dtd.graph import UnsupportedOperationError

CLASSES = 5


class Clips(nn.Module):
    """Needs three channels and at least three frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=(0, 1, 1))
        self.norm = nn.BatchNorm3d(4)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3, 4))))


class Softmax(Clips):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).softmax(1)


class GivesDict(Clips):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class GivesTuple(Clips):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class NoPixelLayer(Clips):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sigmoid())


class RunningMaximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cummax(x, dim=-1).values


class Unsupported(Clips):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(RunningMaximum())

    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.cumprod(self.inner(x), 2))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Conv3d(3, 4, 3, padding=1)
        self.fast = nn.Conv3d(3, 4, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        features = [F.relu(self.slow(slow)).mean((2, 3, 4)), F.relu(self.fast(fast)).mean((2, 3, 4))]
        return self.fc(torch.cat(features, 1))


def build(cls: type[nn.Module] = Clips) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def clip(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {name: (id(module), module.training) for name, module in model.named_modules()},
        {name: (id(t), t._version, t.requires_grad, t.grad) for name, t in model.named_parameters()},
        {name: (id(t), t._version) for name, t in model.named_buffers()},
        [dict(v) for module in model.modules() for k, v in vars(module).items() if k.endswith("hooks") and v],
    )


def refused(call: Callable[[], Any], *words: str, model: nn.Module, tensors: tuple[Any, ...] = ()) -> None:
    """`call` raises ValueError or TypeError, in one clear message with all `words`; model and tensors stay as found."""
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    found = [(t, t._version, t.requires_grad, t.grad, t.clone()) for t in tensors if isinstance(t, Tensor)]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value).lower()
    missing = [word for word in words if word.lower() not in message]
    assert not missing, f"{missing} not in: {error.value}"
    assert state_of(model) == before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    for tensor, version, requires_grad, grad, values in found:
        assert (tensor._version, tensor.requires_grad, tensor.grad) == (version, requires_grad, grad)
        assert torch.equal(tensor.nan_to_num(), values.nan_to_num())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> Tensor:
    return DeepTaylor(model, 0, 1).attribute(clip(), 1)


@pytest.fixture(scope="module", params=["deep taylor", "discriminative", "wrapped"])
def method(request: pytest.FixtureRequest, model: nn.Module) -> Attribution:
    methods: dict[str, Attribution] = {
        "deep taylor": DeepTaylor(model, 0, 1),
        "discriminative": DiscriminativeDeepTaylor(model, 0, 1),
        "wrapped": DiscriminativeRelevance(DeepTaylor(model, 0, 1)),
    }
    return methods[request.param]


# --- inputs ------------------------------------------------------------------------------------------------------

BAD_INPUTS = [
    pytest.param(lambda: clip(3, 4, 8, 8), ["(N, C, T, H, W)", "3, 4, 8, 8", "unsqueeze(0)"], id="no batch dimension"),
    pytest.param(lambda: clip(2, 3, 4, 8), ["2, 3, 4, 8"], id="rank 4"),
    pytest.param(lambda: clip(2, 3, 4, 8, 8, 1), ["2, 3, 4, 8, 8, 1"], id="rank 6"),
    pytest.param(lambda: clip(2, 4, 5, 8, 8), ["2, 4, 5, 8, 8", "channels"], id="four channels"),
    pytest.param(lambda: clip(2, 4, 3, 8, 8), ["2, 4, 3, 8, 8", "permute(0, 2, 1, 3, 4)"], id="NTCHW"),
    pytest.param(lambda: clip(2, 4, 8, 8, 3), ["2, 4, 8, 8, 3", "permute(0, 4, 1, 2, 3)"], id="NTHWC"),
    pytest.param(lambda: clip(4, 8, 8, 3), ["4, 8, 8, 3", "permute(3, 0, 1, 2)"], id="THWC"),
    pytest.param(lambda: (clip() * 255).byte(), ["uint8", "float"], id="uint8"),
    pytest.param(
        lambda: (clip(2, 4, 8, 8, 3) * 255).byte(), ["uint8", "float", "permute(0, 4, 1, 2, 3)"], id="uint8 NTHWC"
    ),
    pytest.param(lambda: (clip() * 255).long(), ["int64", "float"], id="integers"),
    pytest.param(lambda: clip() > 0.5, ["bool", "float"], id="booleans"),
    pytest.param(lambda: clip().double(), ["float64", "float32"], id="float64 into a float32 model"),
    pytest.param(lambda: clip().clone().index_fill_(2, torch.tensor(1), math.nan), ["nan"], id="NaN"),
    pytest.param(lambda: clip().clone().index_fill_(2, torch.tensor(1), math.inf), ["inf"], id="inf"),
    pytest.param(lambda: clip().clone().index_fill_(2, torch.tensor(1), -math.inf), ["inf"], id="-inf"),
    pytest.param(lambda: clip(2, 3, 2, 8, 8), ["2, 3, 2, 8, 8"], id="T too short for the model"),
    pytest.param(lambda: (), ["inputs", "empty"], id="empty tuple"),
    pytest.param(lambda: (clip(), clip()), ["inputs"], id="two inputs for a model of one"),
    pytest.param(lambda: clip().tolist(), ["inputs", "list"], id="a list of numbers"),
    pytest.param(lambda: clip().numpy(), ["inputs", "ndarray"], id="a NumPy array"),
    pytest.param(lambda: (clip().numpy(),), ["inputs", "ndarray"], id="a NumPy array in a tuple"),
    pytest.param(lambda: None, ["inputs", "None"], id="None"),
]


@pytest.mark.parametrize(("make", "words"), BAD_INPUTS)
def test_bad_inputs(
    method: Attribution, model: nn.Module, expected: Tensor, make: Callable[[], Any], words: list[str]
) -> None:
    inputs = make()
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    refused(lambda: method.attribute(inputs, 1), *words, model=model, tensors=tensors)
    if isinstance(method, DeepTaylor):
        assert torch.equal(method.attribute(clip(), 1), expected)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: clip().to("meta"), "on meta"),
        (lambda: clip().to_sparse(), r"torch\.sparse_coo .* \.to_dense\(\)"),
        (lambda: torch.nested.nested_tensor(list(clip())), "a nested tensor"),
    ],
)
def test_inputs_that_are_no_dense_numbers(method: Attribution, make: Callable[[], Tensor], told: str) -> None:
    with pytest.raises(TypeError, match=f"inputs must be dense tensors that hold numbers, got .*{told}"):
        method.attribute(make(), 1)


def test_inputs_of_different_batch_sizes() -> None:
    model = build(TwoInputs)
    method = DeepTaylor(model, (0, 0), (1, 1))
    inputs = (clip(2, 3, 4, 8, 8), clip(3, 3, 4, 8, 8))
    refused(lambda: method.attribute(inputs, 1), "inputs", "2", "3", model=model, tensors=inputs)
    refused(lambda: method.attribute(inputs[0], 1), "inputs", model=model, tensors=inputs)
    refused(lambda: method.attribute((inputs[0], clip(2, 4, 3, 8, 8)), 1), "permute(0, 2, 1, 3, 4)", model=model)


def test_a_further_input_is_told_what_is_wrong_with_itself() -> None:
    model, x = build(TwoInputs), clip()
    model.fast = nn.Conv3d(2, 4, 3, padding=1)
    method = DeepTaylor(model, (0, 0), (1, 1))
    refused(lambda: method.attribute((x, clip(2, 4, 8, 8, 2)), 1), "last", "permute(0, 4, 1, 2, 3)", model=model)
    with pytest.raises(ValueError, match="inputs of shape") as caught:
        method.attribute((x, clip(2, 2, 4, 8, 8).double()), 1)
    assert "inputs are torch.float32" not in str(caught.value)


def test_discrimination_wants_inputs_of_one_length() -> None:
    model = build(TwoInputs)
    inputs = (clip(2, 3, 4, 8, 8), clip(2, 3, 8, 8, 8))
    direct = DiscriminativeDeepTaylor(model, (0, 0), (1, 1))
    wrapped = DiscriminativeRelevance(DeepTaylor(model, (0, 0), (1, 1)))
    for method in (direct, wrapped):
        refused(partial(method.attribute, inputs, 1), "inputs", "4", "8", model=model, tensors=inputs)


def test_discrimination_wants_clips() -> None:
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).eval()
    x = clip(2, 3, 8, 8)
    assert DeepTaylor(images, 0, 1).attribute(x, 1).shape == x.shape
    direct = DiscriminativeDeepTaylor(images, 0, 1)
    for still in (direct, DiscriminativeRelevance(Saliency(images))):
        refused(partial(still.attribute, x, 1), "(N, C, T, H, W)", "2, 3, 8, 8", model=images, tensors=(x,))
    refused(partial(direct.rule_table, x), "(N, C, T, H, W)", "2, 3, 8, 8", model=images, tensors=(x,))


# --- targets -----------------------------------------------------------------------------------------------------

BAD_TARGETS = [
    pytest.param(None, ["target", "5"], id="missing"),
    pytest.param(5, ["target", "5"], id="out of range"),
    pytest.param(-6, ["target", "-6", "5"], id="out of range below"),
    pytest.param([1, 5], ["target", "5"], id="one of a list out of range"),
    pytest.param(torch.tensor([1, 5]), ["target", "5"], id="one of a tensor out of range"),
    pytest.param((5,), ["target", "5"], id="tuple out of range"),
    pytest.param([(1,), (5,)], ["target", "5"], id="one of the tuples out of range"),
    pytest.param([1, 2, 3], ["target", "3", "2"], id="list too long"),
    pytest.param([1], ["target", "1", "2"], id="list too short"),
    pytest.param([], ["target"], id="empty list"),
    pytest.param(torch.tensor([1, 2, 3]), ["target", "3", "2"], id="tensor too long"),
    pytest.param(torch.tensor([[1], [2]]), ["target"], id="tensor of two dimensions"),
    pytest.param((1, 2), ["target"], id="tuple too long"),
    pytest.param([(1, 2), (0, 1)], ["target"], id="tuples too long"),
    pytest.param(1.5, ["target", "float"], id="a float"),
    pytest.param("walk", ["target", "str"], id="a name"),
    pytest.param(["walk", "run"], ["target", "str"], id="names"),
    pytest.param(torch.tensor([1.0, 2.0]), ["target", "float"], id="a float tensor"),
    pytest.param(torch.tensor([True, False]), ["target", "integers", "bool"], id="a mask"),
    pytest.param({1}, ["target", "set"], id="a set"),
]


@pytest.mark.parametrize(("target", "words"), BAD_TARGETS)
def test_bad_targets(method: Attribution, model: nn.Module, expected: Tensor, target: Any, words: list[str]) -> None:
    x = clip()
    refused(lambda: method.attribute(x, target), *words, model=model, tensors=(x, target))
    if isinstance(method, DeepTaylor):
        assert torch.equal(method.attribute(x, 1), expected)


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_training_mode(cls: type) -> None:
    model = build()
    x = clip()
    fresh, used = cls(model, 0, 1), cls(model, 0, 1)
    used.attribute(x, 1)  # a trace made in evaluation mode must not hide it
    for part in (model, model.norm, model.drop):
        part.train()
        refused(partial(fresh.attribute, x, 1), "eval()", model=model, tensors=(x,))
        refused(partial(used.attribute, x, 1), "eval()", model=model, tensors=(x,))
        model.eval()
    used.attribute(x, 1)


def test_slopes_must_not_be_random() -> None:
    layers = [nn.Conv3d(3, 4, 3), nn.RReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    model = nn.Sequential(*layers).eval()
    model[1].train()
    refused(partial(DeepTaylor(model, 0, 1).attribute, clip(), 1), "training mode (1)", "eval()", model=model)


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_model_must_be_a_module(cls: type, model: nn.Module) -> None:
    for wrong, name in ((lambda x: x, "function"), (None, "NoneType"), ("r3d_18", "str")):
        refused(partial(cls, wrong, 0, 1), "model", "Module", name, model=model)


@pytest.mark.parametrize("cls", [GivesDict, GivesTuple])
def test_output_must_be_a_tensor(cls: type[nn.Module]) -> None:
    model, x = build(cls), clip()
    for method in (DeepTaylor(model, 0, 1), DiscriminativeDeepTaylor(model, 0, 1)):
        refused(partial(method.attribute, x, 1), "return", "tensor", model=model, tensors=(x,))


@pytest.mark.parametrize("first", [nn.Conv3d(3, 4, 3, bias=False), nn.Conv3d(3, 4, 3), nn.Linear(6, 4)])
@pytest.mark.parametrize(("own", "given"), [("float32", "float64"), ("bfloat16", "float32"), ("float64", "float32")])
def test_inputs_of_another_type_than_the_models(first: nn.Module, own: str, given: str) -> None:
    """Layers without a bias, and linear ones, torch.export lets take what they do not take."""
    net = nn.Sequential(first, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.LazyLinear(CLASSES))
    net = copy.deepcopy(net).eval()
    net(torch.zeros(1, 3, 4, 6, 6))
    with pytest.raises(
        ValueError, match=rf"inputs are torch\.{given}, the model is torch\.{own}: convert one with .to"
    ):
        DeepTaylor(net.to(getattr(torch, own)), 0.0, 1.0).attribute(
            torch.rand(1, 3, 4, 6, 6, dtype=getattr(torch, given)), 1
        )


@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (3, 3, 6, 6)])
def test_images_are_not_taken_for_a_clip_without_its_batch(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be clips \(N, C, T, H, W\), got shape \(., 3, 6, 6\)") as caught:
        DiscriminativeDeepTaylor(model, 0.0, 1.0).attribute(torch.rand(shape), 1)
    assert "unsqueeze" not in str(caught.value)


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu(x)


class OfAnotherShape(Attribution):  # type: ignore[misc]
    """Gives what a function makes of its inputs."""

    def __init__(self, model: nn.Module, make: Callable[[Tensor], Any]) -> None:
        super().__init__(model)
        self.make = make

    def attribute(self, inputs: Tensor, target: int = 0, **options: Any) -> Any:
        return self.make(inputs)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda x: (x.sum(1), x.sum(1), x.sum(1)), r"\(1, 4, 6, 6\), \(1, 4, 6, 6\), \(1, 4, 6, 6\)"),
        (lambda x: torch.cat([x, x], 2), r"\(1, 3, 8, 6, 6\)"),
        (lambda x: x[:, :, :1], r"\(1, 3, 1, 6, 6\)"),
        (lambda x: x[:, :, :, ::2], r"\(1, 3, 4, 3, 6\)"),
        (lambda x: torch.cat([x, x]), r"\(2, 3, 4, 6, 6\)"),
        (lambda x: None, "NoneType"),
    ],
)
def test_maps_of_another_shape_are_no_maps_of_the_clip(
    model: nn.Module, make: Callable[[Tensor], Any], shapes: str
) -> None:
    method = DiscriminativeRelevance(OfAnotherShape(model, make))
    with pytest.raises(
        TypeError, match=rf"shaped like its inputs, \(1, 3, 4, 6, 6\); Of Another Shape returned {shapes}"
    ):
        method.attribute(torch.rand(1, 3, 4, 6, 6), target=1)


def test_there_must_be_a_map_of_every_input() -> None:
    x = torch.rand(1, 3, 4, 6, 6)
    method = DiscriminativeRelevance(OfAnotherShape(build(TwoInputs), lambda inputs: inputs[0]))
    with pytest.raises(
        TypeError, match=r"\(1, 3, 4, 6, 6\), \(1, 3, 4, 6, 6\); Of Another Shape returned \(1, 3, 4, 6, 6\) \("
    ):
        method.attribute((x, x), target=1)


def test_maps_may_have_one_channel(model: nn.Module) -> None:
    method = DiscriminativeRelevance(OfAnotherShape(model, lambda x: x.sum(1, keepdim=True)))
    assert method.attribute(torch.rand(1, 3, 4, 6, 6), target=1).total.shape == (1, 4, 6, 6)


def test_some_layer_must_see_the_pixels() -> None:
    model, x = build(NoPixelLayer), clip()
    refused(lambda: DeepTaylor(model, 0, 1).attribute(x, 1), "pixel", model=model, tensors=(x,))


def test_unsupported_operations_are_listed_all() -> None:
    model, x = build(Unsupported), clip()
    for method in (DeepTaylor(model, 0, 1), DiscriminativeDeepTaylor(model, 0, 1)):
        words = ("cummax", "inner.0", "cumprod", "test_errors.py", "return torch.cummax(x, dim=-1)")
        refused(partial(method.attribute, x, 1), *words, model=model, tensors=(x,))
        with pytest.raises(
            UnsupportedOperationError, match=r"register a layer for .*cummax.* with captum_dtd.layers.covers"
        ):
            method.attribute(x, 1)
    assert issubclass(UnsupportedOperationError, ValueError)


def test_no_layer_is_to_be_registered_for_what_has_one() -> None:
    net = nn.Sequential(nn.Conv3d(3, CLASSES, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), Squared()).eval()
    with pytest.raises(UnsupportedOperationError, match=r"mul .*comes from a sigmoid") as caught:
        DeepTaylor(net, 0, 1).attribute(clip(), 1)
    assert "register" not in str(caught.value)


# --- settings ----------------------------------------------------------------------------------------------------

BAD_BOUNDS = [
    pytest.param(1, 0, ["low", "high"], id="low above high"),
    pytest.param([0, 2, 0], [1, 1, 1], ["low", "high"], id="low above high in one channel"),
    pytest.param([0, 0], 1, ["low", "2", "3"], id="two values for three channels"),
    pytest.param(0, torch.ones(4), ["high", "4", "3"], id="four values for three channels"),
    pytest.param(torch.zeros(3, 5, 8, 8), 1, ["low", "3, 5, 8, 8"], id="does not broadcast"),
    pytest.param(math.nan, 1, ["low", "nan"], id="NaN"),
    pytest.param(0, math.inf, ["high", "inf"], id="inf"),
    pytest.param("0", 1, ["low", "str"], id="a string"),
    pytest.param(0, None, ["high", "None"], id="None"),
    pytest.param((0, 0), (1, 1), ["low", "2"], id="bounds of two inputs"),
]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5, math.nan, 0.5)}, ["mean", "nan"]),
        ({"std": (0.5, 0.0, 0.5)}, ["std", "0.0"]),
        ({"std": (0.5, math.inf, 0.5)}, ["std", "inf"]),
        ({"scale": math.inf}, ["scale", "inf"]),
        ({"scale": -1}, ["scale", "-1"]),
        ({"std": (0.5,)}, ["mean has 3", "std has 1"]),
    ],
)
def test_bad_settings_of_pixel_bounds(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        pixel_bounds(**{"mean": (0.5,) * 3, "std": (0.25,) * 3} | settings)


@pytest.mark.parametrize(("low", "high", "words"), BAD_BOUNDS)
@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_bad_bounds(cls: type, model: nn.Module, low: Any, high: Any, words: list[str]) -> None:
    x = clip()
    refused(lambda: cls(model, low, high).attribute(x, 1), *words, model=model, tensors=(x, low, high))


@pytest.mark.parametrize("name", ["low", "high"])
def test_bounds_of_each_example_are_none_of_its_frozen_clips(name: str) -> None:
    """Of one input or of several; those that are the same for all examples are taken."""
    x, box = clip(), {"low": torch.zeros(1, 3, 4, 8, 8), "high": torch.ones(1, 3, 4, 8, 8)}
    for model, inputs in ((build(), x), (build(TwoInputs), (x, x))):
        several = isinstance(inputs, tuple)
        fine = {end: (bound, bound) if several else bound for end, bound in box.items()}
        of_each = box[name].expand(2, -1, -1, -1, -1)
        wrong = fine | {name: (box[name], of_each) if several else of_each}
        DiscriminativeDeepTaylor(model, **fine).attribute(inputs, 1)
        explain = partial(DiscriminativeDeepTaylor(model, **wrong).attribute, inputs, 1)
        refused(explain, f"{name} of shape (2, 3, 4, 8, 8) differs from example to example", model=model)


UNKNOWN = [
    ("composite", ["dtd", "epsilon-gamma-box"]),
    ("seed", ["logit", "one"]),
    ("backend", ["auto", "reference"]),
    ("precision", ["float32"]),
]


@pytest.mark.parametrize(("argument", "known"), UNKNOWN)
@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_unknown_settings(cls: type, model: nn.Module, argument: str, known: list[str]) -> None:
    refused(lambda: cls(model, 0, 1, **{argument: "nonsense"}), argument, "nonsense", *known, model=model)
    refused(lambda: cls(model, 0, 1, **{argument: 7}), argument, model=model)


@pytest.mark.parametrize(
    ("argument", "known"),
    [("readout", ["own", "first", "mean"]), ("normalize", ["none", "max", "sum"]), ("preset", ["hiley2019"])],
)
def test_unknown_settings_of_the_discrimination(model: nn.Module, argument: str, known: list[str]) -> None:
    options = {argument: "nonsense"}
    refused(lambda: DiscriminativeDeepTaylor(model, 0, 1, **options), argument, "nonsense", *known, model=model)
    if argument != "preset":
        method = Saliency(model)
        refused(lambda: DiscriminativeRelevance(method, **options), argument, "nonsense", *known, model=model)


def test_a_composite_must_name_layers_by_path_or_type_and_rules(model: nn.Module) -> None:
    refused(lambda: DeepTaylor(model, 0, 1, composite={"fc": "epsilon"}), "composite", "epsilon", model=model)
    refused(lambda: DeepTaylor(model, 0, 1, composite={3: None}), "composite", "3", model=model)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_internal_batch_size_is_at_least_one(method: Attribution, model: nn.Module, size: Any) -> None:
    x = clip()
    refused(
        lambda: method.attribute(x, 1, internal_batch_size=size),
        *("internal_batch_size", str(size)),
        model=model,
        tensors=(x,),
    )


# --- warnings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_pixels_outside_the_bounds_give_one_warning(cls: type, model: nn.Module) -> None:
    x = clip()
    x[0, 0, 0, 0, 0], x[1, 2, 1, 3, 3] = -0.5, 1.5
    with pytest.warns(UserWarning, match="low") as caught:
        cls(model, 0, 1).attribute(x, 1)
    assert len(caught) == 1
    assert "high" in str(caught[0].message)


@pytest.mark.parametrize(
    "shape", [(), (3, 1, 1, 1), (3, 4, 9, 9), (4, 1, 1), (2, 1, 1, 1, 1), (2, 3, 4, 9, 9)], ids=str
)
def test_each_pixel_has_its_own_bound(shape: tuple[int, ...]) -> None:
    """One that is a little beyond it is seen wherever it lies, and none that is within its own, but beyond another's."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(shape, generator=generator).expand(2, 3, 4, 9, 9)
    high = low + 1
    within = torch.lerp(low, high, torch.rand(2, 3, 4, 9, 9, generator=generator))
    assert lies_within(within, low, high) and lies_within(low, low, high) and lies_within(high, low, high)
    for at in torch.randint(within.numel(), (20,), generator=generator).tolist():
        for bound, step in ((low, -1e-5), (high, 1e-5)):
            beyond = within.clone()
            beyond.view(-1)[at] = bound.flatten()[at] + step
            assert not lies_within(beyond, low, high), at


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_a_final_softmax_is_stepped_over_with_one_warning(cls: type, model: nn.Module) -> None:
    x = clip()
    softmax = build(Softmax)
    with pytest.warns(UserWarning, match="softmax") as caught:
        result = cls(softmax, 0, 1).attribute(x, 1)
    assert len(caught) == 1
    expected = cls(model, 0, 1).attribute(x, 1)
    for actual, wanted in zip(*[(r,) if isinstance(r, Tensor) else r for r in (result, expected)], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_good_input_gives_no_warning(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = clip()
        x[0, 0, 0, 0, 0], x[1, 2, 1, 3, 3] = 0, 1
        DeepTaylor(model, 0, 1).attribute(x, 1)
        DiscriminativeDeepTaylor(model, 0, 1).attribute(x, 1)


def test_where_a_model_does_not_run_its_own_traceback_is_shown() -> None:
    """Not that of torch.export, which is ten times as long and says the same."""
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)).eval()
    with pytest.raises(ValueError, match="does not run on such inputs: mat1 and mat2") as caught:
        DeepTaylor(model, 0.0, 1.0).attribute(torch.rand(2, 3, 4, 8, 8), 1)
    chain, error = [], caught.value.__cause__
    while error is not None:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    (own,) = chain
    assert isinstance(own, RuntimeError)
    assert not any("export" in frame.filename for frame in traceback.extract_tb(own.__traceback__))
