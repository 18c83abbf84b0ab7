"""raycon.cluster.submit: the request, and jobs on a cluster that wants a token."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machines import BIN, Head, until
from raycon.cluster import submit
from raycon.core.config import ConfigError
from raycon.core.log import read_lines

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYCON_STORAGE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_of_the_job() -> None:
    asked, dry = submit.parse(
        ["quickstart", "--address", "http://h:1", "--method.clusters", "60", "100", "--storage", "/mnt/s/", "--name", "a.b-1",
         "--env", "OMP_NUM_THREADS=2", "--dry-run"]
    )  # fmt: skip
    assert dry
    assert asked.entrypoint == (
        "python -m raycon.pretrain quickstart --method.clusters 60 100 --run.dir /mnt/s/a.b-1"
    )  # fmt: skip
    assert (asked.address, asked.environment, asked.wait) == ("http://h:1", {"OMP_NUM_THREADS": "2"}, True)
    assert asked.run_dir == "/mnt/s/a.b-1"
    asked, _ = submit.parse(["--resume", "/mnt/s/a.b-1", "--no-wait"])
    assert asked.entrypoint == "python -m raycon.pretrain --resume /mnt/s/a.b-1"
    assert asked.address == "http://127.0.0.1:8265"
    assert not asked.wait
    asked, _ = submit.parse(["--program", "raycon.tuning.sweep", "study one", "--dir", "/mnt/s/d"])
    assert asked.entrypoint == "python -m raycon.tuning.sweep 'study one' --dir /mnt/s/d"
    assert re.fullmatch(r"study_one-\d{8}-\d{6}", asked.name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["RECIPE"]),
        (["quickstart"], ["--storage DIR"]),
        (["quickstart", "--run.dir", "runs/x"], ["'runs/x'", "absolute"]),
        (["quickstart", "--storage", "/s", "--env", "WANDB_API_KEY=x"], ["WANDB_API_KEY", "environment of the nodes"]),
        (["quickstart", "--storage", "/s", "--env", "A"], ["--env A", "NAME=VALUE"]),
        (["quickstart", "--storage", "/s", "--address", "head:8265"], ["'head:8265'", "http://HOST:8265"]),
        (["quickstart", "--storage", "/s", "--name", "../x y"], ["'../x y'", "'x_y'"]),
        (["quickstart", "--storage", "/s", "--program", "os; rm"], ["--program", "raycon.tuning.sweep"]),
        (["quickstartt", "--storage", "/s"], ["quickstartt"]),
        (["--config", "no.yaml", "--storage", "/s"], ["no.yaml", "no such file"]),
    ],
)
def test_wrong_requests(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(arguments) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert "Traceback" not in error


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        submit.parse(["quickstart", "--env", "A", "--address", "x"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["../../etc/passwd", "a b/c;rm -rf *", "-rf", "...", "ü", "x" * 500, ""])
def test_names_are_made_safe(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", submit.safe_name(text))


def test_pinned_versions_are_those_of_the_constraints() -> None:
    found = submit.pinned("cpu")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(found) <= set(lines)
    names = {line.split("==")[0] for line in found}
    assert {"torch", "faiss-cpu", "numpy", "wandb"} <= names
    assert not {"ray", "faiss-gpu", "ffcv"} & names
    assert "faiss-gpu" in {line.split("==")[0] for line in submit.pinned("gpu")}


def test_last_words() -> None:
    assert submit.last_words("a\n  cause \n\n(--debug shows where)\n") == "cause"
    assert submit.last_words("") == ""


class Client:
    """As Ray's: a log in pieces, whose first connection breaks."""

    def __init__(self, log: str, status: str) -> None:
        self.log, self.status, self.calls = log, status, 0

    async def tail_job_logs(self, job: str) -> Any:
        self.calls += 1
        for i in range(0, len(self.log), 5):
            if self.calls == 1 and i >= 10:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield self.log[i : i + 5]

    def get_job_status(self, job: str) -> str:
        return "RUNNING" if self.calls == 1 else self.status

    def get_job_logs(self, job: str) -> str:
        return self.log

    def get_job_info(self, job: str) -> Any:
        return type("Info", (), {"status": self.status, "message": "m", "driver_exit_code": 3})()


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 3), ("STOPPED", 1)])
def test_following_goes_on_after_a_broken_connection(
    status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, _ = submit.parse(["quickstart", "--storage", "/s", "--name", "j"])
    client = Client("one line\nanother\nthe cause: no such thing\n", status)
    assert submit.follow(client, "j", asked) == code
    out, err = capsys.readouterr()
    assert out == client.log  # each piece once
    if status == "FAILED":
        assert err.splitlines()[-1].endswith("job j failed with exit status 3: the cause: no such thing")
    if status == "STOPPED":
        assert "--resume /s/j" in err


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom raycon.cluster import submit\n"
        "try:\n    submit.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--storage" in done.stdout


# --- on a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that wants a token."""
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with Head(token) as found:
        yield found


TINY = [
    "quickstart", "--data.loader=torch", "--train.epochs=2", "--train.warmup-epochs=0", "--method.warmup-epochs=2",
    "--scaling.workers=1", "--log.every-steps=1", "--evals.names", "--model.width=8", "--log.report=light",
]  # fmt: skip


def command(address: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "raycon.cluster.submit", "--address", address, *arguments]


def submitted(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = command(head.dashboard, *arguments)
    return subprocess.run(run, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.ray
@pytest.mark.slow
def test_without_the_token_nothing_is_taken(head: Head, tmp_path: Path) -> None:
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}):
        own = (
            {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")} | mode | {"HOME": str(tmp_path)}
        )
        run = command(head.dashboard, *TINY, "--storage", str(tmp_path))
        done = subprocess.run(run, env=own, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "wants the token" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*/config.yaml")) == []


@pytest.mark.ray
@pytest.mark.long
def test_a_job_from_submission_to_stop_and_resume(head: Head, tmp_path: Path) -> None:
    """Stopped by `ray job stop` it ends with a checkpoint; what is resumed ends; a wrong one says why and exits so."""
    address, environment, folder = head.dashboard, head.environment, head.folder
    long = [*TINY, "--train.epochs=500", "--storage", str(tmp_path), "--name", "first"]
    with subprocess.Popen(
        command(address, *long), env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as following:
        metrics = tmp_path / "first" / "metrics.jsonl"

        def step() -> int:
            assert following.poll() is None, following.stdout.read()  # type: ignore[union-attr]
            lines = read_lines(metrics) if metrics.exists() else []
            return max((r["step"] for r in lines if r["kind"] == "train"), default=0)

        until(lambda: step() >= 15, 400, "the job did not start")
        stop = [f"{BIN}/ray", "job", "stop", "--no-wait", "--address", address, "first"]
        subprocess.run(stop, env=environment, capture_output=True, timeout=400, check=True)
        out, _ = following.communicate(timeout=600)
    assert following.returncode == 1
    resume = f"raycon.cluster.submit --address {address} --resume {tmp_path}/first"
    assert out.count(resume) == 2  # when submitted, and when stopped
    assert f"{address}/#/jobs/first" in out
    last = max(r["step"] for r in read_lines(metrics) if r["kind"] == "train")
    kept = (tmp_path / "first" / "checkpoints" / "last").resolve()
    assert int(kept.name) == last  # saved at the very step it stopped at
    uploaded = {p.name for p in folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*/*")}
    assert {"raycon", "data_loaders", "tuning", "cluster", "pyproject.toml"} <= uploaded
    assert not uploaded & {"tests", "docs", "benchmarks", ".venv", ".git", "runs"}

    done = submitted(head, "--resume", str(tmp_path / "first"), "--train.epochs=7")
    assert done.returncode not in (0, 2)
    assert "the same to go on" in done.stderr.strip().splitlines()[-1]

    done = submitted(head, *TINY, "--storage", str(tmp_path), "--name", "second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "second" / "report.html").exists()
    done = submitted(head, *TINY, "--train.batch=127", "--storage", str(tmp_path), "--name", "third")
    assert done.returncode == 2
    assert "train.batch = 127" in done.stdout + done.stderr
