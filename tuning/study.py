"""What a study is, and how it is found by name.

A study is a function in a file of ``studies/`` that returns a Study; ``sce_temperature`` is called ``sce-temperature``
on the command line. Its docstring says the question, the cost and what was found. A function in a file of your own is
named ``path/to/file.py:function``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raycon.core.config import ConfigError, RunConfig, override

from .space import Domain

Searcher = Literal["random", "grid", "tpe"]
Scheduler = Literal["none", "asha", "hyperband", "pbt"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question put to a recipe: which values of these options score best?"""

    base: RunConfig
    space: Mapping[str, Domain]
    metric: str = "knn/top1_k20"
    """What trials are scored by: "<evaluation>/<number>", as evaluations.json has it."""
    mode: Literal["max", "min"] = "max"
    searcher: Searcher = "random"
    scheduler: Scheduler = "asha"
    trials: int = 8
    every_epochs: int = 1
    """Score a trial every so many epochs, besides the last."""
    grace_epochs: int = 1
    """asha, hyperband: no trial is stopped earlier. pbt: epochs between two exchanges."""
    reduction: int = 3
    """asha, hyperband: of so many trials one goes on."""
    validation: float = 0.1
    """Share of the training images that are held out to score with."""
    retries: int = 1
    """How often a trial that crashed is started again, from its last checkpoint."""


StudyFunction = Callable[[], Study]


@functools.cache
def studies() -> dict[str, StudyFunction]:
    """Every ready study by name, in the order of the files and of their functions."""
    from . import studies as folder

    found: dict[str, StudyFunction] = {}
    for file in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{file.name}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name.replace("_", "-")] = value
    return found


def find(name: str) -> StudyFunction:
    """The function of a study, by name or as FILE.py:FUNCTION (which runs that file). Raises ConfigError."""
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    known = studies()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError([f"no study {name!r}; {hint}There are: {', '.join(known)}; or FILE.py:FUNCTION"])
    return known[name]


def _from_file(file: str, function: str) -> StudyFunction:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError([f"{file}: no such file"])
    spec = importlib.util.spec_from_file_location(f"raycon_study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: StudyFunction | None = getattr(module, function, None)
    if not callable(made):
        there = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise ConfigError([f"{file} has no function {function!r}; it has {', '.join(there) or 'none'}"])
    return made


def first_line(name: str) -> str:
    return (inspect.getdoc(studies()[name]) or "").split("\n")[0]


def trial_config(base: RunConfig, options: Mapping[str, Any], run_dir: Path, group: str) -> RunConfig:
    """The configuration of one trial: the base with ``options``, in a directory of its own. Raises ConfigError.

    What is scored and when (``data.validation``, ``evals``) is in ``base`` already, see ``scored``.
    """
    config = override(base, options)
    return dataclasses.replace(
        config,
        runtime="ray",
        run=dataclasses.replace(config.run, dir=str(run_dir)),
        log=dataclasses.replace(config.log, quiet=True, group=group),
    )


def scored(base: RunConfig, metric: str, validation: float, every_epochs: int, keep: int = 0) -> RunConfig:
    """``base`` as the trials run it: evaluated by what gives ``metric`` alone, on a validation split of train.

    keep: at least so many checkpoints stay.
    """
    evaluation = metric.split("/", 1)[0]
    kept = base.checkpoint.keep and max(base.checkpoint.keep, keep)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, validation=validation),
        evals=dataclasses.replace(base.evals, names=(evaluation,), every_epochs=every_epochs),
        checkpoint=dataclasses.replace(base.checkpoint, keep=kept),
    )


def best_config(base: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The configuration to train with what was found: all training images, the base's own evaluations."""
    config = override(base, options)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=""))
