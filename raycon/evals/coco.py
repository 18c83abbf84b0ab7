"""Detection data in COCO's layout or Pascal VOC's, and the average precisions of both.

    FOLDER/annotations/instances_train*.json, instances_val*.json; the pictures in FOLDER/train*, FOLDER/val*
    FOLDER/VOC2007, FOLDER/VOC2012 (VOCdevkit): train on 07 + 12 trainval, test on 07 test; difficult objects are not
    trained on and neither right nor wrong in the test

Boxes are (x1, y1, x2, y2) in pixels, x2 and y2 exclusive. Shape letters: O objects, R results, H W height and width.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.config import ConfigError

INSTALL = "pip install pycocotools, or faster-coco-eval"


@dataclass(frozen=True)
class Pictures:
    """One split."""

    folder: Path
    content: dict[str, Any]
    """As a COCO annotation file: images, annotations, categories."""
    by_image: dict[int, list[dict[str, Any]]]
    """The annotations of each image."""
    voc: bool = False
    """Pascal VOC's: difficult objects are marked as crowds."""

    @property
    def categories(self) -> list[int]:
        """The ids of the categories; class i + 1 of the network is the i-th."""
        return sorted(c["id"] for c in self.content["categories"])

    def read(self, image: dict[str, Any], channels: int) -> Tensor:
        """(C, H, W) float in 0..1. Raises ValueError naming a picture that cannot be read."""
        from PIL import Image

        file = self.folder / image["file_name"]
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{file}: not a readable picture ({error})") from error
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise ValueError(f"{file} is {pixels.shape[1]} x {pixels.shape[0]}, the annotations say "
                             f"{image['width']} x {image['height']}")  # fmt: skip
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1).float() / 255

    def targets(self, image: dict[str, Any], masks: bool) -> dict[str, Tensor]:
        """boxes (O, 4) float, labels (O,) int64 from 1, and masks (O, H, W) uint8: what torchvision's detectors want.
        Crowds and boxes without area are left out."""
        place = {c: i + 1 for i, c in enumerate(self.categories)}
        objects = [a for a in self.by_image.get(image["id"], []) if usable(a)]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = {"boxes": boxes, "labels": torch.tensor([place[a["category_id"]] for a in objects], dtype=torch.int64)}
        if masks:
            empty = np.zeros((0, image["height"], image["width"]), np.uint8)
            pictures = [_mask(a["segmentation"], image["height"], image["width"]) for a in objects]
            found["masks"] = torch.from_numpy(np.stack(pictures) if pictures else empty)
        return found

    def trainable(self) -> list[dict[str, Any]]:
        """The images with at least one usable object, in the order of the file."""
        return [i for i in self.content["images"] if any(usable(a) for a in self.by_image.get(i["id"], []))]


def usable(annotation: dict[str, Any]) -> bool:
    return not annotation.get("iscrowd") and annotation["bbox"][2] >= 1 and annotation["bbox"][3] >= 1


def open_pictures(root: Path, masks: bool) -> tuple[Pictures, Pictures]:
    """(train, test). Raises ConfigError naming what is missing or wrong."""
    if (root / "VOC2007").is_dir():
        years = [y for y in ("VOC2007", "VOC2012") if (root / y).is_dir()]
        if masks:
            raise ConfigError([f"evals.coco = {str(root)!r} is Pascal VOC, boxes only: use detection:c4-voc"])
        train = _voc(root, [(y, "trainval") for y in years])
        return train, _voc(root, [("VOC2007", "test")])
    return _coco(root, "train", masks), _coco(root, "val", masks)


def _coco(root: Path, split: str, masks: bool) -> Pictures:
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if not found:
        raise ConfigError(
            [
                f"evals.coco = {str(root)!r} has no annotations/instances_{split}*.json: give a folder in COCO's layout, "
                "or VOCdevkit"
            ]
        )
    folder = root / found[0].stem.removeprefix("instances_")
    if not folder.is_dir():
        raise ConfigError([f"{folder}: no such folder; {found[0].name} wants its pictures there"])
    try:
        content = json.loads(found[0].read_text(encoding="utf-8"))
        return _checked(folder, content, str(found[0]), masks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"{found[0]} is no COCO annotation file: {type(error).__name__}: {error}"]) from None


