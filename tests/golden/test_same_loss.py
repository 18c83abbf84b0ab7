"""The identical-loss rule: a refactor leaves the losses of the reference run as they are, bit for bit.

Losses depend on the processor (MKL rounds differently on two that both have AVX-512) and on torch: a record counts for the
pair it was made with, and on any other the test is skipped. To record
anew after a change that is *meant* to change the arithmetic: RAYCON_RECORD=1 pytest tests/golden/test_same_loss.py
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
    if machine not in records:
        pytest.skip(f"no losses recorded for {machine}, only for {', '.join(records)}")
    assert len(losses) == 22
    assert losses == records[machine][name]
