import os
import threading
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from streaming.blobs import BlobStore, Place
from streaming.errors import ConfigError, LogError, RecordError
from streaming.history import entries
from streaming.log import open_log
from streaming.log.protocol import Output
from streaming.metrics import Metrics
from streaming.records import stable_id
from tests.s3_server import S3Server

VALUE = b"a large value"


class Outage:
    """A wait between two tries, after so many of which the store answers again."""

    def __init__(self, repair: object = None, *, after: int = 1) -> None:
        self.num_waits = 0
        self._repair = repair
        self._after = after

    def __call__(self, seconds: float) -> None:
        self.num_waits += 1
        if self.num_waits == self._after and callable(self._repair):
            self._repair()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        return BlobStore(s3.make_bucket(f"blobs-{stable_id(str(tmp_path))}") + "/run")
    MemoryFileSystem.store.clear()
    return BlobStore(f"{request.param}://{tmp_path}/blobs")


def test_a_blob_comes_back_as_it_was_written(store: BlobStore) -> None:
    name = store.write("topic", VALUE)
    assert store.read(name, len(VALUE)) == VALUE


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    assert store.read(store.write("topic", b""), 0) == b""


def test_the_same_value_has_the_same_name_and_another_has_another(store: BlobStore) -> None:
    assert store.write("topic", VALUE) == store.write("topic", VALUE)
    assert store.write("topic", VALUE + b"!") != store.write("topic", VALUE)
    assert len(store.blobs("topic")) == 2


def test_a_blob_knows_its_places_and_takes_them_along(store: BlobStore) -> None:
    name = store.write("topic", VALUE)
    places = {Place(0, 7), Place(3, 12)}
    for place in places:
        store.place(name, place)
    [blob] = store.blobs("topic")
    assert (blob.name, set(blob.places)) == (name, places)
    store.remove(blob)
    assert store.blobs("topic") == []


def test_a_folder_that_nobody_wrote_into_is_empty(store: BlobStore) -> None:
    assert store.blobs("topic") == []


def test_a_removed_blob_is_missing_and_removing_it_again_is_no_error(store: BlobStore) -> None:
    name = store.write("topic", VALUE)
    [blob] = store.blobs("topic")
    assert store.remove(blob)
    store.remove(blob)
    with pytest.raises(RecordError, match="is missing"):
        store.read(name, len(VALUE))


def test_a_blob_that_was_written_again_since_it_was_listed_stays(store: BlobStore) -> None:
    name = store.write("topic", VALUE)
    [blob] = store.blobs("topic")
    store.write("topic", VALUE)
    assert not store.remove(blob._replace(modified_s=blob.modified_s - 1))
    assert store.read(name, len(VALUE)) == VALUE


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "topic/../../x", "topic/short", ""])
def test_a_name_that_no_blob_has_is_not_read(store: BlobStore, name: str) -> None:
    with pytest.raises(RecordError, match="not the name of a blob"):
        store.read(name, 1)


def test_a_store_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "blobs"
    file.write_bytes(b"in the way")
    outage = Outage(file.unlink, after=2)
    counted: list[str] = []
    store = BlobStore(str(file), wait=outage, count=counted.append)
    assert store.read(store.write("topic", VALUE), len(VALUE)) == VALUE
    assert counted == ["retried", "retried", "written", "read"]


def test_a_store_that_stays_away_is_an_error_with_the_place_in_it(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_bytes(b"in the way")
    outage = Outage()
    with pytest.raises(LogError, match=str(tmp_path)):
        BlobStore(str(tmp_path / "blobs"), wait=outage).write("topic", VALUE)
    assert outage.num_waits == 3


def test_a_writer_that_fails_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "topic").mkdir()
    store = BlobStore(str(tmp_path), wait=Outage())
    name = store.write("other", VALUE).replace("other", "topic")
    (tmp_path / name).mkdir()  # where the file should be
    with pytest.raises(LogError, match="cannot write it"):
        store.write("topic", VALUE)
    assert os.listdir(tmp_path / "topic") == [name.split("/")[1]]


def test_half_a_file_of_a_killed_writer_is_listed_and_removed(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    (tmp_path / "topic").mkdir()
    (tmp_path / "topic" / "abc.1-2.partial").write_bytes(b"half")
    assert [store.remove(blob) for blob in store.blobs("topic")] == [True]


def test_many_threads_may_write_the_same_value(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    value = os.urandom(2**20)
    threads = [threading.Thread(target=store.write, args=("topic", value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [blob] = store.blobs("topic")
    assert store.read(blob.name, len(value)) == value


def test_a_bucket_that_does_not_exist_is_said_so(s3: S3Server) -> None:
    with pytest.raises(LogError, match="nothing to write it into"):
        BlobStore("s3://nosuch-bucket/run", wait=Outage()).write("topic", VALUE)


def test_an_object_store_that_is_away_is_waited_for_and_nothing_counts_as_missing(s3: S3Server) -> None:
    outage = Outage()
    store = BlobStore(s3.make_bucket("away") + "/run", wait=outage)
    name = store.write("topic", VALUE)
    s3.close()
    try:
        with pytest.raises(LogError, match="cannot look at it"):
            store.read(name, len(VALUE))
        assert outage.num_waits == 3
    finally:
        s3.start()


def test_a_url_of_no_known_kind_says_what_to_name() -> None:
    with pytest.raises(ConfigError, match=r"log\.blobs"):
        BlobStore("nosuch://somewhere")


def test_blobs_lie_beside_the_embedded_log_one_folder_a_run(tmp_path: Path) -> None:
    metrics = Metrics("test")
    url = f"sqlite:///{tmp_path}/log.db"
    with open_log(url, run="a", max_record_bytes=1024, metrics=metrics) as log:
        log.append([Output("candidates", b"key", VALUE * 1000)])
        assert [entry.value for entry in entries(log, "candidates")] == [VALUE * 1000]
    assert len(list((tmp_path / "blobs" / "a" / "candidates").iterdir())) == 2  # the value, and the note of its place
    assert metrics.value("blobs_total", action="written") == metrics.value("blobs_total", action="read") == 1


def test_blobs_lie_at_any_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    with open_log(url, run="a", max_record_bytes=1024, blobs="memory://shared") as log:
        log.append([Output("candidates", b"key", VALUE * 1000)])
    with open_log(url, run="a", max_record_bytes=1024, blobs="memory://shared") as log:
        assert [entry.value for entry in entries(log, "candidates")] == [VALUE * 1000]
    assert not (tmp_path / "blobs").exists()