def _checked(folder: Path, content: dict[str, Any], name: str, masks: bool, voc: bool = False) -> Pictures:
    known, categories = {i["id"] for i in content["images"]}, {c["id"] for c in content["categories"]}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in known or annotation["category_id"] not in categories:
            raise ValueError(f"annotation {annotation.get('id')} is of an image or a category that is not there")
        if len(annotation["bbox"]) != 4 or (masks and "segmentation" not in annotation):
            raise ValueError(f"annotation {annotation.get('id')} has no box of 4 numbers, or no mask")
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    for image in content["images"]:
        if Path(image["file_name"]).is_absolute() or ".." in Path(image["file_name"]).parts:
            raise ValueError(f"image {image['id']}: {image['file_name']!r} leads out of the folder")
    pictures = Pictures(folder, content, by_image, voc)
    if not content["images"] or not pictures.trainable():
        raise ValueError(f"no image with an object in {name}")
    return pictures


def _voc(root: Path, parts: list[tuple[str, str]]) -> Pictures:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names: set[str] = set()
    for year, split in parts:
        file = root / year / "ImageSets" / "Main" / f"{split}.txt"
        try:
            stems = file.read_text(encoding="utf-8").split()
        except OSError as error:
            raise ConfigError([f"{file} cannot be read: {error.strerror}; evals.coco needs VOCdevkit"]) from None
        for stem in stems:
            page = root / year / "Annotations" / f"{stem}.xml"
            try:
                tree = ElementTree.parse(page).getroot()
                size = [int(tree.findtext(f"size/{k}", "")) for k in ("width", "height")]
                image = {"id": len(images) + 1, "file_name": f"{year}/JPEGImages/{stem}.jpg"}
                images.append(image | {"width": size[0], "height": size[1]})
                for thing in tree.findall("object"):
                    left, top, right, bottom = (
                        float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")
                    )
                    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]  # pixels count from 1, ends included
                    names.add(thing.findtext("name", ""))
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": image["id"], "category_id": thing.findtext("name", ""),
                         "bbox": box, "area": box[2] * box[3], "iscrowd": int(thing.findtext("difficult", "0"))}
                    )  # fmt: skip
            except (OSError, ValueError, ElementTree.ParseError) as error:
                raise ConfigError([f"{page} cannot be read: {error}"]) from None
    order = {name: i + 1 for i, name in enumerate(sorted(names))}
    for annotation in annotations:
        annotation["category_id"] = order[str(annotation["category_id"])]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": name} for name, i in order.items()]
    return _checked(root, content, "VOCdevkit", masks=False, voc=True)


# --- pycocotools ------------------------------------------------------------------------------------------------


def library() -> tuple[Any, Any, Any]:
    """(COCO, COCOeval, mask module) of pycocotools, else of faster-coco-eval. Raises ConfigError without either."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval, mask
    except ImportError:
        pass
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
        from faster_coco_eval import mask as faster_mask

        return FasterCOCO, COCOeval_faster, faster_mask
    except ImportError:
        raise ConfigError([f"detection needs COCO's tools: {INSTALL}"]) from None


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of polygons or a run-length code."""
    mask = library()[2]
    if isinstance(segmentation, list):
        code = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    decoded: np.ndarray = mask.decode(code)
    return decoded


