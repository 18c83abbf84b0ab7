"""Fashion-MNIST: 60,000 training images of 28x28 grey pixels, 10 classes."""

from __future__ import annotations

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


def fashion_mnist_pcl() -> RunConfig:
    """PCL v2 on all 60,000 images with a ResNet-18, for one GPU or more.

    python -m raycon.pretrain fashion-mnist-pcl --scaling.gpus-per-worker 1
    """
    return RunConfig(
        method=methods.configure("pcl", queue=16384, negatives=1024, clusters=(2500, 5000, 10000), warmup_epochs=20),
        model=ModelConfig(encoder="resnet18", stem="small"),
        data=DataConfig(name="fashion-mnist", size=28, views="fashion"),
        train=TrainConfig(epochs=200, batch=256, lr=0.06, weight_decay=5e-4, schedule="cosine"),
        evals=EvalConfig(every_epochs=20),
    )


def fashion_mnist_pcl_cpu() -> RunConfig:
    """PCL v2 with a narrow ResNet-10 on 2 CPU cores, in at most 20 minutes.

    python -m raycon.pretrain fashion-mnist-pcl-cpu
    """
    return RunConfig(
        method=methods.configure(
            "pcl", queue=4096, negatives=256, clusters=(500, 1000, 1500), warmup_epochs=4, momentum=0.99
        ),
        model=ModelConfig(encoder="resnet10", width=16, stem="small-stride2"),
        data=DataConfig(name="fashion-mnist", size=28, views="fashion"),
        train=TrainConfig(epochs=20, batch=256, lr=0.12, weight_decay=1e-4, schedule="cosine", warmup_epochs=1),
        mining=MiningConfig(redo=1, iterations=10),
        evals=EvalConfig(every_epochs=5),
        checkpoint=CheckpointConfig(keep=2),
        scaling=ScalingConfig(workers=2),
    )


def fashion_mnist_moco_cpu() -> RunConfig:
    """MoCo v2 with the same narrow ResNet-10 on 2 CPU cores: what PCL adds its prototypes to.

    python -m raycon.pretrain fashion-mnist-moco-cpu
    """
    from dataclasses import replace

    return replace(fashion_mnist_pcl_cpu(), method=methods.configure("moco", queue=4096, momentum=0.99))
