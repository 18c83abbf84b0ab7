"""Sweeps over dotted options: ``python -m raycon.tuning.sweep STUDY``, and the same trials for plain Ray Tune.

Importing this file imports neither torch nor Ray.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

from raycon.core.config import ConfigError, RunConfig

from .space import choice, integers, loguniform, uniform
from .study import Study

__all__ = ["Study", "choice", "integers", "loguniform", "max_concurrent", "trainable", "uniform"]


def trainable(
    recipe: str | RunConfig,
    metric: str = "knn/top1_k20",
    *,
    validation: float = 0.1,
    every_epochs: int = 1,
    folder: str | Path = "",
) -> type[Any]:
    """A recipe as a class for ``ray.tune.Tuner``; Tune's param_space is {dotted option: tune.loguniform(...)}.

    Each trial is a whole pretraining run in a directory of its own in ``folder`` (empty: runs/tune-<time>), which must
    be the same on all nodes. It reports once per evaluation, every ``every_epochs`` epochs: all numbers by their names,
    ``score`` (= metric), ``epoch`` (give it as time_attr), ``step`` and ``run_dir``. Scores are of a ``validation``
    share of the training images. Call ``raycon.on_ray.trainer.connect`` before the Tuner, and give it
    ``max_concurrent_trials=max_concurrent(recipe)``: Tune itself does not see the workers that a trial starts.
    Raises ConfigError for an unknown recipe or evaluation.
    """
    from raycon import evals, pretrain

    from .study import scored
    from .trial import orders_of, trainable_class

    base = _base(recipe)
    if metric.partition("/")[0] not in evals.names():
        raise ConfigError([f"metric = {metric!r}: no such evaluation; there are {', '.join(evals.names())}"])
    if not 0 < validation < 1:
        raise ConfigError([f"validation = {validation}: give a share above 0 and below 1"])
    place = (
        Path(folder).expanduser().absolute() if folder else Path(time.strftime("runs/tune-%Y%m%d-%H%M%S")).absolute()
    )
    base = pretrain.absolute(scored(base, metric, validation, every_epochs, keep=2), place / "trial")
    place.mkdir(parents=True, exist_ok=True)
    return trainable_class(orders_of(base, place, secrets.token_hex(3), metric, group=place.name))


def max_concurrent(recipe: str | RunConfig, most: int = 1000) -> int:
    """How many trials of a recipe the connected cluster holds at once: workers, evaluations and index actors whole.

    Raises ConfigError when not even one fits.
    """
    from raycon.training import job

    from .on_tune import trials_at_once

    base = _base(recipe)
    facts = job.facts_of(base, job.open_data(base), base.scaling.workers)
    fit, told = trials_at_once(base, facts, most)
    if not fit:
        raise ConfigError([f"not even one trial can be placed: {told}"])
    return fit


def _base(recipe: str | RunConfig) -> RunConfig:
    from raycon.recipes import recipe as find

    return find(recipe) if isinstance(recipe, str) else recipe
