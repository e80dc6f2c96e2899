"""Spatial and temporal relevance: read-outs, normalisations, the authors' preset, other methods, selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hiley2019
import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    DeepLiftShap,
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn import functional as F

import captum_dtd.discriminate
from captum_dtd import (
    DeepTaylor,
    DiscriminativeDeepTaylor,
    DiscriminativeRelevance,
    SelectiveRelevance,
    SpatioTemporalRelevance,
)

LOW, HIGH = -1.1, 2.3
READOUTS = ["own", "first", "mean"]


class Clips(nn.Module):
    """A small 3D CNN whose temporal padding makes the border frames differ from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv3d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        x = F.max_pool3d(F.relu(self.conv1(x)), (1, 2, 2))
        logits = self.fc(F.relu(self.conv2(x)).mean((2, 3, 4)))
        return logits if weight is None else logits * weight.unsqueeze(1)


def build(seed: int = 0) -> Clips:
    torch.manual_seed(seed)
    return Clips().double().eval()


def pixels(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LOW + (HIGH - LOW) * torch.rand(shape, generator=generator, dtype=torch.float64)


def frozen(x: Tensor, t: int) -> Tensor:
    """(N, C, T, H, W) with every frame replaced by frame t."""
    return x[:, :, t : t + 1].repeat(1, 1, x.shape[2], 1, 1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12, scale: Tensor | None = None) -> None:
    size = (expected if scale is None else scale).abs().max().item()
    assert size > 0, "the expected relevance is zero: the comparison would show nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size)


def all_close(actual: SpatioTemporalRelevance, expected: SpatioTemporalRelevance, tolerance: float = 1e-12) -> None:
    for part, wanted in zip(actual, expected, strict=True):
        close(part, wanted, tolerance, scale=expected.total)


def normalised(relevance: Tensor, how: str) -> Tensor:
    """(N, T, H, W), by the formulas of each normalisation. `sum` is used here on relevance of one sign only."""
    if how == "max":
        return relevance / relevance.abs().amax((1, 2, 3), keepdim=True)
    if how == "sum":
        return relevance / relevance.sum((1, 2, 3), keepdim=True)
    return relevance


def by_definition(
    explain: Callable[[Tensor], Tensor], x: Tensor, readout: str = "own", normalize: str = "none"
) -> SpatioTemporalRelevance:
    """The definition, one frozen clip at a time; `explain` gives relevance (N, T, H, W) of clips (N, C, T, H, W)."""
    total = normalised(explain(x), normalize)
    spatial = torch.empty_like(total)
    for t in range(x.shape[2]):
        relevance = normalised(explain(frozen(x, t)), normalize)
        spatial[:, t] = {"own": relevance[:, t], "first": relevance[:, 0], "mean": relevance.mean(1)}[readout]
    return SpatioTemporalRelevance(spatial=spatial, temporal=total - spatial, total=total)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return build()


@pytest.fixture(scope="module")
def dtd(clips: Clips) -> DeepTaylor:
    return DeepTaylor(clips, LOW, HIGH)


@pytest.fixture(scope="module")
def from_one(clips: Clips) -> DeepTaylor:
    return DeepTaylor(clips, LOW, HIGH, seed="one")


@pytest.fixture(scope="module")
def discriminative(clips: Clips) -> DiscriminativeDeepTaylor:
    return DiscriminativeDeepTaylor(clips, LOW, HIGH)


# --- the definition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "max", "sum"])
@pytest.mark.parametrize("readout", READOUTS)
def test_readouts_and_normalisations(clips: Clips, from_one: DeepTaylor, readout: str, normalize: str) -> None:
    x, targets = pixels(2, 3, 5, 8, 8), [1, 4]
    # From a seed of 1 all relevance is positive, so that a sum never cancels.
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout=readout, normalize=normalize, seed="one")
    expected = by_definition(lambda clip: from_one.attribute(clip, targets).sum(1), x, readout, normalize)
    all_close(method.attribute(x, targets), expected)
    assert expected.temporal.abs().max() > 0.01 * expected.total.abs().max()


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("readout", READOUTS)
def test_readouts_and_normalisations_of_logits_of_both_signs(
    clips: Clips, dtd: DeepTaylor, readout: str, normalize: str
) -> None:
    x = pixels(5, 3, 3, 8, 8)
    targets = torch.arange(5)
    logits = clips(x).detach().diagonal()
    assert logits.min() < 0 < logits.max(), "the case needs logits of both signs"
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout=readout, normalize=normalize)
    all_close(
        method.attribute(x, targets),
        by_definition(lambda clip: dtd.attribute(clip, targets).sum(1), x, readout, normalize),
    )


