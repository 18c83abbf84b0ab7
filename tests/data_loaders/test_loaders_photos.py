"""Photos: decoding and resizing beside PIL, bit for bit, with and without the compiled code."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from raycon.core.types import LoaderPlan
from raycon.data_loaders import common, photos
from raycon.data_loaders.photos import Photo, Pixels, size_of
from raycon.nn import views

jpeg = pytest.importorskip("raycon.data_loaders.jpeg", reason="Numba is not installed")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXACT = int(PIL.__version__.split(".")[0]) >= 13


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (max(height // 6, 1), max(width // 6, 1), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> Photo:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return Photo(np.frombuffer(out.getvalue(), np.uint8), f"{kind} {options}")


def pil(photo: Photo) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(photo.data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def whole(photo: Photo) -> NDArray[np.uint8]:
    height, width = size_of(photo)
    target = np.empty((height, width, 3), np.uint8)
    Pixels(photo, (height, width)).crop((0, 0, height, width), target)
    return target


FORMATS = [
    ("JPEG", {"subsampling": 0}),
    ("JPEG", {"subsampling": 1}),
    ("JPEG", {"subsampling": 2, "quality": 90}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"quality": 20, "optimize": True}),
    ("PNG", {}),
    ("WEBP", {}),
]


def test_a_damaged_photo_does_not_change_the_size_of_the_next() -> None:
    before, after = encoded(picture(57, 57)), encoded(picture(61, 94))
    assert whole(before).shape == (57, 57, 3)
    assert jpeg.size(before.data[:300]) is None
    assert size_of(after) == (61, 94)
    np.testing.assert_array_equal(whole(after), pil(after))
    assert jpeg.decode(before.data[:300], 57, 57) is None
    np.testing.assert_array_equal(whole(after), pil(after))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("kind", "options"), FORMATS)
def test_photos_have_pils_pixels(
    kind: str, options: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(photos, "_jpeg", lambda: None)
    for mode, size in (("RGB", (61, 94)), ("L", (40, 33)), ("RGB", (1, 1)), ("RGB", (17, 200))):
        photo = encoded(picture(*size).convert(mode), kind, **options)
        assert size_of(photo) == size
        np.testing.assert_array_equal(whole(photo), pil(photo))
    if kind == "JPEG":
        photo = encoded(picture(30, 50).convert("CMYK"), kind, **options)
        np.testing.assert_array_equal(whole(photo), pil(photo))
        rotated = Image.Exif()
        rotated[0x0112] = 6
        photo = encoded(picture(30, 50), kind, exif=rotated, **options)
        assert size_of(photo) == (30, 50)
        np.testing.assert_array_equal(whole(photo), pil(photo))


def test_crops_are_pils_to_the_bit() -> None:
    generator = np.random.default_rng(0)
    source = generator.integers(0, 256, (190, 260, 3), dtype=np.uint8)
    pixels = Pixels(encoded(Image.fromarray(source), "PNG"), (190, 260))
    cases = [(int(generator.integers(1, 191)), int(generator.integers(1, 261))) for _ in range(60)]
    targets = [tuple(int(n) for n in generator.integers(1, 150, 2)) for _ in cases]
    cases += [(190, 260), (190, 260), (1, 1), (190, 1), (1, 260), (190, 20), (8, 260), (190, 260)]
    targets += [(190, 260), (1, 1), (64, 64), (30, 30), (30, 30), (31, 37), (3, 300), (3, 300)]
    for (height, width), size in zip(cases, targets, strict=True):
        top, left = int(generator.integers(0, 191 - height)), int(generator.integers(0, 261 - width))
        found = np.empty((*size, 3), np.uint8)
        pixels.crop((top, left, height, width), found)
        part = Image.fromarray(source[top : top + height, left : left + width])
        expected = np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR))
        off = np.abs(found.astype(int) - expected).max()
        assert off == 0 if EXACT else off <= 1, (height, width, size)


def test_no_memory_is_used_after_it_was_freed() -> None:
    """Compiled code that works with addresses, where the C library overwrites what is freed (glibc's MALLOC_PERTURB_):
    an array that Numba lets go too early would give other pixels, or a crash."""
    code = """
import numpy as np
from PIL import Image
from raycon.data_loaders import jpeg
source = jpeg.room(90, 120)
source[:] = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
for size in ((40, 44), (60, 150), (7, 9), (33, 61)):
    found = np.empty((*size, 3), np.uint8)
    jpeg.resize(source, 3, 5, 80, 100, found)
    expected = np.asarray(Image.fromarray(source[3:83, 5:105]).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - expected).max() <= 1, size
"""
    env = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiled", [True, False])
def test_damaged_photos_are_named(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(photos, "_jpeg", lambda: None)
    good = encoded(picture(80, 90), quality=95).data
    for cut in (0, 10, 300, len(good) // 2, len(good) - 200):
        with pytest.raises(ValueError, match=r"somewhere\.jpg: not a readable image"):
            whole(Photo(good[:cut], "somewhere.jpg"))
    with pytest.raises(ValueError, match="text: not a readable image"):
        whole(Photo(np.frombuffer(b"not an image" * 50, np.uint8), "text"))
    # What PIL reads in spite of a libjpeg warning is read: foreign bytes before the end marker.
    extra = Photo(np.concatenate([good[:-2], np.zeros(40, np.uint8), good[-2:]]), "extra")
    np.testing.assert_array_equal(whole(extra), pil(extra))


def test_a_bomb_is_left_to_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = encoded(picture(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"not a readable image .*decompression bomb"):
        size_of(photo)


def test_one_decode_serves_all_views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Crops of a batch with neighbours: the same with and without compiled code and with threads, one decode each."""
    spec = views.view_spec("mocov2", "strong", 24, MEAN, STD)
    small = views.view_spec("mocov2", "neighbour", 40, MEAN, STD)
    plan = LoaderPlan(
        specs=(spec, spec, small), neighbour_views=1, eval_spec=views.eval_spec(32, MEAN, STD, resize=40), batch=6,
        seed=3, rank=0, world=1, device=torch.device("cpu"), cache=tmp_path,
    )  # fmt: skip
    rows = np.array([4, 0, 9, 7, 1, 2])
    batch = [encoded(picture(40 + 7 * i, 90 - 4 * i, i), "PNG" if i == 3 else "JPEG") for i in range(2 * len(rows))]
    decoded: list[str] = []
    counted = Pixels.__init__

    def count(self: Pixels, photo: Photo, size: tuple[int, int]) -> None:
        decoded.append(photo.name)
        counted(self, photo, size)

    monkeypatch.setattr(Pixels, "__init__", count)
    found = common.crops_of(batch, plan, rows, 2)
    assert len(decoded) == len(batch)
    centred = common.crops_of(batch, plan, rows, None)
    np.testing.assert_array_equal(common.crops_of(batch, plan, rows, 2, threads=3), found)
    monkeypatch.setattr(photos, "_jpeg", lambda: None)
    if EXACT:
        np.testing.assert_array_equal(common.crops_of(batch, plan, rows, 2), found)
        np.testing.assert_array_equal(common.crops_of(batch, plan, rows, None), centred)
