"""SCE: its two temperatures and lambda."""

from __future__ import annotations

from raycon.recipes import recipe
from raycon.tuning.space import loguniform, uniform
from raycon.tuning.study import Study


def sce_temperature() -> Study:
    """SCE's temperature of the student's similarities: 0.1 in the paper.

    python -m raycon.tuning.sweep sce-temperature

    Cost: 12 trials of 36 epochs of fashion-mnist-sce-cpu, two workers each, stopped early by ASHA. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-sce-cpu"),
        space={"method.temperature": loguniform(0.03, 0.5)},
        trials=12,
        every_epochs=4,
        grace_epochs=4,
    )


def sce_teacher_temperature() -> Study:
    """SCE's tau_m, the temperature of the target: 0.05 on CIFAR-10, 0.07 on ImageNet in the published code.

    python -m raycon.tuning.sweep sce-teacher-temperature

    At a fixed temperature of 0.1, which it reaches at the upper end: there the target is as soft as the student. Cost:
    as sce-temperature. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-sce-cpu"),
        space={"method.teacher_temperature": loguniform(0.02, 0.1)},
        trials=12,
        every_epochs=4,
        grace_epochs=4,
    )


def sce_coefficient() -> Study:
    """SCE's lambda, the share of the own key in the target: 1 is InfoNCE, 0 follows the teacher alone.

    python -m raycon.tuning.sweep sce-coefficient

    0.5 in the paper. A grid from end to end, every trial to its last epoch, because the ends are losses of their own. Cost: 9 whole runs
    of fashion-mnist-sce-cpu, two workers each. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-sce-cpu"),
        space={"method.coefficient": uniform(0.0, 1.0)},
        searcher="grid",
        scheduler="none",
        trials=9,
        every_epochs=12,
        grace_epochs=12,
    )


def sce_all() -> Study:
    """SCE's temperature, tau_m and lambda together, proposed by TPE.

    python -m raycon.tuning.sweep sce-all

    Cost: 24 trials as in sce-temperature. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-sce-cpu"),
        space={
            "method.temperature": loguniform(0.03, 0.5),
            "method.teacher_temperature": loguniform(0.02, 0.2),
            "method.coefficient": uniform(0.0, 1.0),
        },
        searcher="tpe",
        trials=24,
        every_epochs=4,
        grace_epochs=4,
    )
