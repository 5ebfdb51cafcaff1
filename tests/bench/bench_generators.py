"""Benchmark `generators`: 1 to 256 generators without a model, as threads or as processes, against one real log.

Everything else is as in a run: scheduler, scorer, selector, the learner's lead, claims, weight versions, checkpoints.
All sizes are asked for the same pace, however many share it, so what is measured is what a further generator costs.
Held: the pace that the engines' times allow, the bound of staleness, and the memory of every process.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from streaming import topics
from streaming.heartbeat import role_states
from streaming.history import between
from streaming.log import partitions
from streaming.log.protocol import Log, Offsets
from streaming.log.sqlite import SQLiteLog
from streaming.records import Feedback, decode
from tests.bench.logs import make_topics, opened
from tests.bench.processes import cpu_seconds, memory_kib
from tests.bench.rows import row
from tests.bench.simulated import ROLES, Sizes
from tests.bench.simulated_process import Part

NUMBERS = (1, 4, 16, 64, 256)
PACE = 100.0
"""Groups a second that the engines of all generators give together."""

CONCURRENCY = 4
BATCH_SIZE = 16
VERSIONS_AHEAD = 4
"""Weight versions that are published while a full pipeline is consumed."""

GOAL_PACE = 0.9
"""Share of what the engines could give at least: the rest is waiting for prompts, and the weight updates."""

GOAL_GROWTH = 1.1
"""Memory at the end of the time measured, against its beginning."""

WARM_S = 5.0
MEASURED_S = 20.0
START_S = 600.0
POLL_S = 0.25


class Seen(NamedTuple):
    """What a run did in the time measured."""

    groups_per_s: float
    ages: dict[int, int]  # staleness -> examples
    num_stale: int
    cpu_cores: float  # of the generators
    memory_kib: tuple[int, int]  # of the generators, at the beginning and at the end
    num_processes: int
    start_s: float  # until every generator had prompts
    load: float


def run(numbers: tuple[int, ...] = NUMBERS, kinds: tuple[str, ...] = ("threads", "processes")) -> list[dict[str, Any]]:
    """A quarter of an hour."""
    rows = []
    for kind in kinds:
        for number in numbers:
            sizes = sizes_of(number)
            rows += rows_of(kind, sizes, measure(kind, sizes))
    return rows


def sizes_of(num_generators: int) -> Sizes:
    """So many generators, of PACE together, and a pipeline that is deep enough for all of them."""
    in_flight = num_generators * CONCURRENCY
    depth = 2 * in_flight + 4 * BATCH_SIZE
    return Sizes(
        num_generators=num_generators,
        concurrency=CONCURRENCY,
        sampling_s=in_flight / PACE,
        pipeline_depth=depth,
        batch_size=BATCH_SIZE,
        sync_every=depth // (VERSIONS_AHEAD * BATCH_SIZE),
    )


def measure(kind: str, sizes: Sizes, *, warm_s: float = WARM_S, measured_s: float = MEASURED_S) -> Seen:
    """A run of its own, on a log with a partition for every generator."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        url, run = f"sqlite:///{folder}/log.db", f"bench-{os.getpid()}"
        make_partitions(url, run, max(4, sizes.num_generators))
        make_topics(url, run)
        parts: list[Part] = []
        try:
            begun_s = time.monotonic()
            parts += [Part(url, run, folder, sizes, part) for part in (",".join(ROLES), kind)]
            with opened(url, run) as log:
                wait_until_all_work(log, parts, sizes.num_generators, begun_s)
                start_s = time.monotonic() - begun_s
                time.sleep(warm_s)
                seen = look(log, parts[1].pids, measured_s, start_s)
            for part in reversed(parts):
                part.end()
        finally:
            for part in parts:
                part.kill()
    return seen


def make_partitions(url: str, run: str, number: int) -> None:
    """As many as generators: the embedded log's own number is for a few processes on one machine."""
    with opened(url, run) as log:
        bare: Any = getattr(log, "bare", log)
        assert isinstance(bare, SQLiteLog)
        for topic in (topics.PROMPTS, topics.CANDIDATES, topics.SCORED):
            row = topic._replace(partitions=number)
            bare._writer.run(lambda database, row=row: partitions.register(database, f"{run}.{row.name}", row))


