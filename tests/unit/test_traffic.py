"""What is said of a log by comparing what a writer was told with what a reader read and with what lies there."""

import pytest

from streaming.log.protocol import Entry
from tests.traffic import Item, Verdict, judge


def entry(number: int, offset: int, key: bytes = b"k") -> Entry:
    return Entry("prompts", 0, offset, key, b"%d" % number, 0.0)


@pytest.mark.parametrize(
    ("acknowledged", "consumed", "stored", "expected"),
    [
        ([(b"k", 0), (b"k", 1)], [entry(0, 0), entry(1, 1)], [entry(0, 0), entry(1, 1)], {}),
        ([(b"k", 0), (b"k", 1)], [entry(0, 0)], [entry(0, 0), entry(1, 1)], {"lost": [(b"k", 1)]}),
        ([(b"k", 0)], [entry(0, 0)], [], {"missing": [(b"k", 0)]}),
        ([], [], [entry(1, 0), entry(0, 1)], {"disordered": [(b"k", 0)]}),
        ([], [], [entry(0, 0), entry(1, 1), entry(0, 2)], {"num_twice": 1}),
        ([], [], [entry(1, 0), entry(0, 1, b"other")], {}),
    ],
)
def test_the_judge_sees_what_is_lost_missing_disordered_and_twice(
    acknowledged: list[Item], consumed: list[Entry], stored: list[Entry], expected: dict[str, object]
) -> None:
    good = Verdict(len(acknowledged), [], [], [], 0, [])
    assert judge(acknowledged, consumed, stored) == good._replace(**expected)
