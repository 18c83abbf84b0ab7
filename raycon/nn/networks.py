"""Encoders, heads, the EMA twin and the queue.

Legend: F encoder feature width, D embedding width, K queue entries, B rows of a batch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from raycon.core.config import ConfigError, ModelConfig
from raycon.nn import published

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
        self.name, self.stem = name, stem
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
        encoder = _timm(name[5:], channels) if name.startswith("timm:") else _torchvision(name, channels)
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
    return _Classifier(net, int(net.features_width), name)  # type: ignore[arg-type]


def _timm(name: str, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ConfigError([f"model.encoder = 'timm:{name}': timm is not installed; pip install timm"]) from None
    if name not in timm.list_models():
        raise ConfigError([f"model.encoder = 'timm:{name}': timm has no such model"])
    net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    return _Classifier(net, int(net.num_features))  # type: ignore[arg-type]


class _Classifier(nn.Module):
    """A network from elsewhere, its classifier removed."""

    def __init__(self, net: nn.Module, features: int, name: str = "") -> None:
        super().__init__()
        self.net = net
        self.features = features
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.net(x), 1)


def load_weights(encoder: nn.Module, source: str) -> None:
    """Start an encoder from ``model.weights``; a classifier's ``fc`` is ignored.

    A file is opened without running code; those of MoCo, PCL, WCL, Cl-InfoNCE, SCE and MaskCon are recognised (see
    published.py). "torchvision:NAME" (IMAGENET1K_V1, say) is downloaded once. A ResNet with a small stem keeps its
    fresh first convolution, as MaskCon's code does. Raises ConfigError when the weights cannot be had, tensors are
    missing or do not fit.
    """
    if source.startswith("torchvision:"):
        state = _published_weights(encoder, source)
    else:
        with published.option("model.weights"):
            _, state = published.encoder_for(published.read(Path(source)), source)
        if isinstance(encoder, _Classifier):
            state = {f"net.{k}": v for k, v in state.items()}
    own = encoder.state_dict()
    fresh = isinstance(encoder, ResNet) and encoder.stem != "imagenet" and "conv1.weight" in state
    if fresh and state["conv1.weight"].shape != own["conv1.weight"].shape:
        state["conv1.weight"] = own["conv1.weight"]
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}  # files of old do not have them
    state = counters | {k: v for k, v in state.items() if k in own}
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise ConfigError(
            [f"model.weights = {source!r}: {len(wrong)} tensors missing or of another shape, e.g. {wrong[0]!r}"]
        )
    encoder.load_state_dict(state)


def published_url(encoder: nn.Module, source: str) -> str:
    """Where torchvision has the weights "torchvision:NAME" of an encoder. Raises ConfigError when it has none."""
    from torchvision import models

    name = str(getattr(encoder, "name", ""))
    if name not in models.list_models(module=models):
        raise ConfigError([f"model.weights = {source!r}: torchvision has no weights for model.encoder; give a file"])
    known = models.get_model_weights(name)
    wanted = source.removeprefix("torchvision:")
    if wanted not in known.__members__:
        raise ConfigError([f"model.weights = {source!r}: {name} has torchvision:{', '.join(known.__members__)}"])
    return str(known[wanted].url)


def _published_weights(encoder: nn.Module, source: str) -> dict[str, Tensor]:
    """torchvision's weights of an encoder, from its cache or the internet."""
    import urllib.request

    url = published_url(encoder, source)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    try:
        if not cached.exists():  # torch waits without a time limit: ask first whether the server answers at all
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a damaged download is a RuntimeError
        raise ConfigError(
            [
                f"model.weights = {source!r}: not in {cached.parent} and the download failed ({error}). Put {url} there, "
                "or give the file's path as model.weights"
            ]
        ) from None
    return {f"net.{k}": v for k, v in state.items()} if isinstance(encoder, _Classifier) else state


def head(kind: str, features: int, dim: int, hidden: int = 0) -> nn.Module:
    """PCL's and MoCo's heads: ``linear`` (v1) F -> D, or ``mlp`` (v2) F -> H -> ReLU -> D; PyTorch's default init.

    H is ``hidden``, or F when that is 0 (MaskCon and SupCon set it).
    """
    if kind == "linear":
        return nn.Linear(features, dim)
    hidden = hidden or features
    last = nn.Linear(hidden, dim)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), last)