def wait_until_all_work(log: Log, parts: list[Part], num_generators: int, begun_s: float) -> None:
    """Every generator has weights and groups in flight, and the learner has taken a step."""
    while True:
        states = role_states(log)
        ready = [state for state in states.values() if state.role == "generator" and state.numbers.get("in_flight")]
        learner = states.get("learner-0")
        if len(ready) == num_generators and learner is not None and learner.numbers.get("step", 0) > 0:
            return
        for part in parts:
            part.check()
        if time.monotonic() - begun_s > START_S:
            raise RuntimeError(f"{len(ready)} of {num_generators} generators work after {START_S} s")
        time.sleep(POLL_S)


def look(log: Log, pids: list[int], measured_s: float, start_s: float) -> Seen:
    begin, begin_s = log.end_offsets(topics.FEEDBACK.name), time.monotonic()
    cpu_s, memory = cpu_seconds(pids), memory_kib(pids)
    time.sleep(measured_s)
    end, seconds = log.end_offsets(topics.FEEDBACK.name), time.monotonic() - begin_s
    cores, memory_end = (cpu_seconds(pids) - cpu_s) / seconds, memory_kib(pids)
    told = ended(log, begin, end)
    ages: dict[int, int] = {}
    for one in told:
        if one.staleness is not None:
            ages[one.staleness] = ages.get(one.staleness, 0) + 1
    return Seen(
        groups_per_s=len(told) / seconds,
        ages=ages,
        num_stale=sum(one.reason == "stale" for one in told),
        cpu_cores=cores,
        memory_kib=(memory, memory_end),
        num_processes=len(pids),
        start_s=start_s,
        load=os.getloadavg()[0],
    )


def ended(log: Log, begin: Offsets, end: Offsets) -> list[Feedback]:
    """What freed a slot: an example consumed, or a group dropped before there was one."""
    told = [decode(Feedback, entry.value) for entry in between(log, begin, end)]
    return [one for one in told if one.ending == "consumed" or (one.ending == "dropped" and one.stage != "learner")]


def bound(sizes: Sizes) -> int:
    """Versions by which pacing lets a token age: those of the steps that the requests before it can make, and the one
    under way when it is sampled. Groups that many others overtake are beyond it, and max_staleness is for them."""
    return -(-sizes.pipeline_depth // (sizes.batch_size * sizes.sync_every)) + 1


def rows_of(kind: str, sizes: Sizes, seen: Seen) -> list[dict[str, Any]]:
    what = f"generators: {sizes.num_generators} as {kind}"
    oldest = max(seen.ages, default=0)
    num = sum(seen.ages.values()) + seen.num_stale
    within = sum(count for age, count in seen.ages.items() if age <= bound(sizes))
    before, after = seen.memory_kib
    per_generator = after / 1024 / sizes.num_generators
    return [
        row(f"{what}: pace (load {seen.load:.1f}, all at work after {seen.start_s:.0f} s)", round(seen.groups_per_s, 1),
            f">= {GOAL_PACE * PACE:g}", seen.groups_per_s >= GOAL_PACE * PACE, "groups/s"),
        row(f"{what}: oldest token trained ({within / max(num, 1):.1%} within {bound(sizes)} by pacing alone; "
            f"{seen.num_stale} dropped as stale)", oldest, f"<= {sizes.max_staleness}",
            oldest <= sizes.max_staleness, "versions"),
        row(f"{what}: memory of each (grew by {after / before - 1:.1%} in {MEASURED_S:.0f} s)",
            round(per_generator, 1), f"grows below {GOAL_GROWTH - 1:.0%}", after / before < GOAL_GROWTH, "MiB"),
        row(f"{what}: processor time of each", round(1000 * seen.cpu_cores / sizes.num_generators, 1), None, True,
            "ms/s"),
    ]  # fmt: skip


if __name__ == "__main__":
    for one in run(tuple(map(int, sys.argv[2:])) or NUMBERS, (sys.argv[1],)):
        print(one["name"], one["ours"], one["unit"], one["holds"])
