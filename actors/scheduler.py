"""The scheduler: issues numbered prompt requests, never more than `pipeline_depth` ahead, and held-out rounds.

rebuild from the log -> (hear endings -> issue)* -> the data or the learner is at its end -> last round -> over

Knows no model. What may be issued is decided in `pacing` and `rounds`; this file reads and writes.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from actors.config import PromptsConfig, SamplingConfig, SchedulerConfig
from actors.issuer import Issuer
from actors.pacing import Order, Outstanding, total_requests
from actors.prompts import Prompt
from actors.rounds import Rounds
from streaming import topics
from streaming.books import Ledger, is_whole, newest_carried
from streaming.copies import dead_places
from streaming.endings import request_in
from streaming.errors import RecordError
from streaming.fencing import read_fences
from streaming.heartbeat import Beats, Heartbeat, states_since
from streaming.history import entries
from streaming.log.by_reference import unfetched
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.readable import readable
from streaming.records import (
    Feedback,
    PromptRequest,
    RoleState,
    Sampling,
    Version,
    WeightVersion,
    decode,
    encode,
)
from streaming.stage import dead_letter

STAGE = "scheduler"

WAIT_S = 0.05
"""Longest wait for feedback before the other topics are looked at; an ending itself wakes the scheduler at once."""

ROLES_S = 0.25
"""Between two looks at the learner's health: its end is no hurry, and every look decodes every role's state."""

READ_RECORDS = 1024
"""Feedback records per read: a slot that is free is filled before the next thousand endings are looked at."""

ISSUE_RECORDS = 256
"""Requests per append, so that the first of a deep pipeline do not wait for the last."""


class Prompts(NamedTuple):
    """The data of a run."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]


