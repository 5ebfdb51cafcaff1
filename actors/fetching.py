"""Versions that lie behind a URL, on this machine's disk: downloaded once a machine, however many generators it has.

announced -> (another generator has it, or downloaded) -> verified by whoever uses it -> pruned
"""

import asyncio
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from streaming.errors import NotReadyError, WeightsError
from streaming.kept import parse_version, prunable
from streaming.metrics import Metrics
from streaming.records import Version, WeightVersion
from streaming.remote_weights import RemoteWeights

Outcome = Literal["fetched", "cached", "retried", "torn", "unreachable", "refused"]
"""What the metric weight_fetches_total counts. retried: one request; unreachable: a whole try, and another follows."""

FIRST_PAUSE_S = 1.0
"""Before the next try to reach the store; doubled each time,"""

LAST_PAUSE_S = 30.0
"""up to this: the engine samples on meanwhile."""


class WeightsCache:
    """A directory with the newest versions of one policy. Several processes may share it."""

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        leases: Callable[[], set[Version]],
        metrics: Metrics,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """The newest `keep` stay, and what is leased by a role of the run, of which some may be on this machine."""
        self._directory = directory
        self._keep = keep
        self._leases = leases
        self._metrics = metrics
        self._wait = wait

    def place(self, record: WeightVersion) -> Path:
        """Where a version lies once it is here. Another run's version of this number lies elsewhere."""
        return self._directory / f"{record.version}-{record.manifest_sha256[:16]}"

    def fetch(self, record: WeightVersion) -> None:
        """Have the version here. Raises WeightsError where it is gone or damaged, NotReadyError without an answer."""
        place = self.place(record)
        self._directory.mkdir(parents=True, exist_ok=True)
        with _locked(self._directory / ".lock"):
            if place.is_dir():
                self._count("cached")
                return
            for left in self._directory.glob(".*.partial"):  # by a process that was killed: no other is here now
                shutil.rmtree(left, ignore_errors=True)
            url, _, _ = record.location.rpartition("/")
            remote = RemoteWeights(url, count=self._count, wait=self._wait)
            remote.download(record.version, record.manifest_sha256, place)
            self._prune(place)
        self._count("fetched")

    def discard(self, record: WeightVersion) -> None:
        """Remove a copy that this machine's disk has damaged: the next `fetch` downloads it again."""
        self._count("torn")
        shutil.rmtree(self.place(record), ignore_errors=True)

    def count_failure(self, outcome: Literal["unreachable", "refused"]) -> None:
        self._count(outcome)

    def _prune(self, newest: Path) -> None:
        there: dict[Version, list[Path]] = {}
        for path in self._directory.iterdir():
            version = parse_version(path.name.partition("-")[0])
            if version is not None and path != newest:
                there.setdefault(version, []).append(path)
        for version in prunable(there, self._leases(), keep=self._keep - 1):
            for path in there[version]:
                shutil.rmtree(path, ignore_errors=True)

    def _count(self, outcome: str) -> None:
        self._metrics.count("weight_fetches_total", outcome=outcome)


class Copy(NamedTuple):
    """A version behind a URL, and the cache that it comes into."""

    cache: WeightsCache
    record: WeightVersion

    async def fetch(self) -> None:
        """Have it here, however long the store is away. Raises WeightsError where it is gone or damaged."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await asyncio.to_thread(self.cache.fetch, self.record)
            except WeightsError:
                self.cache.count_failure("refused")
                raise
            except NotReadyError:
                self.cache.count_failure("unreachable")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    async def fetch_again(self) -> None:
        """Replace a copy that turned out to be damaged."""
        await asyncio.to_thread(self.cache.discard, self.record)
        await self.fetch()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock goes with its process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
