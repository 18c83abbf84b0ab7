"""One decode of a photo that feeds all its views: libjpeg-turbo called directly, and PIL's resize in compiled loops.

Both give PIL's pixels bit for bit, so that a machine without them (``PIL`` alone) reads the same data, only slower. What
TurboJPEG does not answer with a plain success (another format, CMYK, a damaged file, ...) is left to PIL, which reads
it or says what is wrong. Importing this module needs Numba; ``common`` does without it where there is none.

Shape letters: H W height and width of the source, S T height and width of the result.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import threading
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

PRECISION_BITS: Final = 22
"""PIL's fixed point: an 8-bit value times a weight of so many bits, and their sum, fit 32 bits with a sign."""
_HALF: Final = 1 << (PRECISION_BITS - 1)
_TAPS: Final = 4  # source pixels that ``_weigh`` takes at a time
_SPARE: Final = 10
"""Lines that must be readable after the last of a source: an output pixel takes its taps four at a time, at most twice
as many as a line has pixels, and eight."""
_RGBX: Final = 2  # TurboJPEG's pixel format: red, green, blue, 255

_compiled: Any = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")


class _Thread(threading.local):
    """What each thread has of its own: a decompressor, and room for the pixels of one image."""

    def __init__(self) -> None:
        self.handle = None if _library() is None else _library().tjInitDecompress()
        self.numbers = [ctypes.c_int() for _ in range(4)]
        self.pixels = np.empty(0, np.uint32)


@functools.cache
def _library() -> Any:
    """libturbojpeg by the functions of TurboJPEG 2, which later versions have too; None where it is not installed."""
    name = ctypes.util.find_library("turbojpeg")
    try:
        library = ctypes.CDLL(name) if name else None
    except OSError:
        return None
    if library is None or not hasattr(library, "tjDecompress2"):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.tjInitDecompress.restype = pointer
    library.tjDecompressHeader3.argtypes = [pointer, pointer, ctypes.c_ulong, *[ctypes.POINTER(number)] * 4]
    library.tjDecompress2.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, *[number] * 5]
    return library


_mine = _Thread()


def room(height: int, width: int) -> NDArray[np.uint32]:
    """(height, width) pixels to write an image into that ``resize`` is to read. The thread's next call gives it again."""
    needed = (height + _SPARE) * width
    if needed > len(_mine.pixels):
        _mine.pixels = np.zeros(needed, np.uint32)
    return _mine.pixels[: height * width].reshape(height, width)


def size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """(height, width) of a JPEG; None for what TurboJPEG does not read, or where it is not installed."""
    if _mine.handle is None:
        return None
    failed = _library().tjDecompressHeader3(_mine.handle, data.ctypes.data, len(data), *_mine.numbers)
    width, height = _mine.numbers[:2]
    return None if failed else (height.value, width.value)


def decode(data: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint32] | None:
    """The ``room`` with the pixels of a JPEG of that ``size``, red in the lowest byte; None where anything was amiss."""
    pixels = room(height, width)
    failed = _library().tjDecompress2(
        _mine.handle, data.ctypes.data, len(data), pixels.ctypes.data, width, 0, height, _RGBX, 0
    )
    return None if failed else pixels


