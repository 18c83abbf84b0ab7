"""Files of the papers, written here with their key names and shapes, give the features of a plain torchvision model."""

from __future__ import annotations

import argparse
import collections
import functools
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from raycon.core.config import ConfigError, ModelConfig
from raycon.nn import networks
from raycon.nn.published import FileError, model_of, read
from raycon.training.interop import load_encoder


@functools.cache
def plain(name: str, small: bool = False) -> nn.Module:
    """A torchvision model in evaluation mode with BatchNorm statistics of its own, fc removed."""
    torch.manual_seed(0)
    net: Any = torchvision.models.get_model(name)
    if small:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    net.fc = nn.Identity()
    return net.eval()  # type: ignore[no-any-return]


def resnet50() -> nn.Module:
    return plain("resnet50")


def shaped(*shape: int) -> Tensor:
    """A tensor of a shape that takes no room in a file: for what is not looked at."""
    return torch.zeros(1).expand(*shape)


def linear(name: str, out: int, inside: int, bias: bool = True) -> dict[str, Tensor]:
    return {f"{name}.weight": shaped(out, inside)} | ({f"{name}.bias": shaped(out)} if bias else {})


def norm(name: str, width: int, affine: bool = True) -> dict[str, Tensor]:
    scale = {f"{name}.weight": shaped(width), f"{name}.bias": shaped(width)} if affine else {}
    counter = torch.zeros((), dtype=torch.int64)
    statistics = {f"{name}.running_mean": shaped(width), f"{name}.running_var": shaped(width)}
    return scale | statistics | {f"{name}.num_batches_tracked": counter}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def queue(dim: int, size: int) -> dict[str, Tensor]:
    return {"queue": shaped(dim, size), "queue_ptr": torch.zeros(1, dtype=torch.int64)}


def pcl(encoder: dict[str, Tensor], version: int, features: int = 2048) -> dict[str, Tensor]:
    """PCL and MoCo: a network with its projection as ``fc``, twice."""
    if version == 1:
        fc = linear("fc", 128, features)
    else:
        fc = linear("fc.0", features, features) | linear("fc.2", 128, features)
    both = prefixed("encoder_q.", encoder | fc) | prefixed("encoder_k.", encoder | fc)
    return prefixed("module.", both | queue(128, 16384))


def wcl(encoder: dict[str, Tensor], hidden: int, dim: int) -> dict[str, Tensor]:
    heads: dict[str, Tensor] = {}
    for head in ("head1", "head2"):
        heads |= linear(f"{head}.linear1", hidden, 2048) | norm(f"{head}.bn1", hidden)
        heads |= linear(f"{head}.linear2", hidden, hidden) | norm(f"{head}.bn2", hidden)
        heads |= linear(f"{head}.linear3", dim, hidden)
    return prefixed("module.", prefixed("net.", encoder) | heads)


