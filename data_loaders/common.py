"""What the three loaders share: which rows, in which order, and how what was read becomes a Batch.

A loader differs from the others only in how it reads: it implements ``_blocks``. Everything that decides *what* is
delivered is here, as pure functions of (seed, epoch, rank, world), so that no loader can deviate.

Two paths. Images of one size travel to the device as they are, in uint8, and all of the augmentation happens there,
batched; one read serves all views. Images of any size are cropped and resized on the CPU, view by view, with the box
the counter stream draws; crops of one size travel, and the rest of the augmentation happens on the device.

Shape letters: N rows of the data set, B rows of a batch on this rank, V views, S side of a view in pixels, H W height
and width of a source image, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.config import ConfigError
from raycon.core.stream import batch_rows, epoch_order, shard_range, uniforms
from raycon.core.types import Batch, Images, LoaderPlan
from raycon.nn import views
from raycon.nn.views import EvalSpec

from .datasets import ImageSet

SCAN_ROWS = 256
"""Least rows per block of ``scan``, where no batch size is asked for."""


class Block(NamedTuple):
    """Consecutive rows of the stream as they were read."""

    row: NDArray[np.int64]
    """(B,)."""
    label: NDArray[np.int64]
    """(B,) weak labels."""
    image: NDArray[np.uint8]
    """(B, H, W, C) whole images of one size; or (B, P): each row's views, cropped, one after the other."""


class StreamLoader(ABC):
    """The Loader contract of core/types.py; a subclass reads."""

    kind: str
    """ffcv, ray or torch."""

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        """Raises ConfigError when the global batch does not divide over the ranks or is larger than the data set."""
        if plan.batch % plan.world:
            raise ConfigError([f"train.batch = {plan.batch} does not divide over {plan.world} ranks"])
        if plan.batch > len(dataset):
            raise ConfigError([f"train.batch = {plan.batch} is more than the {len(dataset)} images of {dataset.name}"])
        self.dataset = dataset
        self.plan = plan
        self.rows = len(dataset)
        self.steps = self.rows // plan.batch
        self.local = plan.batch // plan.world

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """See core/types.py. Raises ValueError naming an image that cannot be read."""
        plan = self.plan
        for block in self._blocks(self._train_rows(epoch, first_step), self.local, epoch):
            image = torch.from_numpy(block.image).to(plan.device)
            if self.dataset.image is not None:
                made = views.batch_views(
                    image.permute(0, 3, 1, 2), block.row, plan.specs, plan.seed, epoch, plan.channels_last
                )
            else:
                made = self._finish(image, block.row, epoch)
            yield Batch(
                made, torch.from_numpy(block.row).to(plan.device), torch.from_numpy(block.label).to(plan.device)
            )

    def scan(self) -> Iterator[Images]:
        """See core/types.py. Raises ValueError naming an image that cannot be read."""
        plan, spec = self.plan, self.plan.eval_spec
        rows = np.arange(*shard_range(self.rows, plan.rank, plan.world))
        for block in self._blocks(rows, max(self.local, SCAN_ROWS), None):
            image = torch.from_numpy(block.image).to(plan.device)
            if self.dataset.image is not None:
                image = image.permute(0, 3, 1, 2)
            else:  # resized and cut out already
                image = _square(image, spec.size)
                spec = dataclasses.replace(spec, resize=spec.size)
            yield Images(views.eval_view(image, spec, plan.channels_last), torch.from_numpy(block.row).to(plan.device))

    def close(self) -> None:  # noqa: B027
        """Give back processes and files, where there are any; the loader is not used afterwards."""

    @abstractmethod
    def _blocks(self, rows: NDArray[np.int64], size: int, epoch: int | None) -> Iterator[Block]:
        """``rows`` in their order, ``size`` at a time, the last block with what is left; epoch None: for ``scan``."""

    def _train_rows(self, epoch: int, first_step: int) -> NDArray[np.int64]:
        """The rows of this rank from ``first_step`` to the end of the epoch, ``self.local`` per step."""
        plan, order = self.plan, epoch_order(self.plan.seed, epoch, self.rows)
        parts = [batch_rows(order, step, plan.batch, plan.rank, plan.world) for step in range(first_step, self.steps)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _finish(self, crops_BP: Tensor, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        """The views of crops that ``crops_of`` made: what is left is the flip and the colours."""
        plan = self.plan
        parts = crops_BP.split([len(self.dataset.mean) * spec.size**2 for spec in plan.specs], dim=1)
        made = []
        for view, (spec, part) in enumerate(zip(plan.specs, parts, strict=True)):
            numbers = uniforms(plan.seed, epoch, rows, view, views.SLOTS)
            params = views.draw(spec, numbers, spec.size, spec.size)  # the box, made for another size, is not used
            crop = _square(part, spec.size)
            made.append(views.finish(crop, spec, params, flip=True, channels_last=plan.channels_last))
        return tuple(made)


def read_block(dataset: ImageSet, plan: LoaderPlan, rows: NDArray[np.int64], epoch: int | None) -> Block:
    """Rows read by the data set itself; crops when its images have many sizes. Raises ValueError naming the image."""
    if dataset.image is not None:
        image = dataset.block(rows)
    else:
        image = crops_of((dataset.read(row) for row in rows.tolist()), plan, rows, epoch)
    return Block(rows, dataset.weak[rows], image)


def crops_of(
    images: Iterable[NDArray[np.uint8]], plan: LoaderPlan, rows: NDArray[np.int64], epoch: int | None
) -> NDArray[np.uint8]:
    """(B, P) uint8: of each image (H, W, C), in the order of ``rows``, all views' (S, S, C) crops one after the other.

    Resized like PIL does, rounded to whole grey values. For epoch None the evaluation view's crop.
    """
    specs = plan.specs if epoch is not None else ()
    numbers = [uniforms(plan.seed, epoch or 0, rows, view, views.SLOTS) for view in range(len(specs))]
    crops = []
    for at, pixels in enumerate(images):
        height, width = pixels.shape[:2]
        if epoch is None:
            parts = [_centre(pixels, plan.eval_spec)]
        else:
            boxes = [
                views.draw(spec, number[at : at + 1], height, width).box[0]
                for spec, number in zip(specs, numbers, strict=True)
            ]
            parts = [_resized(pixels, box, spec.size) for spec, box in zip(specs, boxes, strict=True)]
        crops.append(np.concatenate([part.reshape(-1) for part in parts]))
    return np.stack(crops)


def _resized(pixels: NDArray[np.uint8], box: NDArray[np.float32], size: int) -> NDArray[np.uint8]:
    top, left, height, width = box.astype(int).tolist()
    return _pil_resize(pixels[top : top + height, left : left + width], size, size)


def _centre(pixels: NDArray[np.uint8], spec: EvalSpec) -> NDArray[np.uint8]:
    """(S, S, C): the shorter side resized to ``spec.resize``, the centre cut out; sizes as in ``views.eval_view``."""
    height, width = pixels.shape[:2]
    longer = int(spec.resize * max(height, width) / min(height, width))
    new_height, new_width = (longer, spec.resize) if width <= height else (spec.resize, longer)
    top, left = round((new_height - spec.size) / 2), round((new_width - spec.size) / 2)
    return _pil_resize(pixels, new_height, new_width)[top : top + spec.size, left : left + spec.size]


def _pil_resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _square(flat_BP: Tensor, size: int) -> Tensor:
    """(B, C, S, S) of (B, S x S x C)."""
    return flat_BP.reshape(len(flat_BP), size, size, -1).permute(0, 3, 1, 2)


@contextlib.contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold ``file`` against all other processes that ask; given back also when this process is killed."""
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
