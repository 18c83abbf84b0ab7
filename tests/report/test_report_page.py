"""The report page: parsed, complete, self-contained, safe, and written whatever the state of the run."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from raycon import report
from raycon.core.config import RunConfig, save_yaml
from raycon.nn import pictures
from raycon.report import charts, comparison, curves, page
from raycon.report.__main__ import main

SECTIONS = {
    "headline",
    "evaluations",
    "losses",
    "learning-rate",
    "clusters",
    "health",
    "speed",
    "views",
    "config",
    "environment",
    "command",
}
EVIL = "<script>alert('&')</script>"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and a check that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    def charts(self) -> dict[str, dict[str, object]]:
        """The points of each chart by the name in its picture's label."""
        found: dict[str, dict[str, object]] = {}
        figure: dict[str, object] | None = None
        for tag, attributes in self.tags:
            if tag == "figure":
                figure = json.loads(attributes["data-chart"]) if "data-chart" in attributes else None
            elif tag == "svg" and figure is not None:
                found[attributes["aria-label"].split(".")[0]] = figure
        return found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run <1>"
    (folder / "pictures").mkdir(parents=True)
    save_yaml(RunConfig(recipe=EVIL), folder / "config.yaml")
    lines: list[dict[str, object]] = [{"kind": "start", "step": 0, "steps": 100}]
    for step in range(1, 101):
        lines.append(
            {"kind": "train", "step": step, "epoch": (step - 1) // 25, "steps": 100, "epochs": 4, "time": 1e9 + step}
            | {"loss": 9.0 / step, "loss/instance": 5.0 / step, "loss/prototype": 4.0 / step, "lr": 0.1}
            | {"health/std": 0.5, "health/effective_rank": 10.0, "images_per_s": 100.0, "accuracy": 3.0}
            | {"time/step": 0.2, "time/data": 0.1, "time/mining": 0.05, "mining/version": 1}
            | {"ranks/slowest": int(step % 4 == 0), "ranks/slowest_s": 0.2, "ranks/median_s": 0.1}
        )
    lines.append({"kind": "train", "step": 50, "epoch": 1, "loss": math.nan})  # a step made again after a resume
    for step, used, largest in ((25, 5, 7), (50, 4, 9)):
        lines.append({"kind": "snapshot", "step": step, "epoch": step // 25, "version": step // 25, "seconds": 2.0}
                     | {"embed_seconds": 0.5, "index/kmeans_seconds": 1.0, "index/0/used": used, "index/0/empty": 0}
                     | {"clusters/0/sizes_histogram": [[1, 2], [largest, 3]]})  # fmt: skip
    lines.append({"kind": "event", "step": 30, "text": EVIL})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    evaluations = [
        {"step": 0, "epoch": 0, "checkpoint": "", "control": "pixels", "results": {"knn/top1_k1": 70.0}, "failed": {}},
        {"step": 50, "epoch": 2, "checkpoint": "50", "results": {"knn/top1_k1": 80.5}, "failed": {}},
        {"step": 100, "epoch": 4, "checkpoint": "100", "results": {"knn/top1_k1": 88.25, "linear/failed": 1.0}}
        | {"failed": {"linear": EVIL}},
    ]
    (folder / "evaluations.json").write_text(json.dumps(evaluations))
    (folder / "environment.json").write_text(json.dumps({"torch": "9.9.9", "gpu": {"name": EVIL}}))
    (folder / "command.txt").write_text(f"python -m raycon.pretrain '{EVIL}'\n")
    (folder / "pictures" / "views.png").write_bytes(pictures.view_grid([torch.rand(4, 1, 8, 8)] * 2))
    return folder


def test_whole_page(run_dir: Path) -> None:
    file = report.write(run_dir)
    assert file == run_dir / "report.html"
    text = file.read_text(encoding="utf-8")
    read = Page(text)
    assert {a["id"] for t, a in read.tags if t == "section"} == SECTIONS
    assert len(text) < 10_000_000
    shown = " ".join(" ".join(read.words).split())
    assert "88.2" in shown
    assert "pixels 70.0" in shown
    assert "9.9.9" in shown
    assert "finished" in shown
    assert "You are data bound: 50% of a step" in shown
    for tag, attributes in read.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]
            assert attributes["src"].startswith("data:image/png;base64,")
    assert [p.name for p in run_dir.iterdir() if p.name.startswith(".")] == []


def test_charts_hold_the_numbers(run_dir: Path) -> None:
    drawn = Page(report.write(run_dir).read_text(encoding="utf-8")).charts()
    loss = drawn["loss"]["series"][0]["at"]  # type: ignore[index]
    assert [x for x, _ in loss] == [s for s in range(1, 101) if s != 50]  # the step made again has no finite loss
    assert dict(map(tuple, loss))[90] == pytest.approx(0.1)
    assert set(drawn["loss"]["axes"]) == {"lin", "log"}  # type: ignore[call-overload]
    assert [s["name"] for s in drawn["parts of the loss"]["series"]] == ["instance", "prototype"]  # type: ignore[attr-defined]
    split = {s["name"]: s["at"][0][1] for s in drawn["time of a step"]["series"]}  # type: ignore[attr-defined]
    assert split == {"waiting for data": 100.0, "the rest of the step": 100.0}
    sizes = {s["name"]: s["at"] for s in drawn["clustering 0: sizes over the run"]["series"]}  # type: ignore[attr-defined]
    assert sizes["largest"] == sizes["largest tenth"] == sizes["median"] == [[25, 7], [50, 9]]
    assert sizes["smallest"] == [[25, 1], [50, 1]]
    mined = {s["name"]: s["at"][0][1] for s in drawn["time of a snapshot"]["series"]}  # type: ignore[attr-defined]
    assert mined == {"embedding": 0.5, "k-means": 1.0, "sending and waiting": 0.5}
    ranks = {s["name"]: s["at"][0][1] for s in drawn["time to a batch (slowest: rank 0, 75%)"]["series"]}  # type: ignore[attr-defined]
    assert ranks == {"slowest rank": 200.0, "median rank": 100.0}
    wanted = {"accuracy", "learning rate", "used", "knn: accuracy", "effective rank of the features"}
    assert wanted <= set(drawn)
    # Names, versions and what never changes are no curves.
    assert not {"mining/version", "ranks/slowest", "empty"} & set(drawn)


def test_shares_of_a_step_and_the_last_snapshot_in_words(run_dir: Path) -> None:
    read = Page(report.write(run_dir).read_text(encoding="utf-8"))
    bars = [a["aria-label"] for t, a in read.tags if t == "div" and a.get("class") == "pieces"]
    assert (
        "where the time goes, per step: waiting for data 100 ms; the rest of the step 100 ms; mining, per step 50 ms"
        in bars
    )
    assert "time of the last snapshot: embedding 500 ms; k-means 1.0 s; sending and waiting 500 ms" in bars
    words = " ".join(" ".join(read.words).split())
    assert "mining, per step 50 ms 20%" in words
    assert "The last of 2 snapshots, at step 50, which took 2.0 s." in words
    assert "clustering median size used empty 0 9 4 0" in words


def test_a_peak_does_not_flatten_the_rest() -> None:
    at = [(float(i), 1000.0 if i == 7 else 10.0) for i in range(100)]
    drawn = charts.stacked_chart("t", [charts.Series("a", at), charts.Series("b", [(x, 5.0) for x, _ in at])], "step")
    assert "1 peak cut, up to 1005" in drawn
    data = json.loads(html.unescape(re.findall('data-chart="([^"]*)"', drawn)[0]))
    assert 15 < data["axes"]["lin"][1] < 30
    assert data["series"][0]["at"][7] == [7, 1000]  # hovering still tells it
    calm = charts.stacked_chart("t", [charts.Series("a", [(0.0, 1.0), (1.0, 2.0)])], "step")
    assert "cut" not in calm


def test_nothing_from_elsewhere(run_dir: Path) -> None:
    text = report.write(run_dir).read_text(encoding="utf-8")
    assert re.findall(r"https?://", text) == []
    assert "default-src 'none'" in text
    for _, attributes in Page(text).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_html_in_values_is_text(run_dir: Path) -> None:
    text = report.write(run_dir).read_text(encoding="utf-8")
    assert EVIL not in text
    read = Page(text)
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    # As text: recipe, event, failure, environment and command.
    assert " ".join(read.words).count(EVIL) == 5


def test_empty_run(tmp_path: Path) -> None:
    read = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert {a["id"] for t, a in read.tags if t == "section"} == SECTIONS
    assert "svg" not in {tag for tag, _ in read.tags}


def test_broken_files_become_notes(tmp_path: Path) -> None:
    (tmp_path / "evaluations.json").write_text("[{")
    (tmp_path / "environment.json").write_text("3")
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": "x"}\n3\nnot json\n')
    (tmp_path / "pictures").mkdir()
    words = " ".join(Page(report.write(tmp_path).read_text(encoding="utf-8")).words)
    assert "evaluations.json could not be read" in words
    assert "config.yaml could not be read" in words


def test_evaluations_from_the_metrics_when_there_is_no_file(run_dir: Path) -> None:
    (run_dir / "evaluations.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n{"kind": "evaluation", "step": 100, "epoch": 4, "time": 1.5, "linear/top1": 61.5}\n')
    assert page.read(run_dir).evaluations == [
        {"step": 100, "epoch": 4, "control": None, "results": {"linear/top1": 61.5}}
    ]
    assert "61.5" in report.write(run_dir).read_text(encoding="utf-8")


def test_large_pictures_are_left_out(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_PAGE_BYTES", 100)
    read = Page(report.write(run_dir).read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in read.tags}
    assert "views.png is left out" in " ".join(read.words)


def test_program(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str((run_dir / "report.html").resolve())
    assert main([str(run_dir / "nowhere"), str(run_dir / "nor here"), "--rows", "3"]) == 2
    said = capsys.readouterr().err
    assert "nowhere is not a run directory" in said
    assert "nor here is not a run directory" in said
    assert "--rows 3: give 30 or more" in said


def test_schedules_are_those_of_the_method(run_dir: Path) -> None:
    import yaml

    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["method"] |= {"momentum": 0.9, "momentum_schedule": "cosine", "temperature": 0.25}
    tree["method"] |= {"teacher_temperature": 0.07, "teacher_temperature_start": 0.03, "teacher_temperature_epochs": 2}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    text = report.write(run_dir).read_text(encoding="utf-8")
    charts = Page(text).charts()
    momentum = dict(map(tuple, charts["momentum of the teacher"]["series"][0]["at"]))  # type: ignore[index]
    assert momentum[50] == pytest.approx(1 - 0.1 * (math.cos(math.pi * 50 / 100) + 1) / 2, abs=1e-3)
    target = charts["temperature of the targets"]["series"][0]["at"]  # type: ignore[index]
    assert target == [[0, 0.03], [50, 0.07], [100, 0.07]]
    assert "temperature of the similarities 0.25" in " ".join(Page(text).words)


def test_several_runs_are_compared(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    import yaml

    other = tmp_path / "b" / "run <1>"
    shutil.copytree(run_dir, other)
    tree = yaml.safe_load((other / "config.yaml").read_text())
    tree["train"]["lr"], tree["method"]["new"] = 0.5, EVIL
    (other / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = (other / "metrics.jsonl").read_text().replace("9.0", "9.0").splitlines()
    (other / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if '"step": 100' not in line))
    file = tmp_path / "out" / "c.html"
    assert main([str(run_dir), str(other), "--out", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    text = file.read_text(encoding="utf-8")
    read = Page(text)
    shown = " ".join(" ".join(read.words).split())
    assert comparison.differences([page.read(run_dir), page.read(other)]) == {
        "train.lr": [0.03, 0.5],
        "method.new": [None, EVIL],
    }
    assert "train.lr 0.03 0.5" in shown
    assert EVIL not in text
    loss = read.charts()["loss"]["series"]
    names = [s["name"] for s in loss]  # type: ignore[attr-defined]
    assert len(set(names)) == 2
    assert [s["at"][-1][0] for s in loss] == [100, 99]  # type: ignore[attr-defined]
    assert re.findall(r"https?://", text) == []
    with pytest.raises(ValueError, match=r"no run directory: .*nowhere"):
        comparison.compare([run_dir, tmp_path / "nowhere"], file)


def test_names_of_runs_tell_them_apart() -> None:
    assert comparison.labels([Path("/a/x/r"), Path("/a/y/r")]) == ["x/r", "y/r"]
    assert comparison.labels([Path("/a/p"), Path("/a/q")]) == ["p", "q"]
    assert comparison.labels([Path("/a/p"), Path("/a/p")]) == ["p", "p (2)"]


def test_advice_names_what_costs() -> None:
    def line(**parts: float) -> dict[str, float]:
        return {"time/step": 1.0, **{f"time/{k}": v for k, v in parts.items()}}

    names = ["time/data", "time/augment", "time/forward", "time/backward", "time/communication"]
    base = dict.fromkeys((n.removeprefix("time/") for n in names), 0.1)
    quiet = curves.advice_on(curves.shares_of([line(**base)], names))
    assert "10% of a step is waiting" in quiet
    assert "(20% forward and backward, 0% loss)" in quiet
    for part, words in (
        ("data", "data bound: 60%"),
        ("augment", "bound by augmentation: 60%"),
        ("communication", "network bound: 60%"),
    ):
        said = curves.advice_on(curves.shares_of([line(**{**base, part: 0.6})] * 3, names))
        assert words in said
        assert "warn" in said
    mined = curves.shares_of([line(**base), line(**base, mining=2.0)], names)
    assert mined["mining"] == pytest.approx(2 / 4)
    assert "bound by mining: 50% of the time" in curves.advice_on(mined)
