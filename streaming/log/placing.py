"""Where a record goes and how large it may be: the same on every backend."""

import zlib

from streaming import topics
from streaming.errors import TooLargeError
from streaming.log.protocol import Output

ENVELOPE_BYTES = 64 * 1024
"""What a dead letter may be larger than other values: so that any fits into one, with its reason."""


def partition_of(key: bytes, num_partitions: int) -> int:
    """The partition of a key; the same one whatever process or release asks."""
    return zlib.crc32(key) % num_partitions


def refuse_too_large(output: Output, max_bytes: int, *, setting: str) -> None:
    """Raises TooLargeError where a value is above `max_bytes`, which is what `setting` says."""
    envelope_bytes = ENVELOPE_BYTES if output.topic == topics.DEAD_LETTER.name else 0
    if len(output.value) > max_bytes + envelope_bytes:
        raise TooLargeError(
            f"a value of {len(output.value)} bytes is above the limit of {max_bytes}",
            where=f"{output.topic}, key {output.key!r}",
            do=f"Nothing was appended. Raise {setting}, or sample fewer or shorter candidates.",
        )
