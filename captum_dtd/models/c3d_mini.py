"""A small C3D: four convolutions, two max pools, two fully connected layers; trained weights come with the package."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["C3DMini", "c3d_mini"]


class C3DMini(nn.Module):
    """Four blocks of Conv3d(3x3x3), BatchNorm3d and ReLU, two max pools, a mean over all places, and two linear layers.

    About 0.34 million parameters. Every hidden layer sees only non-negative values, as the z+ rule assumes. Only the
    pools make it smaller, the first by 4 in height and width, the second by 2 in time too: a 3x3x3 convolution with
    stride 2 reads every other row and column twice, which shows as a grid in any relevance.

    Args:
        num_classes: number of outputs.
        in_channels: 3 for RGB, 1 for grey or silhouettes.

    Input (N, in_channels, T, H, W) with T >= 2 and H, W >= 8; output: logits (N, num_classes).

    Raises:
        ValueError: if there are no classes or channels.

    Example:
        >>> import torch
        >>> C3DMini(num_classes=10).eval()(torch.rand(2, 3, 16, 56, 56)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.block1 = _block(in_channels, 16)
        self.pool1 = nn.MaxPool3d((1, 4, 4))
        self.block2 = _block(16, 48)
        self.pool2 = nn.MaxPool3d(2)
        self.block3 = _block(48, 80)
        self.block4 = _block(80, 96)
        self.mean = nn.AdaptiveAvgPool3d(1)
        self.fc1 = nn.Linear(96, 96)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.block1(x))
        x = self.pool2(self.block2(x))
        x = self.block4(self.block3(x))
        x = self.mean(x).flatten(1)
        logits: Tensor = self.fc2(self.dropout(self.relu(self.fc1(x))))
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(),
    )


def c3d_mini(num_classes: int = 10, in_channels: int = 3) -> C3DMini:
    """A :class:`C3DMini` with random weights; :func:`captum_dtd.models.bundled` gives a trained one.

    Raises:
        ValueError: as ``C3DMini``.

    Example:
        >>> c3d_mini(num_classes=5).fc2.out_features
        5
    """
    return C3DMini(num_classes, in_channels)
