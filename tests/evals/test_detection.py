"""Mask R-CNN on pictures of coloured shapes in COCO's layout, and the reading of COCO's and VOC's annotations."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from raycon.core.config import ConfigError, EvalConfig, ModelConfig, RunConfig
from raycon.evals import Source, Task, coco, detection, on_checkpoint, rcnn
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

    protocol = replace(
        DETECTION[preset], train_sides=(SIDE,), regions=8, before_nms=(20, 20), proposals=(20, 20), maps=16
    )
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


VOC_PAGE = """<annotation>
	<folder>{year}</folder>
	<filename>{stem}.jpg</filename>
	<source>
		<database>The VOC2007 Database</database>
		<annotation>PASCAL VOC2007</annotation>
		<image>flickr</image>
	</source>
	<size>
		<width>30</width>
		<height>20</height>
		<depth>3</depth>
	</size>
	<segmented>0</segmented>
{objects}</annotation>
"""
VOC_OBJECT = """	<object>
		<name>{name}</name>
		<pose>Unspecified</pose>
		<truncated>0</truncated>
		<difficult>{difficult}</difficult>
		<bndbox>
			<xmin>{box[0]}</xmin>
			<ymin>{box[1]}</ymin>
			<xmax>{box[2]}</xmax>
			<ymax>{box[3]}</ymax>
		</bndbox>
		<part>
			<name>head</name>
			<bndbox>
				<xmin>3</xmin>
				<ymin>3</ymin>
				<xmax>4</xmax>
				<ymax>4</ymax>
			</bndbox>
		</part>
	</object>
"""


def voc_image(root: Path, year: str, split: str, stem: str, objects: list[tuple[str, int, tuple[int, ...]]]) -> None:
    """A picture and its page as VOCdevkit has them, added to the list of a split."""
    base = root / year
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / part).mkdir(parents=True, exist_ok=True)
    with (base / "ImageSets" / "Main" / f"{split}.txt").open("a") as names:
        names.write(f"{stem}\n")
    Image.new("RGB", (30, 20)).save(base / "JPEGImages" / f"{stem}.jpg")
    text = "".join(VOC_OBJECT.format(name=n, difficult=hard, box=box) for n, hard, box in objects)
    (base / "Annotations" / f"{stem}.xml").write_text(VOC_PAGE.format(year=year, stem=stem, objects=text))


def test_voc_devkit(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    box = (1, 2, 10, 20)
    for year, split, stem, hard in (("VOC2007", "trainval", "000005", 0), ("VOC2012", "trainval", "2008_000002", 0),
                                    ("VOC2007", "test", "000001", 1)):  # fmt: skip
        voc_image(tmp_path, year, split, stem, [("dog", hard, box), ("cat", 0, box)])
    train, test = coco.open_pictures(tmp_path, masks=False)
    assert [i["file_name"] for i in train.content["images"]] == [
        "VOC2007/JPEGImages/000005.jpg",
        "VOC2012/JPEGImages/2008_000002.jpg",
    ]
    target = train.targets(train.content["images"][0], masks=False)
    assert target["boxes"].tolist() == [[0, 1, 10, 20]] * 2
    assert target["labels"].tolist() == [2, 1]  # cat, dog
    assert train.read(train.content["images"][1], 1).shape == (1, 20, 30)
    # A difficult object counts neither for nor against: the cat alone is a perfect answer.
    cat = [{"image_id": 1, "category_id": 1, "bbox": [0, 1, 10, 19], "score": 0.5}]
    assert coco.average_precision(test, cat, "bbox")["ap50"] == pytest.approx(100)
    assert coco.voc_average_precision(test, cat) == pytest.approx({"voc_ap": 100, "voc_ap50": 100, "voc_ap75": 100})
    with pytest.raises(ConfigError, match="boxes only"):
        coco.open_pictures(tmp_path, masks=True)


def kit_average_precision(objects: list[Any], found: list[Any], threshold: float) -> float:
    """One class as the text of VOC2007's kit says it, result by result: integer boxes, ends included."""
    claimed, right, wrong = set(), [], []
    for one in sorted(found, key=lambda f: -f[0]):
        best, which = 0.0, -1
        for i, (image, box, _) in enumerate(objects):
            if image == one[1]:
                w = min(box[2], one[2][2]) - max(box[0], one[2][0]) + 1
                h = min(box[3], one[2][3]) - max(box[1], one[2][1]) + 1
                if w > 0 and h > 0:
                    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, one[2])]
                    if w * h / (sum(areas) - w * h) > best:
                        best, which = w * h / (sum(areas) - w * h), i
        if best > threshold and objects[which][2]:
            continue
        hit = best > threshold and which not in claimed
        claimed |= {which} if hit else set()
        right.append(hit)
        wrong.append(not hit)
    recall = np.cumsum(right) / sum(not hard for *_, hard in objects)
    precision = np.cumsum(right) / (np.cumsum(right) + np.cumsum(wrong))
    return float(np.mean([max(precision[recall >= t - 1e-12], default=0.0) for t in np.linspace(0, 1, 11)]))


