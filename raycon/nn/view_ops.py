"""Image operations on a batch with a parameter per image: the arithmetic of the views.

Each equals torchvision.transforms.v2.functional on float images with the same parameter, up to rounding. Images are
float32 in [0, 1] with 1 or 3 channels; nothing here waits for the device. Names ending in ``_`` write into their input.

Shape letters: B (or n, a part of it) images, C channels, H W source pixels, S output side, K taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a grey value: torchvision's (ITU-R 601)."""

# Up to this side a dense (S, S) matrix per image beats sparse loops on a CPU; on a GPU it always does.
_DENSE_SIDE = 64


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in IEEE float32 even under autocast or where the process allows TF32 / bf16 ones: pixels need it."""
    backends: Any = torch.backends  # mkldnn's attributes are made at run time
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def _dense(device: torch.device, *sides: int) -> bool:
    return device.type != "cpu" or max(sides) <= _DENSE_SIDE


Sendable = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.float32]
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64, np.dtype(np.float32): torch.float32}


def send(arrays: Sequence[Sendable], device: torch.device) -> list[Tensor]:
    """The arrays (float32 ones last, for alignment) as tensors on ``device``, in one copy that does not block."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.from_numpy(np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory()
    there = packed.to(device, non_blocking=True)
    parts = there.split([a.nbytes for a in arrays])
    return [part.view(_DTYPES[a.dtype]).view(a.shape) for part, a in zip(parts, arrays, strict=True)]


def to_unit(images: Tensor) -> Tensor:
    """A new contiguous float32 tensor in [0, 1]: uint8 is divided by 255, floats are copied."""
    unit = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return unit.div_(255) if images.dtype == torch.uint8 else unit


def _axis_weights(start_B: Tensor, length_B: Tensor, flip_B: Tensor | None, extent: int, size: int) -> Tensor:
    """(B, size, extent): what each source pixel of an axis gives to each output pixel.

    The antialiased triangle filter of torch's ``interpolate`` over the pixels start .. start + length only, in the
    same order of float32 operations, so that the weights agree to the last bits. Flipped images count output pixels
    from the other end.
    """
    out_BS = (torch.arange(size, device=start_B.device) + 0.5).expand(len(start_B), size)
    if flip_B is not None:
        out_BS = torch.where(flip_B[:, None] > 0, size - out_BS, out_BS)
    scale_B1 = (length_B / size)[:, None]
    centre_BS1 = (scale_B1 * out_BS)[:, :, None]
    tap_B1E = (torch.arange(extent, device=start_B.device) - start_B[:, None])[:, None, :]
    weight_BSE = (tap_B1E - centre_BS1).add_(0.5).abs_().mul_(scale_B1.clamp(min=1).reciprocal()[:, :, None])
    weight_BSE = weight_BSE.neg_().add_(1).clamp_(min=0)
    weight_BSE.mul_((tap_B1E >= 0) & (tap_B1E < length_B[:, None, None]))
    return weight_BSE.div_(weight_BSE.sum(2, keepdim=True))


@torch.no_grad()
def crop(images_BCHW: Tensor, box_B4: NDArray[np.float32], flip_B: NDArray[np.bool_], size: int) -> Tensor:
    """Cut a box out of each image, resize it to (size, size) with antialiased bilinear filtering, flip some.

    images_BCHW: uint8 or float in [0, 1]; box_B4: (top, left, height, width) in whole source pixels, inside the image.
    Returns (B, C, size, size) float32 in [0, 1]. Equal to torchvision's ``resized_crop(antialias=True)`` on the float
    image followed by ``horizontal_flip``. Small images: one weight matrix per image and axis; large ones on a CPU:
    one sparse resize per image.
    """
    B, C, H, W = images_BCHW.shape
    device = images_BCHW.device
    if _dense(device, H, W, size):
        params = np.concatenate([box_B4.T, flip_B[None]]).astype(np.float32)
        top, left, height, width, flip = send([params], device)[0]
        source = images_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        with full_precision(device):
            columns = _axis_weights(left, width, flip, W, size).transpose(1, 2)
            lines = torch.bmm(source.view(B, C * H, W), columns).view(B, C, H, size)
            out = torch.matmul(_axis_weights(top, height, None, H, size)[:, None], lines)
    else:
        out = torch.empty(B, C, size, size)
        for i, (top, left, height, width) in enumerate(box_B4.astype(int).tolist()):
            part = images_BCHW[i : i + 1, :, top : top + height, left : left + width].to(torch.float32)
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
            out[i] = part[0].flip(2) if flip_B[i] else part[0]
    return out.div_(255) if images_BCHW.dtype == torch.uint8 else out


