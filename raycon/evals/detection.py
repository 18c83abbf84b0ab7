"""Detection and masks: Mask R-CNN from the encoder, trained and tested on ``evals.coco``; on several ranks by DDP.

The same code runs in one process, under torchrun and on Ray Train workers. The training keeps its state twenty times, so
that what was killed goes on: on a CPU with the same bits. Shape letters: B images on this rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from raycon.core import dist, stream
from raycon.core.config import ConfigError, EvalConfig
from raycon.evals import coco, rcnn
from raycon.evals.base import Source
from raycon.evals.protocols import DETECTION, Detection

log = logging.getLogger("raycon")

_TOLD = 50
"""Steps between looks at the loss."""
_KEPT = 20
"""How often a training keeps its state: at most a twentieth of it is lost."""


class Evaluation:
    """COCO's average precision in percent after training the whole network: "detection/box_ap", "box_ap50", "box_ap75"
    and, with masks, "mask_ap", "mask_ap50", "mask_ap75". For Pascal VOC, boxes only, also its own kit's with 11 points:
    "detection/voc_ap", "voc_ap50", "voc_ap75"."""

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
        work = Work(source.device, len(source.mean), source.workers, self._folder(source, train))
        fit(model, self.protocol, train, self.iterations, self.seed, work)
        found = detect(model, self.protocol, test, train.categories, work)
        numbers = {f"detection/box_{k}": v for k, v in coco.average_precision(test, found, "bbox").items()}
        if test.voc:
            numbers |= {f"detection/{k}": v for k, v in coco.voc_average_precision(test, found).items()}
        if self.protocol.masks:
            masks = [{k: v for k, v in one.items() if k != "bbox"} for one in found]
            numbers |= {f"detection/mask_{k}": v for k, v in coco.average_precision(test, masks, "segm").items()}
        dist.barrier()
        if work.folder is not None and dist.rank() == 0:
            shutil.rmtree(work.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another training keeps its state there
                work.folder.parent.rmdir()
        return numbers

    def _folder(self, source: Source, train: coco.Pictures) -> Path | None:
        """Where the state of this very training is kept: of these weights, data and settings."""
        from raycon.training.embedding import digest

        if source.unfinished is None:
            return None
        what = (digest(source.encoder), self.protocol, self.iterations, self.seed, source.mean, source.std)
        data = (str(Path(self.root).absolute()), len(train.content["images"]), len(train.content["annotations"]))
        return (
            source.unfinished / f"detection-{hashlib.blake2b(repr((what, data)).encode(), digest_size=8).hexdigest()}"
        )


class Work(NamedTuple):
    """Where a training runs."""

    device: torch.device
    channels: int
    """Of the images."""
    workers: int = 0
    """Helper processes that read images ahead."""
    folder: Path | None = None
    """Where its state is kept; None: nowhere."""


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


def fit(model: nn.Module, protocol: Detection, train: coco.Pictures, iterations: int, seed: int, work: Work) -> None:
    """Train in place, from where ``work.folder`` says. Images with an object only; flips and sizes are drawn per step and
    rank from the seed.

    Raises ValueError when the loss is not finite.
    """
    local = max(1, protocol.batch // dist.world())
    if protocol.batch % dist.world():
        log.warning("batch %d over %d ranks: %d images per step", protocol.batch, dist.world(), local * dist.world())
    model.to(work.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    begin = _resume(model, optimizer, work.folder)
    net: nn.Module = model
    if dist.world() > 1:
        if work.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = DistributedDataParallel(model, find_unused_parameters=True)
    make = functools.partial(
        pictures_of_step, train=train, images=train.trainable(), batch=local, rank=dist.rank(), world=dist.world(),
        seed=seed, channels=work.channels, masks=protocol.masks,
    )  # fmt: skip
    every = max(1, iterations // _KEPT)
    for step, (pictures, targets) in enumerate(ahead(make, range(begin, iterations), work.workers), begin):
        torch.manual_seed(stream.key(seed, step, dist.rank(), 0xDE7) >> 1)  # sizes, and the regions trained with
        for group in optimizer.param_groups:
            group["lr"] = rate(protocol, step, iterations)
        losses: dict[str, Tensor] = net(
            [p.to(work.device) for p in pictures], [{k: v.to(work.device) for k, v in t.items()} for t in targets]
        )
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % _TOLD == 0 or step + 1 == iterations:
            if dist.any_true(not math.isfinite(loss.item())):
                raise ValueError(f"detection: the loss is not finite in step {step + 1} of {iterations}")
            log.info("detection step %d of %d: loss %.4f", step + 1, iterations, loss.item())
        if (step + 1) % every == 0 and work.folder is not None and dist.rank() == 0:
            _keep(model, optimizer, work.folder, step + 1)


def _keep(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, steps: int) -> None:
    """The state after ``steps``, in place of the one before."""
    from raycon.training import checkpoint

    checkpoint.save(folder, model, optimizer, None, {"step": steps, "evaluate": False})
    for old in checkpoint.steps(folder)[:-1]:
        shutil.rmtree(old)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """Take the kept state, of rank 0's choice; the steps behind it, 0 where there is none."""
    from raycon.training import checkpoint

    path = checkpoint.newest(folder)[0] if folder is not None and dist.rank() == 0 else None
    path = dist.gather_objects(path)[0]
    if path is None:
        return 0
    saved = checkpoint.load(path)
    model.load_state_dict(saved.model)
    optimizer.load_state_dict(saved.optimizer)
    log.warning("detection goes on after step %d (%s)", saved.step, path)
    return saved.step


