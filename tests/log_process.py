"""Another process on a log, for tests: `python -m tests.log_process URL RUN VERB ARGUMENT...`.

append TOPIC PREFIX NUM   append NUM records one by one, print "partition offset value" of each acknowledged one
hold GROUP TOPIC          join, read what there is, print it, commit nothing
take GROUP TOPIC          join, read and commit, print each, until its input ends
The first two then wait to be killed, or for their input to end.
"""

import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from streaming.log.protocol import Entry, Log, Output
from streaming.log.sqlite import SQLiteLog

SHORT_LEASE_S = 1.0
"""Where a member dies: its death is noticed in a test's time, and a busy machine does not bury the living."""

LONG_LEASE_S = 60.0
"""Where none dies: none is taken for dead either."""


def open_file(path: Path, run: str = "test", *, lease_s: float = LONG_LEASE_S) -> SQLiteLog:
    """A log whose members are dead when nothing was heard of them for so long."""
    return SQLiteLog(path, run=run, max_record_bytes=2**20, max_bytes=2**30, lease_s=lease_s)


class LogProcess:
    """A process to talk to: line by line, until it is killed."""

    def __init__(self, path: Path, verb: str, *arguments: str, run: str = "test") -> None:
        command = [sys.executable, "-m", "tests.log_process", str(path), run, verb, *arguments]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def lines(self, num: int) -> list[tuple[int, int, str]]:
        """The next lines: partition, offset and value of each."""
        assert self._process.stdout is not None
        read = [self._process.stdout.readline().split() for _ in range(num)]
        return [(int(partition), int(offset), value) for partition, offset, value in read]

    def rest(self) -> list[tuple[int, int, str]]:
        """Let it end by itself, and read all that it still has to say."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        out = self._process.stdout.read()
        assert self._process.wait() == 0
        return [(int(partition), int(offset), value) for partition, offset, value in map(str.split, out.splitlines())]

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "LogProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()


def append(log: Log, topic: str, prefix: str, num: str) -> None:
    for i in range(int(num)):
        value = f"{prefix}{i}"
        [(partition, offset)] = log.append([Output(topic, value.encode(), value.encode())])
        print(partition, offset, value, flush=True)


def hold(log: Log, group: str, topic: str) -> None:
    # Kept until the process ends: a consumer that nobody refers to gives its place in the group up.
    HELD.append(consumer := log.subscribe(group, [topic]))
    for entry in consumer.read(max_records=1000, timeout_s=10):
        tell(entry)


def take(log: Log, group: str, topic: str) -> None:
    end_of_input = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), end_of_input.set()), daemon=True).start()
    with log.subscribe(group, [topic]) as consumer:
        while not end_of_input.is_set():
            for entry in consumer.read(max_records=3, timeout_s=0.05):
                tell(entry)
                consumer.commit({(entry.topic, entry.partition): entry.offset + 1})


def tell(entry: Entry) -> None:
    print(entry.partition, entry.offset, entry.value.decode(), flush=True)


HELD: list[object] = []
VERBS = {"append": append, "hold": hold, "take": take}
LEASES = {"append": LONG_LEASE_S, "hold": SHORT_LEASE_S, "take": LONG_LEASE_S}

if __name__ == "__main__":
    with open_file(Path(sys.argv[1]), sys.argv[2], lease_s=LEASES[sys.argv[3]]) as log:
        VERBS[sys.argv[3]](log, *sys.argv[4:])
        sys.stdin.read()
