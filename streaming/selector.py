"""Stage: ScoredGroup -> Pair or Feedback. What a group teaches this model, or why it teaches nothing.

`select` is the pure part and may be run over recorded groups again; `Selector` runs it over the log.
"""

import math
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from streaming import topics
from streaming.config import SelectionConfig
from streaming.dead_letters import request_under
from streaming.endings import end
from streaming.errors import RecordError
from streaming.heartbeat import Heartbeat
from streaming.keys import pair_key
from streaming.log.outlines import ScoredOutline
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.packed import PackedScoredGroup
from streaming.records import (
    Feedback,
    Group,
    Margins,
    Pair,
    Priced,
    PromptRequest,
    Response,
    ScoredGroup,
    Source,
    decode,
    encode,
)
from streaming.selection import margins, roles, routes
from streaming.selection.window import Outcome, Window
from streaming.stage import Reason, Stage

STAGE = "selector"

_TELL_S = 1.0
"""A heartbeat goes out no more often."""


class Selection(NamedTuple):
    """What became of a group. There is a pair unless the route is drop."""

    decision: routes.Decision
    pair: Pair | None
    margins: Margins  # of the best candidate and the one picked against it, whatever the route
    spread: float | None = None  # standard deviation of the group's rewards
    mean_reward: float | None = None
    is_worst_rejected: bool | None = None  # of a dpo pair: whether the rejected candidate has the least reward


def select(
    scored: ScoredGroup, config: SelectionConfig, *, policy: str, config_version: int = 0, source: Source | None = None
) -> Selection:
    """Deduplicate, assign roles, measure margins, route. The same group and settings always give the same pair.

    Of a group that another policy sampled, this policy has no implicit margins: they are that policy's own.
    """
    group = scored.group
    priced = scored.priced_for(policy)
    if priced is None:
        return Selection(routes.Decision("drop", "reference"), None, Margins())
    rewards = margins.combined(scored.rewards, len(group.candidates))
    usable = _usable(group, rewards, priced)
    if not usable:
        return Selection(routes.Decision("drop", _why_unusable(group, rewards)), None, Margins())
    different = {index: usable[index] for index in roles.distinct(group.candidates, list(usable))}
    ended = {index: reward for index, reward in different.items() if group.candidates[index].has_eos}
    values = list(usable.values())
    chosen = roles.choose(different, ended)
    aim = roles.target(values, config.rule, num_sigmas=config.num_sigmas, quantile=config.quantile)
    rejected = roles.reject(different, chosen, aim)
    implicit = scored.implicit if group.policy == policy else []
    found = Margins() if rejected is None else margins.between(chosen, rejected, rewards, implicit)
    spread = margins.spread(values)
    outcome = routes.compare(
        len(usable), len(different), spread=spread, margin=found.external, min_margin=config.min_margin
    )
    decision = routes.route(
        outcome,
        best=different[chosen],
        best_ended=max(ended.values(), default=None),
        chosen_floor=config.chosen_floor,
        sft_floor=config.sft_floor,
    )
    selection = Selection(decision, None, found, spread, margins.mean(values))
    if decision.route == "drop":
        return selection
    if decision.route == "sft":
        chosen, rejected, found = roles.choose(ended, ended), None, Margins()
    pair = _pair(scored, priced, rewards, (chosen, rejected), policy=policy, settings_hash=config.settings_hash)
    pair = msgspec.structs.replace(
        pair, margins=found, rating_gap=found.external, spread=spread,
        config_version=config_version, source=source,
    )  # fmt: skip
    is_worst = None if rejected is None else different[rejected] == min(different.values())
    return selection._replace(pair=pair, is_worst_rejected=is_worst)


def prompt_text(request: PromptRequest) -> str:
    """The prompt for people: its text, or its messages a line each."""
    if request.messages is None:
        return request.text or ""
    return "\n".join(f"{message.role}: {message.content}" for message in request.messages)


def _usable(group: Group, rewards: Sequence[float | None], priced: Priced) -> dict[int, float]:
    """The reward of every candidate that could be trained on."""
    return {
        index: reward
        for index, reward in enumerate(rewards)
        if reward is not None and group.candidates[index].num_tokens and math.isfinite(priced.logprobs[index])
    }


def _why_unusable(group: Group, rewards: Sequence[float | None]) -> routes.Reason:
    if not any(candidate.num_tokens for candidate in group.candidates):
        return "empty"
    return "reward_missing" if all(reward is None for reward in rewards) else "non_finite"


def _pair(
    scored: ScoredGroup,
    priced: Priced,
    rewards: Sequence[float | None],
    candidates: tuple[int, int | None],
    *,
    policy: str,
    settings_hash: str,
) -> Pair:
    """The example of a chosen and a rejected candidate, before it is known what its margins came to."""
    group, (chosen, rejected) = scored.group, candidates
    return Pair(
        policy=policy,
        request_number=group.request.number,
        group_id=group.group_id,
        prompt_id=group.request.prompt_id,
        content_hash=group.content_hash,
        prompt_tokens=group.prompt_tokens,
        chosen=_response(group, rewards, priced, chosen),
        rejected=None if rejected is None else _response(group, rewards, priced, rejected),
        route="sft" if rejected is None else "dpo",
        margins=Margins(),
        settings_hash=settings_hash,
        reference_version=priced.version,
        prompt_text=prompt_text(group.request),
        sampled_by=None if group.policy == policy else group.policy,
    )


