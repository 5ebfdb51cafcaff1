"""The real roles, built for a simulated process. A `Cast` says what each is made of, so that a test may miscast one."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.config import GenerationConfig, PromptsConfig, SamplingConfig, SchedulerConfig
from actors.engine import Engine
from actors.generator import Generator
from actors.issuer import Issuer
from actors.pacing import Outstanding
from actors.prompts import Prompt
from actors.scheduler import Prompts, Scheduler
from learner.claim import Claim
from learner.config import LearnerConfig
from learner.lead import Lead
from learner.limits import Limits
from learner.publisher import Publisher
from streaming.config import ScoringConfig, SelectionConfig
from streaming.errors import LeaseLostError
from streaming.heartbeat import NO_HISTORY, Beats
from streaming.log.protocol import Log
from streaming.metrics import Metrics, TimeAccount
from streaming.records import Version
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from streaming.selector import Selector
from tests.simulation.event_loop import FiberLoop
from tests.simulation.fibers import FiberExecutor, FiberLock, Process
from tests.simulation.memory_log import MemoryLog, Store
from tests.simulation.parts import Faults, FiberEngine, FiberHeartbeat, FiberPanel, FiberTrainer

POLICY = "policy"

METRICS = {role: Metrics(role) for role in ("scheduler", "generator", "scorer", "selector", "learner")}
"""Counters decide nothing, so all starts of a role share them: making them is the slowest part of a start."""


@dataclass(frozen=True)
class Settings:
    """A run's sizes."""

    num_requests: int = 8
    num_held_out: int = 0
    pipeline_depth: int = 6
    concurrency: int = 2
    batch_size: int = 2
    max_staleness: int = 3
    checkpoint_every: int = 2
    sync_every: int = 1
    num_generators: int = 1
    num_scorers: int = 1
    num_selectors: int = 1


@dataclass(frozen=True)
class Cast:
    """What the roles are made of."""

    log: Callable[[Store, Process], Log] = MemoryLog
    claim: type[Claim] = Claim
    lead: type[Lead] = Lead
    trainer: type[FiberTrainer] = FiberTrainer
    selector: type[Selector] = Selector
    outstanding: type[Outstanding] = Outstanding


class Stop:
    """Stands in for the threading.Event that every role gets. A process of ours is stopped with all others."""

    def __init__(self, process: Process, shared: "Stopping") -> None:
        self._process = process
        self._shared = shared

    def is_set(self) -> bool:
        return self._shared.is_set

    def wait(self, seconds: float) -> bool:
        self._process.wait(max(seconds, 0.4), "waits")  # a slow machine: fewer looks at nothing
        return self._shared.is_set


@dataclass
class Stopping:
    """Whether the run is being stopped, and what was there before it was started: it may be started again."""

    is_set: bool = False
    history: Beats = field(default_factory=lambda: NO_HISTORY)


@dataclass(frozen=True)
class Run:
    """What all processes of a run share."""

    store: Store
    directory: Path
    settings: Settings
    faults: Faults
    cast: Cast = Cast()
    stopping: Stopping = field(default_factory=Stopping)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def role_ids(self) -> list[str]:
        settings = self.settings
        many = {
            "generator": settings.num_generators,
            "scorer": settings.num_scorers,
            "selector": settings.num_selectors,
        }
        return ["scheduler-0", "learner-0", *(f"{role}-{i}" for role, num in many.items() for i in range(num))]

    def be(self, process: Process) -> None:
        """The process's whole life, until it stops or raises."""
        role = process.role_id.split("-")[0]
        log, metrics = self.cast.log(self.store, process), METRICS[role]
        metrics.time = TimeAccount(metrics)  # the one before belongs to another world's clock, perhaps
        heartbeat = FiberHeartbeat(log, metrics, process, role=role)
        stop: Any = Stop(process, self.stopping)
        try:
            ROLES[role](self, process, log, heartbeat, stop)
        except Exception as error:
            heartbeat.close(health="failed", message=str(error))
            raise
        heartbeat.close(message=heartbeat.state.message)