def sce(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    projector = linear("layers.0", 2048, 2048, False) | norm("layers.1", 2048)
    projector |= linear("layers.3", 2048, 2048, False) | norm("layers.4", 2048)
    projector |= linear("layers.6", 256, 2048, False) | norm("layers.7", 256, affine=False)
    predictor = linear("layers.0", 4096, 256, False) | norm("layers.1", 4096) | linear("layers.3", 256, 4096, False)
    state = prefixed("trunk.", encoder) | prefixed("projector.", projector) | prefixed("predictor.", predictor)
    state |= prefixed("momentum_trunk.", encoder) | prefixed("momentum_projector.", projector)
    return state | queue(256, 65536)


def maskcon(encoder: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    one = prefixed("net.", encoder) | linear("projector.0", 512, 512) | linear("projector.2", 256, 512)
    one |= linear("classifer", classes, 512)
    both = prefixed("encoder_q.", one) | prefixed("encoder_k.", one) | queue(256, 8192)
    return both | {"coarse_labels": torch.zeros(8192, dtype=torch.int64)}


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffers = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr", "coarse_labels")
    return {k: v for k, v in state.items() if not k.endswith(buffers)}


def same_features(path: Path, expected: nn.Module, size: int, **options: str) -> Any:
    encoder, about = load_encoder(path, **options)
    images = torch.randn(2, about.channels, size, size)
    with torch.no_grad():
        mine, theirs = encoder(images), expected(images)
    assert not encoder.training
    assert mine.shape == (2, about.features)
    scale = theirs.std()
    assert scale > 0
    torch.testing.assert_close(mine / scale, theirs / scale, rtol=1e-5, atol=1e-5)
    return about


@pytest.mark.parametrize(
    ("version", "tensors", "slots"), [pytest.param(1, 642, 322, marks=pytest.mark.slow), (2, 646, 326)]
)
def test_pcl_and_moco(tmp_path: Path, version: int, tensors: int, slots: int) -> None:
    state = pcl(resnet50().state_dict(), version)
    assert len(state) == tensors
    assert len(parameters(state)) == slots
    assert sum(v.numel() for k, v in parameters(state).items() if "encoder_q" in k) == (23770304, 27966656)[version - 1]
    optimizer = {"state": {}, "param_groups": [{"lr": 0.03, "params": list(range(slots))}]}
    file = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}, file)
    about = same_features(file, resnet50(), 64)
    assert about.format == "moco"
    assert about.model == ModelConfig(encoder="resnet50", width=64, stem="imagenet")
    assert about.facts == {"epochs": 200}


def test_files_of_old_pytorch(tmp_path: Path) -> None:
    """Before 1.6 files were no zip archives, and very old ones have no BatchNorm counters."""
    net = plain("resnet18")
    state = {k: v for k, v in pcl(net.state_dict(), 2, 512).items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert same_features(tmp_path / "old.pth.tar", net, 64).model.encoder == "resnet18"


@pytest.mark.parametrize(("hidden", "dim"), [(4096, 256), pytest.param(2048, 128, marks=pytest.mark.slow)])
def test_wcl_and_clinfonce_with_two_heads(tmp_path: Path, hidden: int, dim: int) -> None:
    state = wcl(resnet50().state_dict(), hidden, dim)
    assert len(parameters(state)) == 179
    if hidden == 4096:
        assert sum(v.numel() for v in parameters(state).values()) == 75_986_496
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 100}, tmp_path / "wcl-100.pth")
    about = same_features(tmp_path / "wcl-100.pth", resnet50(), 64)
    assert (about.format, about.facts) == ("wcl", {"epochs": 100})


@pytest.mark.parametrize(
    ("prefix", "downsample"), [("encoder.", "downsample"), ("encoder.module.", "shortcut"), ("module.encoder.", "x")]
)
def test_clinfonce_with_one_head(tmp_path: Path, prefix: str, downsample: str) -> None:
    """Small-image ResNet-18; the wrapper is around the encoder or around all; options are a Namespace."""
    net = plain("resnet18", small=True)
    renamed = {
        k.replace("downsample", downsample if downsample != "x" else "downsample"): v
        for k, v in net.state_dict().items()
    }
    start = "module." if prefix.startswith("module.") else ""
    heads = prefixed(start, linear("head.0", 512, 512) | linear("head.2", 128, 512))
    content = {"opt": argparse.Namespace(temp=0.1), "model": prefixed(prefix, renamed) | heads, "epoch": 300}
    torch.save(content, tmp_path / "last.pth")
    about = same_features(tmp_path / "last.pth", net, 32)
    assert (about.format, about.model.stem) == ("clinfonce", "small")


def test_maskcon(tmp_path: Path) -> None:
    net = plain("resnet18", small=True)
    state = maskcon(net.state_dict(), classes=20)
    query = {k: v for k, v in parameters(state).items() if k.startswith("encoder_q.")}
    assert sum(v.numel() for v in query.values()) == 11_573_076
    torch.save(state, tmp_path / "maskcon.pth")
    about = same_features(tmp_path / "maskcon.pth", net, 32)
    assert (about.format, about.model.encoder, about.model.stem) == ("maskcon", "resnet18", "small")


