"""Cl-InfoNCE: K, temperature and the level of granularity."""

from __future__ import annotations

from raycon.recipes import recipe
from raycon.tuning.space import choice, integers, loguniform
from raycon.tuning.study import Study


def clinfonce_clusters() -> Study:
    """Cl-InfoNCE's K, the number of k-means clusters, with the temperature.

    python -m raycon.tuning.sweep clinfonce-clusters

    With K far above train.batch an image hardly meets another of its cluster: then it is nearly InfoNCE. Cost: 16
    trials of 36 epochs of fashion-mnist-clinfonce-cpu, two workers each, stopped early by ASHA. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-clinfonce-cpu"),
        space={"method.k": choice(10, 30, 100, 300, 1000, 3000), "method.temperature": loguniform(0.03, 0.5)},
        trials=16,
        every_epochs=4,
        grace_epochs=8,
    )


def clinfonce_granularity() -> Study:
    """The depth at which Cl-InfoNCE cuts a hierarchy of labels: from a few large clusters to the classes.

    python -m raycon.tuning.sweep clinfonce-granularity --data.root IMAGENET100 --method.table LEVELS.csv

    Coarse clusters take unlike images for positives, the finest leave nearly instance discrimination. The held-out
    images' lines of the table are left out for the trials. Cost: 13 trials of 300 epochs of a ResNet-50, GPU days. Not run here.
    """
    return Study(
        base=recipe("clinfonce-imagenet100-hierarchy"),
        space={"method.granularity": integers(2, 14)},
        searcher="grid",
        trials=13,
        every_epochs=20,
        grace_epochs=60,
    )
