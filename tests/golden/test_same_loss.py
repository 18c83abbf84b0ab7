"""The identical-loss rule: a refactor leaves the losses of the reference run as they are, bit for bit.

Losses depend on the processor (MKL rounds differently on two that both have AVX-512) and on torch: bits count for the pair
a record was made with. On any other, the losses must be those of every record up to what such rounding grows to: two
processors gave the same bits for five steps and 0.12 % of difference at most in 22. To record anew after a change that
is *meant* to change the arithmetic: RAYCON_RECORD=1 pytest tests/golden/test_same_loss.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from raycon import pretrain
from raycon.core.log import read_lines

RECORD = Path(__file__).parent / "same_loss.json"
RUNS = {
    "pcl": ["quickstart", "--mining.engine=faiss", "--method.warmup-epochs=1", "--mining.redo=1", "--mining.iterations=3", "--train.warmup-epochs=1"],
    "moco": ["fashion-mnist-moco-cpu", "--data.name=digits", "--data.views=mocov2", "--data.size=16",
             "--train.batch=128", "--method.queue=512", "--method.temperature=0.2"],
}  # fmt: skip


def processor() -> str:
    """Vendor, family and model, "GenuineIntel 6 207" say; empty where Linux does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    told = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return " ".join(told.get(name, "?") for name in ("vendor_id", "cpu family", "model"))


@pytest.mark.parametrize("name", list(RUNS))
def test_losses_are_as_recorded(name: str, tmp_path: Path) -> None:
    machine = f"torch {torch.__version__.split('+')[0]} {torch.backends.cpu.get_cpu_capability()} {processor()}"
    folder = tmp_path / "run"
    options = [*RUNS[name], "--train.epochs=2", "--runtime=local", "--data.loader=torch", "--log.every-steps=1"]
    assert pretrain.main([*options, "--evals.names", f"--run.dir={folder}", "--log.quiet"]) == 0
    losses = [r["loss"].hex() for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("RAYCON_RECORD") == "1":
        records.setdefault(machine, {})[name] = losses
        RECORD.write_text(json.dumps(records, indent=1) + "\n")
    assert len(losses) == 22
    if machine in records:
        assert losses == records[machine][name]
        return
    found = [float.fromhex(loss) for loss in losses]
    for record in records.values():
        wanted = [float.fromhex(loss) for loss in record[name]]
        assert found[:5] == pytest.approx(wanted[:5], rel=1e-6)
        assert found == pytest.approx(wanted, rel=0.01)
