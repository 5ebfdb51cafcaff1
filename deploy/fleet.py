"""A run's processes as Ray actors: started, watched, started again, stopped. Knows nothing of what they do.

started -> running -> returned
                   `-> failed -> (back-off) -> started again, or given up
"""

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deploy.config import RunConfig
from deploy.roles import ELASTIC, Process, log_path, processes, role_environment, run_role, settings_from, settings_of
from streaming.errors import ConfigError, NonFiniteError, NotReadyError, StreamDPOError, SupersededError
from streaming.heartbeat import Beats

STEADY_S = 60.0
"""A process that lived this long before it failed was no crash loop: its back-off starts anew."""

MAX_FAILURES = 5
"""Quick failures in a row after which starting again is no help."""

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
"""Doubles from the first to the last: a passing trouble (a full disk, a lost node) gets about a minute in all."""

OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Nothing large travels through Ray; its own default takes 30% of the memory."""

STOP_S = 120.0
"""Longest wait for the roles to stop by themselves: the learner writes a checkpoint first."""


REACH_S = 10.0
"""Longest wait for a cluster's port to answer."""


class Backoff:
    """How long to wait before a unit starts again. Values in, values out."""

    def __init__(self) -> None:
        self._failures = 0

    def failed(self, lived_s: float) -> float | None:
        """Seconds to wait; None where it has failed quickly too often."""
        self._failures = 1 if lived_s >= STEADY_S else self._failures + 1
        if self._failures >= MAX_FAILURES:
            return None
        return min(FIRST_BACKOFF_S * 2.0 ** (self._failures - 1), MAX_BACKOFF_S)


def is_hopeless(error: BaseException) -> bool:
    """Whether starting again cannot help, or harms.

    The settings, the data or the machine are wrong, the training diverged, or somebody else runs this run by now: two
    launchers that start their learner again and again would overtake each other for ever.
    """
    lost = NonFiniteError | SupersededError
    return isinstance(error, StreamDPOError) and (error.exit_code != 1 or isinstance(error, lost))


class RoleActor:
    """One role in a Ray worker process. `run` takes one thread, `stop` comes on another."""

    def __init__(self, settings: str, role: str, index: int) -> None:
        os.setpgrp()  # a signal to the launcher's whole group is for the launcher: it stops the roles in order
        self._settings = settings
        self._process = Process(role, index)
        self._stop = threading.Event()

    def meeting_point(self) -> dict[str, str]:
        """An address of this machine and a free port, where the learner's ranks meet; by torch's names."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(probe.getsockname()[1])}

    def run(self, history: Beats, folder: str, environment: dict[str, str], meeting_point: dict[str, str]) -> None:
        """Be the role. What it and its libraries print goes to its log file."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # for the engine's own processes
        os.environ.update(environment | meeting_point)
        if Path(folder).is_dir():
            os.chdir(folder)  # reward functions and relative hub caches are looked for where the person stands
        config = settings_from(self._settings)
        _print_to(log_path(config, self._process.role_id))
        faulthandler.register(signal.SIGUSR1)  # `kill -USR1 PID` writes every thread's stack to the log file
        run_role(config, self._process.role, self._process.index, self._stop, history=history)

    def stop(self) -> None:
        """Ask the role to end cleanly."""
        self._stop.set()


def _print_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


class Ended(NamedTuple):
    """A process returned (error is None) or failed; after a failure it starts again in `again_s`, or never."""

    process: Process
    error: BaseException | None
    again_s: float | None


@dataclass
class Unit:
    """Processes that start together and, because they talk to each other, start again together."""

    processes: list[Process]
    backoff: Backoff = field(default_factory=Backoff)
    actors: list[Any] = field(default_factory=list)
    running: dict[Any, Process] = field(default_factory=dict)  # by the reference of its `run` call
    started_s: float = 0.0
    again_at_s: float | None = None


