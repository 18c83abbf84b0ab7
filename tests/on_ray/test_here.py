"""What a run starts on this machine can be reached from this machine alone, wants a token, and may take its time."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import free_port

pytest.importorskip("ray")
from raycon.on_ray import here

LISTENING = """
import json, os, sys
import psutil
from raycon.on_ray import trainer
trainer.connect(int(sys.argv[1]))
import ray
found, mine = set(), psutil.Process()
@ray.remote
def look():
    return os.getpid()
ray.get(look.remote())
for process in [mine, *mine.children(recursive=True)]:
    try:
        found |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    except psutil.Error:
        continue
with open(sys.argv[2], "w") as file:
    json.dump({"mode": os.environ["RAY_AUTH_MODE"], "listening": sorted(found)}, file)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_of_this_machine_listens_on_loopback_and_wants_a_token(tmp_path: Path) -> None:
    """With the dashboard that sweeps have. As a person starts it: with nothing set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH") and k != "RAY_ADDRESS"}
    environment |= {"HOME": str(tmp_path)}
    port, out = free_port(), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(port), str(out)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["mode"] == "token"
    assert (tmp_path / ".ray" / "auth_token").read_text().strip()
    places = {place[0].removeprefix("::ffff:") for place in told["listening"]}
    assert len(told["listening"]) >= 4  # control, raylet, workers, metrics
    assert all(ipaddress.ip_address(place).is_loopback for place in places), told


def test_a_busy_machine_is_given_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["The current node timed out during startup. This could happen because ...", "", "out of memory"]
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if said[len(calls) - 1]:
            raise Exception(said[len(calls) - 1])

    monkeypatch.setattr(here.ray, "init", init)
    here.start(namespace="x")
    assert calls == [{"address": "local", "namespace": "x"}] * 2
    with pytest.raises(Exception, match="out of memory"):
        here.start()
    assert len(calls) == 3
    calls.clear()
    said[:] = said[:1] * 9
    with pytest.raises(Exception, match="timed out during startup"):
        here.start()
    assert len(calls) == here.TRIES