def test_vocs_own_average_precision(tmp_path: Path) -> None:
    """Against the kit's rule written out, on boxes that overlap, come twice, miss, and lie on difficult objects."""
    rng = np.random.default_rng(0)

    def box() -> tuple[int, ...]:
        left, top = (int(v) for v in rng.integers(1, 12, 2))
        return left, top, left + int(rng.integers(4, 16)), top + int(rng.integers(3, 7))

    def near(one: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(v) for v in np.array(one) + rng.integers(0, 2, 4))

    objects: dict[str, list[Any]] = {"cat": [], "dog": []}
    voc_image(tmp_path, "VOC2007", "trainval", "0", [("cat", 0, (1, 1, 9, 9)), ("dog", 0, (1, 1, 9, 9))])
    for image in range(1, 13):
        here = [(str(rng.choice(["cat", "dog"])), int(rng.random() < 0.2), box()) for _ in range(4)]
        voc_image(tmp_path, "VOC2007", "test", str(image), here)
        for name, hard, where in here:
            objects[name].append((image, where, hard))
    _, test = coco.open_pictures(tmp_path, masks=False)
    results: dict[str, list[Any]] = {name: [] for name in objects}
    for name, known in objects.items():
        for image, where, _ in known:
            for _ in range(int(rng.integers(0, 3))):
                results[name].append((float(rng.random()), image, near(where)))
            results[name].append((float(rng.random()), image, box()))
    given = [
        {"image_id": image, "category_id": 1 + (name == "dog"), "score": score,
         "bbox": [b[0] - 1, b[1] - 1, b[2] - b[0] + 1, b[3] - b[1] + 1]}
        for name, of in results.items() for score, image, b in of
    ]  # fmt: skip
    ours = coco.voc_average_precision(test, given)
    expected = [
        np.mean([kit_average_precision(objects[n], results[n], iou) for n in objects])
        for iou in np.arange(50, 100, 5) / 100
    ]
    assert 5 < ours["voc_ap75"] < ours["voc_ap50"] < 95
    assert ours == pytest.approx(
        {"voc_ap": 100 * np.mean(expected), "voc_ap50": 100 * expected[0], "voc_ap75": 100 * expected[5]}
    )


class Stopped(BaseException):
    """Not an error of the evaluation: the process ends."""


