"""``python -m raycon``: everything there is, at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raycon import __main__ as lister
from raycon import evals, methods
from raycon.data_loaders import datasets
from raycon.recipes import recipes


def test_everything_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lister.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = dict(line.split(None, 1) for line in lines if line.startswith("  "))
    wanted = {*recipes(), *methods.names(), *datasets.names(), *(n.partition(":")[0] for n in evals.names())}
    wanted |= {"raycon", "raycon.pretrain", "raycon.report", "raycon.doctor"}
    assert wanted <= set(entries)  # set(entries) has no entry without a text: split gave two parts
    assert not any(len(text) < 5 for text in entries.values())
    presets = [n.partition(":")[2] for n in evals.names() if ":" in n]
    text = "\n".join(lines)
    assert all(f":{preset}" in text for preset in presets)


def test_one_list_and_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert lister.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "  pcl" in out
    assert "quickstart" not in out
    assert lister.main(["method"]) == 2
    assert "no list method; there are programs, recipes, methods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ('"""``python -m x Y``: write it. More."""', "write it"),
        ('"""Pretrain an encoder.\n\nMore."""', "Pretrain an encoder"),
        ('"""A list of e.g.\nthings: a, b; and more"""', "A list of e.g. things: a, b"),
        ('"""X (He et al. 2020). More."""', "X (He et al. 2020)"),
        ('"""X (2020; 2021): y. More."""', "X (2020; 2021): y"),
        ("x = 1", ""),
    ],
)
def test_first_sentence(tmp_path: Path, text: str, first: str) -> None:
    file = tmp_path / "x.py"
    file.write_text(text)
    assert lister.summary(file) == first


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, raycon.__main__ as m; m.main([]); print([n for n in ('torch', 'ray', 'sklearn') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
