"""Readers of CIFAR-10, STL-10, the ImageNets, and Cl-InfoNCE's three sets: files made here in the published layouts."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycon.core.config import ConfigError
from raycon.data_loaders import coarse
from raycon.data_loaders.datasets import imagenet100, open_dataset
from raycon.index.metadata import attribute_clusters


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = len(set(zip(a.tolist(), b.tolist(), strict=True)))
    return pairs == len(set(a.tolist())) == len(set(b.tolist()))


# --- arrays -----------------------------------------------------------------------------------------------------


def test_cifar10(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    data, labels = generator.integers(0, 256, (6, 4, 3072), dtype=np.uint8), generator.integers(0, 10, (6, 4))
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        text = {"data": data[i], "labels": labels[i].tolist()}
        (base / name).write_bytes(pickle.dumps(text, protocol=2))
    train, test = open_dataset("cifar10", tmp_path), open_dataset("cifar10", base, "test")
    np.testing.assert_array_equal(train.label, labels[:5].reshape(-1))
    np.testing.assert_array_equal(test.label, labels[5])
    np.testing.assert_array_equal(train.read(7).transpose(2, 0, 1).reshape(-1), data[1, 3])
    assert (train.image, train.classes[9]) == ((3, 32, 32), "truck")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, r"row 1 has labels 10, not one of 0\.\.9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}, "row 1 has labels -1"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "cat"]}, "row 1 has labels 'cat'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "not a label 'labels' for each of its 2"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "not rows of 3 x 32 x 32 bytes"),
        ({"data": np.zeros((2, 1024), np.uint8), "labels": [0, 1]}, "not rows of 3 x 32 x 32 bytes"),
        ([1, 2], "is no batch of images"),
    ],
)
def test_wrong_batches_are_named(batch: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ConfigError, match=f"test_batch: .*{words}"):
        open_dataset("cifar10", tmp_path, "test")


def test_stl10(tmp_path: Path) -> None:
    base = tmp_path / "stl10_binary"
    base.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    columns = images.transpose(0, 3, 2, 1).tobytes()  # channel, then column, then row
    for split in ("train", "unlabeled"):
        (base / f"{split}_X.bin").write_bytes(columns)
    (base / "train_y.bin").write_bytes(bytes([1, 10, 3, 3]))
    write(base / "class_names.txt", *(f"thing {i}" for i in range(9)), "truck")
    train, unlabeled = open_dataset("stl10", tmp_path), open_dataset("stl10", tmp_path, "unlabeled")
    assert train.label.tolist() == [0, 9, 2, 2]
    assert unlabeled.label.tolist() == [-1] * 4
    assert train.classes[9] == "truck"
    np.testing.assert_array_equal(train.block(np.array([2, 0])), images[[2, 0]])
    np.testing.assert_array_equal(unlabeled.read(3), images[3])
    (base / "train_y.bin").write_bytes(bytes([1, 0, 3, 3]))
    with pytest.raises(ConfigError, match=r"train_y\.bin \(minus 1\): row 1 has label -1"):
        open_dataset("stl10", tmp_path)
    (base / "train_X.bin").write_bytes(columns[:-1])
    with pytest.raises(ConfigError, match=r"train_X\.bin: 110591 bytes are no whole number"):
        open_dataset("stl10", tmp_path)


# --- ImageNets --------------------------------------------------------------------------------------------------


def test_imagenet_needs_its_thousand_classes(tmp_path: Path) -> None:
    wnids = [f"n{i:08d}" for i in range(1000)]
    for wnid in wnids:
        (tmp_path / "train" / wnid).mkdir(parents=True)
    touch(tmp_path / "train" / wnids[7] / "n00000007_1.JPEG", tmp_path / "train" / wnids[999] / "x.JPEG")
    touch(tmp_path / "val" / wnids[999] / "ILSVRC2012_val_00000001.JPEG")
    train, val = open_dataset("imagenet", tmp_path), open_dataset("imagenet", tmp_path, "test")
    assert (train.label.tolist(), val.label.tolist()) == ([7, 999], [999])
    assert train.weak.tolist() == coarse.imagenet()[[7, 999]].tolist()
    (tmp_path / "train" / wnids[3]).rmdir()
    with pytest.raises(ConfigError, match="has 999 class folders, imagenet has 1000"):
        open_dataset("imagenet", tmp_path)


def test_imagenet100_takes_its_classes_out_of_all(tmp_path: Path) -> None:
    cmc = imagenet100.CMC.split()
    assert len(set(cmc)) == 100
    assert cmc == sorted(cmc)
    for wnid in [*cmc, "n01440764", "n99999999"]:
        touch(tmp_path / "train" / wnid / "a.JPEG", tmp_path / "val" / wnid / "b.JPEG")
    for split in ("train", "val"):
        found = open_dataset("imagenet100", tmp_path, split)
        assert found.label.tolist() == list(range(100))
        assert [Path(found.where(r)).parent.name for r in range(100)] == cmc == list(found.classes)
    others = [*cmc[1:], "n01440764"]
    write(tmp_path / "hundred.txt", *(f"{wnid} some words" for wnid in reversed(others)))
    found = open_dataset("imagenet100", tmp_path, "val", listing=str(tmp_path / "hundred.txt"))
    assert found.classes == tuple(sorted(others))
    assert found.label.tolist() == list(range(100))
    write(tmp_path / "hundred.txt", *cmc[:99])
    with pytest.raises(ConfigError, match="names 99 classes: give 100"):
        open_dataset("imagenet100", tmp_path, listing=str(tmp_path / "hundred.txt"))
    write(tmp_path / "hundred.txt", *cmc[:99], "n00000001")
    with pytest.raises(ConfigError, match="no folder for n00000001: 1 classes are missing"):
        open_dataset("imagenet100", tmp_path, listing=str(tmp_path / "hundred.txt"))


def test_tiny_imagenet(tmp_path: Path) -> None:
    base = tmp_path / "tiny-imagenet-200"
    write(base / "wnids.txt", "n02", "n01", "n03")
    write(base / "words.txt", "n01\tgoldfish, Carassius auratus", "n02\tsalamander", "n09\tother")
    touch(base / "train" / "n01" / "images" / "n01_0.JPEG", base / "train" / "n03" / "images" / "n03_0.JPEG")
    touch(base / "train" / "n02" / "images" / "n02_0.JPEG", base / "val" / "images" / "val_1.JPEG")
    write(base / "train" / "n01" / "n01_boxes.txt", "n01_0.JPEG\t0\t0\t1\t1")
    write(base / "val" / "val_annotations.txt", "val_1.JPEG\tn03\t0\t32\t44\t62", "val_0.JPEG\tn01\t0\t0\t1\t1")
    train, val = open_dataset("tiny-imagenet", tmp_path), open_dataset("tiny-imagenet", base, "test")
    assert train.label.tolist() == [0, 1, 2]
    assert train.classes == ("goldfish", "salamander", "n03")
    assert val.label.tolist() == [2, 0]
    assert val.where(0) == str(base / "val" / "images" / "val_1.JPEG")
    write(base / "val" / "val_annotations.txt", "val_1.JPEG\tn04\t0\t32\t44\t62")
    with pytest.raises(ConfigError, match=r"val_annotations\.txt: line 1 has the class 'n04'"):
        open_dataset("tiny-imagenet", tmp_path, "val")


# --- Cl-InfoNCE's sets ------------------------------------------------------------------------------------------


def metadata(file: Path, rows: list[tuple[str, int]], **levels: list[int]) -> None:
    """As published: an unnamed index, and a last line of index -1 with the number of distinct values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [[path for path, _ in rows], [c for _, c in rows], *levels.values()]
    last = ["num_per_label_gran", *(len(set(column)) for column in columns[1:])]
    with file.open("w", newline="", encoding="utf-8") as handle:
        out = csv.writer(handle)
        out.writerow(["", "path", "class", *levels])
        out.writerows([i, *cells] for i, cells in enumerate(zip(*columns, strict=True)))
        out.writerow([-1, *last])


