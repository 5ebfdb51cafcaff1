import random

import pytest

from learner.pairs import PairReader, is_end_of_data, is_last_batch
from streaming import topics
from streaming.log import open_log
from streaming.log.protocol import Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, decode, encode
from tests.builders import make_pair

TOPIC = topics.pairs("policy").name


@pytest.fixture
def log(tmp_path):
    with open_log(f"sqlite:///{tmp_path}/log.db", run="run", max_record_bytes=2**20, max_bytes=2**30) as log:
        yield log


def write(log, *pairs):
    log.append([Output(TOPIC, pair.pair_id.encode(), encode(pair)) for pair in pairs])


def reader(log, state=None, judge=lambda pair: None, metrics=None):
    return PairReader(log, metrics or Metrics("learner"), policy="policy", judge=judge, state=state)


def take(reader, size):
    """The request numbers of the next batch, or None where it is not full."""
    return [pair.request_number for pair in reader.next_batch(size)] if reader.fill(size) else None


def shuffled(count, seed=0):
    """Pairs of requests 0 to count, in the order of a stream: late by up to 8 places."""
    numbers = sorted(range(count), key=lambda number: number + random.Random(f"{seed} {number}").uniform(0, 8))
    return [make_pair(number) for number in numbers]


def test_partitions_are_merged_by_request(log):
    write(log, *(make_pair(number) for number in range(40)))
    one = reader(log)
    assert [take(one, 20), take(one, 20)] == [list(range(20)), list(range(20, 40))]


@pytest.mark.parametrize("sizes", [(1, 7), (3, 5), (10, 10)])
def test_the_order_does_not_depend_on_the_sizes_of_reads(log, sizes):
    write(log, *shuffled(200))
    plain, other = reader(log), reader(log)
    order = [number for _ in range(20) for number in take(plain, 10)]
    assert [number for i in range(40) for number in take(other, sizes[i % 2]) or []][:100] == order[:100]


@pytest.mark.parametrize("batches", range(0, 12, 3))
def test_a_reader_that_resumes_goes_on_with_the_very_next_batch(log, batches):
    write(log, *shuffled(120))
    whole = reader(log)
    expected = [take(whole, 10) for _ in range(12)]
    killed = reader(log)
    for _ in range(batches):
        take(killed, 10)
    state = killed.state()
    killed.fill(4)  # read beyond the checkpoint, and lost
    resumed = reader(log, state)
    assert [take(resumed, 10) for _ in range(12 - batches)] == expected[batches:]


def test_what_waits_for_a_batch_is_not_behind_the_checkpoint(log):
    write(log, *(make_pair(number) for number in range(3)))
    first = reader(log)
    assert not first.fill(5)
    assert first.pending_requests == 3
    write(log, make_pair(3), make_pair(4))
    assert take(reader(log, first.state()), 5) == [0, 1, 2, 3, 4]


def test_a_partial_batch_is_there_for_the_asking(log):
    write(log, make_pair(0), make_pair(1))
    one = reader(log)
    assert not one.fill(5)
    assert [pair.request_number for pair in one.next_batch(5)] == [0, 1]
    assert one.pending_requests == 0


def test_a_pair_written_again_at_a_later_offset_is_not_taken_twice(log):
    metrics = Metrics("learner")
    write(log, make_pair(0), make_pair(0), make_pair(1))
    one = reader(log, metrics=metrics)
    assert take(one, 2) == [0, 1]
    write(log, make_pair(1), make_pair(0), make_pair(2), make_pair(3))
    assert take(one, 2) == [2, 3]
    assert metrics.value("duplicates_total", topic=TOPIC) == 3


def test_a_pair_written_again_after_the_checkpoint_is_not_taken_by_the_next_start(log):
    write(log, make_pair(0), make_pair(1))
    first = reader(log)
    take(first, 2)
    write(log, make_pair(1), make_pair(2))
    assert take(reader(log, first.state()), 1) == [2]


def test_of_a_group_sampled_again_only_the_first_content_is_taken(log):
    metrics = Metrics("learner")
    again = [make_pair(0, index=i, num_examples=2, content_hash="again") for i in range(2)]
    one = reader(log, metrics=metrics)
    write(log, make_pair(0, index=0, num_examples=2))
    one.fill(1)
    write(log, *again)
    write(log, make_pair(0, index=1, num_examples=2), make_pair(1))
    assert one.fill(3)
    assert [pair.content_hash for pair in one.next_batch(3)] == ["content-0", "content-0", "content-1"]
    assert metrics.value("superseded_total", topic=TOPIC) == 2


def test_a_request_may_be_trained_in_two_batches_with_a_restart_between(log):
    write(log, make_pair(0, index=0, num_examples=2))
    first = reader(log)
    take(first, 1)
    write(log, make_pair(0, index=0, num_examples=2), make_pair(0, index=1, num_examples=2))
    resumed = reader(log, first.state())
    assert resumed.fill(1)
    assert [pair.index for pair in resumed.next_batch(1)] == [1]
    assert resumed.state().settled.intervals == [(0, 1)]


def test_a_pair_that_is_refused_is_dropped_once_with_its_reason(log):
    write(log, *(make_pair(number) for number in range(4)))

    def refuse_odd(pair):
        return "stale" if pair.request_number % 2 else None

    one = reader(log, judge=refuse_odd)
    assert take(one, 2) == [0, 2]
    assert not one.fill(1)
    assert [(drop.pair.request_number, drop.reason) for drop in one.take_drops()] == [(1, "stale"), (3, "stale")]
    assert one.take_drops() == []
    write(log, make_pair(1))
    resumed = reader(log, one.state())
    assert not resumed.fill(1)


def test_the_lag_is_what_waits_in_the_log(log):
    metrics = Metrics("learner")
    write(log, *(make_pair(number) for number in range(10)))
    take(reader(log, metrics=metrics), 4)
    assert metrics.value("lag_records", topic=TOPIC) == 6


@pytest.mark.fault("poison", backend="sqlite")
def test_bytes_that_are_no_pair_go_to_the_dead_letters_untouched(log):
    log.append([Output(TOPIC, b"key", b"\xffpoison")])
    write(log, make_pair(0))
    assert take(reader(log), 1) == [0]
    with log.assign(log.begin_offsets(topics.DEAD_LETTER.name)) as consumer:
        [entry] = consumer.read(max_records=10, timeout_s=1)
    letter = decode(DeadLetter, entry.value)
    assert (letter.stage, letter.key, letter.value, letter.source.topic) == ("learner", b"key", b"\xffpoison", TOPIC)


@pytest.mark.parametrize(
    ("numbers", "pending", "is_last"),
    [
        ({"exhausted": 1, "outstanding": 3}, 3, True),
        ({"exhausted": 1, "outstanding": 4}, 3, False),
        ({"exhausted": 0, "outstanding": 3}, 3, False),
        ({"exhausted": 1, "outstanding": 0}, 0, False),
        ({}, 3, False),
    ],
)
def test_the_last_batch_is_partial_only_when_nothing_else_is_on_its_way(numbers, pending, is_last):
    assert is_last_batch(numbers, pending) is is_last


@pytest.mark.parametrize(
    ("numbers", "is_over"),
    [
        ({"exhausted": 1, "outstanding": 0}, True),
        ({"exhausted": 1, "outstanding": 1}, False),
        ({"exhausted": 0, "outstanding": 0}, False),
        ({"exhausted": 1}, False),
        ({}, False),
    ],
)
def test_the_data_is_over_when_the_scheduler_has_issued_all_and_all_of_it_has_ended(numbers, is_over):
    assert is_end_of_data(numbers) is is_over
