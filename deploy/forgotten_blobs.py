"""The large values of a forgotten prompt, which lie beside the log and can be deleted on any backend.

    records rewritten, where the log lets them be -> blobs of the prompt, and what killed writers left half -> removed

A blob is named by its content, so whatever names a blob of this prompt is a record of this prompt. One that no record
names (the writer died behind it, or somebody forgot half-way before) is read to see whose it is. Only of a stopped run:
nobody is writing.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import NamedTuple

from streaming.blobs import Blob, BlobStore
from streaming.errors import RecordError
from streaming.history import entries
from streaming.log.by_reference import ByReferenceLog
from streaming.log.protocol import Log
from streaming.wire import decode_reference

Place = tuple[int, int]
"""Partition and offset of a record in its topic."""

IsOfPrompt = Callable[[str, bytes], bool]
"""Whether a topic's value holds content of the prompt."""


class Removed(NamedTuple):
    """Blobs that are gone."""

    url: str
    num_blobs: int
    num_bytes: int
    is_local: bool


def names_at(log: Log, topic: str) -> dict[Place, str]:
    """Where the records of a topic lie whose values are blobs, and the names of these."""
    if not isinstance(log, ByReferenceLog):
        return {}
    found: dict[Place, str] = {}
    for entry in entries(log.bare, topic):
        try:
            reference = decode_reference(entry.value, where=entry.where)
        except RecordError:
            continue
        if reference is not None:
            found[entry.partition, entry.offset] = reference.location
    return found


def remove(log: Log, topics: Iterable[str], known: Collection[str], is_of_prompt: IsOfPrompt) -> Removed | None:
    """Remove the blobs `known` to be the prompt's, and those of it that no record names; None where none can be there.

    Durable on return. Whatever is removed already is no error. Raises LogError where the store does not answer.
    """
    if not isinstance(log, ByReferenceLog):
        return None
    blobs, gone = log.blobs, []
    for topic in topics:
        named = set(names_at(log, topic).values())
        theirs = [
            blob
            for blob in blobs.blobs(topic)
            if blob.name in known or (blob.name not in named and _is_theirs(blobs, blob, partial(is_of_prompt, topic)))
        ]
        gone += [blob for blob in theirs if blobs.remove(blob)]
        if theirs:
            blobs.flush(topic)
    return Removed(blobs.url, len(gone), sum(blob.num_bytes or 0 for blob in gone), blobs.is_local)


def _is_theirs(blobs: BlobStore, blob: Blob, is_of_prompt: Callable[[bytes], bool]) -> bool:
    """Whether a blob that no record names holds the prompt. Nobody can tell of half a file: it goes in any case."""
    if blob.is_partial or blob.num_bytes is None:
        return blob.is_partial
    try:
        return is_of_prompt(blobs.read(blob.name, blob.num_bytes))
    except RecordError:  # damaged: no record will ever be read from it
        return True
