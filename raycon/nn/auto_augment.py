"""AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019, arXiv 1805.09501) on a batch, each image with its own draw.

Every operation gives what PIL gives, grey value by grey value: the policy was found, and MaskCon's strong views are
made, on 8-bit images. Images here are float32 tensors that hold whole numbers 0 .. 255, of 1 or 3 channels, square;
nothing waits for the device.

Shape letters: B (or n, a part of it) images, C channels, S side in pixels, P policies.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raycon.nn.view_ops import send

FILL: Final = 128.0
"""Grey value of what a geometric operation uncovers."""

OPERATIONS: Final = (
    "shearX", "shearY", "translateX", "translateY", "rotate", "color", "posterize", "solarize", "contrast", "sharpness",
    "brightness", "autocontrast", "equalize", "invert",
)  # fmt: skip
SIGNED: Final = ("shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness")
"""Operations whose magnitude is negated at random. MaskCon's rotations never are (torchvision's are)."""

_LEVELS: Final = {
    "shearX": np.linspace(0, 0.3, 10),
    "shearY": np.linspace(0, 0.3, 10),
    "translateX": np.linspace(0, 150 / 331, 10),
    "translateY": np.linspace(0, 150 / 331, 10),
    "rotate": np.linspace(0, 30, 10),
    "color": np.linspace(0, 0.9, 10),
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
    "contrast": np.linspace(0, 0.9, 10),
    "sharpness": np.linspace(0, 0.9, 10),
    "brightness": np.linspace(0, 0.9, 10),
}
"""Magnitudes of the ten levels: shear as a slope, translation in widths, rotation in degrees, posterize in bits kept,
solarize as a grey value, the others as what is added to a factor of 1. MaskCon's (torchvision's solarize: 255 .. 0)."""

_Step = tuple[str, float, int]
POLICIES: Final[tuple[tuple[_Step, _Step], ...]] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translateX", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shearY", 0.5, 8), ("translateY", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shearY", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translateX", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translateY", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.8, 0)),  # torchvision and the paper: 0.6
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translateY", 0.9, 9), ("translateY", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translateY", 0.7, 9), ("autocontrast", 0.9, 0)),
)
"""Per policy two steps: operation, probability, level."""


def magnitude(operation: str, level: int) -> float:
    """The unsigned magnitude of a level 0..9; 0 for operations that have none."""
    return float(_LEVELS[operation][level]) if operation in _LEVELS else 0.0


_CODES_P2: Final = np.array([[OPERATIONS.index(step[0]) for step in policy] for policy in POLICIES])
_CHANCES_P2: Final = np.array([[step[1] for step in policy] for policy in POLICIES])
_MAGNITUDES_P2: Final = np.array([[magnitude(step[0], step[2]) for step in policy] for policy in POLICIES])
_SIGNED_P2: Final = np.array([[step[0] in SIGNED for step in policy] for policy in POLICIES])


def draw(
    policy_B: NDArray[np.float64], chance_B2: NDArray[np.float64], sign_B2: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(B, 2) operations (positions in OPERATIONS, -1: none) and (B, 2) signed magnitudes, from uniforms in [0, 1)."""
    chosen_B = (policy_B * len(POLICIES)).astype(np.int64)
    code_B2 = np.where(chance_B2 < _CHANCES_P2[chosen_B], _CODES_P2[chosen_B], -1)
    negative_B2 = _SIGNED_P2[chosen_B] & (sign_B2 < 0.5)
    return code_B2, np.where(negative_B2, -1.0, 1.0) * _MAGNITUDES_P2[chosen_B]


