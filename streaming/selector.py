"""Stage: ScoredGroup -> Pair or Feedback. What a group teaches this model, or why it teaches nothing.

`select` is the pure part and may be run over recorded groups again; `Selector` runs it over the log.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from streaming.config import SelectionConfig
from streaming.records import Margins, Pair, PromptRequest, Response, ScoredGroup, Source
from streaming.selection import margins, roles, routes


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
    """Deduplicate, assign roles, measure margins, route. The same group and settings always give the same pair."""
    group = scored.group
    rewards = margins.combined(scored.rewards, len(group.candidates))
    usable = _usable(scored, rewards)
    if not usable:
        return Selection(routes.Decision("drop", _why_unusable(scored, rewards)), None, Margins())
    different = {index: usable[index] for index in roles.distinct(group.candidates, list(usable))}
    ended = {index: reward for index, reward in different.items() if group.candidates[index].has_eos}
    values = list(usable.values())
    chosen = roles.choose(different, ended)
    aim = roles.target(values, config.rule, num_sigmas=config.num_sigmas, quantile=config.quantile)
    rejected = roles.reject(different, chosen, aim)
    found = Margins() if rejected is None else margins.between(chosen, rejected, rewards, scored.implicit)
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
    pair = Pair(
        policy=policy,
        request_number=group.request.number,
        group_id=group.group_id,
        prompt_id=group.request.prompt_id,
        content_hash=group.content_hash,
        prompt_tokens=group.prompt_tokens,
        chosen=_response(scored, rewards, chosen),
        rejected=None if rejected is None else _response(scored, rewards, rejected),
        route=decision.route,
        margins=found,
        settings_hash=config.settings_hash,
        reference_version=scored.reference_version,
        rating_gap=found.external,
        spread=spread,
        prompt_text=prompt_text(group.request),
        config_version=config_version,
        source=source,
    )
    is_worst = None if rejected is None else different[rejected] == min(different.values())
    return selection._replace(pair=pair, is_worst_rejected=is_worst)


def prompt_text(request: PromptRequest) -> str:
    """The prompt for people: its text, or its messages a line each."""
    if request.messages is None:
        return request.text or ""
    return "\n".join(f"{message.role}: {message.content}" for message in request.messages)


def _usable(scored: ScoredGroup, rewards: Sequence[float | None]) -> dict[int, float]:
    """The reward of every candidate that could be trained on."""
    return {
        index: reward
        for index, reward in enumerate(rewards)
        if reward is not None
        and scored.group.candidates[index].tokens
        and math.isfinite(scored.reference_logprobs[index])
    }


def _why_unusable(scored: ScoredGroup, rewards: Sequence[float | None]) -> routes.Reason:
    if not any(candidate.tokens for candidate in scored.group.candidates):
        return "empty"
    return "reward_missing" if all(reward is None for reward in rewards) else "non_finite"


def _response(scored: ScoredGroup, rewards: Sequence[float | None], index: int) -> Response:
    candidate = scored.group.candidates[index]
    return Response(
        candidate=index,
        tokens=candidate.tokens,
        reference_logprob=scored.reference_logprobs[index],
        reward=rewards[index],
        sampled_logprob=margins.sampled_logprob(candidate),
        spans=candidate.spans,
        text=candidate.text,
        finish_reason=candidate.finish_reason,
    )