def test_zappos_in_rank_h(tmp_path: Path) -> None:
    images = tmp_path / "ut-zap50k-images-square"
    train = [
        ("Boots/Ankle/A/7.jpg", 1),
        ("Shoes/Heels/B/9.jpg", 2),
        ("Boots/Ankle/B/3.jpg", 1),
        ("Shoes/Flats/A/1.jpg", 20),
    ]
    levels = {"label_gran_3": [40, 7, 40, 9], "label_gran_15": [5, 6, 7, 8]}
    metadata(tmp_path / "rank_H" / "meta_data_train.csv", train, **levels)
    metadata(tmp_path / "rank_H" / "meta_data_val.csv", [("Shoes/Flats/A/2.jpg", 20)])
    touch(*(images / path for path, _ in train))
    found = open_dataset("zappos50k", tmp_path, level="3")
    assert len(found) == 4  # the -1 row is no image
    assert found.label.tolist() == [0, 1, 0, 2]
    assert found.classes == ("class 1", "class 2", "class 20")
    assert same_partition(found.weak, np.array([40, 7, 40, 9]))
    assert sorted(set(found.weak.tolist())) == [0, 1, 2]
    assert len(found.weak_classes) == 3
    assert found.where(1) == str(images / "Shoes/Heels/B/9.jpg")
    assert (found.mean, found.std) == ((0.8342, 0.8142, 0.8081), (0.2804, 0.3014, 0.3072))
    assert open_dataset("zappos50k", tmp_path).weak.tolist() == [-1] * 4
    assert open_dataset("zappos50k", tmp_path, level="0").weak.tolist() == [0, 1, 0, 2]
    assert open_dataset("zappos50k", tmp_path, level="-1").weak.tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"data\.level = '4'.*the levels 3, 15, 0 \(class\), -1"):
        open_dataset("zappos50k", tmp_path, level="4")
    touch(images / "Shoes/Flats/A/2.jpg")
    test = open_dataset("zappos50k", tmp_path, "test", level="3")
    assert (test.label.tolist(), test.weak.tolist()) == ([2], [-1])  # 1 of 3 classes, numbered as in train
    metadata(tmp_path / "rank_H" / "meta_data_val.csv", [("Shoes/Flats/A/2.jpg", 21)])
    with pytest.raises(ConfigError, match=r"class 21 is not in meta_data_train\.csv"):
        open_dataset("zappos50k", tmp_path, "test")