def luma(images: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, 1, H, W): grey values; a single channel is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend(images: Tensor, own_B: Tensor, grey_B: Tensor, mean_B: Tensor) -> Tensor:
    """clamp(own * x + grey * luma(x) + mean * average(luma(x)), 0, 1) with a coefficient per image.

    Brightness f is (f, 0, 0), saturation f is (f, 1 - f, 0), contrast f is (f, 0, 1 - f), and (1, 0, 0) leaves an
    image as it is, exactly.
    """
    grey_B1HW = luma(images)
    average_B111 = grey_B1HW.mean((2, 3), keepdim=True).mul_(mean_B[:, None, None, None])
    reference_B1HW = (grey_B1HW * grey_B[:, None, None, None]).add_(average_B111)
    return torch.addcmul(reference_B1HW, images, own_B[:, None, None, None]).clamp_(0, 1)


def hue_shift(images: Tensor, turns_n: Tensor) -> Tensor:
    """Turn the hue of (n, 3, H, W) by ``turns_n`` (fractions of the circle, -0.5 .. 0.5) at equal value and saturation.

    HSV to RGB without branches: channel = V - (V - min) * hat((hue + c) mod 6), c = 5, 3, 1 for red, green, blue, where
    hat rises from 0 to 1 over [0, 1], stays 1 until 3 and is 0 again from 4 on (A. R. Smith's hexcone, 1978).
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    inverse = chroma.clamp(min=1e-12).reciprocal_()  # a grey pixel has differences of exactly 0, so any hue will do
    hue = torch.where(
        high == red,
        (green - blue).mul_(inverse),
        torch.where(high == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )  # in sixths of a turn, -1 .. 5
    out = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        angle = hue + (turns_n * 6 + offset)[:, None, None]
        angle.sub_((angle / 6).floor_(), alpha=6)
        hat = torch.rsub(angle.sub_(2).abs_(), 2).clamp_(0, 1)
        torch.addcmul(high, chroma, hat, value=-1, out=out[:, channel])
    return out


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values that are at or above ``threshold``."""
    return torch.where(images >= threshold, 1 - images, images)


def perspective(images: Tensor, coefficient_n8: Tensor) -> Tensor:
    """Warp (n, C, S, S): output pixel (x, y) is taken, bilinearly, from ((a x + b y + c) / w, (d x + e y + f) / w) with
    w = g x + h y + 1 and pixel centres at halves; outside of the image it is 0.
    """
    S = images.shape[3]
    a, b, c, d, e, f, g, h = coefficient_n8.float()[:, :, None, None].unbind(1)
    x = torch.arange(S, device=images.device, dtype=torch.float32)[None, None, :] + 0.5
    y = x.transpose(1, 2)
    w = g * x + h * y + 1
    grid = torch.stack([a * x + b * y + c, d * x + e * y + f], dim=3) / (w[..., None] * (S / 2)) - 1
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def blur(images: Tensor, sigma_n: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of (n, C, S, S) with a standard deviation per image (pixels) and ``kernel`` (odd) taps.

    The border is reflected without repeating the edge, as often as needed where kernel // 2 >= S. Kernel and border
    are mirror symmetric, so the blur commutes with a flip.
    """
    n, C, S, _ = images.shape
    device, reach = images.device, kernel // 2
    tap_K = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    weight_nK = (tap_K / sigma_n[:, None]).square_().mul_(-0.5).softmax(1)
    if _dense(device, S):
        period = max(2 * (S - 1), 1)
        source_KS = torch.arange(S, device=device) + torch.arange(-reach, reach + 1, device=device)[:, None]
        source_KS = source_KS.remainder(period)
        source_KS = torch.minimum(source_KS, period - source_KS)
        take_KSS = torch.zeros(kernel, S, S, device=device).scatter_(2, source_KS[:, :, None], 1.0)
        with full_precision(device):
            matrix_nSS = torch.mm(weight_nK, take_KSS.view(kernel, S * S)).view(n, S, S)
            lines = torch.bmm(images.reshape(n, C * S, S), matrix_nSS.transpose(1, 2)).view(n, C, S, S)
            return torch.matmul(matrix_nSS[:, None], lines)
    with torch.autocast(device.type, enabled=False):
        padded = F.pad(images, (reach,) * 4, mode="reflect").view(1, n * C, S + 2 * reach, S + 2 * reach)
        filter_ = weight_nK.repeat_interleave(C, 0).view(n * C, 1, 1, kernel)
        lines = F.conv2d(padded, filter_, groups=n * C)
        return F.conv2d(lines, filter_.transpose(2, 3), groups=n * C).view(n, C, S, S)
