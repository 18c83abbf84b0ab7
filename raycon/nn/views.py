"""Views: a declarative augmentation (ViewSpec), its parameters drawn on the host, its operations batched on the device.

``draw`` turns uniform numbers (raycon.core.stream) into one set of parameters per image; ``make_view`` applies them to
a whole batch. The parameters of an image depend on its own uniforms only, so a row's view is the same in any batch, on
any rank and with any loader. Operations, in this order: crop and flip, perspective, AutoAugment, jitter, gray, blur,
solarize, normalise. (Where the papers' code flips last it makes no difference: jitter, gray, blur and solarize commute
with a flip, and a mirrored perspective is as likely as the perspective.)

Shape letters: B images, C channels, H W source pixels, S output side (also: slots of the uniforms).
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.config import ConfigError
from raycon.core.stream import uniforms
from raycon.nn import auto_augment, view_ops
from raycon.nn.view_ops import crop

__all__ = [
    "SLOTS",
    "EvalSpec",
    "ViewParams",
    "ViewSpec",
    "batch_views",
    "crop",
    "draw",
    "eval_spec",
    "eval_view",
    "finish",
    "make_view",
    "preset_names",
    "view_spec",
]


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One random view. The defaults are MoCo v2's. ConfigError when a value is out of its range."""

    size: int
    """Output side in pixels, 1 or more."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random box as a share of the source image: uniform between the two, 0 < low <= high <= 1."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the box: its logarithm is uniform between the two, 0 < low <= high."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    jitter: float = 0.8
    """Probability of the colour jitter: brightness, contrast, saturation and hue in a random order per image."""
    brightness: float = 0.4
    """Factor uniform in max(0, 1 - x) .. 1 + x; 0 or more."""
    contrast: float = 0.4
    """As brightness."""
    saturation: float = 0.4
    """As brightness. No effect on one channel."""
    hue: float = 0.1
    """Shift uniform in -x .. x turns of the colour circle, 0 <= x <= 0.5. No effect on one channel."""
    gray: float = 0.2
    """Probability of dropping the colours. No effect on one channel."""
    gray_first: bool = False
    """Drop the colours before the jitter (MoCo v1) and not after it."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in output pixels: uniform between the two, 0 < low <= high."""
    blur_kernel: int = 0
    """Taps of the blur, odd and less than 2 x size; 0: three standard deviations either side, for the largest sigma."""
    solarize: float = 0.0
    """Probability of inverting the bright values."""
    solarize_threshold: float = 0.5
    """Values (0 .. 1) at or above it are inverted."""
    mean: tuple[float, ...]
    """Of each channel (1 or 3), subtracted at the end; in units of a [0, 1] image."""
    std: tuple[float, ...]
    """Of each channel, divided by at the end; more than 0."""
    perspective: float = 0.0
    """Probability of a random perspective."""
    distortion: float = 0.5
    """Of the perspective: its corners move inwards by up to this share (0 .. 1) of half a side."""
    auto: float = 0.0
    """Probability of a policy of AutoAugment (CIFAR-10's, as MaskCon has it): up to two operations on 8-bit values."""

    def __post_init__(self) -> None:
        problems = _problems(self.size, self.mean, self.std)
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} = {getattr(self, name)}: give a number from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name} = {getattr(self, name)}: give 0 or more")
        if not 0 <= self.hue <= 0.5:
            problems.append(f"hue = {self.hue}: give a number of turns from 0 to 0.5")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                bound = f" and the second at most {most:g}" if most < math.inf else ""
                problems.append(f"{name} = {(low, high)}: give two numbers above 0, the smaller first{bound}")
        if self.blur_kernel and (self.blur_kernel % 2 == 0 or not 0 < self.blur_kernel < 2 * self.size):
            problems.append(f"blur_kernel = {self.blur_kernel}: give an odd number below {2 * self.size} (or 0)")
        if problems:
            raise ConfigError([f"view: {problem}" for problem in problems])

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def kernel(self) -> int:
        """Taps of the blur. Three sigma either side is also the reach of PIL's box approximation."""
        return self.blur_kernel or 2 * math.ceil(3 * self.blur_sigma[1]) + 1


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The view of evaluations: resize the shorter side to ``resize``, cut out the centre. Nothing random."""

    size: int
    """Output side in pixels."""
    resize: int
    """The shorter side after resizing, ``size`` or more."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        problems = _problems(self.size, self.mean, self.std)
        if self.resize < self.size:
            problems.append(f"resize = {self.resize}: give {self.size} (the size of the crop) or more")
        if problems:
            raise ConfigError([f"evaluation view: {problem}" for problem in problems])

    @property
    def channels(self) -> int:
        return len(self.mean)


