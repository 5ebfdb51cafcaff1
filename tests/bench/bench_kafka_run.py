"""Benchmark `kafka_run`: the demo's run on a Kafka log against the embedded one, turn by turn in one benchmark.

The same model, prompts and number of steps; the clock runs from one learner step to another, so that starts, the first
compilation and the last measurement are left out on both sides. The broker's own work falls on the same cores here.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from deploy.config import RunConfig
from deploy.roles import open_run_log
from streaming import topics
from streaming.history import entries
from streaming.records import Feedback, decode
from tests.bench.logs import ONE_BROKER, backends, make_topics, served
from tests.bench.machine import machine
from tests.bench.measured_run import measured_run, prepare

GOAL = 1.1
"""On Kafka at most a tenth longer than on SQLite."""

NUM_STEPS = 120
FIRST_STEP = 20
"""Where the clock starts: by then the pipeline is full."""

NUM_TURNS = 3
"""Odd, so that the median is a turn."""


def run(num_steps: int = NUM_STEPS, first_step: int = FIRST_STEP, num_turns: int = NUM_TURNS) -> list[dict[str, Any]]:
    """About a quarter of an hour with nothing else on the machine. Nothing where no broker can be started."""
    if "Kafka" not in backends():
        return []
    changes = {
        "stop.heldout_reward": "null",
        "stop.max_minutes": 8,
        "learner.max_steps": num_steps,
        "scheduler.eval_every": 10**6,  # a measurement before and one behind the clock
    }
    turns: list[tuple[float, float]] = []
    with served("Kafka") as kafka:
        for turn in range(num_turns):
            name = f"bench-{os.getpid()}-{turn}"
            ours = seconds(changes | kafka_settings(kafka.url) | {"name": name}, first_step)
            turns.append((ours, seconds(changes | {"name": name}, first_step)))
    return [row(turns, first_step, num_steps)]


def kafka_settings(url: str) -> dict[str, Any]:
    broker = {f"log.kafka.{name}": getattr(ONE_BROKER, name) for name in ONE_BROKER.model_fields_set}
    return {"log.url": url, **broker}


def seconds(changes: dict[str, Any], first_step: int) -> float:
    """Between the ends of two steps of a run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), changes)
        make_topics(config.log.url, config.name)
        measured_run(config)
        told_s = step_times(config)
    last = max(told_s)
    return told_s[last] - told_s[first_step]


def step_times(config: RunConfig) -> dict[int, float]:
    """When each step's examples were consumed, by its number."""
    with open_run_log(config) as log:
        found = [decode(Feedback, entry.value) for entry in entries(log, topics.FEEDBACK.name)]
    consumed = [one for one in found if one.ending == "consumed" and one.step is not None]
    return {one.step: one.time_s for one in sorted(consumed, key=lambda one: one.time_s) if one.step is not None}


def row(turns: list[tuple[float, float]], first_step: int, last_step: int) -> dict[str, Any]:
    ratio = statistics.median(ours / peer for ours, peer in turns)
    return {
        "name": f"demo on Kafka: time from step {first_step} to {last_step}, against SQLite",
        "ours": round(statistics.median(ours for ours, _ in turns), 1),
        "peer": round(statistics.median(peer for _, peer in turns), 1),
        "ratio": round(ratio, 3),
        "goal": f"at most {GOAL}",
        "holds": ratio <= GOAL,
        "unit": "s",
        "machine": machine(),
    }
