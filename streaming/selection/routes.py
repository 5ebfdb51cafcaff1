"""What becomes of a group: dpo (a pair), sft (its best answer alone) or drop, with the reason.

A tie whose answers are good is an SFT example, not waste (arXiv 2602.00954); in our own measurements this was the
largest gain of all rules. A clear margin is a pair; everything else is dropped and counted.
"""

from typing import Literal, NamedTuple

from streaming.records import Route

Reason = Literal[
    "margin",  # chosen is better by more than min_margin: the only reason of a pair
    "small_margin",  # better, but by no more than min_margin
    "tie",  # equally good, though other candidates of the group were not
    "no_spread",  # every candidate has the same reward
    "identical",  # several candidates, one text
    "single",  # one candidate that can be compared
    "chosen_below_floor",  # the best is too bad to be trained on
    "truncated",  # good enough for sft, but no such candidate ended by itself
    "reward_missing",  # no candidate has a reward
    "empty",  # no candidate has tokens
    "non_finite",  # no candidate has a finite reference log-prob
    "reference",  # the policy's own reference did not price the group
]


class Decision(NamedTuple):
    """A route and why."""

    route: Route
    reason: Reason


def compare(num_usable: int, num_distinct: int, *, spread: float, margin: float | None, min_margin: float) -> Reason:
    """What the comparison of a group's usable candidates (at least one) came to."""
    if num_distinct == 1:
        return "single" if num_usable == 1 else "identical"
    if spread == 0:
        return "no_spread"
    if margin is None or margin <= 0:
        return "tie"
    return "small_margin" if margin <= min_margin else "margin"


def route(
    outcome: Reason,
    *,
    best: float,
    best_ended: float | None,
    chosen_floor: float | None,
    sft_floor: float | None,
) -> Decision:
    """The route of a compared group.

    `best` is the reward of the chosen candidate, `best_ended` that of the best candidate that ended by itself:
    a truncated answer is never an SFT example, it would teach the model not to stop.
    """
    if chosen_floor is not None and best < chosen_floor:
        return Decision("drop", "chosen_below_floor")
    if outcome == "margin":
        return Decision("dpo", outcome)
    if sft_floor is None or best < sft_floor:
        return Decision("drop", outcome)
    floor = sft_floor if chosen_floor is None else max(sft_floor, chosen_floor)
    if best_ended is None or best_ended < floor:
        return Decision("drop", "truncated")
    return Decision("sft", outcome)
