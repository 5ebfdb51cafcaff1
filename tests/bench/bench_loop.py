"""Benchmark `loop`: time and samples to held-out reward 0.95 on the demo's task, ours against TRL's OnlineDPOTrainer.

Both start from the same base model; TRL runs at the best of three learning rates. Start-up and held-out evaluation
are left out on both sides.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.machine import machine
from tests.bench.measured_run import Reach, measured_run, prepare, reach

TARGET = 0.95
TRL_LEARNING_RATES = ("3e-5", "1e-4", "3e-4")
TIME_GOAL, SAMPLES_GOAL = 1 / 3, 0.4


def run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), {"stop.heldout_reward": TARGET, "stop.max_minutes": 8})
        outcome, accounts = measured_run(config)
        ours = reach(config, outcome, TARGET)
        model = config.model
    peers = [trl(model, rate) for rate in TRL_LEARNING_RATES]
    peer = best(peers)
    rows = compare(ours, peer)
    for role_id, spent in sorted(accounts.shares().items()):
        rows.append({**_row(f"loop: {role_id} busy", round(spent["busy"], 3), None, "share"), "holds": True})
    Path("build/bench").mkdir(parents=True, exist_ok=True)
    Path("build/bench/loop-curves.txt").write_text(json.dumps({"ours": str(outcome), "trl": peers}, indent=1))
    return rows


def trl(model: str, learning_rate: str) -> dict[str, Any]:
    """The peer in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.trl_peer", model, learning_rate]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in finished.stdout.splitlines() if line.startswith('{"learning_rate'))
    result: dict[str, Any] = json.loads(line)
    print(f"  TRL at {learning_rate}: {result['curve'][-1]}", flush=True)
    return result


def best(peers: list[dict[str, Any]]) -> dict[str, Any]:
    """The rate that reached the target with the fewest samples; where none did, the one that came nearest."""
    reached = [peer for peer in peers if peer["reached"]]
    if reached:
        return min(reached, key=lambda peer: peer["samples"])
    return max(peers, key=lambda peer: max(point["reward"] for point in peer["curve"]))


def compare(ours: Reach | None, peer: dict[str, Any]) -> list[dict[str, Any]]:
    """Where TRL did not reach the target, its numbers are a lower bound and the ratio an upper one."""
    name = f"to held-out {TARGET} against TRL at {peer['learning_rate']:g}" + (
        "" if peer["reached"] else " (not there)"
    )
    rows = []
    for what, mine, theirs, goal, unit in (
        ("time", ours.seconds if ours else None, peer["seconds"], TIME_GOAL, "s"),
        ("samples", ours.samples if ours else None, peer["samples"], SAMPLES_GOAL, "samples"),
    ):
        ratio = None if mine is None else round(mine / theirs, 3)
        row = _row(f"loop: {what} {name}", "not reached" if mine is None else round(mine, 1), theirs, unit)
        rows.append({**row, "ratio": ratio, "goal": f"under {goal:.2f}", "holds": ratio is not None and ratio <= goal})
    return rows


def _row(name: str, ours: Any, peer: Any, unit: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": None, "goal": None, "unit": unit, "machine": machine()}
