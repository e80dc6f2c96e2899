"""Models to explain: C3D, a small C3D with trained weights, torchvision's video models, published checkpoints."""

from __future__ import annotations

from captum_dtd.models.c3d import C3D
from captum_dtd.models.c3d_mini import C3DMini, c3d_mini
from captum_dtd.models.checkpoints import CheckpointReport, load_checkpoint
from captum_dtd.models.loading import BUNDLED, LoadedModel, bundled, load_model

__all__ = [
    "BUNDLED",
    "C3D",
    "C3DMini",
    "CheckpointReport",
    "LoadedModel",
    "bundled",
    "c3d_mini",
    "load_checkpoint",
    "load_model",
]
