"""What stands in for engines, sources, ranks and heartbeats: no model and no thread, and what they did can be asked.

A model here is the list of what it was trained on. So a checkpoint's weights are their own witness: an example that is
in them twice was trained twice, whatever the feedback says.
"""

import asyncio
import errno
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from learner import checkpoint
from learner.batch import Example
from learner.checkpoint import Checkpoint, Layout, ProbeTokens, State
from learner.publisher import Publisher
from learner.trainer import ExampleNumbers, StepNumbers
from streaming.asking import Answered, Answers
from streaming.errors import EngineError, RecordError, WeightsError
from streaming.heartbeat import INTERVAL_S, Heartbeat, last_epoch
from streaming.log.protocol import Entry, Log
from streaming.metrics import Metrics
from streaming.records import (
    Candidate,
    Group,
    Probe,
    PromptRequest,
    RoleState,
    Sampling,
    SourceRewards,
    Span,
    Version,
)
from tests.simulation.fibers import EPOCH_S, FiberEvent, FiberLock, FiberThread, Process, World

FIRST_PROMPT_TOKEN = 100
"""Prompts are one token: this and the request's number, so that every example says whose it is."""

WRONG_LOGPROB = -9.0
"""What weights in the wrong places give to every token."""

SLOWEST_S = 1.0
"""Longest time that a group takes to be sampled, or to be scored."""


class Faults:
    """What goes wrong, each kind with its own probability whenever it may come. Healed: nothing any more."""

    def __init__(self, **rates: float) -> None:
        self.rates = rates
        self.counts: Counter[str] = Counter()
        self.newest_s = EPOCH_S

    def strikes(self, process: Process, kind: str) -> bool:
        return self._strikes(process.world, kind, process)

    def strikes_world(self, world: World, kind: str) -> bool:
        return self._strikes(world, kind, "world")

    def heal(self) -> None:
        self.rates = {}

    def _strikes(self, world: World, kind: str, whom: object) -> bool:
        rate = self.rates.get(kind, 0.0)
        if not rate or world.chance.random() >= rate:
            return False
        world.tell(whom, f"FAULT {kind}")
        self.counts[kind] += 1
        self.newest_s = world.now_s
        return True


class FiberHeartbeat(Heartbeat):
    """The heartbeat of a process whose threads are fibers; it beats as the real one does."""

    def __init__(self, log: Log, metrics: Metrics, process: Process, *, role: str) -> None:
        self._log = log
        self._metrics = metrics
        self._interval_s = INTERVAL_S
        self._lock: Any = FiberLock(process)
        self._beating: Any = FiberLock(process)
        self._wake: Any = FiberEvent(process)
        role_id = process.role_id
        self.state = RoleState(
            role=role, role_id=role_id, pid=process.start, host="simulation", time_s=process.world.now_s,
            epoch=last_epoch(log, role_id) + 1, health="starting",
        )  # fmt: skip
        self._beat()
        self._thread: Any = FiberThread(process, self._run, "heartbeat")


class FiberEngine:
    """Answers after a while, with random tokens of the version that it holds."""

    max_model_len = 64

    def __init__(self, process: Process, faults: Faults, version: Version) -> None:
        self.version = version
        self._process = process
        self._faults = faults
        self._is_paused = False
        self._is_closed = False
        self._is_misplaced = False

    def tokenize(self, request: PromptRequest) -> list[int]:
        return [FIRST_PROMPT_TOKEN + request.number]

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        chance = self._process.world.chance
        first = self.version
        await asyncio.sleep(chance.random() * SLOWEST_S)
        while self._is_paused and not self._is_closed:
            await asyncio.sleep(0.01)
        if self._is_closed or self._faults.strikes(self._process, "engine"):
            raise EngineError("it died", where=str(self.version), do="Restart it.")
        return [self._candidate(first) for _ in range(num_candidates)]

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        await asyncio.sleep(self._process.world.chance.random() * 0.2)
        return [WRONG_LOGPROB if self._is_misplaced else -1.0] * len(response_tokens)

    async def pause(self) -> None:
        self._is_paused = True
        await asyncio.sleep(0)

    async def load(self, directory: Path, version: Version) -> None:
        await asyncio.sleep(self._process.world.chance.random() * 0.1)
        if self._faults.strikes(self._process, "load"):
            raise WeightsError("it did not load", where=str(directory), do="Restart the engine.")
        has_probe = version.number > 0  # before the first step the learner has nothing to compare on
        self._is_misplaced = has_probe and self._faults.strikes(self._process, "misplaced")
        self.version = version

    async def resume(self) -> None:
        self._is_paused = False

    async def close(self) -> None:
        self._is_closed = True

    def _candidate(self, first: Version) -> Candidate:
        chance = self._process.world.chance
        tokens = [2 + int(chance.random() * 8) for _ in range(1 + int(chance.random() * 2))] + [1]
        cut = 0 if first == self.version else 1
        spans = [Span(version=first, start=0, end=cut), Span(version=self.version, start=cut, end=len(tokens))]
        logprob = WRONG_LOGPROB if self._is_misplaced else -0.5
        return Candidate(
            tokens=tokens, logprobs=[logprob] * len(tokens), text=str(tokens), finish_reason="stop", has_eos=True,
            spans=spans[not cut :],
        )  # fmt: skip