def pictures_of_step(
    step: int,
    train: coco.Pictures,
    images: list[dict[str, Any]],
    batch: int,
    rank: int,
    world: int,
    seed: int,
    channels: int,
    masks: bool,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The images of a rank's step and their targets: ``batch`` of ``images``, which come in a new order each epoch."""
    pictures, targets = [], []
    coin = np.random.Generator(np.random.Philox(key=stream.key(seed, step, rank, 0xF11)))
    first = (step * world + rank) * batch
    for place in range(first, first + batch):
        image = images[_order(seed, place // len(images), len(images))[place % len(images)]]
        picture, target = train.read(image, channels), train.targets(image, masks)
        if coin.random() < 0.5:
            picture, target = flipped(picture, target)
        pictures.append(picture)
        targets.append(target)
    return pictures, targets


_order = functools.lru_cache(maxsize=2)(stream.epoch_order)


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def ahead(make: Callable[[int], Any], numbers: Iterable[int], workers: int) -> Iterator[Any]:
    """``make`` of each number, in order; with ``workers`` made ahead by so many processes."""
    loader = DataLoader(
        _Made(make), sampler=numbers, batch_size=None, collate_fn=_as_it_is, num_workers=workers,
        generator=torch.Generator(),
    )  # fmt: skip
    yield from loader


def _as_it_is(made: Any) -> Any:
    return made


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
    model: nn.Module, protocol: Detection, test: coco.Pictures, categories: list[int], work: Work
) -> list[dict[str, Any]]:
    """What the network finds in all test images, in COCO's result form; every rank gets all of it."""
    model.eval()
    model.transform.min_size = (protocol.test_side,)  # type: ignore[union-attr]
    mine: list[dict[str, Any]] = []
    images = test.content["images"]
    numbers = range(dist.rank(), len(images), dist.world())
    read = functools.partial(_picture, test=test, channels=work.channels)
    for number, picture in zip(numbers, ahead(read, numbers, work.workers), strict=True):
        (found,) = model([picture.to(work.device)])
        found = {k: v.cpu() for k, v in found.items()}
        for i in range(len(found["labels"])):
            left, top, right, bottom = found["boxes"][i].tolist()
            one = {"image_id": images[number]["id"], "category_id": categories[int(found["labels"][i]) - 1]}
            one |= {"score": float(found["scores"][i]), "bbox": [left, top, right - left, bottom - top]}
            if "masks" in found:
                one["segmentation"] = coco.encoded(found["masks"][i, 0] >= 0.5)
            mine.append(one)
    return [one for part in dist.gather_objects(mine) for one in part]


def _picture(number: int, test: coco.Pictures, channels: int) -> Tensor:
    return test.read(test.content["images"][number], channels)