def apply_(images: Tensor, code_B2: NDArray[np.int64], magnitude_B2: NDArray[np.float64]) -> Tensor:
    """Do to each image of (B, C, S, S) in [0, 1] its first, then its second operation; writes into ``images``.

    Images that have one are rounded to whole grey values first, as 8-bit images are.
    """
    steps = [
        (code, np.flatnonzero(code_B2[:, step] == code), step) for step in (0, 1) for code in range(len(OPERATIONS))
    ]
    steps = [(code, where, step) for code, where, step in steps if len(where)]
    touched = np.flatnonzero((code_B2 >= 0).any(1))
    arrays: list[NDArray[np.int64] | NDArray[np.float64]] = [touched, *(where for _, where, _ in steps)]
    arrays += [_parameter(OPERATIONS[code], magnitude_B2[where, step], images.shape[3]) for code, where, step in steps]
    rounded, *rest = send(arrays, images.device)
    if len(touched):
        images.index_copy_(0, rounded, images.index_select(0, rounded).mul_(255).round_())
        for (code, _, _), where, parameter in zip(steps, rest[: len(steps)], rest[len(steps) :], strict=True):
            images.index_copy_(0, where, operate(OPERATIONS[code], images.index_select(0, where), parameter))
        images.index_copy_(0, rounded, images.index_select(0, rounded).div_(255))
    return images


