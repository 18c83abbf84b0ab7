"""The report of a run, finished or not, and a page that compares several: one HTML file that opens offline.

python -m raycon.report RUN_DIR                 write RUN_DIR/report.html (again)
python -m raycon.report RUN_DIR RUN_DIR ...     write a page that compares them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raycon.core import program
from raycon.core.address import fetched
from raycon.core.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 written, 1 the page could not be written, 2 the request was wrong."""
    return program.run("raycon.report", answer, arguments)


def answer(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m raycon.report",
        description="Write the report of a run, or with several runs a page that compares them. Opens offline.",
        epilog=program.HINT,
    )
    parser.add_argument("run_dir", nargs="+", help="a run directory (with config.yaml, metrics.jsonl, ...)")
    parser.add_argument(
        "--out", type=Path, help="of several runs: the page (default: comparison.html beside the first run)"
    )
    parser.add_argument("--rows", type=int, default=0, help="images to embed for map, clusters and neighbours")
    parser.add_argument("--light", action="store_true", help="without the pictures that need the checkpoint")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="of one run: map, clusters, positives, ... as PNG"
    )
    asked = parser.parse_args(arguments)
    asked.run_dir = [fetched(place) for place in asked.run_dir]
    problems = [
        f"{folder} is not a run directory (no {' nor '.join(_SIGNS)} in it): give one that raycon.pretrain made"
        for folder in asked.run_dir
        if not any((folder / sign).is_file() for sign in _SIGNS)
    ]
    if asked.rows < 0 or 0 < asked.rows < 30:
        problems.append(f"--rows {asked.rows}: give 30 or more (0: as many as are quick)")
    if asked.rows > MOST_ROWS:
        problems.append(f"--rows {asked.rows}: give at most {MOST_ROWS:,}, a page of more is too large to open")
    if asked.out is not None and len(asked.run_dir) == 1:
        problems.append("--out is for several runs; the report of one run is its report.html")
    if asked.pictures is not None and (len(asked.run_dir) > 1 or asked.light):
        problems.append("--pictures is for one run, and not with --light")
    if asked.out is not None and asked.out.is_dir():
        problems.append(f"--out {asked.out} is a directory: give a file name")
    if problems:
        raise ConfigError(problems)
    from raycon import report

    if len(asked.run_dir) == 1:
        file = report.write(asked.run_dir[0], gather=not asked.light, rows=asked.rows)
        if asked.pictures is not None:
            save_pictures(asked.run_dir[0], asked.pictures)
    else:
        file = report.compare(asked.run_dir, asked.out or asked.run_dir[0].resolve().parent / "comparison.html")
    sys.stdout.write(f"{file.resolve()}\n")
    return 0


def save_pictures(run_dir: Path, folder: Path) -> None:
    """Write a PNG per picture panel. Raises ValueError when the run has none."""
    from raycon.report import board

    pictures = board.read(run_dir).pictures
    if not pictures:
        raise ValueError(f"{run_dir} has no pictures: the note at the top of its report says why")
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        file = folder / (name.removeprefix("report/").replace("/", "-").replace(" ", "-") + ".png")
        file.write_bytes(png)
        sys.stdout.write(f"{file.resolve()}\n")


MOST_ROWS = 20_000
_SIGNS = ("config.yaml", "metrics.jsonl")


if __name__ == "__main__":
    sys.exit(main())
