"""Which options mattered: a random forest over the trials, decomposed as fANOVA does (Hutter, Hoos, Leyton-Brown 2014).

The forest learns score from options. An option's *marginal* is the forest's mean prediction when that option is fixed
and all others range over their domains; its importance is the share of the prediction's variance that its marginal
explains. Both are computed tree by tree: their spread over the trees is the uncertainty.

Shape letters: T trials, O options, G values of one option, M random settings of the others, F trees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .space import Choice, Space

LEAST_TRIALS = 4
"""With fewer trials nothing is said."""
_TREES, _OTHERS, _VALUES = 64, 512, 25


class Marginal(NamedTuple):
    """How the score follows one option, the others averaged out."""

    values: list[Any]
    """G values of the option, in order."""
    mean: NDArray[np.float64]
    """(G,) predicted score."""
    spread: NDArray[np.float64]
    """(G,) standard deviation over the trees."""
    importance: float
    """0..1: share of the variance of the score over the space that this option alone explains."""
    uncertainty: float
    """Standard deviation of the importance over the trees."""


def marginals(
    space: Space, options: Sequence[Mapping[str, Any]], scores: Sequence[float], seed: int = 0
) -> dict[str, Marginal]:
    """The marginal of every option; {} with fewer than 4 trials or when all scores are equal."""
    if len(scores) < LEAST_TRIALS or max(scores) == min(scores):
        return {}
    from sklearn.ensemble import RandomForestRegressor

    names = list(space)
    places_TO = np.array([[space[n].place(o[n]) for n in names] for o in options])
    forest = RandomForestRegressor(_TREES, min_samples_leaf=1, bootstrap=True, random_state=seed)
    forest.fit(places_TO, np.asarray(scores, dtype=float))
    others_MO = np.random.default_rng(seed).random((_OTHERS, len(names)))
    for i, name in enumerate(names):  # a choice has places of its own
        if isinstance(domain := space[name], Choice):
            steps = len(domain.values) - 1
            others_MO[:, i] = np.minimum(np.floor(others_MO[:, i] * (steps + 1)), steps) / steps
    whole_FM = np.stack([tree.predict(others_MO) for tree in forest.estimators_])
    variance_F = whole_FM.var(axis=1)
    made = {}
    for i, name in enumerate(names):
        domain = space[name]
        if isinstance(domain, Choice) or domain.whole:
            values = domain.levels(_VALUES)
        else:  # the middles of equal parts: their mean is the integral
            values = [domain.at((i + 0.5) / _VALUES) for i in range(_VALUES)]
        grid_GMO = np.repeat(others_MO[None], len(values), axis=0)
        grid_GMO[:, :, i] = np.array([domain.place(v) for v in values])[:, None]
        flat = grid_GMO.reshape(-1, len(names))
        marginal_FG = np.stack(
            [tree.predict(flat).reshape(len(values), _OTHERS).mean(axis=1) for tree in forest.estimators_]
        )
        grown = variance_F > 0  # a tree without a split says nothing about shares
        share_F = np.minimum(marginal_FG[grown].var(axis=1) / variance_F[grown], 1.0)
        made[name] = Marginal(
            values,
            marginal_FG.mean(axis=0),
            marginal_FG.std(axis=0),
            float(share_F.mean()) if grown.any() else 0.0,
            float(share_F.std()) if grown.any() else 0.0,
        )
    return made