class Fleet:
    """Every process of a run. `poll` tells what ended; failed units start again by themselves."""

    def __init__(self, config: RunConfig, *, history: Beats) -> None:
        """`history`: what roles had told before this start of the run."""
        import ray

        self._ray = ray
        self._config = config
        self._history = history
        every = processes(config)
        self._units = [Unit(together) for together in in_units(every)]
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        self._gpus_of = gpus_by_role(config, num_gpus)
        for unit in self._units:
            self._start(unit)

    def poll(self, timeout_s: float) -> list[Ended]:
        """What ended since the last call; waits up to `timeout_s` for the first. Starts again what is due."""
        for unit in self._units:
            if unit.again_at_s is not None and time.monotonic() >= unit.again_at_s:
                self._start(unit)
        references = [reference for unit in self._units for reference in unit.running]
        if not references:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(references, num_returns=1, timeout=timeout_s)
        return [
            self._ended(unit, reference) for unit in self._units for reference in ready if reference in unit.running
        ]

    def stop(self, hurry: threading.Event) -> list[Ended]:
        """Ask every process to end, and wait for them. `hurry` kills what is left. Returns what did not end well."""
        for unit in self._units:
            unit.again_at_s = None
            for actor in unit.actors:
                actor.stop.remote()
        left = {reference: process for unit in self._units for reference, process in unit.running.items()}
        ended: list[Ended] = []
        until_s = time.monotonic() + STOP_S
        while left and not hurry.is_set() and time.monotonic() < until_s:
            ready, _ = self._ray.wait(list(left), num_returns=1, timeout=0.2)
            ended += [Ended(left.pop(reference), self._error_of(reference), None) for reference in ready]
        ended += [Ended(process, TimeoutError("it did not stop and was killed"), None) for process in left.values()]
        for unit in self._units:
            self._kill(unit)
        return [one for one in ended if one.error is not None]

    def _start(self, unit: Unit) -> None:
        unit.again_at_s = None
        unit.started_s = time.monotonic()
        unit.actors = [self._actor(process) for process in unit.processes]
        environments = [self._environment(process) for process in unit.processes]
        meeting_point: Any = {}
        if unit.processes[0].kind == "learner":
            # Not waited for here: where Ray has no room for the learner yet that may take for ever, and where the
            # learner dies first, `run` fails of it as of anything else.
            meeting_point = unit.actors[0].meeting_point.remote()
            for process, environment in zip(unit.processes, environments, strict=True):
                environment |= _rank_environment(process.index, len(unit.processes))
        unit.running = {
            actor.run.remote(self._history, str(Path.cwd()), environment, meeting_point): process
            for actor, process, environment in zip(unit.actors, unit.processes, environments, strict=True)
        }

    def _actor(self, process: Process) -> Any:
        # Two threads: `stop` must come through while `run` runs. No CPUs: the roles share the machine's.
        options = {"num_cpus": 0, "num_gpus": self._gpus_of.get(process.kind, 0), "max_concurrency": 2}
        # Set before the worker starts, because importing torch reads them; and where a person's modules are found.
        variables = self._environment(process) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        remote = self._ray.remote(RoleActor).options(
            **options,
            max_restarts=0,
            runtime_env={"env_vars": variables},
            name=None,
            scheduling_strategy=self._place(process),
        )
        return remote.remote(settings_of(self._config), process.role, process.index)

    def _place(self, process: Process) -> Any:
        """Where a process starts: what shares its work lies over the nodes in turn, as far as they live.

        Where it needs a GPU, Ray spreads it by what is free. Of actors that need nothing, Ray's SPREAD (and a soft
        affinity) puts several on one node.
        """
        if process.kind not in ELASTIC:
            return "DEFAULT"
        if self._gpus_of.get(process.kind):
            return "SPREAD"
        nodes = sorted(node["NodeID"] for node in self._ray.nodes() if node["Alive"])
        node = nodes[turn(process, processes(self._config)) % len(nodes)]
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    def _environment(self, process: Process) -> dict[str, str]:
        has_gpu = bool(self._gpus_of.get(process.kind))
        return role_environment(self._config, process.role, has_gpu=has_gpu)

    def _ended(self, unit: Unit, reference: Any) -> Ended:
        process = unit.running.pop(reference)
        error = self._error_of(reference)
        if error is None:
            return Ended(process, None, None)
        self._kill(unit)
        wait_s = None if is_hopeless(error) else unit.backoff.failed(time.monotonic() - unit.started_s)
        if wait_s is not None:
            unit.again_at_s = time.monotonic() + wait_s
        return Ended(process, error, wait_s)

    def _error_of(self, reference: Any) -> BaseException | None:
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # of an exception that the role raised; a dead process has none
            return cause if isinstance(cause, BaseException) else error
        return None

    def _kill(self, unit: Unit) -> None:
        for actor in unit.actors:
            self._ray.kill(actor)
        unit.actors, unit.running = [], {}


