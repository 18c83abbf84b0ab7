"""PCL: temperature, the numbers of clusters and the prototypes drawn as negatives."""

from __future__ import annotations

from raycon.recipes import recipe
from raycon.tuning.space import choice, loguniform
from raycon.tuning.study import Study


def pcl_temperature() -> Study:
    """PCL's temperature, also the mean of the prototypes' concentrations: 0.2 in the paper's code.

    python -m raycon.tuning.sweep pcl-temperature

    Cost: 12 trials of 36 epochs of fashion-mnist-pcl-cpu, two workers and two index actors each, stopped early by ASHA,
    none before its prototypes began to count. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-pcl-cpu"),
        space={"method.temperature": loguniform(0.05, 0.8)},
        trials=12,
        every_epochs=4,
        grace_epochs=12,
        reduction=2,
    )


def pcl_clusters() -> Study:
    """PCL's k's (one clustering or three, coarse or fine) and r, the prototypes drawn as negatives.

    python -m raycon.tuning.sweep pcl-clusters

    The published k's for ImageNet are 25,000, 50,000 and 100,000: one for 51, 26 and 13 images. Cost: 8 trials, as in pcl-temperature. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-pcl-cpu"),
        space={
            "method.clusters": choice([100], [1000], [100, 200, 400], [500, 1000, 1500], [1250, 2500, 5000]),
            "method.negatives": choice(32, 64, 96),
        },
        trials=8,
        every_epochs=4,
        grace_epochs=12,
        reduction=2,
    )
