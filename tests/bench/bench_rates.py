"""Benchmark `rates`: groups a second of the scorer and of the selector, in one process and in two.

Groups of N = 16 answers of 512 tokens (about 140 KB) on a real log; a trivial reward function of a person's kind and a
reference that knows its answer. Everything else is what a run does. Real processes share the partitions; the rate is
counted between the moment at which all of them are at work and the one at which the first partition is empty.
"""

import os
import random
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec

from streaming import topics
from streaming.log.protocol import Log, Output
from streaming.records import Group, encode
from tests.bench.logs import backends, make_topics, opened, served
from tests.bench.processes import cpu_seconds
from tests.bench.rows import row
from tests.bench.stage_process import STAGES, StageProcess
from tests.builders import make_candidate, make_group, make_prompt

NUM_GROUPS = 3000
NUM_CANDIDATES = 16
NUM_TOKENS = 512
VOCABULARY = 150_000
NUM_TEMPLATES = 8
"""Different groups; the others repeat them under other numbers, so that filling the log is quick."""

BATCH = 64
GOAL_PER_CORE = 2000.0
GOAL_SCALING = 1.8
POLL_S = 0.02

GROUPS_OF = {"scorer": "scorer", "selector": topics.selectors("policy")}


class Rate(NamedTuple):
    """What the processes did in the time counted."""

    groups: int
    seconds: float
    cpu_seconds: float  # of all processes together
    load: float  # of the machine in the minute before the end: what else ran

    @property
    def per_second(self) -> float:
        return self.groups / self.seconds


def run(num_groups: int = NUM_GROUPS) -> list[dict[str, Any]]:
    """A few minutes. Two processes need two cores that nothing else uses."""
    rows = []
    for backend in backends():
        with served(backend) as log:
            rates = {number: measure(log.url, f"rates-{os.getpid()}-{number}", number, num_groups) for number in (1, 2)}
        for stage in STAGES:
            rows += rows_of(f"{stage} on {backend}", rates[1][stage], rates[2][stage])
    return rows


def measure(url: str, run: str, num_processes: int, num_groups: int) -> dict[str, Rate]:
    """Fill a run's candidates, score them, and select from what was scored."""
    make_topics(url, run)
    with opened(url, run) as log:
        fill(log, num_groups)
        return {stage: rate(url, run, log, stage, num_processes) for stage in STAGES}


def fill(log: Log, num_groups: int) -> None:
    """Groups with answers of which some are right."""
    draw = random.Random(0)
    templates = [make_template(draw) for _ in range(NUM_TEMPLATES)]
    for first in range(0, num_groups, BATCH):
        groups = [numbered(templates[i % NUM_TEMPLATES], i) for i in range(first, min(first + BATCH, num_groups))]
        log.append(Output(topics.CANDIDATES.name, group.group_id.encode(), encode(group)) for group in groups)


def make_template(draw: random.Random) -> Group:
    """Answers with the token ids, log-probs and texts of a real vocabulary's size."""
    candidates = [
        make_candidate(
            " ".join(draw.choices(("the", "sum", "is", "therefore", "1", "7"), k=NUM_TOKENS)) + str(i),
            tokens=[draw.randrange(VOCABULARY) for _ in range(NUM_TOKENS)],
            logprobs=[-draw.expovariate(1) for _ in range(NUM_TOKENS)],
        )
        for i in range(NUM_CANDIDATES)
    ]
    return make_group(candidates=candidates, request=make_prompt(num_candidates=NUM_CANDIDATES))


def numbered(template: Group, number: int) -> Group:
    return msgspec.structs.replace(template, request=make_prompt(number, num_candidates=NUM_CANDIDATES))


def rate(url: str, run: str, log: Log, stage: str, num_processes: int) -> Rate:
    """Start the processes, let them begin together, and count while all of them have work."""
    _, topic = STAGES[stage]
    ends = log.end_offsets(topic)
    with ExitStack() as stack:
        processes = [stack.enter_context(StageProcess(url, run, stage, i)) for i in range(num_processes)]
        for process in processes:
            process.wait_for("ready")
        for process in processes:
            process.go()
        for process in processes:
            process.wait_for("working")
        found = count(log, GROUPS_OF[stage], ends, [process.pid for process in processes])
        until_done(log, GROUPS_OF[stage], ends)
        for process in processes:
            process.end()
    return found


def count(log: Log, group: str, ends: dict[tuple[str, int], int], pids: list[int]) -> Rate:
    """From now until one partition has nothing left."""
    (topic,) = {topic for topic, _ in ends}
    begun_s, begun_cpu_s, begun = time.perf_counter(), cpu_seconds(pids), sum(log.committed(group, [topic]).values())
    while True:
        time.sleep(POLL_S)
        committed = log.committed(group, [topic])
        if any(committed[place] >= end for place, end in ends.items()):
            break
    seconds, cpu_s = time.perf_counter() - begun_s, cpu_seconds(pids) - begun_cpu_s
    return Rate(sum(committed.values()) - begun, seconds, cpu_s, os.getloadavg()[0])


def until_done(log: Log, group: str, ends: dict[tuple[str, int], int]) -> None:
    (topic,) = {topic for topic, _ in ends}
    while log.committed(group, [topic]) != ends:
        time.sleep(POLL_S)


def rows_of(name: str, one: Rate, two: Rate) -> list[dict[str, Any]]:
    ratio = two.per_second / one.per_second
    what = f"(N = {NUM_CANDIDATES} of {NUM_TOKENS} tokens, load {one.load:.1f})"
    fast = one.per_second >= GOAL_PER_CORE
    cpu_ms = round(one.cpu_seconds / one.groups * 1000, 3)
    return [
        row(f"{name}: groups in one process {what}", round(one.per_second), f">= {GOAL_PER_CORE:g}", fast, "groups/s"),
        row(f"{name}: processor time of a group", cpu_ms, None, True, "ms"),
        row(
            f"{name}: groups in two processes (load {two.load:.1f})",
            round(two.per_second),
            f"> {GOAL_SCALING} times one",
            ratio > GOAL_SCALING,
            "groups/s",
        )
        | {"peer": round(one.per_second), "ratio": round(ratio, 2)},
    ]
