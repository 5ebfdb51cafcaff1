"""Stage: Group -> ScoredGroup, or the measurement of an evaluation request. Works on the frontier, out of order.

    read -> asked (every source and the reference at once) -> appended (durable) -> settled -> committed

A slow source holds up its own groups only, each until the source's deadline. After a crash before the commit the same
groups are read again: those without an answer in the log are scored again, and readers keep the first. Of two samplings
of one request (a generator crashed between writing and committing) the first in the log wins here already.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from streaming import topics
from streaming.asking import Answered, Panel
from streaming.config import ScoringConfig
from streaming.copies import Copies
from streaming.dead_letters import DeadLetters, request_under
from streaming.endings import end
from streaming.errors import LeaseLostError, RecordError, TooLargeError
from streaming.fencing import AWAY_S
from streaming.frontier import Frontier
from streaming.heartbeat import Heartbeat
from streaming.log.outlines import GroupOutline
from streaming.log.protocol import Consumer, Entry, Log, Output, Partition
from streaming.metrics import Metrics
from streaming.packed import decode_group
from streaming.records import Feedback, Record, Source, SourceRewards, decode, encode
from streaming.rewards import WeightedSource
from streaming.scoring import MISSING_EOS, STAGE, Pricing, evaluated, penalty, scored
from streaming.selection.margins import mean, measured
from streaming.stage import Reason, append, dead_letter

GROUP = "scorer"

_POLL_S = 0.01
"""How long the scorer waits for an answer before it looks for new groups."""

_IDLE_S = 0.2
"""How long it waits for new groups when it has none: long enough to cost nothing, short enough to stop at once."""

_LOOK_S = 0.05
"""Between two looks for new groups while there are none and others are under way: on Kafka each asks the brokers."""

_LOGGER = logging.getLogger(__name__)

_TELL_S = 1.0
"""Between two looks at the lag, which cost a few seeks; a heartbeat goes out no more often."""

_NEWEST = 64
"""Training groups whose mean reward `status` shows: a step or two of the learner."""


class Finished(NamedTuple):
    """An entry that the scorer is done with: what is appended for it, and the ending among that."""

    entry: Entry
    outputs: list[Output]
    feedback: Feedback | None = None


def _group_id(entry: Entry) -> str:
    return decode(GroupOutline, entry.value, where=entry.where).request.group_id


class _Shift:
    """One membership in the consumer group. A lost lease ends it, and with it all that was not committed.

    A partition that goes to another scorer in order takes with it what is under way there.
    """

    def __init__(self, log: Log, consumer: Consumer, dead: DeadLetters, *, away_s: float) -> None:
        self._log = log
        self._away_s = away_s
        self.consumer = consumer
        self.copies = Copies(log, _group_id, dead, outputs=[topics.SCORED.name])
        self.open: dict[tuple[int, int], str] = {}  # partition and offset of what is under way -> its group
        self._frontier = Frontier()
        self._next: dict[Partition, int] = {}
        self._committed_s = time.monotonic()
        self._look_s = 0.0

    def confirm(self) -> None:
        """Raises LeaseLostError where this process may have stood still, and others do its work by now."""
        if time.monotonic() - self._committed_s >= self._away_s:
            self._commit()

    def read(self, *, max_records: int) -> list[Entry]:
        """New entries, waited for only where nothing is under way.

        What comes again, because a partition was lost and got back, is under way or settled.
        """
        if self.open and time.monotonic() < self._look_s:
            return []
        entries = self.consumer.read(max_records=max_records, timeout_s=0.0 if self.open else _IDLE_S)
        if not entries:
            self._look_s = time.monotonic() + _LOOK_S
        self._hand_over()
        if self.copies.catch_up(entries, self.consumer) and self.open:
            self._give_up_settled()
        new = []
        for entry in entries:
            self.copies.passed(entry)
            place = (entry.topic, entry.partition)
            if entry.offset >= self._next.get(place, 0):
                self._next[place] = entry.offset + 1
                self._frontier.read(place, entry.offset)
                new.append(entry)
        return new

    def answers(self, entry: Entry) -> bool:
        """Whether this is the first answer to what is under way: an entry that is read again is asked about twice."""
        return self.open.pop(_place(entry), None) is not None

    def settle(self, entries: Sequence[Entry]) -> None:
        """Everything made from these is durable: go on behind them after a restart, as far as none is open before."""
        for entry in entries:
            self._frontier.settle((entry.topic, entry.partition), entry.offset)
        self._commit()

    def _commit(self) -> None:
        asked_s = time.monotonic()  # before: this process may stand still with the answer in its hands
        self.consumer.commit(self._frontier.offsets())
        self._committed_s = asked_s

    def lag(self) -> int:
        """Entries of what is held that are not settled: those that are not read, and those from the frontier on."""
        frontier = self._frontier.offsets()
        read = sum(position - frontier.get(place, position) for place, position in self.consumer.positions().items())
        return read + sum(self.consumer.behind().values())

    def _hand_over(self) -> None:
        """What is under way in a partition that has gone is its new holder's, who begins where the group committed."""
        for topic, number in self._next.keys() - self.consumer.positions().keys():
            del self._next[topic, number]
            self.copies.hand_over((topic, number))
            self._frontier.forget((topic, number))
            for place in [place for place in self.open if place[0] == number]:
                self.copies.discard(self.open.pop(place))

    def _give_up_settled(self) -> None:
        """What is under way, and was another member's in between who has settled it: behind it the group goes on."""
        topic = topics.CANDIDATES.name
        ends = self._log.committed(GROUP, [topic])
        for number, offset in [place for place in self.open if place[1] < ends[topic, place[0]]]:
            del self.open[number, offset]
            self._frontier.settle((topic, number), offset)


