"""What if: scoring or selection again over recorded groups, beside what happened. Writes nothing: `streamdpo replay`.

    scored topic -> (the reward sources asked again) -> select with other settings -> compared with the pair or the drop

Both kinds start from scored groups, which hold their candidates whole and outlive the topic `candidates`: a group that
was never scored has nothing to compare with. The reference's log-probs are those on record, unless the settings name
another reference. Selection and scoring are the roles' own functions.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Literal, NamedTuple

import msgspec

from deploy.config import Policy, RunConfig
from deploy.inspect_log import newest_entries
from streaming import topics
from streaming.asking import Answers, ask
from streaming.config import SelectionConfig
from streaming.history import decoded, entries, records
from streaming.log.protocol import Entry, Log
from streaming.records import Feedback, Group, Pair, Route, ScoredGroup, SourceRewards
from streaming.rewards import WeightedSource
from streaming.scoring import penalty, scored
from streaming.selector import prompt_text, select

Start = Literal["candidates", "scored"]


class Outcome(NamedTuple):
    """What became of a group: its route, and of a pair the roles and margins."""

    route: Route
    reason: str = ""  # of a drop; a pair does not say why it is not another one
    chosen: int | None = None
    rejected: int | None = None
    external: float | None = None
    implicit: float | None = None

    @property
    def is_pair(self) -> bool:
        return self.route != "drop"


class Change(NamedTuple):
    """A group of which something else would have become."""

    group_id: str
    request_number: int
    prompt: str
    before: Outcome
    after: Outcome

    @property
    def kind(self) -> str:
        if self.before.is_pair != self.after.is_pair:
            return "appears" if self.after.is_pair else "disappears"
        if not self.after.is_pair:
            return "other reason"
        return "other route" if self.before.route != self.after.route else "other roles"


class Rewards(NamedTuple):
    """What one source said about all candidates."""

    num_values: int
    num_missing: int
    total: float

    @property
    def mean(self) -> float | None:
        return self.total / self.num_values if self.num_values else None


class Replayed(NamedTuple):
    """Side by side: what happened, and what would have."""

    num_groups: int
    num_waiting: int  # scored, and not selected yet: there is nothing to compare with
    before: list[Outcome]
    after: list[Outcome]
    changes: list[Change]
    rewards_before: dict[str, Rewards]
    rewards_after: dict[str, Rewards]

    def counts(self, outcomes: Sequence[Outcome]) -> Counter[tuple[str, str]]:
        return Counter((one.route, one.reason) for one in outcomes)


def replay(
    log: Log, config: RunConfig, policy: Policy, recorded: RunConfig, start: Start, limit: int | None
) -> Replayed:
    """Run the newest `limit` recorded groups (all: None) through these settings again.

    `recorded` holds the settings that the run was started with. Raises what a missing reward function or model raises.
    """
    happened = _happened(log, policy.name)
    groups = _scored_groups(log, limit)
    found = Replayed(0, 0, [], [], [], {}, {})
    with ExitStack() as stack:
        pairs: Iterator[tuple[ScoredGroup, ScoredGroup]]
        pairs = _scored_again(groups, config, recorded, stack) if start == "candidates" else ((g, g) for g in groups)
        for before, after in pairs:
            found = _add(found, before, after, happened.get(before.group.group_id), policy)
    return found


def outcome(scored_group: ScoredGroup, settings: SelectionConfig, policy: str) -> Outcome:
    """What the selector makes of a group under these settings."""
    selection = select(scored_group, settings, policy=policy)
    if selection.pair is None:
        return Outcome("drop", selection.decision.reason)
    return _outcome_of(selection.pair)


def _add(found: Replayed, old: ScoredGroup, new: ScoredGroup, before: Outcome | None, policy: Policy) -> Replayed:
    for source, into in ((old, found.rewards_before), (new, found.rewards_after)):
        _count(source.rewards, into)
    if before is None:
        return found._replace(num_groups=found.num_groups + 1, num_waiting=found.num_waiting + 1)
    after = outcome(new, policy.selection, policy.name)
    found.before.append(before)
    found.after.append(after)
    if before[:4] != after[:4]:
        request = old.group.request
        found.changes.append(Change(old.group.group_id, request.number, prompt_text(request), before, after))
    return found._replace(num_groups=found.num_groups + 1)


def _count(rewards: Iterable[SourceRewards], into: dict[str, Rewards]) -> None:
    for source in rewards:
        so_far = into.get(source.source, Rewards(0, 0, 0.0))
        values = [value for value in source.values if value is not None]
        into[source.source] = Rewards(
            so_far.num_values + len(values),
            so_far.num_missing + len(source.values) - len(values),
            so_far.total + sum(values),
        )


# What happened


def _happened(log: Log, policy: str) -> dict[str, Outcome]:
    """By group: the selector's first word about it, as readers take it."""
    found: dict[str, Outcome] = {}
    for _, pair in records(log, topics.pairs(policy).name, Pair):
        found.setdefault(pair.group_id, _outcome_of(pair))
    for _, one in records(log, topics.FEEDBACK.name, Feedback):
        is_selectors = one.policy == policy and one.stage.partition(".")[0] == "selector"
        if is_selectors and one.ending == "dropped":
            found.setdefault(one.group_id, Outcome("drop", one.reason))
    return found


