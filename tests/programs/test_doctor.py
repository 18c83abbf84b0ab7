"""The doctor: checks that tell the truth, plans that add up, requests that are wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from raycon import doctor
from raycon.index import engine
from raycon.training import cost


def by_name(checks: Iterator[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--fast", "--json"]) == 0
    told = {c["name"]: c for c in json.loads(capsys.readouterr().out)}
    assert {"versions", "machine", "gloo", "faiss", "FFCV", "Ray", "run directory", "/dev/shm", "wandb"} <= set(told)
    import torch

    assert f"torch {torch.__version__.split('+')[0]}" in told["versions"]["text"]
    assert all(c["fix"] for c in told.values() if c["state"] != "ok")


def test_two_faiss_are_bad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine, "faiss_distributions", lambda: ["faiss-cpu", "faiss-gpu"])
    (found,) = doctor.faiss_library()
    assert found.state == "bad"
    assert "pip uninstall -y faiss-cpu faiss-gpu" in found.fix
    monkeypatch.setattr(doctor, "run_checks", lambda fast: iter([found]))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "BAD   faiss" in out
    assert "1 checks: 1 bad" in out


def test_a_check_that_crashes_takes_no_other_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> Any:
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "machine", crash)
    found = list(doctor.run_checks(fast=True))
    (crashed,) = [c for c in found if c.state == "bad"]
    assert "no /proc here" in crashed.text
    assert {"versions", "faiss", "wandb"} <= {c.name for c in found}


def test_full_and_read_only_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type(usage)(100, 99, 1))
    assert {c.state for c in doctor.disks()} == {"note"}
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert {c.state for c in doctor.disks()} == {"bad"}


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise ConnectionError("nobody answers\nmore")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", refuse)
    found = by_name(doctor.ray_cluster())["Ray"]
    assert (found.state, found.text) == ("bad", "RAY_ADDRESS = 127.0.0.1:1: nobody answers")


def counted(*_: Any, world: int) -> cost.Counted:
    values = {"batch": 4, "step_flops": 6e9, "scan_flops": 1e9, "activation_bytes": 1e6, "step_seconds": 0.1}
    values |= {"parameters": 1_000_000, "state_bytes": 4_000_000, "view_bytes": 1000, "world": world}
    return cost.Counted(**values)  # type: ignore[arg-type]


def test_a_plan_in_words_and_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cost, "count", counted)
    arguments = ["--plan", "quickstart", "--gpus", "4", "--images", "1e6", "--shard-gflops", "50"]
    assert doctor.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["world"], told["steps"]) == (1_000_000, 4, 1_000_000 // 128)
    assert told["index"]["rows"] == 1_000_000
    assert told["counted"]["step_flops"] == 6e9
    assert told["assumed"]["index"]["flops"] == 50e9
    assert doctor.main(arguments) == 0
    said = capsys.readouterr().out
    for words in ("Memory of a rank", "gradients (ring all-reduce)", "80 refreshes", "of linear scaling", "Assumed"):
        assert words in said
    assert "6 GFLOP per image" in said
    assert "measured: one thread" not in said
    assert doctor.main(["--plan", "quickstart", "--shard-gflops", "50"]) == 0
    said = capsys.readouterr().out
    assert "a rank sustains 60 GFLOP/s (measured: one thread of this machine)" in said  # 6e9 / 0.1
    assert "batch 128 on 2 ranks" in said


def test_e_steps_scaling_and_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cost, "count", counted)
    arguments = ["--plan", "quickstart", "--gpus", "6", "--images", "1e6", "--train.batch", "384", "--gbit", "10"]
    arguments += ["--shard-gflops", "2", "--mining.shards", "3"]
    assert doctor.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = told["scaling_table"]
    assert [(one["world"], one["batch"]) for one in table] == [(1, 64), (2, 128), (4, 256), (6, 384)]
    one, most = table[0], table[-1]
    # A rank has as many images a step, hence as much to compute; only what is sent differs.
    assert one["compute_seconds"] == most["compute_seconds"]
    assert one["network_seconds"] == 0 < most["exposed_seconds"]
    assert one["steps"] == 1_000_000 // 64
    ideal = most["steps"] * most["epochs"] * most["compute_seconds"] + most["refreshes"] * most["embed_seconds"]
    assert most["scaling"] == pytest.approx(ideal / most["seconds"])
    assert doctor.main(arguments) == 0
    said = capsys.readouterr().out
    # 2 N k D, and per shard k centroids of D float32 out, float64 sums and two counts back.
    assert "one E-step of k = 60: 7.68 GFLOP over all shards, 85.3 MB of features read on each" in said
    assert f"{3 * 60 * 64 * 4 / 1e3:.3g} kB out, {3 * 60 * (64 * 8 + 8) / 1e3:.3g} kB back" in said
    assert "! mining is " in said
    assert "--mining.init warm" in said
    assert "! the network is " in said
    assert re.search(r"^ +6 +384 ", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "quickstrat"], "did you mean 'quickstart'"),
        (["--plan", "quickstart", "--gpus", "3"], "does not divide over 3 ranks"),
        (["--plan", "quickstart", "--gpus", "-1"], "--gpus -1: give 0"),
        (["--plan", "quickstart", "--gbit", "0"], "give numbers above 0"),
        (["--train.epochs", "3"], "dotted options go with --plan"),
        (["--plan", "imagenet-mocov2"], "--images N"),
    ],
)
def test_wrong_requests(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "count", counted)
    assert doctor.main([*arguments, *(["--shard-gflops", "50"] if "--plan" in arguments else [])]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(1.5e9, "1.5 GB"), (12, "12 B"), (3e12, "3 TB")])
def test_sizes(value: float, text: str) -> None:
    assert doctor._size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0123, "12.3 ms"), (90, "90 s"), (7200, "2 h"), (259200, "3 days")])
def test_times(value: float, text: str) -> None:
    assert doctor._time(value) == text
