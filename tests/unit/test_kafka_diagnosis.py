"""Each way in which a Kafka cluster cannot be used is told apart, against real brokers."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.config import KafkaConfig, LogConfig
from streaming.errors import NotReadyError
from streaming.log.kafka_acls import Right, rights
from streaming.log.kafka_diagnosis import check_connection, check_rights
from streaming.log.kafka_topics import differences, wanted_topics
from streaming.topics import PROMPTS
from tests.certificates import Authority
from tests.kafka_cluster import Address, Cluster, free_ports, why_not
from tests.tcp_proxy import TcpProxy

COPIES = {"replication_factor": 1, "min_insync_replicas": 1}


def config(servers: str, **kafka: Any) -> LogConfig:
    return LogConfig(url=f"kafka://{servers}", kafka=KafkaConfig(**{**COPIES, **kafka}))


def scram(cluster: Cluster, folder: Path, **other: Any) -> dict[str, Any]:
    """Settings of a user that the cluster lets in, but for those given."""
    password = folder / "password"
    password.write_text("scorer-secret\n")
    settings = {"sasl_mechanism": "SCRAM-SHA-512", "username": "scorer", "password_file": str(password)}
    return {"ca_file": str(authority(cluster).file), **settings, **other}


def mutual(cluster: Cluster, name: str, issuer: Authority | None = None) -> dict[str, Any]:
    issuer = issuer or authority(cluster)
    issuer.issue(name)
    files = {"certificate_file": str(issuer.certificate(name)), "key_file": str(issuer.key(name))}
    return {"ca_file": str(authority(cluster).file), **files}


def authority(cluster: Cluster) -> Authority:
    assert cluster.authority is not None
    return cluster.authority


def told(settings: LogConfig) -> str:
    with pytest.raises(NotReadyError) as raised:
        check_connection(settings)
    return str(raised.value)


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


def test_a_cluster_that_can_be_used_is_told_with_its_brokers(kafka: Address) -> None:
    found = check_connection(config(kafka.bootstrap))
    assert found.brokers == tuple(kafka.bootstrap.split(","))
    assert found.silent == ()


def test_a_host_that_does_not_resolve_is_told() -> None:
    assert matches(
        r"no-such-host\.invalid:9092: the host name does not resolve", told(config("no-such-host.invalid:9092"))
    )


def test_a_port_where_nothing_listens_is_told() -> None:
    (port,) = free_ports(1)
    assert matches(f"127.0.0.1:{port}: connection refused.*Start the broker", told(config(f"127.0.0.1:{port}")))


def test_one_of_two_servers_is_enough_and_the_other_is_told(kafka: Address) -> None:
    (port,) = free_ports(1)
    found = check_connection(config(f"127.0.0.1:{port},{kafka.bootstrap}"))
    assert found.brokers == tuple(kafka.bootstrap.split(","))
    assert matches("connection refused", found.silent[0])


def test_what_is_no_broker_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(30)

        def greet() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.sendall(b"220 mail ready\r\n")
                connection.recv(1000)
                connection.close()

        greeter = threading.Thread(target=greet)
        greeter.start()
        assert matches("does not answer as Kafka", told(config(f"127.0.0.1:{port}")))
        greeter.join()


def test_more_copies_than_brokers_are_told(kafka: Address) -> None:
    text = told(config(kafka.bootstrap, replication_factor=3, min_insync_replicas=2))
    assert matches("log.kafka.replication_factor: 1 brokers.*at most 1", text)


def test_a_broker_that_calls_itself_by_an_address_without_a_way_is_told(tmp_path: Path) -> None:
    if why_not():
        pytest.skip(str(why_not()))
    (nowhere,) = free_ports(1)
    with Cluster(tmp_path, advertised=[nowhere]) as cluster:
        server = f"127.0.0.1:{cluster.ports[0]}"
        text = told(config(server))
    assert matches(
        f"broker 1 calls itself 127.0.0.1:{nowhere}, and there: connection refused.*advertised.listeners", text
    )


def test_a_tls_port_that_is_asked_without_tls_is_told(mtls_kafka: Cluster) -> None:
    assert matches("the port speaks TLS.*log.kafka.ca_file", told(config(mtls_kafka.bootstrap)))


def test_a_plain_port_that_is_asked_with_tls_is_told(kafka: Address, mtls_kafka: Cluster) -> None:
    text = told(config(kafka.bootstrap, ca_file=str(authority(mtls_kafka).file)))
    assert matches("the port speaks Kafka without TLS.*log.kafka.ca_file", text)


def test_an_unknown_authority_is_told(scram_kafka: Cluster, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    text = told(config(scram_kafka.bootstrap, **scram(scram_kafka, tmp_path, ca_file=str(other.file))))
    assert matches("unknown authority.*log.kafka.ca_file", text)


def test_a_certificate_for_another_host_is_told(scram_kafka: Cluster, tmp_path: Path) -> None:
    with TcpProxy(("127.0.0.1", scram_kafka.ports[0]), listen=("127.0.0.2", 0)) as proxy:
        text = told(config(f"127.0.0.2:{proxy.port}", **scram(scram_kafka, tmp_path)))
    assert matches("certificate is not for this host.*check_hostname", text)


def test_a_missing_client_certificate_is_told(mtls_kafka: Cluster) -> None:
    text = told(config(mtls_kafka.bootstrap, ca_file=str(authority(mtls_kafka).file)))
    assert matches("asks for a client certificate.*certificate_file and key_file", text)


def test_a_client_certificate_of_a_foreign_authority_is_told(mtls_kafka: Cluster, tmp_path: Path) -> None:
    foreign = mutual(mtls_kafka, "stranger", Authority(tmp_path / "other"))
    assert matches(
        "refuses the certificate of log.kafka.certificate_file", told(config(mtls_kafka.bootstrap, **foreign))
    )


def test_a_good_client_certificate_is_let_in(mtls_kafka: Cluster) -> None:
    assert check_connection(config(mtls_kafka.bootstrap, **mutual(mtls_kafka, "scorer"))).silent == ()


def test_a_wrong_password_is_told(scram_kafka: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    wrong = scram(scram_kafka, tmp_path, password_file=str(tmp_path / "wrong"))
    assert matches(
        "user 'scorer' is not let in.*wrong password or unknown user", told(config(scram_kafka.bootstrap, **wrong))
    )


def test_a_mechanism_that_the_broker_does_not_take_is_told_with_those_it_takes(
    scram_kafka: Cluster, tmp_path: Path
) -> None:
    text = told(config(scram_kafka.bootstrap, **scram(scram_kafka, tmp_path, sasl_mechanism="SCRAM-SHA-256")))
    assert matches("does not take SCRAM-SHA-256.*one of: SCRAM-SHA-512", text)


def test_a_listener_that_wants_a_login_is_told_with_its_mechanisms(scram_kafka: Cluster) -> None:
    text = told(config(scram_kafka.bootstrap, ca_file=str(authority(scram_kafka).file)))
    assert matches("asks who we are.*one of: SCRAM-SHA-512", text)


def test_a_login_that_the_listener_does_not_take_is_told(kafka: Address, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret")
    login = {"sasl_mechanism": "PLAIN", "username": "u", "password_file": str(tmp_path / "password")}
    assert matches(
        "this listener takes no SASL.*Remove log.kafka.sasl_mechanism", told(config(kafka.bootstrap, **login))
    )


def test_a_good_login_is_let_in(scram_kafka: Cluster, tmp_path: Path) -> None:
    assert check_connection(config(scram_kafka.bootstrap, **scram(scram_kafka, tmp_path))).silent == ()


@pytest.fixture
def prompts_of_a_run(scram_kafka: Cluster, tmp_path: Path) -> Iterator[LogConfig]:
    """A run's prompts topic on the cluster with ACLs, and the settings of a user without a right."""
    internal = config(scram_kafka.internal)
    differences(internal, wanted_topics([PROMPTS], "rights", internal), create=True)
    (tmp_path / "stranger").write_text("stranger-secret")
    stranger = {"username": "stranger", "password_file": str(tmp_path / "stranger")}
    yield config(scram_kafka.bootstrap, **scram(scram_kafka, tmp_path, **stranger))


