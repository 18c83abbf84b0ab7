"""Search for the values of options that score best: many pretraining runs on Ray Tune, bad ones stopped early.

python -m raycon.tuning.sweep STUDY [--dotted.option value ...] [--trials N] [--searcher ...] [--scheduler ...]
python -m raycon.tuning.sweep --resume DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, get_args

from raycon.core import log, program
from raycon.core.address import is_address
from raycon.core.config import ConfigError, Facts, RunConfig, problems_of, save_yaml

from . import record
from .propose import Proposer, proposer
from .record import ENDED, Plan, Record, best_of
from .space import in_flight, parse_domain, space_problems
from .study import Scheduler, Searcher, Study, best_config, find, first_line, scored, studies

logger = logging.getLogger("raycon")

_SETTINGS = ("metric", "searcher", "scheduler", "trials", "every_epochs", "grace_epochs", "reduction", "validation", "retries")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 finished or stopped, 1 no trial could be scored, 2 a wrong request."""
    return program.run("raycon.tuning.sweep", run, argv)


# --- the command line -------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    width = max(map(len, studies()))
    listing = "\n".join(f"  {name:{width}}  {first_line(name)}" for name in studies())
    made = argparse.ArgumentParser(
        prog="python -m raycon.tuning.sweep",
        description=f"{__doc__}\nStudies:\n{listing}\n",
        epilog="Every option of a run may be given by its dotted name, for all trials: see python -m raycon.pretrain "
        "RECIPE --help. docs/sweeps.md has the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    made.add_argument("study", nargs="?", help="one of the above, or FILE.py:FUNCTION")
    made.add_argument("-h", "--help", action="store_true", help="this; after a STUDY: what it asks and its settings")
    made.add_argument("--recipe", help="search on this recipe instead of the study's own")
    made.add_argument("--config", help="search on the configuration of this file instead of the study's own")
    made.add_argument("--space", action="append", default=[], metavar="OPTION=DOMAIN",
                      help="search this option too, or in another domain, such as train.lr='loguniform(0.01, 1)'; "
                      "OPTION=none leaves one of the study's out")  # fmt: skip
    made.add_argument("--metric", help="what trials are scored by, as evaluations.json names it (knn/top1_k20)")
    made.add_argument("--trials", type=int, help="how many")
    made.add_argument("--max-concurrent", type=int, default=0, help="at most so many at once; 0: as many as fit")
    made.add_argument("--searcher", choices=get_args(Searcher), help="who proposes the options of a trial")
    made.add_argument("--scheduler", choices=get_args(Scheduler), help="who stops trials early, or changes them (pbt)")
    made.add_argument("--every-epochs", type=int, help="score trials every so many epochs")
    made.add_argument("--grace-epochs", type=int, help="stop none before; pbt: epochs between exchanges")
    made.add_argument("--reduction", type=int, help="asha, hyperband: one trial of so many goes on")
    made.add_argument("--validation", type=float, help="share of the training images held out to score with")
    made.add_argument("--retries", type=int, help="how often a crashed trial is started again")
    made.add_argument("--dir", help="where the sweep is kept; default sweeps/<study>-<time>")
    made.add_argument("--resume", nargs="?", const="", metavar="DIR", help="go on with the sweep in DIR (or in --dir)")
    made.add_argument("--quiet", action="store_true", help="only warnings and the result on the terminal")
    return made


def run(arguments: list[str]) -> int:
    """Parse, check everything, search, report."""
    flags = parser()
    known, dotted = flags.parse_known_args(arguments)
    if known.help:
        sys.stdout.write(flags.format_help() if not known.study else about(known.study))
        return 0
    if known.resume is not None:
        folder, plan = resumed(known, dotted)
    else:
        plan = asked(known, dotted)
        name = re.sub(r"[^A-Za-z0-9=._-]+", "_", plan.name)
        if known.dir and is_address(known.dir):
            raise ConfigError(
                [f"--dir {known.dir}: a sweep is kept in a folder that all machines see, not at an address"]
            )
        default = Path("sweeps") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(known.dir).expanduser().absolute() if known.dir else default.absolute()
    base, facts, propose = checked(plan, folder, known.max_concurrent, known.resume is not None)
    return search(folder, plan, base, facts, propose, known.max_concurrent, known.quiet, known.resume is not None)


def about(name: str) -> str:
    """A study in words."""
    function = find(name)
    study = function()
    settings = "\n".join(f"  {k:14}{getattr(study, k)}" for k in _SETTINGS)
    space = "\n".join(f"  {k:28}{v}" for k, v in study.space.items())
    return (
        f"{name}: {inspect.getdoc(function)}\n\nSpace:\n{space}\n\nSettings (--{_SETTINGS[0]} and so on):\n{settings}\n"
    )


def asked(known: argparse.Namespace, dotted: list[str]) -> Plan:
    """The sweep that the command line asks for. Raises ConfigError."""
    import tyro

    from raycon import pretrain
    from raycon.recipes import recipe

    if not known.study:
        listing = "\n".join(f"  {name}  {first_line(name)}" for name in studies())
        raise ConfigError([f"give a STUDY, or --resume DIR\nStudies:\n{listing}"])
    study = find(known.study)()
    if known.recipe and known.config:
        raise ConfigError(["--recipe and --config: give one of them"])
    if known.recipe:
        study = dataclasses.replace(study, base=recipe(known.recipe))
    elif known.config:
        study = dataclasses.replace(study, base=pretrain.read_yaml(Path(known.config)))
    base = tyro.cli(RunConfig, default=study.base, args=dotted, prog="python -m raycon.tuning.sweep", add_help=False)
    space, problems = dict(study.space), []
    for text in known.space:
        name, _, domain = text.partition("=")
        try:
            if domain.strip() == "none":
                space.pop(name.strip())
            else:
                space[name.strip()] = parse_domain(domain)
        except KeyError:
            problems.append(f"--space {text}: the study does not search {name}; it searches {', '.join(space)}")
        except ValueError as error:
            problems.append(f"--space {text}: {error}")
    if problems:
        raise ConfigError(problems)
    given = {k: getattr(known, k) for k in _SETTINGS if getattr(known, k) is not None}
    study = dataclasses.replace(study, base=base, space=space, **given)
    if study.searcher == "grid":  # a grid has as many trials as points
        from .space import grid

        study = dataclasses.replace(study, trials=len(grid(space, study.trials)))
    return record.new_plan(known.study, study)


def resumed(known: argparse.Namespace, dotted: list[str]) -> tuple[Path, Plan]:
    """The sweep to go on with. Raises ConfigError, also for options that a resumed sweep does not take."""
    place = known.resume or known.dir
    if not place:
        raise ConfigError(["--resume: give the directory of the sweep"])
    refused = [f"--{k.replace('_', '-')}" for k in ("recipe", "config", *_SETTINGS) if getattr(known, k) is not None]
    refused += ["--space"] * bool(known.space) + dotted
    if refused:
        raise ConfigError(
            [f"--resume takes its settings from {place}/{record.SETTINGS}: leave out {' '.join(refused)}"]
        )
    folder = Path(place).expanduser().absolute()
    plan = record.open_plan(folder)
    if known.study and known.study != plan.name:
        raise ConfigError([f"{folder} holds a sweep of {plan.name!r}, not of {known.study!r}"])
    return folder, plan


# --- checks -----------------------------------------------------------------------------------------------------


def checked(plan: Plan, folder: Path, most: int, resume: bool) -> tuple[RunConfig, Facts, Proposer]:
    """(the base configuration as trials run it, the facts of its data, who proposes); raises ConfigError with all
    that is wrong."""
    import importlib.util

    from raycon import pretrain
    from raycon.training import job

    study, problems = plan.study, setting_problems(plan.study)
    if most < 0:
        problems.append(f"--max-concurrent {most}: give 1 or more, or 0 for as many as fit")
    if importlib.util.find_spec("ray") is None:
        problems.append("Ray is not installed; pip install 'raycon[ray]'")
    if not resume and (folder / record.SETTINGS).exists():
        problems.append(f"--dir {folder} holds a sweep: go on with --resume {folder}, or give another directory")
    elif not resume and folder.exists() and any(folder.iterdir()):
        problems.append(f"--dir {folder} is not empty: give a directory of its own")
    unscored = metric_problems(study)
    share = study.validation if 0 < study.validation < 1 else 0.1  # said already; the rest is checked all the same
    base = study.base if unscored else scored(study.base, study.metric, share, max(1, study.every_epochs), keep=2)
    base = pretrain.absolute(base, folder / record.FOLDER / "trial")
    cache = study.base.data.cache or str(folder / ".cache")
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, validation=share, cache=cache))
    problems += unscored + pretrain.start_problems(base, Path(base.run.dir), None, base.scaling.workers)
    facts: Facts | None = None
    made: Proposer | None = None
    try:
        dataset = job.open_data(base)
        facts = job.facts_of(base, dataset, base.scaling.workers)
        problems += problems_of(base, facts) + pretrain.labels_problems(base, facts)
        problems += pretrain.network_problems(base, dataset) + pretrain.crop_problems(base, facts)
        problems += space_problems(base, study.space, facts)
        base = cut_table(base, folder, write=False)
        if not problems:
            made = proposer(study.searcher, study.space, seed=base.seed, mode=study.mode, trials=study.trials)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    assert facts is not None
    assert made is not None
    return base, facts, made


def setting_problems(study: Study) -> list[str]:
    """What is wrong with the settings of the search itself."""
    found = [
        f"--{name.replace('_', '-')} {getattr(study, name)}: give {least} or more"
        for name, least in (("trials", 1), ("every_epochs", 1), ("grace_epochs", 1), ("reduction", 2), ("retries", 0))
        if getattr(study, name) < least
    ]
    for name, words in (("searcher", Searcher), ("scheduler", Scheduler)):
        if getattr(study, name) not in get_args(words):
            found.append(f"--{name} {getattr(study, name)}: give one of {', '.join(get_args(words))}")
    if not 0 < study.validation < 1:
        found.append(
            f"--validation {study.validation}: give a share above 0 and below 1; trials are never scored on the test split"
        )
    epochs = study.base.train.epochs
    if study.scheduler in ("asha", "hyperband", "pbt"):
        if study.grace_epochs > epochs:
            found.append(f"--grace-epochs {study.grace_epochs} is more than train.epochs = {epochs}")
        if "train.epochs" in study.space:
            found.append(f"space: train.epochs is the time of --scheduler {study.scheduler}; search it with none")
        if study.every_epochs > max(1, study.grace_epochs):
            found.append(
                f"--every-epochs {study.every_epochs} is more than --grace-epochs {study.grace_epochs}: nothing is "
                "scored when a trial is first looked at"
            )
    if study.scheduler == "pbt":
        if not in_flight(study.space):
            found.append(
                f"--scheduler pbt changes numbers of the method and train.lr while a run trains; {', '.join(study.space)} "
                "cannot change: choose asha"
            )
        if study.searcher == "tpe":
            found.append("--searcher tpe does not go with --scheduler pbt: its trials all begin at once; choose random")
        if study.trials < 2:
            found.append(f"--trials {study.trials}: pbt needs a population of 2 or more")
    return found