def test_defaults_are_own_and_none(discriminative: DiscriminativeDeepTaylor, clips: Clips) -> None:
    x = pixels(2, 3, 4, 8, 8)
    spelled_out = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout="own", normalize="none", seed="logit")
    all_close(discriminative.attribute(x, 1), spelled_out.attribute(x, 1))


def test_parts_add_up_and_total_is_deep_taylor(discriminative: DiscriminativeDeepTaylor, dtd: DeepTaylor) -> None:
    x = pixels(2, 3, 4, 8, 8)
    result = discriminative.attribute(x, [1, 4])
    close(result.spatial + result.temporal, result.total)
    close(result.total, dtd.attribute(x, [1, 4]).sum(1))


def test_one_frame_has_no_motion(discriminative: DiscriminativeDeepTaylor) -> None:
    result = discriminative.attribute(pixels(2, 3, 1, 8, 8), 1)
    assert result.total.abs().max() > 0
    assert (result.temporal == 0).all()


def test_maps_are_contiguous_and_apart(discriminative: DiscriminativeDeepTaylor) -> None:
    x = frozen(pixels(2, 3, 4, 8, 8), 0)
    spatial, temporal, total = discriminative.attribute(x, 1)
    assert all(part.is_contiguous() for part in (spatial, temporal, total))
    kept = total.clone()
    spatial.zero_()
    temporal.fill_(3)
    assert torch.equal(total, kept)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_frozen_clips_take_their_own_arguments_along(
    clips: Clips, dtd: DeepTaylor, discriminative: DiscriminativeDeepTaylor, size: int
) -> None:
    x, targets = pixels(3, 3, 4, 8, 8), [1, 4, 0]
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    expected = by_definition(lambda clip: dtd.attribute(clip, targets, weight).sum(1), x)
    for method in (discriminative, DiscriminativeRelevance(dtd)):
        all_close(method.attribute(x, targets, weight, internal_batch_size=size), expected)


def test_the_rule_table_is_of_a_model_with_its_arguments() -> None:
    class Shifted(Clips):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + by.unsqueeze(1)

    method = DiscriminativeDeepTaylor(Shifted().double().eval(), LOW, HIGH)
    rows = method.rule_table(pixels(2, 3, 4, 8, 8), torch.zeros(2, dtype=torch.float64)).rows
    assert {row.module: row.times for row in rows}["conv1"] == "1 -> 3 of 4"


