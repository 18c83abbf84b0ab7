"""Supervised training: a linear classifier of the weak labels, cross-entropy. The baseline that sees labels only.

Legend: B rows of this batch, F encoder width, Y classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycon.core.config import Facts, MethodOptions
from raycon.core.types import Batch, Mined, Needs, Output
from raycon.methods.base import Method
from raycon.nn import losses


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "supervised"
    """The method."""

    def needs(self) -> Needs:
        return Needs(views=("strong",), labels=True)


class Supervised(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__(options)
        self.network = encoder
        self.classifier = nn.Linear(features, max(classes, 1))

    def forward(self, batch: Batch, mined: Mined) -> Output:
        (image,) = batch.views
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            feature_BF = self.network(image)
        logits_BY = self.classifier(feature_BF.float())
        loss = losses.class_cross_entropy(logits_BY, batch.label)
        metrics = {"accuracy/class": losses.accuracy(logits_BY, batch.label)}
        return Output(loss, {"embedding": nn.functional.normalize(feature_BF.detach().float(), dim=1)}, metrics)

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.network, images)

    def encoder(self) -> nn.Module:
        return self.network


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return Supervised(options, encoder, encoder.features, facts.classes)  # type: ignore[arg-type]
