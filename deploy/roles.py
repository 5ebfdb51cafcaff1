"""Builds every role from the settings: the only place where the parts of the rooms are joined.

process starts -> log, metrics, endpoint, heartbeat open -> the role runs -> all of it closes, the last beat last
"""

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deploy.check import check_packages
from deploy.config import Policy, RunConfig, run_directory
from deploy.server import MetricsServer
from streaming.errors import ConfigError, NotReadyError, StreamDPOError
from streaming.heartbeat import Beats, Heartbeat, beats
from streaming.log import open_log
from streaming.log.protocol import Log
from streaming.metrics import Metrics

if TYPE_CHECKING:
    from streaming.scoring import Pricing


@dataclass(frozen=True)
class Process:
    """One process of a run. Roles of a further policy carry its name: `learner.b`, `selector.b`."""

    role: str
    index: int

    @property
    def kind(self) -> str:
        """What it does, whatever the policy."""
        return self.role.partition(".")[0]

    @property
    def policy(self) -> str | None:
        """Whose role it is; None for the run's own policy and for what all policies share."""
        return self.role.partition(".")[2] or None

    @property
    def role_id(self) -> str:
        return f"{self.role}-{self.index}"


class Role(Protocol):
    """What every role is."""

    def run(self, stop: threading.Event) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a role is built from."""

    config: RunConfig
    process: Process
    log: Log
    metrics: Metrics
    heartbeat: Heartbeat
    history: Beats  # what roles had told before this start of the run

    @property
    def directory(self) -> Path:
        return run_directory(self.config)

    @property
    def policy(self) -> Policy:
        """Whose role it is."""
        return policy_of(self.config, self.process)


def processes(config: RunConfig) -> list[Process]:
    """Every process of a run, the quickest to start last: what is slow begins first."""
    policies = config.every_policy
    return [
        *(Process("generator", i) for i in range(config.generation.num_generators)),
        *(Process(role_of("learner", one), rank) for one in policies for rank in range(one.learner.world_size)),
        *(Process("scorer", i) for i in range(config.scoring.num_processes)),
        *(Process(role_of("selector", one), i) for one in policies for i in range(one.selection.num_processes)),
        Process("scheduler", 0),
    ]


ELASTIC = frozenset({"generator", "scorer", "selector"})
"""Kinds that share their work by consumer groups: more of them may join a run, and leave it, at any time."""


def may_join(config: RunConfig, process: Process) -> bool:
    """Whether this run has such a process, or takes one more."""
    every = processes(config)
    is_known_role = any(process.role == one.role for one in every)
    return process in every or (process.kind in ELASTIC and is_known_role and process.index >= 0)


def role_of(kind: str, policy: Policy) -> str:
    """The role's name: its kind, and whose it is where it is not the run's own policy's."""
    return kind if policy.is_sampled else f"{kind}.{policy.name}"


def policy_of(config: RunConfig, process: Process) -> Policy:
    """The policy that a process works for; the run's own for what all policies share."""
    name = process.policy or config.policy
    return next(policy for policy in config.every_policy if policy.name == name)


def open_run_log(config: RunConfig, metrics: Metrics | None = None) -> Log:
    """The log of a run; made, with the run's directory, where it is not there yet."""
    directory = run_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    settings = config.log
    return open_log(
        log_url(settings.url, directory),
        run=config.name,
        max_record_bytes=settings.max_record_bytes,
        max_bytes=settings.max_bytes,
        blobs=settings.blobs or str(directory / "blobs"),
        max_blob_bytes=settings.max_blob_bytes,
        metrics=metrics,
        kafka=settings.kafka,
    )


def log_url(url: str, directory: Path) -> str:
    """A relative SQLite file lies in the run's directory, whatever the working directory is."""
    scheme, _, file = url.partition(":///")
    return f"{scheme}:///{directory / file}" if scheme == "sqlite" else url


