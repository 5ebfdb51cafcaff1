"""The file under the embedded log: group commit, and files that are not logs."""

import subprocess
import sys
import threading
from pathlib import Path

import apsw
import pytest

from streaming.errors import LeaseLostError, LogError, NotReadyError
from streaming.log.store import LAYOUT, Database, Writer


def insert(number: int):  # type: ignore[no-untyped-def]
    return lambda database: database.rows("INSERT INTO groups VALUES (?, ?)", [str(number), number])


def test_writes_that_wait_share_one_transaction(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log.db")
    begun, go_on = threading.Event(), threading.Event()

    def slow(database: Database) -> None:
        begun.set()
        go_on.wait()

    leader = threading.Thread(target=writer.run, args=[slow])
    leader.start()
    begun.wait()
    followers = [threading.Thread(target=writer.run, args=[insert(i)]) for i in range(10)]
    for follower in followers:
        follower.start()
    while writer.num_waiting < 10:
        pass
    go_on.set()
    for thread in [leader, *followers]:
        thread.join()
    assert writer.num_commits == 2
    assert writer.run(lambda database: database.value("SELECT count(*) FROM groups")) == 10
    writer.close()


def test_a_refusal_concerns_only_the_write_that_refuses(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log.db")

    def refuse(database: Database) -> None:
        raise LeaseLostError("lost", where="here", do="Read on.")

    with pytest.raises(LeaseLostError):
        writer.run(refuse)
    writer.run(insert(1))
    assert writer.run(lambda database: database.value("SELECT count(*) FROM groups")) == 1
    writer.close()


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log.db")

    def half(database: Database) -> None:
        insert(1)(database)
        database.rows("INSERT INTO missing VALUES (1)")

    with pytest.raises(LogError, match="no such table"):
        writer.run(half)
    writer.run(insert(1))
    writer.close()


def test_every_acknowledged_write_is_synced(tmp_path: Path) -> None:
    database = Database(tmp_path / "log.db")
    assert database.value("PRAGMA journal_mode") == "wal"
    assert database.value("PRAGMA synchronous") >= 2  # FULL
    database.close()


def test_a_file_that_is_no_log_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.write_bytes(b"prompts\n" * 1000)
    with pytest.raises(LogError, match=r"log\.db: .*\n.*name another"):
        Writer(path)


def test_a_file_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA user_version = {LAYOUT + 1}")
    connection.close()
    with pytest.raises(LogError, match=f"layout {LAYOUT + 1}"):
        Writer(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="missing"):
        Writer(tmp_path / "nowhere" / "log.db")


def test_several_processes_may_make_the_file_at_once(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from streaming.log.store import Writer; Writer(Path({str(tmp_path / 'l.db')!r}))"
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=root) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
