"""Faults: what a checkpoint costs, how long a run takes to come back from each fault: python -m benchmarks.faults

python -m benchmarks.faults [--quick] [--json FILE]      checkpoint cost; recovery (--quick: from a lost worker and job)
python -m benchmarks.faults --soak [...]                 python -m benchmarks.soak: random faults over one run

A recovery time is wall time from the fault to the next step that is written; it holds for the machine it was taken on,
and is compared to the time from the run's command to its first step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.machines import Head, Machines
from raycon.core.log import read_lines

OPTIONS = [
    "quickstart", "--method.warmup-epochs=2", "--train.warmup-epochs=1", "--method.clusters", "60", "100",
    "--data.loader=torch", "--mining.redo=1", "--mining.iterations=4", "--log.every-steps=1", "--log.quiet",
    "--log.report=light", "--checkpoint.every-steps=5",
]  # fmt: skip
KINDS = (
    "worker 0", "worker 1", "both workers", "writer", "shard", "refreshing shard", "coordinator", "evaluation", "driver", "job",
)  # fmt: skip
"""One rank; all; rank 0 while it writes a checkpoint; an index actor, in a refresh or whenever it comes; an evaluation
task; the driver alone; the driver and all it started."""
OF_ACTORS = {
    "shard": "ray::IndexShard", "refreshing shard": "ray::IndexShard", "coordinator": "ray::IndexCoordinator",
    "evaluation": "ray::evaluate",
}  # fmt: skip


# --- a run as processes -----------------------------------------------------------------------------------------


class Run:
    """``with Run(folder, epochs, option ...) as run``: started again by the same command when its driver was killed.

    On a Ray of its own, or on the cluster at ``address``. ``environment``: instead of this process's.
    """

    def __init__(
        self, folder: Path, epochs: int, *more: str, address: str = "", environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._command = [sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--train.epochs={epochs}", *more]
        self._command += [f"--run.dir={folder}", "--scaling.max-failures=-1"]
        self._environment = {k: v for k, v in (environment or os.environ).items() if k != "RAY_ADDRESS"}
        self._environment |= {"OMP_NUM_THREADS": "1"}
        if address:
            self._environment |= {"RAY_ADDRESS": address, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        else:
            self._environment["RAY_AUTH_MODE"] = "disabled"
        self._log = folder.with_suffix(".log").open("a")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def records(self, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [r for r in read_lines(file) if r["kind"] == kind] if file.exists() else []

    def steps(self) -> list[int]:
        return [r["step"] for r in self.records("train")]

    def ranks(self) -> list[int]:
        return list(self.records("start")[-1]["pids"])

    def begins(self) -> int:
        return len(self.records("start"))

    def until(self, condition: Callable[[], bool], seconds: float = 600, every: float = 0.1) -> bool:
        """False when the run ended before. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"the run stands still; its log: {Path(self._log.name).read_text()[-3000:]}")
            threading.Event().wait(every)
        return True

    def further(self, steps: int) -> bool:
        """Wait until so many steps more have been made; False when the run ended before."""
        return self.until(partial(_at, self, (self.steps() or [0])[-1] + steps))

    def kill(self, kind: str) -> bool:
        """Do one of KINDS; False when the run ended before it could be done."""
        if kind == "writer" and not self.until(lambda: any(self.folder.glob("checkpoints/.*.part")), every=0.002):
            return False
        if kind == "refreshing shard":
            seen = len(self.records("state"))
            if not self.until(lambda: any("mining" in r for r in self.records("state")[seen:]), every=0.02):
                return False
        if kind in OF_ACTORS:
            return self.until(partial(self._kill_process, OF_ACTORS[kind]), every=0.05)
        ranks = self.ranks()
        victims = {
            "worker 0": ranks[:1], "worker 1": ranks[-1:], "both workers": ranks, "writer": ranks[:1],
            "driver": [], "job": ranks,
        }[kind]  # fmt: skip
        if kind == "job":
            os.killpg(self.process.pid, signal.SIGKILL)
        if kind == "driver":
            self.process.kill()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if kind in ("driver", "job"):
            self.process.wait(60)
            self.start()
        return True

    def _kill_process(self, title: str) -> bool:
        """The first process of this title that the run's own Ray has; False when there is none now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if " ".join(process.cmdline()).startswith(title):
                        process.kill()
                        return True
        return False

    def recovered(self, fault: Callable[[], Any], restarts: bool = True) -> float:
        """Seconds from ``fault`` to the next step, of a group started anew where the fault ``restarts`` it."""
        begins = self.begins()
        start = time.monotonic()
        fault()
        done = self.until(lambda: self.begins() > begins) if restarts else True
        if not done or not self.further(1):
            told = Path(self._log.name).read_text()[-3000:]
            raise RuntimeError(
                f"the run ended with {self.process.returncode} at step {self.steps()[-1]}; its log:\n{told}"
            )
        return time.monotonic() - start

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
        self._log.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restarts(kind: str) -> bool:
    """Does this fault start the worker group anew?"""
    return kind not in OF_ACTORS


def _at(run: Run, step: int) -> bool:
    return (run.steps() or [0])[-1] >= step


# --- what is measured -------------------------------------------------------------------------------------------


def checkpoint_cost(quick: bool) -> list[Row]:
    """What one checkpoint costs a training process: student, teacher and momentum of a ResNet, 256 MB for ResNet-50.

    How long training stands still for the copy, all CPU seconds (copying, hashing, writing), and how much longer steps
    take while the thread writes, each against a minute of training. The last is a difference of two wall times: it means
    something on a machine with nothing else to do.
    """
    import torch

    from raycon.core.config import ModelConfig, RunConfig
    from raycon.core.log import NoMetrics
    from raycon.nn import networks
    from raycon.training.runtime import LocalRuntime, no_index
    from raycon.training.saving import Saving

    rows, turns = [], 3 if quick else 5
    for name in ("resnet18",) if quick else ("resnet18", "resnet50"):
        model = ModelConfig(encoder=name, weights="")
        pair = torch.nn.ModuleDict({k: networks.build_encoder(model, 3) for k in ("student", "teacher")})
        optimizer = torch.optim.SGD(pair["student"].parameters(), lr=0.1, momentum=0.9)
        images, loss = torch.randn(8, 3, 64, 64), torch.zeros(())

        def train(steps: int, pair: Any = pair, optimizer: Any = optimizer, images: Any = images) -> None:
            for _ in range(steps):
                pair["student"](images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        train(2)
        cpu, still, more = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            runtime = LocalRuntime(Path(folder), no_index(), torch.device("cpu"))
            with Saving(RunConfig(), Path(folder), pair, optimizer, runtime, NoMetrics()) as saving:  # type: ignore[arg-type]
                for step in range(turns + 1):  # the first gets its memory
                    position = {"step": step, "epoch": 0, "steps": turns, "per_epoch": 1}
                    begin, clock = time.process_time(), time.perf_counter()
                    saving.save(position, 0, loss, None, None, False)
                    stood = time.perf_counter() - clock
                    saving.flush()
                    spent = time.process_time() - begin
                    clock = time.perf_counter()
                    train(8)
                    alone = time.perf_counter() - clock
                    clock = time.perf_counter()
                    saving.save(position, 0, loss, None, None, False)
                    train(8)
                    saving.flush()
                    beside = time.perf_counter() - clock
                    if step:
                        cpu.append(spent)
                        still.append(stood)
                        more.append(beside - alone)
        middle = turns // 2
        rows += [
            harness.at_most(f"{name}: one a minute, training stands still, s of 60", sorted(still)[middle], 60.0, 0.02),
            harness.at_most(f"{name}: one a minute, CPU s of 60", sorted(cpu)[middle], 60.0, 0.02),
            harness.shown(f"{name}: one a minute, longer steps (wall), s of 60", max(0.0, sorted(more)[middle]), 60.0),
        ]
    return rows


def recovery(quick: bool) -> list[Row]:
    """Wall seconds from a fault to the next written step; `other` is the run's own start, to its first step."""
    if quick:
        return on_one_machine(("worker 1", "job"))
    kinds = ("worker 1", "both workers", "writer", "shard", "refreshing shard", "coordinator", "driver", "job")
    return on_one_machine(kinds) + on_nodes() + without_a_head()


