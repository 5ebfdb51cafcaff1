"""Pairs that nobody can read: each ends its request as a dead letter, and once."""

import msgspec
import pytest

from learner import endings
from learner.pairs import Drop, PairReader, ReaderState
from learner.unreadable import UNREADABLE
from streaming import topics
from streaming.history import entries
from streaming.keys import pair_key
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Pair, decode, encode
from tests.builders import make_feedback, make_pair, make_prompt

TOPIC = topics.pairs("policy").name
JUNK = b"\xffjunk"


@pytest.fixture
def issued(log: Log) -> Log:
    """A log in which requests 0 to 9 were issued."""
    requests = [make_prompt(number) for number in range(10)]
    log.append(Output("prompts", request.prompt_id.encode(), encode(request)) for request in requests)
    return log


def write(log: Log, pair: Pair, value: bytes | None = None) -> None:
    log.append([Output(TOPIC, pair_key(pair), encode(pair) if value is None else value)])


def tell(log: Log, ending: str, number: int = 3) -> None:
    one = make_feedback(number, ending=ending, stage="learner", reason=UNREADABLE)
    log.append([Output("feedback", one.group_id.encode(), encode(one))])


def reader(log: Log, state: ReaderState | None = None) -> PairReader:
    return PairReader(log, Metrics("learner"), policy="policy", judge=lambda pair: None, state=state)


def read(one: PairReader) -> tuple[list[int], list[Drop]]:
    """The requests that are trained on, and what is dropped."""
    one.fill(100)
    return [pair.request_number for pair in one.next_batch(100)], one.take_drops()


def letters(log: Log) -> list[DeadLetter]:
    return [decode(DeadLetter, entry.value) for entry in entries(log, "dead-letter")]


def test_bytes_that_are_no_pair_end_the_request_that_their_key_names(issued: Log) -> None:
    """There was a dead letter and no ending: the audit called the request lost, and the run never came to an end."""
    write(issued, make_pair(3), JUNK)
    trained, [drop] = read(reader(issued))
    assert (trained, drop.reason) == ([], "record")
    consumed = endings.consumed(drop.pair, epoch=1, step=2, time_s=0.0, reason=drop.reason)
    dead = endings.final(consumed)
    assert (dead.ending, dead.request_number, dead.group_id, dead.prompt_id, dead.pair_id) == (
        "dead_lettered", 3, make_pair(3).group_id, "p3", None
    )  # fmt: skip
    assert drop.letter is not None
    letter = decode(DeadLetter, drop.letter.value)
    assert (letter.stage, letter.value, letter.key) == ("learner", JUNK, pair_key(make_pair(3)))


def test_a_pair_of_a_newer_release_says_itself_whose_it_is(log: Log) -> None:
    pair = msgspec.structs.replace(make_pair(3, index=1, num_examples=2), schema=99)
    write(log, pair)
    _, [drop] = read(reader(log))
    found = drop.pair
    assert (found.request_number, found.index, found.num_examples, found.content_hash) == (3, 1, 2, "content-3")


@pytest.mark.parametrize("key", [b"key", b"0" * 16, b"0" * 16 + b"." + b"1" * 16])
def test_bytes_that_name_no_request_are_a_dead_letter_alone(issued: Log, key: bytes) -> None:
    issued.append([Output(TOPIC, key, JUNK)])
    assert read(reader(issued)) == ([], [])
    assert [letter.value for letter in letters(issued)] == [JUNK]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_copy_of_a_dead_pair_is_not_trained_on(issued: Log, is_restarted: bool) -> None:
    """A copy that can be read would end the request a second time."""
    write(issued, make_pair(3), JUNK)
    one = reader(issued)
    assert len(read(one)[1]) == 1
    tell(issued, "dead_lettered")
    one = reader(issued, one.state()) if is_restarted else one
    write(issued, make_pair(3))
    write(issued, make_pair(3), JUNK)
    write(issued, make_pair(4))
    assert read(one) == ([4], [])
    assert len(letters(issued)) == 1  # of the second copy, which ends nothing


def test_a_copy_of_a_trained_or_waiting_pair_that_nobody_can_read_ends_nothing(issued: Log) -> None:
    write(issued, make_pair(3))
    one = reader(issued)
    one.fill(100)
    write(issued, make_pair(3), JUNK)
    assert read(one) == ([3], [])
    write(issued, make_pair(3), JUNK)
    assert read(one) == ([], [])
    assert len(letters(issued)) == 2


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("is_readable", [False, True])
def test_a_dead_pair_that_is_sent_again_is_done_once_more(issued: Log, is_restarted: bool, is_readable: bool) -> None:
    write(issued, make_pair(3), JUNK)
    one = reader(issued)
    read(one)
    tell(issued, "dead_lettered")
    tell(issued, "redriven")
    one = reader(issued, one.state()) if is_restarted else one
    for _ in range(2):  # and the second copy is a copy
        write(issued, make_pair(3), None if is_readable else JUNK)
    trained, drops = read(one)
    assert (trained, len(drops)) == (([3], 0) if is_readable else ([], 1))
    write(issued, make_pair(3))
    assert read(one) == ([], [])


def test_an_ending_that_was_told_is_not_told_again_behind_its_redrive(issued: Log) -> None:
    """The next start repeats what its checkpoint ended: that would end the reopened request."""
    told = make_feedback(3, ending="dead_lettered", stage="learner", epoch=1, step=2, time_s=5.0)
    issued.append([Output("feedback", told.group_id.encode(), encode(told))])
    tell(issued, "redriven")
    one = reader(issued)
    repeated = endings.repeated(told, by=2)
    assert one.was_told(repeated)
    assert not one.was_told(msgspec.structs.replace(repeated, time_s=6.0))
    assert not one.was_told(Feedback(**{**msgspec.structs.asdict(repeated), "ending": "trained"}))
