"""SCE (Denize et al. 2023, arXiv 2111.14585): the settings of its paper."""

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


def sce_imagenet() -> RunConfig:
    """SCE on ImageNet, ResNet-50, two crops, 200 epochs: 72.7 % top-1 of a linear probe.

    python -m raycon.pretrain sce-imagenet --data.root IMAGENET

    Published on 8 A100-80G, 512 images each. 100 epochs (with --train.lr 0.6): 72.1; 300: 73.3; 1000 (with
    --train.weight-decay 1.5e-6): 74.1. Days on 8 GPUs; not run here.
    """
    return RunConfig(
        method=methods.configure(
            "sce",
            coefficient=0.5,
            temperature=0.1,
            teacher_temperature=0.07,
            symmetric=True,
            views=("strong-alpha", "strong-beta"),
            projector=(2048, 2048),
            projector_norm=True,
            predictor=(4096,),
            dim=256,
            queue=65536,
            momentum=0.99,
            momentum_schedule="cosine",
            shuffle_bn=False,
        ),
        model=ModelConfig(encoder="resnet50", sync_bn=True),
        data=DataConfig(name="image-folder", size=224, views="sce-mocov3", workers=8),
        train=TrainConfig(
            epochs=200,
            batch=4096,
            optimizer="lars",
            lr=0.3,
            lr_scaling="linear",
            weight_decay=1e-6,
            decay="no-bias-bn",
            schedule="cosine-closed",
            warmup_epochs=10,
            precision="bf16",
        ),
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=8, gpus_per_worker=1, cpus_per_worker=8),
    )


def sce_imagenet_multicrop() -> RunConfig:
    """SCE on ImageNet, ResNet-50, two large and four small crops, 200 epochs: 75.4 % top-1 of a linear probe.

    python -m raycon.pretrain sce-imagenet-multicrop --data.root IMAGENET

    Published on 16 A100-80G in 2 machines. Not run here.
    """
    two = sce_imagenet()
    locals_ = ("local-1", "local-2", "local-3", "local-4")
    return replace(
        two,
        method=replace(two.method, views=("strong-alpha", "strong-beta", *locals_), projector=(4096, 4096)),  # type: ignore[call-arg]
        data=replace(two.data, views="sce-multicrop"),
        scaling=replace(two.scaling, workers=16),
    )


def sce_cifar10() -> RunConfig:
    """SCE on CIFAR-10, ResNet-18 with a small stem, 200 epochs on one GPU.

    python -m raycon.pretrain sce-cifar10 --data.root CIFAR10

    CIFAR10 is a folder of class folders (train/, test/). Eight devices are simulated for shuffle-BN, as officially.
    The paper's number for this setting is not in its repository, so none is given. Not run here.
    """
    return RunConfig(
        method=methods.configure("sce", split_bn=8),
        model=ModelConfig(encoder="resnet18", stem="small"),
        data=DataConfig(name="image-folder", size=32, views="sce-cifar", workers=8),
        train=TrainConfig(
            epochs=200,
            batch=256,
            lr=0.06,
            lr_scaling="linear",
            weight_decay=5e-4,
            warmup_epochs=5,
            schedule="cosine-closed",
        ),
        evals=EvalConfig(every_epochs=20),
        checkpoint=CheckpointConfig(every_epochs=5),
        scaling=ScalingConfig(workers=1, gpus_per_worker=1, cpus_per_worker=8),
    )
