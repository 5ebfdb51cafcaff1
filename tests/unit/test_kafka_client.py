"""How a Kafka cluster is reached: what the settings become, and what is refused before anything connects."""

import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from streaming.config import KafkaConfig, load_section
from streaming.errors import ConfigError, NotReadyError
from streaming.log import open_log
from streaming.log.kafka_client import SteadyNetClient, bootstrap_servers, client_settings
from tests.certificates import Authority

URL = "kafka://a:9092,b:9093"


def configured(**values: Any) -> KafkaConfig:
    return load_section(KafkaConfig, values, where="test")


@pytest.fixture
def secret(tmp_path: Path) -> str:
    (tmp_path / "secret").write_text("opensesame\n")
    return str(tmp_path / "secret")


def test_a_url_names_brokers_with_their_ports() -> None:
    assert bootstrap_servers("kafka://a:9092,[::1]:9093/") == ["a:9092", "[::1]:9093"]


@pytest.mark.parametrize("url", ["kafka://a", "kafka://a:", "kafka://:9092", "kafka://a:9092,", "kafka://a:9092/x"])
def test_a_broker_without_host_or_port_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="kafka://HOST:PORT"):
        bootstrap_servers(url)


def test_without_settings_the_connection_is_plain() -> None:
    settings = client_settings(URL, KafkaConfig())
    assert settings["security_protocol"] == "PLAINTEXT"
    assert "ssl_context" not in settings
    assert "sasl_mechanism" not in settings


def test_a_password_is_the_files_content_without_its_last_newline(secret: str) -> None:
    settings = client_settings(URL, configured(sasl_mechanism="SCRAM-SHA-512", username="scorer", password_file=secret))
    assert settings["security_protocol"] == "SASL_PLAINTEXT"
    assert (settings["sasl_plain_username"], settings["sasl_plain_password"]) == ("scorer", "opensesame")


def test_a_token_is_read_again_whenever_it_is_needed(secret: str) -> None:
    settings = client_settings(URL, configured(sasl_mechanism="OAUTHBEARER", token_file=secret))
    assert settings["sasl_oauth_token_provider"].token() == "opensesame"
    Path(secret).write_text("renewed")
    assert settings["sasl_oauth_token_provider"].token() == "renewed"


def test_a_certificate_turns_mutual_tls_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue("scorer")
    certificate, key = authority.certificate("scorer"), authority.key("scorer")
    settings = client_settings(
        URL, configured(ca_file=str(authority.file), certificate_file=str(certificate), key_file=str(key))
    )
    assert settings["security_protocol"] == "SSL"
    context: ssl.SSLContext = settings["ssl_context"]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_the_systems_authorities_are_taken_by_name() -> None:
    assert client_settings(URL, configured(ca_file="system"))["ssl_context"].verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    "values",
    [
        {"ca_file": "missing.pem"},
        {"sasl_mechanism": "PLAIN", "username": "u", "password_file": "missing"},
        {"ca_file": "system", "certificate_file": "missing.pem", "key_file": "missing.pem"},
    ],
)
def test_a_missing_file_is_named_with_its_setting(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"log\.kafka\.\w+.*missing"):
        client_settings(URL, configured(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"certificate_file": "a.pem"},
        {"certificate_file": "a.pem", "key_file": "b.pem"},
        {"key_password_file": "a"},
        {"check_hostname": False},
        {"sasl_mechanism": "PLAIN", "username": "u"},
        {"sasl_mechanism": "OAUTHBEARER", "username": "u", "password_file": "p"},
        {"username": "u", "password_file": "p"},
        {"replication_factor": 1},
        {"delivery_timeout_s": 10},
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        configured(**values)


def test_a_cluster_that_nobody_serves_is_not_ready() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and never listening: whoever connects is refused
        url = f"kafka://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(NotReadyError, match="streamdpo check"):
            open_log(url, run="r", kafka=KafkaConfig(connect_timeout_s=1))


def test_a_leader_that_is_in_no_list_of_brokers_is_asked_about_again_and_raises_nothing() -> None:
    """kafka-python's own client raises here, and its sender thread then spins for ever."""
    client = SteadyNetClient(bootstrap_servers=["127.0.0.1:1"])
    with contextlib.closing(client):
        client.maybe_connect(99)
        assert client.cluster.need_update
