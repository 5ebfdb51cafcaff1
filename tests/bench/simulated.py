"""A run without a model: engines that only wait, ranks that only wait, and all else as it is in a run.

What stands in says how long things take, so that the pace of a run is what our own parts make of it.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from actors.config import EngineConfig, GenerationConfig, PromptsConfig, SamplingConfig, SchedulerConfig
from actors.generator import Generator
from actors.issuer import Issuer
from actors.prompts import Prompt
from actors.scheduler import Prompts, Scheduler
from streaming.config import ScoringConfig, SelectionConfig
from streaming.errors import EngineError
from streaming.heartbeat import NO_HISTORY, Heartbeat
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.records import Candidate, PromptRequest, Sampling, Span, Version
from streaming.rewards import WeightedSource
from streaming.rewards.function import FunctionSource
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from streaming.selector import Selector
from tests.bench.bench_stages import FreeReference

POLICY = "policy"
NUM_PROMPTS = 1000

VOCABULARY = 150_000
WORDS = ("the", "sum", "of", "both", "is", "therefore", "1", "7")
NUM_ANSWERS = 256
"""Different answers of an engine, drawn once: sampling costs no processor time."""

SHAPE = 4
"""Of the gamma distribution of a group's time: one in a thousand takes more than three times the mean."""

Run = Callable[[threading.Event], None]
"""A role's work, until the event."""


class Sizes(NamedTuple):
    """A simulated run. Every time is in seconds."""

    num_generators: int = 1
    concurrency: int = 4
    sampling_s: float = 0.1  # mean of a group; they overtake each other
    num_candidates: int = 4
    num_tokens: int = 32
    pipeline_depth: int = 64
    batch_size: int = 16
    step_s: float = 0.02
    sync_every: int = 8
    max_staleness: int = 16


class SimulatedEngine:
    """Answers after a while with random tokens of the versions that it held meanwhile."""

    max_model_len = 4096

    def __init__(self, version: Version, sizes: Sizes, draw: random.Random) -> None:
        self.version = version
        self._sizes = sizes
        self._draw = draw
        self._answers = [_answer(draw, sizes.num_tokens) for _ in range(NUM_ANSWERS)]
        self._runs = asyncio.Event()
        self._runs.set()
        self._is_closed = False

    def tokenize(self, request: PromptRequest) -> list[int]:
        return list((request.text or "").encode())

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        first = self.version
        await asyncio.sleep(self._draw.gammavariate(SHAPE, self._sizes.sampling_s / SHAPE))
        await self._runs.wait()
        if self._is_closed:
            raise EngineError("it was closed", where=request_id, do="Use another one.")
        return [self._candidate(first) for _ in range(num_candidates)]

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        return [-1.0] * len(response_tokens)

    async def pause(self) -> None:
        self._runs.clear()

    async def load(self, directory: Path, version: Version) -> None:
        self.version = version

    async def resume(self) -> None:
        self._runs.set()

    async def close(self) -> None:
        self._is_closed = True
        self._runs.set()

    def _candidate(self, first: Version) -> Candidate:
        """Half of its tokens from the version that it began with."""
        tokens, logprobs, text = self._draw.choice(self._answers)
        cut = 0 if first == self.version else len(tokens) // 2
        spans = [Span(version=first, start=0, end=cut), Span(version=self.version, start=cut, end=len(tokens))]
        return Candidate(
            tokens=tokens, logprobs=logprobs, text=text, finish_reason="stop", has_eos=True, spans=spans[not cut :],
        )  # fmt: skip


def _answer(draw: random.Random, num_tokens: int) -> tuple[list[int], list[float], str]:
    """Token ids and log-probs that compress as badly as real ones, and a text of their length."""
    tokens = [draw.randrange(VOCABULARY) for _ in range(num_tokens)]
    return tokens, [-draw.expovariate(1) for _ in tokens], " ".join(draw.choices(WORDS, k=num_tokens)) + str(tokens[0])


