"""Encoders, heads, the EMA twin and the queue.

Legend: F encoder feature width, D embedding width, K queue entries, B rows of a batch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from raycon.core.config import ConfigError, ModelConfig

_RESNETS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "resnet10": ("basic", (1, 1, 1, 1)),
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """torchvision's ResNet without ``fc``, of any width, with a choice of stems; state-dict keys are torchvision's.

    (B, C, H, W) -> (B, F), globally averaged features.
    """

    def __init__(self, name: str, width: int, stem: str, channels: int, zero_init_residual: bool) -> None:
        from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

        super().__init__()
        kind, depths = _RESNETS[name]
        block = BasicBlock if kind == "basic" else Bottleneck
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(
                channels, width, 3, stride=2 if stem == "small-stride2" else 1, padding=1, bias=False
            )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        inside = width
        for stage, depth in enumerate(depths):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks: list[nn.Module] = []
            for i in range(depth):
                step = stride if i == 0 else 1
                downsample = None
                if step != 1 or inside != planes * block.expansion:
                    out = planes * block.expansion
                    downsample = nn.Sequential(conv1x1(inside, out, step), nn.BatchNorm2d(out))
                blocks.append(block(inside, planes, step, downsample))
                inside = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.features = inside
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, (BasicBlock, Bottleneck)):
                    last = m.bn2 if isinstance(m, BasicBlock) else m.bn3
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return torch.flatten(self.avgpool(x), 1)


def build_encoder(config: ModelConfig, channels: int) -> nn.Module:
    """The encoder of ``model.*``: (B, C, H, W) -> (B, F); its attribute ``features`` is F.

    Raises ConfigError for an unknown name, or a width or stem that the network does not have.
    """
    name = config.encoder
    if name in _RESNETS:
        encoder: nn.Module = ResNet(name, config.width, config.stem, channels, config.zero_init_residual)
    else:
        problems = []
        if config.width != 64:
            problems.append(
                f"model.width = {config.width}: only {', '.join(_RESNETS)} come in other widths; leave it at 64"
            )
        if config.stem != "imagenet":
            problems.append(
                f"model.stem = {config.stem!r}: only {', '.join(_RESNETS)} have other stems; leave it at imagenet"
            )
        if problems:
            raise ConfigError(problems)
        encoder = _timm(name[5:], channels) if name.startswith("timm:") else _torchvision(name, channels)
    if config.weights:
        load_weights(encoder, config.weights)
    return encoder


def _torchvision(name: str, channels: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        near = ", ".join(_RESNETS)
        raise ConfigError([f"model.encoder = {name!r}: not one of {near}, a torchvision classifier or timm:NAME"])
    net = cast(nn.Module, models.get_model(name, weights=None))
    for place in ("fc", "classifier", "head", "heads"):
        old = getattr(net, place, None)
        if isinstance(old, nn.Module):
            linear = next(m for m in old.modules() if isinstance(m, nn.Linear))
            setattr(net, place, nn.Identity())
            net.features_width = linear.in_features  # type: ignore[assignment]
            break
    if channels != 3:
        raise ConfigError([f"model.encoder = {name!r} takes 3 channels, the images have {channels}: choose a resnet"])
    return _Classifier(net, int(net.features_width))  # type: ignore[arg-type]


def _timm(name: str, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ConfigError([f"model.encoder = 'timm:{name}': timm is not installed; pip install timm"]) from None
    if name not in timm.list_models():
        raise ConfigError([f"model.encoder = 'timm:{name}': timm has no such model"])
    net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    return _Classifier(net, int(net.num_features))


class _Classifier(nn.Module):
    """A network from elsewhere, its classifier removed."""

    def __init__(self, net: nn.Module, features: int) -> None:
        super().__init__()
        self.net = net
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.net(x), 1)


def load_weights(encoder: nn.Module, file: str) -> None:
    """Start an encoder from a file of weights (opened without running code); a classifier's ``fc`` is ignored.

    Raises ConfigError when tensors are missing or do not fit.
    """
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    own = encoder.state_dict()
    state = {k: v for k, v in state.items() if k in own}
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise ConfigError(
            [f"model.weights = {file!r}: {len(wrong)} tensors missing or of another shape, e.g. {wrong[0]!r}"]
        )
    encoder.load_state_dict(state)


def head(kind: str, features: int, dim: int) -> nn.Module:
    """PCL's and MoCo's heads: ``linear`` (v1) F -> D, or ``mlp`` (v2) F -> F -> ReLU -> D; PyTorch's default init."""
    last = nn.Linear(features, dim)
    return last if kind == "linear" else nn.Sequential(nn.Linear(features, features), nn.ReLU(), last)


class Branch(nn.Module):
    """Encoder and head: (B, C, H, W) -> (B, D), not normalised."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projector

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


class Twin(nn.Module):
    """A frozen copy of a network that follows it: teacher <- m * teacher + (1 - m) * student.

    Parameters only: BatchNorm statistics of the copy come from its own forwards (MoCo, PCL).
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        mine: list[Tensor] = list(self.net.parameters())
        theirs: list[Tensor] = list(student.parameters())
        torch._foreach_mul_(mine, momentum)
        torch._foreach_add_(mine, theirs, alpha=1 - momentum)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Queue(nn.Module):
    """The last K keys of all ranks, oldest overwritten first; rows are keys. State changes only in ``enqueue``."""

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys_BD: Tensor) -> None:
        """Overwrite the B oldest entries. B must divide K (checked at start-up). The pointer stays on the device."""
        size = len(self.keys)
        assert size % len(keys_BD) == 0, f"queue of {size} and {len(keys_BD)} keys"
        place = self.pointer + torch.arange(len(keys_BD), device=self.keys.device)
        self.keys.index_copy_(0, place, keys_BD.to(self.keys.dtype))
        self.pointer.add_(len(keys_BD)).remainder_(size)


def sequential(**parts: nn.Module) -> nn.Sequential:
    """nn.Sequential with names."""
    return nn.Sequential(OrderedDict(parts))