def test_sce_of_lightning(tmp_path: Path) -> None:
    state = sce(resnet50().state_dict())
    assert len(state) == 677
    content = {"epoch": 99, "global_step": 31200, "pytorch-lightning_version": "1.6.5", "state_dict": state}
    content |= {"hyper_parameters": collections.defaultdict(dict, {"lr": {"initial": 0.3}}), "callbacks": {}}
    torch.save(content, tmp_path / "epoch=99.ckpt")
    assert same_features(tmp_path / "epoch=99.ckpt", resnet50(), 64).format == "sce"
    torch.save(resnet50().state_dict(), tmp_path / "trunk.ckpt")  # what its newer library releases
    assert same_features(tmp_path / "trunk.ckpt", resnet50(), 64).format == "plain"


@pytest.mark.parametrize("name", ["resnet34", pytest.param("resnext50_32x4d", marks=pytest.mark.slow)])
def test_other_networks_and_their_classifiers(tmp_path: Path, name: str) -> None:
    net = plain(name)
    state = {k: v.contiguous() for k, v in (net.state_dict() | linear("fc", 1000, 2048)).items()}
    save_file(state, tmp_path / "weights.safetensors")
    assert same_features(tmp_path / "weights.safetensors", net, 64).model.encoder == name


def test_width_and_channels_come_from_the_shapes(tmp_path: Path) -> None:
    config = ModelConfig(encoder="resnet10", width=8, stem="small-stride2")
    net = networks.build_encoder(config, channels=1).eval()
    torch.save(net.state_dict(), tmp_path / "tiny.pth")
    about = same_features(tmp_path / "tiny.pth", net, 16, stem="small-stride2")
    assert (about.model, about.channels, about.features) == (config, 1, 64)
    with pytest.raises(FileError, match="stem = 'imagenet', but the first convolution is 3x3"):
        load_encoder(tmp_path / "tiny.pth", stem="imagenet")


