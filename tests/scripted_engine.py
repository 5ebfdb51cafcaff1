"""An engine whose faults and delays are data, and a generator that runs beside the test."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.config import EngineConfig, GenerationConfig
from actors.fetching import WeightsCache
from actors.generator import Generator
from actors.tokens import tokenize
from deploy.tiny_model import build_tokenizer
from streaming import topics
from streaming.errors import EngineError, NotReadyError, WeightsError
from streaming.fencing import AWAY_S
from streaming.heartbeat import Heartbeat
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import (
    Candidate,
    Group,
    Probe,
    PromptRequest,
    Record,
    Sampling,
    Version,
    WeightVersion,
    decode,
    encode,
)
from streaming.weights import write_manifest
from tests.builders import make_candidate, make_weights

PATIENCE_S = 60.0
"""A test that waits longer than this for a scripted engine has failed."""

WRONG_LOGPROB = -9.0
"""What misplaced weights give to every token."""


class Script:
    """What happens to the engines of one test; shared by all of them, and changed by the test while they run."""

    def __init__(self) -> None:
        self.held: set[str] = set()  # prompts that are not answered yet
        self.torn: set[Version] = set()  # versions whose load fails in a running engine
        self.misplaced: set[Version] = set()  # versions that load into the wrong places in a running engine
        self.unusable: set[Version] = set()  # versions that no engine starts from
        self.deadly: list[str] = []  # prompts that kill the engine, once per mention
        self.may_start = threading.Event()  # engines start while it is set
        self.may_start.set()
        self.started: list[Version] = []
        self.loaded: list[Version] = []  # into running engines
        self.closed = 0
        self.in_flight: list[str] = []
        self.most_in_flight = 0

    async def make_engine(self, directory: Path, version: Version) -> "ScriptedEngine":
        while not self.may_start.is_set():
            await asyncio.sleep(0.001)
        if version in self.unusable:
            raise NotReadyError("unusable", where=str(directory), do="Use another version.")
        self.started.append(version)
        return ScriptedEngine(self, version)


class ScriptedEngine:
    """Answers with the version that it holds. No model: what is tested here is whoever uses it."""

    max_model_len = 64

    def __init__(self, script: Script, version: Version) -> None:
        self.version = version
        self._script = script
        self._tokenizer = build_tokenizer()
        self._is_misplaced = False
        self._num_answered = 0
        self._closed = False

    def tokenize(self, request: PromptRequest) -> list[int]:
        return tokenize(self._tokenizer, request)

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        prompt = self._tokenizer.decode(prompt_tokens)
        script = self._script
        script.in_flight.append(prompt)
        script.most_in_flight = max(script.most_in_flight, len(script.in_flight))
        try:
            await asyncio.sleep(0)
            while prompt in script.held and not self._closed:
                await asyncio.sleep(0.001)
        finally:
            script.in_flight.remove(prompt)
        if prompt in script.deadly:
            script.deadly.remove(prompt)
            raise EngineError("died", where=prompt, do="Restart it.")
        if self._closed:
            raise EngineError("closed", where=prompt, do="Use another one.")
        self._num_answered += 1
        logprob = WRONG_LOGPROB if self._is_misplaced else -0.5
        return [make_candidate(str(i), version=self.version, logprob=logprob) for i in range(num_candidates)]

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        while self._is_misplaced and self._num_answered == 0:
            await asyncio.sleep(0.001)  # the worst case: somebody is answered before the probe tells
        return [WRONG_LOGPROB if self._is_misplaced else -1.0] * len(response_tokens)

    async def pause(self) -> None:
        return

    async def load(self, directory: Path, version: Version) -> None:
        if version in self._script.torn:
            raise WeightsError("torn", where=str(directory), do="Restart the engine.")
        self._is_misplaced = version in self._script.misplaced
        self._num_answered = 0
        self.version = version
        self._script.loaded.append(version)

    async def resume(self) -> None:
        return

    async def close(self) -> None:
        self._script.closed += 1
        self._closed = True


PROBE = Probe(prompt_tokens=[3], response_tokens=[4, 5], logprobs=[-1.0, -1.0])
"""What a ScriptedEngine agrees with as long as its weights lie in the right places."""


class Run:
    """A generator in a thread of its own, and the log as the other roles see it."""

    def __init__(
        self, log: Log, heartbeat: Heartbeat, metrics: Metrics, folder: Path, patience_s: float = PATIENCE_S
    ) -> None:
        self._patience_s = patience_s
        self.finished = threading.Event()
        self.log = log
        self.heartbeat = heartbeat
        self.metrics = metrics
        self.folder = folder
        self.stop = threading.Event()

    def publish(self, version: Version, **changes: Any) -> WeightVersion:
        """Write a version of a scripted engine and announce it, with these fields changed."""
        directory = self.folder / str(version)
        directory.mkdir()
        (directory / "model").write_text(str(version))
        sha256 = write_manifest(directory, version)
        defaults = {"location": str(directory), "manifest_sha256": sha256, "probe": PROBE}
        weights = make_weights(version, **{**defaults, **changes})
        announce(self.log, weights)
        return weights

    def ask(self, *requests: PromptRequest) -> None:
        """Write prompt requests."""
        for request in requests:
            append(self.log, topics.PROMPTS, request.prompt_id, request)

    def groups(self, num: int) -> list[Group]:
        """All groups written so far, as soon as there are `num`; in the order of their requests."""
        self.until(lambda: len(records(self.log, topics.CANDIDATES)) >= num)
        found = records(self.log, topics.CANDIDATES)
        assert len(found) == num, f"{len(found)} groups"
        return sorted(found, key=lambda group: group.request.number)

    def until(self, holds: Callable[[], object]) -> None:
        """Wait until it holds."""
        deadline = time.monotonic() + self._patience_s
        while not holds():
            assert time.monotonic() < deadline, "waited in vain"
            self.stop.wait(0.002)


def announce(log: Log, weights: WeightVersion) -> None:
    append(log, topics.WEIGHTS, f"{weights.policy}/{weights.kind}", weights)


def append(log: Log, topic: topics.Topic, key: str, record: Record) -> None:
    log.append([Output(topic.name, key.encode(), encode(record))])


def records(log: Log, topic: topics.Topic) -> list[Any]:
    """Everything in a topic that is there now."""
    with log.assign(log.begin_offsets(topic.name)) as consumer:
        found: list[Any] = []
        while entries := consumer.read(max_records=1000, timeout_s=0):
            found += [decode(topic.record, entry.value) for entry in entries]
    return found


@contextmanager
def running(
    log: Log,
    folder: Path,
    make_engine: Any,
    *,
    generator_log: Log | None = None,
    patience_s: float = PATIENCE_S,
    cache: Callable[[Metrics], WeightsCache] | None = None,
    away_s: float = AWAY_S,
    **settings: Any,
) -> Iterator[Run]:
    """A generator beside the block, stopped at its end. Whatever it raised is raised there."""
    metrics = Metrics("generator")
    heartbeat = Heartbeat(log, metrics, role="generator", interval_s=0.05)
    config = GenerationConfig(**{"engine": EngineConfig(kind="transformers", num_threads=1), **settings})
    generator = Generator(
        generator_log or log, metrics, heartbeat, make_engine=make_engine, config=config, policy="policy", model=folder,
        cache=cache and cache(metrics), away_s=away_s,
    )  # fmt: skip
    run = Run(log, heartbeat, metrics, folder, patience_s)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            generator.run(run.stop)
        except BaseException as error:
            raised.append(error)
        finally:
            run.finished.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield run
    finally:
        run.stop.set()
        thread.join()
        heartbeat.close()
    if raised:
        raise raised[0]