def _problems(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    problems = [] if size >= 1 else [f"size = {size}: give 1 pixel or more"]
    if len(mean) not in (1, 3) or len(mean) != len(std):
        problems.append(f"mean = {mean}, std = {std}: give 1 or 3 numbers each, one per channel")
    if not all(s > 0 for s in std):
        problems.append(f"std = {std}: give numbers above 0")
    return problems


_SHARES: Final = (
    "flip", "jitter", "gray", "blur", "solarize", "solarize_threshold", "perspective", "distortion", "auto",
)  # fmt: skip


# ---- presets -------------------------------------------------------------------------------------------------------

_NONE: Final = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter": 0.0,
    "gray": 0.0,
    "blur": 0.0,
}
_WEAK: Final = {"jitter": 0.0, "gray": 0.0, "blur": 0.0}  # crop and flip only
_MOCO2: Final[dict[str, Any]] = {}  # ViewSpec's defaults
_MOCO1: Final = {"jitter": 1.0, "hue": 0.4, "gray_first": True, "blur": 0.0}
_SIMCLR: Final = {"crop_scale": (0.08, 1.0), "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
_SCE: Final = {"saturation": 0.2, "blur_kernel": 23}
_ALPHA: Final = _SCE | {"blur": 1.0}
_BETA: Final = _SCE | {"blur": 0.1, "solarize": 0.2}
_GAMMA: Final = _SCE | {"solarize": 0.2}

_PLAIN: Final = _WEAK | {"perspective": 0.5}
_CARS: Final = {"perspective": 0.5}
_AUTO: Final = _WEAK | {"auto": 1.0}

_SMALL: Final = {"side": 96 / 224, "crop_scale": (0.086, 0.429)}  # as SCE's smallest

_DIGITS: Final = {"crop_scale": (0.5, 1.0), "flip": 0.0, "gray": 0.0, "blur": 0.0}
# Garments lie centred and alike in size: small boxes lose that, and without strong light changes brightness tells all.
_FASHION: Final = {"crop_scale": (0.8, 1.0), "brightness": 0.8, "contrast": 0.8, "gray": 0.0, "blur": 0.0}

# Of each preset the named views, as differences from ViewSpec's defaults. ``side`` is an output side as a share of the
# run's. Sources: the papers' code as described in each line.
_PRESETS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    # InstDisc's and MoCo v1's: grayscale before an always applied jitter, no blur.
    "mocov1": {"strong": _MOCO1, "weak": _WEAK},
    "mocov2": {"strong": _MOCO2, "weak": _WEAK},
    "pcl": {"strong": _MOCO2, "weak": _WEAK},
    # raycon's own, for tiny grey images. A digit must not be mirrored, and a blur would wipe it out.
    "digits": {"strong": _DIGITS, "weak": _WEAK | {"crop_scale": (0.6, 1.0), "flip": 0.0}},
    "fashion": {"strong": _FASHION, "weak": _WEAK | {"crop_scale": (0.8, 1.0)}},
    "simclr": {"strong": _SIMCLR, "weak": _WEAK | {"crop_scale": (0.08, 1.0)}},
    # WCL: MoCo v2's during the warm-up of the learning rate, SimCLR's afterwards.
    "wcl": {"strong": _SIMCLR, "weak": _MOCO2},
    # Cl-InfoNCE: larger boxes and no blur.
    "clinfonce": {
        "strong": {"crop_scale": (0.4, 1.0), "blur": 0.0},
        "weak": _WEAK | {"crop_scale": (0.4, 1.0)},
    },
    # MaskCon: on Cars-196, on Stanford Online Products, on CIFAR-100, CIFARtoy and ImageNet32.
    "maskcon-cars": {"strong": _CARS, "weak": _PLAIN},
    "maskcon-sop": {"strong": _PLAIN, "weak": _PLAIN},
    "maskcon-cifar": {"strong": _AUTO, "weak": _WEAK},
    # SCE: on CIFAR-10; on ImageNet with a weak target; its variant with solarisation; MoCo v3's pair (the second view
    # lost its flip in the published configuration, an accident that is not repeated); two large and four small crops.
    "sce-cifar": {"strong": _MOCO2, "weak": _WEAK},
    "sce": {"strong": _SCE, "weak": _WEAK},
    "sce-gamma": {"strong": _GAMMA, "weak": _WEAK},
    "sce-mocov3": {"strong": _ALPHA, "strong-alpha": _ALPHA, "strong-beta": _BETA, "weak": _WEAK},
    "sce-multicrop": {
        "strong": _ALPHA,
        "strong-alpha": _ALPHA,
        "strong-beta": _BETA,
        "weak": _WEAK,
        "local-1": _GAMMA | {"side": 192 / 224, "crop_scale": (0.172, 0.86)},
        "local-2": _GAMMA | {"side": 160 / 224, "crop_scale": (0.143, 0.715)},
        "local-3": _GAMMA | {"side": 128 / 224, "crop_scale": (0.114, 0.571)},
        "local-4": _GAMMA | {"side": 96 / 224, "crop_scale": (0.086, 0.429)},
    },
}


