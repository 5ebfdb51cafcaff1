"""Benchmark `busy`: how each role of a real run spends its time. The bottleneck role should hardly ever idle."""

import tempfile
from pathlib import Path
from typing import Any

from tests.bench.machine import machine
from tests.bench.measured_run import measured_run, prepare

GOAL = 0.9
CHANGES = {"stop.heldout_reward": "null", "stop.max_minutes": 2.0}


def run() -> list[dict[str, Any]]:
    """A row for the bottleneck, and one per role with where its time went."""
    with tempfile.TemporaryDirectory() as folder:
        _, accounts = measured_run(prepare(Path(folder), CHANGES))
    shares = accounts.shares()
    bottleneck = max(shares, key=lambda role_id: shares[role_id]["busy"])
    rows = [row(f"busy: bottleneck ({bottleneck})", shares[bottleneck]["busy"], GOAL)]
    for role_id, spent in sorted(shares.items()):
        text = ", ".join(f"{state} {share:.0%}" for state, share in spent.items())
        rows.append(row(f"busy: {role_id} ({text})", spent["busy"], None))
    return rows


def row(name: str, share: float, goal: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "ours": round(share, 3),
        "peer": None,
        "ratio": None,
        "goal": None if goal is None else f"over {goal}",
        "holds": goal is None or share > goal,
        "unit": "share of time busy",
        "machine": machine(),
    }