class Scheduler:
    """Issues requests until it is stopped or over. All of its state comes from the log, so a restart goes on exactly.

    `issuer`: its right to issue. `history`: what other roles had told before this start of the run says nothing about
    it.
    """

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat,
        issuer: Issuer,
        *,
        prompts: Prompts,
        config: SchedulerConfig,
        prompts_config: PromptsConfig,
        sampling: SamplingConfig,
        policy: str,
        history: Beats,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._issuer = issuer
        self._prompts = prompts
        self._config = config
        self._sampling = sampling
        self._policy = policy
        self._history = history
        self._now = now
        total = total_requests(len(prompts.train), prompts_config.max_passes, config.max_requests)
        self._order = Order(num_prompts=len(prompts.train), seed=prompts_config.shuffle_seed, total=total)
        self._outstanding = Outstanding()
        self._rounds = Rounds()
        self._fences = read_fences(log)
        self._learner: RoleState | None = None
        self._learner_seen_s = -ROLES_S

    def run(self, stop: threading.Event) -> None:
        """Issue requests until `stop`, or until the learner has ended and its last version is measured.

        Raises SupersededError where a newer start of the scheduler has taken over.
        Tells why it is over in its state: health "stopped", message "end of data" or "learner stopped".
        """
        feedback_from = self._rebuild()
        weights_from = self._first_weights()
        with self._log.assign(feedback_from) as feedback, self._log.assign(weights_from) as weights:
            self._heartbeat.tell(health="ready")
            while not stop.is_set():
                self._look_at_learner()
                self._see_weights(weights.read(max_records=READ_RECORDS, timeout_s=0))
                with self._metrics.time.spend("busy"):
                    self._issue()
                self._tell()
                if (message := self._over()) is not None:
                    self._heartbeat.tell(health="stopped", message=message, at_once=True)
                    return
                is_full = self._outstanding.num_train >= self._config.pipeline_depth
                with self._metrics.time.spend("blocked" if is_full else "waiting"):
                    heard = feedback.read(max_records=READ_RECORDS, timeout_s=WAIT_S)
                self._hear(heard)

    # Rebuilding: first what was issued, then what has ended.

    def _rebuild(self) -> dict[tuple[str, int], int]:
        carried = newest_carried(self._log, self._policy)
        before = Ledger(self._policy, carried)  # what retention has taken, or what a new log begins with
        self._outstanding.go_on(before.issued, before.ordinals)
        for entry in entries(self._log, topics.PROMPTS.name):
            try:
                request = request_in(entry.value, where=entry.where)
            except RecordError:  # a generator dead-letters it, and nobody knows which request it was
                continue
            if not self._issuer.issuers.is_void(request.claim, entry):
                self._issued(request)
                if before.has_freed(request.number):
                    self._outstanding.forget(request.number)
                    self._rounds.forget(request.number)
        if not is_whole(carried, self._log.begin_offsets(topics.PROMPTS.name)):
            self._outstanding.leave_no_gaps()  # not what was lost, perhaps, but what nobody remembers
        follow = dict(self._log.begin_offsets(topics.FEEDBACK.name))
        broken = []
        for entry in entries(self._log, topics.FEEDBACK.name):
            if (error := self._end(entry)) is not None:
                broken.append((entry, error))
            follow[entry.topic, entry.partition] = entry.offset + 1
        self._bury_new(broken)
        return follow

    def _bury_new(self, broken: Sequence[tuple[Entry, RecordError]]) -> None:
        """Dead letters of what no earlier start has made one of."""
        if not broken:
            return
        dead = dead_places(entries(unfetched(self._log), topics.DEAD_LETTER.name))
        for entry, error in broken:
            if (entry.topic, entry.partition, entry.offset) not in dead:
                self._bury(entry, error)

    def _first_weights(self) -> dict[tuple[str, int], int]:
        newest = self._log.newest(topics.WEIGHTS.name).values()
        self._see_weights(sorted(newest, key=lambda entry: (entry.partition, entry.offset)))
        follow = dict(self._log.begin_offsets(topics.WEIGHTS.name))
        for entry in newest:
            place = (entry.topic, entry.partition)
            follow[place] = max(follow.get(place, 0), entry.offset + 1)
        return follow

    # Hearing

    def _hear(self, heard: Iterable[Entry]) -> None:
        for entry in heard:
            self._metrics.count("records_read_total", topic=topics.FEEDBACK.name)
            if (error := self._end(entry)) is not None:
                self._bury(entry, error)

    def _bury(self, entry: Entry, error: RecordError) -> None:
        self._metrics.count("dead_letters_total", stage=STAGE)
        self._log.append([dead_letter(entry, error.what, STAGE)])

    def _end(self, entry: Entry) -> RecordError | None:
        """Take note of an ending; why the bytes are none, where they are none."""
        try:
            feedback = decode(Feedback, entry.value, where=entry.where)
        except RecordError as error:
            return error
        if feedback.policy == self._policy and not self._fences.is_void(feedback, entry):
            self._outstanding.end(feedback)
            self._rounds.end(feedback)
        return None

    def _see_weights(self, published: Iterable[Entry]) -> None:
        for weights in readable(WeightVersion, published):
            if weights.policy != self._policy:
                continue
            self._fences.add(weights)
            self._rounds.publish(weights.version)
            if self._rounds.in_flight:  # it may be measured: name it before the learner can delete it
                self._heartbeat.tell(at_once=True, leases=self._rounds.leases())

    def _look_at_learner(self) -> None:
        if self._now() - self._learner_seen_s < ROLES_S:
            return
        self._learner_seen_s = self._now()
        self._issuer.refuse_to_be_second()  # two would give the same numbers to other requests
        self._learner = states_since(self._log, self._history).get("learner-0")

    # Issuing

    def _issue(self) -> None:
        self._issue_round()
        if self._learner_stopped:
            return
        while room := self._outstanding.room(self._config.pipeline_depth, self._order.total):
            num = min(room, ISSUE_RECORDS)
            numbers, ordinals = self._outstanding.free_numbers(num), self._outstanding.free_ordinals(num)
            self._append([self._train_request(*one) for one in zip(numbers, ordinals, strict=True)])

    def _issue_round(self) -> None:
        if not self._prompts.held_out:
            return
        version = self._rounds.due(eval_every=self._config.eval_every, is_final=self._learner_stopped)
        if version is not None:
            numbers = self._outstanding.free_numbers(len(self._prompts.held_out))
            self._append(
                [self._eval_request(*one, version) for one in zip(numbers, self._prompts.held_out, strict=True)]
            )
            self._heartbeat.tell(at_once=True, leases=self._rounds.leases())

    def _append(self, requests: Sequence[PromptRequest]) -> None:
        name = topics.PROMPTS.name
        self._log.append([Output(name, request.prompt_id.encode(), encode(request)) for request in requests])
        self._metrics.count("records_written_total", len(requests), topic=name)
        for request in requests:
            self._metrics.count("requests_issued_total", purpose=request.purpose)
            self._issued(request)

    def _issued(self, request: PromptRequest) -> None:
        self._outstanding.issue(request)
        if request.purpose == "eval":
            self._rounds.issue(request)

    def _train_request(self, number: int, ordinal: int) -> PromptRequest:
        prompt = self._prompts.train[self._order.index(ordinal)]
        config = self._sampling
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            stop=config.stop,
        )
        return PromptRequest(
            number=number,
            prompt_id=prompt.prompt_id,
            num_candidates=config.num_candidates,
            text=prompt.text,
            messages=prompt.messages,
            sampling=sampling,
            golden=prompt.golden,
            columns=prompt.columns,
            ordinal=ordinal,
            claim=self._issuer.claim,
        )

    def _eval_request(self, number: int, prompt: Prompt, version: Version) -> PromptRequest:
        """One answer at temperature 1 from the whole distribution, so that measurements of any two runs compare."""
        sampling = Sampling(temperature=1.0, max_tokens=self._sampling.max_tokens, stop=self._sampling.stop)
        return PromptRequest(
            number=number,
            prompt_id=prompt.prompt_id,
            num_candidates=1,
            text=prompt.text,
            messages=prompt.messages,
            sampling=sampling,
            purpose="eval",
            golden=prompt.golden,
            columns=prompt.columns,
            round=self._rounds.next_number,
            round_size=len(self._prompts.held_out),
            min_version=version,
            claim=self._issuer.claim,
        )

    # The end

    @property
    def _learner_stopped(self) -> bool:
        return self._learner is not None and self._learner.health == "stopped"

    def _over(self) -> str | None:
        """Why there is nothing left to do; None while there is. The learner ends first, at the end of the data too."""
        if not self._learner_stopped:
            return None
        if self._prompts.held_out:
            due = self._rounds.due(eval_every=self._config.eval_every, is_final=True)
            if self._rounds.in_flight or due is not None:
                return None
        all_ended = self._outstanding.is_exhausted(self._order.total) and not self._outstanding.num_train
        return "end of data" if all_ended else "learner stopped"

    def _tell(self) -> None:
        outstanding = self._outstanding
        self._metrics.set("requests_outstanding", outstanding.num_train)
        numbers = {
            "issued": float(outstanding.num_issued),
            "outstanding": float(outstanding.num_train),
            "exhausted": float(outstanding.is_exhausted(self._order.total)),
            "eval_outstanding": float(outstanding.num_eval),
        }
        if self._order.total is not None:
            numbers["total"] = float(self._order.total)
        if self._rounds.newest is not None:
            numbers["heldout_reward"] = self._rounds.newest.mean
            self._metrics.set("heldout_reward", self._rounds.newest.mean)
        if self._rounds.best is not None:
            numbers["best_heldout_reward"] = self._rounds.best.mean
        self._heartbeat.tell(numbers=numbers, leases=self._rounds.leases())
