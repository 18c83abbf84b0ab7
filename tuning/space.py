"""Search spaces: which values an option may take, by the dotted name the option has everywhere.

    {"method.temperature": loguniform(0.05, 0.5), "method.weight": uniform(0, 1), "method.head": choice("linear", "mlp")}

Imports neither torch nor Ray.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycon.core.config import ConfigError, Facts, RunConfig, flatten, override, problems_of, to_dict

_CORNERS = 256
"""Most combinations of extreme values that are tried at the start."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    """Even in the logarithm."""
    whole: bool = False
    """Integers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"{self}: give two finite numbers, the lower one first")
        if self.log and self.low <= 0:
            raise ValueError(f"{self}: give a low end above 0: the range is logarithmic")

    def __str__(self) -> str:
        return f"{'integers' if self.whole else 'loguniform' if self.log else 'uniform'}({self.low:g}, {self.high:g})"

    @property
    def ends(self) -> tuple[Any, ...]:
        """The extreme values."""
        return (self.at(0.0), self.at(1.0))

    def at(self, u: float) -> Any:
        """The value at share ``u`` (0..1) of the range."""
        if self.whole:
            low, high = int(self.low), int(self.high)
            return min(low + int(u * (high - low + 1)), high)
        value = self.low * (self.high / self.low) ** u if self.log else self.low + u * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def place(self, value: Any) -> float:
        """Where a value lies, 0..1: the inverse of ``at`` for numbers that are not whole."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)

    def levels(self, number: int) -> list[Any]:
        """``number`` values from end to end, evenly spaced; fewer where integers run out."""
        if self.whole:
            span = self.high - self.low
            return sorted({round(self.low + span * i / (number - 1)) for i in range(number)})
        return [self.at(i / (number - 1)) for i in range(number)]

    def clip(self, value: Any) -> Any:
        """The nearest value of the range."""
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choice:
    """One of some values: numbers, words, or lists for options that are tuples."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len({json.dumps(v) for v in self.values}) < max(2, len(self.values)):
            raise ValueError(f"{self}: give two or more different values")

    def __str__(self) -> str:
        return f"choice({', '.join(repr(list(v) if isinstance(v, tuple) else v) for v in self.values)})"

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def at(self, u: float) -> Any:
        """The value at share ``u`` (0..1) of the list."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def place(self, value: Any) -> float:
        """Where a value lies in the list, 0..1."""
        plain = [json.dumps(v) for v in self.values]
        return plain.index(json.dumps(value)) / (len(plain) - 1)

    def levels(self, number: int) -> list[Any]:
        """All values, whatever ``number``."""
        return list(self.values)

    def clip(self, value: Any) -> Any:
        return value


Domain = Range | Choice
Space = Mapping[str, Domain]


def uniform(low: float, high: float) -> Range:
    """Any number from low to high."""
    return Range(low, high)


def loguniform(low: float, high: float) -> Range:
    """Any number from low to high, as likely between 0.01 and 0.1 as between 0.1 and 1."""
    return Range(low, high, log=True)


def integers(low: int, high: int) -> Range:
    """Any integer from low to high, both included."""
    return Range(low, high, whole=True)


def choice(*values: Any) -> Choice:
    """One of these values."""
    return Choice(tuple(list(v) if isinstance(v, tuple) else v for v in values))


_WORDS: dict[str, Callable[..., Domain]] = {
    "uniform": uniform,
    "loguniform": loguniform,
    "integers": integers,
    "choice": choice,
}


def parse_domain(text: str) -> Domain:
    """The domain that a text such as "loguniform(0.05, 0.5)" describes. Raises ValueError."""
    wrong = (
        f"{text!r} is no domain: give uniform(low, high), loguniform(low, high), integers(low, high) or choice(a, b)"
    )
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            raise ValueError(wrong)
        word, values = _WORDS[call.func.id], [ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, KeyError, ValueError):
        raise ValueError(wrong) from None
    try:
        made: Domain = word(*values)
    except TypeError:
        raise ValueError(wrong) from None
    return made


# --- checks -----------------------------------------------------------------------------------------------------

_SWEEPS_OWN = (
    "recipe",
    "runtime",
    "run.",
    "log.",
    "checkpoint.",
    "evals.",
    "scaling.",
    "data.validation",
    "data.cache",
)
"""Options that the sweep sets itself, or that change how a trial is run or scored and not what it learns."""


def space_problems(base: RunConfig, space: Space, facts: Facts) -> list[str]:
    """What is wrong with a space: unknown options, domains that leave an option's valid range, by name.

    The extreme values of all options, in every combination (the first 256), go through the checks of a run. What one
    option causes by itself is said of that option.
    """
    if not space:
        return ["the space is empty: give at least one option, --space method.temperature='loguniform(0.05, 0.5)'"]
    found, known = [], flatten(to_dict(base))
    for name in space:
        if name not in known:
            found += [f"space: {name} = {space[name]}: {p}" for p in _problems(base, {name: None}, facts)]
        elif name.startswith(_SWEEPS_OWN):
            found.append(f"space: {name} cannot be searched, the sweep sets it")
    able = {name: domain for name, domain in space.items() if name in known and not name.startswith(_SWEEPS_OWN)}
    together: dict[str, dict[str, Any]] = {}
    for corner in itertools.islice(itertools.product(*(d.ends for d in able.values())), _CORNERS):
        options = dict(zip(able, corner, strict=True))
        for problem in _problems(base, options, facts):
            together.setdefault(problem, options)
    for name, domain in able.items():
        alone = {p for value in domain.ends for p in _problems(base, {name: value}, facts)}
        found += [f"space: {name} = {domain}: {problem}" for problem in together if problem in alone]
        together = {problem: options for problem, options in together.items() if problem not in alone}
    for problem, options in together.items():
        shown = ", ".join(f"{k} = {v:g}" if isinstance(v, float) else f"{k} = {v}" for k, v in options.items())
        found.append(f"space: with {shown}: {problem}")
    return found


def _problems(base: RunConfig, options: Mapping[str, Any], facts: Facts) -> list[str]:
    """What the checks of a run say about ``options`` and do not say about the configuration without them."""
    try:
        config = override(base, options)
    except ConfigError as error:
        return error.problems
    changed = Facts(
        facts.rows,
        facts.classes,
        facts.image,
        max(1, config.train.batch),
        facts.world,
        config.data.size,
        config.train.epochs,
    )
    before = set(problems_of(base, facts))
    found = [p for p in problems_of(config, changed) if p not in before]
    if config.method.needs().labels and not facts.classes:
        found.append(f"needs weak labels; data.name = {config.data.name!r} has none")
    return found


def in_flight(space: Space) -> list[str]:
    """The options of a space that can change while a run trains: numbers the method reads anew in every step."""
    return [
        name
        for name, domain in space.items()
        if isinstance(domain, Range)
        and not domain.whole
        and (name.startswith("method.") or name in ("train.lr", "train.clip"))
    ]


def grid(space: Space, most: int) -> list[dict[str, Any]]:
    """Every combination: all values of choices, and as many levels (2 or more) of ranges as ``most`` points allow.

    Raises ConfigError when even 2 levels are too many.
    """

    def points(level: int) -> list[Sequence[Any]]:
        return [d.levels(level) for d in space.values()]

    def count(level: int) -> int:
        return math.prod(len(p) for p in points(level))

    if count(2) > most:
        raise ConfigError(
            [f"--trials {most}: the smallest grid has {count(2)} points; give --trials {count(2)} or more"]
        )
    level = 2
    while level < most and count(level + 1) <= most and any(isinstance(d, Range) for d in space.values()):
        level += 1
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*points(level))]
