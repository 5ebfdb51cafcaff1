"""What a member of a group recognises copies by: what lies before the place where it takes a partition up."""

import pytest

from streaming.copies import MAX_SEEN, RECALLED_PER_PARTITION, Copies
from streaming.dead_letters import DeadLetters
from streaming.errors import RecordError
from streaming.log.protocol import Consumer, Entry, Log, Output, Partition
from streaming.records import encode
from streaming.stage import dead_letter
from tests.builders import make_entry, make_feedback, make_prompt
from tests.fakes import CrashingLog

PLACE = ("in", 0)


def value_of(entry: Entry) -> str:
    if entry.value == b"":
        raise RecordError("it is empty", where=entry.where, do="Write something.")
    return entry.value.decode()


def fill(log: Log, *values: bytes) -> None:
    log.append([Output("in", b"key", value) for value in values])


def take_up(copies: Copies, consumer: Consumer, *, offset: int) -> bool:
    """Read one entry there, as a member does that has just got the partition."""
    consumer.seek({PLACE: offset})
    entries = consumer.read(max_records=1, timeout_s=0)
    taken_up = copies.catch_up(entries, consumer)
    copies.passed(entries[0])
    return taken_up


def known(copies: Copies, *values: str) -> list[str]:
    return [value for value in values if copies.is_copy(value, make_entry(offset=10**6))]


def test_what_lies_before_is_known_but_for_dead_letters_and_what_is_no_record(log: Log) -> None:
    fill(log, b"a", b"b", b"", b"c", b"d")
    with log.assign({PLACE: 0}) as reader:
        log.append([dead_letter(reader.read(max_records=2, timeout_s=0)[1], "it was full moon", "test")])
    copies = Copies(log, value_of, DeadLetters(log, stage="test"))
    with log.assign({PLACE: 0}) as consumer:
        assert take_up(copies, consumer, offset=4)
    assert known(copies, "a", "b", "c", "d") == ["a", "c"]


def test_what_goes_on_where_it_stood_needs_nothing_and_what_does_not_is_caught_up_with(log: Log) -> None:
    fill(log, *(b"%d" % i for i in range(9)))
    copies = Copies(log, value_of, DeadLetters(log, stage="test"))
    with log.assign({PLACE: 0}) as consumer:
        assert take_up(copies, consumer, offset=0), "what died before may not be committed"
        assert not take_up(copies, consumer, offset=1)
        assert known(copies, "0", "1") == [], "what this member has answered, it adds itself"
        assert take_up(copies, consumer, offset=5)
        assert known(copies, *map(str, range(9))) == ["0", "1", "2", "3", "4"]
        assert not take_up(copies, consumer, offset=6)
        assert take_up(copies, consumer, offset=3)


def test_a_partition_without_an_entry_yet_is_caught_up_with_beside_the_others(log: Log) -> None:
    log.append([Output("prompts", b"%d" % i, b"%d" % i) for i in range(40)])
    ends = log.end_offsets("prompts")
    copies = Copies(log, value_of, DeadLetters(log, stage="test"))
    with log.assign({place: end - 1 for place, end in ends.items()}) as consumer:
        assert copies.catch_up(consumer.read(max_records=1, timeout_s=0), consumer)
    assert len(known(copies, *map(str, range(40)))) == 40 - len(ends)


def test_only_so_many_are_recalled_and_remembered(log: Log) -> None:
    fill(log, *(b"%d" % i for i in range(RECALLED_PER_PARTITION + 2)))
    copies = Copies(log, value_of, DeadLetters(log, stage="test"))
    with log.assign({PLACE: 0}) as consumer:
        take_up(copies, consumer, offset=RECALLED_PER_PARTITION + 1)
        assert known(copies, "0", "1", str(RECALLED_PER_PARTITION)) == ["1", str(RECALLED_PER_PARTITION)]
        copies.add(f"other {i}" for i in range(MAX_SEEN - 1))
        assert known(copies, "1", str(RECALLED_PER_PARTITION)) == [str(RECALLED_PER_PARTITION)]
        copies.add([str(RECALLED_PER_PARTITION), "one more"])
    assert known(copies, "other 0", str(RECALLED_PER_PARTITION)) == [str(RECALLED_PER_PARTITION)]


class TrimmedMeanwhileLog(CrashingLog):
    """A real log that forgets its oldest entries just after somebody has asked where it begins."""

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        begins = self.log.begin_offsets(topic)
        if topic == "in":
            self.log.trim({PLACE: 3})
        return begins


def test_retention_that_overtakes_the_reading_leaves_less_to_know(log: Log) -> None:
    fill(log, b"a", b"b", b"c", b"d", b"e")
    copies = Copies(TrimmedMeanwhileLog(log), value_of, DeadLetters(log, stage="test"))
    with log.assign({PLACE: 0}) as consumer:
        take_up(copies, consumer, offset=4)
    assert known(copies, "a", "b", "c", "d", "e") == ["d"]


@pytest.mark.parametrize("offset", [0, 1, 2], ids=["the same entry again", "a copy behind it", "a later copy"])
@pytest.mark.parametrize("value", [b"first", b""], ids=["readable", "unreadable"])
def test_what_died_is_known_however_much_was_told_since(log: Log, value: bytes, offset: int) -> None:
    group_id = make_prompt(0).group_id
    log.append([Output("in", group_id.encode(), some) for some in (value, b"copy", b"later")])
    with log.assign({PLACE: 0}) as reader:
        log.append([dead_letter(reader.read(max_records=1, timeout_s=0)[0], "it was full moon", "test")])
    told = [make_feedback(0, ending="dead_lettered", stage="test")]
    told += [make_feedback(7, stage="learner")] * RECALLED_PER_PARTITION
    log.append(Output("feedback", group_id.encode(), encode(one)) for one in told)
    copies = Copies(log, lambda entry: group_id if value_of(entry) else "", DeadLetters(log, stage="test"))
    with log.assign({PLACE: offset}) as consumer:
        [entry] = consumer.read(max_records=1, timeout_s=0)
        copies.catch_up([entry], consumer)
        assert copies.is_copy(group_id, entry)
        log.append([Output("feedback", group_id.encode(), encode(make_feedback(0, ending="redriven", stage="test")))])
        assert not copies.is_copy(group_id, entry)
