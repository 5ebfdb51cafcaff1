from deploy.lookup import at, first_where, newest_first, since
from streaming.log.protocol import Entry, Log, Output
from streaming.records import Source


def fill(log: Log, num: int, topic: str = "prompts") -> list[tuple[int, int]]:
    return log.append(Output(topic, b"key-%d" % number, b"%d" % number) for number in range(num))


def number(entry: Entry) -> float | None:
    return float(entry.value) if entry.value.isdigit() else None


def test_an_entry_is_found_by_its_place(log: Log) -> None:
    partition, offset = fill(log, 20)[13]
    found = at(log, Source(topic="prompts", partition=partition, offset=offset))
    assert found is not None and found.value == b"13"


def test_a_place_past_retention_or_beyond_the_end_has_no_entry(log: Log) -> None:
    partition, offset = fill(log, 20)[0]
    log.trim({("prompts", partition): offset + 1})
    assert at(log, Source(topic="prompts", partition=partition, offset=offset)) is None
    assert at(log, Source(topic="prompts", partition=partition, offset=10_000)) is None
    assert at(log, Source(topic="prompts", partition=99, offset=0)) is None


def test_a_bisection_finds_the_first_entry_of_each_partition(log: Log) -> None:
    places = fill(log, 200)
    for least in (0, 1, 77, 199, 200):
        expected = dict(log.end_offsets("prompts"))
        for value, (partition, offset) in reversed(list(enumerate(places))):
            if value >= least:
                expected["prompts", partition] = offset
        assert first_where(log, "prompts", number, least) == expected


def test_a_bisection_reads_past_bytes_that_have_no_rank(log: Log) -> None:
    places = log.append(Output("prompts", b"k", value) for value in (b"0", b"junk", b"junk", b"3", b"junk"))
    place = ("prompts", places[0][0])
    assert first_where(log, "prompts", number, 2)[place] == places[1][1]
    assert first_where(log, "prompts", number, 4)[place] == places[4][1]


def test_a_search_by_time_begins_before_the_time_and_after_what_is_long_past(log: Log) -> None:
    fill(log, 10)
    newest = next(newest_first(log, "prompts")).time_s
    assert len(list(since(log, "prompts", newest))) == 10
    assert list(since(log, "prompts", newest + 3600)) == []


def test_the_newest_first_is_everything_once(log: Log) -> None:
    log.append(Output("prompts", b"one key", b"%d" % number) for number in range(5000))
    values = [int(entry.value) for entry in newest_first(log, "prompts")]
    assert sorted(values) == list(range(5000))
    assert values[0] > values[-1], "the newest chunk comes first"
