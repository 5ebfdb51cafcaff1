"""What rank 0 decides: which pairs make a step, when a version is published, when a checkpoint is committed.

    publish the restored weights -> (wait for a batch -> step -> publish? -> checkpoint?) ... -> checkpoint

What is true at any moment: an example is `consumed` once it was in a step (its slot is free), and has its final
ending once a checkpoint that contains it is durable. What was consumed after the newest checkpoint is trained again
by the next start, and nothing else is.
"""

import threading
import time
from collections.abc import Sequence

from learner import endings
from learner.batch import example_of
from learner.checkpoint import ProbeTokens, State
from learner.claim import Claim
from learner.config import NEED_RATINGS, LearnerConfig
from learner.gap_scale import GapScale
from learner.limits import Limits
from learner.off_policy import Samplers, has_selected_all
from learner.pairs import PairReader, is_end_of_data, is_last_batch
from learner.publisher import Publisher
from learner.staleness import lineage_of, pair_staleness
from learner.trainer import StepNumbers, Trainer
from streaming import topics
from streaming.errors import NonFiniteError
from streaming.heartbeat import Beats, Heartbeat, states_since
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import Feedback, Pair, Version, encode

MAX_NON_FINITE = 3
"""Steps in a row that may not be finite: after so many the weights or the settings are at fault, not the batch."""

_POLL_S = 0.05
"""Pause between two looks for new pairs: shorter than a step. On Kafka a look asks the brokers where the topic ends."""

_QUIET_S = 1.0
"""How often a waiting learner looks whether the data has ended, and shows its other ranks that it lives."""


