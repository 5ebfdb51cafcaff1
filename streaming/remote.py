"""A folder at any URL that fsspec knows, which may be away for a while. The only file that deals with fsspec's ways.

Knows names and tries; knows nothing of what lies there.
"""

import posixpath
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from streaming.errors import ConfigError, StreamDPOError

_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"})
"""Object stores, where a name may hold slashes and nothing has to be made first. s3fs would make a whole bucket."""

T = TypeVar("T")


class RemoteFolder:
    """Safe to use from several threads. Nothing is made or read before it is asked for."""

    def __init__(
        self,
        url: str,
        *,
        setting: str,
        error: type[StreamDPOError],
        pauses_s: Sequence[float],
        count: Callable[[str], None] = lambda action: None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """`error` is raised where a try fails after all `pauses_s`, which `wait` sleeps; `count` hears "retried".

        Raises ConfigError where fsspec does not know the URL; `setting` is the one that named it.
        """
        try:
            self.fs, self.root = url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as cause:
            raise ConfigError(
                f"nothing can lie at {url!r}: {cause}",
                where=setting,
                do="Name a directory, or a URL whose fsspec file system is installed (for s3:// that is s3fs).",
            ) from cause
        self.url = url
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.count = count
        self._error = error
        self._pauses_s = pauses_s
        self._wait = wait

    def path(self, name: str) -> str:
        """A name in this folder, as the file system wants it."""
        return f"{self.root}/{name}"

    def _make_parent(self, name: str) -> None:
        """Make the folders above a name, where the file system has any."""
        protocol = self.fs.protocol
        if _WITHOUT_FOLDERS.isdisjoint({protocol} if isinstance(protocol, str) else protocol):
            self.fs.makedirs(posixpath.dirname(self.path(name)), exist_ok=True)

    def attempt(self, verb: str, name: str, work: Callable[[], T]) -> T:
        """Do it, again and again where the store does not answer. FileNotFoundError is an answer, and rises."""
        for pause_s in (*self._pauses_s, None):
            try:
                return work()
            except (FileNotFoundError, StreamDPOError):
                raise
            except Exception as cause:  # every file system of fsspec raises its own library's errors
                if pause_s is None or isinstance(cause, PermissionError):
                    raise self._error(
                        f"cannot {verb} it: {type(cause).__name__}: {cause}",
                        where=self.path(name),
                        do="Mend the store (space, rights, network) and start again: nothing was lost.",
                    ) from cause
                self.count("retried")
                self._wait(pause_s)
        raise AssertionError("the last try returns or raises")

    def write(self, name: str, work: Callable[[], object]) -> None:
        """Write something of this name. Where even its place is missing (no such bucket), that is an error."""
        try:
            self.attempt("write", name, lambda: self._make_parent(name))
            self.attempt("write", name, work)
        except FileNotFoundError as cause:
            raise self._error(
                f"there is nothing to write it into: {cause}",
                where=self.path(name),
                do="Make it first (a bucket, a mount), or name another in the settings.",
            ) from cause

    def modified_s(self, info: dict[str, Any]) -> float:
        """Unix time of a file's last write. Each file system names it differently; one that does not is asked."""
        for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
            if (found := info.get(key)) is not None:
                return float(found.timestamp() if isinstance(found, datetime) else found)
        return float(self.fs.modified(info["name"]).timestamp())
