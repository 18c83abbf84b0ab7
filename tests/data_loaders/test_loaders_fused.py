"""Views in compiled loops: against torchvision one operation at a time, against the batched form as a whole."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from raycon.core.config import ConfigError
from raycon.core.stream import uniforms
from raycon.core.types import LoaderPlan
from raycon.data_loaders import common
from raycon.data_loaders.datasets import open_dataset
from raycon.nn import views
from raycon.nn.views import ViewParams, ViewSpec

fused = pytest.importorskip("raycon.data_loaders.fused", reason="Numba is not installed")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(b: int, c: int, h: int, w: int, images: int = 1, seed: int = 0) -> Any:
    """(b, images, h, w, c) uint8 with noise, ramps, grey rows, black and white."""
    x = np.random.default_rng(seed).integers(0, 256, (b, images, h, w, c), dtype=np.uint8)
    x[:, :, : h // 4] = x[:, :, : h // 4, :, :1]
    x[:, :, h // 4 : h // 3] = np.linspace(0, 255, w).astype(np.uint8)[:, None]
    x[:, :, -1, : w // 2], x[:, :, -1, w // 2 :] = 0, 255
    return x


def tensor(x: Any, which: int = 0) -> Tensor:
    return torch.from_numpy(x[:, which]).permute(0, 3, 1, 2)


def quiet(b: int, h: int, w: int) -> ViewParams:
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
    return ViewSpec(mean=(0.0,) * c, std=(1.0,) * c, **{"size": 24} | options)


def close(found: Tensor, expected: Tensor, atol: float = 3e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(("h", "w", "size"), [(24, 24, 24), (20, 31, 24), (80, 50, 17), (9, 9, 32), (150, 70, 70)])
def test_crop_and_flip_equal_torchvision(c: int, h: int, w: int, size: int) -> None:
    x, p = pictures(6, c, h, w), quiet(6, h, w)
    p.box[1:] = [[0, 0, 1, 1], [h - 1, w - 3, 1, 3], [2, 1, h - 2, w - 1], [1, 2, h // 2, w // 2], [h - 4, 0, 4, w]]
    p.flip[::2] = True
    found = fused.views_of(x, 0, plain(c, size=size), p, True)
    for i in range(6):
        top, left, height, width = (int(v) for v in p.box[i])
        unit = tensor(x)[i].float() / 255
        expected = TF.resized_crop(unit, top, left, height, width, [size, size], antialias=True)
        close(found[i], TF.horizontal_flip(expected) if p.flip[i] else expected, 1e-5)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    ("op", "factors"),
    enumerate([(0.0, 0.6, 1.8), (0.0, 0.6, 1.4), (0.0, 0.3, 1.8), (-0.5, -0.1, 0.4)]),
)
def test_each_jitter_operation_equals_torchvision(op: int, factors: tuple[float, ...], c: int) -> None:
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
    x, p = pictures(3, c, 24, 24), quiet(3, 24, 24)
    p.factors[:, op] = factors
    found = fused.views_of(x, 0, plain(c), p, True)
    for i, factor in enumerate(factors):
        close(found[i], adjust(tensor(x)[i].float() / 255, factor))
    assert (c == 1 and op > 1) != bool((found - tensor(x) / 255).abs().max() > 0.05)


def test_jitter_in_every_order_equals_torchvision() -> None:
    x, p = pictures(24, 3, 16, 16), quiet(24, 16, 16)._replace(order=np.array(list(itertools.permutations(range(4)))))
    generator = np.random.default_rng(3)
    p.factors[:] = np.concatenate([generator.uniform(0.2, 1.8, (24, 3)), generator.uniform(-0.4, 0.4, (24, 1))], 1)
    found = fused.views_of(x, 0, plain(size=16), p, True)
    for i in range(24):
        expected = tensor(x)[i].float() / 255
        for op in p.order[i]:
            adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
            expected = adjust(expected, float(p.factors[i, op]))
        close(found[i], expected, 6e-6)


@pytest.mark.parametrize("c", [1, 3])
def test_gray_blur_solarize_and_normalise_equal_torchvision(c: int) -> None:
    x, unit, some = pictures(3, c, 24, 24), tensor(pictures(3, c, 24, 24)).float() / 255, np.array([1, 0, 1], bool)
    grey = fused.views_of(x, 0, plain(c), quiet(3, 24, 24)._replace(gray=some), True)
    close(grey, torch.stack([TF.rgb_to_grayscale(unit[0], c), unit[1], TF.rgb_to_grayscale(unit[2], c)]))
    for threshold in (0.3, 1.0):
        found = fused.views_of(
            x, 0, plain(c, solarize_threshold=threshold), quiet(3, 24, 24)._replace(solarize=some), True
        )
        close(found, torch.stack([TF.solarize(unit[0], threshold), unit[1], TF.solarize(unit[2], threshold)]))
    for kernel in (3, 13, 23):
        sigma = np.array([0.1, 0.8, 2.0], np.float32)
        found = fused.views_of(x, 0, plain(c, blur_kernel=kernel), quiet(3, 24, 24)._replace(sigma=sigma), True)
        for i in range(3):
            close(found[i], TF.gaussian_blur(unit[i], [kernel, kernel], [float(sigma[i])] * 2))
    spec = ViewSpec(size=24, mean=MEAN[:c], std=STD[:c])
    close(fused.views_of(x, 0, spec, quiet(3, 24, 24), False), TF.normalize(unit, list(MEAN[:c]), list(STD[:c])), 2e-6)


def test_a_blur_wider_than_the_image_reflects_again() -> None:
    x, p = pictures(2, 1, 4, 4), quiet(2, 4, 4)._replace(sigma=np.array([2.0, 1.0], np.float32))
    spec = plain(1, size=4)
    close(fused.views_of(x, 0, spec, p, True), views.make_view(tensor(x), spec, p))
    one = plain(3, size=1)
    x, p = pictures(2, 3, 1, 1), quiet(2, 1, 1)._replace(sigma=np.ones(2, np.float32))
    close(fused.views_of(x, 0, one, p, True), tensor(x).float() / 255)


PIPELINES = [
    *(
        (preset, name)
        for preset in ("mocov1", "mocov2", "simclr", "digits", "sce-mocov3")
        for name in ("strong", "weak")
    ),
    ("sce-mocov3", "strong-beta"),
    ("sce-multicrop", "local-4"),
    ("mocov2", "neighbour"),
]


@pytest.mark.parametrize(("preset", "name"), PIPELINES)
def test_views_equal_the_batched_ones(preset: str, name: str) -> None:
    for c, size, last in ((3, 32, True), (1, 20, True), (3, 75, False)):
        spec = views.view_spec(preset, name, size, MEAN[:c], STD[:c])
        x = pictures(24, c, 40, 36, images=2)
        p = views.draw(spec, uniforms(7, 1, np.arange(24), 1, views.SLOTS), 40, 36)
        found = fused.views_of(x, 1, spec, p, last)
        layout = torch.channels_last if last else torch.contiguous_format
        assert found.is_contiguous(memory_format=layout)
        close(found, views.make_view(tensor(x, 1), spec, p, last), 6e-5)  # resampling 1e-5, divided by std 0.22

        crops = pictures(24, c, spec.size, spec.size).reshape(24, -1)
        beside = np.concatenate([np.zeros((24, 5), np.uint8), crops, crops], axis=1)
        finished = fused.views_of_crops(beside, 5, spec, p, last)
        whole = torch.from_numpy(crops.reshape(24, spec.size, spec.size, c)).permute(0, 3, 1, 2)
        close(finished, views.finish(whole, spec, p, flip=True, channels_last=last), 5e-5)


def test_a_rows_view_is_the_same_in_any_batch_and_on_any_number_of_threads() -> None:
    spec = views.view_spec("simclr", "strong", 16, MEAN, STD)
    x = pictures(30, 3, 20, 20)
    numbers = uniforms(0, 0, np.arange(30), 0, views.SLOTS)
    whole = fused.views_of(x, 0, spec, views.draw(spec, numbers, 20, 20), True)
    for threads in (2, 7, 64):
        assert torch.equal(fused.views_of(x, 0, spec, views.draw(spec, numbers, 20, 20), True, threads), whole)
    part = fused.views_of(x[17:19], 0, spec, views.draw(spec, numbers[17:19], 20, 20), True)
    assert torch.equal(part, whole[17:19])
    none = fused.views_of(x[:0], 0, spec, views.draw(spec, numbers[:0], 20, 20), True)
    assert none.shape == (0, 3, 16, 16)


def test_which_views_are_served() -> None:
    assert fused.serves(views.view_spec("simclr", "strong", 16, MEAN, STD))
    assert not fused.serves(views.view_spec("maskcon-cars", "strong", 16, MEAN, STD))
    assert not fused.serves(views.view_spec("maskcon-cifar", "strong", 16, MEAN, STD))


def test_when_views_are_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_dataset("digits")
    spec = views.view_spec("digits", "strong", 8, digits.mean, digits.std)
    plan = LoaderPlan(
        specs=(spec, spec), eval_spec=views.eval_spec(8, digits.mean, digits.std), batch=64, seed=0, rank=0, world=1,
        device=torch.device("cpu"), cache=tmp_path,
    )  # fmt: skip
    forced = dataclasses.replace(plan, augment="fused")
    gpu = torch.device("cuda")
    assert not common.uses_fused(digits, plan)  # an epoch of 184,000 values
    assert common.uses_fused(digits, forced)
    monkeypatch.setattr(common, "FUSED_VALUES", 2 * 64 * len(digits))
    assert common.uses_fused(digits, plan)
    assert not common.uses_fused(digits, dataclasses.replace(plan, augment="batched"))
    assert not common.uses_fused(digits, dataclasses.replace(plan, device=gpu))
    with pytest.raises(ConfigError, match=r"data.augment = 'fused' works on the CPU, not on cuda"):
        common.uses_fused(digits, dataclasses.replace(forced, device=gpu))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not common.uses_fused(digits, plan)
    with pytest.raises(ConfigError, match=r"needs Numba: pip install 'raycon\[fast\]'"):
        common.uses_fused(digits, forced)
