"""Part of a simulated run as a process: `python -m tests.bench.simulated_process URL RUN FOLDER SIZES PART`.

PART names roles that run as threads of this process (`scheduler,learner`); or it is `threads` (every generator as a
thread) or `processes` (every generator as a process that is forked from this one, once it has loaded what they share).
Says the ids of its processes in a line; ends when its input ends.
"""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from tests.bench import simulated
from tests.bench.logs import opened
from tests.bench.simulated import Run, Sizes

END_S = 120.0
"""Hundreds of generators leave their group one by one."""


class Part:
    """The process as its parent sees it."""

    def __init__(self, url: str, run: str, folder: Path, sizes: Sizes, part: str) -> None:
        text = msgspec.json.encode(sizes._asdict()).decode()
        command = [sys.executable, "-m", "tests.bench.simulated_process", url, run, str(folder), text, part]
        root = Path(__file__).resolve().parent.parent.parent
        self._popen = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulated {part} did not start")
        self.pids = [int(pid) for pid in line.split()]

    def check(self) -> None:
        """Raises where it has ended by itself: one of its roles failed."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"a part of the simulated run ended with {self._popen.returncode}")

    def end(self) -> None:
        """In order."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        code = self._popen.wait(END_S)
        if code != 0:
            raise RuntimeError(f"a part of the simulated run ended with {code}")

    def kill(self) -> None:
        """With all that it has forked."""
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def work(url: str, run: str, folder: Path, sizes: Sizes, part: str) -> int:
    if part == "processes":
        return fork(url, run, folder, sizes)
    with opened(url, run) as log:
        if part == "threads":
            roles = [simulated.generator(log, i, sizes, folder) for i in range(sizes.num_generators)]
        else:
            roles = [simulated.ROLES[role](log, sizes, folder) for role in part.split(",")]
        print(os.getpid(), flush=True)
        return be(roles, sys.stdin.fileno())


def be(roles: Sequence[Run], until: int) -> int:
    """Run the roles as threads until this file ends; the end of the process where one of them fails."""
    stop = threading.Event()

    def run(role: Run) -> None:
        try:
            role(stop)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threads = [threading.Thread(target=run, args=(role,)) for role in roles]
    for thread in threads:
        thread.start()
    while os.read(until, 1024):
        pass
    stop.set()
    for thread in threads:
        thread.join()
    return 0


def fork(url: str, run: str, folder: Path, sizes: Sizes) -> int:
    """A process per generator. This one has a single thread when it forks."""
    reading, writing = os.pipe()
    pids = []
    for index in range(sizes.num_generators):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            be_forked(url, run, folder, sizes, index, reading)
        pids.append(pid)
    print(*pids, flush=True)
    sys.stdin.read()
    os.close(writing)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return int(any(codes))


def be_forked(url: str, run: str, folder: Path, sizes: Sizes, index: int, until: int) -> NoReturn:
    """A generator, and nothing of what the process that it was forked from would do next."""
    code = 1
    try:
        with opened(url, run) as log:
            code = be([simulated.generator(log, index, sizes, folder)], until)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    url, run, folder, sizes, part = sys.argv[1:]
    sys.exit(work(url, run, Path(folder), Sizes(**msgspec.json.decode(sizes)), part))
