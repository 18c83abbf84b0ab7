"""A trial as Ray Tune runs it: one whole pretraining run in a directory of its own, scored by its evaluations.

The actor holds no CPU. ``step`` starts the run (raycon.on_ray.trainer, the same code as python -m raycon.pretrain) in a
thread and then returns once per evaluation, as evaluations.json tells them; so a trial that is started again after a
crash tells its earlier results again and goes on from its newest checkpoint.

Stopped by the scheduler, it asks its run to save and end, and waits: a Train run whose driver is killed may leave its
placement group behind, and the next trial would wait for it for ever.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from raycon import methods
from raycon.core.config import RunConfig, from_dict, to_dict
from raycon.core.log import read_lines

from .place import DRIVER_MEMORY
from .study import trial_config

logger = logging.getLogger("raycon")

ORIGIN = "origin.json"
"""In a run directory that began with the checkpoint of another trial: whose, which, and that trial's evaluation."""
_HALT_S = 600.0
_POLL_S = 0.3


class TrialFailed(RuntimeError):
    """A trial that did not train to its end or could not be scored; the message is the cause."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all trials of a sweep share: plain data."""

    config: dict[str, Any]
    """The base configuration, with what is scored (``study.scored``)."""
    folder: str
    """Where the run directories are made (absolute, on every node the same)."""
    token: str
    group: str
    metric: str
    by_name: bool = False
    """Run directories are named after Tune's trial names (a sweep numbers them), not after its trial ids."""
    stop_file: str = ""
    """When this file appears the trials save and end."""

    @property
    def base(self) -> RunConfig:
        return from_dict(self.config, methods.options(self.config["method"]["name"]))


def trainable_class(orders: Orders) -> type[tune.Trainable]:
    """The class to give to ``tune.Tuner``; Tune's configuration of a trial is {dotted option: value}."""
    return type("RayconTrial", (PretrainTrial,), {"orders": orders})


