"""Mask R-CNN on pictures of coloured shapes in COCO's layout, and the reading of COCO's and VOC's annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from raycon.core.config import ConfigError, EvalConfig, ModelConfig
from raycon.evals import Source, coco, detection, rcnn
from raycon.evals.protocols import DETECTION
from raycon.nn import networks
from tests.helpers import on_ranks

SIDE = 64
COLOURS = {3: (255, 40, 40), 7: (40, 40, 255)}


def shapes(root: Path, split: str, count: int, seed: int) -> None:
    """Pictures of one or two rectangles, red (category 3) or blue (7), on grey noise."""
    rng = np.random.default_rng(seed)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(90, 120, (SIDE, SIDE, 3), dtype=np.uint8)
        for left in (0, SIDE // 2)[: 1 + i % 2]:
            category = int(rng.choice([3, 7]))
            w, h = rng.integers(14, 28, 2).tolist()
            x, y = left + int(rng.integers(0, 3)), int(rng.integers(0, SIDE - h))
            pixels[y : y + h, x : x + w] = COLOURS[category]
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            one = {"id": len(annotations) + 1, "image_id": 10 * i, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append(one | {"segmentation": [polygon], "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        images.append({"id": 10 * i, "file_name": f"{i:04d}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("shapes")
    shapes(root, "train", 24, 0)
    shapes(root, "val", 8, 1)
    return root


def encoder(name: str = "resnet10", width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return networks.build_encoder(ModelConfig(encoder=name, width=width), 3)


def source(tmp_path: Path) -> Source:
    return Source(
        encoder=encoder(), train=None, test=None, size=SIDE, mean=(0.4,) * 3, std=(0.2,) * 3,
        device=torch.device("cpu"), cache=tmp_path,
    )  # fmt: skip


def run(folder: Path, iterations: int) -> dict[str, float]:
    evaluation = detection.preset(EvalConfig(coco=str(folder), iterations=iterations), 0, "tiny")
    assert evaluation.problems() == []
    return evaluation.run_on(source(folder))


@pytest.mark.slow
def test_shapes_are_found(folder: Path) -> None:
    numbers = run(folder, 150)
    assert set(numbers) == {f"detection/{kind}_{n}" for kind in ("box", "mask") for n in ("ap", "ap50", "ap75")}
    assert numbers["detection/box_ap50"] > 60
    assert numbers["detection/mask_ap50"] > 60


def test_truth_as_result_is_perfect(folder: Path) -> None:
    _, test = coco.open_pictures(folder, masks=True)
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in test.content["annotations"]
    ]
    assert coco.average_precision(test, found, "bbox") == pytest.approx({"ap": 100, "ap50": 100, "ap75": 100})
    images = {i["id"]: i for i in test.content["images"]}
    masks = []
    for identity, objects in test.by_image.items():
        target = test.targets(images[identity], masks=True)
        for one, mask in zip(objects, target["masks"], strict=True):
            x, y, w, h = one["bbox"]
            assert mask.sum() == w * h
            assert mask[y : y + h, x : x + w].all()
            row = {"image_id": identity, "category_id": one["category_id"], "score": 1.0}
            masks.append(row | {"segmentation": coco.encoded(mask)})
    assert coco.average_precision(test, masks, "segm")["ap"] == pytest.approx(100)
    swapped = [one | {"category_id": 10 - one["category_id"]} for one in found]
    assert coco.average_precision(test, swapped, "bbox")["ap"] < 5
    assert coco.average_precision(test, [], "bbox")["ap"] == 0


def test_labels_count_from_one_and_flips_move_everything(folder: Path) -> None:
    train, _ = coco.open_pictures(folder, masks=True)
    image = train.content["images"][1]
    picture, target = train.read(image, 3), train.targets(image, masks=True)
    assert picture.shape == (3, SIDE, SIDE)
    for label, box in zip(target["labels"].tolist(), target["boxes"].int().tolist(), strict=True):
        colour = torch.tensor(COLOURS[{1: 3, 2: 7}[label]]) / 255
        assert torch.allclose(picture[:, box[1], box[0]], colour)
        assert torch.allclose(picture[:, box[3] - 1, box[2] - 1], colour)
    again, changed = detection.flipped(*detection.flipped(picture, target))
    mirrored, moved = detection.flipped(picture, target)
    assert torch.equal(again, picture)
    assert all(torch.equal(changed[k], target[k]) for k in target)
    for box, mask, label in zip(moved["boxes"].int().tolist(), moved["masks"], moved["labels"].tolist(), strict=True):
        assert mask[box[1] : box[3], box[0] : box[2]].all()
        assert torch.allclose(mirrored[:, box[1], box[0]], torch.tensor(COLOURS[{1: 3, 2: 7}[label]]) / 255)


@pytest.mark.parametrize("preset", ["", "c4-2x", "c4-voc"])
def test_every_form_trains_the_whole_encoder(preset: str) -> None:
    from dataclasses import replace

    protocol = replace(DETECTION[preset], train_sides=(SIDE,), regions=8, proposals=(20, 20), maps=16)
    torch.manual_seed(0)
    net = encoder(width=8)
    model = rcnn.build(net, protocol, 2, (0.4,) * 3, (0.2,) * 3).train()
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    if protocol.masks:
        target["masks"] = torch.ones(1, SIDE, SIDE, dtype=torch.uint8)
    losses = model([torch.rand(3, SIDE, SIDE)], [target])
    assert ("loss_mask" in losses) == protocol.masks
    sum(losses.values()).backward()
    copied = [
        p for n, p in model.named_parameters() if p.ndim == 4 and n.startswith(("backbone.body", "backbone.encoder"))
    ]
    copied += [p for n, p in model.named_parameters() if p.ndim == 4 and "layer4" in n and not n.startswith("backbone")]
    assert len(copied) == sum(p.ndim == 4 for p in net.parameters())
    assert all(p.grad is not None for p in copied)
    assert all(p.grad is None for p in net.parameters()), "the encoder itself must be left alone"


def test_the_pyramid_takes_the_deepest_maps() -> None:
    found = rcnn.stages(encoder(width=8), 3)
    assert [name for _, name in found[-4:]] == ["layer1", "layer2", "layer3", "layer4"]
    assert [width for width, _ in found[-4:]] == [8, 16, 32, 64]
    small = networks.build_encoder(ModelConfig(encoder="resnet10", width=8, stem="small"), 3)
    assert [name for _, name in rcnn.stages(small, 3)[-4:]] == ["layer1", "layer2", "layer3", "layer4"]
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten())
    with pytest.raises(ConfigError, match="a pyramid needs 4"):
        rcnn.build(flat, DETECTION[""], 2, (0.4,) * 3, (0.2,) * 3)
    with pytest.raises(ConfigError, match="needs a ResNet"):
        rcnn.build(flat, DETECTION["c4-2x"], 2, (0.4,) * 3, (0.2,) * 3)


def test_published_rates() -> None:
    one = DETECTION[""]
    assert detection.rate(one, 0, one.iterations) == pytest.approx(0.02 * 1e-3)
    assert [detection.rate(one, s, one.iterations) for s in (1000, 59_999, 60_000, 80_000)] == pytest.approx(
        [0.02, 0.02, 0.002, 0.0002]
    )
    assert detection.rate(one, 600, 900) == pytest.approx(0.002)  # a hundredth of the steps: milestones move too
    sce = DETECTION["c4-sce"]
    assert detection.rate(sce, 90_000, 180_000) == pytest.approx(0.025)


def test_wrong_folders_are_said(tmp_path: Path, folder: Path) -> None:
    assert "give --evals.coco" in detection.Evaluation(EvalConfig()).problems()[0]
    assert "instances_train" in detection.Evaluation(EvalConfig(coco=str(tmp_path))).problems()[0]
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    file = tmp_path / "annotations" / "instances_train.json"
    for spoil, word in (
        (lambda c: c["annotations"][0].update(image_id=77), "annotation 1"),
        (lambda c: c["images"][0].update(file_name="../../etc/passwd"), "leads out"),
        (lambda c: c.pop("categories"), "KeyError"),
    ):
        wrong = json.loads(json.dumps(content))
        spoil(wrong)
        file.write_text(json.dumps(wrong))
        assert word in detection.Evaluation(EvalConfig(coco=str(tmp_path))).problems()[0]


def test_voc_devkit(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    for year, split, stem, difficult in (("VOC2007", "trainval", "a", 0), ("VOC2012", "trainval", "b", 0),
                                         ("VOC2007", "test", "c", 1)):  # fmt: skip
        base = tmp_path / year
        for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (base / part).mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}\n")
        Image.new("RGB", (30, 20)).save(base / "JPEGImages" / f"{stem}.jpg")
        things = "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>"
            f"<xmax>10</xmax><ymax>20</ymax></bndbox></object>"
            for name, hard in (("dog", difficult), ("cat", 0))
        )
        (base / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><size><width>30</width><height>20</height></size>{things}</annotation>"
        )
    train, test = coco.open_pictures(tmp_path, masks=False)
    assert [i["file_name"] for i in train.content["images"]] == ["VOC2007/JPEGImages/a.jpg", "VOC2012/JPEGImages/b.jpg"]
    target = train.targets(train.content["images"][0], masks=False)
    assert target["boxes"].tolist() == [[0, 1, 10, 20]] * 2
    assert target["labels"].tolist() == [2, 1]  # cat, dog
    assert train.read(train.content["images"][1], 1).shape == (1, 20, 30)
    # A difficult object counts neither for nor against: the cat alone is a perfect answer.
    cat = [{"image_id": 1, "category_id": 1, "bbox": [0, 1, 10, 19], "score": 0.5}]
    assert coco.average_precision(test, cat, "bbox")["ap50"] == pytest.approx(100)
    with pytest.raises(ConfigError, match="boxes only"):
        coco.open_pictures(tmp_path, masks=True)


def _two_ranks(folder: str) -> tuple[list[float], dict[str, float]]:
    evaluation = detection.preset(EvalConfig(coco=folder, iterations=2), 0, "tiny")
    kept: list[nn.Module] = []
    build = rcnn.build

    def spy(*args: object) -> nn.Module:
        kept.append(build(*args))  # type: ignore[arg-type]
        return kept[-1]

    rcnn.build = spy  # type: ignore[assignment]
    numbers = evaluation.run_on(source(Path(folder)))
    return [float(p.detach().double().sum()) for p in kept[0].parameters()], numbers


@pytest.mark.ranks
def test_ranks_end_with_one_network(folder: Path) -> None:
    (one, numbers), (other, same) = on_ranks(2, _two_ranks, str(folder))
    assert one == pytest.approx(other, abs=1e-6)
    assert numbers == same
