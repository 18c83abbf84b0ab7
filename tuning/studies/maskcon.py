"""MaskCon: t0, t and w of its published code."""

from __future__ import annotations

from raycon.recipes import recipe
from raycon.tuning.space import loguniform, uniform
from raycon.tuning.study import Study


def maskcon_temperatures() -> Study:
    """MaskCon's t0 (temperature) and t (soft temperature): published settings are t0 0.1 and t 0.05 or 0.1.

    python -m raycon.tuning.sweep maskcon-temperatures

    Scored by recall@1 of the fine classes, which training does not see. Cost: 16 trials of 36 epochs of
    fashion-mnist-maskcon-cpu, two workers each, stopped early by ASHA. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-maskcon-cpu"),
        space={"method.temperature": loguniform(0.03, 0.5), "method.soft_temperature": loguniform(0.01, 1.0)},
        metric="retrieval/recall_at_1",
        searcher="tpe",
        trials=16,
        every_epochs=4,
        grace_epochs=4,
    )


def maskcon_weight() -> Study:
    """MaskCon's w, the share of the coarse labels in the loss: 0 (none) to 1; published settings are 0.8 and 1.0.

    python -m raycon.tuning.sweep maskcon-weight

    Cost: 6 whole runs of fashion-mnist-maskcon-cpu, two workers each. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-maskcon-cpu"),
        space={"method.weight": uniform(0.0, 1.0)},
        metric="retrieval/recall_at_1",
        searcher="grid",
        scheduler="none",
        trials=6,
        every_epochs=12,
        grace_epochs=12,
    )


def maskcon_in_flight() -> Study:
    """MaskCon's t0, t and w changed while the runs train (PBT), in place of one value for the whole run.

    python -m raycon.tuning.sweep maskcon-in-flight --scaling.workers 1

    Two trials exchange every 4 epochs; give more with more cores. Cost: --trials whole runs of
    fashion-mnist-maskcon-cpu and some restarts. Not run here.
    """
    return Study(
        base=recipe("fashion-mnist-maskcon-cpu"),
        space={
            "method.temperature": loguniform(0.03, 0.5),
            "method.soft_temperature": loguniform(0.01, 1.0),
            "method.weight": uniform(0.0, 1.0),
        },
        metric="retrieval/recall_at_1",
        scheduler="pbt",
        trials=2,
        every_epochs=4,
        grace_epochs=4,
    )