def preset_names() -> list[str]:
    """The names of the augmentation presets. Each has the views strong, weak, neighbour, none, some have more."""
    return list(_PRESETS)


def view_spec(preset: str, name: str, size: int, mean: Sequence[float], std: Sequence[float]) -> ViewSpec:
    """The view ``name`` (strong, weak, none, ...) of a preset, ``size`` pixels wide.

    "neighbour" is the strong view in small, for crops of other images: 3/7 of the size (96 of 224 pixels).
    mean, std: per channel in units of a [0, 1] image. Raises ConfigError for an unknown preset or view, naming those
    that exist.
    """
    if preset not in _PRESETS:
        raise ConfigError([f"data.views = {preset}: {_unknown(preset, preset_names())}"])
    views = _PRESETS[preset] | {"none": _NONE, "neighbour": _PRESETS[preset]["strong"] | _SMALL}
    if name not in views:
        raise ConfigError([f"view {name} of the preset {preset}: {_unknown(name, list(views))}"])
    options = dict(views[name])
    size = round(size * options.pop("side", 1.0))
    if "blur_kernel" in options:  # published for 224 pixels: small images have room for fewer taps
        options["blur_kernel"] = min(options["blur_kernel"], 2 * size - 1)
    return ViewSpec(size=size, mean=tuple(mean), std=tuple(std), **options)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"does not exist; {f'did you mean {near[0]}? ' if near else ''}there are {', '.join(known)}"


def eval_spec(size: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None) -> EvalSpec:
    """The evaluation view. ``resize``: the shorter side before the centre crop; the default keeps ImageNet's 256 : 224
    above 64 pixels and cuts nothing off smaller images."""
    if resize is None:
        resize = size if size <= 64 else round(size * 8 / 7)
    return EvalSpec(size=size, resize=resize, mean=tuple(mean), std=tuple(std))


# ---- parameters ----------------------------------------------------------------------------------------------------

_ATTEMPTS: Final = 10
_AREA: Final = slice(0, _ATTEMPTS)
_RATIO: Final = slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(20, 25)
_FACTORS: Final = slice(25, 29)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(29, 33)
_PERSPECTIVE: Final = 33
_CORNERS: Final = slice(34, 42)
_AUTO_ON, _POLICY = range(42, 44)
_CHANCES: Final = slice(44, 46)
_SIGNS: Final = slice(46, 48)
SLOTS: Final = 48
"""Uniforms that one view of one row uses. Slots keep their meaning: a new operation takes new ones at the end."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ORDERS: Final = tuple(itertools.permutations(range(4)))


class ViewParams(NamedTuple):
    """What was drawn for B images: host arrays, one entry per image."""

    box: NDArray[np.float32]
    """(B, 4) top, left, height, width in whole source pixels."""
    flip: NDArray[np.bool_]
    """(B,)."""
    order: NDArray[np.int64]
    """(B, 4): which operation is the first, second, ... of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    factors: NDArray[np.float32]
    """(B, 4): brightness, contrast and saturation factors, hue shift in turns; 1, 1, 1, 0 where there is no jitter."""
    gray: NDArray[np.bool_]
    """(B,)."""
    sigma: NDArray[np.float32]
    """(B,) of the blur in output pixels; 0 where there is none."""
    solarize: NDArray[np.bool_]
    """(B,)."""
    corners: NDArray[np.float64] | None = None
    """(B, 4, 2) x, y in output pixels: where the perspective puts the top left, top right, bottom right and bottom left
    corners; NaN for images that have none. None when the view has none."""
    operation: NDArray[np.int64] | None = None
    """(B, 2) the two operations of the policy, positions in auto_augment.OPERATIONS, -1: none. None as above."""
    magnitude: NDArray[np.float64] | None = None
    """(B, 2) signed magnitudes of the operations."""

    def part(self, which: slice) -> ViewParams:
        """The parameters of some of the images."""
        return ViewParams(*(None if array is None else array[which] for array in self))  # type: ignore[arg-type]


def draw(
    spec: ViewSpec,
    uniforms_BS: NDArray[np.float32],
    height: int | NDArray[np.integer[Any]],
    width: int | NDArray[np.integer[Any]],
) -> ViewParams:
    """The parameters of a view for B images from (B, SLOTS) uniforms in [0, 1); sizes in pixels, one or (B,) each."""
    u = uniforms_BS.astype(np.float64)
    low = np.array([max(0.0, 1 - x) for x in (spec.brightness, spec.contrast, spec.saturation)] + [-spec.hue])
    high = np.array([1 + x for x in (spec.brightness, spec.contrast, spec.saturation)] + [spec.hue])
    jittered_B1 = u[:, _JITTER, None] < spec.jitter
    operation_B2 = magnitude_B2 = None
    if spec.auto:
        chance_B2 = np.where(u[:, _AUTO_ON, None] < spec.auto, u[:, _CHANCES], 1.0)  # 1: nothing is so probable
        operation_B2, magnitude_B2 = auto_augment.draw(u[:, _POLICY], chance_B2, u[:, _SIGNS])
    sigma_B = spec.blur_sigma[0] + (spec.blur_sigma[1] - spec.blur_sigma[0]) * u[:, _SIGMA]
    return ViewParams(
        box=_draw_box(spec, u, np.broadcast_to(height, len(u)), np.broadcast_to(width, len(u))),
        flip=u[:, _FLIP] < spec.flip,
        order=np.array(_ORDERS, dtype=np.int64)[(u[:, _ORDER] * len(_ORDERS)).astype(np.int64)],
        factors=np.where(jittered_B1, low + (high - low) * u[:, _FACTORS], (1, 1, 1, 0)).astype(np.float32),
        gray=u[:, _GRAY] < spec.gray,
        sigma=np.where(u[:, _BLUR] < spec.blur, sigma_B, 0).astype(np.float32),
        solarize=u[:, _SOLARIZE] < spec.solarize,
        corners=_draw_corners(spec, u) if spec.perspective else None,
        operation=operation_B2,
        magnitude=magnitude_B2,
    )