def test_wider_in_rank_h(tmp_path: Path) -> None:
    train = [("train/0--Parade/a.jpg", 0), ("val/29--Sports/b.jpg", 29), ("train/0--Parade/c.jpg", 0)]
    metadata(tmp_path / "rank_H" / "meta_data_train.csv", train, label_gran_7=[1, 2, 1])
    touch(*(tmp_path / "Image" / path for path, _ in train))
    found = open_dataset("wider-attribute", tmp_path, level="7")
    assert found.classes == ("0--Parade", "29--Sports")
    assert (found.label.tolist(), found.weak.tolist()) == ([0, 1, 0], [0, 1, 0])
    assert found.where(1) == str(tmp_path / "Image" / "val/29--Sports/b.jpg")


def test_rank_h_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rank_H/meta_data_train\.csv in .*give its folder as data\.listing"):
        open_dataset("wider-attribute", tmp_path)
    file = tmp_path / "rank_H" / "meta_data_train.csv"
    metadata(file, [("train/x.jpg", 0)])
    with pytest.raises(ConfigError, match=r"its first image 'train/x\.jpg' is not in"):
        open_dataset("wider-attribute", tmp_path)
    metadata(file, [("../x.jpg", 0)])
    with pytest.raises(ConfigError, match=r"image 0: '\.\./x\.jpg' leads out"):
        open_dataset("wider-attribute", tmp_path)
    write(file, ",path", "0,a.jpg")
    with pytest.raises(ConfigError, match="has no column 'class'"):
        open_dataset("wider-attribute", tmp_path)


