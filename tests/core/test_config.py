from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raycon import methods
from raycon.core import config as c
from raycon.recipes import recipe, recipes


def facts(**changes: object) -> c.Facts:
    base = c.Facts(rows=1000, classes=0, image=(1, 8, 8), batch=64, world=2, size=8, epochs=10)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    c.save_yaml(config, tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert c.from_dict(tree, methods.options(config.method.name)) == config


def test_all_mistakes_are_named_at_once_with_the_nearest_name() -> None:
    config = recipe("quickstart")
    with pytest.raises(c.ConfigError) as caught:
        c.override(config, {"method.temprature": 0.1, "train.batsh": 3})
    assert "did you mean 'method.temperature'" in str(caught.value)
    assert "did you mean 'train.batch'" in str(caught.value)
    tree = c.to_dict(config)
    tree["train"] |= {"lr": "fast", "optimizer": "sdg"}
    tree["method"]["dim"] = 1.5
    with pytest.raises(c.ConfigError) as caught:
        c.from_dict(tree, methods.options("pcl"))
    assert len(caught.value.problems) == 3


def test_override_changes_one_option_only() -> None:
    config = recipe("quickstart")
    other = c.override(config, {"method.temperature": 0.5})
    different = {k for k, v in c.flatten(c.to_dict(other)).items() if c.flatten(c.to_dict(config))[k] != v}
    assert different == {"method.temperature"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method.temperature": 0.0}, "method.temperature"),
        ({"method.queue": 100}, "method.queue"),
        ({"method.negatives": 60}, "method.negatives"),
        ({"method.clusters": [60, 2000]}, "method.clusters"),
        ({"method.clusters": []}, "method.clusters"),
        ({"method.momentum": 1.5}, "method.momentum"),
        ({"train.batch": 63}, "train.batch"),
        ({"train.lr": -1.0}, "train.lr"),
        ({"train.epochs": 0}, "train.epochs"),
        ({"train.accumulate": 0}, "train.accumulate"),
        ({"train.momentum": 1.0}, "train.momentum"),
        ({"train.warmup_epochs": 500.0}, "train.warmup_epochs"),
        ({"data.size": 1}, "data.size"),
        ({"model.width": 0}, "model.width"),
        ({"mining.shards": 0}, "mining.shards"),
        ({"mining.redo": 0}, "mining.redo"),
        ({"evals.knn_k": []}, "evals.knn_k"),
        ({"evals.knn_temperature": 0.0}, "evals.knn_temperature"),
        ({"log.every_steps": 0}, "log.every_steps"),
        ({"checkpoint.every_epochs": 0}, "checkpoint.every_epochs"),
        ({"scaling.workers": 0}, "scaling.workers"),
        ({"scaling.threads": 0}, "scaling.threads"),
        ({"train.lr": float("nan")}, "train.lr"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(options: dict[str, object], word: str) -> None:
    config = c.override(recipe("quickstart"), options)
    known = facts(batch=config.train.batch, epochs=config.train.epochs)
    found = c.problems_of(config, known) + config.method.problems(known)
    assert found
    assert any(p.startswith(word) for p in found), found


def test_a_good_configuration_has_no_problems() -> None:
    config = recipe("quickstart")
    known = facts(batch=config.train.batch, epochs=config.train.epochs, rows=1437)
    assert c.problems_of(config, known) + config.method.problems(known) == []


@pytest.mark.parametrize("name", methods.names())
def test_options_read_from_the_source_equal_the_real_class(name: str) -> None:
    ours, real = methods.options(name), methods.module(name).Options
    assert {f.name: f.default for f in dataclasses.fields(ours)} == {
        f.name: f.default for f in dataclasses.fields(real)
    }
    assert ours().needs() == real().needs()
    assert ours().name == name


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from raycon import pretrain\n"
        "try:\n    pretrain.main(['--help'])\n"
        "except SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fashion-mnist-pcl" in done.stdout
    assert "--method.temperature" in done.stdout


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(c.ConfigError, match="did you mean 'quickstart'"):
        recipe("quickstrat")
