"""One user per role on a Kafka cluster with TLS: each can do exactly what its role needs; Kafka's own tools read it.

On two clusters: users with SCRAM passwords, and users with client certificates.
"""

import base64
import json
import shlex
import time
from pathlib import Path

import pytest

from streaming import topics
from streaming.config import KafkaConfig, LogConfig
from streaming.errors import LogError, NotReadyError
from streaming.log.kafka import KafkaLog
from streaming.log.kafka_acls import OPERATOR, ROLES, Right, rights
from streaming.log.kafka_diagnosis import check_connection, check_rights
from streaming.log.kafka_topics import differences, wanted_topics
from streaming.log.protocol import Output
from tests.kafka_cluster import Cluster
from tests.secured import Secured, secure

pytestmark = pytest.mark.slow

RUN = "secured"
POLICIES = ["policy"]
TOPICS = [row.name for row in topics.all_topics(*POLICIES)]
READ_BY = {"generators": "prompts", "scorer": "candidates", "selector.policy": "scored"}
"""group -> the topic that it reads."""

REFUSED = "(?i)authoriz|right|may not"


@pytest.fixture(scope="module", params=["scram_kafka", "mtls_kafka"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Secured:
    cluster: Cluster = request.getfixturevalue(request.param)
    secured = secure(cluster, tmp_path_factory.mktemp("users"), RUN, POLICIES, partitions=1)
    kafka = KafkaConfig(replication_factor=1, min_insync_replicas=1)
    with KafkaLog(f"kafka://{cluster.internal}", run=RUN, max_record_bytes=2**20, config=kafka) as log:
        log.append([Output(name, b"key", b"value") for name in TOPICS])
    return secured


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


@pytest.mark.parametrize("secured", ["scram_kafka"], indirect=True)
def test_a_token_says_who_one_is_until_it_expires(secured: Secured, tmp_path: Path) -> None:
    file = tmp_path / "token"
    kafka = {"ca_file": secured.config("scorer").kafka.ca_file, "replication_factor": 1, "min_insync_replicas": 1}
    by_token = KafkaConfig(**kafka, sasl_mechanism="OAUTHBEARER", token_file=str(file))
    config = LogConfig(url=f"kafka://{secured.cluster.bootstrap}", kafka=by_token)
    file.write_text(token("scorer"))
    with KafkaLog(config.url, run=RUN, max_record_bytes=2**20, config=by_token) as log:
        for right in rights("scorer", POLICIES):
            use(log, right)
        with pytest.raises(LogError, match=REFUSED):
            use(log, Right("topic", "weights", "write"))
    file.write_text(token("scorer", lives_s=-60))
    with pytest.raises(
        NotReadyError, match=r"(?s)the token is not let in with OAUTHBEARER: it has expired.*token_file"
    ):
        check_connection(config)


def token(name: str, *, lives_s: float = 600) -> str:
    """What an identity provider gives out, without a signature: a JSON Web Token."""
    now_s = time.time()
    parts = [{"alg": "none"}, {"sub": name, "iat": now_s - 120, "exp": now_s + lives_s}]
    coded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*coded, ""])


def test_kafkas_own_tool_takes_the_printed_commands(scram_kafka: Cluster, tmp_path: Path) -> None:
    for command in Secured(scram_kafka, tmp_path, RUN, POLICIES, {}).printed("learner"):
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