def on_one_machine(kinds: tuple[str, ...]) -> list[Row]:
    """Processes killed, on a Ray of the run's own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        with Run(Path(folder) / "run", 400, "--evals.names") as run:
            run.further(1)
            first = time.monotonic() - begin
            run.further(24)  # into the epochs with prototypes
            for kind in kinds:
                run.further(6)
                seconds = run.recovered(partial(run.kill, kind), restarts(kind))
                sys.stderr.write(f"{kind}: {seconds:.1f} s (start: {first:.1f} s)\n")
                rows.append(harness.shown(f"{kind} killed: s to the next step", seconds, first))
    return rows


def on_nodes() -> list[Row]:
    """Nodes that go and come, a rank that hangs: on a cluster of three nodes on this machine."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Machines() as machines:

        def run(name: str, *more: str) -> Run:
            return Run(Path(folder) / name, 400, "--evals.names", *more, address=machines.address)

        def replaced() -> None:
            machines.lose(machines.spare())
            machines.add()

        begin = time.monotonic()
        with run("fixed", f"--scaling.timeout-s={HANGS_S}") as fixed:
            fixed.further(1)
            first = time.monotonic() - begin
            fixed.further(24)
            rows.append(harness.shown("node lost, another there: s to the next step", fixed.recovered(replaced), first))
            fixed.further(6)
            node = machines.spare()
            machines.drain(node, 60.0)
            fixed.until(lambda: any("saved" in r["text"] for r in fixed.records("event")), every=0.05)
            seconds = fixed.recovered(replaced)
            rows.append(harness.shown("node lost after a notice: s to the next step", seconds, first))
            fixed.further(6)
            seconds = fixed.recovered(lambda: os.kill(fixed.ranks()[1], signal.SIGSTOP))
            rows.append(harness.shown(f"rank 1 hangs, timeout {HANGS_S} s: s to the next step", seconds, first))
        with run("elastic", "--scaling.min-workers=1", "--scaling.resize-s=5") as elastic:
            elastic.further(25)
            seconds = elastic.recovered(lambda: machines.lose(machines.spare()))
            rows.append(harness.shown("elastic, 2 workers to 1: s to the next step", seconds, first))
            elastic.further(6)
            seconds = elastic.recovered(machines.add)
            rows.append(harness.shown("elastic, 1 worker to 2: s to the next step", seconds, first))
    return rows