class FiberPanel:
    """Answers about groups in whatever order they get ready."""

    def __init__(self, process: Process, faults: Faults) -> None:
        self._process = process
        self._faults = faults
        self._asked: list[tuple[float, Entry, Group]] = []

    def submit(self, entry: Entry, group: Group) -> None:
        ready_s = self._process.world.now_s + self._process.world.chance.random() * SLOWEST_S
        self._asked.append((ready_s, entry, group))

    def take(self, timeout_s: float) -> list[Answered]:
        world = self._process.world
        next_s = min((asked[0] for asked in self._asked), default=world.now_s)
        self._process.wait(max(timeout_s, min(0.3, next_s - world.now_s)), "panel")
        now_s = world.now_s
        ready = [asked for asked in self._asked if asked[0] <= now_s]
        self._asked = [asked for asked in self._asked if asked[0] > now_s]
        return [Answered(entry, group, self._answer(group)) for _, entry, group in ready]

    def _answer(self, group: Group) -> Answers | RecordError:
        if group.request.number % 5 == 3 and self._faults.strikes(
            self._process, "reference"
        ):  # a group it often fails on
            return RecordError("the reference failed on it", where=group.group_id, do="It is a dead letter.")
        values = [None if candidate.tokens[0] == 2 else sum(candidate.tokens) % 4 for candidate in group.candidates]
        reasons = ["not_applicable" if value is None else None for value in values]
        rewards = SourceRewards(source="judge", weight=1.0, values=values, reasons=reasons if None in values else [])
        is_eval = group.request.purpose == "eval"
        return Answers([rewards], None if is_eval else [-1.0] * len(values))


class Alone:
    """The ranks of a learner of one process."""

    rank = 0
    is_first = True

    def __init__(self, process: Process) -> None:
        self._process = process

    def share(self, content: bytes | None) -> bytes:
        self._process.pass_by("checkpoint begins")
        assert content is not None
        return content

    def gather(self, content: bytes) -> list[bytes]:
        self._process.pass_by("checkpoint: engine is written")
        return [content]

    def barrier(self) -> None:
        self._process.pass_by("checkpoint ends")


class FiberTrainer:
    """Stands in for the ranks and their engine: its parameters are the examples that it was trained on."""

    layout = Layout(1, 0, "float32")

    def __init__(self, process: Process, faults: Faults, checkpoints: Path) -> None:
        self._process = process
        self._faults = faults
        self._checkpoints = checkpoints
        self._num_vetoed = 0
        self.parameters: list[int] = []

    def restore(self, origin: Checkpoint | None) -> None:
        if origin is not None:
            self.parameters = read_parameters(origin)

    def train(self, step: int, examples: Sequence[Example], *, gap_scale: float) -> StepNumbers:
        self._process.wait(self._process.world.chance.random() * 0.3, f"step {step}")
        is_applied = self._num_vetoed >= 2 or not self._faults.strikes(self._process, "non_finite")
        self._num_vetoed = 0 if is_applied else self._num_vetoed + 1
        if is_applied:
            self.parameters += [example.prompt_tokens[0] - FIRST_PROMPT_TOKEN for example in examples]
        return StepNumbers(
            is_applied=is_applied, learning_rate=1.0, gradient_norm=1.0, loss=1.0, reward_accuracy=1.0,
            chosen_logprob=-1.0, rejected_logprob=-1.0, kl_to_reference=0.0, num_tokens=1, seconds=1.0,
            examples=[ExampleNumbers(1.0, -1.0, -1.0) for _ in examples],
        )  # fmt: skip

    def save(self, state: State, still_ours: Callable[[], None]) -> None:
        ranks: Any = Alone(self._process)
        engine = _Written(self._process, self._faults, list(self.parameters))
        checkpoint.save(self._checkpoints, state, engine, ranks, keep=2, still_ours=still_ours)

    def publish(
        self, publisher: Publisher, version: Version, *, step: int, lineage: list[Version], tokens: ProbeTokens | None
    ) -> None:
        publisher.wait()
        probe = None
        if tokens is not None:
            logprobs = [-1.0] * len(tokens.response)
            probe = Probe(prompt_tokens=tokens.prompt, response_tokens=tokens.response, logprobs=logprobs)
        model = Model(list(self.parameters))
        publisher.publish(model, [], version, step=step, lineage=lineage, probe=probe)

    def idle(self) -> None:
        self._process.pass_by("idle")


class _Written:
    """The engine's part of a checkpoint."""

    def __init__(self, process: Process, faults: Faults, parameters: list[int]) -> None:
        self._process = process
        self._faults = faults
        self._parameters = parameters

    def save(self, directory: Path) -> list[Path]:
        self._process.pass_by("checkpoint: writing the engine")
        if self._faults.strikes(self._process, "disk"):
            raise OSError(errno.ENOSPC, "no space left", str(directory))
        path = directory / "engine.json"
        path.write_bytes(msgspec.json.encode(self._parameters))
        return [path]


class Model:
    """What a version's directory is written from."""

    dtype = "torch.float32"

    def __init__(self, parameters: list[int]) -> None:
        self._parameters = parameters

    def save_pretrained(self, directory: Path, **_: Any) -> None:
        (directory / "model.bin").write_bytes(msgspec.json.encode(self._parameters))
        (directory / "config.json").write_bytes(b"{}")


def read_parameters(saved: Checkpoint) -> list[int]:
    """What the model of a checkpoint was trained on: request numbers, in the order of the steps."""
    return msgspec.json.decode((saved.directory / "engine.json").read_bytes(), type=list[int])
