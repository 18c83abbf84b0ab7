"""Runs registry: list, show, compare and prune run directories.

python -m raycon.runs list [FOLDER ...] [--where KEY=VALUE ...] [--sort KEY] [--columns KEY ...]
python -m raycon.runs show RUN_DIR
python -m raycon.runs compare RUN_DIR RUN_DIR ...
python -m raycon.runs prune [FOLDER ...] --where KEY=VALUE ... [--checkpoints] [--yes]

FOLDER: where runs are, at any depth (default: runs). KEY: a dotted option (method.temperature), a number of the newest
evaluation (knn/top1_k20) or training record (loss), or name, status, method, data, step, epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from raycon.core import program, registry
from raycon.core.address import fetched, is_address
from raycon.core.config import ConfigError
from raycon.core.registry import Run


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 done, 1 something could not be deleted, 2 the request was wrong."""
    return program.run("raycon.runs", answer, argv)


def answer(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    for name in ("folder", "run"):
        given = getattr(options, name, None)
        if options.do is prune and (remote := [place for place in given or () if is_address(place)]):
            raise ConfigError([f"prune {remote[0]}: deletes folders only; delete at an address with its own tools"])
        if given is not None:
            places = [fetched(place, small=True) for place in ([given] if isinstance(given, str) else given)]
            setattr(options, name, places[0] if isinstance(given, str) else places)
    try:
        status: int = options.do(options)
        return status
    except BrokenPipeError:  # the reader of our output has gone (head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m raycon.runs",
        description=__doc__,
        epilog=program.HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = made.add_subparsers(required=True, metavar="list|show|compare|prune")

    def part(name: str, about: str, do: object) -> argparse.ArgumentParser:
        one = parts.add_parser(name, help=about, description=about)
        one.set_defaults(do=do)
        return one

    def selection(one: argparse.ArgumentParser) -> None:
        one.add_argument("folder", nargs="*", default=["runs"], help="default: runs")
        one.add_argument("--where", action="append", default=[], metavar="KEY=VALUE",
                         help="only runs that meet it, with = != < > <= >= or ~ (contains); may be repeated")  # fmt: skip

    table = part("list", "a line per run, the one that changed last first", list_runs)
    selection(table)
    table.add_argument("--sort", default="", metavar="KEY", help="largest first")
    table.add_argument("--ascending", action="store_true", help="smallest first")
    table.add_argument("--columns", nargs="+", default=[], metavar="KEY", help="more columns")
    table.add_argument("--limit", type=int, default=0, help="at most so many")
    table.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    one = part("show", "all about one run", show)
    one.add_argument("run")
    several = part("compare", "options that differ and numbers side by side", compare)
    several.add_argument("run", nargs="+")
    several.add_argument("--json", action="store_true", help="as JSON")
    delete = part(
        "prune", "delete runs, or their older checkpoints; asks first, and never touches a running one", prune
    )
    selection(delete)
    delete.add_argument(
        "--checkpoints", action="store_true", help="keep the runs and delete all checkpoints but the newest"
    )
    delete.add_argument("--yes", action="store_true", help="do not ask")
    return made


# --- list, show, compare ----------------------------------------------------------------------------------------


def selected(options: argparse.Namespace) -> list[Run]:
    return registry.choose(registry.find(options.folder), options.where)


def list_runs(options: argparse.Namespace) -> int:
    if options.limit < 0:
        raise ConfigError([f"--limit {options.limit}: give 1 or more"])
    every = registry.find(options.folder)
    runs = registry.choose(every, options.where)
    known = {k for run in every for k in run.values()}
    if every and (missing := [c for c in options.columns if c not in known]):
        raise ConfigError([registry.unknown_key("--columns", c, known) for c in missing])
    if options.sort:
        runs = registry.order(runs, options.sort, options.ascending)
    runs = runs[: options.limit or None]
    if options.json:
        found = [{"path": str(run.path), "note": run.note, **run.values()} for run in runs]
        sys.stdout.write(json.dumps(found, indent=1, default=str) + "\n")
        return 0
    if not runs:
        sys.stdout.write(f"no runs in {', '.join(map(str, options.folder))}{' that meet it' if every else ''}\n")
        return 0
    own = list(dict.fromkeys(k for k in [options.sort, *options.columns] if k))
    shown = [*_COLUMNS, *_scores(runs, own), *(k for k in own if k not in _COLUMNS)]
    rows = [[registry.text(run.values().get(key)) for key in shown] for run in runs]
    sys.stdout.write(table(shown, rows))
    for run in runs:
        if run.note:
            sys.stdout.write(f"{run.name}: {run.note}\n")
    return 0


_COLUMNS = ("name", "status", "method", "data", "epoch", "epochs", "loss", "changed")


def _scores(runs: Sequence[Run], own: Sequence[str]) -> list[str]:
    """One number per evaluation, so that the table stays narrow: its first top-1 or mAP."""
    firsts: dict[str, str] = {}
    for name in sorted({k for run in runs for k in run.results if "/top1" in k or "/map" in k.lower()}):
        firsts.setdefault(name.split("/")[0], name)
    return [name for name in firsts.values() if name not in own][:3]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text; numbers to the right."""
    widths = [max(len(line[i]) for line in [list(head), *rows]) for i in range(len(head))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), *map(line, rows)]) + "\n"


def _is_number(word: str) -> bool:
    try:
        float(word)
        return True
    except ValueError:
        return word == "-"


def one_run(path: Path) -> Run:
    """The run in a directory. Raises ConfigError when it is none."""
    if not registry.is_run(path):
        raise ConfigError([f"{path}: no run directory; python -m raycon.runs list shows the runs of a folder"])
    return registry.read(path, str(path))


def show(options: argparse.Namespace) -> int:
    run = one_run(options.run)
    state = f"{run.status}, step {run.step} of {run.steps}, changed {run.values()['changed']}"
    lines = [str(run.path), state, *([run.note] if run.note else [])]
    command = run.path / "command.txt"
    if command.is_file():
        lines += ["", "Commands", *("  " + c for c in command.read_text(encoding="utf-8").splitlines())]
    lines += ["", "Options that differ from the recipe" if _recipe(run) else "Options", *_options(run)]
    if run.train:
        numbers = {
            k: v for k, v in run.train.items() if isinstance(v, (int, float)) and k not in ("time", "step", "steps")
        }
        lines += ["", f"Training at step {run.train.get('step')}"]
        lines += [f"  {k:32} {registry.text(v)}" for k, v in numbers.items()]
    if run.evaluations:
        names = sorted({k for e in run.evaluations for k in e["results"]})
        rows = [[str(e.get("step")), *(registry.text(e["results"].get(n)) for n in names)] for e in run.evaluations]
        lines += ["", "Evaluations", *("  " + part for part in table(["step", *names], rows).splitlines())]
    saved = checkpoints(run.path)
    lines += ["", f"Disk: {registry.size(registry.disk(run.path))}, {len(saved)} checkpoints"]
    lines += [f"  checkpoints/{c.name}  {registry.size(registry.disk(c))}" for c in saved]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _recipe(run: Run) -> dict[str, object]:
    """The options of the run's recipe as it is today, {} when there is none of that name."""
    from raycon.core.config import flatten, to_dict
    from raycon.recipes import recipe

    try:
        return flatten(to_dict(recipe(str(run.config.get("recipe", "")))))
    except ConfigError:
        return {}


def _options(run: Run) -> list[str]:
    base = _recipe(run)
    found = {k: v for k, v in run.config.items() if not k.startswith(registry.PLACES) and k != "recipe"}
    if base:
        found = {k: v for k, v in found.items() if k not in base or base[k] != v}
    return [f"  {k:32} {registry.text(v)}" for k, v in found.items()] or ["  none"]


def compare(options: argparse.Namespace) -> int:
    if len(options.run) < 2:
        raise ConfigError(["compare needs two run directories or more"])
    runs = [one_run(path) for path in options.run]
    options_differ = registry.differences(runs)
    names = sorted({k for run in runs for k in run.results})
    numbers = {
        name: [run.values().get(name) for run in runs] for name in ("status", "epoch", "loss", "images_per_s", *names)
    }
    if options.json:
        found = {"runs": [str(r.path) for r in runs], "options": options_differ, "numbers": numbers}
        sys.stdout.write(json.dumps(found, indent=1, default=str) + "\n")
        return 0
    heads = [str(i + 1) for i in range(len(runs))]
    lines = [f"{head}: {run.path}" for head, run in zip(heads, runs, strict=True)]
    for title, values in (("option", options_differ), ("number", numbers)):
        rows = [[key, *map(registry.text, row)] for key, row in values.items()]
        lines += ["", table([title, *heads], rows).rstrip() if rows else "no option differs"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


# --- prune ------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if p.is_dir() and not p.is_symlink())


def prune(options: argparse.Namespace) -> int:
    """Delete what was chosen, after asking, and only what still does not run at that moment."""
    if not options.where and not options.checkpoints:
        raise ConfigError(["prune: say which runs with --where, for instance --where status=failed --where method=pcl"])
    chosen = selected(options)
    for run in chosen:
        if why := _kept(run):
            sys.stdout.write(f"left alone: {run.name} ({why})\n")
    going = [(run, doomed(run, options.checkpoints)) for run in chosen if not _kept(run)]
    going = [(run, folders) for run, folders in going if folders]
    if not going:
        sys.stdout.write("nothing to delete\n")
        return 0
    total = 0
    for run, folders in going:
        count = sum(registry.disk(f) for f in folders)
        total += count
        what = f"{len(folders)} checkpoints of {run.path}" if options.checkpoints else str(run.path)
        sys.stdout.write(f"{registry.size(count):>9}  {run.status:8}  {what}\n")
    if not options.yes and not _agreed(f"delete these, {registry.size(total)} in all? Type yes: "):
        sys.stdout.write("nothing was deleted\n")
        return 0
    failed = deleted = 0
    for run, folders in going:
        now = registry.read(run.path, run.name)
        if why := _kept(now):
            sys.stdout.write(f"left alone: {run.name} ({why} now)\n")
            continue
        for folder in folders:
            try:
                remove(folder)
                deleted += 1
            except OSError as error:
                failed += 1
                sys.stderr.write(f"raycon.runs: {folder}: {error}\n")
    sys.stdout.write(f"deleted {deleted} of {sum(len(f) for _, f in going)} folders\n")
    return 1 if failed else 0


def doomed(run: Run, only_checkpoints: bool) -> list[Path]:
    """What prune would delete of a run: its folder, or its checkpoints but the newest that is complete."""
    if not only_checkpoints:
        return [run.path]
    saved = checkpoints(run.path)
    whole = [c for c in saved if (c / "state.json").is_file()]
    return [c for c in saved if c != whole[-1]] if whole else []


def _kept(run: Run) -> str:
    """Why a run must not be touched; "" when it may."""
    if run.status == "running":
        minutes = (time.time() - run.changed) / 60
        return f"running, or changed {minutes:.0f} minutes ago and not finished"
    return "its configuration cannot be read" if run.status == "unreadable" else ""


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(["prune: there is no terminal to ask on; --yes deletes what is listed above without asking"])
    sys.stdout.write(question)
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() == "yes"


def remove(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that nothing half deleted is taken for a run or a checkpoint."""
    going = folder.with_name(f".deleted-{os.getpid()}-{folder.name}")
    os.replace(folder, going)
    shutil.rmtree(going)


if __name__ == "__main__":
    sys.exit(main())
