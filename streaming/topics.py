"""One table of topics: what travels where, under which key, who writes it and who reads it.

Names here carry no run prefix; the log adds the run's name, so two runs on one cluster never mix.
"""

from typing import NamedTuple

from streaming.records import (
    CarriedBalance,
    DeadLetter,
    Feedback,
    Group,
    Pair,
    PromptRequest,
    Record,
    RoleState,
    ScoredGroup,
    WeightVersion,
)


class Topic(NamedTuple):
    """One row of the table."""

    name: str
    record: type[Record]
    key: str  # which field keys it: records of one key keep their order
    partitions: int
    compacted: bool  # only the newest record of a key has to stay
    retention_s: int | None  # None: for ever


DAY_S = 24 * 3600

PROMPTS = Topic("prompts", PromptRequest, "prompt_id", 4, False, 7 * DAY_S)
CANDIDATES = Topic("candidates", Group, "group_id", 4, False, 2 * DAY_S)
SCORED = Topic("scored", ScoredGroup, "group_id", 4, False, 7 * DAY_S)
FEEDBACK = Topic("feedback", Feedback, "group_id", 4, False, 7 * DAY_S)
WEIGHTS = Topic("weights", WeightVersion, "policy/kind", 1, True, None)
ROLES = Topic("roles", RoleState, "role_id", 1, True, None)
BOOKS = Topic("books", CarriedBalance, "policy", 1, True, None)
DEAD_LETTER = Topic("dead-letter", DeadLetter, "original key", 4, False, 30 * DAY_S)

SHARED = (PROMPTS, CANDIDATES, SCORED, FEEDBACK, WEIGHTS, ROLES, BOOKS, DEAD_LETTER)


def pairs(policy: str) -> Topic:
    """A policy's own topic of training examples."""
    return Topic(f"pairs.{policy}", Pair, "pair_id.group_id", 4, False, 7 * DAY_S)


def selectors(policy: str) -> str:
    """Consumer group of a policy's selectors: each policy reads every scored group at its own pace."""
    return f"selector.{policy}"


def all_topics(*policies: str) -> tuple[Topic, ...]:
    """Every topic of a run that trains these policies."""
    return (*SHARED, *map(pairs, policies))


def find(name: str) -> Topic | None:
    """The row of a topic by its name; None for a name that no run uses."""
    if name.startswith("pairs."):
        return pairs(name.removeprefix("pairs."))
    return next((topic for topic in SHARED if topic.name == name), None)
