"""One user per role on a Kafka cluster with TLS: each can do exactly what its role needs; Kafka's own tools read it.

On two clusters: users with SCRAM passwords, and users with client certificates.
"""

import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.errors import LogError, NotReadyError
from streaming.log.kafka import KafkaLog
from streaming.log.kafka_acls import OPERATOR, ROLES, Right, commands, rights
from streaming.log.kafka_diagnosis import check_rights
from streaming.log.kafka_topics import differences, wanted_topics
from streaming.log.protocol import Output
from tests.kafka_cluster import Cluster

pytestmark = pytest.mark.slow

RUN = "secured"
POLICIES = ["policy"]
TOPICS = [row.name for row in topics.all_topics(*POLICIES)]
READ_BY = {"generators": "prompts", "scorer": "candidates", "selector.policy": "scored"}
"""group -> the topic that it reads."""

REFUSED = "(?i)authoriz|right|may not"


class Secured(NamedTuple):
    """A cluster where every role has a user with its rights."""

    cluster: Cluster
    folder: Path

    def config(self, user: str) -> LogConfig:
        authority = self.cluster.authority
        assert authority is not None
        common: dict[str, Any] = {"ca_file": str(authority.file), "replication_factor": 1, "min_insync_replicas": 1}
        if self.cluster.security == "mtls":
            authority.issue(user)
            common |= {"certificate_file": str(authority.certificate(user)), "key_file": str(authority.key(user))}
        else:
            password = self.folder / user
            password.write_text(self.cluster.users[user])
            common |= {"sasl_mechanism": "SCRAM-SHA-512", "username": user, "password_file": str(password)}
        return LogConfig(url=f"kafka://{self.cluster.bootstrap}", kafka=KafkaConfig(**common))

    def open(self, user: str) -> KafkaLog:
        config = self.config(user)
        return KafkaLog(config.url, run=RUN, max_record_bytes=2**20, config=config.kafka)


def printed(role: str, servers: str) -> list[str]:
    return commands(rights(role, POLICIES), run=RUN, principal=role, servers=servers)


def meant(command: str) -> Iterator[ACL]:
    """What a printed command gives: the test does what the tool would, without a JVM for each."""
    words = shlex.split(command)
    options = list(pairwise(words))
    (principal,) = [value for option, value in options if option == "--allow-principal"]
    (operation,) = [value for option, value in options if option == "--operation"]
    number = next(one for one in ACLOperation if one.name.replace("_", "") == operation.upper())
    for option, value in options:
        if option in ("--topic", "--group"):
            pattern = ResourcePattern(ResourceType[option.removeprefix("--").upper()], value)
            yield ACL(principal, "*", number, ACLPermissionType.ALLOW, pattern)


@pytest.fixture(scope="module", params=["scram_kafka", "mtls_kafka"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Secured:
    cluster: Cluster = request.getfixturevalue(request.param)
    kafka = KafkaConfig(replication_factor=1, min_insync_replicas=1, partitions=1)
    internal = LogConfig(url=f"kafka://{cluster.internal}", kafka=kafka)
    differences(internal, wanted_topics(topics.all_topics(*POLICIES), RUN, internal), create=True)
    lists = [acl for role in ROLES for command in printed(role, cluster.internal) for acl in meant(command)]
    with KafkaAdminClient(bootstrap_servers=cluster.internal) as admin:
        assert not admin.create_acls(lists)["failed"]
    with KafkaLog(internal.url, run=RUN, max_record_bytes=2**20, config=kafka) as log:
        log.append([Output(name, b"key", b"value") for name in TOPICS])
    return Secured(cluster, tmp_path_factory.mktemp("users"))


@pytest.mark.parametrize("role", ROLES)
def test_a_role_can_do_what_it_needs(secured: Secured, role: str) -> None:
    with secured.open(role) as log:
        for right in rights(role, POLICIES):
            use(log, right)


def use(log: KafkaLog, right: Right) -> None:
    """Do what the right is for. Raises LogError where it is refused."""
    if right.kind == "group":
        topic = READ_BY[right.name]
        if right.operation == "describe":
            log.committed(right.name, [topic])
            return
        with log.subscribe(right.name, [topic]) as member:
            while not member.positions():
                member.read(max_records=1, timeout_s=1)
            member.commit(member.positions())
    elif right.operation == "write":
        log.append([Output(right.name, b"key", b"value")])
    elif right.operation == "read":
        with log.assign(log.begin_offsets(right.name)) as reader:
            assert reader.read(max_records=1, timeout_s=60)
    elif right.operation == "describe":
        log.end_offsets(right.name)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_refused_what_it_does_not_need(secured: Secured, role: str) -> None:
    needed = rights(role, POLICIES)
    possible = [Right("topic", name, "write") for name in TOPICS] + [Right("topic", name, "read") for name in TOPICS]
    possible += [Right("group", name, "read") for name in READ_BY]
    with secured.open(role) as log:
        for right in possible:
            if right not in needed:
                with pytest.raises(LogError, match=REFUSED):
                    use(log, right)


@pytest.mark.parametrize("role", ROLES)
def test_the_brokers_tell_of_each_role_exactly_the_rights_it_needs(secured: Secured, role: str) -> None:
    needed = rights(role, POLICIES)
    assert check_rights(secured.config(role), RUN, needed) == []
    for name in TOPICS:
        for operation in ("read", "write", *OPERATOR):
            right = Right("topic", name, operation)
            if right not in needed:
                with pytest.raises(NotReadyError, match=f"may not:\n{operation} on topic {RUN}.{name}"):
                    check_rights(secured.config(role), RUN, [right])


def test_kafkas_own_tool_takes_the_printed_commands(scram_kafka: Cluster) -> None:
    for command in printed("learner", scram_kafka.internal):
        _, *arguments = shlex.split(command)
        told = scram_kafka.tool("org.apache.kafka.tools.AclCommand", *arguments)
        assert "principal=User:learner" in told
        assert "permissionType=ALLOW" in told


def test_a_new_role_creates_nothing(secured: Secured) -> None:
    config = secured.config("scorer")
    with pytest.raises(NotReadyError, match=r"other\.prompts.*\n.*right `create`"):
        differences(config, wanted_topics([topics.PROMPTS], "other", config), create=True)


def test_the_operator_creates_topics(secured: Secured) -> None:
    config = secured.config("operator")
    (row,) = wanted_topics([topics.DEAD_LETTER], RUN, config)
    assert differences(config, [row], create=True) == ([], [])


def test_kafkas_own_consumer_and_group_tool_read_ours(secured: Secured) -> None:
    with secured.open("operator") as log:
        log.append([Output("scored", b"group-%d" % i, b"value %d" % i) for i in range(3)])
    with secured.open("selector") as log:
        use(log, Right("group", "selector.policy", "read"))
    tool, server = secured.cluster.tool, secured.cluster.internal
    options = ["--from-beginning", "--timeout-ms", "10000", "--formatter-property", "print.key=true"]
    options += ["--topic", f"{RUN}.scored", "--bootstrap-server", server]
    told = tool("org.apache.kafka.tools.consumer.ConsoleConsumer", *options)
    assert [f"group-{i}\tvalue {i}" in told for i in range(3)] == [True] * 3
    options = ["--describe", "--group", f"{RUN}.selector.policy", "--bootstrap-server", server]
    told = tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", *options)
    assert f"{RUN}.scored" in told
