import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.reading import PromptReader, WeightsReader
from streaming import topics
from streaming.errors import LeaseLostError
from streaming.fencing import CLAIM, fence_at_the_end
from streaming.log.protocol import Entry, Log, Offsets, Output
from streaming.records import PromptRequest, Version, decode, encode
from tests.builders import make_prompt, make_role, make_weights
from tests.fakes import CrashingConsumer, CrashingLog
from tests.scripted_engine import announce, append

NUM_PROMPTS = 40
AWAY_S = 0.1


@pytest.fixture
def asked(log: Log) -> Log:
    """A log with prompts in every partition."""
    for i in range(NUM_PROMPTS):
        request = make_prompt(i)
        append(log, topics.PROMPTS, request.prompt_id, request)
    return log


def committed(log: Log) -> int:
    return sum(log.committed("generators", ["prompts"]).values())


async def test_only_what_is_settled_is_committed_and_a_restart_reads_the_rest(asked: Log) -> None:
    reader = PromptReader(asked)
    entries = await reader.read(max_records=1000)
    oldest = {entry.partition: entry for entry in reversed(entries)}
    for entry in entries:
        if entry is not oldest[entry.partition]:
            reader.settle(entry)
    await reader.close()
    assert committed(asked) == 0
    again = PromptReader(asked)
    entries = await again.read(max_records=1000)
    assert len(entries) == NUM_PROMPTS
    for entry in entries:
        again.settle(entry)
    await again.read(max_records=1)
    assert committed(asked) == NUM_PROMPTS
    await again.close()


async def test_the_lag_is_what_is_not_settled_of_its_own_share(asked: Log) -> None:
    first = PromptReader(asked)
    entries = await first.read(max_records=15)
    assert await first.lag() == NUM_PROMPTS
    first.settle(entries[0])
    assert await first.lag() == NUM_PROMPTS - 1
    second = PromptReader(asked)
    await first.read(max_records=1)
    await second.read(max_records=1)
    assert 0 < await second.lag() < NUM_PROMPTS
    both = await first.lag() + await second.lag()
    assert both in (NUM_PROMPTS - 1, NUM_PROMPTS), "the settled one may be the other's by now, and not committed"
    await first.close()
    await second.close()


async def test_prompts_that_go_to_another_generator_are_not_ours_any_more(asked: Log) -> None:
    first = PromptReader(asked)
    entries = await first.read(max_records=1000)
    second = PromptReader(asked)
    await first.read(max_records=1)
    kept = [entry for entry in entries if first.is_open(entry)]
    taken = await second.read(max_records=1000)
    assert {e.where for e in kept} | {e.where for e in taken} == {e.where for e in entries}
    assert not {e.where for e in kept} & {e.where for e in taken}
    assert kept and taken
    for entry in kept:
        first.settle(entry)
    await first.close()
    assert committed(asked) == len(kept)
    await second.close()


async def test_a_partition_won_back_is_read_again_from_where_the_group_was(asked: Log) -> None:
    first = PromptReader(asked)
    entries = await first.read(max_records=1000)
    second = PromptReader(asked)
    await first.read(max_records=1)
    lost = {entry.where for entry in entries if not first.is_open(entry)}
    await second.close()
    again: list[Entry] = []
    while len(again) < len(lost):
        again += await first.read(max_records=1000)
    assert {entry.where for entry in again} == lost
    assert all(first.is_open(entry) for entry in entries)
    await first.close()


class LosingConsumer(CrashingConsumer):
    """A real consumer whose first commit finds the lease lost."""

    has_lost = False

    def commit(self, offsets: Offsets) -> None:
        if not self.has_lost:
            self.has_lost = True
            raise LeaseLostError("taken over", where="test", do="Join anew.")
        super().commit(offsets)


class LosingLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> LosingConsumer:
        return LosingConsumer(self, self.log.subscribe(group, topics))


async def test_a_refused_commit_is_made_again_for_what_is_still_held(asked: Log) -> None:
    reader = PromptReader(LosingLog(asked))
    for entry in await reader.read(max_records=1000):
        reader.settle(entry)
    await reader.read(max_records=1)
    assert committed(asked) == 0
    await reader.read(max_records=1)
    assert committed(asked) == NUM_PROMPTS
    await reader.close()


class LostConsumer(CrashingConsumer):
    """A real consumer whose partitions are all another's."""

    def commit(self, offsets: Offsets) -> None:
        raise LeaseLostError("taken over", where="test", do="Join anew.")


class LostLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> LostConsumer:
        return LostConsumer(self, self.log.subscribe(group, topics))


async def test_a_reader_that_was_away_gives_up_what_another_one_holds_before_anything_is_written(asked: Log) -> None:
    """Its own next read, which would tell, is still to come."""
    reader = PromptReader(LostLog(asked), away_s=0.0)
    entries = await reader.read(max_records=1000)
    await reader.confirm()
    assert not any(reader.is_open(entry) for entry in entries)
    await reader.close()


class FrozenConsumer(LostConsumer):
    """One that stands still with the entries in its hands, for longer than `AWAY_S`."""

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        entries = super().read(max_records=max_records, timeout_s=timeout_s)
        threading.Event().wait(1.5 * AWAY_S)  # the length of this is the fault itself
        return entries


class FrozenLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> FrozenConsumer:
        return FrozenConsumer(self, self.log.subscribe(group, topics))


async def test_a_reader_that_stood_still_inside_a_read_was_away(asked: Log) -> None:
    """The time was taken behind the read, so it took what it had read for its own, and wrote it late."""
    reader = PromptReader(FrozenLog(asked), away_s=AWAY_S)
    entries = await reader.read(max_records=1000)
    await reader.confirm()
    assert entries and not any(reader.is_open(entry) for entry in entries)
    await reader.close()


async def test_a_reader_that_is_alone_keeps_everything_however_long_it_was_away(asked: Log) -> None:
    reader = PromptReader(asked, away_s=0.0)
    entries = await reader.read(max_records=1000)
    await reader.confirm()
    assert all(reader.is_open(entry) for entry in entries)
    await reader.close()


class RewindingConsumer(CrashingConsumer):
    """A real consumer that loses its partitions and wins them back inside one read."""

    num_reads = 0

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        self.num_reads += 1
        if self.num_reads == 2:
            self.seek(dict.fromkeys(self.positions(), 0))
        return super().read(max_records=max_records, timeout_s=timeout_s)


class RewindingLog(CrashingLog):
    def subscribe(self, group: str, topics: Sequence[str]) -> RewindingConsumer:
        return RewindingConsumer(self, self.log.subscribe(group, topics))


async def test_prompts_lost_and_won_back_unnoticed_are_open_once(asked: Log) -> None:
    reader = PromptReader(RewindingLog(asked))
    before = await reader.read(max_records=1000)
    again = await reader.read(max_records=1000)
    assert {entry.where for entry in again} == {entry.where for entry in before}
    for entry in again:
        reader.settle(entry)
    assert not any(reader.is_open(entry) for entry in before)
    await reader.close()
    assert committed(asked) == NUM_PROMPTS


def claimed(log: Log) -> int:
    """A start of the scheduler has claimed the right to issue requests, and has said nothing more."""
    [(_, offset)] = log.append([Output(topics.ROLES.name, CLAIM, encode(make_role("scheduler")))])
    return offset


def announced(log: Log, claim: int) -> None:
    """It has taken over here."""
    fence = fence_at_the_end(log, topics.PROMPTS.name, claim)
    append(log, topics.ROLES, "scheduler-0/1", make_role("scheduler", fences=[fence]))


def ask(log: Log, claim: int, *numbers: int) -> None:
    for number in numbers:
        append(log, topics.PROMPTS, f"p{number}", make_prompt(number, claim=claim))


def asked_in(entries: list[Entry]) -> list[int]:
    return sorted(decode(PromptRequest, entry.value).number for entry in entries)


async def test_what_a_scheduler_wrote_after_its_heir_took_over_is_settled_unseen(log: Log) -> None:
    older, newer = claimed(log), claimed(log)
    ask(log, older, 0, 1)
    announced(log, newer)
    ask(log, older, 2, 3)
    ask(log, newer, 4)
    reader = PromptReader(log)
    entries = await reader.read(max_records=9)
    assert (asked_in(entries), reader.num_refused) == ([0, 1, 4], 2)
    for entry in entries:
        reader.settle(entry)
    await reader.close()
    assert committed(log) == 5


async def test_while_an_heir_has_not_said_where_it_takes_over_the_older_requests_wait(log: Log) -> None:
    older = claimed(log)
    ask(log, older, 0, 1)
    newer = claimed(log)
    reader = PromptReader(log)
    assert await reader.read(max_records=9) == []
    announced(log, newer)
    ask(log, older, 2)
    entries = [*await reader.read(max_records=9), *await reader.read(max_records=9)]
    assert asked_in(entries) == [0, 1]
    await reader.close()
    assert committed(log) < 3, "what was not answered is read again"


async def test_requests_that_wait_go_with_their_partition(log: Log) -> None:
    older = claimed(log)
    ask(log, older, *range(NUM_PROMPTS))
    newer = claimed(log)
    first = PromptReader(log)
    assert await first.read(max_records=1000) == []
    second = PromptReader(log)
    assert await first.read(max_records=1) == []
    announced(log, newer)
    kept = await first.read(max_records=1000)
    taken: list[Entry] = []
    while len(taken) + len(kept) < NUM_PROMPTS:
        taken += await second.read(max_records=1000)
    assert kept and taken
    assert asked_in([*kept, *taken]) == list(range(NUM_PROMPTS))
    assert all(first.is_open(entry) for entry in kept)
    await first.close()
    await second.close()


async def test_weights_come_newest_first_and_each_only_once(log: Log, tmp_path: Path) -> None:
    announce(log, make_weights(Version(1, 0)))
    announce(log, make_weights(Version(1, 1)))
    announce(log, make_weights(Version(5, 5), policy="other"))
    reader = WeightsReader(log, "policy")
    assert (await reader.next()).version == Version(1, 1)
    announce(log, make_weights(Version(1, 9)))
    announce(log, make_weights(Version(2, 0)))
    announce(log, make_weights(Version(7, 7), kind="delta"))
    assert (await reader.next()).version == Version(2, 0)
    announce(log, make_weights(Version(2, 1)))
    assert (await reader.next()).version == Version(2, 1)
    await reader.close()