def test_what_was_stopped_goes_on_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Stopped in the fourth of six steps: the next attempt does steps four to six, and nothing stays behind."""
    protocol = DETECTION["tiny"]
    train, _ = coco.open_pictures(folder, masks=True)
    kept, seen = tmp_path / "kept", []

    def trained(place: Path | None, stop: int = 99) -> nn.Module:
        torch.manual_seed(0)
        model = rcnn.build(encoder(width=4), protocol, 2, (0.4,) * 3, (0.2,) * 3)

        def look(*_: object) -> None:
            seen.append(1)
            if len(seen) == stop:
                raise Stopped

        model.register_forward_pre_hook(look)
        detection.fit(model, protocol, train, 6, 3, detection.Work(torch.device("cpu"), 3, 0, place))
        return model

    whole = trained(None).state_dict()
    seen.clear()
    with pytest.raises(Stopped):
        trained(kept, stop=4)
    assert [p.name for p in kept.iterdir() if p.name != "last"] == ["00000003"], "only the newest state is kept"
    seen.clear()
    again = trained(kept).state_dict()
    assert len(seen) == 3
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    # The parts that C4's heads share come back too.
    shared = rcnn.build(encoder(width=4), DETECTION["c4-2x"], 2, (0.4,) * 3, (0.2,) * 3)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1, momentum=0.9)
    detection._keep(shared, optimizer, tmp_path / "c4", 1)
    other = rcnn.build(encoder(width=4), DETECTION["c4-2x"], 2, (0.4,) * 3, (0.2,) * 3)
    assert detection._resume(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), tmp_path / "c4") == 1
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in shared.state_dict().items())


def test_the_state_is_that_of_this_very_training(folder: Path, tmp_path: Path) -> None:
    here = dataclasses.replace(source(tmp_path), unfinished=tmp_path / "u")
    train, _ = coco.open_pictures(folder, masks=True)

    def place(source: Source, iterations: int = 5, seed: int = 0) -> Path | None:
        return detection.preset(EvalConfig(coco=str(folder), iterations=iterations), seed, "tiny")._folder(
            source, train
        )

    other = dataclasses.replace(here, encoder=encoder(width=8))
    assert place(here) == place(dataclasses.replace(here, encoder=copy.deepcopy(here.encoder)))
    assert len({place(here), place(other), place(here, iterations=6), place(here, seed=1)}) == 4
    assert place(source(tmp_path)) is None


def test_reading_ahead_changes_nothing(folder: Path) -> None:
    """Every image of an epoch once, over all ranks; the same with helper processes and without."""
    train, _ = coco.open_pictures(folder, masks=True)
    images = train.trainable()
    seen = []
    for rank in (0, 1):
        make = functools.partial(
            detection.pictures_of_step, train=train, images=images, batch=2, rank=rank, world=2, seed=5, channels=3,
            masks=True,
        )  # fmt: skip
        here, far = list(detection.ahead(make, range(6), 0)), list(detection.ahead(make, range(6), 1))
        for (pictures, targets), (same, alike) in zip(here, far, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pictures, same, strict=True))
            assert all(torch.equal(a[k], b[k]) for a, b in zip(targets, alike, strict=True) for k in a)
            seen += [float((p + p.flip(2)).double().sum()) for p in pictures]
    everything = [float((p + p.flip(2)).double().sum()) for p in (train.read(i, 3) for i in images)]
    assert sorted(seen) == pytest.approx(sorted(everything))


STEPS = 5
LITTLE = EvalConfig(coco="", iterations=STEPS, workers=2, retries=1)


def _two_ranks(folder: str) -> tuple[list[float], dict[str, float]]:
    evaluation = detection.preset(dataclasses.replace(LITTLE, coco=folder), 0, "tiny")
    kept: list[nn.Module] = []
    build = rcnn.build

    def spy(*args: object) -> nn.Module:
        kept.append(build(*args))  # type: ignore[arg-type]
        return kept[-1]

    rcnn.build = spy  # type: ignore[assignment]
    numbers = evaluation.run_on(source(Path(folder)))
    return [float(p.detach().double().sum()) for p in kept[0].parameters()], numbers


@pytest.fixture(scope="module")
def of_two_ranks(folder: Path) -> dict[str, float]:
    """The numbers of a training that nothing happened to, of two ranks without Ray."""
    (one, numbers), (other, same) = on_ranks(2, _two_ranks, str(folder))
    assert one == pytest.approx(other, abs=1e-6)
    assert numbers == same
    return numbers


@pytest.mark.ranks
def test_ranks_end_with_one_network(of_two_ranks: dict[str, float]) -> None:
    """The fixture compares the ranks. What five steps reach is the processor's rounding; test_shapes_are_found learns."""
    assert {"detection/box_ap", "detection/mask_ap"} <= set(of_two_ranks)
    assert all(0 <= value <= 100 for name, value in of_two_ranks.items() if "_ap" in name)


def fragile(net: nn.Module, mark: Path) -> nn.Module:
    """The encoder, whose process is killed in the third step of its training, once."""

    class Fragile(nn.Module):  # of this function: Ray sends it by value, no worker needs the tests
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.mark = net, 0, str(mark)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import os
            import signal

            self.calls += self.training
            if self.calls == 3 and not os.path.exists(self.mark):
                open(self.mark, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.net(x)

    return Fragile()


@pytest.mark.ray
def test_ray_train_workers_one_of_them_killed(
    folder: Path, of_two_ranks: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Ray Train workers end with the numbers of two ranks without Ray, although one is lost on the way."""
    ray = pytest.importorskip("ray")
    from raycon.on_ray import evaluate as on_ray
    from raycon.on_ray import here

    subject = on_checkpoint.Subject(
        config=RunConfig(evals=dataclasses.replace(LITTLE, coco=str(folder))), own="",
        encoder=fragile(encoder(), tmp_path / "killed"), mean=(0.4,) * 3, std=(0.2,) * 3,
        entry={"step": 0, "epoch": 0, "checkpoint": "x"}, file=tmp_path / "evaluations.json", cache=tmp_path,
    )  # fmt: skip
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="raycon")
    try:
        assert on_ray.placement_problems(dataclasses.replace(subject.config.evals, workers=3))
        outcome = on_ray.run(subject, [Task("detection", "tiny")])
        # What would fail again says why.
        broken = dataclasses.replace(subject.config.evals, coco=str(tmp_path / "nowhere"), retries=0)
        wrong = on_ray.run(dataclasses.replace(subject, config=RunConfig(evals=broken)), [Task("detection", "tiny")])
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    assert outcome.failed == {}
    expected = {f"detection:tiny/{k.split('/')[1]}": v for k, v in of_two_ranks.items()}
    assert outcome.results == pytest.approx(expected, abs=1e-6)
    assert not (tmp_path / ".unfinished").exists()
    assert "instances_train" in wrong.failed["detection:tiny"]
