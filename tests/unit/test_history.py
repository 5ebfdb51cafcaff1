from streaming.history import before, between, entries, records
from streaming.log.protocol import Log, Output
from streaming.records import Feedback, encode
from tests.builders import make_feedback


def append(log: Log, *values: bytes) -> None:
    log.append(Output("feedback", b"key", value) for value in values)


def test_everything_that_a_topic_holds_is_read_in_order(log: Log) -> None:
    append(log, *(b"%d" % number for number in range(3000)))
    assert [entry.value for entry in entries(log, "feedback")] == [b"%d" % number for number in range(3000)]


def test_what_is_no_record_is_passed_over(log: Log) -> None:
    append(log, encode(make_feedback(1)), b"junk", encode(make_feedback(2)))
    found = [(entry.offset, one.request_number) for entry, one in records(log, "feedback", Feedback)]
    assert found == [(0, 1), (2, 2)]


def test_an_empty_topic_has_no_entries(log: Log) -> None:
    assert list(entries(log, "feedback")) == []


def test_what_is_appended_meanwhile_is_not_read(log: Log) -> None:
    append(log, b"a", b"b")
    read = []
    for entry in entries(log, "feedback"):
        append(log, b"later")
        read.append(entry.value)
    assert read == [b"a", b"b"]


def test_reading_stops_before_the_end_that_was_asked_for(log: Log) -> None:
    append(log, b"a", b"b", b"c")
    place = next(place for place, end in log.end_offsets("feedback").items() if end == 3)
    assert [entry.value for entry in between(log, {place: 1}, {place: 2})] == [b"b"]
    assert list(between(log, {place: 2}, {place: 2})) == []


def test_the_newest_entries_before_an_offset_are_as_many_as_asked_for_and_still_there(log: Log) -> None:
    append(log, *(b"%d" % number for number in range(9)))
    place = next(place for place, end in log.end_offsets("feedback").items() if end == 9)
    log.trim({place: 3})
    for end, count, found in [(9, 2, [7, 8]), (5, 9, [3, 4]), (3, 1, []), (9, 0, [])]:
        assert [entry.offset for entry in before(log, {place: end}, count)] == found