class Lead:
    """One start of the learner, from its restored checkpoint to its last one."""

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat | None,
        *,
        trainer: Trainer,
        publisher: Publisher,
        limits: Limits,
        config: LearnerConfig,
        policy: str,
        claim: Claim,
        history: Beats,
        sampled_by: str | None = None,
    ) -> None:
        """`history`: what other roles had told before this start of the run says nothing about it.

        `sampled_by`: the policy whose candidates this one learns from, where it does not sample itself.
        """
        state = claim.origin.state if claim.origin else None
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._trainer = trainer
        self._publisher = publisher
        self._claim = claim
        self._limits = limits
        self._config = config
        self._policy = policy
        self._history = history
        self._sampled_by = sampled_by
        self._samplers = Samplers(log)
        self._step = state.step if state else 0
        self._version = Version(claim.epoch, state.version.number if state else 0)
        restored = state.version if state else None
        self._lineage = lineage_of(restored, state.lineage if state else [], epoch=claim.epoch)
        self._probe: ProbeTokens | None = state.probe if state else None
        self._to_repeat = [endings.repeated(one, by=claim.epoch) for one in (state.endings if state else [])]
        self._ended: list[Feedback] = []  # consumed since the newest checkpoint
        self._saved_step = self._step if state else None
        self._issued = state.issued if state else 0
        self._gap_scale = state.gap_scale if state else GapScale()
        self._has_announced = False  # this epoch's first version
        self._published_step = self._step
        self._num_non_finite = 0
        self._reader = PairReader(log, metrics, policy=policy, judge=self._judge, state=claim.reader)

    def run(self, stop: threading.Event) -> None:
        """Train until `stop`, `max_steps` or the end of the data, then commit a checkpoint of whatever is new."""
        self._feed_back([one for one in self._to_repeat if not self._reader.was_told(one)])
        self._publish()
        self._tell(health="ready")
        reason = "max_steps" if self._is_done else None
        while reason is None:
            batch = self._next_batch(stop)
            if batch:
                self._take_step(batch)
            reason = self._why_over(batch, stop)
        if reason != "stopped" and self._published_step < self._step:
            self._publish_next()
        if self._ended or self._saved_step != self._step:
            self._checkpoint()
        self._publisher.wait()
        self._reader.close()
        self._tell(health="stopped", message=reason)

    def _why_over(self, batch: Sequence[Pair], stop: threading.Event) -> str | None:
        if self._is_done:
            return "max_steps"
        if stop.is_set():
            return "stopped"
        return None if batch else "end of data"

    @property
    def _is_done(self) -> bool:
        return self._config.max_steps is not None and self._step >= self._config.max_steps

    def _judge(self, pair: Pair) -> str | None:
        reason = self._limits.refuse(pair)
        if reason is not None:
            return reason
        age = self._age(pair)
        return "stale" if age is None or age > self._config.batch.max_staleness else None

    def _age(self, pair: Pair) -> int | None:
        """In versions of the policy that sampled it, which may be another one."""
        if pair.sampled_by is not None:
            return self._samplers.age(pair)
        return pair_staleness(pair, self._version, self._lineage)

    def _next_batch(self, stop: threading.Event) -> list[Pair]:
        """A full batch, or the last partial one; nothing where `stop` came first or the data is over."""
        looked_s = time.monotonic()
        with self._metrics.time.spend("waiting"):
            while not stop.is_set():
                self._publisher.look()
                with self._metrics.time.spend("busy"):
                    is_full = self._reader.fill(self._config.batch.batch_size)
                    self._settle_drops()
                if is_full:
                    return self._reader.next_batch(self._config.batch.batch_size)
                if time.monotonic() - looked_s > _QUIET_S:
                    looked_s = time.monotonic()
                    self._trainer.idle()
                    if self._has_everything():
                        return self._reader.next_batch(self._config.batch.batch_size)
                stop.wait(_POLL_S)
        return []

    def _has_everything(self) -> bool:
        """Whether there is nothing to wait for: a batch that is not full now never will be."""
        numbers = self._scheduler_numbers()
        if self._sampled_by is None:
            return is_last_batch(numbers, self._reader.pending_requests) or is_end_of_data(numbers)
        if not is_end_of_data(numbers) or not has_selected_all(self._log, self._policy):
            return False
        is_full = self._reader.fill(self._config.batch.batch_size)  # after the looks: the last pairs came before them
        self._settle_drops()
        return not is_full

    def _scheduler_numbers(self) -> dict[str, float]:
        """What the scheduler of this run last told."""
        scheduler = states_since(self._log, self._history).get("scheduler-0")
        return {} if scheduler is None else scheduler.numbers

    def _settle_drops(self) -> None:
        drops = self._reader.take_drops()
        self._consume([drop.pair for drop in drops], [drop.reason for drop in drops])
        self._log.append([drop.letter for drop in drops if drop.letter is not None])

    def _take_step(self, batch: Sequence[Pair]) -> None:
        gap_scale = self._gap_scale.after(pair.rating_gap for pair in batch if pair.route == "dpo")
        numbers = self._trainer.train(self._step, [example_of(pair) for pair in batch], gap_scale=gap_scale.value)
        if not numbers.is_applied:
            self._skip(batch)
            return
        self._num_non_finite = 0
        self._gap_scale = gap_scale
        self._step += 1
        self._probe = ProbeTokens(batch[0].prompt_tokens, batch[0].chosen.tokens)
        ages = [self._age(pair) for pair in batch]
        self._show(batch, numbers, ages)
        self._end_trained(batch, numbers, ages)
        if self._step % self._config.publish.sync_every == 0:
            self._publish_next()
        if self._step % self._config.checkpoint.every_steps == 0:
            self._checkpoint()

    def _skip(self, batch: Sequence[Pair]) -> None:
        """The step was not finite on some rank, and changed nothing on any."""
        self._num_non_finite += 1
        self._metrics.count("non_finite_steps_total")
        self._consume(batch, ["non_finite"] * len(batch))
        if self._num_non_finite >= MAX_NON_FINITE:
            raise NonFiniteError(
                f"{self._num_non_finite} steps in a row had a loss or gradient that is not finite; the newest of their "
                f"pairs is {batch[-1].pair_id}",
                where=f"learner step {self._step}",
                do="The newest checkpoint is intact. Lower learner.optimizer.learning_rate, look at the pairs with "
                "`streamdpo tail`, and run again.",
            )

    def _consume(self, pairs: Sequence[Pair], reasons: Sequence[str]) -> None:
        """Free the slots of these examples; their final endings wait for the next checkpoint."""
        told = [self._consumed(pair, reason) for pair, reason in zip(pairs, reasons, strict=True)]
        self._ended += told
        self._feed_back(told)

    def _end_trained(self, batch: Sequence[Pair], numbers: StepNumbers, ages: Sequence[int | None]) -> None:
        """As `_consume`, with what the step saw of every example."""
        told = [
            endings.with_numbers(self._consumed(pair, ""), seen, staleness=age)
            for pair, seen, age in zip(batch, numbers.examples, ages, strict=True)
        ]
        self._ended += told
        self._feed_back(told)

    def _consumed(self, pair: Pair, reason: str) -> Feedback:
        return endings.consumed(pair, epoch=self._version.epoch, step=self._step, time_s=time.time(), reason=reason)

    def _feed_back(self, told: Sequence[Feedback]) -> None:
        if not told:
            return
        self._claim.refuse_to_be_second()
        self._log.append([Output(topics.FEEDBACK.name, one.group_id.encode(), encode(one)) for one in told])
        self._metrics.count("records_written_total", len(told), topic=topics.FEEDBACK.name)
        for one in told:
            self._metrics.count("endings_total", ending=one.ending, reason=one.reason)

    def _publish_next(self) -> None:
        self._version = Version(self._version.epoch, self._version.number + 1)
        self._publish()

    def _publish(self) -> None:
        with self._metrics.time.spend("updating"):
            self._claim.refuse_to_be_second()
            self._trainer.publish(
                self._publisher, self._version, step=self._step, lineage=self._lineage, tokens=self._probe
            )
        self._published_step = self._step

    def _checkpoint(self) -> None:
        with self._metrics.time.spend("updating"):
            self._claim.refuse_to_be_second()
            if not self._has_announced:
                self._publisher.wait()  # so that a checkpoint's log always knows its epoch, and another one does not
                self._has_announced = True
            self._issued = max(self._issued, int(self._scheduler_numbers().get("issued", 0)))
            finals = [endings.final(one) for one in self._ended]
            self._trainer.save(
                State(
                    step=self._step,
                    version=self._version,
                    lineage=self._lineage,
                    layout=self._trainer.layout,
                    reader=self._reader.state(),
                    endings=finals,
                    probe=self._probe,
                    issued=self._issued,
                    gap_scale=self._gap_scale,
                ),
                self._claim.refuse_to_be_second,
            )
            self._feed_back(finals)
        self._ended = []
        self._saved_step = self._step
        self._metrics.set("checkpoint_timestamp_seconds", time.time())

    def _show(self, batch: Sequence[Pair], numbers: StepNumbers, ages: Sequence[int | None]) -> None:
        """Metrics and headline figures of a step that was taken."""
        metrics = self._metrics
        metrics.count("steps_total")
        metrics.count("trained_tokens_total", numbers.num_tokens)
        for pair in batch:
            metrics.count("examples_trained_total", route=pair.route)
        metrics.set("rating_gap_scale", self._gap_scale.value)
        if self._config.loss.name in NEED_RATINGS:
            unrated = [pair for pair in batch if pair.route == "dpo" and pair.rating_gap is None]
            metrics.count("pairs_without_rating_total", len(unrated))
        known_ages = [age for age in ages if age is not None]  # another sampler may have started anew meanwhile
        for age in known_ages:
            metrics.observe("staleness_versions", age)
        gauges = {
            "loss": numbers.loss,
            "reward_accuracy": numbers.reward_accuracy,
            "chosen_logprob": numbers.chosen_logprob,
            "rejected_logprob": numbers.rejected_logprob,
            "kl_to_reference": numbers.kl_to_reference,
            "gradient_norm": numbers.gradient_norm,
            "learning_rate": numbers.learning_rate,
        }
        known = {name: value for name, value in gauges.items() if value is not None}
        for name, value in known.items():
            metrics.set(name, value)
        tokens_per_s = numbers.num_tokens / max(numbers.seconds, 1e-9)
        figures = {"step": self._step, "tokens_per_s": tokens_per_s}
        if known_ages:
            figures["staleness"] = sum(known_ages) / len(known_ages)
        self._tell(numbers={**known, **{name: float(value) for name, value in figures.items()}})

    def _tell(self, **changes: object) -> None:
        if self._heartbeat is not None:
            self._heartbeat.tell(at_once="health" in changes, **changes)