def metric_problems(study: Study) -> list[str]:
    """A metric that no evaluation gives: told by running the evaluation on a few random features."""
    from raycon import evals

    task = study.metric.partition("/")[0]
    if "@" in task:
        return [f"--metric {study.metric}: scores by another data set's test split; choose one of this data's"]
    if task not in evals.names() or "/" not in study.metric:
        return [f"--metric {study.metric}: no evaluation {task!r}; there are {', '.join(evals.names())}"]
    given = produced(task, study)
    if given and study.metric not in given:
        return [f"--metric {study.metric}: {task} gives {', '.join(given)}"]
    return []


def produced(task: str, study: Study) -> list[str]:
    """The names of an evaluation's numbers; [] when they cannot be told without the real data."""
    import torch

    from raycon import evals
    from raycon.evals.base import FeatureSets

    config = dataclasses.replace(study.base.evals, names=(task,), linear_epochs=1)
    try:
        evaluation = evals.build(task, config, 0)
    except ConfigError:
        return []
    if not hasattr(evaluation, "run"):
        return []
    rows = max(256, max(config.knn_k, default=1) + 2)
    generator = torch.Generator().manual_seed(0)

    def features() -> torch.Tensor:
        return torch.randn(rows, 8, generator=generator)

    label = torch.arange(rows) % 4
    try:
        return sorted(evaluation.run(FeatureSets(features(), label, features(), label.clone())))
    except Exception as error:  # an evaluation that wants more than features: it will say so on the first checkpoint
        logger.debug("%s on random features: %s", task, error)
        return []


def cut_table(base: RunConfig, folder: Path, write: bool) -> RunConfig:
    """A Cl-InfoNCE table has a line per training image: the trials read one without the held-out images' lines.

    Raises ConfigError when it has another number of lines.
    """
    table = Path(getattr(base.method, "table", "") or "")
    if not table.is_file():
        return base
    import numpy as np

    from raycon.data_loaders.hold_out import held_out_rows
    from raycon.training import job

    whole = len(job.open_data(dataclasses.replace(base, data=dataclasses.replace(base.data, validation=0.0))))
    head, *lines = table.read_text(encoding="utf-8").splitlines()
    if len(lines) != whole:
        raise ConfigError(
            [f"method.table = {str(table)!r} has {len(lines)} lines after the first, the data {whole} images"]
        )
    if not write:
        return base
    kept = np.flatnonzero(~held_out_rows(whole, base.data.validation, base.seed))
    cut = folder / "table.csv"
    cut.write_text("\n".join([head, *(lines[i] for i in kept)]) + "\n", encoding="utf-8")
    return dataclasses.replace(base, method=dataclasses.replace(base.method, table=str(cut)))  # type: ignore[call-arg]