def test_a_network_that_is_no_resnet_needs_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = torchvision.models.get_model("shufflenet_v2_x0_5")
    torch.save(net.state_dict(), tmp_path / "shuffle.pth")
    net.fc = nn.Identity()
    with pytest.raises(FileError, match=r"no ResNet found in its \d+ tensors .* give its name"):
        load_encoder(tmp_path / "shuffle.pth")
    about = same_features(tmp_path / "shuffle.pth", net.eval(), 64, encoder="shufflenet_v2_x0_5")
    assert about.features == 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer2.1.bn2.running_mean"), "1 tensors missing, the first is layer2.1.bn2.running_mean"),
        (
            lambda s: s.update({"layer1.0.se.weight": torch.zeros(1)}),
            "1 tensors unknown, the first is layer1.0.se.weight",
        ),
        (
            lambda s: s.update({"layer3.0.conv2.weight": torch.zeros(3)}),
            "of another shape, the first is layer3.0.conv2",
        ),
        (lambda s: s.pop("layer1.1.conv1.weight"), r"basic blocks \(1, 2, 2, 2\)"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 5, 5)}), r"\(64, 3, 5, 5\); 7x7 and 3x3"),
        (lambda s: s.clear(), "no tensors in it"),
    ],
)
def test_every_tensor_must_fit(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    state = dict(plain("resnet18").state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(FileError, match=rf"w\.pth: .*{words}"):
        load_encoder(tmp_path / "w.pth")


# --- files that want to run code --------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_file_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = plain("resnet18").state_dict()
    for name, kind in (("zip.pth", True), ("old.pth", False)):
        torch.save({"state_dict": state, "x": Harmful()}, name, _use_new_zipfile_serialization=kind)
        with pytest.raises(FileError, match=rf"{name} needs the class or function (posix|nt|os)\.system: .* refused"):
            load_encoder(name)
    torch.save({"state_dict": state, "x": collections.UserDict()}, "class.pth")
    with pytest.raises(FileError, match=r"class\.pth needs the class or function collections\.UserDict"):
        load_encoder("class.pth")
    assert not (tmp_path / "harmed").exists()


def test_omegaconf_containers_are_let_in_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The containers as that library pickles them; it need not be installed, and none of its code is run."""

    def module(name: str, *classes: str) -> list[type]:
        made = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        found = [type(c, (), {"__module__": name}) for c in classes]
        for one in found:
            setattr(made, one.__name__, one)
        return found

    module("omegaconf")
    base = module("omegaconf.base", "ContainerMetadata", "Metadata")
    (dictionary,), (node,) = module("omegaconf.dictconfig", "DictConfig"), module("omegaconf.nodes", "AnyNode")
    config, value, metadata = dictionary(), node(), base[0]()
    metadata.__dict__ |= {"ref_type": Any, "object_type": dict, "resolver_cache": collections.defaultdict(dict)}
    value.__dict__ |= {"_val": 0.3, "_parent": config}
    config.__dict__ |= {"_content": {"lr": value}, "_metadata": metadata}
    net = plain("resnet18")
    torch.save({"state_dict": prefixed("trunk.", net.state_dict()), "hyper_parameters": config}, tmp_path / "a.ckpt")
    for name in [n for n in sys.modules if n.startswith("omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    content = read(tmp_path / "a.ckpt")
    assert "DictConfig" not in type(content["hyper_parameters"]).__name__
    assert same_features(tmp_path / "a.ckpt", net, 64).format == "sce"


def test_what_is_no_weight_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("absent.pth", "no such file"),
        ("text.pth", "damaged, or no weight file"),
        ("text.safetensors", "damaged, or no weight file"),
        ("list.pth", "holds a list"),
        ("empty.pth", "no tensors in it"),
        ("folder", "neither a run, nor a checkpoint"),
    ):
        with pytest.raises(FileError, match=words):
            load_encoder(tmp_path / name)


# --- model.weights ----------------------------------------------------------------------------------------------


def test_a_run_starts_from_such_a_file(tmp_path: Path) -> None:
    net = plain("resnet18")
    torch.save({"state_dict": pcl(net.state_dict(), 2, 512)}, tmp_path / "pcl.pth.tar")
    config = ModelConfig(encoder="resnet18", weights=str(tmp_path / "pcl.pth.tar"))
    own = networks.build_encoder(config, channels=3).state_dict()
    assert all(torch.equal(own[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ConfigError, match=r"model\.weights = .* of another shape"):
        networks.build_encoder(replace(config, encoder="resnet50"), channels=3)
    other = torchvision.models.get_model("shufflenet_v2_x0_5")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    config = ModelConfig(encoder="shufflenet_v2_x0_5", weights=str(tmp_path / "other.pth"))
    own = networks.build_encoder(config, channels=3).state_dict()
    assert all(torch.equal(own[f"net.{k}"], v) for k, v in other.state_dict().items() if not k.startswith("fc."))
    with pytest.raises(ConfigError, match=r"model\.weights: .*gone\.pth: no such file"):
        networks.build_encoder(replace(config, weights=str(tmp_path / "gone.pth")), channels=3)


@pytest.mark.slow
def test_every_resnet_of_torchvision_is_recognised_by_its_shapes() -> None:
    names = [n for n in torchvision.models.list_models(module=torchvision.models)
             if n.startswith(("resnet", "wide_resnet", "resnext"))]  # fmt: skip
    assert len(names) == 10
    for name in names:
        with torch.device("meta"):
            state = torchvision.models.get_model(name).state_dict()
        assert model_of(state, "here") == (ModelConfig(encoder=name), 3)
