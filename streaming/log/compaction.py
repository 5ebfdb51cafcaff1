"""What stays of a compacted topic: the newest record of every key. Bytes that are no record take no record's place."""

from streaming import topics
from streaming.errors import RecordError
from streaming.wire import decode, decode_reference


def is_superseded(topic: str, before: bytes, value: bytes) -> bool:
    """Whether `value`, which came later under the same key, is what readers are to find instead of `before`."""
    return _is_record(topic, value) or not _is_record(topic, before)


def _is_record(topic: str, value: bytes) -> bool:
    row = topics.find(topic)
    if row is None:
        return True
    try:
        if decode_reference(value) is None:
            decode(row.record, value)
    except RecordError:
        return False
    return True
