"""Questions for any method, and the small studies that were run."""

from __future__ import annotations

from dataclasses import replace

from raycon.core.config import CheckpointConfig, RunConfig, ScalingConfig
from raycon.recipes import recipe
from raycon.tuning.space import choice, loguniform
from raycon.tuning.study import Study


def learning_rate() -> Study:
    """Learning rate x weight decay, of any method: which pair?

    python -m raycon.tuning.sweep learning-rate --recipe fashion-mnist-wcl-cpu

    Question: both at once, because the best weight decay falls as the learning rate rises. TPE proposes, ASHA stops.
    Cost: 16 trials of the recipe, of which ASHA with reduction 3 trains about a third of all epochs. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-moco-cpu"),
        space={"train.lr": loguniform(0.01, 1.0), "train.weight_decay": loguniform(1e-6, 1e-2)},
        searcher="tpe",
        trials=16,
        every_epochs=2,
        grace_epochs=4,
    )


def fashion_temperature() -> Study:
    """MoCo v2 on Fashion-MNIST with a narrow ResNet: is 0.2 the best temperature?

    python -m raycon.tuning.sweep fashion-temperature

    Question: the default comes from ImageNet with 65,536 negatives; here there are 4,096. Nine temperatures, each the
    root of two times the one before, from 0.025 to 0.4: 0.2 and MoCo v1's 0.07 are among them. One process each, ASHA
    over 9 epochs, scored by kNN: trained on a quarter of the training images, scored on the rest.

    Cost: 15 minutes on two cores with --evals.wait-s 600 (17 CPU seconds to train an epoch, 40 to score it). Found, one
    seed: after nine epochs 0.1 84.29 %, 0.07 84.24, and 0.2, run by itself to the end, 83.88; after one 0.07 81.3, 0.05 81.2,
    0.1 80.8, 0.14 80.7, 0.2 and 0.035 80.3, 0.025 80.0, 0.28 and 0.4 79.7. A score's standard error is 0.17: half of
    MoCo v2's temperature is better here, which of 0.07 and 0.1 is not settled.
    """
    return Study(
        base=_small(recipe("fashion-mnist-moco-cpu"), epochs=9),
        space={"method.temperature": loguniform(0.025, 0.4)},
        searcher="grid",
        trials=9,
        validation=0.75,
        every_epochs=1,
        grace_epochs=1,
    )


def digits_temperature() -> Study:
    """MoCo v2 on the embedded digits: a sweep that takes minutes, to see how sweeps work.

    python -m raycon.tuning.sweep digits-temperature

    Question: which temperature, with the linear or the MLP head? Six random trials of 4 epochs, one process each.
    """
    base = _small(recipe("quickstart"), epochs=4)
    from raycon import methods

    base = replace(
        base,
        method=methods.configure("moco", queue=512, dim=64, momentum=0.99),
        model=replace(base.model, width=8),
        evals=replace(base.evals, knn_k=(20,)),
    )
    return Study(
        base=base,
        space={"method.temperature": loguniform(0.03, 1.0), "method.head": choice("linear", "mlp")},
        trials=6,
        validation=0.2,
    )


def _small(base: RunConfig, epochs: int) -> RunConfig:
    """One process per trial, so that trials and not ranks share the cores."""
    return replace(
        base,
        train=replace(base.train, epochs=epochs, warmup_epochs=1.0),
        evals=replace(base.evals, knn_k=(20,)),
        checkpoint=CheckpointConfig(keep=2),
        scaling=ScalingConfig(workers=1),
    )
