"""Models: shapes, published checkpoints onto them, models by name, and the bundled weights."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_dtd.models import BUNDLED, C3D, bundled, c3d_mini, load_checkpoint, load_model
from captum_dtd.video import Preprocessing, read_video, sample_clip

# --- architectures


def test_c3d_has_the_published_layers() -> None:
    with torch.device("meta"):
        model = C3D()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1a.weight": (64, 3, 3, 3, 3),
        "conv2a.weight": (128, 64, 3, 3, 3),
        "conv3a.weight": (256, 128, 3, 3, 3),
        "conv3b.weight": (256, 256, 3, 3, 3),
        "conv4a.weight": (512, 256, 3, 3, 3),
        "conv4b.weight": (512, 512, 3, 3, 3),
        "conv5a.weight": (512, 512, 3, 3, 3),
        "conv5b.weight": (512, 512, 3, 3, 3),
        "fc6.weight": (4096, 8192),
        "fc7.weight": (4096, 4096),
        "fc8.weight": (101, 4096),
    }


@pytest.mark.parametrize("frames", [16, 17, 32, 40])
def test_c3d_takes_clips_of_its_frames(frames: int) -> None:
    with torch.device("meta"):
        model = C3D(num_classes=7, frames=frames).eval()
        assert model(torch.empty(2, 3, frames, 112, 112)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: C3D(frames=15), "frames must be at least 16"),
        (lambda: C3D(num_classes=0), "num_classes must be at least 1"),
        (lambda: c3d_mini(num_classes=0), "num_classes must be at least 1"),
        (lambda: c3d_mini(in_channels=0), "in_channels must be at least 1"),
    ],
)
def test_impossible_architectures_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(1, 3, 2, 8, 8), (2, 3, 16, 56, 56), (1, 1, 7, 48, 60)])
def test_c3d_mini_takes_any_size(shape: tuple[int, ...]) -> None:
    model = c3d_mini(num_classes=4, in_channels=shape[1]).eval()
    assert model(torch.rand(shape)).shape == (shape[0], 4)


def test_c3d_mini_is_small_and_its_hidden_layers_see_no_negative_input() -> None:
    model = c3d_mini().eval()
    assert 300_000 < sum(value.numel() for value in model.parameters()) < 360_000
    smallest: list[float] = []
    hidden = [layer for layer in model.modules() if isinstance(layer, (nn.Conv3d, nn.Linear))][1:]
    for layer in hidden:
        layer.register_forward_pre_hook(lambda _, inputs: smallest.append(inputs[0].min().item()))
    model(torch.randn(1, 3, 4, 16, 16))
    assert len(smallest) == 5 and min(smallest) >= 0


# --- checkpoints in published layouts: a net as somebody else wrote it gives the same outputs as ours with its weights


def _conv(i: int, o: int) -> nn.Conv3d:
    return nn.Conv3d(i, o, 3, padding=1)


class SmallC3D(nn.Module):
    """C3D's names on a net of a few channels; `names` are those of a port."""

    LAYERS = ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b", "fc6", "fc7", "fc8")

    def __init__(self, names: tuple[str, ...] = LAYERS, num_classes: int = 5) -> None:
        super().__init__()
        convolutions = [_conv(3, 4), *(_conv(4, 4) for _ in range(7))]
        linear = [nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, num_classes)]
        self.order = names
        for name, layer in zip(names, [*convolutions, *linear], strict=True):
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order[:8]:
            x = F.relu(self.get_submodule(name)(x))
        x = x.mean((2, 3, 4))
        for name in self.order[8:10]:
            x = F.relu(self.get_submodule(name)(x))
        return self.get_submodule(self.order[10])(x)


JFZHANG = ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b", "fc6", "fc7", "fc8")
NUMBERED = (*(f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)), *(f"classifier.{i}" for i in (0, 3, 6)))
MMACTION = (*(f"backbone.{n}.conv" for n in SmallC3D.LAYERS[:8]), "backbone.fc6", "backbone.fc7", "cls_head.fc_cls")
OTHER_HEAD = (*SmallC3D.LAYERS[:10], "fc_ucf")
OTHER_HEAD_NUMBERED = (*NUMBERED[:10], "head.last")


