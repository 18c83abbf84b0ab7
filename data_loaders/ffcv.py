"""The FFCV loader: one read of the .beton serves all views of a batch.

The .beton is written once into ``plan.cache`` (write_ffcv.py). One ffcv.loader.Loader is built, and its compiled code
kept, for the whole run; the order of each epoch, and of a start in the middle of one, is ours. Importing FFCV takes
about three seconds and compiling about one, so nothing is imported before a loader is opened.

FFCV reads in a thread of its own, ahead of the training. What a CPU can do there is an operation of its pipeline that
asks for each sample's row: files are decoded and cropped in it, and with fused augmentation (see common.py) the views
are finished in it, ``plan.workers`` images at a time. The code is that of the other loaders, so the pixels are too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.types import LoaderPlan

from .common import Block, StreamLoader, crops_of
from .datasets import FileSet, ImageSet
from .photos import Photo
from .write_ffcv import ensure_beton, import_ffcv


class FfcvLoader(StreamLoader):
    kind = "ffcv"

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        """Raises ImportError, saying what to install, where FFCV is absent; ConfigError, ValueError: see ensure_beton."""
        super().__init__(dataset, plan)
        import_ffcv()  # first: what it says of a missing FFCV, and what it keeps FFCV from doing
        self._file = ensure_beton(dataset, plan.cache or Path.home() / ".cache" / "raycon")
        self._content = np.memmap(self._file, np.uint8, mode="r").view(np.ndarray)
        self._epoch: int | None = None  # of the iteration that goes on
        self._images = 1
        self._reader = _open(self._file, self.local, plan.workers, dataset.image is not None, self._made)

    def _blocks(self, source_MI: NDArray[np.int64], size: int, epoch: int | None) -> Iterator[Block]:
        rows, images = source_MI.reshape(-1), source_MI.shape[1]
        size *= images
        self._epoch, self._images = epoch, images
        # FFCV's Loader looks at these two when an iteration starts. It takes no order of one's own any other way: its
        # argument of that name only accepts an instance that is also callable.
        self._reader.traversal_order, self._reader.batch_size = _Order(rows), size
        batches = iter(self._reader)
        try:
            for first, (image, row, label) in zip(range(0, len(rows), size), batches, strict=True):
                if isinstance(image, Exception):
                    raise image
                # The arrays are FFCV's buffers, written again some batches later: what lives longer is copied.
                row, label = row[:, 0].copy(), label[:, 0].copy()
                assert np.array_equal(row, rows[first : first + size]), "FFCV delivered other rows than were asked for"
                yield Block(row[::images], label[::images], image)
        finally:
            batches.close()
            while batches.is_alive():  # stopped early: its thread may be waiting for room to deliver in
                with contextlib.suppress(queue.Empty):
                    batches.output_queue.get(timeout=0.01)

    def _made(self, image: NDArray[Any], row: NDArray[np.int64]) -> NDArray[np.uint8] | tuple[Tensor, ...] | Exception:
        """In FFCV's thread: a batch as it was read, and its rows, to what ``Block`` has of it.

        An exception is a result too: FFCV's thread would die of it, and the training wait for ever.
        """
        try:
            epoch, threads, stream_rows = self._epoch, max(self.plan.workers, 1), row[:: self._images]
            if self.dataset.image is None:
                assert isinstance(self.dataset, FileSet)
                photos = [
                    Photo(self._content[start : start + length], self.dataset.where(number))
                    for (start, length), number in zip(image.tolist(), row.tolist(), strict=True)
                ]
                whole = crops_of(photos, self.plan, stream_rows, epoch, threads)
            else:
                whole = image.reshape(-1, self._images, *image.shape[1:])
            return (
                whole
                if epoch is None or not self.all_fused(epoch)
                else self.augment(whole, stream_rows, epoch, threads)
            )
        except Exception as error:
            return error


class _Order:
    def __init__(self, rows: NDArray[np.int64]) -> None:
        self._rows = rows

    def sample_order(self, epoch: int) -> NDArray[np.int64]:
        return self._rows


def _open(file: Path, batch: int, threads: int, fixed_size: bool, make: Callable[..., Any]) -> Any:
    """An ffcv.loader.Loader that gives (``make`` of images or of their places in the file, and of rows; row, label)."""
    import ffcv.fields.basics
    import ffcv.fields.bytes
    import ffcv.fields.ndarray
    import ffcv.loader.loader
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State

    class Place(ffcv.fields.bytes.BytesDecoder):  # type: ignore[misc, name-defined]
        """Where an image's bytes are, instead of a copy of them in a buffer as large as the largest image."""

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
            state = State(jit_mode=True, device=previous_state.device, shape=(2,), dtype=np.dtype("<i8"))
            return state, AllocationQuery((2,), np.dtype("<i8"))

        def generate_code(self) -> Callable[..., Any]:
            def places(rows: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
                for at in range(len(rows)):
                    destination[at, 0] = metadata[rows[at]]["ptr"]
                    destination[at, 1] = metadata[rows[at]]["size"]
                return destination

            return places

    class Make(Operation):  # type: ignore[misc]
        """Plain Python that calls compiled code: FFCV gives it the rows, and passes on whatever it returns."""

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
            return dataclasses.replace(previous_state, jit_mode=False), None

        def generate_code(self) -> Callable[..., Any]:
            def made(images: Any, _: None, rows: Any) -> Any:
                return make(images, rows)

            made.with_indices = True  # type: ignore[attr-defined]
            return made

    class LeanManager(OSCacheManager):  # type: ignore[misc]
        """FFCV's own, without its tables of one Python object per image (4 s and 600 MB at 1.3 M images)."""

        def __init__(self, reader: Any) -> None:
            order = np.argsort(reader.alloc_table["ptr"])
            self.reader = reader
            self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
            self.context = OSCacheContext(self)

    ffcv.loader.loader.OSCacheManager = LeanManager
    return ffcv.loader.loader.Loader(
        str(file),
        batch_size=batch,
        num_workers=max(threads, 1),
        os_cache=True,
        pipelines={
            "image": [ffcv.fields.ndarray.NDArrayDecoder() if fixed_size else Place(), Make()],
            "row": [ffcv.fields.basics.IntDecoder()],
            "label": [ffcv.fields.basics.IntDecoder()],
        },
        drop_last=False,  # the order ends where the epoch ends
    )
