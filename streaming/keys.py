"""Keys that name a group: of bytes that nobody can read, they still tell whose they were.

candidates, scored, feedback: the group's id        pairs: the pair's id and the group's
"""

import re

from streaming.records import Pair

_KEY = re.compile(rb"(?:[0-9a-f]{16}\.)?([0-9a-f]{16})")
"""No other key names a group: what a person or another program wrote, and the pairs of older releases."""


def pair_key(pair: Pair) -> bytes:
    """The key under which a pair lies in its topic. It begins with the pair's id: so it is found by that, too."""
    return f"{pair.pair_id}.{pair.group_id}".encode()


def group_under(key: bytes) -> str | None:
    """The group that a key names; None where it names none."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[1].decode()
