"""What each role may do on a Kafka cluster: exactly what it needs, by the table of topics. Data, and how to print it.

A role that is broken into can read and write only what it reads and writes anyway: a generator cannot forge rewards,
a scorer cannot publish weights.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from streaming import topics

Kind = Literal["topic", "group"]
Operation = Literal["read", "write", "describe", "create", "delete", "describe_configs", "alter_configs"]

IMPLIED: dict[Operation, set[Operation]] = {
    "describe": {"read", "write", "delete", "alter_configs"},
    "describe_configs": {"alter_configs"},
}
"""operation -> others each of which grants it too, in Kafka's own authorizer."""


class Right(NamedTuple):
    """One thing that a role may do. Names here carry no run prefix."""

    kind: Kind
    name: str
    operation: Operation


class Access(NamedTuple):
    """What one role needs. `{policy}` in a name stands for each policy."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    groups: tuple[str, ...] = ()  # it is a member of
    looks_at: tuple[tuple[Kind, str], ...] = ()  # offsets and lags only


_ALL = (*(row.name for row in topics.SHARED), topics.pairs("{policy}").name)
_FOLLOWED = (topics.WEIGHTS.name, topics.ROLES.name)
_TOLD = (topics.FEEDBACK.name, topics.DEAD_LETTER.name, topics.ROLES.name)
_KNOWN = (topics.PROMPTS.name, topics.FEEDBACK.name)
"""Whose bytes were these that nobody can read, and has their request ended?"""
_ANSWERED = (topics.DEAD_LETTER.name, *_KNOWN)
"""What its group has answered before it takes a partition up; beside its own outputs."""
_SELECTORS = topics.selectors("{policy}")
_GROUPS = ("generators", "scorer", _SELECTORS)

ROLES: dict[str, Access] = {
    "scheduler": Access(
        reads=(topics.PROMPTS.name, topics.FEEDBACK.name, topics.BOOKS.name, topics.DEAD_LETTER.name, *_FOLLOWED),
        writes=(topics.PROMPTS.name, topics.BOOKS.name, *_TOLD),
    ),
    "generator": Access(
        reads=(topics.PROMPTS.name, *_FOLLOWED), writes=(topics.CANDIDATES.name, *_TOLD), groups=("generators",)
    ),
    "scorer": Access(
        reads=(topics.CANDIDATES.name, topics.SCORED.name, *_ANSWERED, *_FOLLOWED),
        writes=(topics.SCORED.name, *_TOLD),
        groups=("scorer",),
    ),
    "selector": Access(
        reads=(topics.SCORED.name, topics.pairs("{policy}").name, *_ANSWERED, *_FOLLOWED),
        writes=(topics.pairs("{policy}").name, *_TOLD),
        groups=(_SELECTORS,),
    ),
    "learner": Access(
        reads=(topics.pairs("{policy}").name, *_KNOWN, *_FOLLOWED),
        writes=(topics.WEIGHTS.name, *_TOLD),
        looks_at=(("topic", topics.SCORED.name), ("group", _SELECTORS)),
    ),
    # `streamdpo run`, status, tail, audit, trace, report and export.
    "observer": Access(reads=_ALL, writes=(), looks_at=tuple(("group", name) for name in _GROUPS)),
    # `streamdpo check --create-topics`, redrive and forget.
    "operator": Access(reads=_ALL, writes=_ALL, looks_at=tuple(("group", name) for name in _GROUPS)),
}

OPERATOR: tuple[Operation, ...] = ("create", "delete", "describe_configs", "alter_configs")
"""What the operator may do with every topic beside reading and writing it."""


def rights(role: str, policies: Sequence[str]) -> list[Right]:
    """Everything that a role needs in a run of these policies; a selector or learner serves the policies given."""
    access = ROLES[role]
    found = [Right("topic", name, "read") for name in access.reads]
    found += [Right("topic", name, "write") for name in access.writes]
    found += [Right("group", name, "read") for name in access.groups]
    found += [Right(kind, name, "describe") for kind, name in access.looks_at]
    if role == "operator":
        found += [Right("topic", name, operation) for name in _ALL for operation in OPERATOR]
    return list(dict.fromkeys(_for_policies(found, policies)))


def _for_policies(found: Sequence[Right], policies: Sequence[str]) -> Iterator[Right]:
    for right in found:
        yield from (right._replace(name=right.name.format(policy=policy)) for policy in policies)


def commands(found: Sequence[Right], *, run: str, principal: str, servers: str) -> list[str]:
    """The commands of Kafka's own tool that give these rights to `User:principal`."""
    lines = []
    for operation in dict.fromkeys(right.operation for right in found):
        resources = [f"--{right.kind} {run}.{right.name}" for right in found if right.operation == operation]
        word = "".join(part.capitalize() for part in operation.split("_"))
        start = f"kafka-acls.sh --bootstrap-server {servers} --add --allow-principal User:{principal}"
        lines.append(f"{start} --operation {word} {' '.join(resources)}")
    return lines
