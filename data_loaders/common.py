"""What the three loaders share: which rows, in which order, and how what was read becomes a Batch.

A loader differs from the others only in how it reads: it implements ``_blocks``. Everything that decides *what* is
delivered is here, as pure functions of (seed, epoch, rank, world), so that no loader can deviate.

Two paths. Images of one size travel to the device as they are, in uint8, and all of the augmentation happens there;
one read serves all views. Images of any size are decoded once, and cropped and resized on the CPU, view by view, with
the box the counter stream draws; crops of one size travel, and the rest of the augmentation happens on the device.

The augmentation is batched (raycon.nn.views) or, on a CPU, fused into compiled loops (fused.py): ``uses_fused``.

A view may also be of another image, that of a neighbour of the row: which one is drawn here too, and a reader is asked
for the images of all of them at once, row by row.

Shape letters: N rows of the data set, B rows of a batch on this rank, V views, S side of a view in pixels, H W height
and width of a source image, C channels, M rows of the stream, I images read per row: its own, then its neighbours'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
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

from .datasets import FileSet, ImageSet
from .photos import Photo, Pixels, size_of

_NEIGHBOUR = 0x4E16
FUSED_VALUES = 2**26
"""Values in all views of an epoch from which ``data.augment = auto`` fuses: below, compiling would take longer."""
SCAN_ROWS = 256
"""Least rows per block of ``scan``, where no batch size is asked for."""


class Block(NamedTuple):
    """Consecutive rows of the stream as they were read."""

    row: NDArray[np.int64]
    """(B,)."""
    label: NDArray[np.int64]
    """(B,) weak labels."""
    image: NDArray[np.uint8] | tuple[Tensor, ...]
    """(B, I, H, W, C) whole images of one size; or (B, P): each row's views, cropped, one after the other; or the
    views themselves, as ``StreamLoader.augment`` makes them."""


class StreamLoader(ABC):
    """The Loader contract of core/types.py; a subclass reads."""

    kind: str
    """ffcv, ray or torch."""

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        """Raises ConfigError when the global batch does not divide over the ranks or is larger than the data set, and
        when fused augmentation is asked for where there is none."""
        if plan.batch % plan.world:
            raise ConfigError([f"train.batch = {plan.batch} does not divide over {plan.world} ranks"])
        if plan.batch > len(dataset):
            raise ConfigError([f"train.batch = {plan.batch} is more than the {len(dataset)} images of {dataset.name}"])
        self.dataset = dataset
        self.plan = plan
        self.fused = uses_fused(dataset, plan)
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
            if isinstance(block.image, tuple):
                made = block.image
            else:
                with self.stopwatch:
                    made = self.augment(block.image, block.row, epoch, torch.get_num_threads())
            yield Batch(
                made, torch.from_numpy(block.row).to(plan.device), torch.from_numpy(block.label).to(plan.device)
            )

    def scan(self) -> Iterator[Images]:
        """See core/types.py. Raises ValueError naming an image that cannot be read."""
        plan, spec = self.plan, self.plan.eval_spec
        rows = np.arange(*shard_range(self.rows, plan.rank, plan.world))
        for block in self._blocks(rows[:, None], max(self.local, SCAN_ROWS), None):
            assert not isinstance(block.image, tuple), "views in place of images"
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

    def augment(
        self, image: NDArray[np.uint8], rows: NDArray[np.int64], epoch: int, threads: int
    ) -> tuple[Tensor, ...]:
        """The views of a block's images or crops. ``threads``: of the fused form; the batched one uses torch's."""
        plan, specs, whole = self.plan, specs_of(self.plan, epoch), self.dataset.image is not None
        own, first, made = len(specs) - plan.neighbour_views, 0, []
        moved: Tensor | None = None
        for view, spec in enumerate(specs):
            numbers = uniforms(plan.seed, epoch, rows, view, views.SLOTS)
            # Of crops the box was drawn before, for the size of the image: here it is not used.
            params = views.draw(spec, numbers, *(image.shape[2:4] if whole else (spec.size, spec.size)))
            which = max(0, 1 + view - own)
            if self.fused and _fused().serves(spec):
                form = _fused().views_of if whole else _fused().views_of_crops
                made.append(form(image, which if whole else first, spec, params, plan.channels_last, threads))
            else:
                moved = torch.from_numpy(image).to(plan.device) if moved is None else moved
                if whole:
                    images = moved[:, which].permute(0, 3, 1, 2)
                    made.append(views.make_view(images, spec, params, plan.channels_last))
                else:
                    crop = _square(moved[:, first : first + spec.channels * spec.size**2], spec.size)
                    made.append(views.finish(crop, spec, params, flip=True, channels_last=plan.channels_last))
            first += spec.channels * spec.size**2
        return tuple(view.bfloat16() for view in made) if plan.bf16 else tuple(made)

    def all_fused(self, epoch: int) -> bool:
        """Whether every view of the epoch is made by compiled loops, which other threads may run."""
        return self.fused and all(_fused().serves(spec) for spec in specs_of(self.plan, epoch))


@functools.cache
def _fused() -> ModuleType:
    from . import fused

    return fused


def uses_fused(dataset: ImageSet, plan: LoaderPlan) -> bool:
    """Whether views are made by compiled loops (fused.py) or batched, by ``data.augment``.

    auto: on a CPU, where Numba is installed and an epoch is long enough to be worth compiling for; a function of the
    plan and the machine alone, so all ranks and loaders agree. ConfigError where "fused" cannot be.
    """
    installed = importlib.util.find_spec("numba") is not None
    if plan.augment == "fused":
        if plan.device.type != "cpu":
            raise ConfigError(
                [f"data.augment = 'fused' works on the CPU, not on {plan.device}: choose batched or auto"]
            )
        if not installed:
            raise ConfigError(["data.augment = 'fused' needs Numba: pip install 'raycon[fast]', or choose batched"])
        return True
    values = len(dataset) * sum(spec.channels * spec.size**2 for spec in plan.specs)
    return plan.augment == "auto" and plan.device.type == "cpu" and installed and values >= FUSED_VALUES


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
    if not plan.neighbour_views:
        return row_M[:, None]
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
        assert isinstance(dataset, FileSet), "a data set without a fixed image size has files"
        wanted = source_BI.reshape(-1).tolist()
        photos = [
            Photo(np.frombuffer(data, np.uint8), dataset.where(row))
            for row, data in zip(wanted, dataset.encoded_many(wanted), strict=True)
        ]
        image = crops_of(photos, plan, rows, epoch)
    return Block(rows, dataset.weak[rows], image)


def crops_of(
    photos: Sequence[Photo], plan: LoaderPlan, rows: NDArray[np.int64], epoch: int | None, threads: int = 1
) -> NDArray[np.uint8]:
    """(B, P) uint8: per row, in the order of ``rows``, all views' (S, S, C) crops one after the other.

    photos: B x I of them: after a row's own image those for its neighbour views. Each is decoded once. Resized like PIL
    does, rounded to whole grey values. For epoch None the evaluation view's crop. Raises ValueError naming an image.
    """
    if epoch is None:
        side = plan.eval_spec.size
        out = np.empty((len(photos), side * side * 3), np.uint8)

        def centre(at: int) -> None:
            _centre(photos[at], plan.eval_spec, out[at].reshape(side, side, 3))

        _each(centre, len(photos), threads)
        return out
    specs, images = specs_of(plan, epoch), 1 + plan.neighbour_views
    sizes = [size_of(photo) for photo in photos]
    sizes_BI2 = np.array(sizes).reshape(len(rows), images, 2)
    image_of = [max(0, 1 + view - (len(specs) - plan.neighbour_views)) for view in range(len(specs))]
    ends = np.cumsum([spec.channels * spec.size**2 for spec in specs])
    boxes = []
    for view, spec in enumerate(specs):
        numbers = uniforms(plan.seed, epoch, rows, view, views.SLOTS)
        boxes.append(views.draw(spec, numbers, *sizes_BI2[:, image_of[view]].T).box.astype(int).tolist())
    out = np.empty((len(rows), ends[-1]), np.uint8)

    def cut(at: int) -> None:
        for image in range(images):
            pixels = Pixels(photos[at * images + image], sizes[at * images + image])
            for view, spec in enumerate(specs):
                if image_of[view] == image:
                    part = out[at, ends[view] - spec.channels * spec.size**2 : ends[view]]
                    pixels.crop(boxes[view][at], part.reshape(spec.size, spec.size, spec.channels))

    _each(cut, len(rows), threads)
    return out


def _each(work: Callable[[int], None], count: int, threads: int) -> None:
    """``work`` of 0 .. count - 1, in so many threads; the first exception is raised."""
    if threads <= 1:
        for at in range(count):
            work(at)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(count)))


def _centre(photo: Photo, spec: EvalSpec, target: NDArray[np.uint8]) -> None:
    """(S, S, C): the shorter side resized to ``spec.resize``, the centre cut out; sizes as in ``views.eval_view``."""
    height, width = size_of(photo)
    longer = int(spec.resize * max(height, width) / min(height, width))
    new_height, new_width = (longer, spec.resize) if width <= height else (spec.resize, longer)
    top, left = round((new_height - spec.size) / 2), round((new_width - spec.size) / 2)
    whole = np.empty((new_height, new_width, 3), np.uint8)
    Pixels(photo, (height, width)).crop((0, 0, height, width), whole)
    target[...] = whole[top : top + spec.size, left : left + spec.size]


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
