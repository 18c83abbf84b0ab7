"""Mask R-CNN (torchvision) on any convolutional encoder: with a feature pyramid, or in the C4 form.

Shape letters: B images, N regions, C channels, H W.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from raycon.core.config import ConfigError
from raycon.evals.protocols import Detection

_PROBE = 128


def build(
    encoder: nn.Module, protocol: Detection, classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> nn.Module:
    """torchvision's MaskRCNN (FasterRCNN without masks) around a copy of the encoder; ``classes`` without background.

    Its images are (C, H, W) in 0..1, normalised with ``mean`` and ``std`` inside. Raises ConfigError for an encoder that
    has no such maps.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    encoder, channels = copy.deepcopy(encoder).cpu().requires_grad_(True), len(mean)
    ratios, maps = (0.5, 1.0, 2.0), protocol.maps
    parts: dict[str, Any] = {
        "min_size": protocol.train_sides, "max_size": protocol.longest, "image_mean": list(mean), "image_std": list(std),
        "box_batch_size_per_image": protocol.regions,
        "rpn_pre_nms_top_n_train": protocol.before_nms[0], "rpn_pre_nms_top_n_test": protocol.before_nms[1],
        "rpn_post_nms_top_n_train": protocol.proposals[0], "rpn_post_nms_top_n_test": protocol.proposals[1],
    }  # fmt: skip
    if protocol.head == "fpn":
        body: nn.Module = Pyramid(encoder, channels, maps)
        parts["rpn_anchor_generator"] = AnchorGenerator(tuple((a,) for a in protocol.anchors), (ratios,) * 5)
        box_head: nn.Module = TwoMLPHead(maps * 7**2, 4 * maps)
        box_width, mask_width = 4 * maps, maps
        mask_head: nn.Module = MaskRCNNHeads(maps, (maps,) * 4, 1)
    else:
        body, mask_head = c4(encoder, channels)
        box_head, box_width, mask_width = nn.Sequential(mask_head, Averaged()), mask_head.channels, mask_head.channels
        parts["rpn_anchor_generator"] = AnchorGenerator((protocol.anchors,), (ratios,))
        parts["box_roi_pool"] = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
    parts |= {"box_head": box_head, "box_predictor": FastRCNNPredictor(box_width, classes + 1)}
    if not protocol.masks:
        parts.pop("mask_roi_pool", None)
        return FasterRCNN(body, **parts)
    predictor = MaskRCNNPredictor(mask_width, maps, classes + 1)
    return MaskRCNN(body, mask_head=mask_head, mask_predictor=predictor, **parts)


class Pyramid(nn.Module):
    """(B, C, H, W) -> five maps of ``maps`` channels: the encoder's four deepest resolutions and one of half the last."""

    def __init__(self, encoder: nn.Module, channels: int, maps: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        found = stages(encoder, channels)
        if len(found) < 4:
            raise ConfigError(
                [f"detection: {type(encoder).__name__} has maps of {len(found)} sizes, a pyramid needs 4: use a "
                 "convolutional encoder"]
            )  # fmt: skip
        self.encoder, self.out_channels = encoder, maps
        self.fpn = FeaturePyramidNetwork([width for width, _ in found[-4:]], maps, LastLevelMaxPool())
        self._maps: dict[int, Tensor] = {}
        for i, (_, name) in enumerate(found[-4:]):
            encoder.get_submodule(name).register_forward_hook(self._keep(i))

    def _keep(self, i: int) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            self._maps[i] = out

        return hook

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.encoder(x)
        maps = OrderedDict((str(i), self._maps.pop(i)) for i in range(4))
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


def stages(encoder: nn.Module, channels: int) -> list[tuple[int, str]]:
    """(width, module) of the last module of each resolution, fine to coarse, found by one picture of zeros."""
    found: dict[int, tuple[int, str]] = {}
    hooks = []
    for name, module in encoder.named_modules():

        def look(module: nn.Module, given: Any, out: Any, name: str = name) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3] > 1:
                found[out.shape[2]] = (out.shape[1], name)

        if name:
            hooks.append(module.register_forward_hook(look))
    modes = [(m, m.training) for m in encoder.modules()]
    encoder.eval()
    with torch.no_grad():
        encoder(torch.zeros(1, channels, _PROBE, _PROBE))
    for module, mode in modes:
        module.training = mode
    for hook in hooks:
        hook.remove()
    return [found[size] for size in sorted(found, reverse=True)]


_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def c4(encoder: nn.Module, channels: int) -> tuple[C4, LastStage]:
    """A ResNet up to its third stage as the backbone, and its fourth for the heads."""
    trunk: Any = getattr(encoder, "net", encoder)
    if any(not hasattr(trunk, part) for part in _PARTS):
        raise ConfigError([f"detection: the C4 form needs a ResNet, not {type(trunk).__name__}; use detection"])
    widths = {name: width for width, name in stages(trunk, channels)}
    body = [getattr(trunk, part) for part in _PARTS[:-1]]
    return C4(body, widths["layer3"]), LastStage(trunk.layer4, widths["layer4"])


class C4(nn.Module):
    """(B, C, H, W) -> (B, out_channels, H / 16, W / 16)."""

    def __init__(self, body: list[nn.Module], out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = nn.Sequential(*body), out_channels

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.body(x)
        return maps


class LastStage(nn.Module):
    """(N, C, 14, 14) -> (N, channels, 7, 7): ResNet's fourth stage and the BatchNorm that MoCo's recipe adds."""

    def __init__(self, layer4: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer4, self.norm, self.channels = layer4, nn.BatchNorm2d(channels), channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layer4(x))
        return out


class Averaged(nn.Module):
    """(N, C, H, W) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
