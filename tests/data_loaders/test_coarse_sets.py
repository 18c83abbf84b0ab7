"""Data sets with coarse labels: from files made here, in the published layouts."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycon.core.config import ConfigError
from raycon.data_loaders import coarse, sop
from raycon.data_loaders.datasets import fashion_mnist, fashion_mnist_coarse, names, open_dataset

NEW = (
    "cars196",
    "cifar100",
    "cifartoy-good",
    "cifartoy-bad",
    "cifartoy-bad-figure",
    "imagenet32",
    "sop-split1",
    "sop-split2",
)


def batch_file(path: Path, n: int, seed: int, **labels: list[int]) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": data, **labels}, protocol=2))
    return data


@pytest.mark.parametrize("name", NEW)
def test_missing_files_are_asked_for(name: str, tmp_path: Path) -> None:
    assert name in names()
    with pytest.raises(ConfigError, match=r"data\.root"):
        open_dataset(name)
    with pytest.raises(ConfigError, match=r"no split 'validation'"):
        open_dataset(name, tmp_path, "validation")


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_in_four() -> None:
    fine, four = open_dataset("fashion-mnist", split="test"), open_dataset("fashion-mnist-coarse", split="test")
    np.testing.assert_array_equal(fine.label, four.label)
    assert four.weak_classes == ("tops", "trousers", "footwear", "bags")
    assert np.bincount(four.weak).tolist() == [5000, 1000, 3000, 1000]
    members = {fine.classes[c]: four.weak_classes[w] for c, w in zip(four.label, four.weak, strict=True)}
    assert members == {name: group for group, of in fashion_mnist_coarse.COARSE.items() for name in of}
    assert fine.fingerprint != four.fingerprint


def test_cifar100(tmp_path: Path) -> None:
    labels = {"fine_labels": list(range(100)), "coarse_labels": coarse.cifar100().tolist()}
    data = batch_file(tmp_path / "cifar-100-python" / "train", 100, 0, **labels)
    found = open_dataset("cifar100", tmp_path)
    np.testing.assert_array_equal(found.label, range(100))
    np.testing.assert_array_equal(found.weak, coarse.cifar100())
    image = found.read(7)
    assert (image[3, 5] == data[7].reshape(3, 32, 32)[:, 3, 5]).all()


@pytest.mark.parametrize(
    ("kind", "order", "fine_of_ship"), [("good", (0, 1, 8, 9, 2, 3, 5, 7), 2), ("bad", (0, 1, 5, 3, 8, 9, 2, 7), 4)]
)
def test_cifartoy(tmp_path: Path, kind: str, order: tuple[int, ...], fine_of_ship: int) -> None:
    labels = np.random.default_rng(1).integers(0, 10, (5, 40))
    data = [
        batch_file(tmp_path / "cifar-10-batches-py" / f"data_batch_{i + 1}", 40, i, labels=labels[i].tolist())
        for i in range(5)
    ]
    found = open_dataset(f"cifartoy-{kind}", tmp_path)
    flat, pixels = labels.reshape(-1), np.concatenate(data)
    rows = [r for c in order for r in range(200) if flat[r] == c]
    assert len(found) == len(rows)
    for at in (0, 30, len(rows) - 1):
        assert (found.read(at).transpose(2, 0, 1).reshape(-1) == pixels[rows[at]]).all()
    np.testing.assert_array_equal(found.weak, [int(order.index(flat[r]) >= 4) for r in rows])
    assert {int(f) for f, r in zip(found.label, rows, strict=True) if flat[r] == 8} == {fine_of_ship}
    assert found.classes[fine_of_ship] == "ship"


def test_the_figure_s_bad_split_changes_dog_and_bird_over() -> None:
    code, figure = coarse.cifartoy_coarse("bad"), coarse.cifartoy_coarse("bad-figure")
    assert np.flatnonzero(code != figure).tolist() == [2, 5]
    assert np.flatnonzero(figure == 0).tolist() == [0, 1, 2, 3]


def test_imagenet32_labels_become_ilsvrc_s(tmp_path: Path) -> None:
    for i in range(10):
        batch_file(tmp_path / f"train_data_batch_{i + 1}", 3, i, labels=[1 + i, 2 + i, 1000 - i])
    found = open_dataset("imagenet32", tmp_path)
    assert found.label[:2].tolist() == [278, 212]  # kit fox, English setter
    assert found.weak[:2].tolist() == [coarse.imagenet()[278], 1]
    assert sorted(coarse.imagenet32_to_imagenet()) == list(range(1000))


def test_code_in_a_batch_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({"data": Path("x")}))
    with pytest.raises(ConfigError, match="which no image batch needs"):
        open_dataset("cifar100", tmp_path)


def test_cars196(tmp_path: Path) -> None:
    from scipy.io import savemat

    base = tmp_path / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    (base / "cars_train").mkdir()
    kinds = [("fname", "O"), ("class", "O")]
    rows = np.array([("00001.jpg", 14), ("00002.jpg", 196)], dtype=kinds)
    savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": rows})
    Image.new("RGB", (40, 30), (9, 8, 7)).save(base / "cars_train" / "00001.jpg")
    found = open_dataset("cars196", tmp_path)
    assert found.label.tolist() == [13, 195]
    assert found.weak.tolist() == [coarse.cars196()[13], coarse.cars196()[195]]
    assert found.read(0).shape == (30, 40, 3)


@pytest.mark.parametrize(
    ("number", "split", "images", "products"),
    [(1, "train", 25368, 2517), (1, "test", 25278, 2518), (2, "train", 14980, 1498), (2, "test", 2996, 1498)],
)
def test_sop_has_the_published_sizes(number: int, split: str, images: int, products: int, tmp_path: Path) -> None:
    paths, kinds, fine = sop.listing(number, split)  # type: ignore[arg-type]
    assert len(paths) == len(set(paths)) == images
    assert sorted(set(fine)) == list(range(products))
    assert all(path.startswith(sop.KINDS[kind]) for path, kind in zip(paths, kinds, strict=True))
    if number == 2:
        assert set(Counter(fine).values()) == {10 if split == "train" else 2}
    (tmp_path / "bicycle_final").mkdir()
    found = open_dataset(f"sop-split{number}", tmp_path, split)
    assert (len(found), found.path(3)) == (images, tmp_path / paths[3])


def test_sop_s_second_split_tests_the_products_it_trains_on() -> None:
    train, test = (sop.listing(2, split)[0] for split in ("train", "test"))
    assert not set(train) & set(test)
    assert {p.rsplit("_", 1)[0] for p in train} == {p.rsplit("_", 1)[0] for p in test}
