"""One connection to one broker, made step by step so that what fails says which step it was.

TCP -> TLS -> Kafka answers -> SASL -> open -> closed

kafka-python says "Unable to bootstrap" for every one of them. This is for diagnosis only: one request at a time,
blocking, and nothing is tried again.
"""

import socket
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from kafka.errors import KafkaError, SaslAuthenticationFailedError, UnsupportedSaslMechanismError, for_code
from kafka.net.sasl import get_sasl_mechanism
from kafka.protocol.broker_version_data import BrokerVersionData
from kafka.protocol.metadata import ApiVersionsRequest
from kafka.protocol.parser import KafkaProtocol
from kafka.protocol.sasl import SaslAuthenticateRequest, SaslHandshakeRequest

from streaming.errors import NotReadyError

TIMEOUT_S = 10.0
"""A broker that answers at all answers within milliseconds; a firewall that swallows packets never does."""

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of one answer. What is no Kafka broker answers with bytes that read as a length of gigabytes."""

WRONG_HOST = {62, 64}
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""

EXPIRED = {9, 10}
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


class Target(NamedTuple):
    """A broker to connect to, and how: `settings` are what kafka_client.client_settings makes."""

    server: str  # HOST:PORT
    settings: Mapping[str, Any]
    has_certificate: bool

    @property
    def host(self) -> str:
        return self.server.rpartition(":")[0].strip("[]")

    @property
    def address(self) -> tuple[str, int]:
        return self.host, int(self.server.rpartition(":")[2])

    @property
    def tls(self) -> ssl.SSLContext | None:
        return self.settings.get("ssl_context")

    def failed(self, what: str, do: str) -> NotReadyError:
        return NotReadyError(what, where=self.server, do=do)


class Wire:
    """An open connection that Kafka answers on. A context manager."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError or KafkaError where no Kafka broker answers there."""
        self._socket = connection
        self._parser = KafkaProtocol(client_id="streamdpo", receive_message_max_bytes=MAX_ANSWER_BYTES)
        answer = self._exchange(ApiVersionsRequest(version=0))
        known = {api.api_key: (api.min_version, api.max_version) for api in answer.api_keys}
        self._versions = BrokerVersionData(api_versions=known)

    def ask(self, request: Any) -> Any:
        """The broker's answer. Raises OSError where the connection breaks."""
        request.API_VERSION = self._versions.api_version(request)
        return self._exchange(request)

    def _exchange(self, request: Any) -> Any:
        self._parser.send_request(request)
        self._socket.sendall(self._parser.send_bytes())
        while True:
            received = self._socket.recv(64 * 1024)
            if not received:
                raise ConnectionResetError("the other side closed the connection")
            for _, answer in self._parser.receive_bytes(received):
                return answer

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(target: Target) -> Wire:
    """A connection that is ready for requests. Raises NotReadyError that says which step failed and what mends it."""
    connection = _tcp(target)
    try:
        if target.tls is not None:
            connection = _tls(connection, target.tls, target)
        wire = _kafka(connection, target)
        if target.settings.get("sasl_mechanism") is not None:
            _authenticate(wire, target)
        else:
            _needs_no_sasl(wire, target)
    except BaseException:
        connection.close()
        raise
    return wire


def _tcp(target: Target) -> socket.socket:
    try:
        return socket.create_connection(target.address, timeout=TIMEOUT_S)
    except socket.gaierror as cause:
        do = "Is the host spelled right? Does this machine's name service know it?"
        raise target.failed(f"the host name does not resolve: {cause.strerror}", do) from cause
    except ConnectionRefusedError as cause:
        raise target.failed(
            "connection refused: nothing listens there", "Start the broker, or mend the port."
        ) from cause
    except TimeoutError as cause:
        do = "A firewall or a wrong address: try `nc -vz HOST PORT` from this machine."
        raise target.failed(f"no connection within {TIMEOUT_S:.0f} s", do) from cause
    except OSError as cause:
        raise target.failed(f"no connection: {cause}", "Mend this machine's network, or the address.") from cause


def _tls(connection: socket.socket, context: ssl.SSLContext, target: Target) -> socket.socket:
    try:
        return context.wrap_socket(connection, server_hostname=target.host)
    except ssl.SSLCertVerificationError as cause:
        raise _distrusted(cause, target) from cause
    except OSError as cause:
        if "ALERT" in _reason(cause):
            raise _refused_certificate(cause, target) from cause
        connection.close()
        if _speaks_plaintext(target):
            do = "Ask the port of the brokers' TLS listener, or remove log.kafka.ca_file to talk without TLS."
            raise target.failed("TLS handshake: the port speaks Kafka without TLS", do) from cause
        do = "See the broker's log: protocol versions and ciphers of its listener, or what else listens there."
        raise target.failed(f"TLS handshake failed: {cause}", do) from cause


