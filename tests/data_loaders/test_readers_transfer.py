"""Readers of the transfer sets: files made here in the published layouts, torchvision's readers as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycon.core.config import ConfigError
from raycon.data_loaders.datasets import FileSet, ImageSet, open_dataset


def picture(file: Path, number: int) -> None:
    """A PNG-in-any-name of 6x5 pixels, all of them ``number``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (number, number, number)).save(file, format="PNG")


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def food101(root: Path) -> None:
    base, number = root / "food-101", 0
    for split in ("train", "test"):
        names = {c: [f"{c}/{split}{i}" for i in range(2)] for c in ("pizza", "apple_pie")}
        for name in (n for members in names.values() for n in members):
            picture(base / "images" / f"{name}.jpg", number := number + 1)
        write(base / "meta" / f"{split}.json", json.dumps(names))


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    write(base / "variants.txt", "707-320", "A300B4", "Cessna 172")
    write(base / "families.txt", "A300", "Boeing 707", "Cessna 172")
    write(base / "manufacturers.txt", "Airbus", "Boeing", "Cessna")
    rows = {"train": [1, 2], "val": [3], "trainval": [1, 2, 3], "test": [4]}
    kinds = {
        "variant": ("Cessna 172", "A300B4", "707-320", "A300B4"),
        "family": ("Cessna 172", "A300", "Boeing 707", "A300"),
        "manufacturer": ("Cessna", "Airbus", "Boeing", "Airbus"),
    }
    for split, numbers in rows.items():
        for kind, names in kinds.items():
            write(base / f"images_{kind}_{split}.txt", *(f"{i:07d} {names[i - 1]}" for i in numbers))
        for i in numbers:
            picture(base / "images" / f"{i:07d}.jpg", i)


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for i, split in enumerate(("train", "val", "test")):
        names = [f"{c}/{c}_{i}.jpg" for c in ("zigzagged", "banded")]
        write(base / "labels" / f"{split}1.txt", *names)
        for j, name in enumerate(names):
            picture(base / "images" / name, 10 * i + j)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    lines = {
        "trainval": ["Abyssinian_100 1 1 1", "american_bulldog_7 2 2 1", "Abyssinian_3 1 1 1", "basset_hound_9 3 2 2"],
        "test": ["basset_hound_2 3 2 2", "Abyssinian_5 1 1 1"],
    }
    for split, rows in lines.items():
        write(base / "annotations" / f"{split}.txt", *rows)
        for i, line in enumerate(rows):
            picture(base / "images" / f"{line.split()[0]}.jpg", i)


def same(ours: ImageSet, theirs: Any) -> None:
    assert len(ours) == len(theirs) > 0
    for row, (image, label) in enumerate(theirs):
        np.testing.assert_array_equal(ours.read(row), np.asarray(image))
        assert ours.label[row] == label


