"""Did a run keep its promises? Read off-line from its log and checkpoints, after faults: heal, drain, stop, then check.

    Books (what lies in the log and the checkpoints) -> invariants -> violations, each with the ids that break it

Every invariant is a function of Books alone. It repeats nothing of the roles' own bookkeeping: what a learner says
about staleness or an audit about endings is worked out again from the records.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from streaming import topics
from streaming.dead_letters import MARK
from streaming.history import entries
from streaming.log.protocol import Log
from streaming.records import FINAL_ENDINGS, Feedback, Pair, WeightVersion
from tests.books import Books, Example

MAX_IDS = 8
"""Ids that a violation's text shows: enough to begin with."""


class Violation(NamedTuple):
    """A promise that was broken, and by what."""

    invariant: str
    what: str
    ids: tuple[Any, ...]

    def __str__(self) -> str:
        more = f" and {len(self.ids) - MAX_IDS} more" if len(self.ids) > MAX_IDS else ""
        return f"{self.invariant}: {self.what}: {', '.join(map(str, self.ids[:MAX_IDS]))}{more}"


class Acknowledged(NamedTuple):
    """An append that somebody was told is durable."""

    topic: str
    partition: int
    offset: int
    value: bytes


# The invariants


def lost(books: Books) -> list[Violation]:
    """Every request has ended, or lies in front of a stage that will read it; and no number was left out."""
    gone = set(books.requests) - books.ended() - books.backlog()
    first = min(books.requests, default=0) if books.is_trimmed(topics.PROMPTS.name) else 0
    gaps = set(range(first, max(books.requests, default=-1) + 1)) - set(books.requests)
    return _broken("lost", "requests that ended no way and are nowhere", gone) + _broken(
        "lost", "request numbers that were never issued", gaps
    )


def trained_twice(books: Books) -> list[Violation]:
    """In what the newest checkpoint descends from, an example was in one step, and a request had one content."""
    steps: dict[Example, set[tuple[int, int]]] = defaultdict(set)
    contents: dict[int, set[str]] = defaultdict(set)
    for one in books.in_steps():
        steps[one.request_number, one.index].add((one.epoch or 0, one.step or 0))
        contents[one.request_number].add(one.content_hash)
    twice = {f"{example} in {sorted(found)}" for example, found in steps.items() if len(found) > 1}
    mixed = {number for number, found in contents.items() if len(found) > 1}
    return _broken("trained twice", "examples in more than one surviving step", twice) + _broken(
        "trained twice", "requests with two contents in surviving steps", mixed
    )


def forgotten(books: Books) -> list[Violation]:
    """What was in a step of the newest checkpoint is settled there, and what is called trained was in such a step."""
    steps = {(one.request_number, one.index, one.epoch, one.step) for one in books.in_steps()}
    unsettled = {(number, index) for number, index, _, _ in steps if not books.lineage.has_settled((number, index))}
    told = {(one.request_number, one.index, one.epoch, one.step) for one in books.feedback if one.ending == "trained"}
    outside = {place for place in told if not books.lineage.has(place[2], place[3])}
    return _broken("forgotten", "trained examples that the newest checkpoint would train again", unsettled) + _broken(
        "forgotten", "(request, index, epoch, step) called trained outside the surviving lineage", outside
    )


def ended_twice(books: Books) -> list[Violation]:
    """An example has one ending, however often it was told."""
    twice = {
        f"{example}: {', '.join(sorted({_told(one) for one in told}))}"
        for example, told in books.final_endings().items()
        if len({(one.ending, (one.epoch, one.step) if one.ending == "trained" else None) for one in told}) > 1
    }
    return _broken("ended twice", "examples with different endings", twice)


def _told(one: Feedback) -> str:
    where = f"{one.epoch}/{one.step}" if one.ending == "trained" else one.reason
    return f"{one.ending} by {one.stage} ({where})"