class TwoStreams(nn.Module):
    """Colour and flow of one clip."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv3d(3, 4, 3, padding=1)
        self.flow = nn.Conv3d(2, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, colour: Tensor, flow: Tensor) -> Tensor:
        return self.fc(F.relu(self.colour(colour) + self.flow(flow)).mean((2, 3, 4)))


def test_two_inputs_are_frozen_together() -> None:
    torch.manual_seed(0)
    model = TwoStreams().double().eval()
    colour, flow = pixels(2, 3, 4, 8, 8), pixels(2, 2, 4, 6, 6, seed=2)[..., :1, :1].repeat(1, 1, 1, 8, 8)
    colour[0] = frozen(colour, 0)[0]  # the flow still moves
    bounds = ((LOW, LOW), (HIGH, HIGH))
    dtd = DeepTaylor(model, *bounds)
    for method in (DiscriminativeDeepTaylor(model, *bounds), DiscriminativeRelevance(dtd)):
        result, delta = method.attribute((colour, flow), [1, 4], return_convergence_delta=True)
        score = model(colour, flow).detach()[[0, 1], [1, 4]]
        assert type(result) is tuple
        assert len(result) == 2
        total = [part.sum(1) for part in dtd.attribute((colour, flow), [1, 4])]
        for i, maps in enumerate(result):
            close(maps.total, total[i])
            close(maps.spatial + maps.temporal, maps.total)
        for t in range(4):
            parts = dtd.attribute((frozen(colour, t), frozen(flow, t)), [1, 4])
            for maps, part in zip(result, parts, strict=True):
                close(maps.spatial[:, t], part.sum(1)[:, t])
        if isinstance(method, DiscriminativeDeepTaylor):
            torch.testing.assert_close(method.compute_convergence_delta(result, score), delta)


# --- a clip without motion ---------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.signal, self.gate, self.head = (
            nn.Conv3d(2, 4, 3, padding=1),
            nn.Conv3d(1, 4, 3, padding=1),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.head((self.signal(x).relu() * self.gate(g).sigmoid()).mean((2, 3, 4)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_input_that_only_makes_a_gate_has_none(backend: Any) -> None:
    inputs = torch.rand(2, 2, 4, 5, 5), torch.rand(2, 1, 4, 5, 5)
    method = DiscriminativeDeepTaylor(Gated().eval(), (0.0, 0.0), (1.0, 1.0), backend=backend)
    for readout, normalize in (("own", "none"), ("first", "none"), ("mean", "none"), ("own", "max")):
        method.readout, method.normalize = readout, normalize  # type: ignore[assignment]
        signal, gate = method.attribute(inputs, 1)
        assert signal.total.any() and signal.spatial.any()
        assert not any(part.any() for part in gate)
        assert [part.shape for part in gate] == [part.shape for part in signal]


def test_dividing_by_the_sum_keeps_signs() -> None:
    """Of a positive score, of a negative one, and of maps that cancel."""
    maps = torch.tensor([[[[1.0, -3.0]]], [[[-1.0, 3.0]]], [[[2.0, -2.0]]]])
    expected = maps / torch.tensor([2.0, 2.0, 1.0]).view(-1, 1, 1, 1)
    assert torch.equal(captum_dtd.discriminate.normalised(maps, "sum"), expected)


def test_a_clip_without_motion_has_no_temporal_relevance(
    discriminative: DiscriminativeDeepTaylor, dtd: DeepTaylor
) -> None:
    x = pixels(3, 3, 6, 8, 8)
    x[1] = frozen(x, 2)[1]  # between two clips that move
    for method in (discriminative, DiscriminativeRelevance(dtd)):
        for size in (None, 1, 2):
            result = method.attribute(x, [1, 4, 0], internal_batch_size=size)
            assert (result.temporal[1] == 0).all()
            assert torch.equal(result.spatial[1], result.total[1])
            assert all(result.temporal[i].abs().max() > 0.01 * result.total[i].abs().max() for i in (0, 2))


@pytest.mark.parametrize("normalize", ["max", "sum"])
def test_a_clip_without_motion_has_none_when_normalised(clips: Clips, normalize: str) -> None:
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, normalize=normalize)
    result = method.attribute(frozen(pixels(2, 3, 5, 8, 8), 1), 1)
    assert result.total.abs().max() > 0
    assert (result.temporal == 0).all()


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("readout", READOUTS)
def test_a_clip_without_motion_is_read_out_like_any_other(
    clips: Clips, dtd: DeepTaylor, readout: Any, normalize: Any
) -> None:
    """One explanation serves as both; of it too, slice 0 or the mean is what every frame alone earns."""
    x, options = frozen(pixels(2, 3, 5, 8, 8), 1), {"readout": readout, "normalize": normalize}
    expected = by_definition(lambda clip: dtd.attribute(clip, [1, 4]).sum(1), x, readout, normalize)
    for method in (DiscriminativeDeepTaylor(clips, LOW, HIGH, **options), DiscriminativeRelevance(dtd, **options)):
        all_close(method.attribute(x, [1, 4]), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_clip_without_motion_has_none_with_sharing_off(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    calls = []

    def every_frame_by_itself(clip: Tensor) -> Tensor:
        calls.append(clip.shape)
        return torch.arange(clip.shape[1])

    monkeypatch.setattr(captum_dtd.discriminate, "distinct_frames", every_frame_by_itself)
    model = build().to(dtype)
    x = frozen(pixels(2, 3, 6, 8, 8), 1).to(dtype)
    for method in (
        DiscriminativeDeepTaylor(model, LOW, HIGH),
        DiscriminativeRelevance(DeepTaylor(model, LOW, HIGH)),
    ):
        calls.clear()
        for size in (None, 1, 4):
            result = method.attribute(x, 1, internal_batch_size=size)
            assert result.temporal.abs().max() <= tolerance * result.total.abs().max()
        assert set(calls) == {(3, 6, 8, 8)}


def test_distinct_frames_are_told_apart_to_the_bit() -> None:
    frames = pixels(3, 3, 4, 4)
    clip = torch.stack([frames[:, 0], frames[:, 1], frames[:, 0], frames[:, 2], frames[:, 1], frames[:, 0]], 1)
    clip[2, 3, 1, 1] = clip[2, 0, 1, 1]
    assert captum_dtd.discriminate.distinct_frames(clip).tolist() == [0, 1, 0, 3, 1, 0]
    clip[0, 2, 0, 0] = torch.nextafter(clip[0, 2, 0, 0], torch.tensor(9.0, dtype=clip.dtype))
    indices = captum_dtd.discriminate.distinct_frames(clip)
    assert indices.tolist() == [0, 1, 2, 3, 1, 0]
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("readout", READOUTS)
def test_repeated_frames_share_their_explanation(monkeypatch: pytest.MonkeyPatch, clips: Clips, readout: str) -> None:
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout=readout)
    x = pixels(2, 3, 8, 8, 8)
    x[0] = x[0, :, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])]  # a clip of three frames, loop-padded to eight
    x[1] = x[1, :, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])]
    explained: list[int] = []
    seed_of = DeepTaylor.seed_of

    def counting(self: DeepTaylor, output: Tensor, target: Any) -> Tensor:
        explained.append(len(output))
        return seed_of(self, output, target)

    monkeypatch.setattr(DeepTaylor, "seed_of", counting)
    result = method.attribute(x, [1, 4])
    assert sum(explained) == 2 + 5
    explained.clear()
    monkeypatch.setattr(captum_dtd.discriminate, "distinct_frames", lambda clip: torch.arange(clip.shape[1]))
    all_close(result, method.attribute(x, [1, 4]))
    assert sum(explained) == 2 + 16


# --- the authors' preset -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 3])
def test_preset_is_the_authors_computation(target: int) -> None:
    torch.manual_seed(3)
    net = hiley2019.tiny_c3d(width=4, classes=6).double().eval()
    for layer in net:
        if isinstance(layer, (nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.5)
    mean = torch.tensor([90.0, 98.0, 102.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    generator = torch.Generator().manual_seed(4)
    clip = torch.randint(0, 256, (3, 16, 32, 32), generator=generator).double() - mean
    spatial, temporal, total = hiley2019.explain(net, clip, target)
    assert total.abs().max() == 1
    assert spatial.abs().max() > 0.01
    assert temporal.abs().max() > 0.01

    method = DiscriminativeDeepTaylor(net, -102, 255 - 90, preset="hiley2019")
    result = method.attribute(clip[None], target)
    torch.testing.assert_close(result.total[0], total, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.spatial[0], spatial, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.temporal[0], temporal, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("readout", "mean"), ("readout", "own"), ("normalize", "sum"), ("normalize", "none"), ("seed", "logit")],
)
def test_preset_beside_a_conflicting_argument_is_an_error(clips: Clips, argument: str, value: str) -> None:
    conflict: Any = {argument: value}
    with pytest.raises(ValueError, match="hiley2019") as error:
        DiscriminativeDeepTaylor(clips, LOW, HIGH, preset="hiley2019", **conflict)
    assert argument in str(error.value)
    assert value in str(error.value)


def test_preset_beside_what_it_stands_for_is_no_error(clips: Clips) -> None:
    settings: dict[str, Any] = {"readout": "first", "normalize": "max", "seed": "one"}
    method = DiscriminativeDeepTaylor(clips, LOW, HIGH, preset="hiley2019", **settings)
    assert (method.preset, method.readout, method.normalize, method.method.seed) == ("hiley2019", "first", "max", "one")


def test_preset_is_a_name_for_its_settings(clips: Clips) -> None:
    x = pixels(2, 3, 4, 8, 8)
    settings = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout="first", normalize="max", seed="one")
    preset = DiscriminativeDeepTaylor(clips, LOW, HIGH, preset="hiley2019")
    all_close(preset.attribute(x, [1, 4]), settings.attribute(x, [1, 4]))


# --- any Captum method -------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Callable[[nn.Module], Attribution], dict[str, Any]]] = {
    "integrated gradients": (IntegratedGradients, {"n_steps": 7, "baselines": -1.0}),
    "saliency": (Saliency, {"abs": False}),
    "input x gradient": (InputXGradient, {}),
}


@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients")
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_any_method_can_be_discriminated(clips: Clips, name: str, readout: str) -> None:
    build_method, options = METHODS[name]
    inner = build_method(clips)
    x, targets = pixels(2, 3, 4, 8, 8), [1, 4]
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def explain(clip: Tensor) -> Tensor:
        relevance = inner.attribute(clip, target=targets, additional_forward_args=weight, **options)
        return relevance.detach().sum(1)

    method = DiscriminativeRelevance(inner, readout=readout)
    result = method.attribute(x, targets, weight, internal_batch_size=3, **options)
    assert isinstance(result, SpatioTemporalRelevance)
    assert not any(part.requires_grad for part in result)
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in clips.parameters())
    all_close(result, by_definition(explain, x, readout))
    with torch.no_grad():
        all_close(method.attribute(x, targets, weight, **options), result)


@pytest.mark.parametrize("count", [3, 4])
def test_what_belongs_to_a_clip_belongs_to_its_frozen_clips(clips: Clips, count: int) -> None:
    """Baselines and masks with a row for each clip; four frozen clips are explained together."""
    x, baselines, target = pixels(count, 3, 4, 6, 6), pixels(count, 3, 4, 6, 6, seed=5), [1, 4, 2, 0][:count]
    mask = torch.arange(6).view(1, 1, 1, 6, 1) * (torch.arange(count) + 1).view(-1, 1, 1, 1, 1) % 4
    for method, options in (
        (IntegratedGradients(clips), {"baselines": (baselines,), "n_steps": 4}),
        (IntegratedGradients(clips), {"baselines": baselines[:1], "n_steps": 4}),
        (FeatureAblation(clips), {"baselines": baselines, "feature_mask": mask[1:2].expand(1, 3, 4, 6, 6)}),
    ):
        together = DiscriminativeRelevance(method).attribute(x, target=target, **options)
        for i in range(count):
            own = {
                name: value[0][i : i + 1]
                if isinstance(value, tuple)
                else value[i : i + 1]
                if len(value) == count
                else value
                for name, value in options.items()
                if isinstance(value, (Tensor, tuple))
            }
            alone = DiscriminativeRelevance(method).attribute(x[i : i + 1], target=target[i], **(options | own))
            for part, expected in zip(together, alone, strict=True):
                close(part[i : i + 1], expected)


@pytest.mark.parametrize("base", [GradientShap, DeepLiftShap])
def test_a_sample_of_baselines_is_for_every_clip(clips: Clips, base: Any) -> None:
    """Also where it has as many rows as there are clips."""
    seen: list[int] = []

    class Shap(base):  # type: ignore[misc]
        @log_usage()  # type: ignore[untyped-decorator]
        def attribute(self, inputs: Any, baselines: Any, **options: Any) -> Any:
            (drawn_from,) = baselines if isinstance(baselines, tuple) else (baselines,)
            seen.append(len(drawn_from))
            assert torch.equal(drawn_from.unique(dim=0), sample.unique(dim=0))
            return inputs

    sample = pixels(2, 3, 4, 6, 6, seed=5)
    for method, options in ((Shap(clips), {}), (NoiseTunnel(Shap(clips)), {"draw_baseline_from_distrib": True})):
        DiscriminativeRelevance(method).attribute(pixels(2, 3, 4, 6, 6), target=1, baselines=sample, **options)
    assert len(seen) > 2


@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients")
@pytest.mark.parametrize("normalize", ["max", "sum"])
def test_any_method_can_be_normalised(clips: Clips, normalize: str) -> None:
    inner = Saliency(clips)  # absolute gradients: of one sign
    x = pixels(2, 3, 4, 8, 8)
    result = DiscriminativeRelevance(inner, normalize=normalize).attribute(x, 1)
    all_close(
        result, by_definition(lambda clip: inner.attribute(clip, target=1).detach().sum(1), x, normalize=normalize)
    )


@pytest.mark.parametrize(("readout", "normalize"), [("own", "none"), ("first", "max"), ("mean", "sum")])
def test_wrapped_deep_taylor_is_discriminative_deep_taylor(
    clips: Clips, dtd: DeepTaylor, readout: str, normalize: str
) -> None:
    x = pixels(2, 3, 4, 8, 8)
    direct = DiscriminativeDeepTaylor(clips, LOW, HIGH, readout=readout, normalize=normalize)
    wrapped = DiscriminativeRelevance(dtd, readout=readout, normalize=normalize)
    result, delta = wrapped.attribute(x, [1, 4], return_convergence_delta=True)
    expected, expected_delta = direct.attribute(x, [1, 4], return_convergence_delta=True)
    all_close(result, expected)
    torch.testing.assert_close(delta, expected_delta, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients")
def test_delta_and_properties_are_those_of_the_method(clips: Clips) -> None:
    x = pixels(2, 3, 4, 8, 8)
    inner = IntegratedGradients(clips)
    method = DiscriminativeRelevance(inner)
    assert method.has_convergence_delta() is True
    assert method.multiplies_by_inputs is True
    _, delta = method.attribute(x, [1, 4], return_convergence_delta=True, n_steps=3)
    _, expected = inner.attribute(x, target=[1, 4], return_convergence_delta=True, n_steps=3)
    close(delta, expected)

    without = DiscriminativeRelevance(Saliency(clips))
    assert without.has_convergence_delta() is False
    assert without.multiplies_by_inputs is False
    with pytest.raises(ValueError, match="Saliency"):
        without.attribute(x, 1, return_convergence_delta=True)


class Failing(Attribution):
    """Fails at the second call, after having asked for gradients, as Captum's methods do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls = 0

    def attribute(self, inputs: Tensor, target: Any = None, **kwargs: Any) -> Tensor:
        self.calls += 1
        inputs.requires_grad_()
        if self.calls > 1:
            raise RuntimeError("out of luck")
        return inputs.detach() * 2


