# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Views on the CPU in compiled loops: all of an image's operations while it lies in the cache, nothing batched.

The same operations with the same parameters, in the same order, as ``raycon.nn.views`` (which see for what they mean),
equal to it up to float32 rounding. An image takes one pass per operation over at most (C, S, S) floats that stay in
the first or second level of the cache; the batched form moves each whole batch through memory for each step.

Parameters are drawn as ever (``views.draw``, one vectorised call per batch), so the counter stream is untouched.
Perspective and AutoAugment are left to the batched form (``serves``). Importing this module needs Numba; the first call
on a machine compiles for some seconds and keeps the result beside this file (or in the user's cache folder).

Shape letters: B images, I images read per row, C channels, H W source pixels, S output side, K taps.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycon.nn.view_ops import LUMA
from raycon.nn.views import CONTRAST, HUE, SATURATION, ViewParams, ViewSpec

_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)
_CONTRAST, _SATURATION, _HUE = CONTRAST, SATURATION, HUE
_ONE, _ZERO = np.float32(1), np.float32(0)
_compiled: Any = functools.partial(numba.njit, nogil=True, cache=True, fastmath=True, error_model="numpy")


def serves(spec: ViewSpec) -> bool:
    """Whether the view has only operations that are here."""
    return not spec.perspective and not spec.auto


def views_of(
    image: NDArray[np.uint8], which: int, spec: ViewSpec, params: ViewParams, channels_last: bool, threads: int = 1
) -> Tensor:
    """``views.make_view`` of image ``which`` of each row of (B, I, H, W, C): (B, C, S, S) float32, normalised."""
    return _run(_from_images, image, which, spec, params, channels_last, threads)


def views_of_crops(
    crops: NDArray[np.uint8], first: int, spec: ViewSpec, params: ViewParams, channels_last: bool, threads: int = 1
) -> Tensor:
    """``views.finish`` (with the flip) of the crops (S, S, C) that start at byte ``first`` of each row of (B, P)."""
    return _run(_from_crops, crops, first, spec, params, channels_last, threads)