def cub(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """12 birds of 3 kinds: (their attributes, which are to train with)."""
    base, generator = root / "CUB_200_2011", np.random.default_rng(0)
    names = [f"{c + 1:03d}.Bird_{c}/Bird_{c}_{i}.jpg" for c in range(3) for i in range(4)]
    train = np.array([1, 0, 1, 1] * 3)
    attributes = generator.integers(0, 2, (12, 312))
    write(base / "images.txt", *(f"{i + 1} {name}" for i, name in enumerate(names)))
    write(base / "image_class_labels.txt", *(f"{i + 1} {i // 4 + 1}" for i in range(12)))
    write(base / "train_test_split.txt", *(f"{i + 1} {train[i]}" for i in range(12)))
    write(base / "classes.txt", *(f"{c + 1} {c + 1:03d}.Bird_{c}" for c in range(3)))
    lines = [f"{i + 1} {a + 1} {attributes[i, a]} 3 12.5{' 0' * (i == 5)}" for i in range(12) for a in range(312)]
    write(base / "attributes" / "image_attribute_labels.txt", *lines)
    write(root / "attributes.txt", *(f"{a + 1} has_bill::{a}" for a in range(312)))
    touch(*(base / "images" / name for name in names))
    return attributes, np.flatnonzero(train)


def test_cub200_as_it_comes(tmp_path: Path) -> None:
    attributes, rows = cub(tmp_path)
    found = open_dataset("cub200", tmp_path, level="3")
    assert found.label.tolist() == (rows // 4).tolist()
    assert found.classes == ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    assert found.where(1).endswith("001.Bird_0/Bird_0_2.jpg")
    assert found.attributes is not None
    np.testing.assert_array_equal(found.attributes, attributes[rows])
    assert found.attribute_names[311] == "has_bill::311"
    assert same_partition(found.weak, attribute_clusters(attributes[rows], 3))
    test = open_dataset("cub200", tmp_path, "test")
    assert test.label.tolist() == [0, 1, 2]
    assert test.weak.tolist() == [-1] * 3
    with pytest.raises(ConfigError, match=r"data\.level = '313'.*1\.\.312"):
        open_dataset("cub200", tmp_path, level="313")
    write(tmp_path / "CUB_200_2011" / "image_class_labels.txt", *(f"{i + 1} {i * 50}" for i in range(12)))
    with pytest.raises(ConfigError, match=r"image_class_labels\.txt \(minus 1\): row 0 has label -1"):
        open_dataset("cub200", tmp_path)


def test_cub200_in_rank_h(tmp_path: Path) -> None:
    cub(tmp_path)
    rows = [("001.Bird_0/Bird_0_3.jpg", 1), ("003.Bird_2/Bird_2_0.jpg", 3), ("002.Bird_1/Bird_1_0.jpg", 2)]
    metadata(tmp_path / "rank_H" / "meta_data_train.csv", rows, label_gran_10=[5, 0, 5])
    found = open_dataset("cub200", tmp_path, level="10")
    assert found.label.tolist() == [0, 2, 1]
    assert found.weak.tolist() == [1, 0, 1]
    assert found.classes == ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    assert found.where(0) == str(tmp_path / "CUB_200_2011" / "images" / "001.Bird_0" / "Bird_0_3.jpg")


def test_imagenet100_with_a_class_tree(tmp_path: Path) -> None:
    rows = [("train/n01496331/a.JPEG", 0), ("train/n13052670/b.JPEG", 1)]
    metadata(tmp_path / "hier" / "meta_data_train.csv", rows, label_gran_level_12=[3, 3])
    for path, _ in rows:
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / path)
    found = open_dataset("imagenet100", tmp_path, listing=str(tmp_path / "hier"), level="level_12")
    assert (found.label.tolist(), found.weak.tolist()) == ([0, 1], [0, 0])
    assert found.classes == ("n01496331", "n13052670")
    with pytest.raises(ConfigError, match=r"give their folder as data\.listing"):
        open_dataset("imagenet100", tmp_path, level="level_12")
