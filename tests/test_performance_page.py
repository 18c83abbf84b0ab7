"""The page of measured figures is written from the rows, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as program


def test_page_shows_what_was_measured_and_what_was_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    row = {"claim": "a | b", "ours": 1.0, "other": 2.0, "ratio": 0.5, "target": "<= 0.4", "holds": False, "floor": None}
    shown = row | {"claim": "figure", "target": "", "holds": True, "floor": 0.123456, "spread": [0.25, 0.75001]}
    kept = {"date": "2026-01-02", "python": "3.11", "cpu": "CPU", "cores": 2, "gpu": "", "versions": {"torch": "9"}}
    (tmp_path / "losses.json").write_text(json.dumps(kept | {"quick": True, "seconds": 3, "rows": [row, shown]}))
    text = program.page()
    assert "Targets missed: 1." in text
    assert "- losses: a | b (0.5, target <= 0.4)" in text
    assert "| a \\| b | 1 | 2 | 0.5 |  | <= 0.4 | **no** |  |" in text
    assert "| figure | 1 | 2 | 0.5 | 0.25 .. 0.75 |  |  | 0.1235 |" in text
    assert "`python -m benchmarks.losses --quick`, 2026-01-02, 3 s on CPU, 2 cores; Python 3.11, torch 9." in text


def test_committed_page_is_that_of_the_committed_rows() -> None:
    if not program.RESULTS.exists():
        pytest.skip("nothing measured yet")
    assert program.PAGE.read_text(encoding="utf-8") == program.page()


def test_every_benchmark_has_a_title() -> None:
    assert {"data", "index", "losses", "training"} <= set(program.names())
    assert all(len(program.title(name)) > 10 for name in program.names())
    assert set(program.names()) - set(program.by_itself()) == {"soak"}


def test_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["nonsense"])
    assert stop.value.code == 2
    assert "nonsense" in capsys.readouterr().err
