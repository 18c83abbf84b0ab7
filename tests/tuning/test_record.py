"""What a sweep remembers: settings come back equal, and the record tells the truth after any kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raycon.core.config import ConfigError, flatten, to_dict
from raycon.tuning.record import Record, best_of, create, new_plan, open_plan, read_trials
from raycon.tuning.study import Study, best_config, find, first_line, scored, studies, trial_config


def plan(**changes: Any) -> Any:
    return new_plan("digits-temperature", dataclasses.replace(find("digits-temperature")(), **changes))


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    made = plan(trials=5, validation=0.25)
    create(tmp_path / "s", made)
    assert open_plan(tmp_path / "s") == made
    with pytest.raises(ConfigError, match="holds a sweep"):
        create(tmp_path / "s", made)


@pytest.mark.parametrize("text", ["", "format: 9", "format: 1\nstudy: x", "{", "format: 1\nstudy: x\ntoken: y\nsettings: {}\nspace: {a: b}\nconfig: {method: {name: moco}}"])  # fmt: skip
def test_damaged_settings_are_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="no sweep"):
        open_plan(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.yaml"):
        open_plan(tmp_path)


def test_the_record_tells_each_trial(tmp_path: Path) -> None:
    study, book = plan(trials=5).study, Record(tmp_path)
    book.write("session")
    for n in range(3):
        book.write("start", n, options={"x": n}, folder=f"trials/{n}")
        book.write("result", n, epoch=1, score=50.0 + n, metrics={"knn/top1_k20": 50.0 + n}, folder=f"trials/{n}")
    book.write("end", 0, state="stopped")
    book.write("retry", 1, error="its process died")
    book.write("result", 1, epoch=1, score=51.5)  # told again after the crash
    book.write("result", 1, epoch=4, score=60.0)
    book.write("end", 1, state="finished")
    with (tmp_path / "trials.jsonl").open("a") as handle:
        handle.write('{"event": "end", "trial": 2, "sta')  # torn by a kill
    trials = read_trials(tmp_path, study)
    assert [t.state for t in trials.values()] == ["stopped", "finished", "running", "waiting", "waiting"]
    assert trials[1].scores == {1: 51.5, 4: 60.0}
    assert (trials[1].epoch, trials[1].score, trials[1].retries) == (4, 60.0, 1)
    with (tmp_path / "trials.jsonl").open("a") as handle:
        handle.write("\n")
    book.write("session")
    assert read_trials(tmp_path, study)[2].state == "waiting"
    assert read_trials(tmp_path, study)[2].options == {"x": 2}


def test_seconds_are_those_a_trial_ran(tmp_path: Path) -> None:
    lines = [
        ("session", -1, 100.0), ("start", 0, 110.0), ("result", 0, 130.0),  # killed
        ("session", -1, 1000.0), ("start", 0, 1005.0), ("result", 0, 1010.0), ("end", 0, 1011.0),
    ]  # fmt: skip
    extra: dict[str, dict[str, object]] = {
        "start": {"options": {}, "folder": "f"},
        "result": {"epoch": 1, "score": 1.0},
        "end": {"state": "failed"},
    }
    text = "".join(json.dumps({"event": e, "trial": n, "time": t, **extra.get(e, {})}) + "\n" for e, n, t in lines)
    (tmp_path / "trials.jsonl").write_text(text)
    assert read_trials(tmp_path, plan(trials=1).study)[0].seconds == pytest.approx(20 + 6)


def test_an_exchange_takes_the_other_trials_place(tmp_path: Path) -> None:
    book = Record(tmp_path)
    book.write("start", 0, options={"x": 1}, folder="trials/0")
    for epoch in (1, 2, 3):
        book.write("result", 0, epoch=epoch, score=float(epoch))
    book.write("start", 0, options={"x": 2}, folder="trials/0.1", epoch=2, from_other=True)
    book.write("result", 0, epoch=4, score=9.0)
    trial = read_trials(tmp_path, plan(trials=1).study)[0]
    assert trial.scores == {1: 1.0, 2: 2.0, 4: 9.0}
    assert trial.history == [(0, {"x": 1}), (2, {"x": 2})]
    assert trial.options == {"x": 2}
    assert trial.folder == "trials/0.1"


def test_the_best_is_a_whole_one(tmp_path: Path) -> None:
    book = Record(tmp_path)
    for n, (score, state) in enumerate([(70.0, "stopped"), (60.0, "finished"), (65.0, "finished"), (99.0, "failed")]):
        book.write("start", n, options={}, folder="")
        book.write("result", n, epoch=1, score=score)
        book.write("end", n, state=state)
    trials = read_trials(tmp_path, plan(trials=4).study)
    assert best_of(trials, "max").number == 2  # type: ignore[union-attr]
    assert best_of(trials, "min").number == 1  # type: ignore[union-attr]
    assert best_of({0: trials[0]}, "max") is trials[0]
    assert best_of({}, "max") is None


def test_every_ready_study_is_sound() -> None:
    """Its options exist, its docstring has a question and its own command, its settings are allowed."""
    from raycon.core.config import override
    from raycon.tuning.sweep import setting_problems

    for name, function in studies().items():
        study = function()
        assert isinstance(study, Study)
        assert f"python -m raycon.tuning.sweep {name}" in (function.__doc__ or ""), name
        assert len(first_line(name)) > 20
        assert setting_problems(study) == [], name
        for option, domain in study.space.items():
            for value in domain.ends:
                assert override(study.base, {option: value})
        assert study.base.train.epochs >= study.grace_epochs


def test_what_a_trial_trains_differs_from_the_recipe_only_where_it_must(tmp_path: Path) -> None:
    base = find("digits-temperature")().base
    asked = scored(base, "linear/top1", validation=0.2, every_epochs=3)
    config = trial_config(asked, {"method.temperature": 0.3}, tmp_path / "0001", group="g")
    before, after = flatten(to_dict(base)), flatten(to_dict(config))
    changed = {k: v for k, v in after.items() if before[k] != v}
    assert changed.pop("run.dir") == str(tmp_path / "0001")
    assert changed == {
        "method.temperature": 0.3,
        "data.validation": 0.2,
        "evals.names": ["linear"],
        "evals.every_epochs": 3,
        "log.quiet": True,
        "log.group": "g",
    }
    best = flatten(to_dict(best_config(base, {"method.temperature": 0.3})))
    assert {k for k, v in best.items() if before[k] != v} == {"method.temperature"}


def test_a_study_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from raycon.recipes import recipe\nfrom raycon.tuning import Study, uniform\n"
        "def question():\n    return Study(base=recipe('quickstart'), space={'method.temperature': uniform(0.1, 1)})\n"
    )
    assert find(f"{file}:question")().space["method.temperature"].ends == (0.1, 1)
    with pytest.raises(ConfigError, match="no function 'other'; it has question"):
        find(f"{file}:other")
    with pytest.raises(ConfigError, match="no such file"):
        find(f"{tmp_path}/none.py:question")
    with pytest.raises(ConfigError, match="did you mean 'sce-temperature'"):
        find("sce-temprature")
