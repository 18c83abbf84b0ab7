"""Detection and masks: Mask R-CNN from the encoder, trained and tested on ``evals.coco``; on several ranks by DDP.

Shape letters: B images on this rank.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raycon.core import dist, stream
from raycon.core.config import ConfigError, EvalConfig
from raycon.evals import coco, rcnn
from raycon.evals.base import Source
from raycon.evals.protocols import DETECTION, Detection

log = logging.getLogger("raycon")

_TOLD = 50
"""Steps between looks at the loss."""


class Evaluation:
    """COCO's average precision in percent after training the whole network: "detection/box_ap", "box_ap50", "box_ap75"
    and, with masks, "mask_ap", "mask_ap50", "mask_ap75". For Pascal VOC too (boxes; not the kit's own 11 points)."""

    without_data = True
    distributed = True

    def __init__(self, config: EvalConfig, seed: int = 0, preset: str = "") -> None:
        self.protocol, self.root, self.seed = DETECTION[preset], config.coco, seed
        self.iterations = config.iterations or self.protocol.iterations

    def problems(self) -> list[str]:
        """What would keep it from starting."""
        if not self.root:
            return ["detection needs pictures with boxes: give --evals.coco FOLDER (COCO's layout, or VOCdevkit)"]
        try:
            coco.library()
            coco.open_pictures(Path(self.root), self.protocol.masks)
        except ConfigError as error:
            return error.problems
        return []

    def run_on(self, source: Source) -> dict[str, float]:
        train, test = coco.open_pictures(Path(self.root), self.protocol.masks)
        torch.manual_seed(stream.key(self.seed, 0xDE7) >> 1)  # the heads' start
        model = rcnn.build(source.encoder, self.protocol, len(train.categories), source.mean, source.std)
        fit(model, self.protocol, train, self.iterations, self.seed, source.device, len(source.mean))
        found = detect(model, self.protocol, test, train.categories, source.device, len(source.mean))
        numbers = {f"detection/box_{k}": v for k, v in coco.average_precision(test, found, "bbox").items()}
        if self.protocol.masks:
            masks = [{k: v for k, v in one.items() if k != "bbox"} for one in found]
            numbers |= {f"detection/mask_{k}": v for k, v in coco.average_precision(test, masks, "segm").items()}
        return numbers


def preset(config: EvalConfig, seed: int, name: str) -> Evaluation:
    return Evaluation(config, seed, name)


def rate(protocol: Detection, step: int, iterations: int) -> float:
    """The learning rate of step ``step`` (0-based). Milestones and warm-up move with the number of steps."""
    share = iterations / protocol.iterations
    warmup = protocol.warmup * min(share, 1.0)
    factor = 1.0
    if step < warmup:
        factor = protocol.warmup_factor + (1 - protocol.warmup_factor) * step / warmup
    if protocol.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / iterations))
    else:
        factor *= 0.1 ** sum(step >= m * share for m in protocol.milestones)
    return protocol.lr * factor


def fit(
    model: nn.Module,
    protocol: Detection,
    train: coco.Pictures,
    iterations: int,
    seed: int,
    device: torch.device,
    channels: int,
) -> None:
    """Train in place. Images with an object only; flips and sizes are drawn per step and rank from the seed.

    Raises ValueError when the loss is not finite.
    """
    images, local = train.trainable(), max(1, protocol.batch // dist.world())
    if protocol.batch % dist.world():
        log.warning("batch %d over %d ranks: %d images per step", protocol.batch, dist.world(), local * dist.world())
    net: nn.Module = model.to(device).train()
    if dist.world() > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = DistributedDataParallel(model, find_unused_parameters=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    epoch, order = 0, stream.epoch_order(seed, 0, len(images))
    for step in range(iterations):
        torch.manual_seed(stream.key(seed, step, dist.rank(), 0xDE7) >> 1)
        first = (step * dist.world() + dist.rank()) * local
        pictures, targets = [], []
        for place in range(first, first + local):
            if place // len(images) != epoch:
                epoch = place // len(images)
                order = stream.epoch_order(seed, epoch, len(images))
            image = images[order[place % len(images)]]
            picture, target = train.read(image, channels), train.targets(image, protocol.masks)
            if torch.rand(()) < 0.5:
                picture, target = flipped(picture, target)
            pictures.append(picture.to(device))
            targets.append({k: v.to(device) for k, v in target.items()})
        for group in optimizer.param_groups:
            group["lr"] = rate(protocol, step, iterations)
        losses: dict[str, Tensor] = net(pictures, targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % _TOLD == 0 or step + 1 == iterations:
            if dist.any_true(not math.isfinite(loss.item())):
                raise ValueError(f"detection: the loss is not finite in step {step + 1} of {iterations}")
            log.info("detection step %d of %d: loss %.4f", step + 1, iterations, loss.item())


def flipped(picture: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Left and right exchanged."""
    width = picture.shape[2]
    boxes = target["boxes"][:, [2, 1, 0, 3]]
    boxes = torch.stack([width - boxes[:, 0], boxes[:, 1], width - boxes[:, 2], boxes[:, 3]], 1)
    changed = target | {"boxes": boxes}
    if "masks" in target:
        changed["masks"] = target["masks"].flip(2)
    return picture.flip(2), changed


@torch.inference_mode()
def detect(
    model: nn.Module,
    protocol: Detection,
    test: coco.Pictures,
    categories: list[int],
    device: torch.device,
    channels: int,
) -> list[dict[str, Any]]:
    """What the network finds in all test images, in COCO's result form; every rank gets all of it."""
    model.eval()
    model.transform.min_size = (protocol.test_side,)  # type: ignore[union-attr]
    mine: list[dict[str, Any]] = []
    for image in test.content["images"][dist.rank() :: dist.world()]:
        (found,) = model([test.read(image, channels).to(device)])
        found = {k: v.cpu() for k, v in found.items()}
        for i in range(len(found["labels"])):
            left, top, right, bottom = found["boxes"][i].tolist()
            one = {"image_id": image["id"], "category_id": categories[int(found["labels"][i]) - 1]}
            one |= {"score": float(found["scores"][i]), "bbox": [left, top, right - left, bottom - top]}
            if "masks" in found:
                one["segmentation"] = coco.encoded(found["masks"][i, 0] >= 0.5)
            mine.append(one)
    return [one for part in dist.gather_objects(mine) for one in part]
