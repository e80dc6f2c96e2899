"""C3D as published: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks (arXiv 1412.0767)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["C3D"]


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, five max pools and three linear layers, with the published layers' names.

    The last pool is padded by (0, 1, 1), as in the PyTorch ports of the Caffe model, so that 112 pixels leave 4x4.

    Args:
        num_classes: number of outputs: 101 for UCF-101, 487 for Sports-1M.
        frames: length T of a clip, at least 16; fc6 has 8192 inputs for each 16 frames.

    Input (N, 3, frames, 112, 112): colours from 0 to 255 minus the training set's mean, (90, 98, 102) in the ports. They
    are RGB in the scripts of the method's authors; weights of ports that read frames with OpenCV want BGR (``--order BGR``,
    :class:`captum_dtd.video.Preprocessing`).
    Output: logits (N, num_classes).

    Raises:
        ValueError: if there are no classes, or fewer than 16 frames.

    Example:
        >>> import torch
        >>> with torch.device("meta"):  # 300 MB of weights, left out
        ...     model, clip = C3D(num_classes=101).eval(), torch.empty(1, 3, 16, 112, 112)
        >>> model(clip).shape
        torch.Size([1, 101])
    """

    def __init__(self, num_classes: int = 101, frames: int = 16) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if frames < 16:
            raise ValueError(f"frames must be at least 16, which the pools reduce to 1, not {frames}")
        super().__init__()
        self.frames = frames
        self.conv1a = nn.Conv3d(3, 64, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2a = nn.Conv3d(64, 128, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(128, 256, 3, padding=1)
        self.conv3b = nn.Conv3d(256, 256, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(256, 512, 3, padding=1)
        self.conv4b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool4 = nn.MaxPool3d(2)
        self.conv5a = nn.Conv3d(512, 512, 3, padding=1)
        self.conv5b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc6 = nn.Linear(512 * (frames // 16) * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        relu = self.relu
        x = self.pool1(relu(self.conv1a(x)))
        x = self.pool2(relu(self.conv2a(x)))
        x = self.pool3(relu(self.conv3b(relu(self.conv3a(x)))))
        x = self.pool4(relu(self.conv4b(relu(self.conv4a(x)))))
        x = self.pool5(relu(self.conv5b(relu(self.conv5a(x)))))
        x = torch.flatten(x, 1)
        x = self.dropout(relu(self.fc6(x)))
        x = self.dropout(relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits
