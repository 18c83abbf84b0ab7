"""Views against torchvision: each operation, the whole pipeline, the distribution of the parameters."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from raycon.core.config import ConfigError
from raycon.core.stream import uniforms
from raycon.nn import view_ops, views
from raycon.nn.views import SLOTS, ViewParams, ViewSpec, draw

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OP_ATOL = 2e-6
RESAMPLE_ATOL = 1e-5


def images(b: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    """uint8 images with smooth parts, hard edges, grey pixels, pure black and white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8, generator=generator)
    x[:, :, : h // 4] = x[:, :1, : h // 4]  # grey rows
    x[:, :, h // 4 : h // 3] = torch.linspace(0, 255, w).to(torch.uint8)
    x[:, :, -1, : w // 2], x[:, :, -1, w // 2 :] = 0, 255
    return x


def spec_of(c: int = 3, **options: Any) -> ViewSpec:
    options.setdefault("size", 32)
    return ViewSpec(mean=MEAN[:c], std=STD[:c], **options)


def drawn(spec: ViewSpec, b: int, h: int, w: int, seed: int = 0) -> ViewParams:
    return draw(spec, uniforms(seed, 0, np.arange(b), 0, SLOTS), h, w)


def quiet(b: int, h: int, w: int) -> ViewParams:
    """Parameters that change nothing, for tests to replace parts of."""
    return ViewParams(
        box=np.tile(np.array([0, 0, h, w], np.float32), (b, 1)),
        flip=np.zeros(b, bool),
        order=np.tile(np.arange(4), (b, 1)),
        factors=np.tile(np.array([1, 1, 1, 0], np.float32), (b, 1)),
        gray=np.zeros(b, bool),
        sigma=np.zeros(b, np.float32),
        solarize=np.zeros(b, bool),
    )


def plain(c: int = 3, **options: Any) -> ViewSpec:
    """A spec that does not normalise."""
    options.setdefault("size", 32)
    return ViewSpec(mean=(0.0,) * c, std=(1.0,) * c, **options)


def close(actual: Tensor, expected: Tensor, atol: float = OP_ATOL) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def reference_view(image: Tensor, spec: ViewSpec, p: ViewParams, i: int) -> Tensor:
    """Image i (C, H, W) uint8 through torchvision, operation after operation, in the order of the papers' code."""
    top, left, height, width = (int(v) for v in p.box[i])
    x = TF.to_dtype(image, torch.float32, scale=True)
    x = TF.resized_crop(x, top, left, height, width, [spec.size, spec.size], antialias=True)
    colour = x.shape[0] == 3

    def gray(x: Tensor) -> Tensor:
        return TF.rgb_to_grayscale(x, 3) if colour and p.gray[i] else x

    if spec.gray_first:
        x = gray(x)
    for op in p.order[i]:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
        x = adjust(x, float(p.factors[i, op]))
    if not spec.gray_first:
        x = gray(x)
    if p.sigma[i] > 0:
        x = TF.gaussian_blur(x, [spec.kernel, spec.kernel], [float(p.sigma[i])] * 2)
    if p.solarize[i]:
        x = TF.solarize(x, spec.solarize_threshold)
    if p.flip[i]:
        x = TF.horizontal_flip(x)
    return TF.normalize(x, list(spec.mean), list(spec.std))


# ---- operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "w", "size"),
    [(32, 32, 32), (28, 28, 32), (8, 8, 32), (64, 40, 24), (40, 64, 17), (96, 120, 32), (60, 50, 96), (150, 200, 112)],
)
@pytest.mark.parametrize("c", [1, 3])
def test_crop_equals_torchvision(h: int, w: int, size: int, c: int) -> None:
    x = images(12, c, h, w)
    box = np.concatenate(
        [
            drawn(spec_of(crop_scale=(0.05, 1.0), crop_ratio=(0.3, 3.0)), 9, h, w).box,
            np.array([[0, 0, h, w], [h - 1, w - 1, 1, 1], [1, 2, h - 3, 4]], np.float32),
        ]
    )
    flip = np.arange(12) % 2 == 1
    for source in (x, x.float() / 255):
        actual = views.crop(source, box, flip, size)
        assert actual.dtype == torch.float32
        for i in range(12):
            top, left, height, width = (int(v) for v in box[i])
            expected = TF.resized_crop(x[i].float() / 255, top, left, height, width, [size, size], antialias=True)
            close(actual[i], TF.horizontal_flip(expected) if flip[i] else expected, RESAMPLE_ATOL)


def test_crop_of_the_whole_image_at_its_own_size_is_exact() -> None:
    x = images(3, 3, 32, 32)
    p = quiet(3, 32, 32)
    assert torch.equal(views.crop(x, p.box, p.flip, 32), x.float() / 255)


def test_crop_reads_any_memory_layout() -> None:
    x = images(5, 3, 20, 24)
    p = drawn(spec_of(), 5, 20, 24)
    expected = views.crop(x, p.box, p.flip, 16)
    assert torch.equal(views.crop(x.contiguous(memory_format=torch.channels_last), p.box, p.flip, 16), expected)


def test_views_are_precise_when_products_may_be_rounded() -> None:
    x = images(4, 3, 32, 32)
    p = drawn(spec_of(), 4, 32, 32)
    expected = views.make_view(x, spec_of(blur=1.0), p)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = views.make_view(x, spec_of(blur=1.0), p)
        # Not every processor has the rounded products, so look at the switch itself.
        with view_ops.full_precision(x.device):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"  # put back
    finally:
        torch.set_float32_matmul_precision("highest")
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


FACTORS = {
    0: (0.0, 0.6, 1.0, 1.4, 1.8),
    1: (0.0, 0.6, 1.4, 1.8),
    2: (0.0, 0.3, 0.6, 1.4, 1.8),
    3: (-0.5, -0.4, -0.1, 0.2, 0.5),
}


@pytest.mark.parametrize("op", [0, 1, 2, 3])
@pytest.mark.parametrize("c", [1, 3])
def test_each_jitter_operation_equals_torchvision(op: int, c: int) -> None:
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
    factors = FACTORS[op]
    x = images(len(factors), c, 32, 32)
    p = quiet(len(factors), 32, 32)
    p.factors[:, op] = factors
    actual = views.finish(x, plain(c), p)
    for i, factor in enumerate(factors):
        close(actual[i], adjust(x[i].float() / 255, factor))
    if c == 1 and op in (2, 3):
        assert torch.equal(actual, x.float() / 255)
    else:
        assert not torch.allclose(actual, x.float() / 255)  # something was done


def test_jitter_in_every_order_equals_torchvision() -> None:
    orders = list(itertools.permutations(range(4)))
    x = images(24, 3, 16, 16)
    generator = np.random.default_rng(3)
    p = quiet(24, 16, 16)._replace(order=np.array(orders))
    p.factors[:] = np.concatenate([generator.uniform(0.2, 1.8, (24, 3)), generator.uniform(-0.4, 0.4, (24, 1))], 1)
    actual = views.finish(x, plain(size=16), p)
    for i in range(24):
        # Rounding before a hue of nearly grey pixels or a clamp is carried through three more operations.
        close(actual[i], reference_view(x[i], plain(size=16), p, i), 5e-6)


def test_gray_solarize_normalise_and_flip_equal_torchvision() -> None:
    x = images(4, 3, 32, 32)
    unit = x.float() / 255
    p = quiet(4, 32, 32)
    close(views.finish(x, plain(), p._replace(gray=np.array([1, 0, 1, 0], bool)))[:2],
          torch.stack([TF.rgb_to_grayscale(unit[0], 3), unit[1]]))  # fmt: skip
    for threshold in (0.3, 1.0):  # at the threshold itself, too: there are white pixels
        solarized = views.finish(
            x, plain(solarize_threshold=threshold), p._replace(solarize=np.array([1, 0, 1, 0], bool))
        )
        close(solarized[:2], torch.stack([TF.solarize(unit[0], threshold), unit[1]]))
    close(views.finish(x, spec_of(), p), TF.normalize(unit, list(MEAN), list(STD)))
    flipped = views.finish(x, plain(), p._replace(flip=np.array([1, 0, 1, 0], bool)), flip=True)
    assert torch.equal(flipped[:2], torch.stack([TF.horizontal_flip(unit[0]), unit[1]]))


@pytest.mark.parametrize("size", [14, 32, 80])  # a matrix per image up to 64 pixels, convolutions above
@pytest.mark.parametrize("c", [1, 3])
def test_blur_equals_torchvision_and_commutes_with_a_flip(size: int, c: int) -> None:
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    unit = images(4, c, size, size).float() / 255
    for kernel in (3, 13, 23):
        actual = view_ops.blur(unit, sigma, kernel)
        for i in range(4):
            close(actual[i], TF.gaussian_blur(unit[i], [kernel, kernel], [float(sigma[i])] * 2))
        close(view_ops.blur(unit.flip(3), sigma, kernel), actual.flip(3), 1e-6)


def test_blur_wider_than_the_image_reflects_again() -> None:
    x = images(2, 1, 4, 4).float() / 255
    actual = view_ops.blur(x, torch.tensor([2.0, 1.0]), 13)  # reach 6 on 4 pixels
    reflected = np.pad(x.numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect")
    tap = np.arange(-6, 7)
    for i, sigma in enumerate((2.0, 1.0)):
        weight = np.exp(-0.5 * (tap / sigma) ** 2)
        kernel = np.outer(weight, weight) / weight.sum() ** 2
        expected = [[(kernel * reflected[i, 0, r : r + 13, q : q + 13]).sum() for q in range(4)] for r in range(4)]
        np.testing.assert_allclose(actual[i, 0].numpy(), expected, atol=1e-6)


# ---- the pipeline --------------------------------------------------------------------------------------------------

PIPELINES = [(preset, name) for preset in ("mocov1", "mocov2", "simclr", "sce-mocov3") for name in ("strong", "weak")]


@pytest.mark.parametrize(("preset", "name"), [*PIPELINES, ("sce-mocov3", "strong-beta")])
@pytest.mark.parametrize("c", [1, 3])
def test_a_view_equals_torchvision_in_sequence(preset: str, name: str, c: int) -> None:
    spec = views.view_spec(preset, name, 32, MEAN[:c], STD[:c])
    x = images(64, c, 40, 36)
    p = drawn(spec, 64, 40, 36, seed=5)
    actual = views.make_view(x, spec, p)
    cropped = views.finish(views.crop(x, p.box, p.flip, 32), spec, p)
    close(cropped, actual, 1e-6)
    for i in range(64):
        close(actual[i], reference_view(x[i], spec, p, i), 6e-5)  # resampling 1e-5, divided by std 0.22


def test_large_views_equal_torchvision_too() -> None:
    spec = views.view_spec("sce-mocov3", "strong", 112, MEAN, STD)
    x = images(20, 3, 150, 130)  # several chunks on a CPU, the last one smaller
    p = drawn(spec, 20, 150, 130)
    actual = views.make_view(x, spec, p, channels_last=True)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    for i in range(20):
        close(actual[i], reference_view(x[i], spec, p, i), 6e-5)


def test_inputs_are_left_alone() -> None:
    spec = spec_of(jitter=1.0, gray=1.0, blur=1.0, solarize=1.0)
    for x in (images(4, 3, 32, 32), images(4, 3, 32, 32).float() / 255):
        before = x.clone()
        p = drawn(spec, 4, 32, 32)
        views.make_view(x, spec, p)
        views.finish(x, spec, p, flip=True)
        views.eval_view(x, views.eval_spec(32, MEAN, STD))
        assert torch.equal(x, before)


def test_a_rows_view_does_not_depend_on_its_batch() -> None:
    spec = views.view_spec("mocov2", "strong", 32, MEAN, STD)
    x = images(50, 3, 30, 34)
    rows = np.arange(1000, 1050)
    whole = views.batch_views(x, rows, [spec, spec], seed=7, epoch=3)
    pick = np.array([41, 3, 17])
    part = views.batch_views(x[torch.from_numpy(pick)], rows[pick], [spec, spec], seed=7, epoch=3)
    for v in range(2):
        p_whole = draw(spec, uniforms(7, 3, rows, v, SLOTS), 30, 34)
        p_part = draw(spec, uniforms(7, 3, rows[pick], v, SLOTS), 30, 34)
        for a, b in zip(p_whole.part(pick), p_part, strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(a, b)
        close(part[v], whole[v][torch.from_numpy(pick)], 1e-6)
    assert not torch.allclose(whole[0], whole[1])
    assert not torch.allclose(whole[0], views.batch_views(x, rows, [spec], seed=7, epoch=4)[0])


def test_views_can_differ_in_size_and_kind() -> None:
    names = ("strong-alpha", "strong-beta", "local-1", "local-2", "local-3", "local-4")
    specs = [views.view_spec("sce-multicrop", name, 56, MEAN, STD) for name in names]
    out = views.batch_views(images(3, 3, 60, 70), np.arange(3), specs, 0, 0)
    assert [tuple(v.shape) for v in out] == [(3, 3, s, s) for s in (56, 56, 48, 40, 32, 24)]


def test_gradients_may_pass_through_what_follows() -> None:
    (view,) = views.batch_views(images(2, 3, 32, 32), np.arange(2), [spec_of()], 0, 0)
    weight = torch.ones(3, requires_grad=True)
    (view.mean((0, 2, 3)) * weight).sum().backward()
    assert weight.grad is not None


def test_an_empty_batch_gives_an_empty_view() -> None:
    assert views.batch_views(images(1, 3, 32, 32)[:0], np.arange(0), [spec_of()], 0, 0)[0].shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("h", "w", "size", "resize"),
    [
        (32, 32, 32, None),
        (8, 8, 32, None),
        (50, 40, 32, None),
        (150, 201, 112, None),
        (201, 150, 112, None),
        (45, 45, 24, 31),
    ],
)
@pytest.mark.parametrize("c", [1, 3])
def test_eval_view_equals_torchvision(h: int, w: int, size: int, resize: int | None, c: int) -> None:
    x = images(3, c, h, w)
    spec = views.eval_spec(size, MEAN[:c], STD[:c], resize)
    unit = TF.to_dtype(x, torch.float32, scale=True)
    wanted = resize or {32: 32, 112: 128}[size]
    expected = TF.center_crop(TF.resize(unit, [wanted], antialias=True), [size, size])
    expected = TF.normalize(expected, list(spec.mean), list(spec.std))
    close(views.eval_view(x, spec), expected)
    last = views.eval_view(x, spec, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    close(last, expected)


# ---- PIL's 8-bit operations, which the papers used -----------------------------------------------------------------

# Largest and mean difference allowed, in grey levels of 255, measured on the image of the file. PIL truncates to 8 bits,
# takes the rounded mean as the contrast's reference and keeps the hue in 8 bits (a step of it moves a saturated colour by
# 6 grey levels).
PIL_OPS = {
    "brightness_06": (0, 0.6, 0.9, 0.4),
    "contrast_14": (1, 1.4, 0.9, 0.3),
    "saturation_14": (2, 1.4, 1.1, 0.35),
    "hue_p01": (3, 0.1, 12.5, 1.25),
    "hue_m04": (3, -0.4, 6.5, 0.6),
}


def pil_difference(image: NDArray[np.uint8], expected: NDArray[np.uint8], p: ViewParams) -> NDArray[np.float64]:
    actual = views.finish(torch.from_numpy(image).permute(2, 0, 1)[None], plain(), p)[0].permute(1, 2, 0)
    return np.abs(actual.numpy().astype(np.float64) * 255 - expected)


@pytest.mark.parametrize("name", list(PIL_OPS))
def test_jitter_is_near_pil(name: str) -> None:
    golden = np.load(GOLDEN / "pcl_misc.npz")
    op, factor, most, average = PIL_OPS[name]
    p = quiet(1, 32, 32)
    p.factors[0, op] = factor
    difference = pil_difference(golden["img"], golden[name], p)
    assert difference.max() <= most
    assert difference.mean() <= average


def test_gray_and_blur_are_near_pil() -> None:
    golden = np.load(GOLDEN / "pcl_misc.npz")
    gray = pil_difference(golden["img"], golden["gray"], quiet(1, 32, 32)._replace(gray=np.ones(1, bool)))
    assert gray.max() <= 0.6
    for sigma, expected in zip(golden["blur_sigma"], golden["blur"], strict=True):
        p = quiet(1, 32, 32)._replace(sigma=np.array([sigma], np.float32))
        difference = pil_difference(golden["img"], expected, p)
        # PIL blurs with boxes, and repeats the edge pixel where torchvision reflects: the border differs more.
        assert difference.mean() <= 1.4
        assert difference[6:-6, 6:-6].max() <= 6.5
        assert difference[6:-6, 6:-6].mean() <= 0.6


# ---- parameters ----------------------------------------------------------------------------------------------------


def box_by_attempts(spec: ViewSpec, u: NDArray[np.float32], height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop's algorithm, one attempt after the other, from the same uniforms."""
    for attempt in range(10):
        area = height * width * (spec.crop_scale[0] + (spec.crop_scale[1] - spec.crop_scale[0]) * float(u[attempt]))
        low, high = (math.log(r) for r in spec.crop_ratio)
        ratio = math.exp(low + (high - low) * float(u[10 + attempt]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(float(u[20]) * (height - h + 1)), int(float(u[21]) * (width - w + 1)), h, w
    w, h = width, height
    if width / height < min(spec.crop_ratio):
        h = round(w / min(spec.crop_ratio))
    elif width / height > max(spec.crop_ratio):
        w = round(h * max(spec.crop_ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("h", "w", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 200, (0.5, 1.0), (3 / 4, 4 / 3)),  # mostly the fallback, wide
        (200, 20, (0.5, 1.0), (3 / 4, 4 / 3)),  # tall
        (30, 40, (1.0, 1.0), (1.0, 1.0)),
        (2, 2, (0.01, 0.05), (3 / 4, 4 / 3)),  # boxes that round to nothing
    ],
)
def test_boxes_follow_random_resized_crop(
    h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    spec = spec_of(crop_scale=scale, crop_ratio=ratio)
    u = uniforms(1, 2, np.arange(3000), 0, SLOTS)
    box = draw(spec, u, h, w).box
    assert box.dtype == np.float32
    np.testing.assert_array_equal(box[:500], [box_by_attempts(spec, row, h, w) for row in u[:500]])
    top, left, height, width = box.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= h).all()
    assert (left + width <= w).all()
    # And torchvision's own generator has the same distribution.
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(32, scale=scale, ratio=ratio)
    image = torch.empty(3, h, w)
    theirs = [crop.make_params([image]) for _ in range(1500)]
    for mine, name in zip(box.T, ("top", "left", "height", "width"), strict=True):
        assert stats.ks_2samp(mine, [p[name] for p in theirs]).pvalue > 1e-3, name


def test_sizes_may_differ_from_image_to_image() -> None:
    spec = spec_of()
    u = uniforms(0, 0, np.arange(4), 0, SLOTS)
    heights, widths = np.array([32, 100, 20, 64]), np.array([48, 30, 200, 64])
    together = draw(spec, u, heights, widths).box
    for i in range(4):
        np.testing.assert_array_equal(together[i], draw(spec, u[i : i + 1], int(heights[i]), int(widths[i])).box[0])


def test_other_parameters_follow_their_ranges_and_probabilities() -> None:
    spec = spec_of(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, jitter=0.8, flip=0.5, gray=0.2, blur=0.3,
                   solarize=0.1)  # fmt: skip
    n = 20000
    p = drawn(spec, n, 32, 32)
    for drawn_mask, share in ((p.flip, 0.5), (p.gray, 0.2), (p.sigma > 0, 0.3), (p.solarize, 0.1)):
        assert stats.binomtest(int(drawn_mask.sum()), n, share).pvalue > 1e-3
    idle = (p.factors == (1, 1, 1, 0)).all(1)
    assert stats.binomtest(int(idle.sum()), n, 0.2).pvalue > 1e-3
    theirs = T.ColorJitter(0.4, 1.5, 0.2, 0.1)
    for op, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        low, high = getattr(theirs, name)
        assert stats.kstest((p.factors[~idle, op] - low) / (high - low), "uniform").pvalue > 1e-3, name
    assert stats.kstest((p.sigma[p.sigma > 0] - 0.1) / 1.9, "uniform").pvalue > 1e-3
    counts = np.unique(p.order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    # Independent of one another.
    columns = np.column_stack([p.box, p.flip, p.gray, p.solarize, p.order[:, 0], p.factors[:, 0]])[~idle]
    correlation = np.corrcoef(columns[:, 2:].T)  # without top and left, which depend on height and width
    correlation[0, 1] = correlation[1, 0] = 0  # as height and width do on one another
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.04


def test_each_parameter_has_its_own_slot() -> None:
    """Slots keep their meaning: what a stored run drew must be drawn again by later versions."""
    spec = spec_of(solarize=0.5, gray=0.5, blur=0.5, jitter=0.5)
    probability = {22: "flip", 23: "factors", 29: "gray", 30: "sigma", 32: "solarize"}
    # Only the first attempt's area and ratio count: it fits.
    value = {0: "box", 10: "box", 20: "box", 21: "box", 24: "order", 31: "sigma"} | dict.fromkeys(
        range(25, 29), "factors"
    )
    base = np.full((1, SLOTS), 0.375, np.float32)  # below every probability: all is done
    for slot in range(SLOTS):
        changed = base.copy()
        changed[0, slot] = 0.625
        pairs = zip(ViewParams._fields, draw(spec, base, 100, 100), draw(spec, changed, 100, 100), strict=True)
        different = [name for name, a, b in pairs if not np.array_equal(a, b)]
        assert different == [name for name in [(probability | value).get(slot)] if name], slot


def test_one_channel_uses_the_same_slots() -> None:
    colour, grey = spec_of(3), spec_of(1)
    for a, b in zip(drawn(colour, 20, 28, 28), drawn(grey, 20, 28, 28), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- presets and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", views.preset_names())
def test_every_preset_has_strong_weak_and_none(preset: str) -> None:
    for size in (8, 32, 224):
        for name in ("strong", "weak", "none"):
            assert views.view_spec(preset, name, size, MEAN, STD).size == size
    x = images(4, 3, 32, 32)
    spec = views.view_spec(preset, "none", 32, (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(views.batch_views(x, np.arange(4), [spec], 0, 0)[0], x.float() / 255)


def test_moco_presets_are_the_published_ones() -> None:
    v2 = views.view_spec("mocov2", "strong", 224, MEAN, STD)
    assert v2 == views.view_spec("pcl", "strong", 224, MEAN, STD)
    assert (v2.crop_scale, v2.crop_ratio, v2.flip) == ((0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (v2.jitter, v2.brightness, v2.contrast, v2.saturation, v2.hue) == (0.8, 0.4, 0.4, 0.4, 0.1)
    assert (v2.gray, v2.gray_first, v2.blur, v2.blur_sigma, v2.solarize) == (0.2, False, 0.5, (0.1, 2.0), 0.0)
    assert v2.kernel == 13  # three sigma either side, PIL's reach
    v1 = views.view_spec("mocov1", "strong", 224, MEAN, STD)
    assert (v1.jitter, v1.hue, v1.gray, v1.gray_first, v1.blur) == (1.0, 0.4, 0.2, True, 0.0)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"mocov3.*did you mean .*mocov1, mocov2"):
        views.view_spec("mocov3", "strong", 32, MEAN, STD)
    with pytest.raises(ConfigError, match=r"strnog.*did you mean strong\? there are strong, weak, none"):
        views.view_spec("mocov2", "strnog", 32, MEAN, STD)


def test_values_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        spec_of(flip=1.5, hue=0.6, crop_scale=(0.5, 0.2), blur_kernel=4, brightness=-1.0)
    for name in ("flip = 1.5", "hue = 0.6", "crop_scale = (0.5, 0.2)", "blur_kernel = 4", "brightness = -1.0"):
        assert name in str(error.value)
    with pytest.raises(ConfigError, match="mean"):
        ViewSpec(size=32, mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"std = \(0.0,\)"):
        ViewSpec(size=32, mean=(0.5,), std=(0.0,))
    with pytest.raises(ConfigError, match="resize = 16: give 32"):
        views.eval_spec(32, MEAN, STD, resize=16)
    with pytest.raises(ValueError, match="images of 1 channels"):
        views.batch_views(images(2, 1, 32, 32), np.arange(2), [spec_of(3)], 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [1, 3])
def test_views_on_a_gpu_equal_those_on_the_cpu_without_waiting(c: int) -> None:
    specs = [
        views.view_spec("mocov2", "strong", 96, MEAN[:c], STD[:c]),
        views.view_spec("mocov1", "strong", 96, MEAN[:c], STD[:c]),
        views.view_spec("maskcon-sop", "strong", 96, MEAN[:c], STD[:c]),
    ]
    x = images(32, c, 120, 100)
    expected = views.batch_views(x, np.arange(32), specs, 0, 0)
    there = x.cuda()
    views.batch_views(there, np.arange(32), specs, 0, 0)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = views.batch_views(there, np.arange(32), specs, 0, 0, channels_last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    for a, b in zip(actual, expected, strict=True):
        close(a.cpu(), b, 6e-5)
