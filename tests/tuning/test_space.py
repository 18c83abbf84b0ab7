"""Spaces and proposals: values stay in their domains, wrong spaces are refused by name, grids are what they say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from raycon.core.config import ConfigError, Facts, RunConfig
from raycon.recipes import recipe
from raycon.tuning.propose import Grid, Random, Tpe, proposer
from raycon.tuning.space import (
    Choice,
    Range,
    choice,
    grid,
    in_flight,
    integers,
    loguniform,
    parse_domain,
    space_problems,
    uniform,
)

FACTS = Facts(rows=1437, classes=0, image=(1, 8, 8), batch=128, world=2, size=16, epochs=100)


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return recipe("quickstart")


def test_values_lie_where_they_should() -> None:
    assert uniform(2, 6).at(0.25) == 3
    assert loguniform(0.01, 1).at(0.5) == pytest.approx(0.1)
    assert [integers(3, 5).at(u) for u in (0, 0.33, 0.34, 0.67, 0.999, 1.0)] == [3, 3, 4, 5, 5, 5]
    assert loguniform(0.01, 1).levels(3) == pytest.approx([0.01, 0.1, 1])
    assert integers(1, 3).levels(9) == [1, 2, 3]
    assert choice("a", (1, 2)).values == ("a", [1, 2])
    for domain in (uniform(0, 1), loguniform(0.05, 0.5)):
        assert [domain.place(domain.at(u)) for u in (0.0, 0.3, 1.0)] == pytest.approx([0, 0.3, 1])
        assert domain.clip(9.0) == domain.high
        assert domain.clip(-9.0) == domain.low


@pytest.mark.parametrize(
    "domain", [uniform(0, 1), loguniform(0.05, 0.5), integers(2, 14), choice("linear", "mlp"), choice([60, 120], [240])]
)
def test_a_domain_survives_its_text(domain: Range | Choice) -> None:
    assert parse_domain(str(domain)) == domain


@pytest.mark.parametrize(
    "text",
    ["0.1", "normal(0, 1)", "uniform(0)", "uniform(1, 0)", "loguniform(0, 1)", "choice(1)", "choice(1, 1)",
     "uniform(0, __import__('os').getpid())", "uniform(low=0, high=1)", "uniform(0, inf)", "(", ""],
)  # fmt: skip
def test_wrong_domains(text: str) -> None:
    with pytest.raises(ValueError, match="give"):
        parse_domain(text)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"method.temprature": uniform(0.1, 1)}, ["'method.temprature'", "did you mean 'method.temperature'"]),
        ({"method.temperature": uniform(0, 1)}, ["method.temperature = uniform(0, 1)", "above 0"]),
        ({"method.momentum": uniform(0.9, 1.1)}, ["method.momentum = uniform(0.9, 1.1)", "from 0 to 1"]),
        ({"method.temperature": choice("hot", "cold")}, ["'hot'", "'cold'", "expected float"]),
        ({"method.clusters": choice([60], [60, 5000])}, ["k = 5000", "1437"]),
        ({"train.batch": choice(128, 130)}, ["method.queue = 512", "train.batch = 130"]),
        ({"evals.knn_k": choice([1], [2])}, ["evals.knn_k cannot be searched"]),
        ({"data.validation": uniform(0.1, 0.2)}, ["data.validation cannot be searched"]),
        ({}, ["the space is empty"]),
        # Each alone is fine, together they are not: more negatives than the smallest clustering has.
        (
            {"method.negatives": choice(10, 55), "method.clusters": choice([50, 60], [60, 120])},
            ["method.negatives", "55"],
        ),
    ],
)
def test_spaces_that_cannot_be_searched(base: RunConfig, space: dict[str, Range | Choice], words: list[str]) -> None:
    found = "\n".join(space_problems(base, space, FACTS))
    for word in words:
        assert word in found, found


def test_all_problems_are_said_at_once_and_good_spaces_have_none(base: RunConfig) -> None:
    bad = {"method.temperature": uniform(0, 1), "train.lr": uniform(0, 1), "nothing.here": uniform(0, 1)}
    found = space_problems(base, bad, FACTS)
    assert len(found) == 3
    good = {"method.temperature": loguniform(0.05, 0.5), "method.clusters": choice([60, 120], [80]), "train.lr": loguniform(0.01, 1)}  # fmt: skip
    assert space_problems(base, good, FACTS) == []
    assert in_flight(good) == ["method.temperature", "train.lr"]


def test_an_option_may_need_another_of_the_space(base: RunConfig) -> None:
    """Few clusters do not go with the recipe's 48 negatives, but with all those of the space they do."""
    space = {"method.clusters": choice([20], [60, 120]), "method.negatives": choice(8, 16)}
    assert space_problems(base, space, FACTS) == []
    assert space_problems(base, {"method.clusters": space["method.clusters"]}, FACTS)


