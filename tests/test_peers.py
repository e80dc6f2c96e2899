"""Cross-checks with other people's implementations, where their semantics and ours coincide."""

from __future__ import annotations

import pytest
import torch
from models import between
from torch import Tensor, nn

from captum_dtd import DeepTaylor
from captum_dtd.rules import WinnerTakesAll

pytest.importorskip("zennit", reason="zennit is not installed (pip install zennit)")

LOW, HIGH = -1.7, 2.6


def narrow_c3d() -> nn.Sequential:
    """C3D's eight convolutions, five pools and three linear layers, an eighth as wide, for 16 x 32 x 32."""
    layers: list[nn.Module] = []
    channels = 3
    for n, width in enumerate((8, 16, 32, 32, 64, 64, 64, 64)):
        layers += [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if n in (0, 1, 3, 5, 7):
            kernel = (1, 2, 2) if n == 0 else (2, 2, 2)
            layers.append(nn.MaxPool3d(kernel, kernel, padding=(0, 1, 1) if n == 7 else 0))
    layers += [
        nn.Flatten(),
        nn.Linear(64 * 4, 48),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    ]
    return nn.Sequential(*layers)


def zennits(model: nn.Sequential, x: Tensor, target: int) -> Tensor:
    from zennit.attribution import Gradient
    from zennit.composites import SpecialFirstLayerMapComposite
    from zennit.rules import Pass, ZBox, ZPlus
    from zennit.types import Activation, Convolution
    from zennit.types import Linear as Dense

    z_plus = ZPlus(stabilizer=1e-15, zero_params=["bias"])
    low, high = (torch.full((1, 1, 1, 1, 1), bound, dtype=x.dtype) for bound in (LOW, HIGH))  # it rounds plain numbers
    box = ZBox(low=low, high=high, stabilizer=1e-15)
    composite = SpecialFirstLayerMapComposite(
        layer_map=[(Activation, Pass()), (Convolution, z_plus), (Dense, z_plus)], first_map=[(Convolution, box)]
    )
    seed = torch.zeros(1, 10, dtype=x.dtype)
    with torch.no_grad():
        seed[0, target] = model(x)[0, target]
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, seed)[1]


@pytest.mark.parametrize("target", [0, 7])
def test_zennit_agrees_on_a_c3d(target: int) -> None:
    """Winner-takes-all pooling is plain gradient there; stabilizers are switched off as far as zennit lets them."""
    model = narrow_c3d().double().eval()
    x = between(LOW, HIGH, (1, 3, 16, 32, 32), 1)
    ours = DeepTaylor(model, LOW, HIGH, composite={nn.MaxPool3d: WinnerTakesAll()}).attribute(x, target)
    theirs = zennits(model, x.clone(), target)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert theirs.abs().max() > 0


def test_zennit_agrees_on_epsilon_gamma_box() -> None:
    """On a C3D with biases, also where scores, and what gamma's layers give, are negative."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonGammaBox

    torch.manual_seed(0)
    model = narrow_c3d().double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    x = between(LOW, HIGH, (1, 3, 16, 32, 32), 1)
    scores = model(x)[0].detach()
    targets = [int(scores.argmin()), int(scores.argmax())]
    assert scores[targets[0]] < 0 < scores[targets[1]]
    low, high = (torch.full_like(x, bound) for bound in (LOW, HIGH))
    for target, ours in zip(
        targets, DeepTaylor(model, LOW, HIGH, composite="epsilon-gamma-box").attribute_targets(x, targets), strict=True
    ):
        seed = torch.zeros_like(model(x))
        seed[0, target] = scores[target]
        with Gradient(model=model, composite=EpsilonGammaBox(low=low, high=high)) as attributor:
            theirs = attributor(x.clone(), seed)[1]
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert theirs.abs().max() > 0
