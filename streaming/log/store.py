"""The SQLite file under the embedded log: its tables, its connections, and one writer per process."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from streaming.errors import LeaseLostError, LogError, NotReadyError

LAYOUT = 1
"""Number of this release's tables, in the file's user_version."""

_CHECKPOINT_PAGES = 4096
"""Pages of the write-ahead log before they move into the file: pauses are fewer and longer than SQLite's default.
Pages keep SQLite's 4 KiB: 8 and 16 KiB wrote 1.4 to 3 times as much per append, at 0.5, 4 and 24 KiB a record."""

_KEPT_JOURNAL_BYTES = 64 * 1024 * 1024
"""What the write-ahead log is cut down to after a reader has held it up."""

_CACHE_KIB = 8192
"""Page cache of a connection: enough for the inner pages of a log of many gigabytes."""

_BUSY_S = 60.0
"""Longest wait for another process's transaction: they take milliseconds, so a longer one hangs."""

_BUSY_POLL_S = 0.0005
"""Between two tries for the write lock: SQLite's own steps of up to 100 ms would leave the disk idle."""

_TABLES = """
CREATE TABLE IF NOT EXISTS partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL, is_compacted INTEGER NOT NULL,
    begin INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, number));
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY, time_s REAL NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS newest (
    partition INTEGER NOT NULL, key BLOB NOT NULL, id INTEGER NOT NULL, PRIMARY KEY (partition, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (name TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS members (
    name TEXT NOT NULL, member TEXT NOT NULL, expires_s REAL NOT NULL, PRIMARY KEY (name, member)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS interests (
    name TEXT NOT NULL, member TEXT NOT NULL, partition INTEGER NOT NULL,
    PRIMARY KEY (name, member, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    name TEXT NOT NULL, partition INTEGER NOT NULL, member TEXT, generation INTEGER NOT NULL,
    PRIMARY KEY (name, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS committed (
    name TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (name, partition)) WITHOUT ROWID;
"""

T = TypeVar("T")
Row = tuple[Any, ...]


