"""What a light run that is over came to: read off-line from its histories, its log and its checkpoints."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from streaming import topics
from streaming.history import entries
from streaming.records import ScoredGroup, decode
from tests.checker import Acknowledged, Violation, check, unfinished
from tests.light.plan import POISON, POLICY
from tests.light.process import Told, histories
from tests.light.run import Injected, LightRun

Key = tuple[str, bytes]
"""Topic and key of a record: of a group, its id."""


class Verdict(NamedTuple):
    """Of one run."""

    violations: list[Violation]
    injected: Counter[str]  # by kind of fault
    recovery_s: dict[str, float]  # by kind: the longest


def judge(run: LightRun) -> Verdict:
    """Read as the observer, whose rights have to be enough for it."""
    told = histories(run.folder)
    acknowledged = [Acknowledged(*record[:3], record[4]) for one in _all(told.values()) for record in one.records]
    checkpoints = run.folder / "checkpoints" / POLICY
    with run.open("observer") as log:
        found = check(
            log, policy=POLICY, checkpoints=checkpoints, max_staleness=run.plan.max_staleness, acknowledged=acknowledged
        )
        found += unfinished(log, policy=POLICY, checkpoints=checkpoints)
        missing = _missing_rewards(entry.value for entry in entries(log, topics.SCORED.name))
    injected = Counter(map(_kind, run.injected)) + missing
    return Verdict([*run.violations, *found], injected, _recoveries(run.injected, told))


def _all(told: Iterable[list[Told]]) -> Iterator[Told]:
    yield from (one for start in told for one in start)


def _missing_rewards(scored: Iterable[bytes]) -> Counter[str]:
    """How often a reward source did not do what it should."""
    counts: Counter[str] = Counter()
    for value in scored:
        if value in POISON:
            continue
        for source in decode(ScoredGroup, value).rewards:
            counts.update(f"reward: {reason}" for reason in set(source.reasons) - {None})
    return counts


def _recoveries(injected: Iterable[Injected], told: dict[str, list[Told]]) -> dict[str, float]:
    """By kind of fault, the longest time until the role wrote again: waiting for work is part of it."""
    longest: dict[str, float] = {}
    for one in injected:
        times = [line.time_s for name, start in told.items() if name.startswith(f"{one.role_id}.") for line in start]
        after = [time_s - one.time_s for time_s in times if time_s > one.time_s]
        if one.role_id and after:
            longest[_kind(one)] = max(longest.get(_kind(one), 0.0), min(after))
    return longest


def _kind(one: Injected) -> str:
    """With the role that it happened to, whichever of them: "kill: scorer"."""
    return f"{one.kind}: {one.role_id.split('-')[0]}" if one.role_id else one.kind


def num_late_copies(run: LightRun) -> dict[tuple[str, str], int]:
    """By role and moment of its zombie: appends after it woke of what somebody else had appended before."""
    told = histories(run.folder)
    found = {}
    for zombie in run.zombies:
        assert zombie.woken_s is not None and zombie.life.fate is not None
        others = (start for name, start in told.items() if name != zombie.name)
        early = {key for start in others for one in start if one.time_s < zombie.woken_s for key in _keys(one)}
        late = (_keys(one) & early for one in told[zombie.name] if one.time_s >= zombie.woken_s)
        found[zombie.life.process.kind, zombie.life.fate.kind or ""] = sum(map(bool, late))
    return found


def _keys(told: Told) -> set[Key]:
    return {(record[0], record[3]) for record in told.records}
