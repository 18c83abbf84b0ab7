"""The page of a sweep: it says what the record says, its importances are those of a known function."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from raycon.core.config import save_yaml
from raycon.tuning import report
from raycon.tuning.importance import marginals
from raycon.tuning.record import Record, Trial, best_of, create, new_plan, open_plan, read_trials
from raycon.tuning.space import choice, loguniform, uniform
from raycon.tuning.study import best_config, find
from raycon.tuning.watch import LiveTable, last_step


class Page(HTMLParser):
    """Fails on tags that do not close, and collects what a page loads from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(given[k]) for k in ("src", "href") if given.get(k)]
        self.ids |= {str(given["id"])} if given.get("id") else set()
        if tag not in ("meta", "link", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """A sweep of six trials as it is on disk: two whole ones, two stopped, one failed, one waiting."""
    folder = tmp_path / "my-sweep"
    plan = new_plan("digits-temperature", dataclasses.replace(find("digits-temperature")(), trials=6))
    create(folder, plan)
    book = Record(folder)
    book.write("session", at_once=2)
    outcomes: list[tuple[str, list[float]]] = [
        ("finished", [60, 70, 80, 81]),
        ("stopped", [40]),
        ("finished", [61, 72, 84, 90.25]),
        ("stopped", [50, 51]),
    ]
    for n, (state, scores) in enumerate(outcomes):
        name = f"trials/{n:04d}-{plan.token}"
        options = {"method.temperature": 0.05 * (n + 1), "method.head": ["mlp", "linear"][n % 2]}
        book.write("start", n, options=options, folder=name)
        for epoch, score in enumerate(scores, 1):
            book.write("result", n, epoch=epoch, score=float(score), folder=name)
        book.write("end", n, state=state)
        (folder / name).mkdir()
        lines = [{"kind": "start", "step": 0}, {"kind": "train", "step": 8 * len(scores), "steps": 32}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    book.write("start", 4, options={"method.temperature": 0.9, "method.head": "mlp"}, folder="trials/4")
    book.write("end", 4, state="failed", error="NotFinite: <script>alert(1)</script>")
    return folder


def test_the_page_says_what_happened(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(swept)]) == 0
    file = Path(capsys.readouterr().out.strip())
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert {"best", "trials", "curves", "parallel", "responses", "importance", "cost", "settings"} <= page.ids
    assert all(link.startswith(("#", "data:")) for link in page.loads), page.loads
    assert "<script>alert" not in text
    assert "90.25" in text
    assert "trial 2" in text
    assert "2 finished · 2 stopped · 1 failed · 1 waiting" in text
    # In each of two responses the last scores of 4 trials, and those after epoch 1 of the 3 that trained on.
    responses = text[text.index('id="responses"') : text.index('id="importance"')]
    assert responses.count("<circle") == 2 * (4 + 3)
    assert responses.count("trial 2, finished after 4 epochs: 90.25") == 2
    for name in ("method.temperature", "method.head"):
        assert len(re.findall(re.escape(name), text)) > 5
    # 4 + 1 + 4 + 2 epochs of five started trials of 4 epochs each.
    plan = open_plan(swept)
    found = report.cost(swept, plan, read_trials(swept, plan.study))
    assert (found["epochs"], found["whole"]) == (11, 20)
    assert ">55%<" in text


def test_the_best_is_a_file_that_pretrain_reads(swept: Path) -> None:
    from raycon import pretrain

    plan = open_plan(swept)
    best = best_of(read_trials(swept, plan.study), "max")
    assert best is not None
    save_yaml(best_config(plan.study.base, best.options), swept / "best.yaml")
    config, _ = pretrain.parse(["--config", str(swept / "best.yaml")])
    assert config.method.temperature == pytest.approx(0.15)  # type: ignore[attr-defined]
    assert config.data.validation == 0
    assert config.evals == plan.study.base.evals


def test_a_sweep_that_has_hardly_begun_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path / "s", new_plan("digits-temperature", find("digits-temperature")()))
    Page(report.write(tmp_path / "s").read_text(encoding="utf-8"))
    assert report.main([str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_scores_are_compared_after_equally_many_epochs() -> None:
    trials = {
        0: Trial(0, scores={1: 10.0, 2: 20.0, 3: 30.0}),
        1: Trial(1, scores={1: 11.0, 2: 19.0}),
        2: Trial(2),
        3: Trial(3, scores={2: 5.0}, history=[(0, {}), (1, {"x": 1})]),  # its options changed
    }
    assert report.common_scores(trials) == (2, {0: 20.0, 1: 19.0})
    assert report.common_scores({}) == (0, {})


def test_importances_are_those_of_a_known_function() -> None:
    """f = 3 a + h + 0 b with a, b uniform and h of two values: variances 9/12, 1/4 and 0, so shares 3/4, 1/4, 0."""
    space = {"a": uniform(0, 1), "h": choice("no", "yes"), "b": loguniform(0.1, 10)}
    random = np.random.default_rng(0)
    options = [
        {"a": space["a"].at(u), "h": "yes" if v > 0.5 else "no", "b": space["b"].at(w)}
        for u, v, w in random.random((300, 3))
    ]
    scores = [3 * o["a"] + (o["h"] == "yes") for o in options]
    found = marginals(space, options, scores)
    assert found["a"].importance == pytest.approx(0.75, abs=0.08)
    assert found["h"].importance == pytest.approx(0.25, abs=0.08)
    assert found["b"].importance < 0.02
    # The marginal of a rises by 3, that of h by 1, and around the truth.
    assert found["a"].mean[-1] - found["a"].mean[0] == pytest.approx(3, abs=0.3)
    assert found["a"].values[0] == pytest.approx(0.02)
    assert found["h"].mean[1] - found["h"].mean[0] == pytest.approx(1, abs=0.15)
    few = marginals(space, options[:6], scores[:6])
    assert few["a"].spread.mean() > 3 * found["a"].spread.mean()  # little data: a wide band
    assert marginals(space, options[:3], scores[:3]) == {}
    assert marginals(space, options[:9], [1.0] * 9) == {}


def test_the_live_table_shows_every_trial(swept: Path) -> None:
    from rich.console import Console

    plan = open_plan(swept)
    trials = read_trials(swept, plan.study)
    shown = LiveTable("title", "knn/top1_k20", "max", 4, swept, trials)
    trials[0].state = "running"
    shown.scored(trials[0])
    console = Console(width=160, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(shown._table())
    lines = console.export_text().splitlines()
    rows = {int(m[1]): line for line in lines if (m := re.match(r"\D*(\d+)\D", line)) and "title" not in line}
    assert "90.25" in rows[2]
    assert "best" in rows[2]
    assert "step 32/32" in rows[0]
    assert "failed" in rows[4]
    assert "waiting" in rows[5]
    assert last_step(swept / "nothing.jsonl") is None
