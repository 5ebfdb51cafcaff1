"""What the learner tells about the examples it ends. Pure: pairs to feedback.

A trained example is `consumed` (epoch, step) at its step, and `trained` once a checkpoint that contains the step is
durable. A dropped one is `consumed` with the reason at once, so that pacing goes on, and `dropped` after a checkpoint;
or `dead_lettered`, where nobody could read it.
"""

import msgspec

from learner.pairs import STAGE
from learner.trainer import ExampleNumbers
from learner.unreadable import UNREADABLE
from streaming.records import Feedback, Pair


def consumed(pair: Pair, *, epoch: int, step: int, time_s: float, reason: str = "") -> Feedback:
    """This example needs no slot any more. `reason`: it was dropped, not trained."""
    return Feedback(
        request_number=pair.request_number,
        group_id=pair.group_id,
        prompt_id=pair.prompt_id,
        policy=pair.policy,
        ending="consumed",
        stage=STAGE,
        reason=reason,
        pair_id=None if pair.route == "drop" else pair.pair_id,  # it hashes what of unreadable bytes nobody knows
        content_hash=pair.content_hash,
        route=pair.route,
        index=pair.index,
        num_examples=pair.num_examples,
        epoch=epoch,
        step=step,
        margin=pair.margins.external,
        spread=pair.spread,
        sampled_by=pair.sampled_by,
        time_s=time_s,
    )


def with_numbers(one: Feedback, numbers: ExampleNumbers, *, staleness: int | None) -> Feedback:
    """What the step saw of this example, beside its ending."""
    return msgspec.structs.replace(
        one,
        staleness=staleness,
        loss=numbers.loss,
        chosen_logprob=numbers.chosen_logprob,
        rejected_logprob=numbers.rejected_logprob,
    )


def repeated(one: Feedback, *, by: int) -> Feedback:
    """What a checkpoint says of an example, told again by the epoch that was started from it."""
    return msgspec.structs.replace(one, told_by=by)


def final(one: Feedback) -> Feedback:
    """The final ending of an example that was consumed."""
    if one.reason == UNREADABLE:
        return msgspec.structs.replace(one, ending="dead_lettered")
    return msgspec.structs.replace(one, ending="dropped" if one.reason else "trained")
