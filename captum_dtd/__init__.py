"""Deep Taylor decomposition of 3D-CNN video classifiers: what is relevant for how it looks, and what for how it moves.

The entry points are `DeepTaylor` and `DiscriminativeDeepTaylor`, Captum attribution methods for a user's own model.
"""

from captum_dtd.attribution import DeepTaylor
from captum_dtd.bounds import pixel_bounds
from captum_dtd.composites import Composite
from captum_dtd.discriminate import (
    DiscriminativeDeepTaylor,
    DiscriminativeRelevance,
    SpatioTemporalRelevance,
)
from captum_dtd.frame_cache import FrameCache
from captum_dtd.graph import UnsupportedOperationError
from captum_dtd.selective import SelectiveRelevance
from captum_dtd.version import __version__

__all__ = [
    "Composite",
    "DeepTaylor",
    "DiscriminativeDeepTaylor",
    "DiscriminativeRelevance",
    "FrameCache",
    "SelectiveRelevance",
    "SpatioTemporalRelevance",
    "UnsupportedOperationError",
    "__version__",
    "pixel_bounds",
]