class PretrainTrial(tune.Trainable):
    orders: Orders

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"memory": DRIVER_MEMORY}])

    def setup(self, config: dict[str, Any]) -> None:
        self._given = {name: value for name, value in config.items() if "." in name}
        self._own = f"{self.trial_name if self.orders.by_name else self.trial_id}-{self.orders.token}"
        generations = sorted(Path(self.orders.folder).glob(f"{self._own}.*"), key=_generation)
        self._run_dir = generations[-1] if generations else Path(self.orders.folder) / self._own
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._told: dict[str, Any] | None = None
        self._lock: Any = None
        self._began = False

    @property
    def _origin(self) -> dict[str, Any]:
        """Where the run directory began, {} at the recipe's beginning."""
        file = self._run_dir / ORIGIN
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = self._origin.get("options", self._given)
        return options

    # --- results ---

    def step(self) -> dict[str, Any]:
        """The next evaluation of the run. Raises TrialFailed."""
        if not self._began:
            self._begin()
        while True:
            running = self._thread is not None and self._thread.is_alive()
            for entry in self._entries():
                if self._told is None or entry["step"] > self._told["step"]:
                    return self._result(entry)
            if not running:
                break
            assert self._thread is not None
            self._thread.join(_POLL_S)
            if self.orders.stop_file and Path(self.orders.stop_file).exists():
                return self._interrupted()
        if self._error is not None:
            raise TrialFailed(str(self._error) or type(self._error).__name__)
        said = [line["text"] for line in read_lines(self._run_dir / "metrics.jsonl") if line.get("kind") == "event"]
        raise TrialFailed(f"the run ended and its last checkpoint was not evaluated; its last words: {said[-1:]}")

    def _entries(self) -> list[dict[str, Any]]:
        from raycon.evals.base import read_results

        return [e for e in read_results(self._run_dir / "evaluations.json") if "control" not in e]

    def _result(self, entry: dict[str, Any]) -> dict[str, Any]:
        metric = self.orders.metric
        if metric not in entry["results"]:
            wrong = "; ".join(f"{k}: {v}" for k, v in entry.get("failed", {}).items())
            raise TrialFailed(f"the evaluation of step {entry['step']} gave no {metric} ({wrong or 'it is not there'})")
        if not math.isfinite(entry["results"][metric]):
            raise TrialFailed(f"the evaluation of step {entry['step']} gave {metric} = {entry['results'][metric]}")
        self._told, origin = entry, self._origin
        return {
            **entry["results"],
            "generation": _generation(self._run_dir),
            "from_epoch": origin["entry"]["epoch"] if origin else 0,
            "score": entry["results"][metric],
            "epoch": entry["epoch"],
            "step": entry["step"],
            "run_dir": str(self._run_dir),
            "done": entry["epoch"] >= self._epochs,
        }

    def _interrupted(self) -> dict[str, Any]:
        """The sweep ends early: what Tune is told now is not looked at."""
        self._halt()
        last = self._told or {"epoch": 0, "step": 0, "results": {}}
        score = last["results"].get(self.orders.metric, float("nan"))
        return {"score": score, "epoch": last["epoch"], "step": last["step"], "interrupted": True}

    # --- the run ---

    def _begin(self) -> None:
        from raycon import pretrain
        from raycon.on_ray import trainer
        from raycon.training import job
        from raycon.training.runtime import STOP_FILE

        self._began = True
        run_dir = self._run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        # The process that led this run before (paused, stopped) may still be ending it.
        self._lock = (run_dir / ".trial.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        config = self._config()
        if (run_dir / trainer.FAILURE_FILE).exists():  # it would come again, see on_ray/trainer.py
            self._error = TrialFailed(json.loads((run_dir / trainer.FAILURE_FILE).read_text(encoding="utf-8"))["error"])
            return
        if any(e["epoch"] >= self._epochs for e in self._entries()):
            return  # trained to the end before: only its results are wanted
        facts = job.facts_of(config, job.open_data(config), config.scaling.workers)
        resume = run_dir if (run_dir / "config.yaml").exists() else None
        pretrain.prepare(config, run_dir, resume, ["python", "-m", "raycon.pretrain", "--resume", str(run_dir)])
        (run_dir / STOP_FILE).unlink(missing_ok=True)

        def train() -> None:
            try:
                trainer.fit(config, run_dir, facts)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=train, name="raycon-trial", daemon=True)
        self._thread.start()

    def _config(self) -> RunConfig:
        from raycon import pretrain

        config = trial_config(self.orders.base, self._options, self._run_dir, self.orders.group)
        return pretrain.absolute(config, self._run_dir)

    @property
    def _epochs(self) -> int:
        return trial_config(self.orders.base, self._options, self._run_dir, "").train.epochs

    def cleanup(self) -> None:
        self._halt()

    def _halt(self) -> None:
        """Let the run save a checkpoint and end, and wait for it."""
        from raycon.training.runtime import STOP_FILE

        stop = self._run_dir / STOP_FILE
        if self._thread is not None and self._thread.is_alive():
            if self._told is None or self._told["epoch"] < self._epochs:
                stop.touch()
            self._thread.join(_HALT_S)
            if self._thread.is_alive():
                logger.warning("%s did not end within %g s and is killed", self._run_dir, _HALT_S)
        stop.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- PBT: a trial goes on from another one's checkpoint ---

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The checkpoint of the last evaluation told: networks, optimiser, queue and snapshot."""
        from raycon.training import checkpoint

        assert self._told is not None, "Tune saves after a result only"
        folder = self._run_dir / "checkpoints"
        source = folder / self._told["checkpoint"]
        if not source.is_dir():
            newest, refused = checkpoint.newest(folder)
            if newest is None:
                raise TrialFailed(
                    f"{folder}: no readable checkpoint to go on from ({'; '.join(refused) or 'none there'})"
                )
            source = newest
        shutil.copytree(source, Path(checkpoint_dir) / source.name)
        origin = {"run": self._run_dir.name, "checkpoint": source.name, "entry": self._told}
        (Path(checkpoint_dir) / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:
        """Another trial's checkpoint begins a new run directory, with this trial's options; its own changes nothing."""
        origin = json.loads((Path(checkpoint) / ORIGIN).read_text(encoding="utf-8"))
        base = origin["run"].partition(".")[0]
        if base == self._own:
            return
        mark = {**origin, "options": self._given}
        if self._origin == mark:
            return  # the exchange was made before this process was started again
        assert not self._began
        number = _generation(self._run_dir) + 1
        run_dir = Path(self.orders.folder) / f"{self._own}.{number}"
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copytree(Path(checkpoint) / origin["checkpoint"], run_dir / "checkpoints" / origin["checkpoint"])
        entry = origin["entry"] if origin["entry"]["checkpoint"] == origin["checkpoint"] else None
        if entry is not None:  # evaluated already
            (run_dir / "evaluations.json").write_text(json.dumps([entry]), encoding="utf-8")
            self._told = entry
        (run_dir / ORIGIN).write_text(json.dumps(mark), encoding="utf-8")
        self._run_dir = run_dir


def _generation(run_dir: Path) -> int:
    """0001-ab12cd -> 0, 0001-ab12cd.2 -> 2."""
    return int(run_dir.name.partition(".")[2] or 0)


def orders_of(base: RunConfig, folder: Path, token: str, metric: str, group: str) -> Orders:
    """Orders for trials of ``base`` (as ``study.scored`` gives it) with their run directories in ``folder``."""
    return Orders(config=to_dict(base), folder=str(folder.absolute()), token=token, group=group, metric=metric)