def _distrusted(cause: ssl.SSLCertVerificationError, target: Target) -> NotReadyError:
    if cause.verify_code in WRONG_HOST:
        do = "Ask by a name that the certificate has, or give the broker a certificate with this one. Where names "
        do += "cannot be right, log.kafka.check_hostname: false checks the authority only."
        return target.failed(f"TLS handshake: the certificate is not for this host ({cause.verify_message})", do)
    if cause.verify_code in EXPIRED:
        do = "Renew the broker's certificate, and look at this machine's clock."
        return target.failed(f"TLS handshake: the certificate is not valid now ({cause.verify_message})", do)
    do = "Put the authority that signed it into the file of log.kafka.ca_file."
    return target.failed(f"TLS handshake: the certificate is of an unknown authority ({cause.verify_message})", do)


def _kafka(connection: socket.socket, target: Target) -> Wire:
    """With TLS 1.3 a broker says only after the handshake that it refuses the client's certificate."""
    try:
        return Wire(connection)
    except (OSError, KafkaError) as cause:
        if target.tls is not None and isinstance(cause, ssl.SSLError | ConnectionError):
            raise _refused_certificate(cause, target) from cause
        connection.close()
        if target.tls is None and _speaks_tls(target):
            do = "Set log.kafka.ca_file to the authority of the brokers' certificates, or ask their plaintext listener."
            raise target.failed("the port speaks TLS, and log.kafka asks without", do) from cause
        do = "Is this a broker's port, and not its controller's or another service's?"
        raise target.failed(f"what listens there does not answer as Kafka: {cause}", do) from cause


def _refused_certificate(cause: OSError, target: Target) -> NotReadyError:
    if target.has_certificate:
        what = "the broker refuses the certificate of log.kafka.certificate_file"
        do = "Use one that has not expired, of an authority in the brokers' ssl.truststore; the broker's log says why."
    else:
        what = "the broker asks for a client certificate, and log.kafka.certificate_file is not set"
        do = "Set log.kafka.certificate_file and key_file to a certificate of an authority that the brokers trust."
    return target.failed(f"TLS handshake: {what} ({_reason(cause) or cause})", do)


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or "")


def _authenticate(wire: Wire, target: Target) -> None:
    name = target.settings["sasl_mechanism"]
    answer = wire.ask(SaslHandshakeRequest(mechanism=name))
    error = for_code(answer.error_code)
    if error is UnsupportedSaslMechanismError:
        do = f"Set log.kafka.sasl_mechanism to one of: {', '.join(answer.mechanisms)}."
        raise target.failed(f"SASL: the broker does not take {name}", do)
    if error.errno:
        do = "Remove log.kafka.sasl_mechanism, or ask the port of the brokers' SASL listener."
        raise target.failed(f"SASL: this listener takes no SASL ({error.__name__})", do)
    mechanism = get_sasl_mechanism(name)(host=target.host, **target.settings)
    try:
        while not mechanism.is_done():
            answer = wire.ask(SaslAuthenticateRequest(auth_bytes=mechanism.auth_bytes()))
            if answer.error_code:
                raise for_code(answer.error_code)(answer.error_message)
            mechanism.receive(answer.auth_bytes)
    except (OSError, ValueError, KafkaError) as cause:
        raise _refused_login(cause, target) from cause


def _refused_login(cause: Exception, target: Target) -> NotReadyError:
    name = target.settings["sasl_mechanism"]
    if "sasl_plain_username" in target.settings:
        who = f"user {target.settings['sasl_plain_username']!r}"
        do = "Mend log.kafka.username and the file of password_file, or make the user: kafka-configs.sh --alter "
        do += f"--entity-type users --entity-name USER --add-config '{name}=[password=...]'."
        reason = "wrong password or unknown user"
    else:
        who, reason = "the token", "it has expired, or is none that the brokers trust"
        do = "Put a fresh token into the file of log.kafka.token_file: it is read again at every connection."
    if not isinstance(cause, SaslAuthenticationFailedError):
        reason = "it broke off"
    return target.failed(f"SASL: {who} is not let in with {name}: {reason} ({cause})", do)


def _needs_no_sasl(wire: Wire, target: Target) -> None:
    """A listener with SASL closes the connection at the first request without; asked, it names its mechanisms."""
    answer = wire.ask(SaslHandshakeRequest(mechanism="none"))
    if for_code(answer.error_code) is UnsupportedSaslMechanismError:
        do = f"Set log.kafka.sasl_mechanism to one of: {', '.join(answer.mechanisms)}, with username and password_file."
        raise target.failed("SASL: the listener asks who we are, and log.kafka does not say", do)


def _speaks_plaintext(target: Target) -> bool:
    try:
        with socket.create_connection(target.address, timeout=TIMEOUT_S) as connection, Wire(connection):
            return True
    except (OSError, KafkaError):
        return False


def _speaks_tls(target: Target) -> bool:
    """Whether anything there answers a TLS greeting; trusts and sends nothing."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(target.address, timeout=TIMEOUT_S) as plain, context.wrap_socket(plain):
            return True
    except OSError as error:
        return "ALERT" in _reason(error)
