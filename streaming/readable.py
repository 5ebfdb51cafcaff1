"""Reading the topics that every role reads and none owns (`weights`, `roles`): what is no record is passed over.

Nobody writes a dead letter for it: it ends no request, and each of its readers would write one of its own.
"""

import logging
from collections.abc import Iterable
from functools import lru_cache

from streaming.errors import RecordError
from streaming.log.protocol import Entry
from streaming.records import R, decode

_LOGGER = logging.getLogger(__name__)


def readable(kind: type[R], entries: Iterable[Entry]) -> list[R]:
    """The records among the entries, in their order. What is none is told of once, in the role's own log file."""
    found = []
    for entry in entries:
        try:
            found.append(decode(kind, entry.value, where=entry.where))
        except RecordError as error:
            _tell_once(entry.where, error.what)
    return found


@lru_cache(maxsize=1024)
def _tell_once(where: str, what: str) -> None:
    """Roles look at these topics several times a second."""
    _LOGGER.warning("%s is passed over: %s", where, what)
