"""What a Captum user relies on, for the three attribution classes."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Attribution, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn
from torch.nn import functional as F

from captum_dtd import (
    DeepTaylor,
    DiscriminativeDeepTaylor,
    DiscriminativeRelevance,
    SpatioTemporalRelevance,
    pixel_bounds,
)

LOW, HIGH = -1.1, 2.3  # neither is exact in float32: float64 results show whether the bounds were rounded
CLASSES = 5


class Clips(nn.Module):
    """A small 3D CNN. `weight` scales the logits per example, `repeat` per call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv3d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, weight: Tensor | None = None, repeat: int = 1) -> Tensor:
        x = F.max_pool3d(F.relu(self.conv1(x)), (1, 2, 2))
        x = F.relu(self.conv2(x)).mean((2, 3, 4))
        logits = self.fc(x)
        if weight is not None:
            logits = logits * weight.unsqueeze(1)
        return logits * repeat


class TwoInputs(nn.Module):
    """Two pathways of different channels and lengths, joined before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Conv3d(3, 4, 3, padding=1)
        self.fast = nn.Conv3d(2, 5, 3, padding=1)
        self.fc = nn.Linear(9, CLASSES)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        features = [F.relu(self.slow(slow)).mean((2, 3, 4)), F.relu(self.fast(fast)).mean((2, 3, 4))]
        return self.fc(torch.cat(features, 1))


class OneLayer(nn.Module):
    """One linear layer, whose relevance has a closed form, with outputs of any shape per example."""

    def __init__(self, shape: tuple[int, ...], pixels: int = 24) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(pixels, max(1, torch.Size(shape).numel()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x.flatten(1))
        return out.reshape(out.shape[0], *self.shape)


class Unsupported(Clips):
    def forward(self, x: Tensor, weight: Tensor | None = None, repeat: int = 1) -> Tensor:
        return super().forward(torch.cummax(x, dim=-1).values)


def build(cls: Callable[..., nn.Module], *args: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cls(*args).double().eval()


def pixels(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LOW + (HIGH - LOW) * torch.rand(shape, generator=generator, dtype=torch.float64)


def relevance_of_one_layer(fc: nn.Linear, x: Tensor, seed: Tensor) -> Tensor:
    """z-beta of a linear layer, written out: `seed` holds the relevance (N, outputs) of its outputs."""
    weight, flat = fc.weight.detach(), x.flatten(1)
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    share = seed / (flat @ weight.T - LOW * up.sum(1) - HIGH * down.sum(1))
    return (flat * (share @ weight) - LOW * (share @ up) - HIGH * (share @ down)).reshape(x.shape)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = expected.abs().max().item()
    assert scale > 0, "the expected relevance is zero: the comparison would show nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def clips() -> nn.Module:
    return build(Clips)


@pytest.fixture(scope="module")
def dtd(clips: nn.Module) -> DeepTaylor:
    return DeepTaylor(clips, LOW, HIGH)


@pytest.fixture(scope="module")
def discriminative(clips: nn.Module) -> DiscriminativeDeepTaylor:
    return DiscriminativeDeepTaylor(clips, LOW, HIGH)


@pytest.fixture(scope="module", params=["deep taylor", "discriminative", "wrapped"])
def method(request: pytest.FixtureRequest, dtd: DeepTaylor, discriminative: DiscriminativeDeepTaylor) -> Attribution:
    """Each of the three classes on the same model."""
    methods = {"deep taylor": dtd, "discriminative": discriminative, "wrapped": DiscriminativeRelevance(dtd)}
    return methods[request.param]


def maps(result: Tensor | SpatioTemporalRelevance) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# --- the class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor, DiscriminativeRelevance])
def test_is_a_captum_attribution(cls: type) -> None:
    assert issubclass(cls, Attribution)
    assert callable(cls.has_convergence_delta)
    assert isinstance(inspect.getattr_static(cls, "multiplies_by_inputs"), property)
    assert callable(cls.attribute.__wrapped__)


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor, DiscriminativeRelevance])
def test_order_and_defaults_of_the_arguments_of_attribute(cls: type) -> None:
    parameters = list(inspect.signature(cls.attribute).parameters.values())
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    empty = inspect.Parameter.empty
    assert positional == [
        ("self", empty),
        ("inputs", empty),
        ("target", None),
        ("additional_forward_args", None),
        ("return_convergence_delta", False),
    ]
    own = {"frame_cache": None} if cls is DiscriminativeDeepTaylor else {}
    assert keyword == {"internal_batch_size": None, "show_progress": False, **own}


def constructor(cls: type) -> tuple[list[str], dict[str, Any]]:
    parameters = list(inspect.signature(cls).parameters.values())
    keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD], keyword


def test_order_and_defaults_of_the_arguments_of_the_constructors() -> None:
    settings = {"composite": "dtd", "seed": "logit", "backend": "auto", "precision": "float32", "cuda_graphs": False}
    assert constructor(DeepTaylor) == (["model", "low", "high"], settings)

    positional, keyword = constructor(DiscriminativeDeepTaylor)
    assert positional == ["model", "low", "high"]
    assert keyword.keys() == settings.keys() | {"readout", "normalize", "preset"}
    assert {name: keyword[name] for name in ("composite", "backend", "precision", "cuda_graphs", "preset")} == {
        "composite": "dtd",
        "backend": "auto",
        "precision": "float32",
        "cuda_graphs": False,
        "preset": None,
    }

    positional, keyword = constructor(DiscriminativeRelevance)
    assert positional == ["method"]
    assert keyword == {"readout": "own", "normalize": "none"}


def test_names() -> None:
    assert DeepTaylor.get_name() == "Deep Taylor"
    assert DiscriminativeDeepTaylor.get_name() == "Discriminative Deep Taylor"
    assert DiscriminativeRelevance.get_name() == "Discriminative Relevance"


def test_properties_of_an_instance(method: Attribution, clips: nn.Module) -> None:
    assert method.has_convergence_delta() is True
    assert method.multiplies_by_inputs is True
    assert method.forward_func is clips


# --- inputs and outputs ------------------------------------------------------------------------------------------


def test_tensor_gives_tensor_and_tuple_gives_tuple(dtd: DeepTaylor) -> None:
    x = pixels(2, 3, 4, 8, 8)
    relevance = dtd.attribute(x, 1)
    assert isinstance(relevance, Tensor)
    assert relevance.shape == x.shape
    in_a_tuple = dtd.attribute((x,), 1)
    assert type(in_a_tuple) is tuple
    assert len(in_a_tuple) == 1
    close(in_a_tuple[0], relevance)
    (with_delta,), delta = dtd.attribute((x,), 1, return_convergence_delta=True)
    close(with_delta, relevance)
    assert delta.shape == (2,)


def test_a_discriminative_method_gives_three_maps(discriminative: DiscriminativeDeepTaylor) -> None:
    result = discriminative.attribute(pixels(2, 3, 4, 8, 8), 1)
    assert isinstance(result, SpatioTemporalRelevance)
    assert result._fields == ("spatial", "temporal", "total")
    assert all(part.shape == (2, 4, 8, 8) and part.dtype == torch.float64 for part in result)


def test_a_discriminative_method_gives_three_maps_for_a_one_tuple_too(
    discriminative: DiscriminativeDeepTaylor,
) -> None:
    # The three maps are a tuple already: one more level would make sensitivity_max and NoiseTunnel, which put
    # the input in a tuple and walk through the result, meet a tuple where they expect a tensor.
    x = pixels(2, 3, 4, 8, 8)
    result = discriminative.attribute((x,), 1)
    assert isinstance(result, SpatioTemporalRelevance)
    for actual, expected in zip(result, discriminative.attribute(x, 1), strict=True):
        close(actual, expected)


def test_two_inputs() -> None:
    model = build(TwoInputs)
    slow, fast = pixels(2, 3, 4, 8, 8), pixels(2, 2, 8, 6, 6, seed=2)
    method = DeepTaylor(model, (LOW, [LOW] * 2), (HIGH, [HIGH] * 2))
    relevance, delta = method.attribute((slow, fast), [1, 4], return_convergence_delta=True)
    assert type(relevance) is tuple
    assert [part.shape for part in relevance] == [slow.shape, fast.shape]
    assert all(part.abs().max() > 0 for part in relevance)
    logits = model(slow, fast).detach()[[0, 1], [1, 4]]
    sums = relevance[0].sum((1, 2, 3, 4)) + relevance[1].sum((1, 2, 3, 4))
    close(sums, logits)
    close(method.compute_convergence_delta(relevance, logits) + sums, logits)
    torch.testing.assert_close(delta, logits - sums, rtol=0, atol=1e-12)


def test_forms_of_the_bounds() -> None:
    model = build(Clips)
    x = pixels(2, 3, 4, 8, 8)
    low, high = [-1.1, -1.2, -1.3], [2.3, 2.4, 2.5]
    expected = DeepTaylor(model, low, high).attribute(x, 1)
    uniform = DeepTaylor(model, LOW, HIGH).attribute(x, 1)
    assert (expected - uniform).abs().max() > 1e-3 * expected.abs().max()
    close(DeepTaylor(model, [LOW] * 3, HIGH).attribute(x, 1), uniform)
    low_tensor, high_tensor = (torch.tensor(bound, dtype=torch.float64) for bound in (low, high))
    forms: list[tuple[Any, Any]] = [
        (tuple(low), high_tensor),
        (low_tensor.reshape(3, 1, 1, 1), high_tensor.reshape(1, 3, 1, 1, 1).expand_as(x)),
        (np.array(low[::-1])[::-1], np.array(high)[:, None, None, None]),
    ]
    for low_form, high_form in forms:
        close(DeepTaylor(model, low_form, high_form).attribute(x, 1), expected)
    per_frame = low_tensor.reshape(3, 1, 1, 1) - torch.arange(4).reshape(1, 4, 1, 1)
    relevance = DeepTaylor(model, per_frame, high).attribute(x, 1, internal_batch_size=1)
    close(relevance.sum((1, 2, 3, 4)), model(x)[:, 1].detach())


def test_layout_of_the_input_does_not_matter(method: Attribution) -> None:
    x = pixels(2, 3, 4, 8, 8)
    expected = maps(method.attribute(x, 1))
    backwards = x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    for same in (x.to(memory_format=torch.channels_last_3d), backwards):
        for actual, wanted in zip(maps(method.attribute(same, 1)), expected, strict=True):
            close(actual, wanted)


@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_layout_of_the_input_does_not_matter_to_a_model_that_flattens(cls: type) -> None:
    x = pixels(2, 1, 2, 3, 4)
    method = cls(build(OneLayer, (3,)), LOW, HIGH)
    expected = maps(method.attribute(x, 1))
    for actual, wanted in zip(maps(method.attribute(x.mT.contiguous().mT, 1)), expected, strict=True):
        close(actual, wanted)


def test_batch_is_per_clip(method: Attribution) -> None:
    x = pixels(3, 3, 4, 8, 8)
    whole = maps(method.attribute(x, [1, 4, 0]))
    for i, target in enumerate([1, 4, 0]):
        for actual, batched in zip(maps(method.attribute(x[i : i + 1], target)), whole, strict=True):
            close(actual, batched[i : i + 1])


def test_float64_is_explained_in_float64_and_float32_in_float32() -> None:
    model = build(OneLayer, (3,))
    x = pixels(2, 1, 2, 3, 4)
    seed = F.one_hot(torch.tensor([2, 2]), 3) * model(x).detach()
    expected = relevance_of_one_layer(model.fc, x, seed)
    relevance = DeepTaylor(model, LOW, HIGH).attribute(x, 2)
    assert relevance.dtype == torch.float64
    close(relevance, expected, 1e-13)
    relevance = DeepTaylor(model.float(), LOW, HIGH).attribute(x.float(), 2)
    assert relevance.dtype == torch.float32
    close(relevance.double(), expected, 1e-5)


# --- targets -----------------------------------------------------------------------------------------------------

TARGETS = [
    pytest.param((), None, [(), ()], id="None, output (N,)"),
    pytest.param((1,), None, [(0,), (0,)], id="None, output (N, 1)"),
    pytest.param((6,), 4, [(4,), (4,)], id="int"),
    pytest.param((6,), torch.tensor(4), [(4,), (4,)], id="tensor of no dimension"),
    pytest.param((6,), torch.tensor([4]), [(4,), (4,)], id="tensor of one element"),
    pytest.param((6,), torch.tensor([1, 5]), [(1,), (5,)], id="tensor (N,)"),
    pytest.param((6,), [1, 5], [(1,), (5,)], id="list of int"),
    pytest.param((6,), (4,), [(4,), (4,)], id="tuple, output (N, K)"),
    pytest.param((2, 3), (1, 2), [(1, 2), (1, 2)], id="tuple, output (N, X, Y)"),
    pytest.param((2, 3), [(1, 2), (0, 1)], [(1, 2), (0, 1)], id="list of tuples"),
    pytest.param((6,), [(1,), (5,)], [(1,), (5,)], id="list of tuples, output (N, K)"),
    pytest.param((2, 1, 3), (1, 0, 2), [(1, 0, 2), (1, 0, 2)], id="tuple, output (N, X, Y, Z)"),
]


@pytest.mark.parametrize(("shape", "target", "selected"), TARGETS)
def test_every_form_of_target(shape: tuple[int, ...], target: Any, selected: list[tuple[int, ...]]) -> None:
    model = build(OneLayer, shape)
    x = pixels(2, 1, 2, 3, 4)
    output = model(x).detach()
    seed = torch.zeros_like(output)
    for example, index in enumerate(selected):
        seed[(example, *index)] = output[(example, *index)]
    method = DeepTaylor(model, LOW, HIGH)
    relevance, delta = method.attribute(x, target, return_convergence_delta=True)
    close(relevance, relevance_of_one_layer(model.fc, x, seed.reshape(2, -1)))
    assert delta.shape == (2,)
    assert delta.abs().max() <= 1e-12
    in_parts = method.attribute(x, target, internal_batch_size=1)
    close(in_parts, relevance)


@pytest.mark.parametrize("target", [2, torch.tensor([2]), [1, 2], torch.tensor([1, 2]), (2,), [(1,), (2,)]])
def test_a_discriminative_method_takes_targets_too(method: Attribution, target: Any) -> None:
    x = pixels(2, 3, 4, 8, 8)
    one_each = [2, 2] if isinstance(target, (int, tuple)) or len(target) == 1 else [1, 2]
    result = maps(method.attribute(x, target))
    for i, index in enumerate(one_each):
        for actual, expected in zip(result, maps(method.attribute(x[i : i + 1], index)), strict=True):
            close(actual[i : i + 1], expected)


@pytest.mark.parametrize(("shape", "target"), [((6,), None), ((2, 3), None), ((2, 3), 1)])
def test_more_than_one_value_per_example_is_an_error(shape: tuple[int, ...], target: Any) -> None:
    method = DeepTaylor(build(OneLayer, shape), LOW, HIGH)
    with pytest.raises((ValueError, TypeError), match="target"):
        method.attribute(pixels(2, 1, 2, 3, 4), target)


# --- convergence delta -------------------------------------------------------------------------------------------


def test_delta_is_the_seed_minus_the_relevance() -> None:
    model = build(Clips)
    x = pixels(2, 3, 4, 8, 8)
    logits = model(x).detach()[:, 1]
    # A large stabilizer absorbs relevance, so that the delta is far from zero and has a sign.
    from captum_dtd.rules import ZPlus

    method = DeepTaylor(model, LOW, HIGH, composite={nn.Linear: ZPlus(stabilizer=0.5)})
    relevance, delta = method.attribute(x, 1, return_convergence_delta=True)
    sums = relevance.sum((1, 2, 3, 4))
    assert delta.shape == (2,)
    assert ((logits - sums).abs() > 0.01 * logits.abs()).all()
    close(delta, logits - sums)
    close(method.compute_convergence_delta(relevance, logits), logits - sums)
    close(method.compute_convergence_delta((relevance,), logits.unsqueeze(1)), logits - sums)

    one = DeepTaylor(model, LOW, HIGH, composite={nn.Linear: ZPlus(stabilizer=0.5)}, seed="one")
    relevance, delta = one.attribute(x, 1, return_convergence_delta=True)
    close(delta, 1 - relevance.sum((1, 2, 3, 4)))


@pytest.mark.parametrize("normalize", ["none", "max", "sum"])
def test_delta_of_a_discriminative_method_is_that_of_the_total_before_normalisation(
    dtd: DeepTaylor, clips: nn.Module, normalize: str
) -> None:
    from captum_dtd.rules import ZPlus

    composite = {nn.Linear: ZPlus(stabilizer=0.5)}
    x = pixels(2, 3, 4, 8, 8)
    _, expected = DeepTaylor(clips, LOW, HIGH, composite=composite).attribute(x, 1, return_convergence_delta=True)
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, normalize=normalize, composite=composite)
    result, delta = method.attribute(x, 1, return_convergence_delta=True)
    assert isinstance(result, SpatioTemporalRelevance)
    close(delta, expected)
    if normalize == "none":
        close(method.compute_convergence_delta(result, clips(x).detach()[:, 1]), expected)


def test_relevance_has_the_sign_of_the_seed_and_sums_to_it(dtd: DeepTaylor, clips: nn.Module) -> None:
    x = pixels(CLASSES, 3, 4, 8, 8)
    targets = list(range(CLASSES))
    logits = clips(x).detach().diagonal()
    assert logits.min() < 0 < logits.max(), "the case needs logits of both signs"
    relevance = dtd.attribute(x, targets)
    assert ((relevance * logits.sign().reshape(-1, 1, 1, 1, 1)) >= -1e-12 * relevance.abs().max()).all()
    torch.testing.assert_close(relevance.sum((1, 2, 3, 4)), logits, rtol=1e-10, atol=0)


# --- further arguments -------------------------------------------------------------------------------------------


def test_additional_forward_args(method: Attribution) -> None:
    x, weight = pixels(3, 3, 4, 8, 8), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    plain = maps(method.attribute(x, 1))
    scale = weight.reshape(-1, *[1] * (plain[0].ndim - 1))
    forms: list[tuple[Any, Any]] = [
        (weight, scale),
        ((weight,), scale),
        ((weight, 3), 3 * scale),
        ((None, 3), 3.0),
        ((None,), 1.0),
        (None, 1.0),
    ]
    for additional, factor in forms:
        for actual, expected in zip(maps(method.attribute(x, 1, additional)), plain, strict=True):
            close(actual, expected * factor)
        in_parts = method.attribute(x, 1, additional_forward_args=additional, internal_batch_size=2)
        for actual, expected in zip(maps(in_parts), plain, strict=True):
            close(actual, expected * factor)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_internal_batch_size_does_not_change_the_result(method: Attribution, size: int) -> None:
    x = pixels(5, 3, 4, 8, 8)
    targets = torch.tensor([0, 1, 2, 3, 4])
    whole, delta = method.attribute(x, targets, return_convergence_delta=True)
    parts, delta_of_parts = method.attribute(x, targets, None, True, internal_batch_size=size)
    for actual, expected in zip(maps(parts), maps(whole), strict=True):
        close(actual, expected)
    assert delta_of_parts.shape == (5,)
    torch.testing.assert_close(delta_of_parts, delta, rtol=0, atol=1e-12)


def test_progress_is_shown_on_request_only(method: Attribution, capfd: pytest.CaptureFixture[str]) -> None:
    x = pixels(2, 3, 4, 8, 8)
    quiet = maps(method.attribute(x, 1, internal_batch_size=1))
    capfd.readouterr()
    method.attribute(x, 1, internal_batch_size=1)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    shown = maps(method.attribute(x, 1, internal_batch_size=1, show_progress=True))
    out, err = capfd.readouterr()
    assert out == ""
    assert err != ""
    for actual, expected in zip(shown, quiet, strict=True):
        close(actual, expected)


# --- Captum's own tools ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # noise leaves the pixel bounds, and the method says so
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("target", [1, [1, 4]])
def test_noise_tunnel(method: Attribution, target: Any, as_tuple: bool) -> None:
    x = pixels(2, 3, 4, 8, 8)
    inputs = (x,) if as_tuple else x
    expected = maps(method.attribute(x, target))
    tunnel = NoiseTunnel(method)
    silent = tunnel.attribute(inputs, nt_samples=3, nt_samples_batch_size=2, stdevs=0.0, target=target)
    if len(expected) == 3 or as_tuple:
        assert type(silent) is tuple
    for actual, wanted in zip(maps(silent), expected, strict=True):
        close(actual, wanted)
    torch.manual_seed(0)
    noisy = tunnel.attribute(inputs, nt_type="vargrad", nt_samples=3, stdevs=0.2, target=target)
    for variance, wanted in zip(maps(noisy), expected, strict=True):
        assert variance.shape == wanted.shape
        assert variance.max() > 0


@pytest.mark.filterwarnings("ignore")
def test_noise_tunnel_returns_a_delta_per_sample(dtd: DeepTaylor) -> None:
    x = pixels(2, 3, 4, 8, 8)
    relevance, delta = NoiseTunnel(dtd).attribute(x, nt_samples=3, stdevs=0.1, target=1, return_convergence_delta=True)
    assert relevance.shape == x.shape
    assert delta.shape == (6,)


@pytest.mark.filterwarnings("ignore")
def test_sensitivity_max(method: Attribution) -> None:
    x = pixels(2, 3, 4, 8, 8)
    torch.manual_seed(0)
    sensitivity = sensitivity_max(method.attribute, x, target=[1, 4], n_perturb_samples=3)
    assert sensitivity.shape == (2,)
    assert (sensitivity > 0).all()
    assert sensitivity.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_infidelity(dtd: DeepTaylor, clips: nn.Module) -> None:
    x = pixels(2, 3, 4, 8, 8)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.01 * torch.randn_like(inputs)
        return noise, inputs - noise

    torch.manual_seed(0)
    score = infidelity(clips, perturb, x, dtd.attribute(x, 1), target=1, n_perturb_samples=3)
    assert score.shape == (2,)
    assert (score >= 0).all()
    assert score.isfinite().all()


# --- what is left behind: nothing --------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Any:
    modules = dict(model.named_modules())
    hooks = {
        f"{name}.{attribute}": list(value.items())
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if attribute.endswith("hooks") and isinstance(value, dict)
    }
    return (
        {name: sorted(vars(module)) for name, module in modules.items()},
        {name: (id(module), module.training, module.forward) for name, module in modules.items()},
        hooks,
        {name: (id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()},
        list(model.state_dict()),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_model_and_inputs_are_as_found(method: Attribution, clips: nn.Module, requires_grad: bool) -> None:
    x = pixels(2, 3, 4, 8, 8).requires_grad_(requires_grad)
    values, weights = x.detach().clone(), copy.deepcopy(clips.state_dict())
    handle = clips.conv1.register_forward_hook(lambda module, args, output: None)
    try:
        before = state_of(clips)
        method.attribute(x, 1)
        with pytest.raises((ValueError, TypeError)):
            method.attribute(x, CLASSES)
        with pytest.raises((ValueError, TypeError)):
            method.attribute(x[:, :2], 1)
        assert state_of(clips) == before
    finally:
        handle.remove()
    assert all(torch.equal(clips.state_dict()[name], weight) for name, weight in weights.items())
    assert x.requires_grad is requires_grad
    assert x.is_leaf
    assert x.grad is None
    assert torch.equal(x.detach(), values)


def test_model_and_inputs_are_as_found_after_a_failed_trace() -> None:
    model = build(Unsupported)
    x = pixels(2, 3, 4, 8, 8).requires_grad_()
    before = state_of(model)
    for method in (DeepTaylor(model, LOW, HIGH), DiscriminativeDeepTaylor(model, LOW, HIGH)):
        with pytest.raises(ValueError, match="cummax"):
            method.attribute(x, 1)
    assert state_of(model) == before
    assert x.requires_grad
    assert x.grad is None


def test_the_users_hooks_never_meet_a_fake_tensor() -> None:
    model, seen = build(Clips), []
    model.conv1.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    DeepTaylor(model, LOW, HIGH).attribute(pixels(1, 3, 4, 8, 8), 1)
    assert set(seen) <= {Tensor}


def test_results_are_ordinary_tensors(method: Attribution) -> None:
    result, delta = method.attribute(pixels(2, 3, 4, 8, 8).requires_grad_(), 1, return_convergence_delta=True)
    for part in (*maps(result), delta):
        assert not part.is_inference()
        assert not part.requires_grad
        part.add_(1)
        part.requires_grad_()
        (gradient,) = torch.autograd.grad((part * part).sum(), part)
        assert gradient.shape == part.shape


def test_results_own_their_memory(method: Attribution) -> None:
    x = pixels(2, 3, 4, 8, 8)
    first = maps(method.attribute(x, 1))
    kept = [part.clone() for part in first]
    for part in maps(method.attribute(x, 1)):
        part.fill_(7)
    method.attribute(pixels(2, 3, 4, 8, 8, seed=9), 2)
    for part, copy_ in zip(first, kept, strict=True):
        assert torch.equal(part, copy_)


def test_the_model_may_be_freed() -> None:
    model = build(OneLayer, (3,))
    reference = weakref.ref(model)
    method = DeepTaylor(model, LOW, HIGH)
    method.attribute(pixels(1, 1, 2, 3, 4), 1)
    gc.collect()
    gc.disable()  # nothing is held by a cycle, which may be long in being found
    try:
        del method, model
        assert reference() is None
    finally:
        gc.enable()


# --- the circumstances of the call -------------------------------------------------------------------------------


def contexts() -> dict[str, Callable[[], Any]]:
    return {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("name", contexts())
@pytest.mark.parametrize("cls", [DeepTaylor, DiscriminativeDeepTaylor])
def test_grad_modes_and_autocast_change_nothing(cls: type, name: str) -> None:
    torch.manual_seed(0)
    model = Clips().eval()
    x = pixels(2, 3, 4, 8, 8).float()
    expected = maps(cls(model, LOW, HIGH).attribute(x, 1))
    method = cls(model, LOW, HIGH)
    with contexts()[name]():
        first = maps(method.attribute(x, 1))  # traced in here
        x_made_inside = x + 0
        second = maps(method.attribute(x_made_inside, 1))
    afterwards = maps(method.attribute(x, 1))  # what was cached in there still serves
    on_the_outside = maps(method.attribute(x_made_inside, 1))
    for result in (first, second, afterwards, on_the_outside):
        for actual, wanted in zip(result, expected, strict=True):
            assert actual.dtype == torch.float32
            close(actual, wanted, 1e-6)
    assert not any(part.is_inference() for part in (*afterwards, *on_the_outside))


def test_a_model_built_in_inference_mode() -> None:
    x = pixels(2, 3, 4, 8, 8)
    expected = DeepTaylor(build(Clips), LOW, HIGH).attribute(x, 1)
    with torch.inference_mode():
        model = build(Clips)
    close(DeepTaylor(model, LOW, HIGH).attribute(x, 1), expected)


def test_weights_changed_since_are_noticed() -> None:
    model = build(OneLayer, (3,))
    x = pixels(2, 1, 2, 3, 4)
    method = DeepTaylor(model, LOW, HIGH)

    def check() -> None:
        seed = F.one_hot(torch.tensor([2, 2]), 3) * model(x).detach()
        close(method.attribute(x, 2), relevance_of_one_layer(model.fc, x, seed))

    check()
    with torch.no_grad():
        model.fc.weight.mul_(-1.5)
    check()
    model.fc.weight.data = model.fc.weight.data.flip(0)
    check()
    model.fc.weight.data.mul_(-0.5)
    check()
    model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
    check()
    model.load_state_dict(build(OneLayer, (3,), seed=5).state_dict())
    check()


@pytest.mark.parametrize("kind", ["deep taylor", "discriminative", "wrapped"])
def test_a_method_can_be_copied_and_pickled(kind: str) -> None:
    model, x = build(OneLayer, (3,)), pixels(2, 1, 2, 3, 4)
    methods = {
        "deep taylor": DeepTaylor(model, LOW, HIGH),
        "discriminative": DiscriminativeDeepTaylor(model, LOW, HIGH, readout="first", normalize="max"),
        "wrapped": DiscriminativeRelevance(DeepTaylor(model, LOW, HIGH, seed="one"), readout="mean"),
    }
    method = methods[kind]
    unused = pickle.dumps(method)
    expected = maps(method.attribute(x, 1))
    for twin in (pickle.loads(unused), pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert twin.forward_func is not model
        for actual, wanted in zip(maps(twin.attribute(x, 1)), expected, strict=True):
            close(actual, wanted)


def test_one_clip_of_a_batch_that_lost_its_relevance_is_told() -> None:
    model = nn.Sequential(
        nn.Conv3d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 1)
    )
    for value in (*model[0].parameters(), *model[4].parameters()):
        value.data.fill_(1.0)
    inputs = torch.ones(2, 1, 2, 3, 3)
    inputs[1] = 0  # its score is the bias alone
    with pytest.warns(UserWarning, match="more than half of the relevance was lost"):
        _, delta = DeepTaylor(model.eval(), 0.0, 1.0).attribute(inputs, 0, return_convergence_delta=True)
    assert delta[0].abs() < 0.5 * 3 and delta[1] == 1


def test_white_that_rounds_beyond_its_bound_warns_of_nothing() -> None:
    mean, std = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # torchvision's of Kinetics
    black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 2, 6, 6)
    inputs = (black_and_white - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    low, high = pixel_bounds(mean, std)
    assert (inputs > high.float().view(3, 1, 1, 1)).any()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DeepTaylor(Clips().eval(), low, high).attribute(inputs, 0)
    assert not [each for each in caught if "outside" in str(each.message)]


@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
def test_logits_are_what_is_explained(ending: nn.Module) -> None:
    torch.manual_seed(0)
    model, inputs = Clips().double().eval(), torch.rand(3, 3, 4, 6, 6, dtype=torch.float64)
    assert DeepTaylor(model, LOW, HIGH).logits(inputs) is None
    method = DeepTaylor(nn.Sequential(model, ending).eval(), LOW, HIGH)
    logits = method.logits(inputs)
    torch.testing.assert_close(logits, model(inputs).detach())
    with pytest.warns(UserWarning, match="its logits are explained"):
        relevance, delta = method.attribute(inputs, 1, return_convergence_delta=True)
    torch.testing.assert_close(relevance.flatten(1).sum(1) + delta, logits[:, 1])
