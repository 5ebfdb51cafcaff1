"""Values above the log's size limit travel by reference, on every backend: the same records, whole and in order."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient

from deploy.redrive import Wanted, carry_out, plan
from learner.pairs import PairReader
from streaming import topics
from streaming.blobs import BlobStore
from streaming.config import ScoringConfig, SelectionConfig
from streaming.errors import LogError, RecordError, TooLargeError
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.keys import pair_key
from streaming.log import open_log
from streaming.log.by_reference import ByReferenceLog
from streaming.log.protocol import Consumer, Entry, Log, Output
from streaming.log.sweeper import SLACK_S, Sweeper
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Group, R, ScoredGroup, decode, encode, stable_id
from streaming.rewards import WeightedSource
from streaming.rewards.function import FunctionSource
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from streaming.selector import Selector
from streaming.wire import decode_reference
from tests.builders import make_candidate, make_group, make_pair, make_prompt, make_scored
from tests.fakes import Clock
from tests.kafka_cluster import Address
from tests.unit.test_asking import CountingReference

MAX_RECORD_BYTES = 1024
MAX_BLOB_BYTES = 64 * 1024 * 1024
SMALL, LARGE = b"small", b"large" * 1000
WAIT_S = 20.0
YEAR_S = 365 * topics.DAY_S


Backend = Callable[[Path, int], Log]
"""Opens the empty log of a folder, with values of at most so many bytes."""


def sqlite(request: pytest.FixtureRequest) -> Backend:
    def open_bare(folder: Path, max_record_bytes: int) -> Log:
        url = f"sqlite:///{folder}/log.db"
        return open_log(url, run="test", max_record_bytes=max_record_bytes, max_blob_bytes=0)

    return open_bare


def kafka(request: pytest.FixtureRequest) -> Backend:
    address: Address = request.getfixturevalue("kafka")

    def open_bare(folder: Path, max_record_bytes: int) -> Log:
        run = f"by-reference-{stable_id(os.getpid(), str(folder))}"
        names = [f"{run}.{topic.name}" for topic in topics.all_topics("policy")]
        with KafkaAdminClient(bootstrap_servers=address.bootstrap) as admin:
            admin.create_topics({name: {"num_partitions": 2} for name in names})
            admin.wait_for_topics(names)
        return open_log(f"kafka://{address.bootstrap}", run=run, max_record_bytes=max_record_bytes)

    return open_bare


BACKENDS = [sqlite, kafka]


class Rig:
    """A log with blobs in a folder, and a look behind it."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.backend = backend
        self._folder = folder
        self.blobs = folder / "blobs"
        self.clock = Clock()
        self.pauses_s: list[float] = []
        self.counted: list[str] = []
        self.store = BlobStore(str(self.blobs), wait=self.pauses_s.append, count=self.counted.append)
        self._opened: list[Log] = []

    def open(self, *, max_record_bytes: int = MAX_RECORD_BYTES, max_blob_bytes: int = MAX_BLOB_BYTES) -> Log:
        self.bare = self.backend(self._folder, max_record_bytes)
        self.log = ByReferenceLog(
            self.bare, self.store, max_record_bytes=max_record_bytes, max_blob_bytes=max_blob_bytes
        )
        self._opened.append(self.log)
        return self.log

    def sweep(self, topic: str, *, later_s: float) -> int:
        """Remove what is of no use, with a clock that is ahead."""
        return Sweeper(self.bare, self.store, clock=Clock(time.time() + later_s)).sweep(topic)

    def files(self) -> list[Path]:
        return sorted(path for path in self.blobs.glob("*/*") if ".at-" not in path.name)

    def close(self) -> None:
        for log in self._opened:
            log.close()


