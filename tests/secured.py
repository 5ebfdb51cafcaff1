"""A run on a Kafka cluster with TLS, where every role has a user of its own with exactly its rights.

rights printed as commands -> given -> topics made by the operator -> used -> gone (`remove`)
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.errors import NotReadyError
from streaming.log.kafka import KafkaLog
from streaming.log.kafka_acls import ROLES, commands, rights
from streaming.log.kafka_topics import differences, topic_name, wanted_topics
from tests.kafka_cluster import Cluster

T = TypeVar("T")

PATIENCE_S = 30.0
"""Brokers hear of new rights within milliseconds."""


class Secured(NamedTuple):
    """A cluster where every role has a user with its rights in one run."""

    cluster: Cluster
    folder: Path  # for secrets
    run: str
    policies: Sequence[str]
    settings: dict[str, Any]  # of KafkaConfig

    def config(self, user: str) -> LogConfig:
        authority = self.cluster.authority
        assert authority is not None
        common = {"ca_file": str(authority.file), "replication_factor": 1, "min_insync_replicas": 1, **self.settings}
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
        return KafkaLog(config.url, run=self.run, max_record_bytes=2**20, config=config.kafka)

    def printed(self, role: str) -> list[str]:
        """The commands that give a role its rights, as a person gets them."""
        return commands(rights(role, self.policies), run=self.run, principal=role, servers=self.cluster.internal)

    def remove(self) -> None:
        """Topics, groups and rights of the run."""
        with KafkaAdminClient(bootstrap_servers=self.cluster.internal) as admin:
            admin.delete_topics([topic_name(self.run, row.name) for row in topics.all_topics(*self.policies)])
            admin.delete_acls([_filter(acl) for acl in _given(self)])


def secure(cluster: Cluster, folder: Path, run: str, policies: Sequence[str] = ("policy",), **settings: Any) -> Secured:
    """Give every role its rights, and let the operator make the topics."""
    secured = Secured(cluster, folder, run, policies, settings)
    with KafkaAdminClient(bootstrap_servers=cluster.internal) as admin:
        assert not admin.create_acls(list(_given(secured)))["failed"]
    wanted = wanted_topics(topics.all_topics(*policies), run, secured.config("operator"))
    created, differing = when_it_may(lambda: differences(secured.config("operator"), wanted, create=True))
    assert created and not differing, differing
    return secured


def when_it_may(ask: Callable[[], T]) -> T:
    """The answer, once the brokers know of the rights that were just given: they hear of them a little later."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except NotReadyError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.05)


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


def _given(secured: Secured) -> Iterator[ACL]:
    yield from (acl for role in ROLES for command in secured.printed(role) for acl in meant(command))


def _filter(acl: ACL) -> ACLFilter:
    return ACLFilter(acl.principal, acl.host, acl.operation, acl.permission_type, acl.resource_pattern)
