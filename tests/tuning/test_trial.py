"""One trial without Ray processes: which directory it takes, what it tells, what an exchange of PBT leaves behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from raycon.core.config import to_dict
from raycon.tuning.on_tune import Clip, Halving, Keeper, mutations
from raycon.tuning.record import Record, Trial, new_plan, read_trials
from raycon.tuning.space import choice, loguniform, uniform
from raycon.tuning.study import find, scored
from raycon.tuning.trial import Orders, PretrainTrial, TrialFailed, orders_of, trainable_class
from raycon.tuning.watch import Lines

METRIC = "knn/top1_k20"


def orders(folder: Path) -> Orders:
    base = scored(find("digits-temperature")().base, METRIC, 0.2, 1)
    return Orders(config=to_dict(base), folder=str(folder), token="abc", group="g", metric=METRIC, by_name=True)


def trial(folder: Path, name: str, **options: Any) -> PretrainTrial:
    kind = trainable_class(orders(folder))
    made: PretrainTrial = kind.__new__(kind)
    made._trial_info = SimpleNamespace(trial_name=name, trial_id="xyz_00000")
    made.setup({"raycon_trial": 3, **options})
    return made


def entry(epoch: int, value: float = 50.0) -> dict[str, Any]:
    return {
        "step": 8 * epoch,
        "epoch": epoch,
        "checkpoint": f"{8 * epoch:08d}",
        "results": {METRIC: value},
        "failed": {},
    }


def evaluated(run_dir: Path, *entries: dict[str, Any]) -> None:
    for e in entries:
        (run_dir / "checkpoints" / e["checkpoint"]).mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / e["checkpoint"] / "state.json").write_text(json.dumps({"step": e["step"]}))
    (run_dir / "evaluations.json").write_text(json.dumps(entries))


def test_a_finished_run_is_told_again_and_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "0003-abc").mkdir()
    evaluated(tmp_path / "0003-abc", entry(1, 50.0), entry(4, 70.0))
    one = trial(tmp_path, "0003", **{"method.temperature": 0.3})
    assert one._options == {"method.temperature": 0.3}
    first, last = one.step(), one.step()
    assert (first["score"], first["epoch"], first["done"]) == (50.0, 1, False)
    assert (last["score"], last["epoch"], last["done"]) == (70.0, 4, True)
    assert last["run_dir"] == str(tmp_path / "0003-abc")
    assert last[METRIC] == 70.0
    assert one._thread is None
    one.cleanup()
    assert not (tmp_path / "0003-abc" / "stop").exists()


def test_trials_have_directories_of_their_own(tmp_path: Path) -> None:
    names = {trial(tmp_path, name)._run_dir.name for name in ("0000", "0001", "0002")}
    assert names == {"0000-abc", "0001-abc", "0002-abc"}
    kind = trainable_class(Orders(**{**orders(tmp_path).__dict__, "by_name": False}))
    plain: Any = kind.__new__(kind)
    plain._trial_info = SimpleNamespace(trial_name="same", trial_id="xyz_00007")
    plain.setup({})
    assert plain._run_dir.name == "xyz_00007-abc"


def test_a_failure_that_would_come_again_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "0000-abc").mkdir()
    (tmp_path / "0000-abc" / "failure.json").write_text(json.dumps({"error": "NotFinite: loss"}))
    one = trial(tmp_path, "0000")
    with pytest.raises(TrialFailed, match="NotFinite: loss"):
        one.step()
    assert one._thread is None


def test_an_evaluation_without_the_metric_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "0000-abc").mkdir()
    bad = entry(4) | {"results": {"knn/failed": 1.0}, "failed": {"knn": "MemoryError: no room"}}
    evaluated(tmp_path / "0000-abc", bad)
    with pytest.raises(TrialFailed, match="MemoryError: no room"):
        trial(tmp_path, "0000").step()
    evaluated(tmp_path / "0000-abc", entry(4, float("nan")))
    with pytest.raises(TrialFailed, match="top1_k20 = nan"):
        trial(tmp_path, "0000").step()


def test_an_exchange_copies_everything_into_a_new_directory(tmp_path: Path) -> None:
    runs, saved = tmp_path / "runs", tmp_path / "saved"
    for name in ("0000-abc", "0001-abc"):
        (runs / name).mkdir(parents=True)
    evaluated(runs / "0000-abc", entry(1), entry(2, 61.0))
    evaluated(runs / "0001-abc", entry(1, 20.0))
    (runs / "0000-abc/checkpoints/00000016/snapshot.safetensors").write_text("mined")
    giver = trial(runs, "0000", **{"method.temperature": 0.1})
    giver._began = True
    giver._told = entry(2, 61.0)
    saved.mkdir()
    giver.save_checkpoint(str(saved))
    taker = trial(runs, "0001", **{"method.temperature": 0.12})
    taker.load_checkpoint(str(saved))
    new = runs / "0001-abc.1"
    assert taker._run_dir == new
    assert (new / "checkpoints/00000016/snapshot.safetensors").read_text() == "mined"
    assert json.loads((new / "evaluations.json").read_text()) == [entry(2, 61.0)]  # not evaluated again
    assert sorted(p.name for p in (runs / "0001-abc/checkpoints").iterdir()) == ["00000008"]  # its past stays
    # Started again after a crash, it finds the exchange made, with the exchanged options.
    shutil.rmtree(saved)
    again = trial(runs, "0001", **{"method.temperature": 0.5})
    assert again._run_dir == new
    assert again._options == {"method.temperature": 0.12}
    again._began, again._epochs_seen = True, None  # type: ignore[attr-defined]
    told = again.step()
    assert (told["generation"], told["from_epoch"], told["epoch"]) == (1, 2, 2)
    # Its own checkpoint (a pause) changes nothing; another exchange makes another directory.
    saved.mkdir()
    again.save_checkpoint(str(saved))
    more = trial(runs, "0001", **{"method.temperature": 0.12})
    more.load_checkpoint(str(saved))
    assert more._run_dir == new
    third = trial(runs, "0002", **{"method.temperature": 0.2})
    third.load_checkpoint(str(saved))
    assert third._run_dir.name == "0002-abc.1"


def test_wandb_groups_the_trials_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each trial gives to wandb.init: the sweep's group and a name and id of its own, the same after a resume."""
    from raycon.core import log

    given: list[dict[str, Any]] = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None)
    fake = SimpleNamespace(init=lambda **options: given.append(options) or run, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    common = orders_of(scored(find("digits-temperature")().base, METRIC, 0.2, 1), tmp_path, "abc", METRIC, group="mine")
    for name in ("0000", "0001", "0001"):
        kind = trainable_class(dataclasses.replace(common, by_name=True))
        made: Any = kind.__new__(kind)
        made._trial_info = SimpleNamespace(trial_name=name, trial_id=name)
        made.setup({"method.temperature": 0.3})
        made._run_dir.mkdir(exist_ok=True)
        log.Wandb(made._config(), made._run_dir)
    assert [g["group"] for g in given] == ["mine"] * 3
    assert [g["name"] for g in given] == ["0000-abc", "0001-abc", "0001-abc"]
    ids = [g["id"] for g in given]
    assert ids[1] == ids[2] != ids[0]
    assert ids[0].startswith("0000-abc-")
    assert ids[1].startswith("0001-abc-")
    assert given[0]["config"]["method.temperature"] == 0.3
    assert given[0]["resume"] == "allow"


def test_a_trial_waits_for_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on when the evaluation is there, when the run is to stop, or after evals.wait_s; else it waits."""
    import ray.train
    import torch

    from raycon.on_ray import runtime
    from raycon.training.runtime import STOP_FILE, no_index

    monkeypatch.setattr(ray.train, "report", lambda *_, **__: None)
    monkeypatch.setattr(runtime, "POLL_S", 0.0)
    looked: list[int] = []

    def evaluated(runtime: object, step: int) -> bool:
        looked.append(step)
        return len(looked) == 3

    monkeypatch.setattr(runtime.RayRuntime, "evaluated", evaluated)
    waiting = runtime.RayRuntime(tmp_path, no_index(), torch.device("cpu"), wait_s=1e6)
    waiting.report({"step": 8.0}, None, evaluate=False)
    assert looked == []
    waiting.report({"step": 8.0}, None, evaluate=True)
    assert looked == [8, 8, 8]
    runtime.RayRuntime(tmp_path, no_index(), torch.device("cpu")).report({"step": 9.0}, None, evaluate=True)
    assert looked == [8, 8, 8]
    runtime.RayRuntime(tmp_path, no_index(), torch.device("cpu"), wait_s=1e-9).report({"step": 9.0}, None, True)
    (tmp_path / STOP_FILE).touch()
    waiting.report({"step": 10.0}, None, evaluate=True)
    assert looked == [8, 8, 8, 9, 10]


def test_halving_stops_the_worse_and_remembers_earlier_sessions() -> None:
    past = [Trial(n, "stopped", {}, scores={1: 10.0 * n}) for n in range(6)]
    settings: dict[str, Any] = {"time_attr": "epoch", "max_t": 9, "grace_period": 1, "reduction_factor": 3, "metric": "score", "mode": "max"}  # fmt: skip
    for remembered, score, action in ((past, 20.0, "STOP"), (past, 45.0, "CONTINUE"), ([], 20.0, "CONTINUE")):
        halving = Halving(remembered, **settings)
        new = SimpleNamespace(trial_id="new")
        halving.on_trial_add(None, new)
        assert halving.on_trial_result(None, new, {"epoch": 1, "score": score}) == action


def test_pbt_stays_in_the_domain_and_changes_what_can_change() -> None:
    space = {"method.weight": uniform(0, 1), "method.temperature": loguniform(0.1, 1), "method.head": choice("a", "b")}
    assert set(mutations(space)) == {"method.weight", "method.temperature"}
    clip = Clip(space)
    made = clip({"method.weight": 1.2, "method.temperature": 0.08, "method.head": "a", "raycon_trial": 5})
    assert made == {"method.weight": 1.0, "method.temperature": 0.1, "method.head": "a", "raycon_trial": 5}


def test_the_keeper_writes_what_tune_tells(tmp_path: Path) -> None:
    plan = new_plan("s", find("digits-temperature")())
    known = {n: Trial(n) for n in range(2)}
    keeper = Keeper(Record(tmp_path), plan, 4, known, Lines(METRIC))

    def tunes(number: int, **last: Any) -> Any:
        class Tuned:
            config = {"method.temperature": 0.1 * (number + 1), "raycon_trial": number}
            last_result = last

            def __str__(self) -> str:
                return f"{number:04d}"

            @property
            def error_file(self) -> str:
                file = tmp_path / "error.txt"
                file.write_text("Failure # 1\nTraceback ...\nraycon.tuning.trial.TrialFailed: gone\n")
                return str(file)

        return Tuned()

    def result(epoch: int, score: float, **more: Any) -> dict[str, Any]:
        common = {"epoch": epoch, "step": epoch, "score": score, METRIC: score, "run_dir": f"/x/{plan.token}"}
        return common | {"generation": 0, "from_epoch": 0} | more

    for n in (0, 1):
        keeper.on_trial_start(0, [], tunes(n))
    keeper.on_trial_result(0, [], tunes(0), result(1, 5.0))
    keeper.on_trial_complete(0, [], tunes(0, epoch=1))
    keeper.on_trial_result(0, [], tunes(1), result(1, 6.0))
    keeper.on_trial_result(0, [], tunes(1), result(3, 8.0, generation=1, from_epoch=2))
    keeper.on_trial_result(0, [], tunes(1), {"interrupted": True})
    keeper.on_trial_recover(0, [], tunes(1))
    keeper.on_trial_error(0, [], tunes(1))
    trials = read_trials(tmp_path, plan.study)
    assert (trials[0].state, trials[0].score, trials[0].options) == ("stopped", 5.0, {"method.temperature": 0.1})
    assert (trials[1].state, trials[1].scores, trials[1].retries) == ("failed", {1: 6.0, 3: 8.0}, 1)
    assert trials[1].error == "gone"
    assert trials[1].metrics == {METRIC: 8.0}


@pytest.mark.parametrize(("epochs", "state"), [(2, "finished"), (3, "stopped")])
def test_a_trial_has_ended_when_its_own_epochs_are_trained(tmp_path: Path, epochs: int, state: str) -> None:
    """train.epochs may be searched: a trial of 2 epochs is whole after 2, whatever the base trains."""
    plan = new_plan("s", find("digits-temperature")())
    keeper = Keeper(Record(tmp_path), plan, 4, {0: Trial(0)}, Lines(METRIC))

    class Tuned:
        config = {"train.epochs": epochs, "raycon_trial": 0}
        last_result = {"epoch": 2}

        def __str__(self) -> str:
            return "0000"

    keeper.on_trial_start(0, [], Tuned())
    keeper.on_trial_complete(0, [], Tuned())
    assert read_trials(tmp_path, plan.study)[0].state == state
