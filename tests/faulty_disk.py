"""A disk under SQLite that fails when told to, and that loses at a power cut what was not synced."""

import itertools
import random
from pathlib import Path
from typing import Any

import apsw

_NUMBERS = itertools.count()


class FaultyDisk(apsw.VFS):
    """SQLite's own VFS with faults. Keeps a second copy of every file: what a power cut would leave of it."""

    def __init__(
        self,
        *,
        fail_at: int | None = None,
        tear: bool = False,
        is_lasting: bool = True,
        what: str = "write",
        error: type[apsw.Error] = apsw.IOError,
    ) -> None:
        """Fail the Nth write (or sync) to a write-ahead log: whole, or after half of it; for good, or once.

        `error` is what SQLite is told: apsw.IOError, or apsw.FullError for a disk without space.
        """
        self.name = f"faulty-{next(_NUMBERS)}"
        super().__init__(self.name, "")
        self.files: dict[str, FaultyFile] = {}
        self.fail_at = fail_at
        self._what = what
        self._error = error
        self._is_lasting = is_lasting
        self.tear = tear
        self.num_done = 0
        self.is_failing = False

    def xOpen(self, name: Any, flags: list[int]) -> "FaultyFile":
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        existed = path is not None and Path(path).exists()
        file = FaultyFile(self, name, flags)
        if path is not None:
            before = self.files.get(path) if existed else None
            file.durable = before.durable if before else bytearray()
            file.unsynced = before.unsynced if before else []
            self.files[path] = file
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        if syncdir:  # else a power cut may bring the file back
            self.files.pop(filename, None)

    def pass_by(self, what: str, path: str) -> None:
        """Raise if this is the operation that fails."""
        if not path.endswith("-wal"):
            return
        if what == self._what:
            self.num_done += 1
            if self.num_done == self.fail_at:
                self.is_failing = True
                raise self._error("the disk failed")
        if self.is_failing and self._is_lasting:
            raise self._error("the disk has failed")

    def heal(self) -> None:
        """Work again: so that a log can be closed."""
        self.is_failing = False
        self.fail_at = None

    def cut_power(self, folder: Path, *, seed: int) -> None:
        """Write into `folder` what the disk holds now: all that was synced, and any part of what was not."""
        chance = random.Random(seed)
        for path, file in self.files.items():
            left = bytearray(file.durable)
            for offset, data in file.unsynced:
                survives = chance.choice([0, len(data) // 2, len(data)])
                put(left, offset, data[:survives])
            (folder / Path(path).name).write_bytes(left)


class FaultyFile(apsw.VFSFile):
    """A file of the disk above."""

    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._disk = disk
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else (name or "")
        self.durable = bytearray()
        self.unsynced: list[tuple[int, bytes]] = []

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            self._disk.pass_by("write", self._path)
        except (apsw.IOError, apsw.FullError):
            if self._disk.tear:
                super().xWrite(bytes(data[: len(data) // 2]), offset)
                self.unsynced.append((offset, bytes(data[: len(data) // 2])))
            raise
        super().xWrite(data, offset)
        self.unsynced.append((offset, bytes(data)))

    def xSync(self, flags: int) -> None:
        self._disk.pass_by("sync", self._path)
        super().xSync(flags)
        for offset, data in self.unsynced:
            put(self.durable, offset, data)
        self.unsynced.clear()

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        del self.durable[size:]


def put(target: bytearray, offset: int, data: bytes) -> None:
    """Write at an offset, with zeros up to it where the target is shorter."""
    if data:
        target.extend(bytes(max(0, offset - len(target))))
        target[offset : offset + len(data)] = data