def test_a_fault_of_the_recipe_is_not_blamed_on_the_space(base: RunConfig) -> None:
    broken = dataclasses.replace(base, method=dataclasses.replace(base.method, queue=100))  # type: ignore[call-arg]
    assert space_problems(broken, {"method.temperature": loguniform(0.05, 0.5)}, FACTS) == []


def test_random_proposals_follow_from_seed_and_number() -> None:
    space = {"a": loguniform(0.01, 1), "b": choice("x", "y", "z"), "c": integers(1, 4)}
    drawn = [Random(space, 7).propose(n) for n in range(300)]
    assert drawn[5] == Random(space, 7).propose(5)
    assert drawn[5] != Random(space, 8).propose(5)
    # Log-uniform: the middle of the logarithm splits the draws in half; every choice is taken.
    logs = np.log10([d["a"] for d in drawn])
    assert -2 <= logs.min() < -1.9 < -0.1 < logs.max() <= 0
    assert abs((logs < -1).mean() - 0.5) < 0.1
    assert {d["b"] for d in drawn} == {"x", "y", "z"}
    assert {d["c"] for d in drawn} == {1, 2, 3, 4}
    assert abs(np.corrcoef(logs, [d["c"] for d in drawn])[0, 1]) < 0.2


def test_a_grid_has_every_combination_once() -> None:
    space = {"a": uniform(0, 1), "b": choice("x", "y")}
    points = grid(space, 7)
    assert len(points) == 6  # 3 levels x 2
    assert {(p["a"], p["b"]) for p in points} == {(a, b) for a in (0, 0.5, 1) for b in "xy"}
    shuffled = [Grid(space, 7, seed=1).propose(n) for n in range(6)]
    assert shuffled != points
    assert sorted(map(str, shuffled)) == sorted(map(str, points))
    assert shuffled == Grid(space, 7, seed=1).points != Grid(space, 7, seed=2).points
    assert len(grid({"k": integers(2, 4)}, 50)) == 3
    with pytest.raises(ConfigError, match="smallest grid has 4 points"):
        grid(space, 3)


def test_tpe_finds_the_valley_and_learns_from_earlier_sessions() -> None:
    pytest.importorskip("optuna")
    space = {"x": loguniform(0.01, 1.0), "h": choice([1], [2])}

    def score(options: dict[str, object]) -> float:
        return -((math.log10(float(options["x"])) + 1) ** 2) - (options["h"] == [1])  # type: ignore[arg-type]

    tpe = Tpe(space, seed=0, mode="max", start=6)
    told = []
    for number in range(30):
        options = tpe.propose(number)
        assert 0.01 <= options["x"] <= 1
        assert options["h"] in ([1], [2])
        tpe.tell(options, score(options))
        told.append(options)
    first = np.mean([score(o) for o in told[:6]])
    assert np.mean([score(o) for o in told[-10:]]) > first + 0.2
    # A resumed sweep tells what it knows to a new sampler, which then proposes as well at once.
    again = Tpe(space, seed=1, mode="max", start=6)
    for options in told:
        again.tell(options, score(options))
    fresh = []
    for number in range(10):
        fresh.append(again.propose(number))
        again.tell(fresh[-1], score(fresh[-1]) if number % 2 else None)  # a failed trial is no score
    assert np.mean([score(o) for o in fresh]) > first + 0.2
    assert proposer("tpe", space, seed=0, mode="min", trials=8)