class Scorer:
    """The role. Owns its sources: they are closed when `run` returns.

    The first of `pricing` is the reference of the policy that samples; others are of policies that learn beside it.
    """

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat,
        *,
        sources: Sequence[WeightedSource],
        pricing: Sequence[Pricing],
        config: ScoringConfig,
        policy: str,
        away_s: float = AWAY_S,
    ) -> None:
        """`policy` is the one that samples.

        After `away_s` without a commit (the process may have stood still) work is written where it is still ours.
        """
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._sources = sources
        self._pricing = pricing
        self._config = config
        self._policy = policy
        self._dead = DeadLetters(log, stage=STAGE)
        self._away_s = away_s
        self._num_groups = 0
        self._newest: deque[float] = deque(maxlen=_NEWEST)
        self._logged: set[tuple[str, str]] = set()  # (source, reason)
        self._told_s = 0.0

    def run(self, stop: threading.Event) -> None:
        """Score until `stop`, and return soon after: what is under way then is scored again after a restart.

        Raises what makes scoring impossible: a broken log, a broken reference model.
        """
        references = [pricing.reference for pricing in self._pricing]
        with Panel(self._sources, references, max_groups=self._config.max_groups) as panel:
            self._heartbeat.tell(health="ready")
            while not stop.is_set():
                try:
                    self._serve(panel, stop)
                except LeaseLostError:
                    # Another scorer holds the partition now and scores what was not committed.
                    self._metrics.count("retries_total", stage=STAGE)

    def _serve(self, panel: Panel, stop: threading.Event) -> None:
        with self._log.subscribe(GROUP, [topics.CANDIDATES.name]) as consumer:
            shift = _Shift(self._log, consumer, self._dead, away_s=self._away_s)
            while not stop.is_set():
                finished = self._read(shift, panel)
                answered = panel.take(_POLL_S) if shift.open else []
                finished += [self._finish(one) for one in answered if shift.answers(one.entry)]
                if finished:
                    self._write(shift, finished)
                self._metrics.time.enter("busy" if shift.open else "waiting")
                self._tell(shift)

    def _read(self, shift: _Shift, panel: Panel) -> list[Finished]:
        """Begin with new groups as far as there is room; returns those that need no asking."""
        room = self._config.max_groups - len(shift.open)
        if room <= 0:
            return []
        finished = []
        for entry in shift.read(max_records=room):
            self._metrics.count("records_read_total", topic=entry.topic)
            try:
                group = decode_group(entry.value, where=entry.where)
            except RecordError as error:
                finished.append(self._reject(entry, "record", error, copies=shift.copies))
                continue
            if shift.copies.is_copy(group.group_id, entry):
                self._metrics.count("duplicates_total", topic=entry.topic)
                finished.append(Finished(entry, []))
                continue
            shift.copies.add([group.group_id])
            if shift.copies.died(entry):  # the letter decides, so that all who find it tell the same end
                finished.append(_died(entry, GroupOutline(request=group.request, policy=group.policy), "failed", []))
                continue
            shift.open[_place(entry)] = group.group_id
            panel.submit(entry, group)
        return finished

    def _finish(self, answered: Answered) -> Finished:
        entry, group, answers = answered
        if isinstance(answers, RecordError):
            return self._reject(entry, "failed", answers)
        rewards = [*answers.rewards, *penalty(group, answers.rewards, self._config.missing_eos_penalty)]
        self._count_rewards(rewards)
        if group.request.purpose == "eval":
            feedback = evaluated(group, rewards, time_s=time.time())
            return Finished(entry, [_output(topics.FEEDBACK, entry, feedback)], feedback)
        if (reward := measured(rewards, len(group.candidates))) is not None:
            self._newest.append(reward)
        source = Source(topic=entry.topic, partition=entry.partition, offset=entry.offset)
        record = scored(group, answers._replace(rewards=rewards), pricing=self._pricing, source=source)
        num_tokens = sum(candidate.num_tokens for candidate in group.candidates)
        self._metrics.count("reference_tokens_total", num_tokens * (1 + len(record.further)))
        return Finished(entry, [_output(topics.SCORED, entry, record)])

    def _reject(self, entry: Entry, reason: Reason, error: Exception, *, copies: Copies | None = None) -> Finished:
        """A dead letter, and the end of its request where it is known; unless it is a copy that nobody can read."""
        self._metrics.count("dead_letters_total", stage=STAGE)
        letter = dead_letter(entry, f"{type(error).__name__}: {error}", STAGE)
        broken = self._broken(entry)
        if broken is None or (copies is not None and copies.is_copy(broken.request.group_id, entry)):
            return Finished(entry, [letter])
        if copies is not None:
            copies.add([broken.request.group_id])  # until the end is told
        return _died(entry, broken, reason, [letter])

    def _broken(self, entry: Entry) -> GroupOutline | None:
        """Whose group these bytes are, as far as they, or their key, still say it."""
        try:
            return decode(GroupOutline, entry.value)
        except RecordError:
            request = request_under(self._log, entry.key)
        return None if request is None else GroupOutline(request=request, policy=self._policy)

    def _write(self, shift: _Shift, finished: list[Finished]) -> None:
        """Append everything, then commit what is settled. A crash in between scores again what has no answer yet.

        Where the partitions are another's by the time that the letters are there, that one tells how the groups ended.
        """
        shift.confirm()
        try:
            self._append(finished, shift)
        except TooLargeError:
            finished = [self._append_alone(one, shift) for one in finished]
        shift.settle([one.entry for one in finished])
        for one in finished:
            if one.feedback is not None and one.feedback.ending == "dead_lettered":
                shift.copies.bury(one.feedback.group_id)
        self._num_groups += len(finished)

    def _append_alone(self, finished: Finished, shift: _Shift) -> Finished:
        """What was written for it: a dead letter where it is too large."""
        try:
            self._append([finished], shift)
        except TooLargeError as error:
            finished = self._reject(finished.entry, "too_large", error)
            self._append([finished], shift)
        return finished

    def _append(self, finished: Sequence[Finished], shift: _Shift) -> None:
        append(self._log, [output for one in finished for output in one.outputs], between=shift.confirm)
        for one in finished:
            for output in one.outputs:
                self._metrics.count("records_written_total", topic=output.topic)
            if one.feedback is not None:
                self._metrics.count("endings_total", ending=one.feedback.ending, reason=one.feedback.reason)

    def _count_rewards(self, rewards: Sequence[SourceRewards]) -> None:
        for source in rewards:
            if source.source == MISSING_EOS:
                continue
            for reason in filter(None, source.reasons):
                self._metrics.count("rewards_missing_total", source=source.source, reason=reason)
                self._log_once(source.source, reason)
            values = [value for value in source.values if value is not None]
            if values:
                self._metrics.set("reward_mean", mean(values), source=source.source)

    def _log_once(self, source: str, reason: str) -> None:
        """The first reward that is missing for this reason; a source that says None means it."""
        if reason != "not_applicable" and (source, reason) not in self._logged:
            self._logged.add((source, reason))
            _LOGGER.warning("reward source %s gave no reward: %s. Later ones are counted, not shown.", source, reason)

    def _tell(self, shift: _Shift) -> None:
        if time.monotonic() < self._told_s + _TELL_S:
            return
        self._told_s = time.monotonic()
        lag = shift.lag()
        self._metrics.set("lag_records", lag, topic=topics.CANDIDATES.name)
        numbers: dict[str, float] = {"groups": self._num_groups, "in_flight": len(shift.open), "lag": lag}
        if self._newest:
            numbers["reward"] = mean(self._newest)
        self._heartbeat.tell(numbers=numbers)


def _died(entry: Entry, broken: GroupOutline, reason: Reason, letters: list[Output]) -> Finished:
    """The end of a dead letter's request."""
    feedback = end(
        broken.request, "dead_lettered", policy=broken.policy, stage=STAGE, reason=reason, time_s=time.time()
    )
    return Finished(entry, [*letters, _output(topics.FEEDBACK, entry, feedback)], feedback)


def _place(entry: Entry) -> tuple[int, int]:
    return entry.partition, entry.offset


def _output(topic: topics.Topic, entry: Entry, record: Record) -> Output:
    return Output(topic.name, entry.key, encode(record))