def test_inputs_are_as_found_when_a_method_fails(clips: Clips) -> None:
    x = pixels(1, 3, 4, 8, 8)
    with pytest.raises(RuntimeError, match="out of luck"):
        DiscriminativeRelevance(Failing(clips)).attribute(x, 1)
    assert not x.requires_grad


class Doubled(Attribution):  # type: ignore[misc]
    """Notes what it is given, and gives twice that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given: list[Any] = []

    def attribute(self, inputs: Any, target: Any = None, **options: Any) -> Any:
        self.given.append(inputs)
        return tuple(2 * part for part in inputs) if isinstance(inputs, tuple) else 2 * inputs


def test_a_method_is_given_a_few_frozen_clips_at_once(clips: Clips) -> None:
    """Four, where it is not said how many."""
    for size, expected in ((None, [1, 4, 4, 2]), (5, [1, 5, 5]), (100, [1, 10])):
        method = Doubled(clips)
        DiscriminativeRelevance(method).attribute(pixels(1, 3, 10, 6, 6), 1, internal_batch_size=size)
        assert [len(given) for given in method.given] == expected


def test_a_method_is_given_inputs_in_the_form_in_which_they_came(clips: Clips) -> None:
    x = pixels(1, 3, 4, 6, 6)
    for inputs in (x, (x,)):
        method = Doubled(clips)
        result = DiscriminativeRelevance(method).attribute(inputs, 1)
        assert isinstance(result, SpatioTemporalRelevance)
        assert {type(given) for given in method.given} == {type(inputs)}


@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients")
def test_any_method_explains_clips_that_were_made_in_inference_mode(clips: Clips) -> None:
    """Gradients cannot be asked of such tensors: the method is given others."""
    method, x = DiscriminativeRelevance(Saliency(clips)), pixels(1, 3, 4, 8, 8)
    with torch.inference_mode():
        inferred = x.clone()
    all_close(method.attribute(inferred, 1), method.attribute(x, 1))


def test_progress_ends_where_all_clips_and_frozen_clips_are_explained(
    dtd: DeepTaylor, discriminative: DiscriminativeDeepTaylor, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of what needs no explanation of its own: the frames of a still clip, and a frame that is shown again."""
    x = pixels(3, 3, 4, 8, 8)
    x[1] = frozen(x, 2)[1]
    x[2, :, 3] = x[2, :, 0]
    for method in (discriminative, DiscriminativeRelevance(dtd)):
        method.attribute(x, 1, show_progress=True)
        assert "15/15" in capfd.readouterr().err