def versions_go_down(books: Books) -> list[Violation]:
    """Within an epoch each published number is above the one before, and no candidate was sampled backwards."""
    newest: dict[int, int] = {}
    known: list[WeightVersion] = []
    down = []
    for one in books.weights:
        version = one.record.version
        if version.number <= newest.get(version.epoch, -1) and one.record not in known:  # sent twice is said once
            down.append(f"{version} at {one.entry.where}")
        newest[version.epoch] = max(version.number, newest.get(version.epoch, -1))
        known.append(one.record)
    backwards = {
        f"{one.record.group_id} at {one.entry.where}"
        for one in books.groups
        for candidate in one.record.candidates
        if any(later.version < earlier.version for earlier, later in _neighbours(candidate.spans))
    }
    unknown = {
        str(span.version)
        for one in books.groups
        if one.record.policy == books.policy
        for candidate in one.record.candidates
        for span in candidate.spans
        if span.version.epoch in newest and span.version.number > newest[span.version.epoch]
    }
    return [
        *_broken("versions", "published numbers that do not rise within their epoch", down),
        *_broken("versions", "candidates whose spans go back to an older version", backwards),
        *_broken("versions", "versions that sampled and were never published", unknown),
    ]


def too_stale(books: Books) -> list[Violation]:
    """Everything trained on was within the bound, by its own account and worked out again from the weights."""
    bound = books.max_staleness
    if bound is None:
        return []
    told = {
        f"{one.request_number}: {one.staleness}"
        for one in books.in_steps()
        if one.staleness is None or not 0 <= one.staleness <= bound
    }
    by_content = {(one.record.pair_id, one.record.content_hash): one.record for one in books.pairs}
    found = {
        f"{one.request_number}: {age}"
        for one in books.in_steps()
        if one.sampled_by is None
        and (pair := by_content.get((one.pair_id or "", one.content_hash))) is not None
        and (age := _age(pair, _weights_at(books, one))) is not None
        and not 0 <= age <= bound
    }
    return _broken("staleness", f"requests trained on beyond {bound}, by their own account", told) + _broken(
        "staleness", f"requests trained on beyond {bound}, by the versions of their tokens", found
    )


def _weights_at(books: Books, step: Feedback) -> WeightVersion | None:
    """The version that the learner had published when it took this step; None where the log no longer has it."""
    found = [one.record for one in books.weights if one.record.version.epoch == step.epoch]
    before = [one for one in found if one.step < (step.step or 0)]
    return max(before, key=lambda one: one.version, default=None)


def _age(pair: Pair, current: WeightVersion | None) -> float | None:
    """Versions between the oldest token and `current`; infinite off the lineage, None where it cannot be known."""
    if current is None:
        return None
    last = {version.epoch: version.number for version in (*current.lineage, current.version)}
    spans = [span.version for side in (pair.chosen, pair.rejected) if side is not None for span in side.spans]
    ages = [
        current.version.number - version.number if version.number <= last.get(version.epoch, -1) else float("inf")
        for version in spans
    ]
    return max(ages, default=0)


def out_of_balance(books: Books) -> list[Violation]:
    """Of every stage: in = out + dropped + dead-lettered + backlog, and nothing came out that did not go in."""
    requested = set(books.requests)
    sampled = {one.record.request.number for one in books.groups} | books.unreadable(topics.CANDIDATES)
    to_score = {one.record.request.number for one in books.groups if one.record.request.purpose == "train"}
    scored = {one.record.group.request.number for one in books.scored} | books.unreadable(topics.SCORED)
    paired = {(one.record.request_number, one.record.index) for one in books.pairs}
    paired |= {(number, 0) for number in books.unreadable(topics.pairs(books.policy))}
    waiting_scored = {one.group.request.number for one in books.waiting(books.scored)}
    return [
        *_balance(
            books, "generator", requested, sampled, {one.number for one in books.waiting(books.requests.values())}
        ),
        *_balance(books, "scorer", sampled, scored, {one.request.number for one in books.waiting(books.groups)}),
        *_broken("balance", "scorer: scored what nobody sampled", scored - to_score),
        *_balance(books, "selector", scored, {number for number, _ in paired}, waiting_scored),
        *_balance_learner(books, paired),
    ]


def _balance(books: Books, stage: str, taken: set[int], given: set[int], backlog: set[int]) -> list[Violation]:
    ended = {one.request_number for one in books.feedback if one.stage == stage and one.ending in FINAL_ENDINGS}
    topic = {"generator": topics.PROMPTS, "scorer": topics.CANDIDATES, "selector": topics.SCORED}[stage]
    made_up = set() if books.is_trimmed(topic.name) else given - taken
    return _broken("balance", f"{stage}: went in and nothing came out", taken - given - ended - backlog) + _broken(
        "balance", f"{stage}: came out and never went in", made_up
    )


