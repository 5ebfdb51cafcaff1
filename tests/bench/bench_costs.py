"""Benchmark `costs`: what a group costs each role and the broker, and what a generator costs that has nothing to do.

A simulated run as fast as this machine makes it, every role in a process of its own, groups of N = 16 answers of 512
tokens. Processor time is the kernel's, so that it stays nearly the same where others use the machine too. These are
the numbers that the model in `pipeline.py` is fed with.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streaming import topics
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.log.protocol import Log
from streaming.records import RoleState
from tests.bench.bench_generators import ended
from tests.bench.logs import Served, backends, make_topics, opened, served
from tests.bench.processes import cpu_seconds
from tests.bench.rows import row
from tests.bench.simulated import ROLES, Sizes
from tests.bench.simulated_process import Part

BUSY = Sizes(
    num_generators=2, concurrency=8, sampling_s=0.02, num_candidates=16, num_tokens=512, pipeline_depth=128,
    batch_size=16, step_s=0.0, sync_every=16,
)  # fmt: skip
"""Everybody has work all the time."""

IDLE = BUSY._replace(num_generators=4, sampling_s=1e9, pipeline_depth=32)
"""Engines that never answer."""

WARM_S = 5.0
BUSY_S = 15.0
IDLE_S = 10.0
START_S = 120.0


def run() -> list[dict[str, Any]]:
    """About two minutes."""
    rows = []
    for backend in backends():
        with served(backend) as log:
            rows += busy_rows(backend, log) + idle_rows(backend, log)
    return rows


def busy_rows(backend: str, served: Served) -> list[dict[str, Any]]:
    """Milliseconds of each role per group that ended."""
    with started(served.url, "busy", BUSY) as (log, parts):
        wait_for(log, parts, lambda states: states["learner-0"].numbers.get("step", 0) > 0)
        time.sleep(WARM_S)
        begin, begun_s = log.end_offsets(topics.FEEDBACK.name), time.monotonic()
        cores = used(pids_of(parts, served), BUSY_S)
        end, seconds = log.end_offsets(topics.FEEDBACK.name), time.monotonic() - begun_s
        pace = len(ended(log, begin, end)) / seconds
        sizes = record_sizes(log)
    what = f"on {backend}, of a group ({pace:.0f} groups/s, load {os.getloadavg()[0]:.1f})"
    found = [row(f"cost: {name} {what}", round(1000 * cores[name] / pace, 3), None, True, "ms") for name in cores]
    return found + [row(f"cost: bytes in {topic} on {backend}", size, None, True, "KB") for topic, size in sizes]


def idle_rows(backend: str, served: Served) -> list[dict[str, Any]]:
    """Milliseconds a second of each role while its run waits for the engines, and of the broker for a generator."""
    found: dict[int, dict[str, float]] = {}
    for number in (1, IDLE.num_generators):
        with started(served.url, f"idle-{number}", IDLE._replace(num_generators=number)) as (log, parts):
            wanted = {f"generator-{i}" for i in range(number)}
            wait_for(log, parts, lambda states, wanted=wanted: all(states[one].health == "ready" for one in wanted))
            time.sleep(WARM_S)
            found[number] = used(pids_of(parts, served), IDLE_S)
    one, many = found[1], found[IDLE.num_generators]
    each = {name: (many[name] - one[name]) / (IDLE.num_generators - 1) for name in one}
    load = f"load {os.getloadavg()[0]:.1f}"
    return [
        *(row(f"cost: {name} on {backend}, with nothing to do ({load})", round(1000 * one[name], 2), None, True, "ms/s")
          for name in one),
        *(row(f"cost: {name} on {backend}, of an idle generator ({load})", round(1000 * each[name], 2), None, True,
              "ms/s")
          for name in one if name == "broker"),
    ]  # fmt: skip


def pids_of(parts: dict[str, Part], served: Served) -> dict[str, list[int]]:
    """The processes of each role, and of the broker where it is ours."""
    roles = {"generator" if part == "threads" else part: parts[part].pids for part in parts}
    return roles | ({"broker": served.pids} if served.pids else {})


def used(pids: dict[str, list[int]], seconds: float) -> dict[str, float]:
    """Processor time a second, from now on."""
    before = {name: cpu_seconds(found) for name, found in pids.items()}
    begun_s = time.monotonic()
    time.sleep(seconds)
    return {name: (cpu_seconds(found) - before[name]) / (time.monotonic() - begun_s) for name, found in pids.items()}


@contextmanager
def started(url: str, name: str, sizes: Sizes) -> Iterator[tuple[Log, dict[str, Part]]]:
    """A simulated run, a process for each role and one for all generators."""
    run = f"bench-{os.getpid()}-{name}"
    make_topics(url, run)
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for part in (*ROLES, "threads"):
                parts[part] = Part(url, run, Path(folder).resolve(), sizes, part)
            with opened(url, run) as log:
                yield log, parts
            for part in reversed(parts.values()):
                part.end()
        finally:
            for part in parts.values():
                part.kill()


def wait_for(log: Log, parts: dict[str, Part], holds: Any) -> None:
    """Until the states of all roles are so. A role that has not beaten yet has no state."""
    until_s = time.monotonic() + START_S
    while True:
        states: dict[str, RoleState] = role_states(log)
        for part in parts.values():
            part.check()
        if time.monotonic() > until_s:
            raise RuntimeError(f"the simulated run did not begin: {states}")
        try:
            if holds(states):
                return
        except KeyError:
            time.sleep(0.1)
        time.sleep(0.1)


def record_sizes(log: Log) -> list[tuple[str, float]]:
    """Kilobytes of a record of each topic that grows with the tokens."""
    found = []
    for topic in (topics.CANDIDATES, topics.SCORED, topics.pairs("policy")):
        lengths = [len(entry.value) for entry, _ in zip(entries(log, topic.name), range(100), strict=False)]
        found.append((topic.name, round(sum(lengths) / len(lengths) / 1000, 1)))
    return found