def test_only_an_attribution_can_be_wrapped(clips: Clips) -> None:
    with pytest.raises(TypeError, match="method"):
        DiscriminativeRelevance(clips)  # type: ignore[arg-type]


# --- selective relevance -----------------------------------------------------------------------------------------


def selected_by_definition(relevance: np.ndarray[Any, Any], sigma: float) -> np.ndarray[Any, Any]:
    """Keep R where |Sobel derivative along time| > sigma x its standard deviation over the clip; loops, no library."""
    along, across = [-1, 0, 1], [1, 2, 1]
    result = np.zeros_like(relevance)
    for n, clip in enumerate(relevance):
        frames, height, width = clip.shape
        padded = np.pad(clip, 1)
        derivative = np.zeros_like(clip)
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    part = padded[i : i + frames, j : j + height, k : k + width]
                    derivative += along[i] * across[j] * across[k] * part
        derivative = np.abs(derivative)
        spread = math.sqrt(((derivative - derivative.mean()) ** 2).mean())
        result[n] = np.where(derivative > sigma * spread, clip, 0)
    return result


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 2, 4, 4), (3, 4, 1, 5)])
def test_selective_relevance(shape: tuple[int, ...], sigma: float) -> None:
    generator = torch.Generator().manual_seed(7)
    relevance = torch.randn(shape, generator=generator, dtype=torch.float64)
    relevance[0] *= 100  # each clip has its own threshold
    kept = relevance.clone()
    result = SelectiveRelevance(sigma)(relevance)
    np.testing.assert_array_equal(result.numpy(), selected_by_definition(relevance.numpy(), sigma))
    assert torch.equal(relevance, kept)
    assert (result != 0).sum() > 0
    assert (result != 0).sum() < result.numel() or sigma == 0