@pytest.mark.parametrize(
    ("name", "make", "theirs", "splits"),
    [
        ("food101", food101, "Food101", ("train", "test")),
        ("aircraft", aircraft, "FGVCAircraft", ("train", "val", "trainval", "test")),
        ("dtd", dtd, "DTD", ("train", "val", "test")),
        ("pets", pets, "OxfordIIITPet", ("trainval", "test")),
    ],
)
def test_torchvision_reads_the_same(name: str, make: Any, theirs: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    from torchvision import datasets

    make(tmp_path)
    for split in splits:
        other = getattr(datasets, theirs)(str(tmp_path), split=split)
        same(open_dataset(name, tmp_path, split), other)
    classes = open_dataset(name, tmp_path).classes
    found = [c.lower() for c in getattr(datasets, theirs)(str(tmp_path), split=splits[0]).classes]
    assert [c.lower() for c in classes[: len(found)]] == found
    with pytest.raises(ConfigError, match="no split 'nonsense'"):
        open_dataset(name, tmp_path, "nonsense")


def test_weak_labels_that_come_with_the_sets(tmp_path: Path) -> None:
    aircraft(tmp_path)
    pets(tmp_path)
    assert open_dataset("aircraft", tmp_path, "trainval").weak.tolist() == [2, 0, 1]
    makers = open_dataset("aircraft", tmp_path, "trainval", level="manufacturer")
    assert [makers.weak_classes[w] for w in makers.weak] == ["Cessna", "Airbus", "Boeing"]
    with pytest.raises(ConfigError, match="family or manufacturer"):
        open_dataset("aircraft", tmp_path, level="colour")
    found = open_dataset("pets", tmp_path)
    assert [found.weak_classes[w] for w in found.weak] == ["cat", "dog", "cat", "dog"]
    dtd(tmp_path)
    both = open_dataset("dtd", tmp_path, "trainval")
    assert [Path(both.where(r)).name for r in range(4)] == [
        "zigzagged_0.jpg", "banded_0.jpg", "zigzagged_1.jpg", "banded_1.jpg",
    ]  # fmt: skip


def test_sun397_in_its_first_partition(tmp_path: Path) -> None:
    base = tmp_path / "SUN397"
    write(base / "ClassName.txt", "/a/abbey", "/b/bow_window/indoor")
    write(tmp_path / "Partitions" / "Training_01.txt", "/b/bow_window/indoor/sun_b.jpg", "/a/abbey/sun_a.jpg")
    write(tmp_path / "Partitions" / "Testing_01.txt", "/a/abbey/sun_c.jpg")
    for i, name in enumerate(("b/bow_window/indoor/sun_b", "a/abbey/sun_a", "a/abbey/sun_c")):
        picture(base / f"{name}.jpg", i)
    train, test = open_dataset("sun397", tmp_path), open_dataset("sun397", tmp_path, "test")
    assert (train.label.tolist(), test.label.tolist()) == ([1, 0], [0])
    assert train.classes == ("abbey", "bow_window/indoor")
    assert train.read(0)[0, 0, 0] == 0
    assert test.read(0)[0, 0, 0] == 2
    write(tmp_path / "Partitions" / "Training_01.txt", "/a/abbey/sun_a.jpg", "/z/zoo/sun_a.jpg")
    with pytest.raises(ConfigError, match=r"Training_01\.txt: line 2: '/z/zoo'"):
        open_dataset("sun397", tmp_path)


def test_caltech101_has_thirty_of_each_class_to_train_with(tmp_path: Path) -> None:
    base = tmp_path / "caltech101" / "101_ObjectCategories"
    for c, count in (("BACKGROUND_Google", 31), ("accordion", 40), ("Faces", 33)):
        for i in range(count):
            (base / c).mkdir(parents=True, exist_ok=True)
            (base / c / f"image_{i + 1:04d}.jpg").write_bytes(b"")
    train, test = open_dataset("caltech101", tmp_path), open_dataset("caltech101", tmp_path, "test")
    assert train.classes == ("BACKGROUND_Google", "Faces", "accordion")
    assert np.bincount(train.label).tolist() == [30, 30, 30]
    assert np.bincount(test.label).tolist() == [1, 3, 10]
    names = [{d.where(r) for r in range(len(d))} for d in (train, test)]
    assert not names[0] & names[1]
    again = open_dataset("caltech101", tmp_path)
    assert isinstance(again, FileSet)
    assert isinstance(train, FileSet)
    np.testing.assert_array_equal(again.files, train.files)


def test_flowers102(tmp_path: Path) -> None:
    from scipy.io import savemat

    base = tmp_path / "flowers-102"
    base.mkdir()
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 102, 1, 2, 1]], dtype=np.uint8)})
    savemat(base / "setid.mat", {"trnid": [[3, 1]], "valid": [[4]], "tstid": [[2, 5]]})
    for i in range(5):
        picture(base / "jpg" / f"image_{i + 1:05d}.jpg", i + 1)
    assert open_dataset("flowers102", tmp_path).label.tolist() == [0, 76]
    assert open_dataset("flowers102", tmp_path, "trainval").label.tolist() == [0, 76, 1]
    test = open_dataset("flowers102", tmp_path, "test")
    assert test.label.tolist() == [101, 0]
    assert [int(test.read(r)[0, 0, 0]) for r in range(2)] == [2, 5]
    savemat(base / "setid.mat", {"trnid": [[3, 9]], "valid": [[4]], "tstid": [[2, 5]]})
    with pytest.raises(ConfigError, match=r"outside 1\.\.5"):
        open_dataset("flowers102", tmp_path)