def in_units(every: Sequence[Process]) -> list[list[Process]]:
    """The ranks of a learner start together, everything else alone, in the order given."""
    units: dict[str, list[Process]] = {}
    for process in every:
        units.setdefault(process.role if process.kind == "learner" else process.role_id, []).append(process)
    return list(units.values())


def turn(process: Process, every: Sequence[Process]) -> int:
    """Which in turn gets the next node, among those that share their work."""
    return [one for one in every if one.kind in ELASTIC].index(process)


def _rank_environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # Ray shows each rank only its own device
        "WORLD_SIZE": str(world_size),
    }


def num_gpus_needed(config: RunConfig) -> int:
    return config.generation.num_generators + sum(policy.learner.world_size for policy in config.every_policy)


def gpus_by_role(config: RunConfig, num_gpus: int) -> dict[str, int]:
    """A GPU for each generator and rank where there are any, and one for the scorer where one is left.

    Raises NotReadyError where there are some, but too few.
    """
    needed = num_gpus_needed(config)
    if num_gpus == 0:
        return {}
    if num_gpus < needed:
        raise NotReadyError(
            f"{needed} GPUs are needed (one per generator and rank), there are {num_gpus}",
            where="generation.num_generators, learner.world_size",
            do="Lower one of them, or set RAY_ADDRESS to a cluster that has more.",
        )
    return {"generator": 1, "learner": 1, "scorer": int(num_gpus > needed)}


@contextmanager
def connected_ray(config: RunConfig) -> Iterator[None]:
    """A local Ray, or the cluster at RAY_ADDRESS. Raises ConfigError where the log cannot be shared by its nodes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _reach(address)
        if has_ray_token():  # a driver of Ray 2.60 shows its token to a cluster only where this says so
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    local = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with _deaf_children():
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as cause:
        raise _no_ray(address, f"Ray does not start: {cause}") from cause
    try:
        refuse_shared_file(config.log.url, num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()))
        yield
    finally:
        ray.shutdown()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started inside the block never receive SIGTERM, for they inherit what this thread blocks.

    Ray's daemons stand in our process group: a `timeout` or a supervisor that signals the whole group would end them
    before the learner has written its checkpoint. They still die with us, and by `ray.shutdown`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which exits at once
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def refuse_shared_file(url: str, *, num_nodes: int) -> None:
    """A SQLite log is a file of one machine. Raises ConfigError where roles may land on several."""
    if num_nodes > 1 and url.startswith("sqlite:"):
        raise ConfigError(
            f"{url} is a file, but the Ray cluster has {num_nodes} nodes",
            where="log.url",
            do="A SQLite log is for one machine: unset RAY_ADDRESS, or take a cluster of one node.",
        )


def has_ray_token() -> bool:
    """Whether this person has a token for Ray clusters, wherever Ray itself looks for one."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _reach(address: str) -> None:
    """Ray itself tries an address that nobody listens on for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as cause:
        raise _no_ray(address, f"nobody answers there: {cause}") from cause


def _no_ray(address: str | None, what: str) -> NotReadyError:
    if address is None:
        return NotReadyError(what, where="ray", do="See RUN/logs/launcher.log; free memory and /tmp, then run again.")
    return NotReadyError(
        what,
        where=f"RAY_ADDRESS={address}",
        do="Mend RAY_ADDRESS, or unset it to run on this machine. A cluster with a token needs it in RAY_AUTH_TOKEN.",
    )