def _run(
    kernel: Any, source: NDArray[np.uint8], which: int, spec: ViewSpec, params: ViewParams, last: bool, threads: int
) -> Tensor:
    rows, size, channels = len(source), spec.size, spec.channels
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(rows, channels, size, size, memory_format=layout)
    flat = (out.permute(0, 2, 3, 1) if last else out).reshape(rows, channels * size * size).numpy()
    assert np.shares_memory(flat, out.numpy()) or not rows
    drawn = (params.box, params.flip, params.order, params.factors, params.gray, params.sigma, params.solarize)
    laid_out = [np.ascontiguousarray(array) for array in drawn]  # one memory layout, one compilation
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    fixed = (spec.gray_first, np.float32(spec.solarize_threshold), spec.kernel, mean, std, last)
    source = np.ascontiguousarray(source)

    def part(begin: int, end: int) -> None:
        kernel(source, which, size, channels, *laid_out, *fixed, flat, begin, end)

    parts = max(1, min(threads, rows))
    cuts = [rows * n // parts for n in range(parts + 1)]
    if parts == 1:
        part(0, rows)
    else:
        with ThreadPoolExecutor(parts) as pool:
            list(pool.map(part, cuts[:-1], cuts[1:]))
    return out


@_compiled
def _from_images(
    source, which, size, channels, box, flip, order, factors, gray, sigma, solarize, gray_first, threshold, kernel,
    mean, std, last, out, begin, end,
):  # fmt: skip
    area = size * size
    planes, spare = np.empty((channels, area), np.float32), np.empty(area, np.float32)
    line = np.empty(source.shape[3] * channels, np.float32)
    weights = np.empty(source.shape[2] + source.shape[3] + 4, np.float32)
    for i in range(begin, end):
        top, left, height, width = int(box[i, 0]), int(box[i, 1]), int(box[i, 2]), int(box[i, 3])
        _crop(source[i, which], top, left, height, width, flip[i], size, channels, planes, line, weights)
        _colours(
            planes, spare, size, channels, order[i], factors[i], gray[i], sigma[i], solarize[i], gray_first, threshold,
            kernel,
        )  # fmt: skip
        _store(planes, area, channels, mean, std, last, out[i])


@_compiled
def _from_crops(
    source, first, size, channels, box, flip, order, factors, gray, sigma, solarize, gray_first, threshold, kernel,
    mean, std, last, out, begin, end,
):  # fmt: skip
    area = size * size
    planes, spare = np.empty((channels, area), np.float32), np.empty(area, np.float32)
    for i in range(begin, end):
        pixels = source[i, first : first + area * channels]
        for c in range(channels):
            plane = planes[c]
            if flip[i]:
                for y in range(size):
                    for x in range(size):
                        plane[y * size + x] = np.float32(pixels[(y * size + size - 1 - x) * channels + c])
            else:
                for j in range(area):
                    plane[j] = np.float32(pixels[j * channels + c])
            for j in range(area):
                plane[j] /= np.float32(255)
        _colours(
            planes, spare, size, channels, order[i], factors[i], gray[i], sigma[i], solarize[i], gray_first, threshold,
            kernel,
        )  # fmt: skip
        _store(planes, area, channels, mean, std, last, out[i])


@_compiled
def _taps(length, size, out, weights):
    """(first tap, number of taps) of output pixel ``out`` of an axis; writes their weights.

    The antialiased triangle filter of ``view_ops._axis_weights``, in the same float32 steps.
    """
    scale = np.float32(length) / np.float32(size)
    centre = scale * (np.float32(out) + np.float32(0.5))
    support = max(scale, _ONE)
    first = max(int(np.ceil(centre - support - np.float32(0.5))), 0)
    end = min(int(np.floor(centre + support - np.float32(0.5))) + 1, length)
    total = _ZERO
    for tap in range(first, end):
        weight = max(_ONE - abs(np.float32(tap) - centre + np.float32(0.5)) / support, _ZERO)
        weights[tap - first] = weight
        total += weight
    for tap in range(end - first):
        weights[tap] /= total
    return first, end - first


@_compiled
def _crop(
    image, top, left, height, width, flip, size, channels, planes, line, weights
):  # fmt: skip
    """The box of (H, W, C) resized to the planes (C, S x S), in [0, 1]: each line down first, then across."""
    most = int(2 * max(np.float32(width) / np.float32(size), _ONE)) + 2
    across = np.empty((size, most), np.float32)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    for x in range(size):
        first[x], count[x] = _taps(width, size, x, weights)
        for tap in range(count[x]):
            across[x, tap] = weights[tap] / np.float32(255)
    used = width * channels
    for y in range(size):
        begin, taps = _taps(height, size, y, weights)
        for tap in range(taps):
            pixels = image[top + begin + tap].reshape(-1)[left * channels : left * channels + used]
            weight = weights[tap]
            if tap == 0:
                for j in range(used):
                    line[j] = weight * np.float32(pixels[j])
            else:
                for j in range(used):
                    line[j] += weight * np.float32(pixels[j])
        for x in range(size):
            to = y * size + (size - 1 - x if flip else x)
            at = first[x] * channels
            if channels == 3:
                red, green, blue = _ZERO, _ZERO, _ZERO
                for tap in range(count[x]):
                    weight = across[x, tap]
                    red += weight * line[at]
                    green += weight * line[at + 1]
                    blue += weight * line[at + 2]
                    at += 3
                planes[0, to], planes[1, to], planes[2, to] = red, green, blue
            else:
                total = _ZERO
                for tap in range(count[x]):
                    total += across[x, tap] * line[at + tap]
                planes[0, to] = total


@_compiled
def _colours(
    planes, spare, size, channels, order, factors, gray, sigma, solarize, gray_first, threshold, kernel
):  # fmt: skip
    """Everything between the crop and the normalisation, on one image."""
    area = size * size
    if gray_first and gray and channels == 3:
        _gray(planes)
    for step in range(4):
        operation = order[step]
        factor = factors[operation]
        if operation == _HUE:
            if factor != 0 and channels == 3:
                _turn(planes[0], planes[1], planes[2], factor)
        elif factor != 1:
            if operation == _SATURATION:
                if channels == 3:
                    _saturate(planes[0], planes[1], planes[2], factor)
            else:
                rest = _ZERO
                if operation == _CONTRAST:
                    rest = (_ONE - factor) * _average(planes, channels)
                for c in range(channels):
                    plane = planes[c]
                    for j in range(area):
                        plane[j] = min(max(factor * plane[j] + rest, _ZERO), _ONE)
    if not gray_first and gray and channels == 3:
        _gray(planes)
    if sigma > 0:
        _blur(planes, spare, size, channels, sigma, kernel)
    if solarize:
        for c in range(channels):
            plane = planes[c]
            for j in range(area):
                plane[j] = _ONE - plane[j] if plane[j] >= threshold else plane[j]


@_compiled
def _average(planes, channels):
    """The mean grey value."""
    area = planes.shape[1]
    total = _ZERO
    if channels == 3:
        red, green, blue = planes[0], planes[1], planes[2]
        for j in range(area):
            total += _RED * red[j] + _GREEN * green[j] + _BLUE * blue[j]
    else:
        only = planes[0]
        for j in range(area):
            total += only[j]
    return total / np.float32(area)


@_compiled
def _gray(planes):
    red, green, blue = planes[0], planes[1], planes[2]
    for j in range(planes.shape[1]):
        grey = _RED * red[j] + _GREEN * green[j] + _BLUE * blue[j]
        red[j], green[j], blue[j] = grey, grey, grey


@_compiled
def _saturate(red, green, blue, factor):
    rest = _ONE - factor
    for j in range(red.size):
        r, g, b = red[j], green[j], blue[j]
        grey = rest * (_RED * r + _GREEN * g + _BLUE * b)
        red[j] = min(max(factor * r + grey, _ZERO), _ONE)
        green[j] = min(max(factor * g + grey, _ZERO), _ONE)
        blue[j] = min(max(factor * b + grey, _ZERO), _ONE)


@_compiled
def _hat(angle):
    """``view_ops.hue_shift``'s: of an angle in sixths of a turn, 0 or more (else it is turned until it is)."""
    angle -= np.float32(6) * np.floor(angle * np.float32(1 / 6))
    return min(max(np.float32(2) - abs(angle - np.float32(2)), _ZERO), _ONE)


@_compiled
def _turn(red, green, blue, turns):
    """``view_ops.hue_shift`` of one image."""
    six = np.float32(6) * turns
    for j in range(red.size):
        r, g, b = red[j], green[j], blue[j]
        high = max(max(r, g), b)
        chroma = high - min(min(r, g), b)
        inverse = _ONE / max(chroma, np.float32(1e-12))
        of_green = (b - r) * inverse + np.float32(2)
        of_blue = (r - g) * inverse + np.float32(4)
        hue = (g - b) * inverse if high == r else (of_green if high == g else of_blue)
        hue += six
        red[j] = high - chroma * _hat(hue + np.float32(5))
        green[j] = high - chroma * _hat(hue + np.float32(3))
        blue[j] = high - chroma * _hat(hue + _ONE)


@_compiled
def _reflected(place, size):
    """``place`` mirrored at the first and the last of ``size`` pixels, as often as needed."""
    period = max(2 * (size - 1), 1)
    place = place % period
    return min(place, period - place)


@_compiled
def _blur(planes, spare, size, channels, sigma, kernel):
    """``view_ops.blur`` of one image, down, then across, a line at a time."""
    reach = kernel // 2
    weight = np.empty(kernel, np.float32)
    total = _ZERO
    for tap in range(kernel):
        at = np.float32(tap - reach) / sigma
        weight[tap] = np.exp(np.float32(-0.5) * at * at)
        total += weight[tap]
    for tap in range(kernel):
        weight[tap] /= total
    padded, sums = np.empty(size + 2 * reach, np.float32), np.empty(size, np.float32)
    for c in range(channels):
        plane, lines = planes[c], spare
        for j in range(plane.size):
            lines[j] = plane[j]
        for y in range(size):
            for x in range(size):
                sums[x] = _ZERO
            for tap in range(kernel):
                w = weight[tap]
                from_ = _reflected(y + tap - reach, size) * size
                line = lines[from_ : from_ + size]
                for x in range(size):
                    sums[x] += w * line[x]
            for x in range(size):
                padded[reach + x] = sums[x]
            for x in range(reach):
                padded[x] = sums[_reflected(x - reach, size)]
                padded[reach + size + x] = sums[_reflected(size + x, size)]
            target = plane[y * size : (y + 1) * size]
            for x in range(size):
                target[x] = _ZERO
            for tap in range(kernel):
                w = weight[tap]
                line = padded[tap : tap + size]
                for x in range(size):
                    target[x] += w * line[x]


@_compiled
def _store(planes, area, channels, mean, std, last, out):
    """Normalise and write, channels last or first."""
    if channels == 3 and last:
        red, green, blue = planes[0], planes[1], planes[2]
        for j in range(area):
            out[3 * j] = (red[j] - mean[0]) / std[0]
            out[3 * j + 1] = (green[j] - mean[1]) / std[1]
            out[3 * j + 2] = (blue[j] - mean[2]) / std[2]
    else:
        for c in range(channels):
            plane, part = planes[c], out[c * area : (c + 1) * area]
            for j in range(area):
                part[j] = (plane[j] - mean[c]) / std[c]
