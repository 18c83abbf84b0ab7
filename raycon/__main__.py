"""``python -m raycon [WHAT ...]``: what there is, one line each: programs, recipes, methods, evaluations, data sets.

Reads the first lines of the files' descriptions and imports none of them, so it answers at once.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import raycon

_PROGRAM_NAME = re.compile(r"^``?python -m [^`]*``?:\s*")


def main(arguments: list[str] | None = None) -> int:
    """The program. Returns the exit status: 0 listed, 2 there is no such list."""
    parser = argparse.ArgumentParser(prog="python -m raycon", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"lists to show: {', '.join(LISTS)}; none: all")
    asked = parser.parse_args(arguments).what
    if unknown := [name for name in asked if name not in LISTS]:
        sys.stderr.write(f"raycon: no list {', '.join(unknown)}; there are {', '.join(LISTS)}\n")
        return 2
    width = shutil.get_terminal_size((110, 24)).columns if sys.stdout.isatty() else 0
    lines = [f"raycon {raycon.__version__}: contrastive pretraining of image encoders"]
    for name in asked or LISTS:
        head, entries = LISTS[name]
        lines += ["", f"{name.capitalize()} ({head})"]
        found = entries()
        column = max((len(entry) for entry in found), default=0)
        for entry, text in found.items():
            line = f"  {entry:{column}}  {text}".rstrip()
            lines.append(line if not width or len(line) <= width else line[: width - 1] + "…")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def programs() -> dict[str, str]:
    """Every module that can be run, by its name after ``python -m``."""
    found = {"raycon": "this list"}
    package = Path(raycon.__file__).parent
    files = [f for f in sorted(package.glob("[!_]*.py")) if _runs(f)]
    found |= {f"raycon.{file.stem}": summary(file) for file in files}
    found |= {f"raycon.{file.parent.name}": summary(file) for file in sorted(package.glob("*/__main__.py"))}
    for part in ("tuning", "cluster", "data_loaders"):
        files = [f for f in sorted(_folder(part).glob("[!_]*.py")) if _runs(f)]
        found |= {f"raycon.{part}.{file.stem}": summary(file) for file in files}
    return dict(sorted(found.items()))


def recipes() -> dict[str, str]:
    """Every recipe with the first line of its description."""
    from raycon import recipes as there

    return {name: there.first_line(name) for name in there.recipes()}


def methods() -> dict[str, str]:
    from raycon import methods as there

    return {name: summary(_folder("methods") / f"{name}.py") for name in there.names()}


def evaluations() -> dict[str, str]:
    from raycon import evals

    presets: dict[str, list[str]] = {}  # "linear:pcl" is a preset of "linear"
    for name in evals.names():
        presets.setdefault(name.partition(":")[0], []).append(name.partition(":")[2])
    return {
        name: summary(_folder("evals") / f"{name}.py") + (f"; presets :{', :'.join(more[1:])}" if more[1:] else "")
        for name, more in presets.items()
    }


def data_sets() -> dict[str, str]:
    files = sorted((_folder("data_loaders") / "datasets").glob("[!_]*.py"))
    found = {file.stem.replace("_", "-"): summary(file) for file in files}
    return {name: text.removeprefix(f"{name}: ") for name, text in found.items()}


LISTS: dict[str, tuple[str, Callable[[], dict[str, str]]]] = {
    "programs": ("python -m NAME --help", programs),
    "recipes": ("python -m raycon.pretrain RECIPE", recipes),
    "methods": ("--method.* of a recipe; docs/methods.md", methods),
    "evaluations": ("--evals.names", evaluations),
    "data-sets": ("--data.name", data_sets),
}


def summary(file: Path) -> str:
    """The first sentence or line of a file's description, without running the file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    first = _PROGRAM_NAME.sub("", first)
    for end in re.finditer(r"(?<=[a-z0-9)`])(?<!et al)(?<!e\.g)[.;] |:$|\.$", first):
        sentence = first[: end.start()]
        if sentence.count("(") == sentence.count(")"):
            return sentence
    return first


def _folder(name: str) -> Path:
    return next(Path(place) / name for place in raycon.__path__ if (Path(place) / name).is_dir())


def _runs(file: Path) -> bool:
    return 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
