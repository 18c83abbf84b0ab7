"""What the five papers compare themselves with, on ImageNet with a ResNet-50, as their own papers set them.

All need a folder of class folders: --data.root IMAGENET. Where a number is given it is the published top-1 accuracy of a
linear probe (MoCo's own repository); none was run here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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


def _imagenet(method: str, views: str, train: TrainConfig, sync_bn: bool = False, **options: Any) -> RunConfig:
    return RunConfig(
        method=methods.configure(method, **options),
        model=ModelConfig(encoder="resnet50", sync_bn=sync_bn),
        data=DataConfig(name="image-folder", size=224, views=views, workers=8),
        train=train,
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=8, gpus_per_worker=1, cpus_per_worker=8),
    )


_MOCO = TrainConfig(epochs=200, batch=256, lr=0.03, weight_decay=1e-4, schedule="step", milestones=(120, 160))
_LARS = TrainConfig(
    optimizer="lars", lr=0.3, lr_scaling="linear", weight_decay=1e-6, decay="no-bias-bn", warmup_epochs=10, batch=4096
)


def imagenet_mocov1() -> RunConfig:
    """MoCo v1 on ImageNet, 200 epochs on 8 GPUs: 60.6 %.

    python -m raycon.pretrain imagenet-mocov1 --data.root IMAGENET
    """
    return _imagenet("moco", "mocov1", _MOCO, head="linear", temperature=0.07)


def imagenet_mocov2() -> RunConfig:
    """MoCo v2 on ImageNet, 200 epochs on 8 GPUs: 67.5 %.

    python -m raycon.pretrain imagenet-mocov2 --data.root IMAGENET
    """
    return _imagenet("moco", "mocov2", replace(_MOCO, schedule="cosine-epoch"))


def imagenet_mocov3() -> RunConfig:
    """MoCo v3 on ImageNet, 300 epochs on 8 GPUs or more.

    python -m raycon.pretrain imagenet-mocov3 --data.root IMAGENET
    """
    return _imagenet("mocov3", "sce-mocov3", replace(_LARS, epochs=300), sync_bn=True)


def imagenet_simclr() -> RunConfig:
    """SimCLR on ImageNet, 1000 epochs on 8 GPUs or more.

    python -m raycon.pretrain imagenet-simclr --data.root IMAGENET
    """
    return _imagenet("simclr", "simclr", replace(_LARS, epochs=1000), sync_bn=True)


def imagenet_ressl() -> RunConfig:
    """ReSSL on ImageNet, 200 epochs on 8 GPUs.

    python -m raycon.pretrain imagenet-ressl --data.root IMAGENET
    """
    train = TrainConfig(epochs=200, batch=256, lr=0.05, weight_decay=1e-4, warmup_epochs=5)
    return _imagenet("ressl", "mocov2", train, queue=131072)


def imagenet_nnclr() -> RunConfig:
    """NNCLR on ImageNet, two crops, 1000 epochs on 8 GPUs or more.

    python -m raycon.pretrain imagenet-nnclr --data.root IMAGENET
    """
    return _imagenet("nnclr", "simclr", replace(_LARS, epochs=1000), sync_bn=True)