def mlp_head(
    features: int,
    hidden: Sequence[int],
    dim: int,
    *,
    norm: bool = True,
    bias: bool | None = None,
    last_norm: bool = False,
    last_affine: bool = False,
    last_bias: bool | None = None,
) -> nn.Sequential:
    """The heads of the papers: (B, F) -> (B, D), per hidden width H a Linear, BatchNorm, ReLU, then a last Linear.

    norm: BatchNorm after each hidden layer. bias: of the hidden layers; None: where no norm follows. last_norm: a
    BatchNorm at the end, with scale and shift when ``last_affine``. last_bias: None: where no norm follows. PyTorch's
    default initialisation. Layers are called linear1, bn1, relu1, linear2, ...

        WCL, Cl-InfoNCE (dual)  mlp_head(F, (H, H), D, bias=True)
        SCE on ImageNet         mlp_head(F, (2048, 2048), 256, last_norm=True); predictor mlp_head(256, (4096,), 256,
                                last_bias=False)
        SCE on CIFAR-10         mlp_head(F, (512,), 128)
        SimCLR, MoCo v3, NNCLR  mlp_head(F, (2048,), 128, last_norm=True) and the like
        MoCo v2, PCL v2         mlp_head(F, (F,), D, norm=False)
    """
    parts: dict[str, nn.Module] = {}
    width = features
    for i, wide in enumerate(hidden, start=1):
        parts[f"linear{i}"] = nn.Linear(width, wide, bias=not norm if bias is None else bias)
        if norm:
            parts[f"bn{i}"] = nn.BatchNorm1d(wide)
        parts[f"relu{i}"] = nn.ReLU(inplace=True)
        width = wide
    last = len(hidden) + 1
    parts[f"linear{last}"] = nn.Linear(width, dim, bias=not last_norm if last_bias is None else last_bias)
    if last_norm:
        parts[f"bn{last}"] = nn.BatchNorm1d(dim, affine=last_affine)
    return sequential(**parts)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that treats S groups of its batch as if they were on S devices (MoCo's and SCE's single-GPU runs).

    Sample n belongs to group n mod S; S must divide the batch. Each group is normalised by its own statistics; the
    running statistics move to the mean over the groups. (B, C, H, W) in and out; as BatchNorm2d in eval mode.
    """

    def __init__(self, features: int, groups: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(features, eps=eps, momentum=momentum)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        samples, channels, height, width = x.shape
        assert samples % self.groups == 0, f"{samples} samples, {self.groups} groups"
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, var = self.running_mean.repeat(self.groups), self.running_var.repeat(self.groups)
        out = nn.functional.batch_norm(
            x.reshape(samples // self.groups, self.groups * channels, height, width),
            mean,
            var,
            self.weight.repeat(self.groups),
            self.bias.repeat(self.groups),
            True,
            self.momentum,
            self.eps,
        )
        self.running_mean.copy_(mean.view(self.groups, channels).mean(0))
        self.running_var.copy_(var.view(self.groups, channels).mean(0))
        self.num_batches_tracked.add_(1)
        return out.reshape(samples, channels, height, width)


def split_batch_norm(module: nn.Module, groups: int) -> None:
    """Turn every BatchNorm2d inside a module into a SplitBatchNorm with the same parameters and statistics."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            assert child.momentum is not None
            split = SplitBatchNorm(child.num_features, groups, child.eps, child.momentum)
            split.load_state_dict(child.state_dict())
            for mine, theirs in zip(split.parameters(), child.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)
            setattr(module, name, split)
        else:
            split_batch_norm(child, groups)


class Branch(nn.Module):
    """Encoder and head: (B, C, H, W) -> (B, D), not normalised."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projector

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


class TwoHeads(nn.Module):
    """One encoder and two heads: (B, C, H, W) -> (B, D1) and (B, D2), not normalised (WCL, Cl-InfoNCE's dual form)."""

    def __init__(self, encoder: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return self.first(features), self.second(features)


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
    """The last K keys of all ranks, oldest overwritten first; rows are keys. State changes only in ``enqueue``.

    With ``labelled`` each key carries a weak label; keys that nobody enqueued yet have label -1 (none).
    """

    keys: Tensor
    pointer: Tensor
    labels: Tensor | None

    def __init__(self, size: int, dim: int, labelled: bool = False) -> None:
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("labels", torch.full((size,), -1) if labelled else None)

    @torch.no_grad()
    def enqueue(self, keys_BD: Tensor, labels_B: Tensor | None = None) -> None:
        """Overwrite the B oldest entries. B must divide K (checked at start-up). The pointer stays on the device."""
        assert (labels_B is None) == (self.labels is None), "labels go with a labelled queue"
        size = len(self.keys)
        assert size % len(keys_BD) == 0, f"queue of {size} and {len(keys_BD)} keys"
        place = self.pointer + torch.arange(len(keys_BD), device=self.keys.device)
        self.keys.index_copy_(0, place, keys_BD.to(self.keys.dtype))
        if self.labels is not None and labels_B is not None:
            self.labels.index_copy_(0, place, labels_B)
        self.pointer.add_(len(keys_BD)).remainder_(size)


def sequential(**parts: nn.Module) -> nn.Sequential:
    """nn.Sequential with names."""
    return nn.Sequential(OrderedDict(parts))
