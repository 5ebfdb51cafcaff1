"""What the launcher sees in the log: measurements, whose best version it keeps, every role's state, missing rewards."""

from collections import Counter

from deploy.config import RunConfig, run_directory
from deploy.fleet import Ended
from deploy.live import Progress, View, eta
from deploy.promotion import fetch_and_promote, holds, promote, version_directory
from deploy.remote import remote_weights
from deploy.roles import log_path, processes
from deploy.status import Status, read_status
from deploy.summary import Rounds
from streaming import topics
from streaming.errors import StreamDPOError
from streaming.evaluation import Measurement, best_of, newest_of
from streaming.heartbeat import role_states
from streaming.history import decoded
from streaming.log.protocol import Entry, Log
from streaming.readable import readable
from streaming.records import Feedback, Version, WeightVersion

WARN_AFTER = 20
"""Endings before a share of them means anything."""

WARN_SHARE = 0.2
"""Share of prompts without any reward above which a person is told: some answers cannot be judged, most can."""

MAX_SHOWN = 3
"""Newest earlier measurements that are told at a start: a resumed run does not repeat its whole history."""


class Watch:
    """What the launcher sees in the log: measurements, whose best version it keeps, and every role's state."""

    def __init__(self, config: RunConfig, log: Log, view: View) -> None:
        self._config = config
        self._log = log
        self._view = view
        self._directory = run_directory(config)
        self._began = log.end_offsets(topics.FEEDBACK.name)  # before them all is of earlier starts
        self._feedback = log.assign(log.begin_offsets(topics.FEEDBACK.name))
        self._rounds = Rounds()
        self._endings: Counter[str] = Counter()  # of this start, by reason; an ending without one by itself
        self._has_warned = False
        self._kept: Measurement | None = None
        self._gone: set[tuple[str, Version]] = set()  # what could not be kept, told once
        self._first_shares: dict[str, float] = {}
        self._learning = {p.role_id for p in processes(config) if p.policy and p.kind == "learner" and not p.index}
        self._over: str | None = None  # the data have ended; further policies may still learn from what is there
        self.broken: list[StreamDPOError] = []
        """Why further policies could not go on: the run went on without them."""

        self.measured: list[Measurement] = []
        self.best: Measurement | None = None
        self.newest: Measurement | None = None

    def look(self, elapsed_s: float) -> None:
        """Read on, keep a new best version, show it all."""
        if self._read_feedback():
            self._tell_measurements()
            self._keep_best()
        status = read_status(self._log, self._config)
        remaining = eta(self._shares_done(status, elapsed_s), elapsed_s)
        self._view.update(Progress(self._config.name, status, elapsed_s, remaining, self.best, self.newest))

    def _tell_measurements(self) -> None:
        before = set(self.measured)
        self.measured = [one.measured for one in self._rounds.complete()]
        self.newest, self.best = newest_of(self.measured), best_of(self.measured)
        fresh = [one for one in self.measured if one not in before]
        for one in fresh if before else fresh[-MAX_SHOWN:]:
            self._view.event(f"held-out reward {one.mean:.3f} (version {one.version}, {one.count} prompts)")

    def ended(self, ended: Ended) -> str | None:
        """A process ended: why the run is over with it; None where it is not. Raises what cannot be mended."""
        role_id = ended.process.role_id
        if ended.error is not None:
            self._failed(ended)
        else:
            state = role_states(self._log).get(role_id)
            message = state.message if state else ""
            self._view.event(f"{role_id} is done: {message or 'nothing left to do'}")
            self._learning.discard(role_id)
            if ended.process.role == "scheduler":
                self._over = self._reason(message)
                if message != "end of data":
                    return self._over
        return self._over if not self._learning else None

    def _failed(self, ended: Ended) -> None:
        """Tell of it; raise what cannot be mended, unless it is a further policy's: the others go on without that."""
        role_id = ended.process.role_id
        text = str(ended.error).strip()
        if ended.again_s is not None:
            first_line = text.splitlines()[0] if text else type(ended.error).__name__
            self._view.event(f"{role_id} failed: {first_line}; starting it again in {ended.again_s:g} s")
            return
        error = self._explained(ended)
        if ended.process.policy is None:
            raise error
        self.broken.append(error)
        self._view.event(f"{role_id} cannot go on, the other policies do: {error}")
        self._learning -= {f"learner.{ended.process.policy}-0"}

    def keep_last(self) -> None:
        """The newest published version becomes RUN/last; that of a further policy RUN/last.POLICY."""
        newest = readable(WeightVersion, self._log.newest(topics.WEIGHTS.name).values())
        for policy in self._config.every_policy:
            own = [weights.version for weights in newest if weights.policy == policy.name]
            if own:
                self._promote(policy.name, max(own), "last" if policy.is_sampled else f"last.{policy.name}")

    def _reason(self, message: str) -> str:
        learner = role_states(self._log).get("learner-0")
        if message == "learner stopped" and learner is not None and learner.message == "max_steps":
            return f"the learner has taken its {self._config.learner.max_steps} steps"
        return message or "the scheduler is done"

    def _explained(self, ended: Ended) -> StreamDPOError:
        if isinstance(ended.error, StreamDPOError):
            return ended.error
        return StreamDPOError(
            f"{ended.process.role_id} failed again and again: {type(ended.error).__name__}: {ended.error}",
            where=str(log_path(self._config, ended.process.role_id)),
            do="Read the end of this file. When it is mended, the same command goes on where the run stopped.",
        )

    def _read_feedback(self) -> bool:
        """Whether anything was evaluated since the last look."""
        num_evaluated = 0
        while heard := self._feedback.read(max_records=1024, timeout_s=0):
            for entry, one in decoded(Feedback, heard):
                if one.ending == "evaluated":
                    self._rounds.add(one)
                    num_evaluated += 1
                elif self._is_of_this_start(entry) and self._is_pace(one):
                    self._endings[one.reason or one.ending] += 1
        self._warn_of_missing_rewards()
        return num_evaluated > 0

    def _is_of_this_start(self, entry: Entry) -> bool:
        return entry.offset >= self._began[entry.topic, entry.partition]

    def _is_pace(self, one: Feedback) -> bool:
        """Whether this freed a slot."""
        is_training = one.ending in ("consumed", "dropped") and one.round is None
        return is_training and one.policy == self._config.policy

    def _warn_of_missing_rewards(self) -> None:
        """A reward that fails is a missing reward, and the run goes on: so somebody must say that it does."""
        missing, total = self._endings["reward_missing"], self._endings.total()
        if not self._has_warned and total >= WARN_AFTER and missing > WARN_SHARE * total:
            self._has_warned = True
            path = log_path(self._config, "scorer-0")
            self._view.event(f"warning: {missing} of {total} prompts have no reward and teach nothing; see {path}")

    def _keep_best(self) -> None:
        if (
            self.best is not None
            and self.best != self._kept
            and self._promote(self._config.policy, self.best.version, "best")
        ):
            self._kept = self.best

    def _promote(self, policy: str, version: Version, name: str) -> bool:
        source = version_directory(self._directory, policy, version)
        if holds(self._directory / name, version) or promote(source, self._directory / name):
            return True
        remote = next(remote_weights(self._config, one) for one in self._config.every_policy if one.name == policy)
        if remote is not None and fetch_and_promote(remote, version, self._directory / name):
            return True
        if (name, version) not in self._gone:
            self._gone.add((name, version))
            self._view.event(f"version {version} is no longer on disk: {name} stays as it is")
        return False

    def _shares_done(self, status: Status, elapsed_s: float) -> dict[str, tuple[float, float]]:
        """How far each limit is, at the first look that knew of it and now."""
        now: dict[str, float] = {}
        step, issued, total = (
            status.number(role, name)
            for role, name in (("learner", "step"), ("scheduler", "issued"), ("scheduler", "total"))
        )
        if self._config.learner.max_steps and step is not None:
            now["steps"] = step / self._config.learner.max_steps
        if issued is not None and total:
            now["data"] = issued / total
        if self._config.stop.max_minutes:
            now["minutes"] = elapsed_s / (60 * self._config.stop.max_minutes)
            self._first_shares.setdefault("minutes", 0.0)
        return {limit: (self._first_shares.setdefault(limit, share), share) for limit, share in now.items()}
