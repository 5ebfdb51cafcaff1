"""The generator: prompts in, groups of candidates out, across weight versions. Never waits for the learner.

    prompts -> open -> sampled -> written (durable) -> settled -> committed

A crash anywhere repeats what was not committed; a group sampled twice has the same id and other content, and readers
take one. No update starts while an evaluation prompt is in flight, so that a round is nearly always of one weight
version; one that is not, because parts of it were read before and after an update, does not count and is repeated.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

from actors.config import GenerationConfig
from actors.fetching import WeightsCache
from actors.keeper import EngineKeeper, MakeEngine
from actors.reading import PromptReader, WeightsReader
from actors.update import Weights, announced
from streaming import topics
from streaming.endings import FORGOTTEN, end, request_in
from streaming.errors import EngineError, RecordError, TooLargeError
from streaming.fencing import AWAY_S
from streaming.heartbeat import Heartbeat
from streaming.log.protocol import Entry, Log, Output
from streaming.metrics import Metrics
from streaming.records import Ending, Group, PromptRequest, Source, Version, decode, encode
from streaming.stage import dead_letter

STAGE = "generator"

INITIAL = Version(0, 0)
"""Version of a model that is never updated."""

TICK_S = 1.0
"""Between two refreshments of the headline figures, which ask the log twice; a heartbeat takes them along as often."""

STOP_POLL_S = 0.05
"""How soon a stop is noticed."""


class _Answer(NamedTuple):
    """What a prompt has led to, not written yet: a group, or the reason why there is none."""

    entry: Entry
    request: PromptRequest | None  # None where the bytes do not say which request it is
    group: Group | None
    reason: str = ""
    error: str = ""  # more about it, for people


class Generator:
    """One generator process's work. `run` is called once."""

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat,
        *,
        make_engine: MakeEngine,
        config: GenerationConfig,
        policy: str,
        model: Path,
        cache: WeightsCache | None = None,
        away_s: float = AWAY_S,
    ) -> None:
        """`cache` takes the versions that are published behind a URL; for `away_s` see PromptReader."""
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._config = config
        self._policy = policy
        self._model = model
        self._cache = cache
        self._away_s = away_s
        self._keeper = EngineKeeper(make_engine, metrics, heartbeat, tolerance=config.engine.parity_tolerance)
        self._num_train = 0  # in flight
        self._num_eval = 0
        self._held: list[tuple[Entry, PromptRequest]] = []  # for a version that is yet to come
        self._answers: list[_Answer] = []
        self._is_draining = False
        self._is_doubtful = False  # an update is not proven yet: what was just sampled may be worthless
        self._moved = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._num_samples = 0
        self._num_tokens = 0

    def run(self, stop: threading.Event) -> None:
        """Sample until `stop` is set; what is not finished `drain_s` later is sampled again after the next start.

        Raises what the user or the launcher has to act on: a DataError, NotReadyError, WeightsError, EngineError or
        LogError.
        """
        asyncio.run(self._run(stop))

    async def _run(self, stop: threading.Event) -> None:
        work = asyncio.create_task(self._work())
        while not work.done() and not stop.is_set():
            await asyncio.wait([work], timeout=STOP_POLL_S)
        await self._drain(work)
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()

    async def _drain(self, work: asyncio.Task[None]) -> None:
        """Take no more prompts, and finish what is in flight as far as `drain_s` reaches."""
        self._is_draining = True
        if self._config.drain_s:
            self._heartbeat.tell(health="stopping", message="draining", at_once=True)
        until_s = time.monotonic() + self._config.drain_s
        while not work.done() and self._has_work() and time.monotonic() < until_s:
            await asyncio.wait([work], timeout=STOP_POLL_S)

    def _has_work(self) -> bool:
        return bool(self._num_train or self._num_eval or self._answers)

    async def _work(self) -> None:
        async with AsyncExitStack() as stack:
            prompts = await asyncio.to_thread(PromptReader, self._log, away_s=self._away_s)
            stack.push_async_callback(prompts.close)
            weights = await asyncio.to_thread(WeightsReader, self._log, self._policy)
            stack.push_async_callback(weights.close)
            stack.push_async_callback(self._keeper.close)
            stack.push_async_callback(self._flush, prompts)
            await self._start_engine(weights)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._read(prompts, tasks))
                    tasks.create_task(self._write(prompts))
                    tasks.create_task(self._tick(prompts))
                    if self._config.update_weights:
                        tasks.create_task(self._follow(weights, tasks))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _start_engine(self, weights: WeightsReader) -> None:
        """The only time that a generator waits for the learner: until there is a first whole version."""
        wanted = Weights(self._model, INITIAL, manifest_sha256=None, probe=None)
        if self._config.update_weights:
            while not await self._keeper.verify(wanted := announced(await weights.next(), self._cache)):
                continue
        await self._keeper.start(wanted)

    async def _read(self, prompts: PromptReader, tasks: asyncio.TaskGroup) -> None:
        """Keep `concurrency` groups in flight."""
        while True:
            await self._until(lambda: self._room() > 0)
            entries = await prompts.read(max_records=self._room())
            self._metrics.count("requests_refused_total", prompts.num_refused)
            for entry in entries:
                self._metrics.count("records_read_total", topic=entry.topic)
                try:
                    request = decode(PromptRequest, entry.value, where=entry.where)
                except RecordError as error:
                    self._answers.append(_Answer(entry, _what_is_left(entry), None, "record", str(error)))
                else:
                    self._begin(entry, request, tasks)
            self._moves()

    def _room(self) -> int:
        """Groups that may still be begun: none while the log is slower than the engine, or when told to stop."""
        if self._is_draining:
            return 0
        return self._config.concurrency - max(self._num_train, len(self._answers))

    def _begin(self, entry: Entry, request: PromptRequest, tasks: asyncio.TaskGroup) -> None:
        if request.text is None and request.messages is None:
            self._answers.append(_Answer(entry, request, None, FORGOTTEN))
            return
        wanted = request.min_version if self._config.update_weights else None
        if wanted is not None and self._keeper.version < wanted:
            self._held.append((entry, request))
            return
        self._count(request, +1)
        tasks.create_task(self._sample(entry, request))

    async def _sample(self, entry: Entry, request: PromptRequest) -> None:
        """Answer one prompt, on as many engines as it takes."""
        answer: _Answer | None = None
        while answer is None:
            engine = await self._keeper.engine()
            tokens = engine.tokenize(request)
            if not 0 < len(tokens) < engine.max_model_len:
                answer = _Answer(entry, request, None, "prompt_too_long" if tokens else "prompt_empty")
                break
            try:
                candidates = await engine.generate(
                    tokens, num_candidates=request.num_candidates, sampling=request.sampling,
                    request_id=request.group_id,
                )  # fmt: skip
            except EngineError as error:
                await self._keeper.replace(engine, error)
                continue
            self._keeper.worked()
            group = Group(
                request=request, prompt_tokens=tokens, candidates=candidates, policy=self._policy,
                generator=self._heartbeat.state.role_id, sampled_s=time.time(),
                source=Source(topic=entry.topic, partition=entry.partition, offset=entry.offset),
            )  # fmt: skip
            answer = _Answer(entry, request, group)
        self._count(request, -1)
        self._answers.append(answer)
        self._moves()

    async def _write(self, prompts: PromptReader) -> None:
        """Append whatever is finished, all of it together."""
        while True:
            await self._until(lambda: bool(self._answers) and not self._is_doubtful)
            # A task of its own: a stop in the middle of an append must not lose sight of it.
            self._writing = asyncio.create_task(self._write_answers(prompts))
            await asyncio.shield(self._writing)
            self._moves()

    async def _flush(self, prompts: PromptReader) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await self._write_answers(prompts)

    async def _write_answers(self, prompts: PromptReader) -> None:
        """Make them durable, then settle their prompts. One that is too large for the log becomes a dead letter.

        Nothing is written while an update is not proven: what it sampled may be among them.
        """
        await prompts.confirm()
        if self._is_doubtful:
            return
        answers = [answer for answer in self._answers if prompts.is_open(answer.entry)]
        self._answers = []
        try:
            await asyncio.to_thread(self._log.append, [out for answer in answers for out in self._outputs(answer)])
        except TooLargeError:
            answers = [await self._write_alone(answer) for answer in answers]
        for answer in answers:
            if prompts.is_open(answer.entry):
                prompts.settle(answer.entry)
            self._show(answer)

    async def _write_alone(self, answer: _Answer) -> _Answer:
        try:
            await asyncio.to_thread(self._log.append, self._outputs(answer))
        except TooLargeError:
            answer = answer._replace(group=None, reason="group_too_large")
            await asyncio.to_thread(self._log.append, self._outputs(answer))
        return answer

    def _outputs(self, answer: _Answer) -> list[Output]:
        if answer.group is not None:
            return [Output(topics.CANDIDATES.name, answer.group.group_id.encode(), encode(answer.group))]
        request = answer.request
        if request is not None and answer.reason == FORGOTTEN:
            return [self._ending(request, "dropped", answer.reason)]
        outputs = [dead_letter(answer.entry, answer.error or answer.reason, STAGE)]
        if request is not None:
            outputs.append(self._ending(request, "dead_lettered", answer.reason))
        return outputs

    def _ending(self, request: PromptRequest, ending: Ending, reason: str) -> Output:
        feedback = end(request, ending, policy=self._policy, stage=STAGE, reason=reason, time_s=time.time())
        return Output(topics.FEEDBACK.name, request.group_id.encode(), encode(feedback))

    async def _follow(self, weights: WeightsReader, tasks: asyncio.TaskGroup) -> None:
        """Apply each newer version in flight, unless a round of evaluation is under way."""
        while True:
            wanted = announced(await weights.next(), self._cache)
            if not await self._keeper.verify(wanted):
                continue
            await self._until(lambda: self._num_eval == 0)
            self._is_doubtful = True
            if await self._keeper.update(wanted) in ("failed", "parity"):
                self._sample_again(wanted.version, tasks)
            self._is_doubtful = False
            held, self._held = self._held, []
            for entry, request in held:
                self._begin(entry, request, tasks)
            self._moves()

    def _sample_again(self, version: Version, tasks: asyncio.TaskGroup) -> None:
        """Drop what an engine sampled under this version before it turned out to be wrong."""
        answers, self._answers = self._answers, []
        for answer in answers:
            if answer.request is not None and answer.group is not None and _has_tokens_of(answer.group, version):
                self._begin(answer.entry, answer.request, tasks)
            else:
                self._answers.append(answer)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._moved.clear()
            await self._moved.wait()

    def _moves(self) -> None:
        """Something changed: let every loop look again, and account for the time."""
        self._moved.set()
        if self._keeper.is_ready and not self._is_doubtful:
            in_flight = self._num_train + self._num_eval
            self._metrics.time.enter("busy" if in_flight else "blocked" if self._answers else "waiting")

    def _count(self, request: PromptRequest, change: int) -> None:
        if request.purpose == "eval":
            self._num_eval += change
        else:
            self._num_train += change

    def _show(self, answer: _Answer) -> None:
        if answer.group is None:
            is_dead = answer.reason != FORGOTTEN
            if is_dead:
                self._metrics.count("dead_letters_total", stage=STAGE)
            if answer.request is not None:
                ending = "dead_lettered" if is_dead else "dropped"
                self._metrics.count("endings_total", ending=ending, reason=answer.reason)
            return
        self._metrics.count("records_written_total", topic=topics.CANDIDATES.name)
        for candidate in answer.group.candidates:
            self._metrics.count("candidates_total", finish_reason=candidate.finish_reason)
            self._metrics.count("sampled_tokens_total", len(candidate.tokens))
            self._num_samples += 1
            self._num_tokens += len(candidate.tokens)

    async def _tick(self, prompts: PromptReader) -> None:
        """Keep the headline figures fresh."""
        samples = tokens = 0
        began = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            in_flight = self._num_train + self._num_eval
            self._metrics.set("groups_in_flight", in_flight)
            self._metrics.set("lag_records", await prompts.lag(), topic=topics.PROMPTS.name)
            self._heartbeat.tell(
                numbers={
                    "in_flight": float(in_flight),
                    "tokens_per_s": (self._num_tokens - tokens) / (now - began),
                    "samples_per_s": (self._num_samples - samples) / (now - began),
                }
            )
            samples, tokens, began = self._num_samples, self._num_tokens, now


def _what_is_left(entry: Entry) -> PromptRequest | None:
    """Of bytes that are no request: which one they were to be, if they say so."""
    try:
        return request_in(entry.value, where=entry.where)
    except RecordError:
        return None


def _has_tokens_of(group: Group, version: Version) -> bool:
    return any(span.version == version for candidate in group.candidates for span in candidate.spans)
