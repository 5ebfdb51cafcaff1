"""What happens to a process, and at which moment of its own life: it does it to itself, so the moment is exact.

A moment is a request to the log or a change of a file. What is drawn from a seed is its number.
"""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apsw

Act = Literal["kill", "freeze"]

APPEND = "before append"
APPENDED = "after append"
READ = "after read"
COMMIT = "before commit"
COMMITTED = "after commit"
BEAT = "beat"
FILE = "file"

_CHANGES = re.compile(r"open|os\.(mkdir|rename|replace|remove|rmdir|link|truncate)|shutil\.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_PATIENCE_MS = 60_000

_AWAKE_AFTER = 12
"""Moments after which a process that was frozen has done whatever it was about to do: it beats ten times in 2 s."""


class Fate(NamedTuple):
    """SIGKILL or SIGSTOP at the Nth moment (from 1), counted over the moments of one kind or (None) of all."""

    act: Act
    at: int
    kind: str | None = None


class Moments:
    """Counts the moments of this process, and lets its fate happen. Safe to use from several threads."""

    def __init__(self, fate: Fate | None, *, file: Path | None, awake: Path) -> None:
        """`file` is the embedded log's: nobody stands still in a transaction of it. `awake` is made when a process
        that was frozen has gone on for a while."""
        self._fate = fate
        self._file = file
        self._awake = awake
        self._lock = threading.Lock()
        self._num = 0
        self._left: int | None = None  # until it counts as awake

    def pass_by(self, kind: str) -> None:
        """This is a moment of that kind."""
        fate = self._fate
        if fate is None:
            return
        with self._lock:
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self._awake.touch()
                return
            if fate.kind is None or fate.kind == kind:
                self._num += 1
            if self._num != fate.at:
                return
            self._left = _AWAKE_AFTER
        if fate.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._file is not None:
            wait_for_transactions(self._file)
        # To this very thread: another one may take a signal to the process, and this one go on for a while.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def watch_files(self, directory: Path) -> None:
        """From now on every change of a file below `directory` is a moment."""
        below = str(directory)

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            if not _CHANGES.fullmatch(event) or not str(arguments[0]).startswith(below):
                return
            if event == "open" and not arguments[2] & _WRITING:
                return
            self.pass_by(FILE)

        sys.addaudithook(look)


def wait_for_transactions(file: Path) -> None:
    """Until nobody is writing to the log's file: who stands still in a transaction blocks every other process."""
    connection = apsw.Connection(str(file))
    connection.set_busy_timeout(_PATIENCE_MS)
    connection.execute("BEGIN IMMEDIATE; ROLLBACK")
    connection.close()


def is_frozen(pid: int) -> bool:
    """Whether a process stands still; one that is gone does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


class JumpyClock:
    """Stands in for time.time in every process of a run: real time, and what the run says that clocks are wrong by."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._real = time.time

    def __call__(self) -> float:
        return self._real() + float(self._file.read_bytes() or b"0")

    def jump(self, seconds: float) -> None:
        """All clocks are wrong by this from now on."""
        whole = self._file.with_suffix(".new")
        whole.write_bytes(b"%f" % seconds)
        whole.replace(self._file)
