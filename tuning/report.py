"""The page of a sweep: one self-contained HTML file. ``python -m raycon.tuning.report DIR`` writes it (again)."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import raycon
from raycon.core.config import ConfigError
from raycon.core.log import read_lines
from raycon.report.charts import Series, line_chart
from raycon.report.template import SCRIPT, STYLE

from . import figures, record
from .importance import LEAST_TRIALS, Marginal, marginals
from .record import Plan, Trial, best_of
from .watch import short, steps_trained

_CELL = {"run directory": " style='white-space:nowrap'", "error": " class='wide' style='min-width:16em'"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m raycon.tuning.report", description="Write the report of sweeps.")
    parser.add_argument("dir", nargs="+", type=Path, help="the directory of a sweep, finished or not")
    for folder in parser.parse_args(argv).dir:
        try:
            sys.stdout.write(f"{write(folder)}\n")
        except (ConfigError, OSError) as error:
            sys.stderr.write(f"raycon.tuning.report: {error}\n")
            return 2
    return 0


def write(folder: Path) -> Path:
    """Write ``report.html`` into the directory of a sweep and return its path. Raises ConfigError when it is none."""
    folder = folder.expanduser().absolute()
    plan = record.open_plan(folder)
    page = render(folder, plan, record.read_trials(folder, plan.study))
    file = folder / "report.html"
    temporary = folder / f".report.html.{os.getpid()}"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, file)
    return file


def render(folder: Path, plan: Plan, trials: Mapping[int, Trial]) -> str:
    study, best = plan.study, best_of(trials, plan.study.mode)
    at, compared = common_scores(trials)
    found = marginals(study.space, [trials[n].options for n in compared], list(compared.values()))
    sections = [
        ("best", "Best configuration", _best(folder, plan, best)),
        ("trials", "Trials", _table(plan, trials, best)),
        ("curves", "Scores over the epochs", _curves(plan, trials)),
        ("parallel", "Parallel coordinates", _parallel(plan, trials, best)),
        ("responses", "Response to each option", _responses(plan, trials, at, compared, found)),
        ("importance", "Importance of each option", _importance(at, compared, found)),
        ("cost", "Cost", _cost(folder, plan, trials)),
        ("settings", "Settings", _settings(plan)),
    ]
    links = "".join(f'<a href="#{name}">{head}</a>' for name, head, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{head}</h2>{text}</section>'
        for name, head, text in sections
    )
    title = f"{plan.name}: {folder.name}"
    states = [t.state for t in trials.values()]
    counts = " · ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    base = study.base
    about = f"{base.method.name} · {base.model.encoder} · {base.data.name} · {study.searcher} · {study.scheduler} · {counts}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} - raycon</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f'<body data-per-epoch="0"><header><h1>{escape(title)}</h1><p class="soft">{escape(about)}</p>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<footer>Written {escape(when)} by raycon {escape(raycon.__version__)}</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def common_scores(trials: Mapping[int, Trial]) -> tuple[int, dict[int, float]]:
    """(E, score of each trial after E epochs) for the last E after which all trials with any score had one.

    Trials that were stopped early have no later scores: comparing last scores would mix up options and epochs.
    Trials whose options changed (PBT) are left out.
    """
    scored = {n: t for n, t in trials.items() if t.scores and len(t.history) <= 1}
    if not scored:
        return 0, {}
    common = set.intersection(*(set(t.scores) for t in scored.values()))
    if not common:
        return 0, {}
    at = max(common)
    return at, {n: t.scores[at] for n, t in scored.items()}


def _best(folder: Path, plan: Plan, best: Trial | None) -> str:
    if best is None:
        return '<p class="soft">No trial has a score yet.</p>'
    study = plan.study
    options = "".join(
        f"<tr><td>{escape(k)}</td><td class='n'>{escape(short(v))}</td></tr>" for k, v in best.options.items()
    )
    whole = "" if best.state == "finished" else f" It was {best.state} after {best.epoch} epochs."
    changed = ""
    if len(best.history) > 1:
        steps = "; ".join(f"from epoch {e}: {figures.words(o)}" for e, o in best.history)
        changed = f"<p>Its options changed while it trained: {escape(steps)}. The file has the last ones.</p>"
    command = f"python -m raycon.pretrain --config {folder / record.BEST}"
    return (
        f'<div class="cards"><div class="card"><div class="what">{escape(study.metric)}, on validation images</div>'
        f'<div class="number">{best.score:.2f}</div><div class="more">trial {best.number}</div></div></div>'
        f'<p class="soft">The best last score of the trials that trained to the end.{whole}</p>{changed}'
        f'<div class="box"><table><tbody>{options}</tbody></table></div>'
        f'<pre>{escape(command)}</pre><button type="button" class="copy">copy</button>'
    )


def _table(plan: Plan, trials: Mapping[int, Trial], best: Trial | None) -> str:
    names = list(plan.study.space)
    heads = ["trial", "state", "epochs", plan.study.metric, *names, "minutes", "retries", "run directory", "error"]
    numeric = {"trial", "epochs", plan.study.metric, *names, "minutes", "retries"}
    head = "".join(
        f"<th{' class=n' if h in numeric else ''}><button type='button'>{escape(h)}</button></th>" for h in heads
    )
    rows = []
    for trial in trials.values():
        cells = [str(trial.number), trial.state, str(trial.epoch), "" if trial.score is None else f"{trial.score:.2f}"]
        cells += [short(trial.options[n]) if n in trial.options else "" for n in names]
        cells += [f"{trial.seconds / 60:.1f}", str(trial.retries), trial.folder, trial.error]
        mark = ' class="best"' if trial is best else ""
        rows.append(
            f"<tr{mark}>"
            + "".join(
                f"<td{_CELL.get(h, ' class=n' if h in numeric else '')}>{escape(c)}</td>"
                for h, c in zip(heads, cells, strict=True)
            )
            + "</tr>"
        )
    return (
        f'<div class="box scroll"><table class="sort"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        '</table></div><p class="soft">The score is the last one of a trial; a click on a heading sorts.</p>'
    )


def _curves(plan: Plan, trials: Mapping[int, Trial]) -> str:
    series = [Series(f"trial {t.number}", sorted(t.scores.items())) for t in trials.values() if t.scores]
    drawn = line_chart(plan.study.metric, series, "epochs trained", "")
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="soft">No score yet.</p>'


def _parallel(plan: Plan, trials: Mapping[int, Trial], best: Trial | None) -> str:
    study = plan.study
    drawn = figures.parallel(study.space, list(trials.values()), study.metric, study.mode, best)
    return drawn or '<p class="soft">No score yet.</p>'


def _responses(
    plan: Plan, trials: Mapping[int, Trial], at: int, compared: Mapping[int, float], found: Mapping[str, Marginal]
) -> str:
    study = plan.study
    drawn = "".join(
        figures.response(name, domain, list(trials.values()), study.metric, compared, found.get(name))
        for name, domain in study.space.items()
    )
    if not drawn:
        return '<p class="soft">No score yet.</p>'
    note = "Filled dots: last scores of trials that trained to the end; rings: those of the others."
    if found:
        note = (
            f"Rings: scores of {len(compared)} trials after {_epochs(at)}, the last that all of them reached. Line and band: mean "
            "and one standard deviation, over the trees of a random forest fitted to the rings, with the other options "
            "averaged out. The band is what the trials leave open, not the noise of training again with another seed. "
            "Dots joined to their rings: last scores, filled where a trial trained to the end."
        )
    return f'<div class="charts">{drawn}</div><p class="soft">{note}</p>'


def _importance(at: int, compared: Mapping[int, float], found: Mapping[str, Marginal]) -> str:
    if not found:
        return (
            f'<p class="soft">Nothing to say: it takes {LEAST_TRIALS} trials with different scores after the same number '
            "of epochs.</p>"
        )
    drawn = figures.bars("share of the variance", {n: (m.importance, m.uncertainty) for n, m in found.items()})
    note = (
        f"fANOVA: the share of the variance of the score after {_epochs(at)}, over the whole space, that each option alone "
        f"explains, by a random forest on {len(compared)} trials; the whisker is one standard deviation over its trees. "
        "What is missing to 100 % is interactions."
    )
    return f'<div class="charts">{drawn}</div><p class="soft">{note}</p>'


def cost(folder: Path, plan: Plan, trials: Mapping[int, Trial]) -> dict[str, float]:
    """epochs: trained; whole: epochs had all started trials trained to their end; wall_s; trial_s; at_once."""
    trained = whole = 0.0
    for trial in trials.values():
        if not trial.options:
            continue
        epochs = trial.options.get("train.epochs", plan.study.base.train.epochs)
        whole += epochs
        for run_dir in (folder / record.FOLDER).glob(f"{trial.number:04d}-{plan.token}*"):
            steps, all_steps = steps_trained(run_dir)
            trained += epochs * steps / all_steps if all_steps else 0.0
    wall, at_once, first, last = 0.0, 0, None, None
    for line in read_lines(folder / record.TRIALS):
        if line.get("event") == "session":
            wall += (last - first) if first is not None and last is not None else 0.0
            first, at_once = line["time"], max(at_once, line.get("at_once", 0))
        last = line.get("time", last)
    wall += (last - first) if first is not None and last is not None else 0.0
    return {
        "epochs": trained,
        "whole": whole,
        "wall_s": wall,
        "trial_s": sum(t.seconds for t in trials.values()),
        "at_once": at_once,
    }


def _cost(folder: Path, plan: Plan, trials: Mapping[int, Trial]) -> str:
    found = cost(folder, plan, trials)
    share = found["epochs"] / found["whole"] if found["whole"] else 0.0
    cards = [
        ("Epochs trained", f"{found['epochs']:.1f}", f"of {found['whole']:.0f} had every trial trained to its end"),
        ("Share", f"{share:.0%}", "of training all trials to the end"),
        ("Wall time", _clock(found["wall_s"]), f"{found['at_once']:.0f} trials at once at most"),
        ("Time of all trials", _clock(found["trial_s"]), "start to end, their starts included"),
    ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="what">{w}</div><div class="number">{n}</div><div class="more">{m}</div></div>'
            for w, n, m in cards
        )
        + "</div>"
    )


def _epochs(number: int) -> str:
    return f"{number} epoch" if number == 1 else f"{number} epochs"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _settings(plan: Plan) -> str:
    study = plan.study
    space = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in study.space.items())
    fields = ("metric", "mode", "searcher", "scheduler", "trials", "every_epochs", "grace_epochs", "reduction", "validation", "retries")  # fmt: skip
    rows = "".join(f"<tr><td>{f}</td><td>{escape(str(getattr(study, f)))}</td></tr>" for f in fields)
    return (
        f'<div class="settings"><div class="box"><h3>Space</h3><table><tbody>{space}</tbody></table></div>'
        f'<div class="box"><h3>Search</h3><table><tbody>{rows}</tbody></table></div></div>'
        f'<p class="soft">The base configuration is in {record.SETTINGS}; each trial has its own config.yaml.</p>'
    )


if __name__ == "__main__":
    sys.exit(main())
