"""Benchmark `stall`: what a weight update costs while 128 responses are in flight, on a model of the demo's size.

The stall is the time from asking the engine to pause until it samples again (it includes the step under way, which
is not lost). The throughput is that of finished tokens, in turns with and without an update every `STEP_S`.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.config import EngineConfig
from actors.engine import Engine, start_engine
from actors.update import Weights, apply_weights
from deploy.tiny_model import build_model, build_tokenizer
from streaming.records import Sampling, Version
from tests.bench.machine import machine
from tests.builders import tokens_of

NUM_IN_FLIGHT = 128
STEP_S = 1.0
"""Between two updates, in seconds: a learner step, with a version after each."""

WINDOW_S = 5.0
NUM_TURNS = 6
"""Turns with, and turns without updates, of WINDOW_S each: a drift of the machine hits both alike."""

STALL_GOAL_MS = 100.0
LOSS_GOAL = 0.02
PROMPT = tokens_of("12+34=")


def run() -> list[dict[str, Any]]:
    """The rows of the results table."""
    with tempfile.TemporaryDirectory() as folder:
        stalls_ms, with_updates, without = asyncio.run(_measure(Path(folder)))
    typical, worst = statistics.median(stalls_ms), statistics.quantiles(stalls_ms, n=20)[-1]
    loss = 1.0 - with_updates / without
    return [
        _row("generation stall per weight update, median", typical, STALL_GOAL_MS, "ms"),
        _row("generation stall per weight update, 95th percentile", worst, STALL_GOAL_MS, "ms"),
        {
            "name": f"throughput with an update every {STEP_S:g} s, against none",
            "ours": round(with_updates),
            "peer": round(without),
            "ratio": round(with_updates / without, 4),
            "goal": f"loses under {LOSS_GOAL:.0%}",
            "holds": loss < LOSS_GOAL,
            "unit": "tokens/s",
            "machine": machine(),
        },
    ]


def _row(name: str, ours: float, goal: float, unit: str) -> dict[str, Any]:
    return {
        "name": f"{name}, {NUM_IN_FLIGHT} in flight",
        "ours": round(ours, 1),
        "peer": None,
        "ratio": None,
        "goal": f"under {goal:g} {unit}",
        "holds": ours < goal,
        "unit": unit,
        "machine": machine(),
    }


async def _measure(folder: Path) -> tuple[list[float], float, float]:
    """Stalls in milliseconds, and tokens a second with and without updates."""
    directories = [_save_model(folder / str(seed), seed) for seed in range(2)]
    engine = await start_engine(
        EngineConfig(num_threads=1, max_num_seqs=NUM_IN_FLIGHT), directories[0], Version(1, 0), policy="policy"
    )
    counts = itertools.count()
    done = [0]
    load = [asyncio.create_task(_keep_sampling(engine, counts, done)) for _ in range(NUM_IN_FLIGHT)]
    await _rate(done, WINDOW_S)  # until lengths are mixed
    stalls_ms: list[float] = []
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * NUM_TURNS):
        updates = asyncio.create_task(_keep_updating(engine, directories, stalls_ms)) if turn % 2 else None
        rates[updates is not None].append(await _rate(done, WINDOW_S))
        if updates is not None:
            updates.cancel()
            await asyncio.wait([updates])
    for task in load:
        task.cancel()
    await asyncio.wait(load)
    await engine.close()
    return stalls_ms, statistics.mean(rates[True]), statistics.mean(rates[False])


def _save_model(directory: Path, seed: int) -> Path:
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=192, num_layers=4, num_heads=2, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


async def _keep_sampling(engine: Engine, counts: "itertools.count[int]", done: list[int]) -> None:
    """One response after the other, of mixed lengths so that they do not end together."""
    lengths = random.Random(next(counts))
    while True:
        sampling = Sampling(max_tokens=lengths.randint(32, 128))
        name = str(next(counts))
        for candidate in await engine.generate(PROMPT, num_candidates=1, sampling=sampling, request_id=name):
            done[0] += len(candidate.tokens)


async def _rate(done: list[int], seconds: float) -> float:
    before, began = done[0], time.monotonic()
    await asyncio.sleep(seconds)
    return (done[0] - before) / (time.monotonic() - began)


async def _keep_updating(engine: Engine, directories: list[Path], stalls_ms: list[float]) -> None:
    while True:
        await asyncio.sleep(STEP_S)
        number = engine.version.number + 1
        weights = Weights(directories[number % 2], Version(1, number), manifest_sha256=None, probe=None)
        began = time.monotonic()
        # Shielded: the end of a turn must not leave the engine paused.
        await asyncio.shield(apply_weights(engine, weights))
        stalls_ms.append((time.monotonic() - began) * 1000)