def without_a_head() -> list[Row]:
    """The head is switched off and on, and the same command given to it again."""
    with tempfile.TemporaryDirectory() as folder, Head() as head:
        begin = time.monotonic()
        more = {"address": head.address, "environment": head.environment}
        with Run(Path(folder) / "run", 400, "--evals.names", **more) as run:  # type: ignore[arg-type]
            run.further(1)
            first = time.monotonic() - begin
            run.further(24)
            ended: list[float] = []

            def off_and_on() -> None:
                head.kill()
                killed = time.monotonic()
                run.process.wait(300)
                ended.append(time.monotonic() - killed)
                head.start()
                run.start()

            seconds = run.recovered(off_and_on)
            return [
                harness.shown("head lost: s until the driver has ended", ended[0], first),
                harness.shown("head lost and started, command given again: s to the next step", seconds, first),
            ]


HANGS_S = 30
"""scaling.timeout-s of the run whose rank hangs: after so long the others give it up."""


def measure(quick: bool) -> list[Row]:
    return checkpoint_cost(quick) + recovery(quick)


def main(argv: list[str] | None = None) -> Any:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--soak" in arguments:
        from benchmarks import soak

        return soak.main([a for a in arguments if a != "--soak"])
    return harness.main(__doc__ or "", measure, arguments)


if __name__ == "__main__":
    main()
