"""Benchmark `stages`: what the scorer and the selector cost per group, without any model's forward pass.

A real log with real groups of N = 8 answers of 64 tokens, a trivial reward function of a person's kind, and a
reference that knows its answer. Everything else is what a run does: decoding, threads, durable appends, commits.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streaming.config import ScoringConfig, SelectionConfig
from streaming.heartbeat import Heartbeat
from streaming.log import open_log
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import Group, encode
from streaming.rewards import WeightedSource
from streaming.rewards.function import FunctionSource
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from streaming.selector import Selector
from tests.bench.machine import machine
from tests.builders import make_candidate, make_group

NUM_GROUPS = 3000
NUM_CANDIDATES = 8
NUM_TOKENS = 64
GOAL_MS = 1.0


class FreeReference:
    """Every log-prob is -1: what is left is our own cost."""

    version = "free"

    def logprobs(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        return [-1.0 for _ in examples]

    def price(self, groups: Sequence[Group]) -> list[list[float]]:
        return [[-1.0] * len(group.candidates) for group in groups]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(text.endswith("7")) for text in completions]


def run() -> list[dict[str, Any]]:
    """Both stages over the same groups, the selector over what the scorer wrote."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder).resolve()}/log.db"
        with open_log(url, run="bench", max_record_bytes=2**23, max_bytes=2**34) as log:
            groups = [make_answers(number) for number in range(NUM_GROUPS)]
            log.append(Output("candidates", group.group_id.encode(), encode(group)) for group in groups)
            scorer_ms = milliseconds_per_group(log, "scorer", "candidates", run_scorer)
            selector_ms = milliseconds_per_group(log, "selector.policy", "scored", run_selector)
    return [row("scorer", scorer_ms), row("selector", selector_ms)]


def make_answers(number: int) -> Group:
    """Eight different answers: some right, some wrong."""
    tokens = list(range(NUM_TOKENS))
    candidates = [
        make_candidate(str(number + i), tokens=tokens, logprobs=[-0.123456789 * i] * NUM_TOKENS)
        for i in range(NUM_CANDIDATES)
    ]
    return make_group(number=number, candidates=candidates)


def run_scorer(log: Log, metrics: Metrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    source = WeightedSource(FunctionSource(reward, name="reward", version="1"), 1.0)
    Scorer(
        log,
        metrics,
        heartbeat,
        sources=[source],
        pricing=[Pricing(FreeReference())],
        config=ScoringConfig(),
        policy="policy",
    ).run(stop)


def run_selector(log: Log, metrics: Metrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    Selector(log, metrics, heartbeat, config=SelectionConfig(sft_floor=0.5), policy="policy").run(stop)


def milliseconds_per_group(log: Log, group: str, topic: str, stage: Callable[..., None]) -> float:
    """Wall time from the first look at the log to the last commit, by the number of groups."""
    metrics, stop = Metrics("bench"), threading.Event()
    heartbeat = Heartbeat(log, metrics, role="bench")
    thread = threading.Thread(target=stage, args=(log, metrics, heartbeat, stop))
    ends = log.end_offsets(topic)
    since = time.perf_counter()
    thread.start()
    while log.committed(group, [topic]) != ends:
        if not thread.is_alive():
            raise RuntimeError(f"{group} ended before its work was done")
        time.sleep(0.01)
    seconds = time.perf_counter() - since
    stop.set()
    thread.join()
    heartbeat.close()
    return seconds / NUM_GROUPS * 1000


def row(name: str, milliseconds: float) -> dict[str, Any]:
    return {
        "name": f"{name} per group (N = {NUM_CANDIDATES})",
        "ours": round(milliseconds, 3),
        "peer": None,
        "ratio": None,
        "goal": f"< {GOAL_MS:g} ms",
        "holds": milliseconds < GOAL_MS,
        "unit": "ms",
        "machine": machine(),
    }
