"""Benchmark `sizing`: the model of a run, fed with the measured costs, up to 4,096 generators and 64 learner ranks.

`python -m tests.bench.sizing` prints the same as a guide.
"""

from typing import Any

from tests.bench.rows import row
from tests.bench.sizing import COSTS, SIZES, Measured, Sized, ceilings, read, size


def run() -> list[dict[str, Any]]:
    """Half a minute. Nothing where the costs have not been measured."""
    if not COSTS.exists():
        print(f"the model is not run: {COSTS} is missing (make bench ONLY=costs)")
        return []
    found = read()
    return [bottleneck(found), *(one for number in SIZES for one in rows_of(size(number, found)))]


def bottleneck(found: Measured) -> dict[str, Any]:
    """What is full first where there is one of each."""
    name, pace = ceilings(found)[0]
    return row(f"model: first bottleneck, one of each on {found.backend} ({name})", round(pace), None, True, "groups/s")


def rows_of(one: Sized) -> list[dict[str, Any]]:
    what = f"model: {one.plan.num_generators:,} generators, {one.ranks} ranks"
    busiest = max((share, name) for name, share in one.ran.use.items() if name != "generators")
    pace, oldest = one.ran.groups_per_s, max(one.ran.ages)
    return [
        row(f"{what}: pace ({busiest[1]} busy {busiest[0]:.0%})", round(pace, 2), f">= {one.wanted_pace:.4g}",
            pace >= one.wanted_pace, "groups/s"),
        row(f"{what}: oldest token trained", oldest, f"<= {one.plan.max_staleness}",
            oldest <= one.plan.max_staleness, "versions"),
        row(f"{what}: groups under way", round(one.memory_bytes / 1e6), None, True, "MB"),
    ]  # fmt: skip