def test_selective_relevance_has_sigma_one_by_default() -> None:
    relevance = torch.randn((1, 5, 7, 6), generator=torch.Generator().manual_seed(7))
    result = SelectiveRelevance()(relevance)
    assert result.dtype == torch.float32
    assert torch.equal(result, SelectiveRelevance(1.0)(relevance))
    assert not torch.equal(result, SelectiveRelevance(0.5)(relevance))


def test_what_does_not_move_is_not_selected() -> None:
    still = torch.rand((1, 1, 6, 6), generator=torch.Generator().manual_seed(7)).expand(1, 6, 6, 6)
    result = SelectiveRelevance(1.0)(still)
    assert (result[:, 1:-1] == 0).all()  # the first and last frames meet the zero padding
    assert (SelectiveRelevance(0.0)(torch.zeros(1, 4, 6, 6)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_frames_do_not_change_at_any_sigma(dtype: torch.dtype) -> None:
    still = (
        torch.rand((1, 1, 20, 20), generator=torch.Generator().manual_seed(0)).mul(1e-3).to(dtype).expand(1, 8, 20, 20)
    )
    for sigma in (0.0, 1e-8):
        result = SelectiveRelevance(sigma)(still)
        assert result.dtype == dtype
        assert (result[:, 1:-1] == 0).all()
        assert torch.equal(result[:, [0, -1]], still[:, [0, -1]])


def test_half_precision_does_not_overflow_while_changes_are_found() -> None:
    relevance = torch.zeros((1, 8, 6, 6), dtype=torch.float16)
    relevance[0, 3:5, 2:4, 2:4] = 60000.0  # times 9, as the derivative sums, is more than the type can hold
    assert torch.equal(SelectiveRelevance()(relevance), relevance)


def test_low_precision_is_selected_as_float32_is() -> None:
    relevance = 100 * torch.randn((1, 8, 16, 16), generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(SelectiveRelevance()(relevance), SelectiveRelevance()(relevance.float()).half())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_relevance_that_is_not_finite_is_not_selected_from(value: float) -> None:
    relevance = torch.rand(1, 4, 6, 6)
    relevance[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="relevance has NaN or infinite values"):
        SelectiveRelevance()(relevance)


@pytest.mark.parametrize("sigma", [-0.1, math.nan])
def test_sigma_is_not_negative(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        SelectiveRelevance(sigma)


def test_selective_relevance_wants_a_map_per_frame() -> None:
    with pytest.raises(ValueError, match=r"\(?N, T, H, W\)?"):
        SelectiveRelevance(1.0)(torch.rand(2, 3, 4, 5, 6))
