"""Runs at an address: on a file system through fsspec, and on a real S3 API over HTTP (moto, on loopback)."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raycon import evaluate, pretrain, runs
from raycon.core import address
from raycon.core.config import ConfigError
from raycon.core.log import read_lines
from raycon.training import checkpoint, loop, storage
from raycon.training.storage import Mirror, Store

pytest.importorskip("fsspec")
PLANTED = "planted-0123456789abcdef0123456789abcdef"
TINY = [
    "quickstart", "--runtime=local", "--data.loader=torch", "--train.epochs=2", "--train.warmup-epochs=0",
    "--method.warmup-epochs=1", "--method.clusters", "20", "--method.negatives=10", "--mining.redo=1", "--mining.iterations=2",
    "--log.every-steps=1", "--evals.names", "knn", "--model.width=8", "--log.report=light", "--log.quiet",
    "--checkpoint.every-epochs=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a bucket of a server on this machine."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'raycon[remote,dev]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'raycon[dev]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import fsspec

        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address that nothing is at yet."""
    top = f"file://{tmp_path}/store" if request.param == "file" else request.getfixturevalue("s3")
    return f"{top}/{request.node.name.split('[')[0]}"


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.WORK, str(tmp_path / "machine"))
    monkeypatch.setattr(storage, "WAITS_S", (0.0, 0.0))


def saved(folder: Path, step: int, evaluate: bool = False) -> Path:
    torch.manual_seed(step)
    module = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return checkpoint.save(folder, module, optimizer, None, {"step": step, "evaluate": evaluate})


def test_checkpoints_go_there_and_come_back(place: str, tmp_path: Path) -> None:
    store = Store(place)
    for step in (1, 2, 3, 4):
        store.send_checkpoint(saved(tmp_path / "here", step, evaluate=step == 2))
    assert store.steps() == ["00000001", "00000002", "00000003", "00000004"]
    path, refused = store.fetch_newest(tmp_path / "there")
    assert refused == []
    assert path == tmp_path / "there" / "00000004"
    for file in (tmp_path / "here" / "00000004").iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    before = (path / checkpoint.MODEL).stat().st_mtime_ns
    assert store.fetch_newest(tmp_path / "there")[0] == path
    assert (path / checkpoint.MODEL).stat().st_mtime_ns == before  # it was here already
    store.prune(1)
    assert store.steps() == ["00000002", "00000003", "00000004"]  # 2 waits for its evaluation
    store.put_bytes(json.dumps([{"step": 2}]).encode(), "evaluations.json")
    store.prune(1)
    assert store.steps() == ["00000003", "00000004"]
    assert not [name for name in store.names() if "00000001" in name or "00000002" in name]


def test_partial_and_damaged_ones_are_passed_over(place: str, tmp_path: Path) -> None:
    store = Store(place)
    for step in (1, 2, 3, 4, 5):
        store.send_checkpoint(saved(tmp_path / "here", step))
    store.delete("checkpoints/00000005/state.json")  # as when the sender was killed
    model = store.get("checkpoints/00000004/model.safetensors")
    assert model is not None
    store.put_bytes(model[:-1] + bytes([model[-1] ^ 1]), "checkpoints/00000004/model.safetensors")
    store.delete("checkpoints/00000003/optimizer.safetensors")
    path, refused = store.fetch_newest(tmp_path / "there")
    assert path is not None
    assert path.name == "00000002"
    assert len(refused) == 2
    assert all(place in text for text in refused)
    assert "altered" in refused[0]
    assert sorted(p.name for p in (tmp_path / "there").iterdir() if not p.name.startswith(".")) == ["00000002"]
    # What lies on this machine under a name that the store has other content for is of another attempt.
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "here" / "00000005", path)
    again, _ = store.fetch_newest(tmp_path / "there")
    assert again == path
    assert checkpoint.load(path).step == 2


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain.main([*TINY, f"--run.dir={folder}"]) == 0
    return folder


