"""Why a run cannot work with a Kafka cluster: found out step by step, each step with its own message and remedy.

a broker to ask (kafka_wire: host, TLS, login) -> the brokers it names -> what this user may do
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kafka.admin import ACLOperation
from kafka.errors import (
    GroupAuthorizationFailedError,
    KafkaError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.protocol.admin import DescribeGroupsRequest
from kafka.protocol.metadata import FindCoordinatorRequest, MetadataRequest

from streaming.config import KafkaConfig, LogConfig
from streaming.errors import NotReadyError
from streaming.log.kafka_acls import IMPLIED, Right, commands
from streaming.log.kafka_client import bootstrap_servers, client_settings
from streaming.log.kafka_wire import Target, Wire, connect

COORDINATOR_S = 20.0
"""A new cluster needs some seconds to make its topic of committed offsets."""

COORDINATOR_PAUSE_S = 0.2
"""Between two questions for it."""


class Cluster(NamedTuple):
    """What a cluster says of itself. `silent` are bootstrap servers that could not be used, each with its reason."""

    brokers: tuple[str, ...]
    silent: tuple[str, ...]


def check_connection(config: LogConfig) -> Cluster:
    """Connect to the cluster, and to every broker that it names.

    Raises NotReadyError where no bootstrap server can be used (with the reason of each), where a broker cannot be
    reached under the name it gives itself, or where there are fewer brokers than copies wanted.
    """
    brokers, silent = _metadata(config)
    for number, server in brokers.items():
        try:
            connect(_target(server, config)).close()
        except NotReadyError as error:
            raise NotReadyError(
                f"broker {number} calls itself {server}, and there: {error.what}",
                where=config.url,
                do=f"Mend advertised.listeners of that broker so that it is reached from here. {error.do}",
            ) from error
    if len(brokers) < config.kafka.replication_factor:
        raise NotReadyError(
            f"{len(brokers)} brokers are there, every partition is wanted {config.kafka.replication_factor} times",
            where="log.kafka.replication_factor",
            do=f"Lower it (and min_insync_replicas) to at most {len(brokers)}, or start the other brokers.",
        )
    return Cluster(tuple(brokers.values()), tuple(str(error) for error in silent))


def _target(server: str, config: LogConfig) -> Target:
    has_certificate = config.kafka.certificate_file is not None
    return Target(server, client_settings(config.url, config.kafka), has_certificate)


def _metadata(config: LogConfig) -> tuple[dict[int, str], list[NotReadyError]]:
    """The brokers by number, from the first server that answers; and why others did not."""
    errors: list[NotReadyError] = []
    brokers: dict[int, str] = {}
    for server in bootstrap_servers(config.url):
        try:
            with connect(_target(server, config)) as wire:
                answer = wire.ask(MetadataRequest(topics=[], allow_auto_topic_creation=False))
                brokers = brokers or {broker.node_id: f"{broker.host}:{broker.port}" for broker in answer.brokers}
        except NotReadyError as error:
            errors.append(error)
    if brokers:
        return brokers, errors
    if len(errors) == 1:
        raise errors[0]
    what = "none of the brokers can be used:\n" + "\n".join(str(error) for error in errors)
    raise NotReadyError(what, where=config.url, do="Mend one of them.")


def check_rights(config: LogConfig, run: str, wanted: Sequence[Right]) -> list[Right]:
    """Ask what this user may do with the run's topics and groups; returns the rights of topics that are not there.

    Raises NotReadyError that names every missing right, with the commands that give it.
    """
    servers = bootstrap_servers(config.url)
    with _first(config, servers) as wire:
        allowed = _topic_rights(wire, run, {right.name for right in wanted if right.kind == "topic"})
        for group in sorted({right.name for right in wanted if right.kind == "group"}):
            allowed[("group", group)] = _group_rights(wire, f"{run}.{group}", config)
    unknown = [right for right in wanted if (right.kind, right.name) not in allowed]
    missing = [right for right in wanted if right not in unknown and not _has(allowed, right)]
    if missing:
        names = "\n".join(f"{right.operation} on {right.kind} {run}.{right.name}" for right in missing)
        lines = commands(missing, run=run, principal=_principal(config.kafka), servers=",".join(servers))
        raise NotReadyError(
            f"{_who(config.kafka)} may not:\n{names}",
            where=config.url,
            do="Give the rights, as an administrator of the cluster:\n" + "\n".join(f"    {line}" for line in lines),
        )
    return unknown


def _first(config: LogConfig, servers: Sequence[str]) -> Wire:
    """The first server that can be used."""
    *others, last = servers
    for server in others:
        try:
            return connect(_target(server, config))
        except NotReadyError:
            continue  # check_connection tells of it; the last one's error rises
    return connect(_target(last, config))


Allowed = dict[tuple[str, str], set[int]]
"""(kind, name) -> the numbers of Kafka's operations that this user may do with it."""


