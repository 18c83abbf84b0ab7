"""data.decode = once: the images as an array that is mapped, the same for every loader, whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycon.core.config import ConfigError, DataConfig
from raycon.core.types import LoaderPlan
from raycon.data_loaders import decoded, open_loader
from raycon.data_loaders.datasets import ArraySet, ImageSet, open_config, open_dataset
from raycon.data_loaders.hold_out import hold_out
from raycon.nn import views

KINDS = ["torch", pytest.param("ffcv", marks=pytest.mark.ffcv), pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 PNG and JPEG images of 18 x 14 pixels in two classes."""
    generator = np.random.default_rng(0)
    for i in range(40):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (14, 18, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(name="image-folder", root=str(root), decode="once", cache=str(root.parent / "cache"), **options)


def in_memory(root: Path) -> ArraySet:
    """The same images as an array, by other code."""
    files = open_dataset("image-folder", root)
    images = np.stack([np.asarray(Image.open(files.where(row)).convert("RGB")) for row in range(len(files))])
    same = {name: getattr(files, name) for name in ("name", "split", "label", "weak", "classes", "mean", "std")}
    return ArraySet(**same, images=images)


def plan_of(dataset: ImageSet, cache: Path, **options: Any) -> LoaderPlan:
    spec = views.view_spec("mocov2", "strong", 12, dataset.mean, dataset.std)
    return LoaderPlan(
        specs=(spec, spec), eval_spec=views.eval_spec(12, dataset.mean, dataset.std), batch=8, seed=3, rank=1, world=2,
        device=torch.device("cpu"), cache=cache, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_that_of_an_array(root: Path, tmp_path: Path, kind: str) -> None:
    dataset, array = pickle.loads(pickle.dumps(open_config(config(root)))), in_memory(root)
    assert dataset.image == (3, 14, 18)
    assert (dataset.label.tolist(), dataset.classes) == (array.label.tolist(), array.classes)
    assert dataset.where(0).endswith("a/00.jpg")
    one, two = (
        open_loader(k, d, plan_of(d, tmp_path, augment="batched")) for k, d in ((kind, dataset), ("torch", array))
    )
    for epoch, first in ((0, 0), (1, 2)):
        for a, b in zip(one.train(epoch, first), two.train(epoch, first), strict=True):
            assert torch.equal(a.row, b.row)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    for image, twin in zip(one.scan(), two.scan(), strict=True):
        assert torch.equal(image.images, twin.images)
    one.close()
    # Decoded anew at every reading, a crop is rounded to whole grey values; all else is the same.
    plain = dataclasses.replace(plan_of(dataset, tmp_path).specs[0], jitter=0.0, gray=0.0, blur=0.0)
    asked = plan_of(dataset, tmp_path, augment="batched")
    asked = dataclasses.replace(asked, specs=(plain, plain))
    files = open_dataset("image-folder", root)
    for a, b in zip(*(open_loader("torch", d, asked).train(0) for d in (dataset, files)), strict=True):
        assert torch.equal(a.row, b.row)
        for x, y in zip(a.views, b.views, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1.01 / 255 / 0.224)


def test_images_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_config(config(root))
    with monkeypatch.context() as patched:
        patched.setattr(decoded, "_write", lambda *_: pytest.fail("decoded again"))
        assert open_config(config(root)).fingerprint == first.fingerprint
    Image.fromarray(np.zeros((14, 18, 3), np.uint8)).save(root / "b" / "01.png")  # another image
    again = open_config(config(root))
    assert again.read(20).max() == 0
    assert first.read(20).max() > 0
    file = next((root.parent / "cache").glob(f"{again.source.fingerprint}.decoded.npy"))  # type: ignore[attr-defined]
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-5] + bytes(5), b"no array"):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(open_config(config(root)).read(39), in_memory(root).read(39))
        assert file.read_bytes() == content


def test_a_stopped_decoder_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some spans, a torn journal line included: what is whole is kept, the end is the same."""
    monkeypatch.setattr(decoded, "SPAN_BYTES", 5 * 14 * 18 * 3)
    wanted, read = in_memory(root), []
    source = open_dataset("image-folder", root)
    original = type(source).read

    def until(last: int) -> Any:
        def one(self: Any, row: int) -> Any:
            if row >= last:
                raise KeyboardInterrupt
            read.append(row)
            return original(self, row)

        return one

    with monkeypatch.context() as patched:
        patched.setattr(type(source), "read", until(17))
        with pytest.raises(KeyboardInterrupt):
            open_config(config(root))
    assert not list((root.parent / "cache").glob("[!.]*.npy"))
    journal = next((root.parent / "cache").glob(".*.part.jsonl"))
    assert [json.loads(line)["first"] for line in journal.read_text().splitlines()[1:]] == [0, 5, 10]
    journal.write_text(journal.read_text() + '{"first": 15, "s')
    read.clear()
    with monkeypatch.context() as patched:
        patched.setattr(type(source), "read", until(40))
        found = open_config(config(root))
    assert sorted(set(read)) == list(range(15, 40))
    np.testing.assert_array_equal(found.block(np.arange(40)), wanted.images)
    assert not list((root.parent / "cache").glob(".*.part*"))


def test_what_cannot_be_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = root.parent / "cache"
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 14 * 18 * 3 * 40}))
    with pytest.raises(ConfigError, match=r"40 images of 18 x 14 pixels need 0\.0 GB more .* give another folder"):
        open_config(config(root))
    monkeypatch.undo()
    file = root / "b" / "03.jpg"
    Image.fromarray(np.zeros((14, 20, 3), np.uint8)).save(file)
    for looked_at in (64, 2):  # found in the heads of some; found when its turn comes
        monkeypatch.setattr(decoded, "LOOKED_AT", looked_at)
        with pytest.raises(ConfigError, match=r"b/03\.jpg has 20 x 14 pixels, .*a/00\.jpg 18 x 14: only images of one"):
            open_config(config(root))
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"b/03\.jpg: not a readable image"):
        open_config(config(root))
    assert not [f for f in cache.iterdir() if not f.name.endswith(".lock")]
    found = open_config(config(root, on_error="skip"))
    assert (len(found), found.dropped) == (39, 1)
    held = hold_out(found, 0.3, seed=0)[1]
    assert 0 < len(held) < 39
    assert held.where(0) == found.where(int(np.flatnonzero([found.where(r) == held.where(0) for r in range(39)])[0]))
    np.testing.assert_array_equal(held.read(0), np.asarray(Image.open(held.where(0)).convert("RGB")))
    moved = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 10_000
    next(cache.glob("*.npy")).unlink()
    with pytest.raises(ValueError, match=r"data\.cache must be a folder that every node sees"):
        moved.block(np.array([0]))
    open_config(DataConfig(name="digits", decode="once"))
    assert "data.decode = once has no effect: the images of digits are in memory" in caplog.text