def _parameter(operation: str, magnitude_n: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """What ``operate`` takes, computed on the host: a rotation becomes its inverse affine map, (n, 6)."""
    if operation != "rotate":
        return magnitude_n
    angle_n = -np.radians(magnitude_n % 360)
    cos_n, sin_n = np.round(np.cos(angle_n), 15), np.round(np.sin(angle_n), 15)
    centre = side / 2
    x_n, y_n = centre - (cos_n + sin_n) * centre, centre - (cos_n - sin_n) * centre
    return np.stack([cos_n, sin_n, x_n, -sin_n, cos_n, y_n], axis=1)


def operate(operation: str, images: Tensor, parameter_n: Tensor) -> Tensor:
    """One operation on all of (n, C, S, S) whole grey values; a float64 magnitude per image (rotate: (n, 6))."""
    n, _, S, _ = images.shape
    if operation == "shearX":
        return _shear_x(images, parameter_n)
    if operation == "shearY":
        return _shear_x(images.transpose(2, 3), parameter_n).transpose(2, 3)
    if operation in ("translateX", "translateY"):
        pixel_S = torch.arange(S, device=images.device, dtype=torch.float64)
        moved_nS = (pixel_S + 0.5 + (parameter_n * S)[:, None]).floor().long()
        still_nS = pixel_S.long().expand(n, S)
        columns, rows = (moved_nS, still_nS) if operation == "translateX" else (still_nS, moved_nS)
        return _pick(images, columns[:, None, :].expand(n, S, S), rows[:, :, None].expand(n, S, S))
    if operation == "rotate":
        return _pick(images, *_affine(parameter_n, S))
    if operation == "posterize":
        size_n = 2 ** (8 - parameter_n.float())[:, None, None, None]
        return (images / size_n).floor_() * size_n
    if operation == "solarize":
        return torch.where(images < parameter_n[:, None, None, None], images, 255 - images)
    if operation == "invert":
        return 255 - images
    if operation in ("autocontrast", "equalize"):
        return _by_table(images, operation)
    return _blend(_degenerate(operation, images), images, (1 + parameter_n).float())


def _grey(images: Tensor) -> Tensor:
    """PIL's conversion to L in 16-bit fixed point; below 2**24, so exact in float32."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_()


def _degenerate(operation: str, images: Tensor) -> Tensor:
    """What PIL.ImageEnhance blends with: no light, no colour, no contrast, or a smooth image with its border kept."""
    if operation == "brightness":
        return torch.zeros_like(images)
    if operation == "color":
        return _grey(images).expand_as(images)
    if operation == "contrast":
        return (_grey(images).double().mean((2, 3), keepdim=True) + 0.5).floor_().float().expand_as(images)
    assert operation == "sharpness", operation
    C, S = images.shape[1:3]
    smooth = images.clone()
    if S > 2:
        kernel = images.new_ones(C, 1, 3, 3)
        kernel[:, :, 1, 1] = 5
        smooth[:, :, 1:-1, 1:-1] = (F.conv2d(images, kernel, groups=C) / 13 + 0.5).floor_()
    return smooth


def _blend(degenerate: Tensor, images: Tensor, factor_n: Tensor) -> Tensor:
    """degenerate + factor (image - degenerate), cut off below the point, 0 .. 255."""
    return (images - degenerate).mul_(factor_n[:, None, None, None]).add_(degenerate).clamp_(0, 255).floor_()


def _by_table(images: Tensor, operation: str) -> Tensor:
    """A table of 256 grey values per image and channel, made from its histogram: PIL.ImageOps."""
    n, C, S, _ = images.shape
    value = images.reshape(n * C, S * S).long()
    count = torch.zeros(n * C, 256, dtype=torch.long, device=images.device)
    count.scatter_add_(1, value, torch.ones_like(value))
    grey = torch.arange(256, device=images.device).expand(n * C, 256)
    first = torch.where(count > 0, grey, 256).amin(1, keepdim=True)
    last = torch.where(count > 0, grey, -1).amax(1, keepdim=True)
    if operation == "autocontrast":
        scale = 255.0 / (last - first).clamp(min=1).double()
        table = (grey * scale + -first * scale).trunc_().clamp_(0, 255).long()
        same = last <= first
    else:
        step = (S * S - count.gather(1, last)) // 255
        below = count.cumsum(1) - count
        table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
        same = step == 0
    return torch.where(same, grey, table).gather(1, value).view_as(images).to(images.dtype)


def _shear_x(images: Tensor, slope_n: Tensor) -> Tensor:
    """Each line moved by slope x its height, cubic interpolation (a = -1) between four neighbours."""
    n, C, S, _ = images.shape
    pixel_S = torch.arange(S, device=images.device, dtype=torch.float64) + 0.5
    source_nSS = pixel_S[None, None, :] + slope_n[:, None, None] * pixel_S[None, :, None]
    inside_nSS = (source_nSS >= 0) & (source_nSS < S)
    left_nSS = (source_nSS - 0.5).floor()
    d = (source_nSS - 0.5 - left_nSS)[:, None]
    taps = [(left_nSS.long() + i).clamp_(0, S - 1)[:, None].expand(n, C, S, S) for i in (-1, 0, 1, 2)]
    v1, v2, v3, v4 = (images.gather(3, tap).double() for tap in taps)
    cubic = v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 - v3 + v4)))
    return torch.where(inside_nSS[:, None], cubic.clamp_(0, 255).floor_(), FILL).to(images.dtype)


def _affine(matrix_n6: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(n, S, S) source columns and rows of an affine map's nearest pixels, in PIL's 16-bit fixed point."""

    def fixed(value_n: Tensor) -> Tensor:
        return (value_n * 65536 + 0.5).floor().long()[:, None, None]

    a, b, c, d, e, f = matrix_n6.unbind(1)
    x = torch.arange(side, device=matrix_n6.device)[None, None, :]
    y = x.transpose(1, 2)
    columns = (fixed(c + a * 0.5 + b * 0.5) + fixed(a) * x + fixed(b) * y) >> 16
    rows = (fixed(f + d * 0.5 + e * 0.5) + fixed(d) * x + fixed(e) * y) >> 16
    return columns, rows


def _pick(images: Tensor, column_nSS: Tensor, row_nSS: Tensor) -> Tensor:
    """The pixels at (row, column); FILL outside of the image."""
    n, C, S, _ = images.shape
    inside = (column_nSS >= 0) & (column_nSS < S) & (row_nSS >= 0) & (row_nSS < S)
    place = (row_nSS * S + column_nSS).clamp(0, S * S - 1).view(n, 1, S * S).expand(n, C, S * S)
    found = images.reshape(n, C, S * S).gather(2, place).view(n, C, S, S)
    return torch.where(inside[:, None], found, FILL)
