"""Another process on a log, for tests: `python -m tests.log_process URL RUN LEASE_S VERB ARGUMENT...`.

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

from streaming.config import KafkaConfig
from streaming.log.protocol import Entry, Log, Output
from streaming.log.sqlite import SQLiteLog

MAX_RECORD_BYTES = 2**20

SHORT_LEASE_S = 1.0
"""Where a member dies: its death is noticed in a test's time, and a busy machine does not bury the living."""

LONG_LEASE_S = 60.0
"""Where none dies: none is taken for dead either."""


def open_test_log(url: str, run: str, *, lease_s: float) -> Log:
    """A log of either backend whose members are dead when nothing was heard of them for so long."""
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite":
        return SQLiteLog(Path(path), run=run, max_record_bytes=MAX_RECORD_BYTES, max_bytes=2**30, lease_s=lease_s)
    from streaming.log.kafka import KafkaLog

    config = KafkaConfig(session_timeout_s=lease_s, delivery_timeout_s=60)
    return KafkaLog(url, run=run, max_record_bytes=MAX_RECORD_BYTES, config=config)


class LogProcess:
    """A process to talk to: line by line, until it is killed."""

    def __init__(self, url: str, verb: str, *arguments: str, run: str = "test", lease_s: float = LONG_LEASE_S) -> None:
        command = [sys.executable, "-m", "tests.log_process", url, run, str(lease_s), verb, *arguments]
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
    timeout_s = 30.0  # to join and for the first; the rest is there
    while entries := consumer.read(max_records=1000, timeout_s=timeout_s):
        for entry in entries:
            tell(entry)
        timeout_s = 0


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

if __name__ == "__main__":
    with open_test_log(sys.argv[1], sys.argv[2], lease_s=float(sys.argv[3])) as log:
        VERBS[sys.argv[4]](log, *sys.argv[5:])
        sys.stdin.read()
