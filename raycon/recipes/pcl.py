"""PCL (Li et al. 2021, arXiv 2005.04966): the settings of its published code. None was run here."""

from __future__ import annotations

from dataclasses import replace

from raycon import methods
from raycon.core.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MiningConfig,
    ModelConfig,
    RunConfig,
    ScalingConfig,
    TrainConfig,
)


def pcl_imagenet() -> RunConfig:
    """PCL v2 on ImageNet, ResNet-50, 200 epochs: 67.6 % top-1 of a linear probe.

    python -m raycon.pretrain pcl-imagenet --data.root IMAGENET

    Low-shot on VOC2007 (mAP, 1 to 16 images a class): 47.9, 59.6, 66.2, 74.5, 78.3. About a week on 4 V100 by its users.
    Clusterings of 25,000, 50,000 and 100,000 before every epoch from the 21st; on CPUs --mining.init warm is what makes
    them affordable (docs/index-plan.md).
    """
    return RunConfig(
        method=methods.configure("pcl"),
        model=ModelConfig(encoder="resnet50"),
        data=DataConfig(name="image-folder", size=224, views="mocov2", workers=8),
        train=TrainConfig(epochs=200, batch=256, lr=0.03, weight_decay=1e-4, schedule="cosine-epoch"),
        mining=MiningConfig(shards=8, iterations=20, redo=5),
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=8, gpus_per_worker=1, cpus_per_worker=8),
    )


def pcl_imagenet_v1() -> RunConfig:
    """PCL v1 on ImageNet, ResNet-50, 200 epochs: 61.5 % top-1 of a linear probe.

    python -m raycon.pretrain pcl-imagenet-v1 --data.root IMAGENET
    """
    base = pcl_imagenet()
    return replace(
        base,
        method=methods.configure("pcl", head="linear"),
        data=replace(base.data, views="mocov1"),
        train=replace(base.train, schedule="step", milestones=(120, 160)),
    )