def lost_at_15(patch: pytest.MonkeyPatch) -> None:
    real = loop.due

    def dies(config: Any, step: int, *rest: int) -> bool:
        if step == 15:
            raise RuntimeError("the machine is gone")
        return real(config, step, *rest)

    patch.setattr(loop, "due", dies)


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(
    whole: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its machine is lost in mid-epoch, the command given again elsewhere: the same losses and bytes as in a folder."""
    command = [*TINY, f"--run.dir={place}"]
    with monkeypatch.context() as patch:
        lost_at_15(patch)
        assert pretrain.main(command) == 1
    store = Store(place)
    assert store.steps() == ["00000011"]
    monkeypatch.setenv(address.WORK, str(tmp_path / "another machine"))
    assert pretrain.main([*command, "--train.lr=0.5"]) == 2
    assert f"{place!r} holds a run" in capsys.readouterr().err
    assert pretrain.main(command) == 0
    assert f"the run directory is {place}\n" in capsys.readouterr().out
    folder = address.working_folder(place)
    assert folder.is_relative_to(tmp_path / "another machine")
    assert losses(folder) == losses(whole)
    assert (
        store.get("checkpoints/00000022/model.safetensors")
        == (whole / "checkpoints/last/model.safetensors").read_bytes()
    )
    (entry,) = json.loads(store.get("evaluations.json") or b"")
    (theirs,) = json.loads((whole / "evaluations.json").read_text())
    assert entry["results"] == theirs["results"]
    names = store.names()
    assert {"config.yaml", "metrics.jsonl", "log.txt", "report.html", "command.txt", "pictures/views.png"} <= set(names)
    assert not [n for n in names if n.startswith(".") or n.endswith(".lock")]  # nobody holds it any more
    assert not [n for n in names if PLANTED.encode() in (store.get(n) or b"")]
    assert store.get("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    # The other programs, from a third machine.
    monkeypatch.setenv(address.WORK, str(tmp_path / "third machine"))
    assert evaluate.main([place, "clusters"]) == 0
    found = json.loads(store.get("evaluations.json") or b"")
    assert any("clusters" in key for key in found[-1]["results"])
    assert entry["results"].items() <= found[-1]["results"].items()
    capsys.readouterr()
    assert runs.main(["list", place.rpartition("/")[0], "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["step"], run["name"]) == (22, place.rpartition("/")[2])
    assert runs.main(["prune", place, "--where", "step=22", "--yes"]) == 2
    assert pretrain.main(["--resume", place]) == 0
    assert evaluate.main([f"{place}/checkpoints/00000007", "knn"]) == 2
    assert "no state.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_checkpoint_there_is_passed_over_and_said(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"file://{tmp_path}/store/run"
    assert pretrain.main([*TINY, f"--run.dir={place}"]) == 0
    file = tmp_path / "store" / "run" / "checkpoints" / "00000022" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setenv(address.WORK, str(tmp_path / "another machine"))
    assert pretrain.main(["--resume", place]) == 0
    folder = address.working_folder(place)
    said = [r["text"] for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "event"]
    assert any("passed over" in text and place in text for text in said), said
    assert losses(folder) == losses(whole)


def test_one_leader_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first lives, and takes over when it was killed; the wait is the one that is set."""
    store = Store(f"file://{tmp_path}/store")
    first = Mirror(store, tmp_path / "a", own=False)
    (tmp_path / "a").mkdir()
    first.lead()
    with pytest.raises(ConfigError, match=rf"is being trained in by process {os.getpid()} on "):
        Mirror(store, tmp_path / "b", own=False).lead(wait=False)
    held = json.loads(store.get(".held") or b"")
    renewing = threading.Timer(
        0.5, lambda: store.put_bytes(json.dumps(held | {"time": held["time"] + 30}).encode(), ".held")
    )
    renewing.start()
    with pytest.raises(ConfigError, match="is being trained in"):
        Mirror(store, tmp_path / "b", own=False).lead()
    renewing.join()
    store.put_bytes(
        json.dumps(held | {"time": held["time"] - storage.EXPIRE_S + 1}).encode(), ".held"
    )  # killed long ago
    second = Mirror(store, tmp_path / "b", own=False)
    second.lead()
    first.close()
    assert store.holder()[0]  # not the first's to give away any more
    second.close()
    assert store.holder()[0] == ""


def test_what_changes_is_sent_and_large_files_not_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    (folder / "pictures").mkdir(parents=True)
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    (folder / "checkpoints" / "00000001" / "model.safetensors").touch()
    (folder / ".lock").touch()
    (folder / "pictures" / "views.png").write_bytes(b"png")
    (folder / "metrics.jsonl").write_bytes(b"x" * 1000)
    store = Store(f"file://{tmp_path}/store")
    sent: list[str] = []
    real = store.put
    monkeypatch.setattr(store, "put", lambda file, name: (sent.append(name), real(file, name)))
    mirror = Mirror(store, folder, own=False)
    mirror.send()
    assert sorted(sent) == ["metrics.jsonl", "pictures/views.png"]
    mirror.send()
    assert len(sent) == 2
    with (folder / "metrics.jsonl").open("ab") as handle:
        handle.write(b"y")
    monkeypatch.setattr(storage, "BYTES_PER_S", 0.1)  # its turn comes in three hours
    mirror.send()
    assert len(sent) == 2
    monkeypatch.setattr(storage, "BYTES_PER_S", 1e12)
    mirror.send()
    assert sent[2:] == ["metrics.jsonl"]
    with (folder / "metrics.jsonl").open("ab") as handle:
        handle.write(b"z")
    monkeypatch.setattr(storage, "BYTES_PER_S", 0.1)
    mirror.send(all_of_it=True)
    assert sent.count("metrics.jsonl") == 3
    assert store.get("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()


def test_the_wish_to_stop_comes_from_the_store(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    watch = storage.StopWatch(store, every_s=0.01)
    assert not watch.asked
    store.put_bytes(b"", "stop")
    for _ in range(1000):
        if watch.asked:
            break
        threading.Event().wait(0.01)
    assert watch.asked


def test_a_store_that_is_ill_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/store")
    failures = [OSError("reset"), OSError("reset")]
    real = store.system.pipe_file

    def pipe(*given: Any) -> None:
        if failures:
            raise failures.pop()
        real(*given)

    monkeypatch.setattr(store.system, "pipe_file", pipe)
    store.put_bytes(b"1", "x")
    assert store.get("x") == b"1"
    failures += [OSError("gone")] * 9
    with pytest.raises(storage.StorageError, match=r"writing x failed .*gone"):
        store.put_bytes(b"2", "x")
    assert len(failures) == 6
    failures[:] = [PermissionError("no")]
    with pytest.raises(storage.StorageError, match="no"):
        store.put_bytes(b"2", "x")


def test_addresses_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(place: str, *more: str) -> str:
        assert pretrain.main([*TINY, f"--run.dir={place}", *more]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    assert "holds no keys" in refused(f"s3://AKIA:{PLANTED}@bucket/x")
    assert PLANTED not in refused(f"s3://AKIA:{PLANTED}@bucket/x")
    assert "BUCKET/FOLDER" in refused("s3://")
    assert "fsspec knows no foo://" in refused("foo://bucket/x")
    assert "mining.persist" in refused(f"file://{tmp_path}/store/run", "--mining.persist")
    (tmp_path / "file").touch()
    assert "keys must let it write there" in refused(f"file://{tmp_path}/file/run")
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'raycon[remote]'" in refused("s3://bucket/x")


def test_a_bucket_that_is_not_there(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main([*TINY, "--run.dir=s3://no-such-bucket/run"]) == 2
    text = capsys.readouterr().err
    assert "s3://no-such-bucket/run" in text
    assert pretrain.main(["--resume", f"{s3}/nothing"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_names_in_a_store_do_not_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/store")
    store.put_bytes(b"a: 1", "config.yaml")
    store.put_bytes(b"x", "notes.txt")
    monkeypatch.setattr(store, "names", lambda below="": ["../../out", "config.yaml", "notes.txt"] if not below else [])
    folder = storage.fetch_run(store, tmp_path / "deep" / "run")
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "notes.txt"]
    assert not (tmp_path / "out").exists()