def _response(group: Group, rewards: Sequence[float | None], priced: Priced, index: int) -> Response:
    candidate = group.candidates[index]
    return Response(
        candidate=index,
        tokens=candidate.tokens,
        reference_logprob=priced.logprobs[index],
        reward=rewards[index],
        sampled_logprob=candidate.logprob,
        spans=candidate.spans,
        text=candidate.text,
        finish_reason=candidate.finish_reason,
    )


class Selector:
    """The role, for one policy. Several policies select from the same scored groups, each in its own group."""

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat,
        *,
        config: SelectionConfig,
        policy: str,
        config_version: int = 0,
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._config = config
        self._policy = policy
        self._config_version = config_version
        self._window = Window(config.window)
        self._told_s = 0.0
        self._newest: tuple[Entry, PackedScoredGroup] | None = None

    def run(self, stop: threading.Event) -> None:
        """Select until `stop`. Raises what no retry mends: a broken log."""
        self._heartbeat.tell(health="ready")
        self.stage().run(stop)

    def stage(self) -> Stage:
        """The runner: of two samplings of one request the first in the log wins, as it does at the learner."""
        return Stage(
            self._log,
            self._metrics,
            self.process,
            name=STAGE,
            group=topics.selectors(self._policy),
            topics=[topics.SCORED.name],
            identify=self._identify,
            explain=self._explain,
            policy=self._policy,
            outputs=[topics.pairs(self._policy).name],
        )

    def process(self, entry: Entry) -> list[Output]:
        """The pair for the learner, or the feedback that there is none and why."""
        scored = self._opened(entry)
        selection = select(
            scored,
            self._config,
            policy=self._policy,
            config_version=self._config_version,
            source=Source(topic=entry.topic, partition=entry.partition, offset=entry.offset),
        )
        self._count(selection)
        if selection.pair is not None:
            return [Output(topics.pairs(self._policy).name, pair_key(selection.pair), encode(selection.pair))]
        feedback = end(
            scored.group.request,
            "dropped",
            policy=self._policy,
            stage=STAGE,
            reason=selection.decision.reason,
            time_s=time.time(),
            content_hash=scored.group.content_hash,
            route="drop",
            margin=selection.margins.external,
            spread=selection.spread,
            mean_reward=selection.mean_reward,
        )
        self._metrics.count("endings_total", ending="dropped", reason=feedback.reason)
        return [Output(topics.FEEDBACK.name, feedback.group_id.encode(), encode(feedback))]

    def _identify(self, entry: Entry) -> str:
        """The id of its group; of a group whose blob is gone, by what is left of it."""
        try:
            return self._opened(entry).group.group_id
        except RecordError:
            return _outline(entry).group_id

    def _opened(self, entry: Entry) -> PackedScoredGroup:
        """What the entry says, decoded once: the runner asks for its id, then for what becomes of it."""
        if self._newest is None or self._newest[0] is not entry:
            self._newest = (entry, decode(PackedScoredGroup, entry.value, where=entry.where))
        return self._newest[1]

    def _count(self, selection: Selection) -> None:
        route, reason = selection.decision
        self._metrics.count("routed_total", route=route, reason=reason)
        if selection.is_worst_rejected is False:
            self._metrics.count("rejected_not_worst_total")
        pair_margins = selection.margins if route == "dpo" else Margins()
        self._window.add(Outcome(route, pair_margins.external, pair_margins.implicit))
        for kind, margin in (("external", pair_margins.external), ("implicit", pair_margins.implicit)):
            if margin is not None:
                self._metrics.observe("margin", margin, kind=kind)
        self._tell()

    def _tell(self) -> None:
        if time.monotonic() < self._told_s + _TELL_S:
            return
        self._told_s = time.monotonic()
        figures = {"margin": self._window.mean_margin(), "margin_correlation": self._window.correlation()}
        known = {name: value for name, value in figures.items() if value is not None}
        if "margin_correlation" in known:
            self._metrics.set("margin_correlation", known["margin_correlation"])
        self._heartbeat.tell(numbers={**self._window.shares(), **known})

    def _explain(self, entry: Entry, reason: Reason) -> Feedback | None:
        try:
            request: PromptRequest | None = _outline(entry)
        except RecordError:
            request = request_under(self._log, entry.key)
        if request is None:
            return None
        return end(request, "dead_lettered", policy=self._policy, stage=STAGE, reason=reason, time_s=time.time())


def _outline(entry: Entry) -> PromptRequest:
    return decode(ScoredOutline, entry.value, where=entry.where).group.request