def reward(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """One of four values: of four answers about two are equally good."""
    return [float(tokens[0] % 4) for tokens in completion_ids]


def generator(log: Log, index: int, sizes: Sizes, folder: Path) -> Run:
    """A generator whose engine only waits."""
    metrics = Metrics("generator")
    draw = random.Random(index)

    async def make_engine(directory: Path, version: Version) -> SimulatedEngine:
        return SimulatedEngine(version, sizes, draw)

    def run(stop: threading.Event) -> None:
        with closing(Heartbeat(log, metrics, role="generator", index=index)) as heartbeat:
            config = GenerationConfig(
                concurrency=sizes.concurrency, engine=EngineConfig(kind="transformers", num_threads=1)
            )
            Generator(
                log, metrics, heartbeat, make_engine=make_engine, config=config, policy=POLICY, model=folder / "model"
            ).run(stop)

    return run


def scheduler(log: Log, sizes: Sizes, folder: Path) -> Run:
    metrics = Metrics("scheduler")
    prompts = [Prompt(prompt_id=f"p{i}", text=f"What is {i}+1?", columns={}) for i in range(NUM_PROMPTS)]

    def run(stop: threading.Event) -> None:
        with closing(Heartbeat(log, metrics, role="scheduler")) as heartbeat:
            Scheduler(
                log, metrics, heartbeat, Issuer(log, heartbeat),
                prompts=Prompts(prompts, []),
                config=SchedulerConfig(pipeline_depth=sizes.pipeline_depth),
                prompts_config=PromptsConfig(path="-"),
                sampling=SamplingConfig(num_candidates=sizes.num_candidates, max_tokens=sizes.num_tokens),
                policy=POLICY,
                history=NO_HISTORY,
            ).run(stop)  # fmt: skip

    return run


def scorer(log: Log, sizes: Sizes, folder: Path) -> Run:
    metrics = Metrics("scorer")

    def run(stop: threading.Event) -> None:
        source = WeightedSource(FunctionSource(reward, name="reward", version="1"), 1.0)
        with closing(Heartbeat(log, metrics, role="scorer")) as heartbeat:
            Scorer(
                log, metrics, heartbeat,
                sources=[source], pricing=[Pricing(FreeReference())], config=ScoringConfig(), policy=POLICY,
            ).run(stop)  # fmt: skip

    return run


def selector(log: Log, sizes: Sizes, folder: Path) -> Run:
    metrics = Metrics("selector")

    def run(stop: threading.Event) -> None:
        with closing(Heartbeat(log, metrics, role="selector")) as heartbeat:
            Selector(log, metrics, heartbeat, config=SelectionConfig(), policy=POLICY).run(stop)

    return run


def learner(log: Log, sizes: Sizes, folder: Path) -> Run:
    """The real lead, claim, publisher and checkpoints, with ranks that only wait."""
    from learner.claim import Claim
    from learner.config import LearnerConfig
    from learner.lead import Lead
    from learner.limits import Limits
    from learner.publisher import Publisher

    metrics = Metrics("learner")
    (folder / "model").mkdir(exist_ok=True)
    config = LearnerConfig.model_validate(
        {
            "batch": {"batch_size": sizes.batch_size, "max_staleness": sizes.max_staleness},
            "publish": {"sync_every": sizes.sync_every},
        }
    )

    def run(stop: threading.Event) -> None:
        with ExitStack() as stack:
            heartbeat = stack.enter_context(closing(Heartbeat(log, metrics, role="learner")))
            claim = stack.enter_context(closing(Claim(folder / "checkpoints", log, POLICY)))
            publisher = Publisher(
                folder / "weights", log, claim, policy=POLICY, source=folder / "model", keep=config.publish.keep,
                dtype=None, announced=lambda published: heartbeat.tell(version=published.version),
            )  # fmt: skip
            stack.enter_context(closing(publisher))
            trainer: Any = SimulatedTrainer(sizes, folder / "checkpoints")
            Lead(
                log, metrics, heartbeat, trainer=trainer, publisher=publisher, limits=Limits(None, VOCABULARY),
                config=config, policy=POLICY, claim=claim, history=NO_HISTORY,
            ).run(stop)  # fmt: skip

    return run


ROLES: dict[str, Callable[[Log, Sizes, Path], Run]] = {
    "scheduler": scheduler,
    "scorer": scorer,
    "selector": selector,
    "learner": learner,
}
"""Those of which there is one in a simulated run."""


class SimulatedTrainer:
    """Ranks that take `step_s` for a step, and hold nothing."""

    def __init__(self, sizes: Sizes, checkpoints: Path) -> None:
        from learner.checkpoint import Layout

        self.layout = Layout(1, 0, "float32")
        self._sizes = sizes
        self._checkpoints = checkpoints

    def train(self, step: int, examples: Sequence[Any], *, gap_scale: float) -> Any:
        from learner.trainer import ExampleNumbers, StepNumbers

        time.sleep(self._sizes.step_s)
        return StepNumbers(
            is_applied=True, learning_rate=1.0, gradient_norm=1.0, loss=1.0, reward_accuracy=1.0, chosen_logprob=-1.0,
            rejected_logprob=-1.0, kl_to_reference=0.0, num_tokens=1, seconds=self._sizes.step_s,
            examples=[ExampleNumbers(1.0, -1.0, -1.0) for _ in examples],
        )  # fmt: skip

    def save(self, state: Any, still_ours: Callable[[], None]) -> Path:
        from learner import checkpoint

        ranks: Any = _Alone()
        return checkpoint.save(self._checkpoints, state, _Nothing(), ranks, keep=2, still_ours=still_ours)

    def publish(self, publisher: Any, version: Version, *, step: int, lineage: list[Version], tokens: Any) -> None:
        publisher.publish(_Nothing(), {}, version, step=step, lineage=lineage, probe=None)

    def idle(self) -> None:
        """There is nobody else."""


class _Alone:
    rank = 0
    is_first = True

    def share(self, content: bytes | None) -> bytes:
        assert content is not None
        return content

    def gather(self, content: bytes) -> list[bytes]:
        return [content]

    def barrier(self) -> None:
        """There is nobody else."""


class _Nothing:
    """A model without weights."""

    dtype = "torch.float32"

    def save(self, directory: Path) -> list[Path]:
        (directory / "engine.json").write_bytes(b"{}")
        return [directory / "engine.json"]

    def save_pretrained(self, directory: Path, **_: Any) -> None:
        (directory / "model.bin").write_bytes(b"0")
        (directory / "config.json").write_bytes(msgspec.json.encode({}))