def _plain(state: dict[str, Tensor]) -> Any:
    return state


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": _plain,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "DataParallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "compiled and parallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (SmallC3D.LAYERS, "as named"),
        (JFZHANG, "C3D, conv1 and conv2"),
        (NUMBERED, "C3D, features and classifier"),
        (MMACTION, "C3D, MMAction2"),
        (OTHER_HEAD, "as named"),
        (OTHER_HEAD_NUMBERED, "C3D, features and classifier"),
    ],
    ids=["own", "jfzhang", "numbered", "mmaction", "other head", "numbered, other head"],
)
def test_published_c3d_layouts_load(tmp_path: Path, names: tuple[str, ...], layout: str, wrapper: str) -> None:
    port, model = SmallC3D(names), SmallC3D()
    torch.save(WRAPPERS[wrapper](port.state_dict()), tmp_path / "port.pth")
    report = load_checkpoint(model, tmp_path / "port.pth")
    x = torch.rand(2, 3, 2, 4, 4)
    assert torch.equal(model(x), port(x))
    assert report.layout == layout
    expected = {theirs: ours for theirs, ours in zip(names, SmallC3D.LAYERS, strict=True) if theirs != ours}
    assert report.renamed == {f"{a}.{end}": f"{b}.{end}" for a, b in expected.items() for end in ("weight", "bias")}


class Block(nn.Module):
    """A basic block as the 3D-ResNet ports name it."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(o)
        self.conv2 = nn.Conv3d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(o)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv3d(i, o, 1, stride, bias=False), nn.BatchNorm3d(o))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet(nn.Module):
    """An 18-layer 3D-ResNet with the ports' names and torchvision's stem."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        widths = (64, 64, 128, 256, 512)
        for k in range(1, 5):
            first = Block(widths[k - 1], widths[k], 1 if k == 1 else 2)
            self.add_module(f"layer{k}", nn.Sequential(first, Block(widths[k], widths[k], 1)))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
        return self.fc(x.mean((2, 3, 4)))


def test_3d_resnet_ports_load_into_torchvision(tmp_path: Path) -> None:
    video_models = pytest.importorskip(
        "torchvision.models.video", reason="torchvision, whose model the port is, is not installed"
    )
    port, model = ResNet(6).eval(), video_models.r3d_18(weights=None, num_classes=6).eval()
    for module in port.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    # ports written before torch 0.4.1 have no counters
    state = {f"module.{key}": value for key, value in port.state_dict().items() if "num_batches" not in key}
    torch.save({"arch": "resnet-18", "state_dict": state}, tmp_path / "resnet.pth")
    report = load_checkpoint(model, tmp_path / "resnet.pth")
    x = torch.rand(1, 3, 4, 16, 16)
    torch.testing.assert_close(model(x), port(x))
    assert report.layout == "3D-ResNet onto torchvision's names"
    assert report.renamed["layer2.0.bn2.running_var"] == "layer2.0.conv2.1.running_var"
    assert "layer2.0.downsample.0.weight" not in report.renamed


def test_safetensors_load_into_the_models_own_precision(tmp_path: Path) -> None:
    port, model = SmallC3D(JFZHANG), SmallC3D().double()
    save_file({key: value.half() for key, value in port.state_dict().items()}, tmp_path / "port.safetensors")
    load_checkpoint(model, tmp_path / "port.safetensors")
    assert model.conv1a.weight.dtype == torch.float64
    assert torch.equal(model.conv1a.weight, port.conv1.weight.half().double())


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_wrappers_within_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    saved, model = SmallC3D(), SmallC3D()
    torch.save({f"{prefix}{key}": value for key, value in saved.state_dict().items()}, tmp_path / "net.pth")
    load_checkpoint(model, tmp_path / "net.pth")
    assert torch.equal(model.fc8.weight, saved.fc8.weight)


