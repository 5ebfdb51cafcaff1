"""How large a run has to be: `python -m tests.bench.sizing` prints the guide from the measured costs.

Needs build/bench/costs.json (`make bench ONLY=costs`). What is assumed about GPUs stands here by name; every other
number is measured, or comes out of the model in `pipeline.py`.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.pipeline import Costs, Pipeline, Plan, Ran

COSTS = Path("build/bench/costs.json")
SIZES = (1, 8, 64, 512, 4096)

PROMPTS_PER_GENERATOR = 1000 / 4096
"""A second: 2,000 tokens a second of every generator, N = 16 answers of 512 tokens a prompt."""

CONCURRENCY = 12
SAMPLING_S = 40.0
"""Groups that a generator samples at once, and how long each takes: a fifth more than the pace asks for."""

RANK_EXAMPLE_S = 0.05
"""A rank's time for an example: 20 a second of each, 1,280 of 64."""

EXAMPLES_PER_RANK = 16
VERSION_S = 10.0
"""To write a version of some billions of parameters, and again to fetch and load it."""

DROP_SHARE = 0.1
MAX_STALENESS = 16
VERSIONS_AHEAD = 6
"""Versions in a full pipeline: what `sync_every` is chosen for."""

SPARE = 1.5
"""Requests in the pipeline against places in the engines: prompts fall to generators by chance."""

TARGET_USE = 0.7
"""Of a process: room for a start after an outage, and for what the machine does beside."""

BROKER_CORES = 8
BROKER_USE = 0.5
REPLICAS = 3
REPLICAS_PER_BROKER = 4000
"""Partition replicas a broker holds well, by Kafka's own advice."""

BROKER_BYTES = 500e6
"""A second in and out of a broker: less than half of a 10 Gbit network."""

SHARED_TOPICS = 3
"""prompts, candidates and scored: as many partitions each as there are generators."""

RETENTION_S = {"candidates": 2 * 86_400, "scored": 7 * 86_400, "pairs.policy": 7 * 86_400}
MIN_REQUESTS, REQUESTS_PER_PLACE = 4000, 4


class Measured(NamedTuple):
    """What `bench_costs` found."""

    costs: Costs
    idle_broker_s: float  # a second, of a generator with nothing to do
    record_bytes: dict[str, float]  # by topic
    backend: str


class Sized(NamedTuple):
    """A size, and what the model makes of it."""

    plan: Plan
    ran: Ran
    wanted_pace: float
    partitions: int
    brokers: int
    ranks: int
    disk_bytes: float
    memory_bytes: float  # of all groups under way


def measured(rows: list[dict[str, Any]], backend: str) -> Measured:
    """The costs without what a role spends on looking for work: that does not grow with the pace."""
    busy: dict[str, tuple[float, float]] = {}
    idle: dict[str, float] = {}
    sizes: dict[str, float] = {}
    each = 0.0
    for row in rows:
        name, number = row["name"], float(row["ours"])
        if found := re.match(rf"cost: (\w+) on {backend}, of a group \((\d+) groups/s", name):
            busy[found[1]] = (number / 1000, float(found[2]))
        elif found := re.match(rf"cost: (\w+) on {backend}, with nothing to do", name):
            idle[found[1]] = number / 1000
        elif found := re.match(rf"cost: bytes in (\S+) on {backend}", name):
            sizes[found[1]] = 1000 * number
        elif re.match(rf"cost: broker on {backend}, of an idle generator", name):
            each = max(0.0, number / 1000)

    def net(role: str) -> float:
        per_group, pace = busy.get(role, (0.0, 1.0))
        return max(per_group / 4, per_group - idle.get(role, 0.0) / pace)  # never less than a quarter: it was measured

    costs = Costs(
        schedule_s=net("scheduler"), score_s=net("scorer"), select_s=net("selector"), lead_s=net("learner"),
        broker_s=net("broker"), hop_s=0.005,
    )  # fmt: skip
    return Measured(costs, each, sizes, backend)


def ceilings(found: Measured) -> list[tuple[str, float]]:
    """Groups a second that one of each can do, the least first."""
    costs = found.costs
    each = {
        "scorer": costs.score_s,
        "selector": costs.select_s,
        "learner's rank 0": costs.lead_s * (1 - DROP_SHARE),
        "scheduler": costs.schedule_s,
        f"broker of {BROKER_CORES} cores": costs.broker_s * REPLICAS / BROKER_CORES / BROKER_USE,
    }
    return sorted(((name, 1 / seconds) for name, seconds in each.items() if seconds), key=lambda one: one[1])