def _weigher(groups: int) -> Any:
    """The rounded, weighted sum of 4 x ``groups`` neighbouring pixels, as vector instructions; 0: of any number.

    Called with addresses: of 4-byte pixels, of as many times 4 int32 (each weight four times), of the 4 bytes of the
    result; and with the number of groups. Numba's loops cannot say this: LLVM would have to recognise the channels of a
    pixel as one vector.
    """
    byte, word, lanes = ir.IntType(8), ir.IntType(32), 4 * _TAPS
    bytes_type, words_type, pixel_type = ir.VectorType(byte, lanes), ir.VectorType(word, lanes), ir.VectorType(byte, 4)

    def group(builder: Any, source: Any, weight: Any, number: Any) -> Any:
        start = builder.mul(number, ir.Constant(number.type, lanes))
        at = builder.inttoptr(builder.add(source, start), bytes_type.as_pointer())
        factors_at = builder.add(weight, builder.shl(start, ir.Constant(start.type, 2)))
        factors = builder.load(builder.inttoptr(factors_at, words_type.as_pointer()), align=4)
        return builder.mul(builder.zext(builder.load(at, align=1), words_type), factors)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, weight, target, many = arguments
        if groups:
            whole = group(builder, source, weight, ir.Constant(many.type, 0))
            for number in range(1, groups):
                whole = builder.add(whole, group(builder, source, weight, ir.Constant(many.type, number)))
        else:
            total = cgutils.alloca_once_value(builder, ir.Constant(words_type, [0] * lanes))
            with cgutils.for_range(builder, many) as loop:
                builder.store(builder.add(builder.load(total), group(builder, source, weight, loop.index)), total)
            whole = builder.load(total)
        for half in (lanes // 2, lanes // 4):  # the sum over the pixels: a half on the other half, twice
            places = [ir.Constant(ir.VectorType(word, half), list(range(n, n + half))) for n in (0, half)]
            whole = builder.add(*(builder.shuffle_vector(whole, whole, place) for place in places))
        rounded = builder.add(whole, ir.Constant(ir.VectorType(word, 4), [_HALF] * 4))
        shifted = builder.lshr(rounded, ir.Constant(ir.VectorType(word, 4), [PRECISION_BITS] * 4))
        builder.store(builder.trunc(shifted, pixel_type), builder.inttoptr(target, pixel_type.as_pointer()), align=1)
        return context.get_dummy_value()

    @intrinsic
    def weigh(typing: Any, source: Any, weight: Any, target: Any, many: Any) -> Any:
        return types.void(types.uintp, types.uintp, types.uintp, types.uintp), generate

    return weigh


_weigh_one, _weigh_two, _weigh_any = _weigher(1), _weigher(2), _weigher(0)


@_compiled
def _weights(length: int, size: int) -> Any:
    """(size,) first taps, (size,) numbers of taps, (size, a multiple of 4) weights of one axis in PIL's fixed point, and
    (4 x as many,) the same with each weight four times.

    PIL's bilinear filter: a triangle over ``length`` source pixels, widened by the scale where that is above 1,
    computed in double precision, each weight rounded.
    """
    scale = length / size
    support = max(scale, 1.0)
    # A window of 2 x support holds at most so many centres of pixels that have a weight.
    most = (int(np.ceil(2 * support)) + 1 + _TAPS - 1) // _TAPS * _TAPS
    first = np.empty(size, np.int64)
    count = np.empty(size, np.int64)
    weight = np.zeros((size, most), np.int32)
    raw = np.empty(most, np.float64)
    for out in range(size):
        centre = (out + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), length) - low
        total = 0.0
        for tap in range(taps):
            raw[tap] = max(1.0 - abs((tap + low - centre + 0.5) * (1.0 / support)), 0.0)
            total += raw[tap]
        for tap in range(taps):
            weight[out, tap] = int(0.5 + raw[tap] * (1.0 / total) * (1 << PRECISION_BITS))
        while taps > 1 and weight[out, taps - 1] == 0:
            taps -= 1
        first[out], count[out] = low, taps
    fourfold = np.empty(size * most * 4, np.int32)
    for at in range(fourfold.size):
        fourfold[at] = weight[at // 4 // most, at // 4 % most]
    return first, count, weight, fourfold


@_compiled
def _across(source: Any, top: int, height: int, left: int, width: int, size: int) -> Any:
    """(height, 3 x size) bytes: ``height`` lines of ``source`` from ``top`` on, ``width`` pixels of each resized."""
    first, _, weight, fourfold = _weights(width, size)
    most = weight.shape[1]
    # A pixel is stored as four bytes, the last of which the next one writes again: hence one byte more.
    out = np.empty(height * size * 3 + 1, np.uint8)
    from_, to, factors = source.ctypes.data, out.ctypes.data, fourfold.ctypes.data
    stride = source.shape[1]
    groups = most // _TAPS
    for y in range(height):
        line, end = from_ + 4 * ((top + y) * stride + left), to + 3 * size * y
        if groups == 1:
            for x in range(size):
                _weigh_one(line + 4 * first[x], factors + 16 * most * x, end + 3 * x, groups)
        elif groups == 2:
            for x in range(size):
                _weigh_two(line + 4 * first[x], factors + 16 * most * x, end + 3 * x, groups)
        else:
            for x in range(size):
                _weigh_any(line + 4 * first[x], factors + 16 * most * x, end + 3 * x, groups)
    return out[:-1].reshape(height, 3 * size)


@_compiled
def _down(lines: Any, top: int, height: int, left: int, width: int, size: int, target: Any) -> None:
    """Bytes left .. left + width of ``height`` lines from ``top`` on, resized to the first ``size`` lines of ``target``."""
    first, count, weight, _ = _weights(height, size)
    sums = np.empty(width, np.int32)
    for out in range(size):
        w = weight[out, 0]
        line = lines[top + first[out], left : left + width]
        for j in range(width):
            sums[j] = np.int32(line[j]) * w + np.int32(_HALF)
        for tap in range(1, count[out]):
            w = weight[out, tap]
            line = lines[top + first[out] + tap, left : left + width]
            for j in range(width):
                sums[j] += np.int32(line[j]) * w
        row = target[out]
        for j in range(width):
            row[j] = np.uint8(sums[j] >> PRECISION_BITS)


@_compiled
def resize(source: Any, top: int, left: int, height: int, width: int, target: Any) -> None:
    """What PIL's ``crop`` and ``resize`` with BILINEAR give, bit for bit (Pillow 13; before, which always went across
    first, some values differ by one where the height loses much more than the width).

    source: (H, W) uint32 of ``room``, with the box inside; target: (S, T, 3) uint8, contiguous. Two passes with
    rounding to bytes between them, as PIL: across, then down; or down first where the height loses more than twice as many pixels as the width.
    """
    size, wide = target.shape[0], target.shape[1]
    out = target.reshape(size, 3 * wide)
    if height > size and height - size > 2 * (width - wide):
        short = np.empty((size + _SPARE, width), np.uint32)
        _down(source.view(np.uint8), top, height, 4 * left, 4 * width, size, short.view(np.uint8))
        small = _across(short, 0, size, 0, width, wide)
        for y in range(size):  # in loops: Numba's assignment of a slice is a hundred times slower
            for x in range(3 * wide):
                out[y, x] = small[y, x]
    else:
        _down(_across(source, top, height, left, width, wide), 0, height, 0, 3 * wide, size, out)
