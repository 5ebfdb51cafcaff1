"""A scorer or selector as a process of its own: `python -m tests.bench.stage_process URL RUN STAGE INDEX`.

says "ready" -> (a line on its input) -> works -> says "working" at its first record -> works until its input ends
"""

import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from streaming import topics
from streaming.heartbeat import Heartbeat
from streaming.metrics import Metrics
from tests.bench.bench_stages import run_scorer, run_selector
from tests.bench.logs import opened

STAGES = {"scorer": (run_scorer, topics.CANDIDATES.name), "selector": (run_selector, topics.SCORED.name)}

_LOOK_S = 0.005


class StageProcess:
    """The process as its parent sees it; killed on the way out, should it still run."""

    def __init__(self, url: str, run: str, stage: str, index: int) -> None:
        command = [sys.executable, "-m", "tests.bench.stage_process", url, run, stage, str(index)]
        root = Path(__file__).resolve().parent.parent.parent
        self._popen = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_for(self, word: str) -> None:
        """Until it says so."""
        assert self._popen.stdout is not None
        said = self._popen.stdout.readline().strip()
        if said != word:
            raise RuntimeError(f"the process of a stage said {said!r} where {word!r} was expected")

    def go(self) -> None:
        """Let it begin."""
        assert self._popen.stdin is not None
        self._popen.stdin.write("go\n")

    def end(self) -> None:
        """Let it end in order, and wait for that."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        if (code := self._popen.wait(60)) != 0:
            raise RuntimeError(f"the process of a stage ended with {code}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()


def main(url: str, run: str, stage: str, index: int) -> None:
    work, _ = STAGES[stage]
    metrics, stop, over = Metrics(stage), threading.Event(), threading.Event()
    with opened(url, run) as log:
        heartbeat = Heartbeat(log, metrics, role=stage, index=index)

        def run_stage() -> None:
            try:
                work(log, metrics, heartbeat, stop)
            finally:
                over.set()

        print("ready", flush=True)
        sys.stdin.readline()
        thread = threading.Thread(target=run_stage)
        thread.start()
        while not metrics.value("records_written_total", topic=_written(stage)) and not over.wait(_LOOK_S):
            pass
        print("failed" if over.is_set() else "working", flush=True)
        sys.stdin.read()
        stop.set()
        thread.join()
        heartbeat.close()


def _written(stage: str) -> str:
    return topics.SCORED.name if stage == "scorer" else topics.pairs("policy").name


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