def test_a_part_that_is_called_module_is_no_wrapper(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(OrderedDict(module=nn.Linear(3, 4), head=nn.Linear(4, 2)))

    saved, model = net(), net()
    torch.save(saved.state_dict(), tmp_path / "net.pth")
    assert load_checkpoint(model, tmp_path / "net.pth").renamed == {}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    saved, model = SmallC3D(), SmallC3D()
    state = {key: value.to_sparse() if key == "fc8.weight" else value for key, value in saved.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    load_checkpoint(model, tmp_path / "net.pth")
    assert torch.equal(model.fc8.weight, saved.fc8.weight)


def test_safetensors_are_known_whatever_their_name(tmp_path: Path) -> None:
    saved, model = SmallC3D(), SmallC3D()
    save_file(saved.state_dict(), tmp_path / "net.pth")
    load_checkpoint(model, tmp_path / "net.pth")
    assert torch.equal(model.fc8.weight, saved.fc8.weight)


# --- what does not fit


def _refused(model: nn.Module, path: Path, *words: str) -> str:
    """The message; the model is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_one_error_names_every_key_that_is_missing_surplus_or_misshapen(tmp_path: Path) -> None:
    state = SmallC3D(JFZHANG).state_dict()
    del state["conv3a.weight"], state["fc6.bias"]
    state["extra.scale"] = torch.ones(1)
    state["conv2.weight"] = torch.ones(4, 4, 3, 3)
    torch.save(state, tmp_path / "port.pth")
    _refused(
        SmallC3D(),
        tmp_path / "port.pth",
        "missing: conv3a.weight, fc6.bias",
        "surplus: extra.scale",
        "conv2.weight is [4, 4, 3, 3], not [4, 4, 3, 3, 3]",
    )


@pytest.mark.parametrize("names", [SmallC3D.LAYERS, OTHER_HEAD])
def test_a_head_of_other_classes_says_num_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    torch.save(SmallC3D(names, num_classes=9).state_dict(), tmp_path / "port.pth")
    _refused(SmallC3D(), tmp_path / "port.pth", f"{names[-1]}.weight is [9, 6], not [5, 6]", "num_classes=9")


def test_a_layer_of_another_name_that_is_not_the_head_is_an_error(tmp_path: Path) -> None:
    names = (*SmallC3D.LAYERS[:9], "hidden", "fc8")
    torch.save(SmallC3D(names).state_dict(), tmp_path / "port.pth")
    _refused(SmallC3D(), tmp_path / "port.pth", "missing: fc7.weight, fc7.bias", "surplus: hidden.weight, hidden.bias")


def test_two_keys_for_one_layer_are_an_error(tmp_path: Path) -> None:
    state = SmallC3D(JFZHANG).state_dict()
    torch.save({**state, "conv1a.weight": state["conv1.weight"]}, tmp_path / "port.pth")
    _refused(SmallC3D(), tmp_path / "port.pth", "the same weights twice: conv1.weight and conv1a.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {name: weight.double() for name, weight in nn.Linear(3, 2).state_dict().items()}
    state["bias"][1] = value
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth has NaN or infinite values in bias: give"):
        load_checkpoint(model, tmp_path / "net.pth")
    assert torch.equal(model.weight, before)


def test_infinities_that_are_the_models_own_are_loaded(tmp_path: Path) -> None:
    """As in masks of attention, which are buffers."""

    def masked() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        return model

    saved, model = masked(), masked()
    torch.save(saved.state_dict(), tmp_path / "net.pth")
    load_checkpoint(model, tmp_path / "net.pth")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.state_dict().items())


def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    torch.save(c3d_mini().state_dict(), tmp_path / "mini.pth")
    _refused(SmallC3D(), tmp_path / "mini.pth", "missing: conv1a.weight", "surplus: block1.0.weight")


def test_a_pickled_whole_model_is_refused_without_running_it(tmp_path: Path) -> None:
    torch.save(SmallC3D(), tmp_path / "model.pth")
    message = _refused(SmallC3D(), tmp_path / "model.pth", "model.state_dict()")
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["corrupt.pth", "corrupt.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text", b"PK\x03\x04" + bytes(60), b"a\nb\n", b"0 jack\n1 walk\n"]
)
def test_corrupt_files_are_errors(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(SmallC3D(), tmp_path / name)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1, 2], {"epoch": 3}, torch.ones(2)])
def test_files_without_a_state_dict_are_errors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    _refused(SmallC3D(), tmp_path / "other.pth", "state_dict")


def test_a_checkpoint_with_objects_besides_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": SmallC3D().state_dict(), "opt": argparse.Namespace(lr=1)}, tmp_path / "port.pth")
    _refused(SmallC3D(), tmp_path / "port.pth", "more than tensors (argparse.Namespace:", "settings beside the weights")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_checkpoint(SmallC3D(), tmp_path / "nowhere.pth")


# --- models by name


def test_c3d_mini_is_trained_by_default() -> None:
    loaded, (model, info) = load_model("c3d_mini"), bundled("ucf10")
    assert loaded.weights == "ucf10" and not loaded.model.training
    assert loaded.classes == tuple(info["classes"]) and len(loaded.classes) == 10
    x = torch.rand(1, 3, 15, 56, 56)
    assert torch.equal(loaded.model(x), model(x))


def test_c3d_mini_loads_what_the_training_scripts_write(tmp_path: Path) -> None:
    model, _ = bundled("weizmann")
    with resources.as_file(resources.files("captum_dtd.models") / "weights" / "weizmann.safetensors") as stored:
        copy = tmp_path / "mine.safetensors"
        copy.write_bytes(stored.read_bytes())
    loaded = load_model("c3d_mini", weights=str(copy))
    x = torch.rand(1, 1, 16, 48, 60)
    assert torch.equal(loaded.model(x), model(x))
    assert loaded.classes is not None and loaded.classes[1] == "jack" and loaded.weights == str(copy)
    assert loaded.preprocessing is not None and loaded.preprocessing["channels"] == 1


@pytest.mark.parametrize("metadata", [{"classes": "a,b"}, {"classes": '["a"]'}, {"format": "pt"}])
def test_words_of_other_programs_in_a_checkpoint_are_not_ours(tmp_path: Path, metadata: dict[str, str]) -> None:
    source = c3d_mini(num_classes=4).eval()
    save_file(source.state_dict(), tmp_path / "other.safetensors", metadata)
    loaded = load_model("c3d_mini", weights=str(tmp_path / "other.safetensors"), num_classes=4)
    x = torch.rand(1, 3, 4, 16, 16)
    assert torch.equal(loaded.model(x), source(x)) and loaded.classes is None


@pytest.mark.parametrize("damage", [{"mean": "[0.5"}, {"num_classes": '"ten"'}, {"classes": "3"}])
def test_a_damaged_description_of_a_checkpoint_is_named(tmp_path: Path, damage: dict[str, str]) -> None:
    with resources.as_file(resources.files("captum_dtd.models") / "weights" / "weizmann.safetensors") as stored:
        with safe_open(stored, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(stored), tmp_path / "mine.safetensors", {**metadata, **damage})
    with pytest.raises(ValueError, match=r"mine\.safetensors says of itself what cannot be read"):
        load_model("c3d_mini", weights=str(tmp_path / "mine.safetensors"))


def test_c3d_mini_with_a_bare_state_dict(tmp_path: Path) -> None:
    source = c3d_mini(num_classes=4).eval()
    torch.save(source.state_dict(), tmp_path / "four.pth")
    loaded = load_model("c3d_mini", weights=str(tmp_path / "four.pth"), num_classes=4)
    x = torch.rand(1, 3, 4, 16, 16)
    assert torch.equal(loaded.model(x), source(x))
    assert loaded.classes is None and loaded.preprocessing is None


def test_c3d_without_weights_warns_and_says_how_to_prepare() -> None:
    with pytest.warns(UserWarning, match="random weights"), torch.device("meta"):
        loaded = load_model("c3d", num_classes=3)
    assert loaded.weights == "random" and loaded.model.fc8.out_features == 3
    prepare = Preprocessing.from_dict(loaded.preprocessing or {})
    low, high = prepare.bounds
    assert low.tolist() == [-90, -98, -102] and high.tolist() == [165, 157, 153]
    x = prepare(torch.full((16, 240, 320, 3), 255, dtype=torch.uint8))
    assert x.shape == (3, 16, 112, 112) and torch.equal(x[:, 0, 0, 0], high)


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d"])
def test_torchvision_models_come_with_their_own_transform_and_classes(name: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision, whose models are loaded, is not installed")
    with torch.device("meta"):
        with pytest.warns(UserWarning, match="random weights"):
            loaded = load_model(name)
        assert loaded.preprocessing is not None
        outputs = loaded.model(torch.empty(1, 3, loaded.preprocessing["frames"], *loaded.preprocessing["size"]))
    assert outputs.shape == (1, 400) and loaded.classes is not None
    assert len(loaded.classes) == 400 and "bowling" in loaded.classes
    frames = torch.randint(256, (16, 120, 160, 3), dtype=torch.uint8)
    expected = loaded.preprocessing["transform"](frames.permute(0, 3, 1, 2))
    actual = Preprocessing.from_dict(loaded.preprocessing)(frames)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_head_of_ones_own_size_has_no_published_names() -> None:
    pytest.importorskip("torchvision", reason="torchvision, whose models are loaded, is not installed")
    with torch.device("meta"):
        assert load_model("r3d_18", num_classes=101).classes is None
        assert len(load_model("r3d_18", num_classes=400).classes or ()) == 400


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=2):\n    return nn.Sequential(nn.Flatten(), nn.Linear(8, num_classes))\n"
        "def fixed():\n    return nn.Linear(8, 3)\n"
        "ready = nn.Linear(8, 4)\n"
        "def number():\n    return 3\n"
        "def broken():\n    return nn.NoSuchLayer()\n"
    )
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    searched = list(sys.path)
    loaded = load_model("own_models:net", num_classes=6)
    assert loaded.model(torch.ones(1, 8)).shape == (1, 6) and not loaded.model.training
    assert load_model("own_models:net").model(torch.ones(1, 8)).shape == (1, 2)
    assert loaded.classes is None and loaded.preprocessing is None
    assert load_model("own_models:fixed", num_classes=3).model(torch.ones(1, 8)).shape == (1, 3)
    assert load_model("own_models:ready").model(torch.ones(1, 8)).shape == (1, 4)
    with pytest.raises(TypeError, match=r"own_models:number must return an nn\.Module, not int"):
        load_model("own_models:number")
    with pytest.raises(ValueError, match="module 'own_models' has no function 'nothing'"):
        load_model("own_models:nothing")
    with pytest.raises(ValueError, match="no module 'absent_models'"):
        load_model("absent_models:net")
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        load_model("own_models:broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_model("needs_more:net")
    assert sys.path == searched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "c4d"}, "no model 'c4d': give c3d_mini, c3d, r3d_18"),
        ({"spec": "c3d_mini", "num_classes": 7}, "num_classes must be 10 for the weights 'ucf10', not 7"),
        ({"spec": "c3d_mini", "num_classes": 0}, "num_classes must be at least 1, not 0"),
    ],
)
def test_what_load_model_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(**arguments)


def test_an_unknown_bundled_checkpoint_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="ucf10, weizmann"):
        bundled("ucf101")


# --- the bundled weights


def test_bundled_weights_are_small_and_described() -> None:
    folder = resources.files("captum_dtd.models") / "weights"
    sizes = [len((folder / f"{name}.safetensors").read_bytes()) for name in BUNDLED]
    assert sum(sizes) < 2_000_000
    for name in BUNDLED:
        model, info = bundled(name)
        assert not model.training and all(value.dtype == torch.float32 for value in model.parameters())
        assert len(info["classes"]) == info["num_classes"] == model.num_classes
        assert len(info["mean"]) == len(info["std"]) == info["in_channels"] == info["channels"] == model.in_channels
        assert info["model"] == "c3d_mini" and info["description"]
        clip = torch.zeros(info["frames"], 144, 180, 3, dtype=torch.uint8)
        x = Preprocessing.from_dict(load_model("c3d_mini", weights=name).preprocessing or {})(clip)
        assert x.shape == (info["in_channels"], info["frames"], *info["size"])
        assert model(x[None]).shape == (1, 10)


def test_the_card_states_what_the_validation_videos_give(data: Path) -> None:
    """One view of every validation video through the package's own decoding and preprocessing, moving and frozen."""
    results = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "train_ucf10.json").read_text())
    stated = results["seeds"]["0"]["accuracy"]["one view"]
    card = (resources.files("captum_dtd.models") / "weights" / "MODEL_CARD.md").read_text()
    assert f"{100 * stated:.1f} %" in card
    loaded = load_model("c3d_mini")
    prepare = Preprocessing.from_dict(loaded.preprocessing or {})
    lines = [line.split() for line in (data / "ucf10_64px" / "vallist.txt").read_text().splitlines()]
    moving = still = 0
    for path, label in lines:
        x = prepare(sample_clip(read_video(data / "ucf10_64px" / path), prepare.frames, prepare.stride).frames)
        frozen = x[:, prepare.frames // 2, None].expand_as(x)
        with torch.no_grad():
            first, second = loaded.model(torch.stack([x, frozen])).argmax(1).tolist()
        moving += first == int(label) - 1
        still += second == int(label) - 1
    # two videos may fall on the other side with another build of the decoder or of torch
    assert abs(moving / len(lines) - stated) < 2.5 / len(lines)
    assert still < 0.75 * moving