def encoded(mask_HW: Tensor) -> dict[str, Any]:
    """The run-length code of a mask."""
    code: dict[str, Any] = library()[2].encode(np.asfortranarray(mask_HW.numpy().astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def average_precision(truth: Pictures, found: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """COCO's AP over IoU 0.5 to 0.95, at 0.5 and at 0.75, in percent: "ap", "ap50", "ap75".

    found: image_id, category_id, score and bbox (x, y, w, h) or segmentation each. kind: bbox or segm.
    """
    COCO, COCOeval, _ = library()
    if not found:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        known = COCO()
        known.dataset = {"info": {}, **truth.content}
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (100.0 * float(v) for v in evaluation.stats[:3])
    return {"ap": ap, "ap50": ap50, "ap75": ap75}


# --- Pascal VOC's kit -------------------------------------------------------------------------------------------


def voc_average_precision(truth: Pictures, found: list[dict[str, Any]]) -> dict[str, float]:
    """VOC2007's average precision (11 points) in percent as MoCo's tables have it: "voc_ap50", "voc_ap75", and "voc_ap",
    the mean over IoU above 0.5, 0.55, ... 0.95. The mean over the classes that have an object to find.

    found: image_id, category_id, score and bbox (x, y, w, h) each. A result is held against the object it covers best:
    right when it is the first to; one of a difficult object is neither right nor wrong.
    """
    aps = []
    for category in truth.categories:
        objects = [a for a in truth.content["annotations"] if a["category_id"] == category]
        wanted = sum(not a["iscrowd"] for a in objects)
        if wanted:
            mine = sorted((f for f in found if f["category_id"] == category), key=lambda f: -f["score"])
            cover_R, object_R = _best_object(mine, objects)
            hard_R = np.array([i >= 0 and bool(objects[i]["iscrowd"]) for i in object_R], dtype=bool)
            aps.append([_eleven_points(cover_R > iou, object_R, hard_R, wanted) for iou in _IOUS])
    if not aps:
        raise ValueError("no object to find in the test images but difficult ones")
    mean = 100.0 * np.mean(aps, axis=0)
    return {"voc_ap": float(mean.mean()), "voc_ap50": float(mean[0]), "voc_ap75": float(mean[5])}


_IOUS = np.arange(50, 100, 5) / 100


def _best_object(
    found: list[dict[str, Any]], objects: list[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each of R results its largest IoU with an object of its image, and which; (0, -1) where there is none."""
    by_image: dict[int, list[int]] = {}
    for i, one in enumerate(objects):
        by_image.setdefault(one["image_id"], []).append(i)
    cover_R, object_R = np.zeros(len(found)), np.full(len(found), -1)
    for r, one in enumerate(found):
        if near := by_image.get(one["image_id"]):
            iou_O = _iou(one["bbox"], np.array([objects[i]["bbox"] for i in near], dtype=np.float64))
            best = int(iou_O.argmax())
            cover_R[r], object_R[r] = iou_O[best], near[best]
    return cover_R, object_R


def _iou(box: Any, box_O4: NDArray[np.float64]) -> NDArray[np.float64]:
    """(O,) of boxes (x, y, w, h)."""
    x, y, w, h = (float(v) for v in box)
    across = np.minimum(x + w, box_O4[:, 0] + box_O4[:, 2]) - np.maximum(x, box_O4[:, 0])
    down = np.minimum(y + h, box_O4[:, 1] + box_O4[:, 3]) - np.maximum(y, box_O4[:, 1])
    shared = across.clip(0) * down.clip(0)
    return np.asarray(shared / (w * h + box_O4[:, 2] * box_O4[:, 3] - shared))


def _eleven_points(
    hit_R: NDArray[np.bool_], object_R: NDArray[np.int64], hard_R: NDArray[np.bool_], wanted: int
) -> float:
    """0 to 1, of results in the order of their scores."""
    hit_R, hard_R = hit_R & ~hard_R, hit_R & hard_R
    first_R = np.zeros(len(hit_R), dtype=bool)
    first_R[np.flatnonzero(hit_R)[np.unique(object_R[hit_R], return_index=True)[1]]] = True
    right, wrong = np.cumsum(first_R), np.cumsum(~first_R & ~hard_R)
    precision = right / np.maximum(right + wrong, 1)
    return float(np.mean([precision[10 * right >= t * wanted].max(initial=0.0) for t in range(11)]))
