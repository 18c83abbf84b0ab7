"""The files about the project agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import raycon

ROOT = Path(__file__).parent.parent


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == raycon.__version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    told = {i["value"].removeprefix("arXiv:") for r in citation["references"] for i in r["identifiers"]}
    sources = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "raycon" / "methods").glob("*.py"))
    assert len(told) == 6
    assert all(number in sources for number in told)  # the methods' own files name the same papers


def test_changelog_begins_with_this_version() -> None:
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == raycon.__version__


def test_hooks_are_what_make_checks() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(repo["repo"] == "local" for repo in config["repos"])
    make = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(bin)/", ".venv/bin/")
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].replace(" --force-exclude", "") in make
