"""`streamdpo tail`, below the command line."""

from threading import Event

from deploy.inspect_log import follow, newest_entries
from streaming import topics
from streaming.log.protocol import Log
from streaming.records import PromptRequest, decode
from tests.builders import make_prompt
from tests.recorded import append


def ask(log: Log, *numbers: int) -> None:
    for number in numbers:
        append(log, topics.PROMPTS.name, f"p{number}", make_prompt(number))


def test_what_is_appended_between_the_newest_entries_and_the_following_is_shown_once(log):
    """The following started where the topic ended by then, so that such an entry was never shown."""
    ask(log, 0, 1)
    ends = log.end_offsets(topics.PROMPTS.name)
    ask(log, 2)
    shown = newest_entries(log, ends, 1)
    following = follow(log, ends, Event())
    numbers = [decode(PromptRequest, entry.value).number for entry in [*shown, next(following)]]
    following.close()
    assert numbers == [1, 2]


def test_none_of_the_newest_entries_are_shown_where_none_are_asked_for(log):
    ask(log, 0)
    assert newest_entries(log, log.end_offsets(topics.PROMPTS.name), 0) == []