def _topic_rights(wire: Wire, run: str, names: Iterable[str]) -> Allowed:
    """Without the topics that are not there, of which a cluster tells no rights."""
    topic = MetadataRequest.MetadataRequestTopic
    request = MetadataRequest(
        topics=[topic(name=f"{run}.{name}") for name in sorted(names)],
        allow_auto_topic_creation=False,
        include_topic_authorized_operations=True,
    )
    allowed: Allowed = {}
    for found in wire.ask(request).topics:
        name = found.name.removeprefix(f"{run}.")
        error = for_code(found.error_code)
        if error is not UnknownTopicOrPartitionError:
            is_refused = error is TopicAuthorizationFailedError
            allowed[("topic", name)] = set() if is_refused else set(found.authorized_operations)
    return allowed


def _group_rights(wire: Wire, group: str, config: LogConfig) -> set[int]:
    """Of one group. A new cluster makes its topic of committed offsets when first asked, so it is asked again."""
    deadline = time.monotonic() + COORDINATOR_S
    while True:
        error, allowed = _look_at_group(wire, group, config)
        if error is GroupAuthorizationFailedError:
            return set()
        if not error.errno:
            return allowed
        if time.monotonic() > deadline:
            do = "Are enough brokers up for offsets.topic.replication.factor? See the brokers' logs."
            raise NotReadyError(f"no broker serves it: {error.__name__}", where=f"group {group}", do=do)
        time.sleep(COORDINATOR_PAUSE_S)


def _look_at_group(wire: Wire, group: str, config: LogConfig) -> tuple[type[KafkaError], set[int]]:
    """Only the group's own broker tells; who may not even look at a group is not told which that is."""
    answer = wire.ask(FindCoordinatorRequest(key=group, key_type=0, coordinator_keys=[group]))
    found = answer.coordinators[0] if getattr(answer, "coordinators", None) else answer
    if found.error_code:
        return for_code(found.error_code), set()
    # From version 6 on a group without members is an error, and its rights are not told.
    request = DescribeGroupsRequest(groups=[group], include_authorized_operations=True, max_version=5)
    with connect(_target(f"{found.host}:{found.port}", config)) as owner:
        (described,) = owner.ask(request).groups
    return for_code(described.error_code), set(described.authorized_operations or ())


def _has(allowed: Allowed, right: Right) -> bool:
    known = allowed[(right.kind, right.name)]
    enough = {right.operation} | IMPLIED.get(right.operation, set())
    return any(ACLOperation[operation.upper()] in known for operation in enough)


def _principal(config: KafkaConfig) -> str:
    return config.username or "PRINCIPAL"


def _who(config: KafkaConfig) -> str:
    if config.username is not None:
        return f"user {config.username!r}"
    if config.certificate_file is not None:
        return f"the user of {config.certificate_file} (PRINCIPAL: its subject, as the brokers map it)"
    return "User:ANONYMOUS" if config.token_file is None else "the user of the token (PRINCIPAL: its subject)"
