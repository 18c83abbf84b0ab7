"""Image files of any size: one decode of each feeds the crops of all its views, as PIL would make them.

With Numba installed JPEGs are decoded by libturbojpeg (where that is installed too) and crops are resized in compiled
loops (jpeg.py); without it PIL does both. The pixels are the same, bit for bit.

Shape letters: H W height and width of an image in pixels, S T of a crop.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .datasets import decode


class Photo(NamedTuple):
    """An image file in memory."""

    data: NDArray[np.uint8]
    """(bytes,) of the file."""
    name: str
    """What an error calls it."""


@functools.cache
def _jpeg() -> Any:
    """The module jpeg, None without Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    from . import jpeg

    return jpeg


def size_of(photo: Photo) -> tuple[int, int]:
    """(height, width), from the head of the file. Raises ValueError naming the image when it is not one."""
    from PIL import Image

    if (jpeg := _jpeg()) is not None:
        size = jpeg.size(photo.data)
        # What PIL would call a decompression bomb is left to PIL.
        if size is not None and size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 0):
            return int(size[0]), int(size[1])
    try:
        with Image.open(io.BytesIO(photo.data.tobytes())) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        height, width, _ = decode(photo.data.tobytes(), photo.name).shape  # says what is wrong
        return height, width


class Pixels:
    """The decoded pixels of one photo. A thread has one at a time: the next one takes its place in memory."""

    def __init__(self, photo: Photo, size: tuple[int, int]) -> None:
        """``size``: of ``size_of``. Raises ValueError naming the image when it cannot be read to its end."""
        self._packed = self._plain = None
        if (jpeg := _jpeg()) is not None:
            self._packed = jpeg.decode(photo.data, *size)
        if self._packed is None:
            self._plain = decode(photo.data.tobytes(), photo.name)
            if jpeg is not None:
                self._packed = jpeg.room(*self._plain.shape[:2])
                self._packed[...] = self._plain

    def crop(self, box: tuple[int, int, int, int], target_ST3: NDArray[np.uint8]) -> None:
        """Write the box (top, left, height, width), resized, into the (contiguous) target."""
        top, left, height, width = box
        if self._packed is not None:
            _jpeg().resize(self._packed, top, left, height, width, target_ST3)
            return
        from PIL import Image

        assert self._plain is not None
        part = Image.fromarray(self._plain[top : top + height, left : left + width])
        size = target_ST3.shape[1], target_ST3.shape[0]
        target_ST3[...] = np.asarray(part.resize(size, Image.Resampling.BILINEAR))
