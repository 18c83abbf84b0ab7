"""Who proposes the options of a trial: at random, from a grid, or by TPE. Without Ray.

A trial has a number (0, 1, ...). Random and grid proposals are pure functions of (seed, number), so a resumed sweep
goes on with the very trials it would have had; TPE's also depend on the trials that ended before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from raycon.core.config import ConfigError
from raycon.core.stream import key

from .space import Choice, Domain, Space, grid

_SWEEP = 0x5EEB


class Proposer(Protocol):
    def propose(self, number: int) -> dict[str, Any]:
        """The options of trial ``number``."""
        ...

    def tell(self, options: Mapping[str, Any], score: float | None) -> None:
        """A trial with ``options`` ended with ``score``; None: it failed."""
        ...


class Random:
    """Each option of each trial drawn on its own, by (seed, number)."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, number: int) -> dict[str, Any]:
        drawn = (key(self._seed, _SWEEP, number, i) / 2**64 for i in range(len(self._space)))
        return {name: domain.at(u) for (name, domain), u in zip(self._space.items(), drawn, strict=True)}

    def tell(self, options: Mapping[str, Any], score: float | None) -> None:
        pass


class Grid:
    """The points of a grid, shuffled by the seed; the number of trials is the number of points.

    In their own order a scheduler would see scores that rise from trial to trial, and stop none.
    """

    def __init__(self, space: Space, most: int, seed: int) -> None:
        points = grid(space, most)
        order = np.random.Generator(np.random.Philox(key=key(seed, _SWEEP))).permutation(len(points))
        self.points = [points[i] for i in order]

    def propose(self, number: int) -> dict[str, Any]:
        return dict(self.points[number])

    def tell(self, options: Mapping[str, Any], score: float | None) -> None:
        pass


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), by ask and tell.

    Trials under way count as bad ones (``constant_liar``), so that trials running together differ.
    """

    def __init__(self, space: Space, seed: int, mode: str, start: int) -> None:
        """``start``: so many random trials first."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = space
        self._distributions = {name: _distribution(domain) for name, domain in space.items()}
        sampler = optuna.samplers.TPESampler(
            seed=key(seed, _SWEEP) % 2**32, n_startup_trials=start, constant_liar=True, multivariate=len(space) > 1
        )
        self._study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
        self._asked: dict[str, int] = {}

    def propose(self, number: int) -> dict[str, Any]:
        trial = self._study.ask(self._distributions)
        options = {
            name: json.loads(value) if isinstance(self._space[name], Choice) else value
            for name, value in trial.params.items()
        }
        self._asked[json.dumps(options, sort_keys=True)] = trial.number
        return options

    def tell(self, options: Mapping[str, Any], score: float | None) -> None:
        state = self._optuna.trial.TrialState
        asked = self._asked.pop(json.dumps(dict(options), sort_keys=True), None)
        if asked is not None:
            self._study.tell(asked, score, state=state.COMPLETE if score is not None else state.FAIL)
        elif score is not None:  # a trial of an earlier session of this sweep
            params = {k: json.dumps(v) if isinstance(self._space[k], Choice) else v for k, v in options.items()}
            self._study.add_trial(
                self._optuna.trial.create_trial(params=params, distributions=self._distributions, value=score)
            )


def _distribution(domain: Domain) -> Any:
    from optuna import distributions

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution([json.dumps(v) for v in domain.values])
    if domain.whole:
        return distributions.IntDistribution(int(domain.low), int(domain.high))
    return distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def proposer(searcher: str, space: Space, *, seed: int, mode: str, trials: int) -> Proposer:
    """The proposer of this name. Raises ConfigError when the grid has more points than trials or Optuna is missing."""
    if searcher == "random":
        return Random(space, seed)
    if searcher == "grid":
        return Grid(space, trials, seed)
    assert searcher == "tpe", searcher
    try:
        return Tpe(space, seed, mode, start=min(10, max(2, trials // 3)))
    except ImportError:
        raise ConfigError(
            ["--searcher tpe: Optuna is not installed; pip install 'raycon[tune]', or choose random"]
        ) from None