@pytest.fixture(params=BACKENDS, ids=lambda backend: str(backend.__name__))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(request.param(request), tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def log(rig: Rig) -> Log:
    return rig.open()


def append(log: Log, *values: bytes, topic: str = "candidates") -> None:
    log.append([Output(topic, b"key", value) for value in values])


def values(log: Log, topic: str = "candidates") -> list[bytes]:
    return [entry.value for entry in entries(log, topic)]


def records(log: Log, kind: type[R], topic: str) -> list[R]:
    return [decode(kind, entry.value) for entry in entries(log, topic)]


def drain(consumer: Consumer, num: int) -> list[Entry]:
    found: list[Entry] = []
    while len(found) < num:
        found += (more := consumer.read(max_records=num - len(found), timeout_s=WAIT_S))
        assert more, f"{len(found)} of {num} came"
    return found


def test_values_of_any_size_come_back_whole_and_in_order(log: Log) -> None:
    append(log, SMALL, LARGE, b"", LARGE + b"2", SMALL)
    assert values(log) == [SMALL, LARGE, b"", LARGE + b"2", SMALL]


def test_only_what_is_above_the_limit_leaves_the_log(rig: Rig, log: Log) -> None:
    append(log, b"x" * MAX_RECORD_BYTES, b"x" * (MAX_RECORD_BYTES + 1))
    assert len(rig.files()) == 1
    inline, reference = values(rig.bare)
    assert inline == b"x" * MAX_RECORD_BYTES
    found = decode_reference(reference)
    assert found is not None and (found.num_bytes, found.problem) == (MAX_RECORD_BYTES + 1, "")


def test_a_group_reads_on_where_it_committed(rig: Rig, log: Log) -> None:
    append(log, LARGE, SMALL, LARGE + b"2")
    with log.subscribe("g", ["candidates"]) as consumer:
        [first] = drain(consumer, 1)
        consumer.commit({(first.topic, first.partition): first.offset + 1})
    with log.subscribe("g", ["candidates"]) as consumer:
        assert [entry.value for entry in drain(consumer, 2)] == [SMALL, LARGE + b"2"]


def test_the_newest_record_of_a_key_comes_whole(log: Log) -> None:
    append(log, LARGE, LARGE + b"2", topic="roles")
    assert log.newest("roles")[b"key"].value == LARGE + b"2"


def test_a_retry_writes_no_second_blob(rig: Rig, log: Log) -> None:
    append(log, LARGE)
    append(log, LARGE)
    assert len(rig.files()) == 1
    assert values(log) == [LARGE, LARGE]


def test_a_value_above_the_upper_limit_is_refused_and_nothing_is_appended(rig: Rig) -> None:
    log = rig.open(max_blob_bytes=10_000)
    with pytest.raises(TooLargeError, match="max_blob_bytes"):
        append(log, SMALL, LARGE, b"x" * 10_001)
    assert values(log) == []
    assert rig.files() == []


def test_any_record_fits_into_a_dead_letter(rig: Rig) -> None:
    log = rig.open(max_blob_bytes=10_000)
    append(log, b"x" * 12_000, topic="dead-letter")
    assert values(log, "dead-letter") == [b"x" * 12_000]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "4999 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "5001 bytes"),
        (lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]), "does not match its sha256"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
    ],
    ids=["missing", "short", "long", "changed", "empty"],
)
@pytest.mark.fault("blob lost or damaged, or its store away")
def test_what_is_missing_or_damaged_is_no_record_and_says_why(
    rig: Rig, log: Log, damage: Callable[[Path], None], problem: str
) -> None:
    append(log, LARGE, SMALL)
    damage(*rig.files())
    broken, good = entries(log, "candidates")
    with pytest.raises(RecordError, match=problem):
        decode(Group, broken.value, where=broken.where)
    assert good.value == SMALL


def test_a_reference_never_leads_out_of_the_blobs(rig: Rig, log: Log) -> None:
    secret = rig.blobs.parent / ("a" * 64)
    secret.write_bytes(LARGE)
    append(log, LARGE)
    [value] = values(rig.bare)
    rig.bare.append([Output("candidates", b"key", value.replace(b"candidates/", b".........//"[:11]))])
    with pytest.raises(RecordError, match="not the name of a blob"):
        decode(Group, values(log)[1])


def test_bytes_that_only_begin_like_a_reference_are_no_record(log: Log, rig: Rig) -> None:
    append(rig.bare, b"\xc1blob and nothing more")
    with pytest.raises(RecordError, match="not a Reference"):
        decode(Group, *values(log))


@pytest.mark.fault("blob lost or damaged, or its store away")
def test_a_store_that_is_not_there_costs_no_record(rig: Rig, log: Log) -> None:
    """A directory that is not mounted made every record a dead letter."""
    append(log, SMALL, LARGE)
    away = rig.blobs.rename(rig.blobs.with_name("away"))
    with log.subscribe("g", ["candidates"]) as consumer:
        with pytest.raises(LogError, match="Mount or restore"):
            drain(consumer, 2)
        away.rename(rig.blobs)
        assert [entry.value for entry in drain(consumer, 2)] == [SMALL, LARGE]


