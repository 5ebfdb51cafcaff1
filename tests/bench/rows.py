"""A row of results that has no peer: what a benchmark returns, and the README's table shows."""

from typing import Any

from tests.bench.machine import machine


def row(name: str, ours: float, goal: str | None, holds: bool, unit: str) -> dict[str, Any]:
    """`ours` in `unit`; `goal` is None where nothing is held to it."""
    return {
        "name": name,
        "ours": ours,
        "peer": None,
        "ratio": None,
        "goal": goal,
        "holds": holds,
        "unit": unit,
        "machine": machine(),
    }