@pytest.mark.parametrize(
    ("right", "option"),
    [
        (Right("topic", "prompts", "read"), "--operation Read --topic rights.prompts"),
        (Right("topic", "prompts", "write"), "--operation Write --topic rights.prompts"),
        (Right("topic", "prompts", "describe_configs"), "--operation DescribeConfigs --topic rights.prompts"),
        (Right("group", "generators", "read"), "--operation Read --group rights.generators"),
    ],
)
def test_a_missing_right_is_named_with_the_command_that_gives_it(
    prompts_of_a_run: LogConfig, right: Right, option: str
) -> None:
    with pytest.raises(NotReadyError) as raised:
        check_rights(prompts_of_a_run, "rights", [right])
    text = str(raised.value)
    assert f"user 'stranger' may not:\n{right.operation} on {right.kind} rights.{right.name}" in text
    assert f"--add --allow-principal User:stranger {option}" in text


def test_a_user_with_every_right_lacks_none(scram_kafka: Cluster, prompts_of_a_run: LogConfig) -> None:
    wanted = [right for right in rights("generator", ["policy"]) if right.name in ("prompts", "generators")]
    assert check_rights(config(scram_kafka.internal), "rights", wanted) == []


def test_rights_on_topics_that_are_not_there_are_handed_back(scram_kafka: Cluster) -> None:
    wanted = [Right("topic", "prompts", "read")]
    assert check_rights(config(scram_kafka.internal), "no-such-run", wanted) == wanted