@pytest.mark.fault("blob lost or damaged, or its store away")
def test_a_store_that_does_not_take_a_blob_appends_nothing_and_tries_again_first(rig: Rig, log: Log) -> None:
    rig.blobs.mkdir()
    (rig.blobs / "candidates").write_bytes(b"a file where the folder should be")
    with pytest.raises(LogError, match="cannot write it"):
        append(log, SMALL, LARGE)
    assert values(log) == []
    assert len(rig.pauses_s) == 3


def test_one_read_holds_few_large_values_at_once(rig: Rig, log: Log) -> None:
    large = [bytes([i]) * (24 * 2**20) for i in range(4)]
    append(log, *large, SMALL)
    with log.subscribe("g", ["candidates"]) as consumer:
        read = consumer.read(max_records=1024, timeout_s=WAIT_S)
        assert [entry.value for entry in read] == large[:3]
        assert sum(consumer.positions().values()) == 3
        assert [entry.value for entry in drain(consumer, 2)] == [large[3], SMALL]


def test_a_blob_stays_while_a_record_names_it_and_goes_afterwards(rig: Rig, log: Log) -> None:
    append(log, LARGE, LARGE + b"2")
    assert rig.sweep("candidates", later_s=YEAR_S) == 0
    [(place, begin)] = [one for one in log.begin_offsets("candidates").items() if log.end_offsets("candidates")[one[0]]]
    log.trim({place: begin + 1})
    assert rig.sweep("candidates", later_s=0) == 1
    assert values(log) == [LARGE + b"2"]
    log.trim({place: begin + 2})
    assert rig.sweep("candidates", later_s=0) == 1
    assert list((rig.blobs / "candidates").iterdir()) == []


def test_a_clock_that_is_wrong_costs_no_blob(rig: Rig, log: Log) -> None:
    append(log, LARGE)
    for file in rig.blobs.glob("*/*"):
        os.utime(file, (0, 0))
    assert rig.sweep("candidates", later_s=YEAR_S) == 0


def test_a_blob_that_two_records_name_goes_with_the_second(rig: Rig, log: Log) -> None:
    log.append([Output("candidates", key, LARGE) for key in (b"0", b"1", b"2", b"3", b"4")])
    ends = log.end_offsets("candidates")
    last = max(ends, key=lambda place: ends[place])
    log.trim({place: end for place, end in ends.items() if place != last})
    assert rig.sweep("candidates", later_s=YEAR_S) == 0
    log.trim({last: ends[last]})
    assert rig.sweep("candidates", later_s=YEAR_S) == 1


def test_a_blob_whose_append_was_cut_off_goes_after_its_topics_retention(rig: Rig, log: Log) -> None:
    rig.store.write("candidates", LARGE)
    retention_s = topics.CANDIDATES.retention_s or 0
    assert rig.sweep("candidates", later_s=retention_s + SLACK_S - 60) == 0
    assert rig.sweep("candidates", later_s=retention_s + SLACK_S + 60) == 1


def test_a_blob_of_unknown_record_stays_as_long_as_a_record_is_as_old(rig: Rig, log: Log) -> None:
    """The writer was killed between its append and the note of the place."""
    append(log, LARGE)
    for note in rig.blobs.glob("*/*.at-*"):
        note.unlink()
    assert rig.sweep("candidates", later_s=YEAR_S) == 0
    log.trim(log.end_offsets("candidates"))
    assert rig.sweep("candidates", later_s=YEAR_S) == 1


def test_blobs_of_a_log_that_was_lost_go_after_their_topics_retention(rig: Rig, log: Log) -> None:
    append(log, *[LARGE + b"%d" % i for i in range(3)])
    (rig.blobs.parent / "new").mkdir()
    with rig.backend(rig.blobs.parent / "new", MAX_RECORD_BYTES) as new:
        sweeper = Sweeper(new, rig.store, clock=Clock(time.time() + YEAR_S))
        assert sweeper.sweep("candidates") == 3


