"""What the three loaders share: which rows, in which order, and how what was read becomes a Batch.

A loader differs from the others only in how it reads: it implements ``_blocks``. Everything that decides *what* is
delivered is here, as pure functions of (seed, epoch, rank, world), so that no loader can deviate.

Two paths. Images of one size travel to the device as they are, in uint8, and all of the augmentation happens there,
batched; one read serves all views. Images of any size are cropped and resized on the CPU, view by view, with the box
the counter stream draws; crops of one size travel, and the rest of the augmentation happens on the device.

A view may also be of another image, that of a neighbour of the row: which one is drawn here too, and a reader is asked
for the images of all of them at once, row by row.

Shape letters: N rows of the data set, B rows of a batch on this rank, V views, S side of a view in pixels, H W height
and width of a source image, C channels, M rows of the stream, I images read per row: its own, then its neighbours'.
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
from raycon.core.stream import batch_rows, epoch_order, key, shard_range, uniforms
from raycon.core.types import Batch, Images, LoaderPlan, Snapshot
from raycon.nn import views
from raycon.nn.views import EvalSpec, ViewSpec

from .datasets import ImageSet

_NEIGHBOUR = 0x4E16
SCAN_ROWS = 256
"""Least rows per block of ``scan``, where no batch size is asked for."""


class Block(NamedTuple):
    """Consecutive rows of the stream as they were read."""

    row: NDArray[np.int64]
    """(B,)."""
    label: NDArray[np.int64]
    """(B,) weak labels."""
    image: NDArray[np.uint8]
    """(B, I, H, W, C) whole images of one size; or (B, P): each row's views, cropped, one after the other."""


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
        self.stopwatch: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def train(self, epoch: int, first_step: int = 0, snapshot: Snapshot | None = None) -> Iterator[Batch]:
        """See core/types.py. Raises ValueError naming an image that cannot be read."""
        plan = self.plan
        rows = self._train_rows(epoch, first_step, snapshot)
        source_MI = sources(plan, rows, epoch, None if snapshot is None else snapshot.neighbours)
        for block in self._blocks(source_MI, self.local, epoch):
            with self.stopwatch:
                image = torch.from_numpy(block.image).to(plan.device)
                if self.dataset.image is not None:
                    made = self._views(image.permute(0, 1, 4, 2, 3), block.row, epoch)
                else:
                    made = self._finish(image, block.row, epoch)
            yield Batch(
                made, torch.from_numpy(block.row).to(plan.device), torch.from_numpy(block.label).to(plan.device)
            )

    def scan(self) -> Iterator[Images]:
        """See core/types.py. Raises ValueError naming an image that cannot be read."""
        plan, spec = self.plan, self.plan.eval_spec
        rows = np.arange(*shard_range(self.rows, plan.rank, plan.world))
        for block in self._blocks(rows[:, None], max(self.local, SCAN_ROWS), None):
            image = torch.from_numpy(block.image).to(plan.device)
            if self.dataset.image is not None:
                image = image[:, 0].permute(0, 3, 1, 2)
            else:  # resized and cut out already
                image = _square(image, spec.size)
                spec = dataclasses.replace(spec, resize=spec.size)
            yield Images(views.eval_view(image, spec, plan.channels_last), torch.from_numpy(block.row).to(plan.device))

    def close(self) -> None:  # noqa: B027
        """Give back processes and files, where there are any; the loader is not used afterwards."""

    @abstractmethod
    def _blocks(self, source_MI: NDArray[np.int64], size: int, epoch: int | None) -> Iterator[Block]:
        """M rows of the stream in their order, ``size`` at a time, the last block with what is left; epoch None: for
        ``scan``. Column 0 has the row itself, the others the rows whose images are read with it."""

    def _train_rows(self, epoch: int, first_step: int, snapshot: Snapshot | None) -> NDArray[np.int64]:
        """The rows of this rank from ``first_step`` to the end of the epoch, ``self.local`` per step."""
        plan, order = self.plan, epoch_order(self.plan.seed, epoch, self.rows)
        if plan.group > 1 and plan.group_by_label:
            weak = self.dataset.weak
            order = grouped(order, np.where(weak < 0, -1 - np.arange(len(weak)), weak), plan.group)
        elif plan.group > 1 and snapshot is not None and snapshot.assignment:
            order = grouped(order, snapshot.assignment[0].numpy(), plan.group)
        parts = [batch_rows(order, step, plan.batch, plan.rank, plan.world) for step in range(first_step, self.steps)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _views(self, images_BICHW: Tensor, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        """The views of whole images."""
        plan, specs = self.plan, specs_of(self.plan, epoch)
        own = len(specs) - plan.neighbour_views
        made = views.batch_views(images_BICHW[:, 0], rows, specs[:own], plan.seed, epoch, plan.channels_last)
        for view in range(own, len(specs)):
            numbers = uniforms(plan.seed, epoch, rows, view, views.SLOTS)
            params = views.draw(specs[view], numbers, *images_BICHW.shape[3:])
            images = images_BICHW[:, 1 + view - own]
            made += (views.make_view(images, specs[view], params, plan.channels_last),)
        return made

    def _finish(self, crops_BP: Tensor, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        """The views of crops that ``crops_of`` made: what is left is the flip and the colours."""
        plan, specs = self.plan, specs_of(self.plan, epoch)
        parts = crops_BP.split([len(self.dataset.mean) * spec.size**2 for spec in specs], dim=1)
        made = []
        for view, (spec, part) in enumerate(zip(specs, parts, strict=True)):
            numbers = uniforms(plan.seed, epoch, rows, view, views.SLOTS)
            params = views.draw(spec, numbers, spec.size, spec.size)  # the box, made for another size, is not used
            crop = _square(part, spec.size)
            made.append(views.finish(crop, spec, params, flip=True, channels_last=plan.channels_last))
        return tuple(made)


def specs_of(plan: LoaderPlan, epoch: int) -> tuple[ViewSpec, ...]:
    """The views of an epoch."""
    return plan.warmup_specs if epoch < plan.warmup_epochs else plan.specs


def grouped(order_N: NDArray[np.int64], cluster_N: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """An order of the rows 0..N-1 in which each ``size`` rows, from the first on, are of one cluster as far as possible.

    order_N: a random order; which rows of a cluster come together, and when, follows from it. What is left over of
    each cluster fills groups of its own among the others.
    """
    by_cluster = order_N[np.argsort(cluster_N[order_N], kind="stable")]
    _, first, count = np.unique(cluster_N[by_cluster], return_index=True, return_counts=True)
    whole = np.arange(len(order_N)) - np.repeat(first, count) < np.repeat(count // size * size, count)
    left = np.ones(len(order_N), dtype=bool)
    left[by_cluster[whole]] = False
    rest = order_N[left[order_N]]
    cut = len(rest) // size * size
    groups = np.concatenate([by_cluster[whole], rest[:cut]]).reshape(-1, size)
    # Each group where its first row stood.
    place = np.empty_like(order_N)
    place[order_N] = np.arange(len(order_N))
    return np.concatenate([groups[np.argsort(place[groups[:, 0]])].reshape(-1), rest[cut:]])


def sources(plan: LoaderPlan, row_M: NDArray[np.int64], epoch: int, neighbours_NK: Tensor | None) -> NDArray[np.int64]:
    """(M, I) the rows whose images are read: the row itself, then for each neighbour view one of its neighbours.

    Which of the K is a function of (seed, epoch, row, view), uniform. Without neighbours: the row itself again.
    """
    columns = [row_M]
    for view in range(len(plan.specs) - plan.neighbour_views, len(plan.specs)):
        if neighbours_NK is None:
            columns.append(row_M)
            continue
        # A stream of its own, so that the views keep their numbers.
        u_M = uniforms(key(plan.seed, _NEIGHBOUR), epoch, row_M, view, 1)[:, 0].astype(np.float64)
        choice_M = (u_M * neighbours_NK.shape[1]).astype(np.int64)
        columns.append(neighbours_NK.cpu().numpy()[row_M, choice_M])
    return np.stack(columns, axis=1)


def read_block(dataset: ImageSet, plan: LoaderPlan, source_BI: NDArray[np.int64], epoch: int | None) -> Block:
    """Rows read by the data set itself; crops when its images have many sizes. Raises ValueError naming the image."""
    rows = source_BI[:, 0]
    if dataset.image is not None:
        image = dataset.block(source_BI.reshape(-1))
        image = image.reshape(*source_BI.shape, *image.shape[1:])
    else:
        image = crops_of((dataset.read(row) for row in source_BI.reshape(-1).tolist()), plan, rows, epoch)
    return Block(rows, dataset.weak[rows], image)


def crops_of(
    images: Iterable[NDArray[np.uint8]], plan: LoaderPlan, rows: NDArray[np.int64], epoch: int | None
) -> NDArray[np.uint8]:
    """(B, P) uint8: per row, in the order of ``rows``, all views' (S, S, C) crops one after the other.

    images: (H, W, C) each, B x I of them: after a row's own image those for its neighbour views. Resized like PIL does,
    rounded to whole grey values. For epoch None the evaluation view's crop.
    """
    images = iter(images)
    if epoch is None:
        return np.stack([_centre(pixels, plan.eval_spec).reshape(-1) for pixels in images])
    specs = specs_of(plan, epoch)
    numbers = [uniforms(plan.seed, epoch, rows, view, views.SLOTS) for view in range(len(specs))]
    crops = []
    for at in range(len(rows)):
        pixels, parts = next(images), []
        for view, spec in enumerate(specs):
            if view >= len(specs) - plan.neighbour_views:
                pixels = next(images)
            box = views.draw(spec, numbers[view][at : at + 1], *pixels.shape[:2]).box[0]
            parts.append(_resized(pixels, box, spec.size).reshape(-1))
        crops.append(np.concatenate(parts))
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