def _scheduler(run: Run, process: Process, log: Log, heartbeat: FiberHeartbeat, stop: Any) -> None:
    settings = run.settings
    scheduler = Scheduler(
        log,
        METRICS["scheduler"],
        heartbeat,
        Issuer(log, heartbeat),
        prompts=Prompts(_prompts("t", 3), _prompts("h", settings.num_held_out)),
        config=SchedulerConfig(
            pipeline_depth=settings.pipeline_depth, max_requests=settings.num_requests, eval_every=2
        ),
        prompts_config=PromptsConfig(path="-"),
        sampling=SamplingConfig(num_candidates=2),
        policy=POLICY,
        history=run.stopping.history,
        now=lambda: process.world.now_s,
    )
    scheduler._outstanding = run.cast.outstanding()
    scheduler.run(stop)


def _prompts(name: str, num: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"{name}{i}", text=f"{name}{i}", columns={}) for i in range(num)]


def _generator(run: Run, process: Process, log: Log, heartbeat: FiberHeartbeat, stop: Any) -> None:
    async def make_engine(directory: Path, version: Version) -> Engine:
        return FiberEngine(process, run.faults, version)

    generator = Generator(
        log,
        METRICS["generator"],
        heartbeat,
        make_engine=make_engine,
        config=GenerationConfig(concurrency=run.settings.concurrency),
        policy=POLICY,
        model=run.directory / "model",
    )
    FiberLoop(process).run(generator._run(stop))


def _scorer(run: Run, process: Process, log: Log, heartbeat: FiberHeartbeat, stop: Any) -> None:
    reference: Any = SimpleNamespace(version="reference")
    scorer = Scorer(
        log,
        METRICS["scorer"],
        heartbeat,
        sources=[],
        pricing=[Pricing(reference)],
        config=ScoringConfig(max_groups=4),
        policy=POLICY,
    )
    panel: Any = FiberPanel(process, run.faults)
    heartbeat.tell(health="ready")
    while not stop.is_set():  # as Scorer.run, with another panel
        try:
            scorer._serve(panel, stop)
        except LeaseLostError:
            continue


def _selector(run: Run, process: Process, log: Log, heartbeat: FiberHeartbeat, stop: Any) -> None:
    selector = run.cast.selector(
        log, METRICS["selector"], heartbeat, config=SelectionConfig(rule="max_min"), policy=POLICY
    )
    selector.run(stop)


def _learner(run: Run, process: Process, log: Log, heartbeat: FiberHeartbeat, stop: Any) -> None:
    settings, metrics = run.settings, METRICS["learner"]
    config = LearnerConfig.model_validate(
        {
            "batch": {"batch_size": settings.batch_size, "max_staleness": settings.max_staleness},
            "checkpoint": {"every_steps": settings.checkpoint_every},
            "publish": {"sync_every": settings.sync_every, "keep": 2},
        }
    )
    with closing(run.cast.claim(run.checkpoints, log, POLICY, at_least=heartbeat.state.epoch)) as claim:
        claim._lock = FiberLock(process)  # type: ignore[assignment]
        trainer: Any = run.cast.trainer(process, run.faults, run.checkpoints)
        trainer.restore(claim.origin)
        publisher = Publisher(
            run.directory / "weights",
            log,
            claim,
            policy=POLICY,
            source=run.directory / "model",
            keep=config.publish.keep,
            dtype=None,
            announced=lambda published: heartbeat.tell(version=published.version),
        )
        publisher._worker = FiberExecutor(process)  # type: ignore[assignment]
        lead = run.cast.lead(
            log,
            metrics,
            heartbeat,
            trainer=trainer,
            publisher=publisher,
            limits=Limits(None, 10_000),
            config=config,
            policy=POLICY,
            claim=claim,
            history=run.stopping.history,
        )
        with closing(publisher):
            lead.run(stop)


ROLES: dict[str, Callable[[Run, Process, Log, FiberHeartbeat, Any], None]] = {
    "scheduler": _scheduler,
    "generator": _generator,
    "scorer": _scorer,
    "selector": _selector,
    "learner": _learner,
}
