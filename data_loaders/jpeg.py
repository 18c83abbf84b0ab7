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
_RGB: Final = 0  # TurboJPEG's pixel format

_compiled: Any = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")


class _Thread(threading.local):
    """What each thread has of its own: a decompressor, and room for the pixels of one image."""

    def __init__(self) -> None:
        self.handle = None if _library() is None else _library().tjInitDecompress()
        self.numbers = [ctypes.c_int() for _ in range(4)]
        self.pixels = np.empty(0, np.uint8)

    def renew(self) -> None:
        """A new decompressor: one that met a damaged file gives that file's predecessor's size for its successor."""
        _library().tjDestroy(self.handle)
        self.handle = _library().tjInitDecompress()


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
    library.tjDestroy.argtypes = [pointer]
    library.tjDecompressHeader3.argtypes = [pointer, pointer, ctypes.c_ulong, *[ctypes.POINTER(number)] * 4]
    library.tjDecompress2.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, *[number] * 5]
    return library


_mine = _Thread()


def room(height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) to write an image into that ``resize`` is to read. The thread's next call gives it again."""
    needed = 3 * (height + _SPARE) * width
    if needed > len(_mine.pixels):
        _mine.pixels = np.zeros(needed, np.uint8)
    return _mine.pixels[: 3 * height * width].reshape(height, width, 3)


def size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """(height, width) of a JPEG; None for what TurboJPEG does not read, or where it is not installed."""
    if _mine.handle is None:
        return None
    failed = _library().tjDecompressHeader3(_mine.handle, data.ctypes.data, len(data), *_mine.numbers)
    if failed:
        _mine.renew()
        return None
    width, height = _mine.numbers[:2]
    return height.value, width.value


def decode(data: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8] | None:
    """The ``room`` with the pixels of a JPEG of that ``size``; None where anything was amiss, and for other files."""
    if _mine.handle is None:
        return None
    pixels = room(height, width)
    failed = _library().tjDecompress2(
        _mine.handle, data.ctypes.data, len(data), pixels.ctypes.data, width, 0, height, _RGB, 0
    )
    if failed:
        _mine.renew()
        return None
    return pixels