# --- the search -------------------------------------------------------------------------------------------------


def search(
    folder: Path,
    plan: Plan,
    base: RunConfig,
    facts: Facts,
    propose: Proposer,
    most: int,
    quiet: bool,
    resume: bool,
) -> int:
    """Place the trials, run them, write the report. Raises ConfigError when not even one trial fits."""
    from raycon.on_ray import trainer

    from . import on_tune
    from .watch import watch

    study = plan.study
    trainer.connect(dashboard_port=on_tune.free_port())
    at_once = placed(study, base, facts, most)
    if not resume:
        record.create(folder, plan)
    lock = alone(folder)
    log.attach_log_file(folder, quiet or (sys.stdout.isatty() and sys.stderr.isatty()))
    base = cut_table(base, folder, write=True)
    for warning in base.method.warnings(facts):
        logger.warning("warning: %s", warning)
    known = record.read_trials(folder, study)
    left = [t for t in known.values() if t.state not in ENDED]
    logger.info("%s: %d trials, %d to go, %d at once; %s", plan.name, len(known), len(left), at_once, folder)
    Record(folder).write("session", at_once=at_once)
    (folder / record.STOP).unlink(missing_ok=True)
    shown = watch(f"{plan.name}: {study.metric}", study.metric, study.mode, base.train.epochs, folder, known, quiet)
    with stop_on_signal(folder):
        on_tune.run(folder, plan, base, propose, known, at_once, shown)
    if (folder / record.STOP).exists():
        Record(folder).write("pause")
    lock.close()
    return finish(folder, plan)


def alone(folder: Path) -> IO[str]:
    """What keeps a second process out of a sweep until it is closed or this process ends. Raises ConfigError when there is
    one already."""
    import fcntl

    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError([f"{folder} is being run by another process: wait for it, or stop it first"]) from None
    return lock


def placed(study: Study, base: RunConfig, facts: Facts, most: int) -> int:
    """How many trials run at once. Raises ConfigError when the cluster cannot hold one, or PBT's whole population."""
    from . import on_tune

    fit, told = on_tune.trials_at_once(base, facts, limit=study.trials)
    if base.scaling.autoscaling:
        if not most:
            raise ConfigError(
                ["scaling.autoscaling: the cluster does not tell how much it grows; give --max-concurrent"]
            )
        return min(most, study.trials)
    if fit == 0:
        raise ConfigError(
            [f"not even one trial can be placed: {told}; lower scaling.workers, scaling.cpus-per-worker or "
             "scaling.gpus-per-worker, or add nodes"]
        )  # fmt: skip
    if most > fit and fit < study.trials:
        logger.warning("--max-concurrent %d: only %d fit, so %d run at once (%s)", most, fit, fit, told)
    at_once = min(most or fit, fit, study.trials)
    if study.scheduler == "pbt" and at_once < study.trials:
        raise ConfigError(
            [f"--scheduler pbt trains its {study.trials} trials together, and {at_once} fit at once ({told}): give fewer "
             "--trials (2 or more), or smaller ones (scaling.workers, scaling.cpus-per-worker)"]
        )  # fmt: skip
    return at_once


@contextmanager
def stop_on_signal(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM: the trials save and end; a second one ends at once."""
    stop = folder / record.STOP

    def ask(number: int, frame: Any) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        logger.warning("stopping: the trials save first (once more: stop at once). Go on with: --resume %s", folder)
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune's own way to end early

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(folder: Path, plan: Plan) -> int:
    """Write best.yaml and report.html; the last words."""
    from . import report

    study = plan.study
    trials = record.read_trials(folder, study)
    best = best_of(trials, study.mode)
    if best is not None:
        save_yaml(best_config(study.base, best.options), folder / record.BEST)
    page = report.write(folder)
    states = [t.state for t in trials.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [f"{len(trials)} trials: {counts}"]
    if best is not None:
        from .watch import words

        lines.append(f"best:            trial {best.number}, {study.metric} {best.score:.4g}, {words(best.options)}")
        lines.append(f"train with it:   python -m raycon.pretrain --config {folder / record.BEST}")
    if any(s not in ENDED for s in states):
        lines.append(f"go on with:      python -m raycon.tuning.sweep --resume {folder}")
    lines.append(f"see the report:  python -m webbrowser {page.as_uri()}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if best is not None or any(s not in ENDED for s in states) else 1


if __name__ == "__main__":
    sys.exit(main())
