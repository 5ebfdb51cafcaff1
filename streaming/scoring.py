"""What becomes of a group once everybody has answered: its scored record, or its measurement.

Pure functions of records and numbers; `scorer` runs them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from streaming.asking import Answers, Reference
from streaming.endings import end
from streaming.records import Feedback, Group, Implicit, Priced, ScoredGroup, Source, SourceRewards
from streaming.selection.margins import SAMPLED, measured

STAGE = "scorer"

MISSING_EOS = "missing-eos"
"""Name of the penalty among a group's rewards. With a dash, so that no source of a person has it."""


class Pricing(NamedTuple):
    """A reference model, and the policies whose reference it is."""

    reference: Reference
    policies: tuple[str, ...] = ()  # beside the one that samples, of which the first reference is in any case


def scored(group: Group, answers: Answers, *, pricing: Sequence[Pricing], source: Source) -> ScoredGroup:
    """The record of a training request's answers. The first of `pricing` is the reference of who sampled."""
    assert answers.logprobs is not None, "training requests are priced"
    h = [
        None if sampled is None or not math.isfinite(reference) else sampled - reference
        for sampled, reference in zip([one.logprob for one in group.candidates], answers.logprobs, strict=True)
    ]
    own, *others = pricing
    further = [
        Priced(version=reference.version, logprobs=logprobs, policies=list(policies))
        for (reference, policies), logprobs in zip(others, answers.further, strict=True)
        if logprobs is not None
    ]
    return ScoredGroup(
        group=group,
        rewards=answers.rewards,
        reference_logprobs=answers.logprobs,
        reference_version=own.reference.version,
        implicit=[Implicit(model=SAMPLED, h=h)],
        source=source,
        shared_by=[policy for policy in own.policies if policy != group.policy],
        further=further,
    )


def evaluated(group: Group, rewards: Sequence[SourceRewards], *, time_s: float) -> Feedback:
    """How an evaluation request ended: with its mean reward, or dropped where that cannot be known.

    It belongs to a version only where that one version sampled every token of every candidate.
    """
    mean_reward = measured(rewards, len(group.candidates))
    versions = {candidate.version for candidate in group.candidates}
    return end(
        group.request,
        "dropped" if mean_reward is None else "evaluated",
        policy=group.policy,
        stage=STAGE,
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