def _outcome_of(pair: Pair) -> Outcome:
    rejected = None if pair.rejected is None else pair.rejected.candidate
    margins = pair.margins
    return Outcome(pair.route, "", pair.chosen.candidate, rejected, margins.external, margins.implicit)


def _scored_groups(log: Log, limit: int | None) -> Iterator[ScoredGroup]:
    """Each request's first scored group: a second one is a duplicate to the selector."""
    topic = topics.SCORED.name
    found: Iterable[Entry] = (
        entries(log, topic) if limit is None else newest_entries(log, log.end_offsets(topic), limit)
    )
    seen: set[bytes] = set()
    for entry, group in decoded(ScoredGroup, found):
        if entry.key not in seen:
            seen.add(entry.key)
            yield group


# Scoring again


def _scored_again(
    groups: Iterator[ScoredGroup], config: RunConfig, recorded: RunConfig, stack: ExitStack
) -> Iterator[tuple[ScoredGroup, ScoredGroup]]:
    """Each group as it is on record, and as these settings score it."""
    from deploy.roles import references
    from streaming.rewards import build_rewards

    sources = build_rewards(config.rewards, config.scoring, trust_remote_code=config.trust_remote_code)
    for one in sources:
        stack.callback(one.source.close)
    pricing = references(config) if _references(config) != _references(recorded) else None
    runner = stack.enter_context(asyncio.Runner())
    while chunk := list(islice(groups, config.scoring.max_groups)):
        answered = runner.run(_ask_all(chunk, sources))
        priced = [one.reference.price([old.group for old in chunk]) for one in pricing or []]
        for place, (old, answers) in enumerate(zip(chunk, answered, strict=True)):
            rewards = [*answers.rewards, *penalty(old.group, answers.rewards, config.scoring.missing_eos_penalty)]
            if pricing is None:
                yield old, msgspec.structs.replace(old, rewards=rewards)
                continue
            assert old.source is not None, "the scorer writes the source"
            own, *further = [logprobs[place] for logprobs in priced]
            yield old, scored(old.group, Answers(rewards, own, list(further)), pricing=pricing, source=old.source)


def _references(config: RunConfig) -> list[tuple[str, str]]:
    return [(policy.reference, policy.learner.dtype) for policy in config.every_policy]


async def _ask_all(chunk: Sequence[ScoredGroup], sources: Sequence[WeightedSource]) -> list[Answers]:
    """All sources about all groups of a chunk at once, as the scorer does."""
    recorded = {one.group.group_id: one.reference_logprobs for one in chunk}

    async def price(group: Group) -> list[float]:
        return recorded[group.group_id]

    return list(await asyncio.gather(*(ask(one.group, sources, [price]) for one in chunk)))