class Database:
    """One connection. Used by one thread at a time."""

    def __init__(self, path: Path, *, vfs: str | None = None) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise NotReadyError("the directory of the log is missing", where=str(path), do="Make the directory first.")
        self._busy_since: float | None = None
        try:
            self._connection = apsw.Connection(str(path), vfs=vfs)
            self._connection.set_busy_handler(self._wait_for_lock)
            self._settle_in()
        except apsw.Error as cause:
            raise self.error(cause) from cause

    def rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[Row]:
        """All rows of a statement. Raises LogError where the file cannot be read or written."""
        try:
            return self._connection.execute(sql, bindings).fetchall()
        except apsw.Error as cause:
            raise self.error(cause) from cause

    def many(self, sql: str, bindings: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each of the bindings."""
        try:
            self._connection.executemany(sql, bindings)
        except apsw.Error as cause:
            raise self.error(cause) from cause

    def value(self, sql: str, bindings: Sequence[Any] = ()) -> Any:
        """The first column of the only row, or None where there is no row."""
        rows = self.rows(sql, bindings)
        return rows[0][0] if rows else None

    def num_changes(self) -> int:
        """Rows that the newest statement changed."""
        return self._connection.changes()

    def version(self) -> int:
        """Another number whenever another connection has committed anything."""
        return self.value("PRAGMA data_version")  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Take the write lock; waits while another process has it."""
        self.rows("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Make the transaction durable: the disk has it on return."""
        self.rows("COMMIT")

    def roll_back(self) -> None:
        """Leave no transaction open, whatever SQLite itself has rolled back already."""
        if self._connection.in_transaction:
            self.rows("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def error(self, cause: apsw.Error) -> LogError:
        do = "Look at the disk's space and health, then start again: everything acknowledged is in the file."
        if isinstance(cause, apsw.BusyError):
            do = f"Another process held the file for {_BUSY_S:.0f} s: find it (it may be stopped) and end it."
        elif isinstance(cause, apsw.ConnectionClosedError):
            do = "The log was closed: end what still uses it first."
        elif isinstance(cause, apsw.NotADBError):
            do = "This file is not a log: name another in log.url."
        return LogError(f"{type(cause).__name__}: {cause}", where=str(self.path), do=do)

    def _settle_in(self) -> None:
        # FULL, and the directory synced too when the new file's first journal goes: a power cut would bring it back.
        self.rows("PRAGMA synchronous = EXTRA")
        self.rows("PRAGMA journal_mode = WAL")
        self.rows(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        self.rows(f"PRAGMA journal_size_limit = {_KEPT_JOURNAL_BYTES}")
        self.rows(f"PRAGMA cache_size = -{_CACHE_KIB}")

    def _wait_for_lock(self, num_tries: int) -> bool:
        """SQLite's busy handler: sleep a little and try again."""
        if num_tries == 0 or self._busy_since is None:
            self._busy_since = time.monotonic()
        time.sleep(_BUSY_POLL_S)
        return time.monotonic() - self._busy_since < _BUSY_S


def prepare(database: Database) -> None:
    """Make the tables where they are missing. Raises LogError for a file of a newer release."""
    found = database.value("PRAGMA user_version")
    if found > LAYOUT:
        raise LogError(
            f"the file has layout {found}, and this release knows layouts up to {LAYOUT}",
            where=str(database.path),
            do="Use the release that wrote it, or a newer one.",
        )
    if found == LAYOUT:
        return
    database.begin()
    for statement in _TABLES.split(";"):
        database.rows(statement)
    database.rows(f"PRAGMA user_version = {LAYOUT}")
    database.commit()


class _Ticket(Generic[T]):
    """A write that waits for its transaction."""

    def __init__(self, work: Callable[[Database], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self.error: BaseException | None = None
        self.is_done = False

    def attempt(self, database: Database) -> None:
        """Do the work inside the transaction. A refusal concerns this ticket alone, for it comes before any write."""
        try:
            self._results = [self._work(database)]
        except LeaseLostError as error:
            self.error = error

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self._results[0]


class Writer:
    """The one connection of a process that writes. Writes of several threads share a transaction and its fsync.

    queued -> (the first thread to get its turn takes the whole queue) -> one transaction -> durable, all told
    """

    def __init__(self, path: Path, *, vfs: str | None = None) -> None:
        self._database = Database(path, vfs=vfs)
        prepare(self._database)
        self._queue: deque[_Ticket[Any]] = deque()
        self._turn = threading.Lock()
        self._news = threading.Condition()
        self._num_commits = 0

    def run(self, work: Callable[[Database], T]) -> T:
        """Do `work` in a transaction; durable on return. Where this raises, nothing was acknowledged.

        `work` may refuse with LeaseLostError before its first write: the transaction's other writes go through.
        """
        ticket = _Ticket(work)
        self._queue.append(ticket)
        with self._turn:
            if not ticket.is_done:
                self._commit([self._queue.popleft() for _ in range(len(self._queue))])
        return ticket.outcome()

    @property
    def num_commits(self) -> int:
        """Transactions so far: what a reader of this process compares before it waits."""
        return self._num_commits

    @property
    def num_waiting(self) -> int:
        """Writes that share the next transaction."""
        return len(self._queue)

    def wait(self, num_commits: int, timeout_s: float) -> None:
        """Until there are more transactions than `num_commits`, or time is up."""
        with self._news:
            self._news.wait_for(lambda: self._num_commits != num_commits, timeout_s)

    def close(self) -> None:
        with self._turn:
            self._database.close()

    def _commit(self, tickets: list[_Ticket[Any]]) -> None:
        try:
            self._transact(tickets)
        except BaseException as error:
            for ticket in tickets:
                ticket.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            for ticket in tickets:
                ticket.is_done = True
        with self._news:
            self._num_commits += 1
            self._news.notify_all()

    def _transact(self, tickets: list[_Ticket[Any]]) -> None:
        self._database.begin()
        try:
            for ticket in tickets:
                ticket.attempt(self._database)
            self._database.commit()
        except BaseException:
            self._database.roll_back()
            raise
