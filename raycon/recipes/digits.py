"""scikit-learn's digits: 1,797 real 8x8 scans, small enough to be shipped; the first 1,437 train, the last 360 test."""

from __future__ import annotations

from raycon import methods
from raycon.core.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MiningConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)


def quickstart() -> RunConfig:
    """PCL on the embedded digits, 2 Ray Train workers: what `make pretrain` runs.

    python -m raycon.pretrain quickstart
    """
    return RunConfig(
        method=methods.configure(
            "pcl", dim=64, queue=512, negatives=48, clusters=(60, 120, 240), warmup_epochs=20, momentum=0.99
        ),
        model=ModelConfig(encoder="resnet10", width=16, stem="small"),
        data=DataConfig(name="digits", size=16, views="digits"),
        train=TrainConfig(epochs=100, batch=128, lr=0.06, weight_decay=5e-4, schedule="cosine", warmup_epochs=5),
        mining=MiningConfig(redo=1, iterations=10),
        checkpoint=CheckpointConfig(every_epochs=10, keep=2),
        evals=EvalConfig(every_epochs=50),
    )
