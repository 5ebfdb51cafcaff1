"""How records become bytes and come back. What the records are stands in `records.py`."""

import hashlib
from typing import TypeVar

import msgspec

from streaming.errors import RecordError

SCHEMA = 1
"""Number of this release's record layout; a new release reads every older one. New fields with defaults leave it: older
releases ignore them. It rises only where an older release must not read on. 1 is not written: its absence says it."""

REFERENCE_MARK = b"\xc1blob"
"""How the bytes of a Reference begin: msgpack never uses the byte 0xc1, so no other record begins like this."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything on the wire: immutable, keyword-only, unknown fields ignored.

    msgspec inherits `frozen` but not `kw_only`, and type checkers want both repeated: so each record says them.
    """


class Reference(Record, frozen=True, kw_only=True):
    """Stands in the log for a value above its size limit (`streaming/log/by_reference.py`).

    Readers see the value itself, or these bytes where it could not be read, with the `problem`.
    """

    location: str  # name below the run's blobs, which ends with the value's sha256
    num_bytes: int
    problem: str = ""  # filled in by the reader
    outline: bytes = b""  # what is needed of the value to end its request: a few fields of it, msgpack
    schema: int = SCHEMA


class Outline(Record, frozen=True, kw_only=True):
    """Base of structs that take a few fields out of a record: they can be read where its blob cannot."""


R = TypeVar("R", bound=Record)

_ENCODER = msgspec.msgpack.Encoder()


def encode(record: Record) -> bytes:
    """A record's bytes on the wire (msgpack)."""
    return _ENCODER.encode(record)


def stable_id(*parts: object) -> str:
    """The same parts give the same 16 hex digits on every machine and in every release."""
    return hashed(repr(parts).encode())


def hashed(*parts: bytes) -> str:
    """16 hex digits of these bytes, one after the other."""
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


def encode_reference(reference: Reference) -> bytes:
    """A reference's bytes on the wire: no other record begins like them."""
    return REFERENCE_MARK + encode(reference)


def decode_reference(value: bytes, *, where: str = "record") -> Reference | None:
    """The reference in these bytes, or None where they are the value itself. Raises RecordError where it is broken."""
    if not value.startswith(REFERENCE_MARK):
        return None
    return decode(Reference, value[len(REFERENCE_MARK) :], where=where)


def decode(kind: type[R], value: bytes, *, where: str = "record") -> R:
    """The record in these bytes.

    Raises RecordError where they are not a `kind`: bad msgpack, a missing field, a wrong type, a blob that is gone, a
    layout of a newer release.
    """
    reference = decode_reference(value, where=where)
    if reference is not None:
        value = _outline_in(reference, kind, where)
    try:
        record = msgspec.msgpack.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as cause:
        _refuse_newer(kind, _schema_of(value), where)
        raise RecordError(
            f"not a {_name(kind)}: {cause}", where=where, do="The bytes go to the dead-letter topic."
        ) from cause
    _refuse_newer(kind, getattr(record, "schema", SCHEMA), where)
    return record


def _name(kind: type[Record]) -> str:
    """What people know the record as: a class that reads another one in its own way goes by that one's name."""
    return next(
        one.__name__ for one in reversed(kind.__mro__) if issubclass(one, Record) and one not in (Record, Outline)
    )


class _Schema(msgspec.Struct):
    schema: int = 1


def _schema_of(value: bytes) -> int:
    """The layout that these bytes say they have; of bytes that say nothing, this release's."""
    try:
        return msgspec.msgpack.decode(value, type=_Schema).schema
    except (msgspec.DecodeError, UnicodeDecodeError):
        return SCHEMA


def _refuse_newer(kind: type[Record], schema: int, where: str) -> None:
    if schema > SCHEMA:
        raise RecordError(
            f"a {_name(kind)} of schema {schema}: this release reads up to {SCHEMA}",
            where=where,
            do="The bytes go to the dead-letter topic. Upgrade every role of the run, then `streamdpo redrive`.",
        )


def _outline_in(reference: Reference, kind: type[Record], where: str) -> bytes:
    if issubclass(kind, Outline) and reference.outline:
        return reference.outline
    raise RecordError(
        f"the value of {reference.num_bytes} bytes could not be read: {reference.problem or 'nobody has tried'}",
        where=f"{where}, blob {reference.location}",
        do="The reference goes to the dead-letter topic. Restore the blob, then `streamdpo redrive` takes it back.",
    )
