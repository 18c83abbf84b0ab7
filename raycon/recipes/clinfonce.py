"""Cl-InfoNCE (Tsai et al., arXiv 2106.02869 and 2202.06670): the settings of its two published code bases.

Neither prints a result, so there are no numbers to expect; the papers claim that attributes and hierarchies come near
supervised features and that k-means with Cl-InfoNCE is above PCL.
"""

from __future__ import annotations

from dataclasses import replace

from raycon import methods
from raycon.core.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    ScalingConfig,
    TrainConfig,
)


def clinfonce_imagenet100() -> RunConfig:
    """Cl-InfoNCE, one head, on 2500 k-means clusters of ImageNet-100: no published number.

    python -m raycon.pretrain clinfonce-imagenet100 --data.root IMAGENET100

    ResNet-50, 200 epochs, clusters from the first epoch on. About a day on one GPU; not run here.
    """
    return RunConfig(
        method=methods.configure("clinfonce", temperature=0.2, k=2500),
        model=ModelConfig(encoder="resnet50"),
        data=DataConfig(name="image-folder", size=224, views="clinfonce", workers=8),
        train=TrainConfig(
            epochs=200,
            batch=128,
            lr=0.03,
            momentum=0.95,
            nesterov=True,
            weight_decay=1e-4,
            warmup_epochs=66,
            warmup_start=1e-5 / 0.03,
        ),
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=1, gpus_per_worker=1, cpus_per_worker=8),
    )


def clinfonce_imagenet100_hierarchy() -> RunConfig:
    """Cl-InfoNCE, one head, on level 12 of the WordNet tree over ImageNet-100: no published number.

    python -m raycon.pretrain clinfonce-imagenet100-hierarchy --data.root IMAGENET100 --method.table LEVELS.csv

    LEVELS.csv: a line per training image with its nodes from the root's children down to its class; or a table with
    one column per level (--method.clusters column --method.columns label_gran_level_12). 300 epochs; about a day and a
    half on one GPU; not run here.
    """
    base = clinfonce_imagenet100()
    return replace(
        base,
        method=methods.configure(
            "clinfonce", temperature=0.1, clusters="hierarchy", granularity=12, table="levels.csv"
        ),
        train=replace(base.train, epochs=300, lr=0.01, warmup_epochs=99, warmup_start=1e-5 / 0.01),
    )


def clinfonce_imagenet100_dual() -> RunConfig:
    """Cl-InfoNCE, two heads, on 2500 k-means clusters of ImageNet-100, 4 GPUs: no published number.

    python -m raycon.pretrain clinfonce-imagenet100-dual --data.root IMAGENET100

    200 epochs, the first 5 without clusters and with weak views. About half a day on 4 GPUs; not run here.
    """
    return RunConfig(
        method=methods.configure(
            "clinfonce",
            form="dual",
            temperature=0.1,
            k=2500,
            dim=128,
            hidden=2048,
            warmup_epochs=5,
            warmup_view_epochs=5,
        ),
        model=ModelConfig(encoder="resnet50", sync_bn=True),
        data=DataConfig(name="image-folder", size=224, views="wcl", workers=8),
        train=TrainConfig(
            epochs=200,
            batch=128,
            optimizer="lars",
            lr=0.075,
            lr_scaling="sqrt",
            weight_decay=1e-6,
            decay="no-bias-bn",
            warmup_epochs=5,
        ),
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=4, gpus_per_worker=1, cpus_per_worker=8),
    )


def clinfonce_cub() -> RunConfig:
    """Cl-InfoNCE, one head, on the 10 attributes of highest entropy of CUB-200: no published number.

    python -m raycon.pretrain clinfonce-cub --data.root CUB --method.table ATTRIBUTES.csv

    ATTRIBUTES.csv: a line per training image with its 312 binary attributes. ResNet-50, 224 pixels, 1000 epochs (an
    independent group's setting); about 8 hours on one GPU; not run here.
    """
    return _attributes(10, lr=0.1, batch=128, temperature=0.1, encoder="resnet50", size=224)


def clinfonce_zappos() -> RunConfig:
    """Cl-InfoNCE, one head, on the 10 attributes of highest entropy of UT-Zappos50K: no published number.

    python -m raycon.pretrain clinfonce-zappos --data.root ZAPPOS --method.table ATTRIBUTES.csv

    32 pixels, ResNet-50 with a small stem, 1000 epochs (an independent group's setting); about 10 hours on one GPU; not
    run here.
    """
    return _attributes(10, lr=0.17, batch=128, temperature=0.07, encoder="resnet50", size=32)


def clinfonce_wider() -> RunConfig:
    """Cl-InfoNCE, one head, on the 7 attributes of highest entropy of Wider: no published number.

    python -m raycon.pretrain clinfonce-wider --data.root WIDER --method.table ATTRIBUTES.csv

    ATTRIBUTES.csv: 1 where any person in the image has the attribute. 1000 epochs (an independent group's setting);
    about 9 hours on one GPU; not run here.
    """
    return _attributes(7, lr=0.1, batch=40, temperature=0.1, encoder="resnet50", size=224)


def _attributes(number: int, *, lr: float, batch: int, temperature: float, encoder: str, size: int) -> RunConfig:
    base = clinfonce_imagenet100()
    return replace(
        base,
        method=methods.configure(
            "clinfonce", temperature=temperature, clusters="attributes", granularity=number, table="attributes.csv"
        ),
        model=ModelConfig(encoder=encoder, stem="small" if size == 32 else "imagenet"),
        data=replace(base.data, size=size),
        train=replace(base.train, epochs=1000, batch=batch, lr=lr, warmup_epochs=330, warmup_start=1e-5 / lr),
    )
