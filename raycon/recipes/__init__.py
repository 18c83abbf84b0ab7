"""Full configurations. A recipe is a function in a file of this folder that returns a RunConfig.

``fashion_mnist_pcl`` is called ``fashion-mnist-pcl`` on the command line. Its docstring says what it reproduces, on
what hardware, how long it takes and which number to expect.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from raycon.core.config import ConfigError, RunConfig

Recipe = Callable[[], RunConfig]


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Every recipe by name, in the order of the files and of their functions."""
    found: dict[str, Recipe] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name.replace("_", "-")] = value
    return found


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. Raises ConfigError for an unknown name, with the nearest one."""
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError([f"no recipe {name!r}; {hint}There are: {', '.join(known)}"])
    import dataclasses

    return dataclasses.replace(known[name](), recipe=name)


def first_line(name: str) -> str:
    return (inspect.getdoc(recipes()[name]) or "").split("\n")[0]
