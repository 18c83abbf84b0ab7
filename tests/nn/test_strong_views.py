"""Perspective and AutoAugment against torchvision (perspective) and PIL (the policy's operations), and their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import Tensor

from raycon.core.stream import uniforms
from raycon.nn import auto_augment, views
from raycon.nn.views import SLOTS, ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def spec_of(c: int = 3, **options: object) -> ViewSpec:
    quiet = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    return ViewSpec(size=24, mean=(0.0,) * c, std=(1.0,) * c, **quiet | options)  # type: ignore[arg-type]


def images(n: int, c: int, side: int = 24) -> Tensor:
    x = torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    x[:, :, : side // 3] //= 4  # so that contrast can be stretched
    x[0] = 77  # an image of one grey value
    return x


@pytest.mark.parametrize("c", [1, 3])
def test_perspective_equals_torchvision(c: int) -> None:
    spec, x = spec_of(c, perspective=0.7, distortion=0.5), images(12, c)
    params = views.draw(spec, uniforms(0, 0, np.arange(12), 0, SLOTS), 24, 24)
    actual = views.make_view(x, spec, params)
    assert params.corners is not None
    warped = ~np.isnan(params.corners[:, 0, 0])
    assert 0 < warped.sum() < 12
    start = [[0, 0], [23, 0], [23, 23], [0, 23]]
    for i in range(12):
        expected = x[i].float() / 255
        if warped[i]:
            expected = TF.perspective(expected, start, params.corners[i].astype(int).tolist())
        torch.testing.assert_close(actual[i], expected, rtol=0, atol=2e-4)


def test_perspectives_are_drawn_like_torchvision_s() -> None:
    spec = spec_of(perspective=1.0, distortion=0.5)
    ours = views.draw(spec, uniforms(0, 0, np.arange(4000), 0, SLOTS), 24, 24).corners
    torch.manual_seed(0)
    transform, image = T.RandomPerspective(0.5, p=1.0), torch.empty(3, 24, 24)
    theirs = np.array([transform.make_params([image])["coefficients"] for _ in range(10)])
    assert theirs.shape == (10, 8)
    start, classic = [[0, 0], [23, 0], [23, 23], [0, 23]], __import__("torchvision").transforms.RandomPerspective
    ends = np.array([classic.get_params(24, 24, 0.5)[1] for _ in range(4000)])
    assert ours is not None
    assert classic.get_params(24, 24, 0.5)[0] == start
    for corner in range(4):
        for axis in range(2):
            pair = [np.unique(e[:, corner, axis], return_counts=True) for e in (ours, ends)]
            np.testing.assert_array_equal(pair[0][0], pair[1][0])
            assert stats.chi2_contingency([pair[0][1], pair[1][1]]).pvalue > 1e-4


def by_pil(image: Image.Image, operation: str, m: float) -> Image.Image:
    """The operation as PIL does it, with its signed magnitude."""
    affine, size = Image.Transform.AFFINE, image.size
    fill = (128,) * len(image.getbands()) if image.mode == "RGB" else 128
    enhance = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
        "brightness": ImageEnhance.Brightness,
    }
    if operation in enhance:
        return enhance[operation](image).enhance(1 + m)
    if operation == "shearX":
        return image.transform(size, affine, (1, m, 0, 0, 1, 0), Image.Resampling.BICUBIC, fillcolor=fill)
    if operation == "shearY":
        return image.transform(size, affine, (1, 0, 0, m, 1, 0), Image.Resampling.BICUBIC, fillcolor=fill)
    if operation == "translateX":
        return image.transform(size, affine, (1, 0, m * size[0], 0, 1, 0), fillcolor=fill)
    if operation == "translateY":
        return image.transform(size, affine, (1, 0, 0, 0, 1, m * size[0]), fillcolor=fill)
    if operation == "rotate":
        return image.rotate(m, fillcolor=fill)
    if operation == "posterize":
        return ImageOps.posterize(image, int(m))
    if operation == "solarize":
        return ImageOps.solarize(image, m)  # type: ignore[arg-type]
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[operation](
        image
    )


@pytest.mark.parametrize("operation", auto_augment.OPERATIONS)
@pytest.mark.parametrize(("c", "side"), [(1, 28), (3, 28), (3, 33)])
def test_each_operation_equals_pil(operation: str, c: int, side: int) -> None:
    x = images(20, c, side)
    levels = np.tile(np.arange(10), 2)
    sign = np.where((np.arange(20) >= 10) & (operation in auto_augment.SIGNED), -1.0, 1.0)
    magnitude = sign * [auto_augment.magnitude(operation, level) for level in levels]
    code = np.full(20, auto_augment.OPERATIONS.index(operation))
    actual = auto_augment.apply_(x.float() / 255, np.stack([code, code * 0 - 1], 1), np.stack([magnitude] * 2, 1))
    for i in range(20):
        picture = Image.fromarray(x[i, 0].numpy() if c == 1 else x[i].permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(by_pil(picture, operation, float(magnitude[i]))))
        expected = expected[None] if c == 1 else expected.permute(2, 0, 1)
        assert torch.equal((actual[i] * 255).round().to(torch.uint8), expected), (i, magnitude[i])


def test_policies_are_drawn_as_published() -> None:
    n = 50_000
    params = views.draw(spec_of(auto=0.8), uniforms(0, 0, np.arange(n), 0, SLOTS), 24, 24)
    assert params.operation is not None
    assert params.magnitude is not None
    for step in (0, 1):
        for code, name in enumerate(auto_augment.OPERATIONS):
            share = 0.8 * sum(p[step][1] for p in auto_augment.POLICIES if p[step][0] == name) / 25
            done = int((params.operation[:, step] == code).sum())
            assert (share == 0 and done == 0) or stats.binomtest(done, n, share).pvalue > 1e-4, (name, step)
            chosen = params.magnitude[params.operation[:, step] == code, step]
            if name in auto_augment.SIGNED and done and (chosen != 0).any():
                moved = chosen[chosen != 0]
                assert stats.binomtest(int((moved < 0).sum()), len(moved), 0.5).pvalue > 1e-4
            else:
                assert (chosen >= 0).all()


def test_two_operations_follow_each_other_and_others_stay_untouched() -> None:
    x = images(3, 3).float() / 255 * 0.999
    invert, posterize = auto_augment.OPERATIONS.index("invert"), auto_augment.OPERATIONS.index("posterize")
    code = np.array([[posterize, invert], [invert, posterize], [-1, -1]])
    actual = auto_augment.apply_(x.clone(), code, np.array([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    whole = (x * 255).round()
    torch.testing.assert_close(actual[0] * 255, 255 - (whole[0] / 16).floor() * 16)
    torch.testing.assert_close(actual[1] * 255, ((255 - whole[1]) / 16).floor() * 16)
    assert torch.equal(actual[2], x[2])


def test_the_presets_of_maskcon_are_the_published_ones() -> None:
    cars = views.view_spec("maskcon-cars", "strong", 224, MEAN, STD)
    assert (cars.perspective, cars.distortion, cars.jitter, cars.gray, cars.blur, cars.auto) == (
        0.5,
        0.5,
        0.8,
        0.2,
        0.5,
        0,
    )
    weak = views.view_spec("maskcon-cars", "weak", 224, MEAN, STD)
    assert (weak.perspective, weak.jitter, weak.gray, weak.blur, weak.auto) == (0.5, 0, 0, 0, 0)
    assert weak == views.view_spec("maskcon-sop", "strong", 224, MEAN, STD)
    strong = views.view_spec("maskcon-cifar", "strong", 32, MEAN, STD)
    assert (strong.perspective, strong.jitter, strong.gray, strong.blur, strong.auto) == (0, 0, 0, 0, 1)
    assert views.view_spec("maskcon-cifar", "weak", 32, MEAN, STD).auto == 0


def test_new_operations_have_their_own_slots_and_leave_old_streams_alone() -> None:
    numbers = uniforms(3, 1, np.arange(50), 0, SLOTS)
    plain, rich = spec_of(jitter=0.8, flip=0.5), spec_of(jitter=0.8, flip=0.5, perspective=0.5, auto=0.5)
    old, new = views.draw(plain, numbers, 30, 30), views.draw(rich, numbers, 30, 30)
    for name in ("box", "flip", "order", "factors", "gray", "sigma", "solarize"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    assert old.corners is None
    assert old.operation is None
    x = images(50, 3, 30)
    pick = torch.tensor([41, 3, 17])
    rows = np.arange(50)
    whole = views.batch_views(x, rows, [rich], 3, 1)[0]
    part = views.batch_views(x[pick], rows[pick.numpy()], [rich], 3, 1)[0]
    torch.testing.assert_close(part, whole[pick], rtol=0, atol=1e-6)
