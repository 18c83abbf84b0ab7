"""WCL: temperature and the weights of its heads' losses."""

from __future__ import annotations

from raycon.recipes import recipe
from raycon.tuning.space import loguniform, uniform
from raycon.tuning.study import Study


def wcl_temperature() -> Study:
    """WCL's temperature of both losses: 0.1 in the paper.

    python -m raycon.tuning.sweep wcl-temperature

    Cost: 12 trials of 36 epochs of fashion-mnist-wcl-cpu, two workers each, stopped early by ASHA. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-wcl-cpu"),
        space={"method.temperature": loguniform(0.03, 0.5)},
        trials=12,
        every_epochs=4,
        grace_epochs=4,
    )


def wcl_weights() -> Study:
    """The weight of WCL's weak head beside its instance head (1 in the paper), with the temperature.

    python -m raycon.tuning.sweep wcl-weights

    Cost: 16 trials, as in wcl-temperature. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-wcl-cpu"),
        space={"method.weight": uniform(0.0, 2.0), "method.temperature": loguniform(0.03, 0.5)},
        searcher="tpe",
        trials=16,
        every_epochs=4,
        grace_epochs=4,
    )
