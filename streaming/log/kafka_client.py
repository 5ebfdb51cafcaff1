"""From settings to kafka-python's: where the cluster is, how to prove who we are, and a client that cannot wedge.

Knows nothing of records, groups or offsets.
"""

import ssl
import time
from pathlib import Path
from typing import Any

from kafka.errors import UnknownBrokerIdError
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl.oauth import AbstractTokenProvider

from streaming.config import KafkaConfig
from streaming.errors import ConfigError

SYSTEM_AUTHORITIES = "system"
"""`ca_file` that means the operating system's."""

_RECONNECT_MAX_S = 1.0
"""Longest pause between two attempts to connect: a broker that is back is found within a second."""

_UNKNOWN_BROKER_PAUSE_S = 0.05
"""Before metadata is looked at again when it names a leader that is not among its brokers."""


class SteadyNetClient(KafkaNetClient):  # type: ignore[misc]
    """A client that waits for better metadata where kafka-python 3.0.12 wedges.

    When metadata names a leader that is not in its list of brokers, kafka-python's sender thread raises out of
    `maybe_connect`, spins at 100% and never looks at its batches again, even after the broker is back.
    """

    def maybe_connect(self, node_id: Any, **options: Any) -> None:
        try:
            super().maybe_connect(node_id, **options)
        except UnknownBrokerIdError:
            self.cluster.request_update()
            time.sleep(_UNKNOWN_BROKER_PAUSE_S)


class FileTokens(AbstractTokenProvider):  # type: ignore[misc]
    """OAUTHBEARER tokens from a file that something else keeps fresh."""

    def __init__(self, path: str) -> None:
        self._path = path

    def token(self) -> str:
        return _secret(self._path, "log.kafka.token_file")


def bootstrap_servers(url: str) -> list[str]:
    """The brokers of kafka://HOST:PORT,HOST:PORT. Raises ConfigError where one has no port."""
    servers = url.removeprefix("kafka://").rstrip("/").split(",")
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            raise ConfigError(
                f"this names no broker: {server!r} (in {url!r})",
                where="log.url",
                do="Write kafka://HOST:PORT or kafka://HOST:PORT,HOST:PORT, as in kafka://localhost:9092.",
            )
    return servers


def client_settings(url: str, config: KafkaConfig) -> dict[str, Any]:
    """What producer, consumer and administration have in common.

    Raises ConfigError where a file is missing or is no certificate or key.
    """
    settings = {
        "bootstrap_servers": bootstrap_servers(url),
        "client_id": "streamdpo",
        "request_timeout_ms": round(config.request_timeout_s * 1000),
        "reconnect_backoff_max_ms": round(_RECONNECT_MAX_S * 1000),
        "security_protocol": _protocol(config),
        "kafka_client": SteadyNetClient,
    }
    if config.ca_file is not None:
        settings["ssl_context"] = _tls(config, config.ca_file)
    if config.sasl_mechanism is not None:
        settings |= _sasl(config)
    return settings


def _protocol(config: KafkaConfig) -> str:
    transport = "PLAINTEXT" if config.ca_file is None else "SSL"
    return transport if config.sasl_mechanism is None else f"SASL_{transport}"


def _sasl(config: KafkaConfig) -> dict[str, Any]:
    if config.token_file is not None:
        return {"sasl_mechanism": config.sasl_mechanism, "sasl_oauth_token_provider": FileTokens(config.token_file)}
    assert config.password_file is not None, "KafkaConfig asks for it"
    return {
        "sasl_mechanism": config.sasl_mechanism,
        "sasl_plain_username": config.username,
        "sasl_plain_password": _secret(config.password_file, "log.kafka.password_file"),
    }


def _tls(config: KafkaConfig, ca_file: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if ca_file == SYSTEM_AUTHORITIES else ca_file)
    except (OSError, ssl.SSLError) as cause:
        raise _unusable("log.kafka.ca_file", ca_file, cause) from cause
    context.check_hostname = config.check_hostname
    if config.certificate_file is not None:
        password = None
        if config.key_password_file is not None:
            password = _secret(config.key_password_file, "log.kafka.key_password_file")
        try:
            context.load_cert_chain(config.certificate_file, config.key_file, password)
        except (OSError, ssl.SSLError) as cause:
            files = f"{config.certificate_file}, {config.key_file}"
            raise _unusable("log.kafka.certificate_file, key_file", files, cause) from cause
    return context


def _secret(path: str, setting: str) -> str:
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise _unusable(setting, path, cause) from cause


def _unusable(setting: str, path: str, cause: Exception) -> ConfigError:
    return ConfigError(
        f"the file cannot be used: {path}: {cause}", where=setting, do="Name a PEM file or secret this user can read."
    )
