"""The documentation: every ``sh`` block runs, every link leads somewhere, every option and program named exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from raycon import __main__ as lister
from raycon import methods
from raycon.core.config import RunConfig, flatten, to_dict

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"", "sh", "console", "python", "yaml", "json", "text", "toml", "sql"}
"""Of fenced blocks. ``sh`` is executed; ``console`` needs a cluster, data that is not here, or time."""
SECONDS = 600
"""Most that one page may take, on a machine with other work."""
_FENCE = re.compile(r"^```(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)


def named(pages: list[Path]) -> list[object]:
    """Pages as parameters; those with blocks to run on Ray marked so."""
    found = []
    for page in pages:
        run = "".join(b.text for b in blocks(page) if b.language == "sh")
        marks = [pytest.mark.slow]
        if re.search(r"raycon\.(pretrain (?!.*--(runtime local|help))|tuning\.sweep (?!.*--help))|--runtime ray", run):
            marks.append(pytest.mark.ray)
        if run:
            found.append(pytest.param(page, id=page.name, marks=marks))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all pages: a reader goes from page to page, too."""
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("page", named(PAGES))
def test_commands_run(page: Path, folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": "local",
        "WANDB_MODE": "offline",
    }
    for block in blocks(page):
        if block.language != "sh":
            continue
        script = f"set -euo pipefail\n{block.text}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, (
            f"{page.name}:{block.line} ended with {done.returncode}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_say_what_they_are(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("```") % 2 == 0
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language}"
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


def anchors(page: Path) -> set[str]:
    """The names that headings have in a page, as repository hosts make them."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_and_programs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = set(flatten(to_dict(RunConfig())))
    for name in methods.names():
        known |= {f"method.{option}" for option in to_dict(methods.configure(name))}
    groups = {name.partition(".")[0] for name in known if "." in name}
    for option in re.findall(r"(?<![\w-])--(?:no-)?([a-z]+\.[a-z][a-z0-9_-]*)", text):
        assert option.replace("-", "_") in known, f"{page.name}: --{option}"
    # Options in prose, `method.temperature`; files such as `data.yaml` and code such as `data.label` are not meant.
    for option in re.findall(r"`([a-z]+\.[a-z][a-z_]*(?:-[a-z_]+)*)`", text):
        if option.partition(".")[0] in groups - {"data", "model", "log", "run"}:
            assert option.replace("-", "_") in known, f"{page.name}: `{option}`"
    programs = set(lister.programs())
    for program in re.findall(r"python -m (raycon[\w.]*)", text):
        assert program.rstrip(".") in programs, f"{page.name}: python -m {program}"


def test_the_check_of_blocks_itself(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text("# A `b`: c!\ntext\n```sh\necho 1\n```\n```console\nno\n```\n## Two words\n")
    assert [(b.language, b.text, b.line) for b in blocks(page)] == [("sh", "echo 1\n", 3), ("console", "no\n", 6)]
    assert anchors(page) == {"a-b-c", "two-words"}
    assert len(named([page])) == 1
