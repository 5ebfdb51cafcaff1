"""kafka-python's errors in our words: which pass by themselves, and what the others mean for the user."""

import time
from collections.abc import Callable
from typing import TypeVar

from kafka.errors import (
    AuthorizationError,
    GroupAuthorizationFailedError,
    IllegalStateError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RetriableError,
    SaslAuthenticationFailedError,
    UnknownBrokerIdError,
    UnknownTopicOrPartitionError,
)

from streaming.errors import LogError, NotReadyError, StreamDPOError, TooLargeError

T = TypeVar("T")

_FIRST_PAUSE_S = 0.02
"""Before a question is put to the cluster again; each further pause is twice as long,"""

_LAST_PAUSE_S = 1.0
"""up to this."""


def passes(error: KafkaError) -> bool:
    """Whether the same request may succeed later: a broker is down, a leader moves, metadata is old."""
    return isinstance(error, RetriableError | UnknownBrokerIdError)


def is_too_large(error: KafkaError) -> bool:
    """Whether a broker refused a record for its size."""
    return isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError)


def is_forbidden(error: KafkaError) -> bool:
    """Whether a right is missing. kafka-python hides a refused producer id in the text of a bare KafkaError."""
    return isinstance(error, AuthorizationError) or "AuthorizationFailedError" in str(error)


def explain(error: KafkaError, *, where: str) -> StreamDPOError:
    """What an error that does not pass means, or one that has not passed in time."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, GroupAuthorizationFailedError):
        return LogError(what, where=where, do="Grant this user READ on the group: `streamdpo check` lists the rights.")
    if is_forbidden(error):
        return LogError(what, where=where, do="Grant this user the right: `streamdpo check` lists what roles need.")
    if isinstance(error, SaslAuthenticationFailedError):
        return NotReadyError(what, where=where, do="Check log.kafka.username and the password in password_file.")
    if isinstance(error, UnknownTopicOrPartitionError):
        return missing_topic(where)
    if is_too_large(error):
        return TooLargeError(
            what, where=where, do="Raise the topic's max.message.bytes: `streamdpo check` says to what."
        )
    if isinstance(error, IllegalStateError):
        return closed(where)
    return LogError(what, where=where, do="See what the brokers say: `streamdpo check` asks each of them.")


def closed(where: str) -> LogError:
    """Somebody uses a log that is closed."""
    return LogError("the log is closed", where=where, do="Open it again.")


def missing_topic(topic: str) -> NotReadyError:
    """A topic that the run needs and the cluster does not have."""
    return NotReadyError(
        "the cluster has no such topic", where=topic, do="Create the run's topics: `streamdpo check --create-topics`."
    )


def unreachable(servers: str, error: Exception) -> NotReadyError:
    """No broker let us in."""
    return NotReadyError(
        f"no broker answers: {error}",
        where=servers,
        do="`streamdpo check` tells a closed port, a failed TLS handshake, a wrong password and a missing right apart.",
    )


def ask(question: Callable[[], T], *, where: str, timeout_s: float, handing_on: tuple[type[KafkaError], ...] = ()) -> T:
    """The cluster's answer; asked again while a failure may pass, for `timeout_s`.

    Raises our own errors, and as they are those that the caller acts on.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return question()
        except handing_on:
            raise
        except KafkaError as error:
            if not passes(error):
                raise explain(error, where=where) from error
            if time.monotonic() + pause_s > deadline_s:
                raise LogError(
                    f"the cluster did not answer within {timeout_s:g} s: {type(error).__name__}: {error}",
                    where=where,
                    do="Bring the brokers back (`streamdpo check` asks each), or raise log.kafka.delivery_timeout_s.",
                ) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