def test_voc2007_keeps_what_is_difficult(tmp_path: Path) -> None:
    from raycon.data_loaders.datasets import voc2007

    base = tmp_path / "VOCdevkit" / "VOC2007"
    target = np.full((3, 20), -1)
    target[0, 4], target[0, 14] = 1, 0  # a bottle, and a difficult person
    target[1, 6] = 1  # a car
    target[2, 6] = target[2, 14] = 1  # a car and a person
    for c, name in enumerate(voc2007.CLASSES):
        rows = [f"{image:06d} {value:2d}" for image, value in zip((5, 7, 12), target[:, c], strict=True)]
        write(base / "ImageSets" / "Main" / f"{name}_trainval.txt", *rows)
    for image in (5, 7, 12):
        picture(base / "JPEGImages" / f"{image:06d}.jpg", image)
    found = open_dataset("voc2007", tmp_path, "trainval")
    assert found.targets is not None
    np.testing.assert_array_equal(found.targets, target)
    assert found.label.tolist() == [-1, 6, -1]
    assert int(found.read(2)[0, 0, 0]) == 12
    assert found.annotations == str(base / "Annotations")
    part = found.subset(np.array([2, 0]))
    assert part.targets is not None
    np.testing.assert_array_equal(part.targets, target[[2, 0]])
    write(base / "ImageSets" / "Main" / "tvmonitor_trainval.txt", "000005 -1", "000008 -1", "000012 -1")
    with pytest.raises(ConfigError, match=r"tvmonitor_trainval\.txt: lists other images"):
        open_dataset("voc2007", tmp_path, "trainval")


def test_coco2017(tmp_path: Path) -> None:
    found: dict[str, Any] = {
        "images": [{"id": 9, "file_name": "000009.jpg"}, {"id": 2, "file_name": "000002.jpg"}, {"id": 30, "file_name": "000030.jpg"}],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 18, "iscrowd": 0},
            {"id": 3, "image_id": 2, "category_id": 90, "iscrowd": 0},
            {"id": 4, "image_id": 2, "category_id": 1, "iscrowd": 1},
        ],
    }  # fmt: skip
    source = tmp_path / "annotations" / "instances_val2017.json"
    write(source, json.dumps(found))
    for i in (2, 9, 30):
        picture(tmp_path / "val2017" / f"{i:06d}.jpg", i)
    dataset = open_dataset("coco2017", tmp_path, "test")
    assert dataset.classes == ("person", "dog", "toothbrush")
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [[0, -1, 1], [-1, 1, -1], [-1, -1, -1]]
    assert dataset.label.tolist() == [-1, 1, -1]
    assert [dataset.weak_classes[w] if w >= 0 else "" for w in dataset.weak] == ["", "animal", ""]
    assert [int(dataset.read(r)[0, 0, 0]) for r in range(3)] == [2, 9, 30]
    assert dataset.annotations == str(source)
    found["images"][0]["file_name"] = "../../secret.jpg"
    write(source, json.dumps(found))
    with pytest.raises(ConfigError, match=r"image 9: '\.\./\.\./secret\.jpg' leads out"):
        open_dataset("coco2017", tmp_path, "val")
    found["images"][0]["file_name"] = "9.jpg"
    found["annotations"][0]["category_id"] = 5
    write(source, json.dumps(found))
    with pytest.raises(ConfigError, match="object 1 is of an unknown"):
        open_dataset("coco2017", tmp_path, "val")
    source.write_text("[1]", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a file of COCO instances"):
        open_dataset("coco2017", tmp_path, "val")