def test_compacted_topics_keep_their_blobs(rig: Rig, log: Log) -> None:
    append(log, LARGE, topic="roles")
    log.trim(log.end_offsets("roles"))
    assert rig.sweep("roles", later_s=YEAR_S) == 0
    assert len(rig.files()) == 1


def test_topics_do_not_share_blobs(rig: Rig, log: Log) -> None:
    append(log, LARGE, topic="candidates")
    append(log, LARGE, topic="dead-letter")
    log.trim(log.end_offsets("candidates"))
    assert rig.sweep("candidates", later_s=YEAR_S) == 1
    assert values(log, "dead-letter") == [LARGE]


# -- the roles, with large groups ------------------------------------------------------------------------------------


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@contextmanager
def running(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """A role in a thread; what it raised is raised here."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not errors, errors


@contextmanager
def scoring(log: Log, metrics: Metrics) -> Iterator[None]:
    heartbeat = Heartbeat(log, metrics, role="scorer", interval_s=3600)
    source = WeightedSource(FunctionSource(length, name="length", version="1", timeout_s=WAIT_S), 1.0)
    pricing = [Pricing(CountingReference())]
    scorer = Scorer(
        log, metrics, heartbeat, sources=[source], pricing=pricing, config=ScoringConfig(max_groups=4), policy="policy"
    )
    with running(scorer.run):
        yield
    heartbeat.close()


@contextmanager
def selecting(log: Log, metrics: Metrics) -> Iterator[None]:
    heartbeat = Heartbeat(log, metrics, role="selector", interval_s=3600)
    with running(Selector(log, metrics, heartbeat, config=SelectionConfig(), policy="policy").run):
        yield
    heartbeat.close()


def until(log: Log, topic: str, num: int) -> None:
    """Wait for so many records of a topic."""
    with log.assign(log.begin_offsets(topic)) as consumer:
        drain(consumer, num)


def until_committed(log: Log, group: str, topic: str) -> None:
    """Wait until a group is done with everything in a topic."""
    give_up_s = time.monotonic() + WAIT_S
    while log.committed(group, [topic]) != log.end_offsets(topic):
        assert time.monotonic() < give_up_s


def large_group(number: int, *, num_candidates: int, num_tokens: int) -> Group:
    """A group of a model with a vocabulary of 128,000, four characters to the token."""
    rng = random.Random(number)
    request = make_prompt(number, num_candidates=num_candidates)
    candidates = [
        make_candidate(
            rng.randbytes(2 * (num_tokens - i)).hex(),
            tokens=rng.choices(range(128_000), k=num_tokens - i),
            logprob=-rng.random(),
        )
        for i in range(num_candidates)
    ]
    return make_group(request=request, candidates=candidates)


def test_groups_of_64_candidates_of_8192_tokens_reach_the_learner(rig: Rig) -> None:
    log, metrics = rig.open(max_record_bytes=2**20), Metrics("test")
    group = large_group(0, num_candidates=64, num_tokens=8192)
    assert len(encode(group)) > 8 * 2**20
    log.append([Output("candidates", group.group_id.encode(), encode(group))])
    with scoring(log, metrics):
        until(log, "scored", 1)
    with selecting(log, metrics):
        until(log, "pairs.policy", 1)
    reader = PairReader(log, metrics, policy="policy", judge=lambda pair: None)
    assert reader.fill(1)
    [pair] = reader.next_batch(1)
    reader.close()
    assert pair.rejected is not None
    assert pair.chosen.tokens == group.candidates[pair.chosen.candidate].tokens
    assert pair.rejected.tokens == group.candidates[pair.rejected.candidate].tokens
    assert {path.parent.name for path in rig.files()} == {"candidates", "scored"}
    assert values(log, "dead-letter") == []


def test_a_group_whose_blob_is_gone_ends_its_request_and_the_rest_is_scored(rig: Rig, log: Log) -> None:
    groups = [large_group(number, num_candidates=4, num_tokens=200) for number in range(3)]
    log.append([Output("candidates", group.group_id.encode(), encode(group)) for group in groups])
    [lost] = [path for path in rig.files() if decode(Group, path.read_bytes()).request.number == 1]
    lost.unlink()
    with scoring(log, Metrics("scorer")):
        until(log, "feedback", 1)
        until(log, "scored", 2)
    assert {scored.group.request.number for scored in records(log, ScoredGroup, "scored")} == {0, 2}
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.request_number, feedback.ending, feedback.reason) == (1, "dead_lettered", "record")
    assert feedback.group_id == groups[1].group_id


def test_a_scored_group_whose_blob_is_damaged_ends_its_request_and_the_rest_is_selected(rig: Rig, log: Log) -> None:
    scored = [
        make_scored([float(i) for i in range(4)], group=large_group(number, num_candidates=4, num_tokens=200))
        for number in range(2)
    ]
    log.append([Output("scored", one.group.group_id.encode(), encode(one)) for one in scored])
    [lost] = [path for path in rig.files() if decode(ScoredGroup, path.read_bytes()).group.request.number == 0]
    lost.write_bytes(b"torn")
    with selecting(log, Metrics("selector")):
        until(log, "feedback", 1)
        until(log, "pairs.policy", 1)
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.request_number, feedback.ending, feedback.reason) == (0, "dead_lettered", "record")


def test_a_restart_recalls_what_it_has_done_without_fetching_it(rig: Rig, log: Log) -> None:
    groups = [large_group(number, num_candidates=4, num_tokens=200) for number in range(4)]
    log.append([Output("candidates", group.group_id.encode(), encode(group)) for group in groups])
    for _ in range(2):  # the second time everything comes again: it was sampled anew
        with scoring(log, Metrics("scorer")):
            until_committed(log, "scorer", "candidates")
        with selecting(log, Metrics("selector")):
            until_committed(log, "selector.policy", "scored")
        log.append([Output("candidates", group.group_id.encode(), encode(group)) for group in groups])
    assert len(records(log, ScoredGroup, "scored")) == len(values(log, "pairs.policy")) == 4
    rig.counted.clear()
    with selecting(log, Metrics("selector")):
        until_committed(log, "selector.policy", "scored")
    assert "read" not in rig.counted


def test_a_dead_letter_of_a_lost_blob_comes_back_once_the_blob_is_restored(rig: Rig, log: Log) -> None:
    group = large_group(0, num_candidates=4, num_tokens=200)
    log.append([Output("candidates", group.group_id.encode(), encode(group))])
    [lost] = rig.files()
    away = lost.rename(rig.blobs / "away")
    with scoring(log, Metrics("scorer")):
        until(log, "dead-letter", 1)
        until_committed(log, "scorer", "candidates")
    [planned] = plan(log, ["policy"], Wanted())
    assert planned.left is not None and "the blob is missing" in planned.left
    assert carry_out(log, [planned._replace(left=None)]) == 0
    assert len(values(log, "feedback")) == len(values(log)) == 1
    content = away.read_bytes()
    lost.write_bytes(content[::-1])  # of the right size: only who reads it sees the damage
    assert carry_out(log, plan(log, ["policy"], Wanted())) == 0
    lost.write_bytes(content)
    rig.counted.clear()
    [planned] = plan(log, ["policy"], Wanted())
    assert carry_out(log, [planned]) == 1
    assert rig.counted.count("read") == 1  # and not to plan it, nor again to append it
    with scoring(log, Metrics("scorer")):
        until(log, "scored", 1)
    assert [scored.group for scored in records(log, ScoredGroup, "scored")] == [group]


def test_a_reference_whose_blob_is_gone_is_not_appended(rig: Rig, log: Log) -> None:
    append(log, LARGE)
    for file in rig.files():
        file.unlink()
    with pytest.raises(RecordError, match="missing"):
        append(log, SMALL, *values(rig.bare))
    assert len(values(log)) == 1


def test_a_pair_whose_blob_is_gone_is_a_dead_letter_of_the_learner(rig: Rig, log: Log) -> None:
    lost, good = make_pair(0, prompt_text="x" * 5000), make_pair(1)
    log.append([Output("pairs.policy", pair_key(pair), encode(pair)) for pair in (lost, good)])
    for path in rig.files():
        path.unlink()
    reader = PairReader(log, Metrics("learner"), policy="policy", judge=lambda pair: None)
    assert reader.fill(1)
    assert [pair.request_number for pair in reader.next_batch(1)] == [1]
    [drop] = reader.take_drops()
    reader.close()
    assert (drop.pair.request_number, drop.pair.content_hash) == (0, lost.content_hash)
    assert drop.letter is not None and "missing" in decode(DeadLetter, drop.letter.value).reason