def _balance_learner(books: Books, paired: set[Example]) -> list[Violation]:
    ended = {
        (one.request_number, one.index)
        for one in books.feedback
        if one.stage == "learner" and one.ending in FINAL_ENDINGS
    }
    waiting = books.backlog_examples()
    return _broken("balance", "learner: went in and nothing came out", paired - ended - waiting)


def poison_lost(books: Books) -> list[Violation]:
    """Bytes that are no record, behind the place where a stage goes on, lie untouched among the dead letters."""
    kept = {
        (letter.source.topic, letter.source.partition, letter.source.offset): letter.value
        for letter in books.letters
        if letter.stage != MARK
    }
    gone = [
        entry.where
        for entry in books.broken
        if entry.offset < books.committed.get((entry.topic, entry.partition), 0)
        and kept.get((entry.topic, entry.partition, entry.offset)) != entry.value
    ]
    return _broken("poison", "bytes that a stage passed over without a dead letter", gone)


def unknown_requests(books: Books) -> list[Violation]:
    """Feedback is about requests that were issued, under their own group."""
    if books.is_trimmed(topics.PROMPTS.name):
        return []
    unknown = {
        one.request_number for one in books.feedback if books.group_numbers.get(one.group_id) != one.request_number
    }
    return _broken("unknown", "requests that feedback is about and nobody issued", unknown)


def unknown_pairs(books: Books) -> list[Violation]:
    """Every trained example lies in the pairs, with the very content that was trained on."""
    if books.is_trimmed(topics.pairs(books.policy).name):
        return []
    known = {(one.record.pair_id, one.record.content_hash) for one in books.pairs}
    trained = [*books.in_steps(), *(one for one in books.feedback if one.ending == "trained")]
    unknown = {
        f"{one.request_number}: {one.pair_id}" for one in trained if (one.pair_id, one.content_hash) not in known
    }
    return _broken("unknown", "pairs that were trained on and are not in the log", unknown)


INVARIANTS: tuple[Callable[[Books], list[Violation]], ...] = (
    lost,
    trained_twice,
    forgotten,
    ended_twice,
    versions_go_down,
    too_stale,
    out_of_balance,
    poison_lost,
    unknown_requests,
    unknown_pairs,
)


def check(
    log: Log,
    *,
    policy: str,
    checkpoints: Path | None = None,
    max_staleness: int | None = None,
    acknowledged: Iterable[Acknowledged] = (),
) -> list[Violation]:
    """Every broken promise of a run that is not at work now; `checkpoints` is its RUN/checkpoints/POLICY.

    A run that was stopped in the middle has a backlog, which is no violation; `unfinished` tells whether it has one.
    """
    books = Books(log, policy=policy, checkpoints=checkpoints, max_staleness=max_staleness)
    return [*lost_appends(log, acknowledged), *(one for invariant in INVARIANTS for one in invariant(books))]


def unfinished(log: Log, *, policy: str, checkpoints: Path | None = None) -> list[Violation]:
    """Requests that have not ended: of a run that came to the end of its data there are none."""
    books = Books(log, policy=policy, checkpoints=checkpoints)
    return _broken("unfinished", "requests that have not ended", set(books.requests) - books.ended())


def lost_appends(log: Log, acknowledged: Iterable[Acknowledged]) -> list[Violation]:
    """What was acknowledged lies where it was said to lie, unless retention or compaction has taken it since."""
    by_topic: dict[str, list[Acknowledged]] = defaultdict(list)
    for one in acknowledged:
        by_topic[one.topic].append(one)
    gone = []
    for topic, told in by_topic.items():
        begins = log.begin_offsets(topic)
        there = {(entry.partition, entry.offset): entry.value for entry in entries(log, topic)}
        row = topics.find(topic)
        for one in told:
            found = there.get((one.partition, one.offset))
            may_be_gone = one.offset < begins[topic, one.partition] or (row is not None and row.compacted)
            if found != one.value and not (found is None and may_be_gone):
                gone.append(f"{topic}/{one.partition}@{one.offset}")
    return _broken("lost", "appends that were acknowledged and are not there", gone)


def _neighbours(spans: Any) -> Iterable[tuple[Any, Any]]:
    in_order = sorted(spans, key=lambda span: span.start)
    return itertools.pairwise(in_order)


def _broken(invariant: str, what: str, ids: Iterable[Any]) -> list[Violation]:
    found = tuple(sorted(set(ids), key=str))
    return [Violation(invariant, what, found)] if found else []
