"""MaskCon (arXiv 2303.12756): the published settings. Weights start from torchvision's ImageNet ResNet-18, as there.

The paper's tables could not be checked against; where an expected number is known it is said. The rest of the code's
public hyper-parameters are in each recipe. Hardware: one GPU with 8 GB or more.
"""

from __future__ import annotations

from dataclasses import replace

from raycon import methods
from raycon.core.config import DataConfig, EvalConfig, ModelConfig, RunConfig, ScalingConfig, TrainConfig


def maskcon_cifar100() -> RunConfig:
    """MaskCon on CIFAR-100 with 20 superclasses, weight 1.0, soft temperature 0.05.

    python -m raycon.pretrain maskcon-cifar100 --data.root FOLDER
    One GPU, an estimated 3 hours. Before training recall@1 is 11.8, recall@10 38.4 (a public log of the paper's code).
    """
    return _setting("cifar100", "maskcon-cifar", 32, weight=1.0, soft_temperature=0.05)


def maskcon_cifartoy_good() -> RunConfig:
    """Grafit with weight 0.8 on CIFARtoy, vehicles and animals (the one public setting of it).

    python -m raycon.pretrain maskcon-cifartoy-good --data.root FOLDER
    One GPU, an estimated 2 hours; no published number is known.
    """
    return _setting("cifartoy-good", "maskcon-cifar", 32, mode="grafit", weight=0.8)


def maskcon_cifartoy_bad() -> RunConfig:
    """Grafit with weight 0.8 on CIFARtoy's mixed coarse classes, as the paper's code has them.

    python -m raycon.pretrain maskcon-cifartoy-bad --data.root FOLDER
    One GPU, an estimated 2 hours; no published number is known.
    """
    return _setting("cifartoy-bad", "maskcon-cifar", 32, mode="grafit", weight=0.8)


def maskcon_cars196() -> RunConfig:
    """MaskCon on Cars-196 with 8 body types, weight 1.0, soft temperature 0.1.

    python -m raycon.pretrain maskcon-cars196 --data.root FOLDER
    One GPU, an estimated 4 hours; no published number is known.
    """
    return _setting("cars196", "maskcon-cars", 224, weight=1.0, soft_temperature=0.1)


def maskcon_sop_split1() -> RunConfig:
    """MaskCon on Stanford Online Products, split 1, 12 kinds of product, weight 0.8, soft temperature 0.1.

    python -m raycon.pretrain maskcon-sop-split1 --data.root FOLDER
    One GPU, an estimated 12 hours; no published number is known.
    """
    return _setting("sop-split1", "maskcon-sop", 224, weight=0.8, soft_temperature=0.1)


def maskcon_sop_split2() -> RunConfig:
    """MaskCon on Stanford Online Products, split 2 (the same products in training and test).

    python -m raycon.pretrain maskcon-sop-split2 --data.root FOLDER
    One GPU, an estimated 7 hours; no published number is known.
    """
    return _setting("sop-split2", "maskcon-sop", 224, weight=0.8, soft_temperature=0.1)


def maskcon_imagenet32() -> RunConfig:
    """Coarse cross-entropy (CoIns, weight 1) on ImageNet at 32 pixels with 12 coarse classes: the README's command.

    python -m raycon.pretrain maskcon-imagenet32 --data.root FOLDER
    One GPU, an estimated 20 hours; no published number is known. MaskCon itself: --method.mode maskcon.
    """
    base = _setting("imagenet32", "maskcon-cifar", 32, mode="coins", weight=1.0, queue=16384)
    return replace(base, train=replace(base.train, epochs=100, batch=256))


def _setting(data: str, views: str, size: int, **options: object) -> RunConfig:
    """What all of them share; ``options`` are the method's."""
    return RunConfig(
        method=methods.configure("maskcon", **options),
        model=ModelConfig(
            encoder="resnet18", stem="small" if size <= 64 else "imagenet", weights="torchvision:IMAGENET1K_V1"
        ),
        data=DataConfig(name=data, size=size, views=views, workers=4),
        train=TrainConfig(
            epochs=200, batch=128, lr=0.02, weight_decay=5e-4, schedule="cosine", warmup_epochs=5, decay="all"
        ),
        evals=EvalConfig(names=("retrieval",), every_epochs=10),
        scaling=ScalingConfig(workers=1, gpus_per_worker=1.0),
    )
