"""Values too large for the log: each lies as a file of its own, named by its content, below any fsspec URL.

    written (durable on return) -> named by a reference in the log -> placed (by whom) -> read and checked -> removed

A blob is FOLDER/SHA256. Writing the same value again writes the same name, so a retry leaves nothing behind. Beside
it lies an empty file FOLDER/SHA256.at-PARTITION-OFFSET for every record that names it: so whoever removes blobs has to
trust no clock. Knows bytes and names; knows no records and no topics.
"""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from streaming.errors import LogError, RecordError
from streaming.remote import RemoteFolder
from streaming.weights import PARTIAL, sync_directory, write_durably

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[0-9a-f]{64}")
"""What a reference may name: nothing outside the blobs' own folders."""

_PLACE = re.compile(r"(.+)\.at-(\d+)-(\d+)")
"""Name of the empty file that says which record names a blob."""

_MARK = "README.txt"
"""Lies beside the folders. Without it the store itself is not there (not mounted, another bucket), and nothing is
known about any blob."""

_MARK_TEXT = b"Values that were too large for the log of a streamdpo run. Each is named by its sha256.\n"

_PAUSES_S = (0.1, 0.3, 1.0)
"""Before each further try of a store that does not answer: most outages of an object store are shorter."""


class Place(NamedTuple):
    """A record that names a blob."""

    partition: int
    offset: int


class Blob(NamedTuple):
    """A blob as a listing shows it."""

    name: str
    modified_s: float  # Unix time of the last write
    places: tuple[Place, ...] = ()  # the records that name it, as far as they are known
    num_bytes: int | None = None  # None where only its places are there

    @property
    def is_partial(self) -> bool:
        """Half a file: its writer was killed, or is at work."""
        return self.name.endswith(PARTIAL)


class BlobStore:
    """The blobs of one run. Safe to use from several threads and processes."""

    def __init__(
        self,
        url: str,
        *,
        count: Callable[[str], None] = lambda action: None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """`url` is a directory or any URL that fsspec knows; nothing is made or read yet.

        `count` hears of what happens to blobs (written, read, retried, removed), `wait` sleeps between two tries.
        """
        self._folder = RemoteFolder(
            url, setting="log.blobs", error=LogError, pauses_s=_PAUSES_S, count=count, wait=wait
        )
        self.count = count
        self.url = url
        self.is_local = self._folder.is_local
        self._is_marked = False

    def write(self, folder: str, value: bytes) -> str:
        """Make `value` durable and return its name. Raises LogError where the store does not take it."""
        name = f"{folder}/{hashlib.sha256(value).hexdigest()}"
        self._mark()
        self._put(name, value)
        self.count("written")
        return name

    def place(self, name: str, place: Place) -> None:
        """Note which record names a blob: it stays as long as that record. Raises LogError."""
        path = self._path(_place_name(name, place))
        self._folder.write(name, lambda: self._folder.fs.pipe_file(path, b""))

    def read(self, name: str, num_bytes: int) -> bytes:
        """The very bytes that were written under this name.

        Raises RecordError where the blob is gone or damaged, which no further try mends, and LogError where the
        store does not answer: then nothing is known about the blob.
        """
        self.check(name, num_bytes)
        value = self._asked("read", name, lambda path: bytes(self._folder.fs.cat_file(path)))
        if hashlib.sha256(value).hexdigest() != name.split("/")[1]:
            raise _unreadable("the blob's content does not match its sha256", self._path(name))
        self.count("read")
        return value

    def check(self, name: str, num_bytes: int) -> None:
        """Raises as `read` does, but looks at no content: whether the blob is there, and its size."""
        if not _NAME.fullmatch(name):
            raise _unreadable(f"{name!r} is not the name of a blob", self._folder.url)
        size = self._asked("look at", name, lambda path: int(self._folder.fs.info(path)["size"]))
        if size != num_bytes:
            raise _unreadable(f"the blob has {size} bytes, its reference says {num_bytes}", self._path(name))

    def blobs(self, folder: str) -> list[Blob]:
        """What lies in a folder, files that a killed writer left half included."""
        try:
            found = self._folder.attempt("list", folder, lambda: self._folder.fs.ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return []
        blobs: dict[str, Blob] = {}
        for info in found:
            if info["type"] == "file":
                name, places = _parse(f"{folder}/{info['name'].rsplit('/', 1)[-1]}")
                before = blobs.get(name, Blob(name, 0.0))
                blobs[name] = Blob(
                    name,
                    max(before.modified_s, self._folder.modified_s(info)),
                    (*before.places, *places),
                    before.num_bytes if places else info["size"],
                )
        return list(blobs.values())

    def remove(self, blob: Blob) -> bool:
        """Remove a blob and its places, unless it was written again since it was listed; whether it was removed."""
        try:
            info = self._folder.attempt("look at", blob.name, lambda: self._folder.fs.info(self._path(blob.name)))
            if self._folder.modified_s(info) > blob.modified_s:
                return False
        except FileNotFoundError:  # its places only: somebody was killed in the middle of this
            info = None
        names = [blob.name] if info is not None else []
        for name in (*names, *(_place_name(blob.name, place) for place in blob.places)):
            self._remove_file(name)
        self.count("removed")
        return True

    def flush(self, folder: str) -> None:
        """What was removed from a folder stays removed after a power loss."""
        if self.is_local:
            sync_directory(Path(self._path(folder)))

    def _remove_file(self, name: str) -> None:
        try:
            self._folder.attempt("remove", name, lambda: self._folder.fs.rm_file(self._path(name)))
        except FileNotFoundError:  # another process was quicker
            return

    def _asked(self, verb: str, name: str, work: Callable[[str], T]) -> T:
        """What the store says of a blob's file; RecordError where it has none."""
        path = self._path(name)
        try:
            return self._folder.attempt(verb, name, lambda: work(path))
        except FileNotFoundError as cause:
            self._check_mark()
            raise _unreadable("the blob is missing", path) from cause

    def _path(self, name: str) -> str:
        return self._folder.path(name)

    def _put(self, name: str, value: bytes) -> None:
        path = self._path(name)
        if self._folder.is_local:
            self._folder.write(name, lambda: write_durably(Path(path), value))
        else:
            self._folder.write(name, lambda: self._folder.fs.pipe_file(path, value))

    def _mark(self) -> None:
        if not self._is_marked:
            self._put(_MARK, _MARK_TEXT)
            self._is_marked = True

    def _check_mark(self) -> None:
        """A blob is missing only where the store itself is there."""
        if not self._folder.attempt("look at", _MARK, lambda: self._folder.fs.exists(self._path(_MARK))):
            raise LogError(
                "the blobs that the log names are not there",
                where=self._path(_MARK),
                do="Mount or restore log.blobs. Are they gone for good? Then put an empty file of this name there: "
                "the records become dead letters.",
            )


def _place_name(name: str, place: Place) -> str:
    return f"{name}.at-{place.partition}-{place.offset}"


def _parse(name: str) -> tuple[str, tuple[Place, ...]]:
    """The blob that a file belongs to, and the place that it notes."""
    match = _PLACE.fullmatch(name)
    return (name, ()) if match is None else (match[1], (Place(int(match[2]), int(match[3])),))


def _unreadable(what: str, where: str) -> RecordError:
    return RecordError(what, where=where, do="The reference goes to the dead-letter topic; `redrive` takes it back.")
