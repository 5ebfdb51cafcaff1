"""Versions behind a URL: fetched once a machine, verified, never applied torn, and never in the way of sampling."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.fetching import Copy, WeightsCache
from actors.update import announced, verify_weights
from streaming.errors import WeightsError
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.records import Version, WeightVersion
from streaming.remote_weights import RemoteWeights
from streaming.weights import write_manifest
from tests.builders import make_prompt, make_weights
from tests.s3_server import S3Server
from tests.scripted_engine import PROBE, Run, Script, announce, running

LOCK = ".lock"


def publish(remote: RemoteWeights, folder: Path, version: Version) -> WeightVersion:
    """A scripted engine's version that lies behind the URL only."""
    directory = folder / f"made-{version}"
    directory.mkdir()
    (directory / "model").write_text(str(version))
    sha256 = write_manifest(directory, version)
    location = remote.upload(directory, version, sha256)
    shutil.rmtree(directory)
    return make_weights(version, location=location, manifest_sha256=sha256, probe=PROBE)


class Rig:
    """A remote folder whose files a test can damage, and caches of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remote = RemoteWeights(f"file://{folder}/remote")
        self.metrics = Metrics("generator")
        self.leases: set[Version] = set()

    def cache(self, metrics: Metrics | None = None) -> WeightsCache:
        return WeightsCache(
            self.folder / "cache",
            keep=2,
            leases=lambda: self.leases,
            metrics=metrics or self.metrics,
            wait=lambda seconds: None,
        )

    def publish(self, *numbers: int) -> list[WeightVersion]:
        return [publish(self.remote, self.folder, Version(1, number)) for number in numbers]

    def file(self, number: int) -> Path:
        return self.folder / "remote" / f"1.{number}" / "model"

    def cached(self) -> set[str]:
        names = {path.name.partition("-")[0] for path in (self.folder / "cache").iterdir()}
        return names - {LOCK}

    def num(self, outcome: str) -> float:
        return self.metrics.value("weight_fetches_total", outcome=outcome)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_a_version_behind_a_url_comes_into_the_cache_and_is_verified(rig: Rig) -> None:
    [record] = rig.publish(0)
    weights = announced(record, rig.cache())
    await verify_weights(weights)
    assert (weights.directory / "model").read_text() == "1.0"
    assert weights.directory.parent == rig.folder / "cache"


async def test_a_version_in_a_directory_is_read_there(rig: Rig) -> None:
    [record] = rig.publish(0)
    seen = make_weights(record.version, location=str(rig.file(0).parent), manifest_sha256=record.manifest_sha256)
    weights = announced(seen, rig.cache())
    await verify_weights(weights)
    assert weights.directory == rig.file(0).parent
    assert not (rig.folder / "cache").exists()


def test_generators_of_one_machine_download_once(rig: Rig) -> None:
    [record] = rig.publish(0)
    threads = [threading.Thread(target=rig.cache().fetch, args=(record,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (rig.num("fetched"), rig.num("cached")) == (1, 5)


def test_the_cache_holds_the_newest_and_what_is_leased(rig: Rig) -> None:
    cache = rig.cache()
    rig.leases = {Version(1, 1)}
    for record in rig.publish(0, 1, 2, 3, 4):
        cache.fetch(record)
    assert rig.cached() == {"1.1", "1.3", "1.4"}


def test_an_older_version_that_is_asked_for_stays_while_it_is_wanted(rig: Rig) -> None:
    records = rig.publish(0, 1, 2)
    cache = rig.cache()
    for record in reversed(records):
        cache.fetch(record)
        assert cache.place(record).is_dir()


def test_another_runs_version_of_the_same_number_is_not_taken_for_ours(rig: Rig, tmp_path: Path) -> None:
    [record] = rig.publish(0)
    rig.cache().fetch(record)
    other = make_weights(record.version, location=record.location, manifest_sha256="0" * 64)
    with pytest.raises(WeightsError, match="announced was"):
        rig.cache().fetch(other)


def test_what_a_killed_download_left_is_removed_by_the_next(rig: Rig) -> None:
    (rig.folder / "cache" / ".1.0-abc.1-2.partial").mkdir(parents=True)
    [record] = rig.publish(1)
    rig.cache().fetch(record)
    assert rig.cached() == {"1.1"}


async def test_a_copy_that_the_disk_has_damaged_is_fetched_again(rig: Rig) -> None:
    [record] = rig.publish(0)
    weights = announced(record, rig.cache())
    await verify_weights(weights)
    (weights.directory / "model").write_text("rot")
    await verify_weights(weights)
    assert (weights.directory / "model").read_text() == "1.0"
    assert (rig.num("fetched"), rig.num("torn")) == (2, 1)


async def test_a_version_that_is_damaged_behind_the_url_is_refused(rig: Rig) -> None:
    [record] = rig.publish(0)
    rig.file(0).write_text("tor")
    with pytest.raises(WeightsError, match="not what its manifest says"):
        await verify_weights(announced(record, rig.cache()))
    assert (rig.num("torn"), rig.num("refused"), rig.cached()) == (3, 1, set())


async def test_a_store_that_is_away_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    remote = RemoteWeights(s3.make_bucket("fetch-away"))
    record = publish(remote, tmp_path, Version(1, 0))
    s3.close()
    metrics = Metrics("generator")

    def back(seconds: float) -> None:
        """The first wait between two tries: the store comes back, empty, and is filled again."""
        if not tries:
            s3.start()
            publish(RemoteWeights(s3.make_bucket("fetch-away")), tmp_path, Version(1, 0))
        tries.append(seconds)

    tries: list[float] = []
    cache = WeightsCache(tmp_path / "cache", keep=2, leases=set, metrics=metrics, wait=back)
    await Copy(cache, record).fetch()
    assert (cache.place(record) / "model").read_text() == "1.0"
    assert metrics.value("weight_fetches_total", outcome="retried") >= 1


def remote_run(run: Run, remote: RemoteWeights) -> Callable[[Version], WeightVersion]:
    def publish_and_announce(version: Version) -> WeightVersion:
        record = publish(remote, run.folder, version)
        announce(run.log, record)
        return record

    return publish_and_announce


def test_a_generator_follows_versions_behind_a_url(log: Log, rig: Rig) -> None:
    script = Script()
    with running(log, rig.folder, script.make_engine, cache=rig.cache) as run:
        publish_and_announce = remote_run(run, rig.remote)
        for number in range(5):
            publish_and_announce(Version(1, number))
            run.until(lambda number=number: run.heartbeat.state.version == Version(1, number))
        run.ask(make_prompt(0))
        [group] = run.groups(1)
        assert run.metrics.value("weight_fetches_total", outcome="fetched") == 5
    assert group.candidates[0].version == Version(1, 4)
    assert rig.cached() == {"1.3", "1.4"}


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_a_torn_version_is_never_applied_and_the_engine_samples_on(log: Log, rig: Rig) -> None:
    script = Script()
    with running(log, rig.folder, script.make_engine, cache=rig.cache) as run:
        publish_and_announce = remote_run(run, rig.remote)
        publish_and_announce(Version(1, 0))
        run.until(lambda: run.heartbeat.state.health == "ready")
        torn = publish(rig.remote, rig.folder, Version(1, 1))
        rig.file(1).write_text("torn")
        announce(log, torn)
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="refused") == 1)
        run.ask(make_prompt(0))
        [group] = run.groups(1)
        assert group.candidates[0].version == Version(1, 0)
        publish_and_announce(Version(1, 2))
        run.until(lambda: run.heartbeat.state.version == Version(1, 2))
    assert script.started == [Version(1, 0)]


def test_an_object_store_serves_generators(log: Log, s3: S3Server, tmp_path: Path) -> None:
    remote = RemoteWeights(s3.make_bucket("generators") + "/run/policy")
    script = Script()

    def cache(metrics: Metrics) -> WeightsCache:
        return WeightsCache(tmp_path / "cache", keep=2, leases=set, metrics=metrics)

    with running(log, tmp_path, script.make_engine, cache=cache) as run:
        publish_and_announce = remote_run(run, remote)
        publish_and_announce(Version(1, 0))
        run.until(lambda: run.heartbeat.state.health == "ready")
        publish_and_announce(Version(1, 1))
        run.until(lambda: run.heartbeat.state.version == Version(1, 1))
        run.ask(make_prompt(0))
        [group] = run.groups(1)
    assert group.candidates[0].version == Version(1, 1)