def _draw_corners(spec: ViewSpec, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 4, 2): torchvision's RandomPerspective. Each corner moves by whole pixels, uniform from 0 to the most."""
    most = int(spec.distortion * (spec.size // 2))
    inwards_B42 = np.floor(u[:, _CORNERS] * (most + 1)).reshape(-1, 4, 2)
    corners_B42 = _corners(spec.size) + inwards_B42 * [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    return np.where(u[:, _PERSPECTIVE, None, None] < spec.perspective, corners_B42, np.nan)


def _corners(size: int) -> NDArray[np.float64]:
    """(4, 2) x, y of the corner pixels: top left, top right, bottom right, bottom left."""
    last = size - 1
    return np.array([[0, 0], [last, 0], [last, last], [0, last]], dtype=np.float64)


def _perspective_coefficients(corners_n42: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(n, 8) a .. h of ``view_ops.perspective``: the map that takes the moved corners back to where they were."""
    x, y = corners_n42[..., 0], corners_n42[..., 1]
    to = np.broadcast_to(_corners(size), corners_n42.shape)
    zero, one = np.zeros_like(x), np.ones_like(x)
    for_x = np.stack([x, y, one, zero, zero, zero, -to[..., 0] * x, -to[..., 0] * y], axis=2)
    for_y = np.stack([zero, zero, zero, x, y, one, -to[..., 1] * x, -to[..., 1] * y], axis=2)
    wanted = np.concatenate([to[..., 0], to[..., 1]], axis=1)
    return np.linalg.solve(np.concatenate([for_x, for_y], axis=1), wanted[..., None])[..., 0]


def _draw_box(
    spec: ViewSpec, u: NDArray[np.float64], height_B: NDArray[Any], width_B: NDArray[Any]
) -> NDArray[np.float32]:
    """(B, 4) boxes with the distribution of torchvision's RandomResizedCrop.

    That takes the first of ten random (area, ratio) pairs whose box fits, else the largest centred box of a permitted
    ratio. Here all ten are evaluated at once, each from its own slots.
    """
    low, high = spec.crop_scale
    ratio_low, ratio_high = spec.crop_ratio
    area_BA = (height_B * width_B)[:, None] * (low + (high - low) * u[:, _AREA])
    ratio_BA = np.exp(math.log(ratio_low) + (math.log(ratio_high) - math.log(ratio_low)) * u[:, _RATIO])
    w_BA, h_BA = np.rint(np.sqrt(area_BA * ratio_BA)), np.rint(np.sqrt(area_BA / ratio_BA))
    fits_BA = (w_BA > 0) & (w_BA <= width_B[:, None]) & (h_BA > 0) & (h_BA <= height_B[:, None])
    first_B1 = fits_BA.argmax(1)[:, None]
    found_B = fits_BA.any(1)
    # The fallback: the whole image, cut to a permitted ratio.
    whole_w = np.minimum(width_B, np.maximum(np.rint(height_B * ratio_high), 1))
    whole_h = np.minimum(height_B, np.maximum(np.rint(width_B / ratio_low), 1))
    w_B = np.where(found_B, np.take_along_axis(w_BA, first_B1, 1)[:, 0], whole_w)
    h_B = np.where(found_B, np.take_along_axis(h_BA, first_B1, 1)[:, 0], whole_h)
    top_B = np.where(found_B, np.floor(u[:, _TOP] * (height_B - h_B + 1)), (height_B - h_B) // 2)
    left_B = np.where(found_B, np.floor(u[:, _LEFT] * (width_B - w_B + 1)), (width_B - w_B) // 2)
    return np.stack([top_B, left_B, h_B, w_B], axis=1).astype(np.float32)


# ---- images --------------------------------------------------------------------------------------------------------


# Most values that the CPU works on at a time, so that the steps of a view find their input still in the cache.
_CHUNK: Final = 2**19


def finish(
    images_BCHW: Tensor, spec: ViewSpec, params: ViewParams, *, flip: bool = False, channels_last: bool = False
) -> Tensor:
    """Everything after the crop: jitter, gray, blur, solarize, normalise. The input is left as it is.

    images_BCHW: float in [0, 1], or uint8, square: crops of the view. flip: also do the flips of ``params`` (``crop``
    has done them already). Returns (B, C, S, S) float32, normalised.
    """
    _check_channels(images_BCHW, spec)

    def one(part: Tensor, drawn: ViewParams, out: Tensor | None) -> Tensor:
        return _finish_(view_ops.to_unit(part), spec, drawn, flip, out)

    return _by_chunks(one, images_BCHW, params, images_BCHW.shape[3], channels_last)


def make_view(images_BCHW: Tensor, spec: ViewSpec, params: ViewParams, channels_last: bool = False) -> Tensor:
    """(B, C, S, S) float32, normalised: one random view of uint8 (or [0, 1] float) images, on their device."""
    _check_channels(images_BCHW, spec)

    def one(part: Tensor, drawn: ViewParams, out: Tensor | None) -> Tensor:
        return _finish_(crop(part, drawn.box, drawn.flip, spec.size), spec, drawn, False, out)

    return _by_chunks(one, images_BCHW, params, spec.size, channels_last)


@torch.no_grad()
def _by_chunks(
    one: Callable[[Tensor, ViewParams, Tensor | None], Tensor],
    images: Tensor,
    params: ViewParams,
    size: int,
    channels_last: bool,
) -> Tensor:
    """``one`` of all images: on a GPU at once, on a CPU in equal parts that fit its cache."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    B, C = images.shape[:2]
    if images.device.type != "cpu":
        return one(images, params, None).contiguous(memory_format=layout)
    chunks = max(1, math.ceil(B * C * size * size / _CHUNK))
    step = max(1, math.ceil(B / chunks))
    out = torch.empty(B, C, size, size, memory_format=layout)
    for first in range(0, B, step):
        part = slice(first, first + step)
        one(images[part], params.part(part), out[part])
    return out


def _finish_(x: Tensor, spec: ViewSpec, params: ViewParams, flip: bool, out: Tensor | None) -> Tensor:
    """``finish`` of a part, overwriting it, into ``out`` where given.

    Which images an operation is for is known on the host: no waiting.
    """
    colour = spec.channels == 3
    hue_B = params.factors[:, HUE] * colour
    passes_43B = _jitter_passes(params, colour)
    jitter = bool((passes_43B[:, 0] != 1).any() or hue_B.any())
    gray_B = params.gray & colour
    chosen = [params.flip & flip, gray_B, params.sigma > 0, params.solarize]
    chosen += [(params.order[:, i] == HUE) & (hue_B != 0) for i in range(4)]
    mean_std = np.array([spec.mean, spec.std], dtype=np.float32)
    *where, passes, hue, sigma, mean_std_2C = view_ops.send(
        [np.flatnonzero(mask) for mask in chosen] + [passes_43B, hue_B, params.sigma, mean_std], x.device
    )
    flipped, grayed, blurred, solarized, *hue_turned = where

    if len(flipped):
        x.index_copy_(0, flipped, x.index_select(0, flipped).flip(3))
    if params.corners is not None:
        x = _perspective_(x, params.corners)
    if params.operation is not None and params.magnitude is not None:
        x = auto_augment.apply_(x, params.operation, params.magnitude)
    if spec.gray_first:
        _gray_(x, grayed)
    if jitter:
        for turned, coefficients in zip(hue_turned, passes, strict=True):
            x = view_ops.blend(x, *coefficients)
            if len(turned):
                part = view_ops.hue_shift(x.index_select(0, turned), hue.index_select(0, turned))
                x.index_copy_(0, turned, part)
    if not spec.gray_first:
        _gray_(x, grayed)
    if len(blurred):
        part = view_ops.blur(x.index_select(0, blurred), sigma.index_select(0, blurred), spec.kernel)
        x.index_copy_(0, blurred, part)
    if len(solarized):
        x.index_copy_(0, solarized, view_ops.solarize(x.index_select(0, solarized), spec.solarize_threshold))
    return _normalise_(x, mean_std_2C, out)


def _perspective_(x: Tensor, corners_B42: NDArray[np.float64]) -> Tensor:
    warped = np.flatnonzero(~np.isnan(corners_B42[:, 0, 0]))
    if len(warped):
        coefficients = _perspective_coefficients(corners_B42[warped], x.shape[3])
        where, coefficient_n8 = view_ops.send([warped, coefficients], x.device)
        x.index_copy_(0, where, view_ops.perspective(x.index_select(0, where), coefficient_n8))
    return x


def _jitter_passes(params: ViewParams, colour: bool) -> NDArray[np.float32]:
    """(4, 3, B): for the jitter's passes 1 to 4, the coefficients of ``view_ops.blend`` for each image."""
    order_4B = params.order.T
    factor_4B = np.take_along_axis(params.factors, params.order, 1).T
    idle = (order_4B == HUE) | ((order_4B == SATURATION) & (not colour))
    own_4B = np.where(idle, np.float32(1), factor_4B)
    rest_4B = 1 - own_4B
    passes = [own_4B, rest_4B * (order_4B == SATURATION), rest_4B * (order_4B == CONTRAST)]
    return np.ascontiguousarray(np.stack(passes, axis=1), dtype=np.float32)


def _gray_(x: Tensor, where: Tensor) -> None:
    if len(where):
        x.index_copy_(0, where, view_ops.luma(x.index_select(0, where)).expand(-1, x.shape[1], -1, -1))


def _normalise_(x: Tensor, mean_std_2C: Tensor, out: Tensor | None = None) -> Tensor:
    """Into ``out``, of any memory layout, or in place."""
    mean, std = mean_std_2C[:, :, None, None]
    return torch.sub(x, mean, out=x if out is None else out).div_(std)


def _check_channels(images: Tensor, spec: ViewSpec | EvalSpec) -> None:
    if images.shape[1] != spec.channels:
        raise ValueError(
            f"images of {images.shape[1]} channels for a view with mean = {spec.mean}: give mean and std for each channel"
        )


@torch.no_grad()
def eval_view(images_BCHW: Tensor, spec: EvalSpec, channels_last: bool = False) -> Tensor:
    """(B, C, S, S) float32, normalised: torchvision's Resize(resize), CenterCrop(size) of uint8 or [0, 1] images."""
    _check_channels(images_BCHW, spec)
    height, width = images_BCHW.shape[2:]
    shorter, longer = min(height, width), max(height, width)
    other = int(spec.resize * longer / shorter)
    new_height, new_width = (other, spec.resize) if width <= height else (spec.resize, other)
    x = view_ops.to_unit(images_BCHW)
    if (new_height, new_width) != (height, width):
        x = F.interpolate(x, (new_height, new_width), mode="bilinear", antialias=True)
    top, left = round((new_height - spec.size) / 2), round((new_width - spec.size) / 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x[:, :, top : top + spec.size, left : left + spec.size].contiguous(memory_format=layout)
    mean_std = view_ops.send([np.array([spec.mean, spec.std], dtype=np.float32)], x.device)[0]
    return _normalise_(x, mean_std)


def batch_views(
    images_BCHW: Tensor,
    rows: NDArray[np.int64],
    specs: Sequence[ViewSpec],
    seed: int,
    epoch: int,
    channels_last: bool = False,
) -> tuple[Tensor, ...]:
    """All views of a batch from one read of its images; view v of ``row`` follows from (seed, epoch, row, v) alone."""
    height, width = images_BCHW.shape[2:]
    views = []
    for v, spec in enumerate(specs):
        params = draw(spec, uniforms(seed, epoch, rows, v, SLOTS), height, width)
        views.append(make_view(images_BCHW, spec, params, channels_last))
    return tuple(views)