def _weigher(groups: int) -> Any:
    """Rounded, weighted sums of neighbouring pixels, as vector instructions: Numba's loops cannot say this, LLVM would
    have to recognise the channels of a pixel as one vector.

    groups 1, 2: four output pixels at a time, each of 4 x ``groups`` source pixels; 0: one output pixel, of any number of
    groups. Called with addresses: of the line of source pixels (3 bytes each), of the int64 place of each first tap, of
    the weights (int32, each four times, 4 x groups per output pixel), of the result, which is written with four bytes
    (one pixel: one byte) more than it has; and with the number of groups.
    """
    byte, word, long, lanes = ir.IntType(8), ir.IntType(32), ir.IntType(64), 4 * _TAPS
    bytes_type, words_type = ir.VectorType(byte, lanes), ir.VectorType(word, lanes)
    spread = [3 * (lane // 4) + min(lane % 4, 2) for lane in range(lanes)]
    packed = [lane for lane in range(lanes) if lane % 4 < 3]

    def pick(builder: Any, one: Any, two: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(word, len(lanes)), lanes))

    def group(builder: Any, source: Any, weight: Any, number: Any) -> Any:
        start = builder.mul(number, ir.Constant(number.type, 3 * _TAPS))
        read = builder.load(builder.inttoptr(builder.add(source, start), bytes_type.as_pointer()), align=1)
        factors_at = builder.add(weight, builder.mul(number, ir.Constant(number.type, 4 * lanes)))
        factors = builder.load(builder.inttoptr(factors_at, words_type.as_pointer()), align=4)
        return builder.mul(builder.zext(pick(builder, read, read, spread), words_type), factors)

    def source_of(builder: Any, line: Any, first: Any, number: int) -> Any:
        at = builder.add(first, ir.Constant(first.type, 8 * number))
        place = builder.load(builder.inttoptr(at, long.as_pointer()), align=8)
        return builder.add(line, builder.mul(place, ir.Constant(long, 3)))

    def finish(builder: Any, total: Any, target: Any) -> None:
        count = total.type.count
        rounded = builder.add(total, ir.Constant(total.type, [_HALF] * count))
        shifted = builder.lshr(rounded, ir.Constant(total.type, [PRECISION_BITS] * count))
        values = builder.trunc(shifted, ir.VectorType(byte, count))
        if count == lanes:  # the fourth byte of each pixel goes out; what then is too much is written again later
            values = pick(builder, values, values, packed + [lanes - 1] * _TAPS)
        builder.store(values, builder.inttoptr(target, values.type.as_pointer()), align=1)

    def halves(builder: Any, one: Any, two: Any, of: list[int], step: int) -> Any:
        """The sum of two halves, ``step`` lanes apart, of both vectors."""
        low = of + [lanes + lane for lane in of]
        return builder.add(pick(builder, one, two, low), pick(builder, one, two, [lane + step for lane in low]))

    def four(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, first, weight, target, many = arguments
        totals = []
        for number in range(4):
            source = source_of(builder, line, first, number)
            factors = builder.add(weight, ir.Constant(weight.type, 4 * lanes * groups * number))
            total = group(builder, source, factors, ir.Constant(many.type, 0))
            for part in range(1, groups):
                total = builder.add(total, group(builder, source, factors, ir.Constant(many.type, part)))
            totals.append(total)
        pairs = [halves(builder, totals[n], totals[n + 1], list(range(8)), 8) for n in (0, 2)]
        finish(builder, halves(builder, pairs[0], pairs[1], [0, 1, 2, 3, 8, 9, 10, 11], 4), target)
        return context.get_dummy_value()

    def one(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, first, weight, target, many = arguments
        source = source_of(builder, line, first, 0)
        total = cgutils.alloca_once_value(builder, ir.Constant(words_type, [0] * lanes))
        builder.store(ir.Constant(words_type, [0] * lanes), total)
        with cgutils.for_range(builder, many) as loop:
            builder.store(builder.add(builder.load(total), group(builder, source, weight, loop.index)), total)
        whole = builder.load(total)
        for half in (8, 4):
            low, high = (pick(builder, whole, whole, list(range(n, n + half))) for n in (0, half))
            whole = builder.add(low, high)
        finish(builder, whole, target)
        return context.get_dummy_value()

    @intrinsic
    def weigh(typing: Any, line: Any, first: Any, weight: Any, target: Any, many: Any) -> Any:
        return types.void(*[types.uintp] * 5), four if groups else one

    return weigh


_four_of_one_group, _four_of_two_groups, _one_of_any = _weigher(1), _weigher(2), _weigher(0)


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
def _weigh_lines(
    source: Any, top: int, height: int, left: int, size: int, most: int, first: Any, fourfold: Any, out: Any
) -> None:
    """The loops of ``_across``, by addresses. A function of its own, or Numba would free an array at its last mention,
    where its address is taken: arguments belong to the caller until the end."""
    groups = most // _TAPS
    from_, to, places, factors = source.ctypes.data, out.ctypes.data, first.ctypes.data, fourfold.ctypes.data
    per_pixel, fours = 16 * most, size - size % 4 if groups <= 2 else 0
    for y in range(height):
        line, end = from_ + (top + y) * source.shape[1] + 3 * left, to + 3 * size * y
        if groups == 1:
            for x in range(0, fours, 4):
                _four_of_one_group(line, places + 8 * x, factors + per_pixel * x, end + 3 * x, groups)
        elif groups == 2:
            for x in range(0, fours, 4):
                _four_of_two_groups(line, places + 8 * x, factors + per_pixel * x, end + 3 * x, groups)
        for x in range(fours, size):
            _one_of_any(line, places + 8 * x, factors + per_pixel * x, end + 3 * x, groups)


@_compiled
def _across(source: Any, top: int, height: int, left: int, width: int, size: int) -> Any:
    """(height, 3 x size) bytes: ``height`` lines of ``source`` from ``top`` on, ``width`` pixels of each resized."""
    first, _, weight, fourfold = _weights(width, size)
    out = np.empty(height * size * 3 + _TAPS, np.uint8)
    _weigh_lines(source, top, height, left, size, weight.shape[1], first, fourfold, out)
    return out[: height * size * 3].reshape(height, 3 * size)


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

    source: (H, W, 3) uint8 of ``room``, with the box inside; target: (S, T, 3) uint8, contiguous. Two passes with
    rounding to bytes between them, as PIL: across, then down; or down first where the height loses more than twice as
    many pixels as the width.
    """
    size, wide = target.shape[0], target.shape[1]
    out, lines = target.reshape(size, 3 * wide), source.reshape(source.shape[0], 3 * source.shape[1])
    if height > size and height - size > 2 * (width - wide):
        short = np.empty((size + _SPARE, 3 * width), np.uint8)
        _down(lines, top, height, 3 * left, 3 * width, size, short)
        small = _across(short, 0, size, 0, width, wide)
        for y in range(size):  # in loops: Numba's assignment of a slice is a hundred times slower
            for x in range(3 * wide):
                out[y, x] = small[y, x]
    else:
        _down(_across(lines, top, height, left, width, wide), 0, height, 0, 3 * wide, size, out)