def size(num_generators: int, found: Measured, *, seed: int = 0) -> Sized:
    """Counts for so many generators, and the run that they give."""
    costs, pace = found.costs, num_generators * PROMPTS_PER_GENERATOR
    ranks = max(1, round(num_generators / 64))
    batch_size = ranks * EXAMPLES_PER_RANK
    places = num_generators * CONCURRENCY
    depth = math.ceil(SPARE * places) + 2 * batch_size
    num_scorers = math.ceil(pace * costs.score_s / TARGET_USE)
    num_selectors = math.ceil(pace * costs.select_s / TARGET_USE)
    partitions = 2 ** math.ceil(math.log2(max(4, num_generators, num_scorers, num_selectors)))
    brokers = num_brokers(num_generators, pace, partitions, found)
    plan = Plan(
        num_generators=num_generators,
        concurrency=CONCURRENCY,
        sampling_s=SAMPLING_S,
        num_requests=max(MIN_REQUESTS, REQUESTS_PER_PLACE * places),
        pipeline_depth=depth,
        batch_size=batch_size,
        step_s=EXAMPLES_PER_RANK * RANK_EXAMPLE_S,
        sync_every=max(1, round(depth / batch_size / VERSIONS_AHEAD)),
        publish_s=VERSION_S,
        apply_s=VERSION_S,
        max_staleness=MAX_STALENESS,
        drop_share=DROP_SHARE,
        num_scorers=num_scorers,
        num_selectors=num_selectors,
        broker_cores=brokers * BROKER_CORES,
    )
    ran = Pipeline(plan, costs._replace(broker_s=costs.broker_s * REPLICAS), seed=seed).run()
    disk = REPLICAS * pace * sum(found.record_bytes[topic] * seconds for topic, seconds in RETENTION_S.items())
    return Sized(
        plan, ran, pace, partitions, brokers, ranks, disk, ran.most_outstanding * found.record_bytes["candidates"]
    )


def num_brokers(num_generators: int, pace: float, partitions: int, found: Measured) -> int:
    """By processor time, by partition replicas and by bytes; three at least, for three copies."""
    cores = (pace * found.costs.broker_s * REPLICAS + num_generators * found.idle_broker_s) / BROKER_USE
    # Every record comes in once, goes to the other replicas, and out to one reader.
    num_bytes = pace * sum(found.record_bytes.values()) * (1 + REPLICAS)
    return max(
        3,
        math.ceil(cores / BROKER_CORES),
        math.ceil(partitions * SHARED_TOPICS * REPLICAS / REPLICAS_PER_BROKER),
        math.ceil(num_bytes / BROKER_BYTES),
    )


def guide(found: Measured, sized: list[Sized]) -> str:
    """Markdown, for people."""
    first, *others = ceilings(found)
    lines = [
        f"One of each, with trivial rewards: the first bottleneck is the {first[0]}, at {first[1]:,.0f} groups/s; then "
        + ", ".join(f"the {name} ({pace:,.0f})" for name, pace in others)
        + ". Scorers, selectors and brokers can be more; the scheduler and rank 0 of the learner are one each.",
        "",
        "| generators | prompts/s | partitions | brokers | scorers | selectors | ranks | pipeline_depth | batch_size "
        "| sync_every | pace in the model | oldest token | stale | under way | log on disk | busiest, engines aside |",
        "|" + "---|" * 16,
    ]
    return "\n".join(lines + [line(one) for one in sized])


def line(one: Sized) -> str:
    plan, ran = one.plan, one.ran
    ours = {name: share for name, share in ran.use.items() if name != "generators"}
    busiest = max(ours, key=ours.__getitem__)
    cells = [
        f"{plan.num_generators:,}",
        f"{one.wanted_pace:,.3g}",
        f"{one.partitions:,}",
        one.brokers,
        plan.num_scorers,
        plan.num_selectors,
        one.ranks,
        f"{plan.pipeline_depth:,}",
        f"{plan.batch_size:,}",
        plan.sync_every,
        f"{ran.groups_per_s / one.wanted_pace:.0%}",
        f"{max(ran.ages)} versions",
        f"{ran.endings['stale'] / ran.endings.total():.2%}",
        f"{one.memory_bytes / 1e9:.2g} GB",
        f"{one.disk_bytes / 1e12:.2g} TB",
        f"{busiest} {ours[busiest]:.0%}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def read(path: Path = COSTS) -> Measured:
    """The costs on Kafka where they were measured there, else on the embedded log."""
    rows = json.loads(path.read_text())
    return measured(rows, "Kafka" if any(" on Kafka" in row["name"] for row in rows) else "SQLite")


if __name__ == "__main__":
    if not COSTS.exists():
        sys.exit(f"{COSTS} is missing: measure the costs first (make bench ONLY=costs)")
    costs = read()
    print(guide(costs, [size(number, costs) for number in SIZES]))
