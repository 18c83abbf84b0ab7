"""The published evaluation protocols as data: every number in one place, and which name stands for which.

Imports neither torch nor anything heavy: the names are listed from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier on an encoder is trained by SGD: the encoder frozen (``trunk_lr`` 0) or trained with it."""

    source: str
    """Where the numbers come from."""
    epochs: int
    batch: int
    lr: float
    """Of the classifier."""
    scaled: bool = False
    """The learning rates are per 256 images: multiplied by batch / 256."""
    trunk_lr: float = 0.0
    """Of the encoder; 0: frozen, in evaluation mode."""
    schedule: Literal["step", "cosine"] = "step"
    """step: once per epoch; cosine: per step, to ``least`` x lr."""
    milestones: tuple[int, ...] = ()
    """Epochs at which ``step`` multiplies by ``factor``."""
    factor: float = 0.1
    least: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    normal_init: bool = True
    """Classifier weights from N(0, 0.01), bias 0; else PyTorch's default."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    colour: bool = False
    """Jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8 and gray with 0.2, besides crop and flip."""


LINEAR: dict[str, Training] = {
    "pcl": Training(source="PCL's code, ImageNet", epochs=100, batch=256, lr=5.0, milestones=(60, 80)),
    "moco": Training(source="MoCo's and SCE's on small data sets", epochs=100, batch=256, lr=30.0, milestones=(60, 80)),
    "sce": Training(
        source="SCE's code, as MoCo v3, ImageNet", epochs=90, batch=1024, lr=0.1, scaled=True, schedule="cosine"
    ),
    "wcl": Training(
        source="WCL's code", epochs=80, batch=4096, lr=0.2, scaled=True, schedule="cosine", nesterov=True
    ),
    "clinfonce": Training(
        source="Cl-InfoNCE's code", epochs=100, batch=128, lr=0.3, schedule="cosine", least=1e-3, momentum=0.95,
        nesterov=True, weight_decay=1e-4, normal_init=False, crop_scale=(0.4, 1.0), colour=True,
    ),
}  # fmt: skip

_HCSC = Training(
    source="HCSC's, the published recipe nearest to PCL's", epochs=70, batch=256, lr=0.05, trunk_lr=0.005,
    milestones=(30, 60),
)  # fmt: skip
_MOPRO = Training(
    source="MoPro's code, where PCL's authors point to", epochs=40, batch=256, lr=0.005, trunk_lr=0.005, factor=0.2,
    milestones=(20, 30),
)  # fmt: skip

FINETUNE: dict[str, tuple[Training, float]] = {
    "": (_HCSC, 100.0),
    "1": (_HCSC, 1.0),
    "10": (_HCSC, 10.0),
    "1-mopro": (_MOPRO, 1.0),
    "10-mopro": (_MOPRO, 10.0),
}
"""The training and the percent of train that keeps its labels."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    metric: Literal["accuracy", "mean_per_class", "map_11_point"]
    given_validation: bool
    """The data set has a validation split; else a fifth of train is taken."""


TRANSFER: dict[str, Transfer] = {
    "food101": Transfer(metric="accuracy", given_validation=False),
    "cifar10": Transfer(metric="accuracy", given_validation=False),
    "cifar100": Transfer(metric="accuracy", given_validation=False),
    "sun397": Transfer(metric="accuracy", given_validation=False),
    "cars196": Transfer(metric="accuracy", given_validation=False),
    "aircraft": Transfer(metric="mean_per_class", given_validation=True),
    "voc2007": Transfer(metric="map_11_point", given_validation=True),
    "dtd": Transfer(metric="accuracy", given_validation=True),
    "pets": Transfer(metric="mean_per_class", given_validation=False),
    "caltech101": Transfer(metric="mean_per_class", given_validation=False),
    "flowers102": Transfer(metric="mean_per_class", given_validation=True),
}
"""ssl-transfer's eleven sets; any other data set is scored by accuracy."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A Mask R-CNN and its training."""

    source: str
    head: Literal["fpn", "c4"]
    """fpn: a feature pyramid of strides 4 to 64; c4: one map of stride 16, and the last stage in the box head."""
    iterations: int
    lr: float
    batch: int = 16
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = ()
    warmup: int = 1000
    warmup_factor: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    train_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Lengths of the shorter side, drawn per image."""
    test_side: int = 800
    longest: int = 1333
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Sides of the square anchors in pixels: one per pyramid level, or all of them on the one map."""
    masks: bool = True
    maps: int = 256
    """Channels of the pyramid's maps and of the mask head; the box head's layers have 4 times as many."""
    regions: int = 512
    """Regions per image that the box head is trained with."""
    before_nms: tuple[int, int] = (2000, 1000)
    """Best proposals (of each level) that enter the suppression of overlapping ones, in training and in test."""
    proposals: tuple[int, int] = (1000, 1000)
    """Most proposals per image after it, in training and in test."""


_C4_BEFORE, _C4_AFTER = (12_000, 6_000), (2_000, 1_000)
_VOC_SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)

DETECTION: dict[str, Detection] = {
    "": Detection(
        source="Detectron2's COCO R50-FPN 1x", head="fpn", iterations=90_000, lr=0.02, milestones=(60_000, 80_000)
    ),
    "c4-2x": Detection(
        source="MoCo's COCO R50-C4 2x", head="c4", iterations=180_000, lr=0.02, milestones=(120_000, 160_000),
        before_nms=_C4_BEFORE, proposals=_C4_AFTER,
    ),
    "c4-sce": Detection(
        source="the COCO R50-C4 2x of SCE's table (Truncated Triplet's)", head="c4", iterations=180_000, lr=0.05,
        schedule="cosine", warmup=10_000, warmup_factor=1e-4, longest=1200,
        train_sides=(640, 672, 704, 736, 768, 800, 832, 864, 880), before_nms=_C4_BEFORE, proposals=_C4_AFTER,
    ),
    "c4-voc": Detection(
        source="MoCo's VOC07+12 R50-C4 24k, boxes only", head="c4", iterations=24_000, lr=0.02,
        milestones=(18_000, 22_000), warmup=100, train_sides=_VOC_SIDES, masks=False, before_nms=_C4_BEFORE,
        proposals=_C4_AFTER,
    ),
    "tiny": Detection(
        source="own: pictures of 64 pixels or so, to try things", head="fpn", iterations=150, lr=0.02, batch=4,
        warmup=10, train_sides=(64,), test_side=64, longest=128, anchors=(8, 16, 32, 64, 128), weight_decay=1e-5,
        maps=32, regions=32, before_nms=(100, 50), proposals=(100, 50),
    ),
}  # fmt: skip


PRESETS: dict[str, tuple[str, ...]] = {
    "linear": tuple(LINEAR) + tuple(f"{name}-once" for name in LINEAR),
    "finetune": tuple(name for name in FINETUNE if name),
    "detection": tuple(name for name in DETECTION if name),
}
"""What may follow an evaluation's name after a colon. ``linear:pcl-once``: PCL's optimiser on features extracted once."""
