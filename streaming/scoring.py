"""What becomes of a group once everybody has answered: its scored record, or its measurement.

Pure functions of records and numbers; `scorer` runs them.
"""

import math
from collections.abc import Sequence
from typing import Any

from streaming.asking import Answers
from streaming.records import Ending, Feedback, Group, Implicit, PromptRequest, ScoredGroup, Source, SourceRewards
from streaming.selection.margins import SAMPLED, measured, sampled_logprob

STAGE = "scorer"

MISSING_EOS = "missing-eos"
"""Name of the penalty among a group's rewards. With a dash, so that no source of a person has it."""


def scored(group: Group, answers: Answers, *, reference_version: str, source: Source) -> ScoredGroup:
    """The record of a training request's answers."""
    assert answers.logprobs is not None, "training requests are priced"
    h = [
        None if sampled is None or not math.isfinite(reference) else sampled - reference
        for sampled, reference in zip(map(sampled_logprob, group.candidates), answers.logprobs, strict=True)
    ]
    return ScoredGroup(
        group=group,
        rewards=answers.rewards,
        reference_logprobs=answers.logprobs,
        reference_version=reference_version,
        implicit=[Implicit(model=SAMPLED, h=h)],
        source=source,
    )


def evaluated(group: Group, rewards: Sequence[SourceRewards], *, time_s: float) -> Feedback:
    """How an evaluation request ended: with its mean reward, or dropped where that cannot be known.

    It belongs to a version only where that one version sampled every token of every candidate.
    """
    mean_reward = measured(rewards, len(group.candidates))
    versions = {candidate.version for candidate in group.candidates}
    return end(
        group.request,
        group.policy,
        "dropped" if mean_reward is None else "evaluated",
        reason="reward_missing" if mean_reward is None else "",
        time_s=time_s,
        content_hash=group.content_hash,
        mean_reward=mean_reward,
        version=versions.pop() if len(versions) == 1 else None,
    )


def penalty(group: Group, rewards: Sequence[SourceRewards], amount: float | None) -> list[SourceRewards]:
    """The penalty for answers that were cut off, as one more entry of the rewards: what sources said stays as it is.

    Nothing where no source knows anything: the penalty alone is no reason to prefer an answer.
    """
    is_known = any(source.weight and any(value is not None for value in source.values) for source in rewards)
    if not amount or not is_known or all(candidate.has_eos for candidate in group.candidates):
        return []
    values: list[float | None] = [0.0 if candidate.has_eos else -amount for candidate in group.candidates]
    return [SourceRewards(source=MISSING_EOS, weight=1.0, values=values, version=f"{amount:g}")]


def end(request: PromptRequest, policy: str, ending: Ending, *, reason: str, time_s: float, **details: Any) -> Feedback:
    """Feedback that ends a request at this stage."""
    return Feedback(
        request_number=request.number,
        group_id=request.group_id,
        prompt_id=request.prompt_id,
        policy=policy,
        ending=ending,
        stage=STAGE,
        reason=reason,
        round=request.round,
        round_size=request.round_size,
        time_s=time_s,
        **details,
    )
