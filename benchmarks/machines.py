"""Clusters on this machine, to be disturbed by the chaos tests and benchmarks/faults.py.

``Head`` is a cluster of one node as `ray start --head --block` makes it, which can be switched off and on. ``Machines``
is one of a head and several nodes that come and go. Neither touches another cluster on this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
LATE = "timed out during startup"
"""What Ray says of a node that was not up in 30 s: on a busy machine it is tried again."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float, what: str, every: float = 0.2) -> None:
    """Wait for ``condition``. Raises TimeoutError that says ``what`` was not so after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        threading.Event().wait(every)


class Head:
    """``with Head(...) as head``: a cluster of one node on loopback, ended by its own processes alone.

    (Never `ray stop`: that would end every cluster of the machine.) ``address`` is what a driver joins, ``dashboard`` where
    jobs are submitted, ``environment`` that of who may use it, ``folder`` Ray's own. Started again it has the same addresses.
    """

    def __init__(self, token: Path | None = None, cpus: int = 2) -> None:
        self._ports = [free_port() for _ in range(4)]
        self.address = f"127.0.0.1:{self._ports[0]}"
        self.dashboard = f"http://127.0.0.1:{self._ports[1]}"
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # socket paths have a length limit that tmp_path exceeds
        mode = {"RAY_AUTH_MODE": "disabled"}
        if token is not None:
            mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        own = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RAY_gcs_server_port_wait_time_s": "150"}
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own | mode
        self._command = [
            f"{BIN}/ray", "start", "--head", "--block", f"--port={self._ports[0]}", f"--dashboard-port={self._ports[1]}",
            f"--ray-client-server-port={self._ports[2]}", f"--dashboard-agent-listen-port={self._ports[3]}",
            # Any free ports: the usual range is that of every other head on this machine.
            "--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}", "--object-store-memory=100000000",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}",
        ]  # fmt: skip
        self._log = self.folder / "start.log"

    def start(self) -> None:
        """Returns when the node is up and the dashboard answers."""
        self._start()
        until(self._up, 400, "the head is up")

    def _start(self) -> None:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _up(self) -> bool:
        log = self._log.read_text()
        if self._process.poll() is not None:
            if LATE not in log:
                raise RuntimeError(f"the head ended: {log}")
            self.kill()
            self._start()
            return False
        if "Ray runtime started" not in log:
            return False
        try:
            urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """As when its machine is switched off: everything at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)

    def __enter__(self) -> Head:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            own = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
            for one in own:  # what outlived it
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Machines:
    """``with Machines() as machines``: a head that runs no training, and nodes of 1 CPU that come and go.

    This process is connected to it. Nodes are added in the main thread alone: Ray wants that.
    """

    def __init__(self, nodes: int = 2) -> None:
        import ray
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # for this process and all it starts, on this machine
        ray.shutdown()  # of what this process was connected to before
        port = free_port()
        # Named to the nodes' processes: where several clusters run on a machine, Ray would not find its own.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "dashboard_port": port, "include_dashboard": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        # While there is only the head: this process must not stand on a node that will be lost.
        ray.init(address=self.cluster.address, namespace="raycon", log_to_driver=False, logging_level="ERROR")
        self.grow_to(nodes)

    @property
    def address(self) -> str:
        """What a driver joins."""
        return str(self.cluster.address)

    def add(self) -> None:
        for left in (2, 1, 0):
            try:
                self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
                return
            except Exception as error:  # Ray raises just that
                if LATE not in str(error) or not left:
                    raise

    def grow_to(self, nodes: int) -> None:
        while len(self.nodes) < nodes:
            self.add()

    def lose(self, node: Any) -> None:
        """As when its machine is switched off."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def spare(self) -> Any:
        """A node that no driver's controller is on: with that a driver goes too, where all nodes are one machine."""
        raylets = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::TrainController"):
                    raylets.add(process.ppid())
        return next(n for n in self.nodes if n.all_processes["raylet"][0].process.pid not in raylets)

    def drain(self, node: Any, seconds: float) -> None:
        """The notice that a spot node will be taken away in so many seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "spot", deadline)
        if not accepted:
            raise RuntimeError(f"the notice was not taken: {why}")

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()
        del os.environ["RAY_API_SERVER_ADDRESS"]

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
