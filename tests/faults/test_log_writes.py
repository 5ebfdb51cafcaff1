"""Whatever the disk does, what the log acknowledged stays: failed, torn and unsynced writes at any place."""

from pathlib import Path

import apsw
import pytest

from streaming.errors import LogError
from streaming.log.protocol import Output
from streaming.log.sqlite import SQLiteLog
from tests.fault_rows import Injected
from tests.faulty_disk import FaultyDisk

pytestmark = pytest.mark.fault("disk", backend="sqlite")

NUM_RECORDS = 6

FAILURES = {
    "write fails": ("write", False, apsw.IOError),
    "write is torn": ("write", True, apsw.IOError),
    "sync fails": ("sync", False, apsw.IOError),
    "full": ("write", True, apsw.FullError),
}
"""What fails -> the operation, whether half of it is done, and what SQLite is told."""


def open_file(path: Path, vfs: str | None = None) -> SQLiteLog:
    return SQLiteLog(path, run="test", max_record_bytes=2**20, max_bytes=2**30, vfs=vfs)


def append_until_it_fails(log: SQLiteLog, num: int = NUM_RECORDS, num_bytes: int = 5000) -> int:
    """Append records one by one; returns how many were acknowledged."""
    for i in range(num):
        try:
            log.append([Output("in", b"%d" % i, b"%d " % i + b"x" * num_bytes)])
        except LogError:
            return i
    return num


def numbers(path: Path) -> list[int]:
    """The records in a file, after any recovery that it needs."""
    with open_file(path) as log, log.assign({("in", 0): 0}) as reader:
        entries = reader.read(max_records=10_000, timeout_s=0)
        assert [entry.offset for entry in entries] == list(range(len(entries)))
        return [int(entry.value.split()[0]) for entry in entries]


def num_operations(folder: Path, what: str) -> int:
    """How many writes (or syncs) the appends of a test take on a disk that works."""
    disk = FaultyDisk(what=what)
    with open_file(folder / "log.db", disk.name) as log:
        begun = disk.num_done
        assert append_until_it_fails(log) == NUM_RECORDS
        return disk.num_done - begun


@pytest.mark.parametrize("is_lasting", [True, False], ids=["for good", "once"])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_write_loses_nothing_that_was_acknowledged(
    tmp_path: Path, kind: str, is_lasting: bool, injected: Injected
) -> None:
    what, tear, error = FAILURES[kind]
    (tmp_path / "probe").mkdir()
    num = num_operations(tmp_path / "probe", what)
    assert num >= NUM_RECORDS
    for fail_at in range(1, num + 1, 5):
        path = tmp_path / f"{fail_at}.db"
        disk = FaultyDisk(what=what, tear=tear, is_lasting=is_lasting, error=error)
        log = open_file(path, disk.name)
        disk.fail_at = disk.num_done + fail_at
        num_acknowledged = append_until_it_fails(log)
        assert num_acknowledged < NUM_RECORDS
        disk.cut_power(folder := _folder(tmp_path, fail_at), seed=fail_at)
        disk.heal()
        log.close()
        found = numbers(folder / path.name)
        assert found[:num_acknowledged] == list(range(num_acknowledged))
        assert len(found) <= num_acknowledged + 1  # the one that failed may have arrived all the same
        injected(f"disk: {kind}")


def test_the_log_goes_on_after_a_failure_that_passed(tmp_path: Path) -> None:
    disk = FaultyDisk(is_lasting=False)
    with open_file(tmp_path / "log.db", disk.name) as log:
        disk.fail_at = disk.num_done + 10
        failed = append_until_it_fails(log)
        assert failed < NUM_RECORDS
        assert log.append([Output("in", b"k", b"99")]) == [(0, failed)]
    assert numbers(tmp_path / "log.db") == [*range(failed), 99]


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path, seed: int, injected: Injected) -> None:
    """Large enough that the write-ahead log moves into the file in between."""
    injected("disk: power cut")
    disk = FaultyDisk()
    log = open_file(tmp_path / "log.db", disk.name)
    num = 70 + seed
    assert append_until_it_fails(log, num, num_bytes=300_000) == num
    assert len(disk.files[str(tmp_path / "log.db")].durable) > 2**20  # it has moved
    disk.cut_power(folder := _folder(tmp_path, seed), seed=seed)
    log.close()
    assert numbers(folder / "log.db") == list(range(num))


def _folder(parent: Path, name: int) -> Path:
    folder = parent / f"after-{name}"
    folder.mkdir()
    return folder
