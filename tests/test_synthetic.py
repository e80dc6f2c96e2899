"""The procedural figure: what the clip is, and that the bundled silhouette model knows what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from captum_dtd.models import load_model
from captum_dtd.video import Preprocessing
from captum_dtd.video.synthetic import ACTIONS, moving_figure


def test_a_white_figure_on_black() -> None:
    clip = moving_figure(frames=5, size=(72, 90))
    assert clip.shape == (5, 72, 90, 3) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert torch.equal(clip[..., 0], clip[..., 1]) and torch.equal(clip[..., 0], clip[..., 2])
    white = (clip == 255).float().mean()
    assert 0.02 < white < 0.2 and (clip == 0).float().mean() > 0.7
    # soft edges
    assert ((clip > 0) & (clip < 255)).any()


def test_always_the_same_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = moving_figure("walk", frames=3)
    torch.manual_seed(2)
    assert torch.equal(first, moving_figure("walk", frames=3))


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_moves_and_stays_in_the_frame(action: str) -> None:
    clip = moving_figure(action, frames=31, size=(72, 90))[..., 0].float()
    assert (clip[1:] - clip[:-1]).abs().amax((1, 2)).min() > 0
    # nothing touches the upper and lower edges; runners may leave sideways
    assert clip[:, 0].max() == 0 and clip[:, -1].max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "swim"}, "action must be one of bend, jack"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"size": (8, 180)}, "at least 16 pixels"),
    ],
)
def test_impossible_clips_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moving_figure(**arguments)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_bundled_model_recognises_the_action(action: str) -> None:
    loaded = load_model("c3d_mini", weights="weizmann")
    assert loaded.classes is not None and loaded.preprocessing is not None
    prepare = Preprocessing.from_dict(loaded.preprocessing)
    frames = moving_figure(action, frames=(prepare.frames - 1) * prepare.stride + 1)[:: prepare.stride]
    with torch.no_grad():
        probability = loaded.model(prepare(frames)[None]).softmax(1)[0]
    best, second = probability.topk(2).values.tolist()
    assert loaded.classes[int(probability.argmax())] == action
    assert best > 0.7 and best > 5 * second


def test_the_default_action_is_recognised_by_its_motion() -> None:
    """Not from any single pose: the clip frozen at any of its frames looks like something else."""
    loaded = load_model("c3d_mini", weights="weizmann")
    assert loaded.classes is not None and loaded.preprocessing is not None
    prepare = Preprocessing.from_dict(loaded.preprocessing)
    x = prepare(moving_figure(frames=31)[::2])
    frozen = x.transpose(0, 1)[:, :, None].expand(-1, -1, x.shape[1], -1, -1)
    with torch.no_grad():
        moving = loaded.model(x[None]).softmax(1)[0, loaded.classes.index("jack")]
        still = loaded.model(frozen).softmax(1)[:, loaded.classes.index("jack")]
    assert moving > 0.9 and still.max() < 0.5