def role_environment(config: RunConfig, role: str, *, has_gpu: bool) -> dict[str, str]:
    """Variables that libraries read when they are first imported."""
    process = Process(role, 0)
    threads = {
        "generator": config.generation.engine.num_threads,
        "learner": policy_of(config, process).learner.num_threads,
        "scorer": config.scoring.num_threads,
    }.get(process.kind, 1)
    environment = {
        "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the cores from the other roles
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns, and may hang, when a process with its threads forks
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not has_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return environment


def run_role(config: RunConfig, role: str, index: int, stop: threading.Event, *, history: Beats | None = None) -> None:
    """Be this role until `stop` or its own end. Raises what it failed of; its last beat says so too.

    `history`: what roles had told before this start of the run; by default whatever they have told by now.
    """
    process = Process(role, index)
    if not may_join(config, process):
        raise ConfigError(
            f"there is no {process.role_id} in this run",
            where="role",
            do=f"It has: {', '.join(known.role_id for known in processes(config))}; and further generators, scorers "
            "and selectors may join it.",
        )
    check_packages()
    metrics = Metrics(process.role)
    with (
        log_to_file(config, process.role_id),
        open_run_log(config, metrics) as log,
        _beating(config, process, log, metrics) as heartbeat,
    ):
        parts = Parts(config, process, log, metrics, heartbeat, beats(log) if history is None else history)
        BUILDERS[process.kind](parts).run(stop)


@contextmanager
def _beating(config: RunConfig, process: Process, log: Log, metrics: Metrics) -> Iterator[Heartbeat]:
    """The metrics' endpoint, and a heartbeat whose last word is how the role ended."""
    heartbeat = Heartbeat(log, metrics, role=process.role, index=process.index)
    try:
        with MetricsServer(
            metrics, lambda: heartbeat.state, host=config.metrics.host, port=port_of(config, process)
        ) as server:
            heartbeat.tell(metrics_address=server.address, at_once=True)
            yield heartbeat
    except BaseException as error:
        logging.getLogger(__name__).exception("%s failed", process.role_id)
        what = error.what if isinstance(error, StreamDPOError) else f"{type(error).__name__}: {error}"
        heartbeat.close(health="failed", message=what)
        raise
    heartbeat.close(health="stopped", message=heartbeat.state.message)


def port_of(config: RunConfig, process: Process) -> int | None:
    """The port of its metrics; None for any that is free, as for one that has joined."""
    every = processes(config)
    if config.metrics.port is None or process not in every:
        return None
    return config.metrics.port + every.index(process)


@contextmanager
def log_to_file(config: RunConfig, role_id: str) -> Iterator[None]:
    """What this process and its libraries log goes to RUN/logs/ROLE-ID.log."""
    path = log_path(config, role_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


def log_path(config: RunConfig, role_id: str) -> Path:
    """Where a role logs."""
    return run_directory(config) / "logs" / f"{role_id}.log"


def settings_of(config: RunConfig) -> str:
    """The settings as they travel to a process: JSON, so that nothing has to be unpickled."""
    return config.model_dump_json()


def settings_from(text: str) -> RunConfig:
    """The settings that `settings_of` wrote."""
    return RunConfig.model_validate(json.loads(text))


def _scheduler(parts: Parts) -> Role:
    from actors.issuer import Issuer
    from actors.prompts import read_eval_prompts, read_prompts
    from actors.scheduler import Prompts, Scheduler
    from deploy.forget import forgotten, without_forgotten

    config = parts.config
    issuer = Issuer(parts.log, parts.heartbeat)  # before the data are read: until its fence is known generators wait
    scheduler = Scheduler(
        parts.log,
        parts.metrics,
        parts.heartbeat,
        issuer,
        prompts=without_forgotten(
            Prompts(read_prompts(config.prompts), read_eval_prompts(config.prompts)), forgotten(parts.directory)
        ),
        config=config.scheduler,
        prompts_config=config.prompts,
        sampling=config.generation.sampling,
        policy=config.policy,
        history=parts.history,
    )
    return _WithBooks(scheduler, parts)


class _WithBooks:
    """The scheduler, and beside it the bookkeeper of every policy: the two that read all feedback."""

    def __init__(self, scheduler: Role, parts: Parts) -> None:
        self._scheduler = scheduler
        self._parts = parts

    def run(self, stop: threading.Event) -> None:
        from streaming.books import Bookkeeper

        policies = [policy.name for policy in self._parts.config.every_policy]
        with closing(Bookkeeper(self._parts.log, policies)):
            self._scheduler.run(stop)


def _generator(parts: Parts) -> Role:
    from actors.engine import start_engine
    from actors.generator import Generator
    from deploy.remote import weights_cache

    config = parts.config
    make_engine = functools.partial(
        start_engine, config.generation.engine, policy=config.policy, trust_remote_code=config.trust_remote_code
    )
    return Generator(
        parts.log,
        parts.metrics,
        parts.heartbeat,
        make_engine=make_engine,
        config=config.generation,
        policy=config.policy,
        model=fetched(config.model),
        cache=weights_cache(config, parts.log, parts.metrics),
    )


def _scorer(parts: Parts) -> Role:
    from streaming.rewards import build_rewards
    from streaming.scorer import Scorer

    config = parts.config
    return Scorer(
        parts.log,
        parts.metrics,
        parts.heartbeat,
        sources=build_rewards(config.rewards, config.scoring, trust_remote_code=config.trust_remote_code),
        pricing=references(config),
        config=config.scoring,
        policy=config.policy,
    )


def references(config: RunConfig) -> "list[Pricing]":
    """The references of all policies, each loaded once, that of the policy that samples first."""
    from streaming.reference import ReferenceModel
    from streaming.scoring import Pricing

    sharing: dict[tuple[Path, str], list[str]] = {}
    for policy in config.every_policy:
        # The learner's dtype: priced by other rounding, the first step's margins would not be 0.
        sharing.setdefault((fetched(policy.reference), policy.learner.dtype), []).append(policy.name)
    return [
        Pricing(
            ReferenceModel(
                directory,
                batch_tokens=config.scoring.batch_tokens,
                dtype=dtype,
                num_threads=config.scoring.num_threads,
                trust_remote_code=config.trust_remote_code,
            ),
            tuple(policies),
        )
        for (directory, dtype), policies in sharing.items()
    ]


def _selector(parts: Parts) -> Role:
    from streaming.selector import Selector

    policy = parts.policy
    return Selector(parts.log, parts.metrics, parts.heartbeat, config=policy.selection, policy=policy.name)


def _learner(parts: Parts) -> Role:
    from deploy.remote import remote_weights
    from learner.train import Learner

    config, policy = parts.config, parts.policy
    return Learner(
        parts.log,
        parts.metrics,
        parts.heartbeat,
        config=policy.learner,
        model=str(fetched(policy.model)),
        directory=parts.directory,
        policy=policy.name,
        trust_remote_code=config.trust_remote_code,
        history=parts.history,
        sampled_by=None if policy.is_sampled else config.policy,
        remote=remote_weights(config, policy),
    )


def fetched(model: str) -> Path:
    """The model's directory on this machine; a hub name is downloaded, or found in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except (OSError, ValueError) as cause:
        raise NotReadyError(
            f"cannot be downloaded: {cause}", where=model, do="Give a directory in Hugging Face format."
        ) from cause


BUILDERS: dict[str, Callable[[Parts], Role]] = {
    "scheduler": _scheduler,
    "generator": _generator,
    "scorer": _scorer,
    "selector": _selector,
    "learner": _learner,
}
