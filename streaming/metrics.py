"""What a role tells Prometheus, and its honest account of time.

One table, one registry and one port per process. Names get the prefix `streamdpo_`; labels come from closed
sets; versions are gauge values, never labels.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "streamdpo_"
State = Literal["busy", "waiting", "blocked", "updating"]
STATES: tuple[State, ...] = ("busy", "waiting", "blocked", "updating")


class Spec(NamedTuple):
    """One row of the table of metrics."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STALENESS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_MARGIN = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)

SPECS: dict[str, Spec] = {
    "role_seconds_total": Spec(Counter, "Seconds this role spent in each state since it started.", ("state",)),
    "beats_failed_total": Spec(Counter, "Heartbeats that the log refused; the next one follows."),
    "records_read_total": Spec(Counter, "Records this role read.", ("topic",)),
    "records_written_total": Spec(Counter, "Records this role wrote and saw acknowledged.", ("topic",)),
    "duplicates_total": Spec(Counter, "Records recognised by their id as already processed.", ("topic",)),
    "superseded_total": Spec(Counter, "Examples of a request of which another content was taken.", ("topic",)),
    "retries_total": Spec(Counter, "Batches processed again after a passing failure.", ("stage",)),
    "dead_letters_total": Spec(Counter, "Records that could not be processed.", ("stage",)),
    "lag_records": Spec(Gauge, "Records in this process's share of the topic that are not settled.", ("topic",)),
    "blobs_total": Spec(Counter, "Values beside the log, by what became of them.", ("action",)),
    "lease_renewals_failed_total": Spec(Counter, "Lease renewals that SQLite refused; the next one follows."),
    "log_in_flight_bytes": Spec(Gauge, "Bytes appended to Kafka and not acknowledged."),
    "log_producer_restarts_total": Spec(Counter, "Kafka producers replaced because they failed or never answered."),
    "endings_total": Spec(Counter, "Examples ended by this role.", ("ending", "reason")),
    # scheduler
    "requests_issued_total": Spec(Counter, "Prompt requests written.", ("purpose",)),
    "requests_outstanding": Spec(Gauge, "Prompt requests issued and not ended."),
    "heldout_reward": Spec(Gauge, "Mean reward of the newest complete held-out measurement."),
    # generator
    "requests_refused_total": Spec(Counter, "Prompt requests of a scheduler whose heir had taken over."),
    "candidates_total": Spec(Counter, "Candidates sampled.", ("finish_reason",)),
    "sampled_tokens_total": Spec(Counter, "Response tokens sampled."),
    "groups_in_flight": Spec(Gauge, "Groups that the engine is sampling."),
    "weights_epoch": Spec(Gauge, "Epoch of the weights in use."),
    "weights_number": Spec(Gauge, "Number of the weight version in use."),
    "weight_update_seconds": Spec(Histogram, "Time from pause to resume of a weight update.", (), _SECONDS),
    "weight_updates_total": Spec(Counter, "Weight updates by outcome.", ("outcome",)),
    "weight_fetches_total": Spec(Counter, "Weight versions brought from a URL, and tries, by outcome.", ("outcome",)),
    "parity_max_abs_difference": Spec(Gauge, "Largest log-prob difference to the learner at the newest probe (nats)."),
    # scorer
    "rewards_missing_total": Spec(Counter, "Rewards that a source did not give.", ("source", "reason")),
    "reward_mean": Spec(Gauge, "Mean reward over the newest batch.", ("source",)),
    "reference_tokens_total": Spec(Counter, "Response tokens priced by the reference model."),
    # selector
    "routed_total": Spec(Counter, "Groups by route and reason.", ("route", "reason")),
    "margin": Spec(Histogram, "Margins of the pairs made.", ("kind",), _MARGIN),
    "margin_correlation": Spec(Gauge, "Correlation of external and implicit margin over the newest groups."),
    "rejected_not_worst_total": Spec(Counter, "DPO pairs whose rejected response is not the worst of its group."),
    # learner
    "steps_total": Spec(Counter, "Optimizer steps."),
    "examples_trained_total": Spec(Counter, "Examples that became a gradient.", ("route",)),
    "pairs_without_rating_total": Spec(Counter, "Pairs trained without the rating that the loss asks for."),
    "rating_gap_scale": Spec(Gauge, "Root mean square of the newest pairs' rating gaps (reward units)."),
    "trained_tokens_total": Spec(Counter, "Non-padding tokens forwarded and back-propagated."),
    "loss": Spec(Gauge, "Mean loss of the newest step."),
    "reward_accuracy": Spec(Gauge, "Share of the newest step's pairs whose implicit margin is positive."),
    "chosen_logprob": Spec(Gauge, "Mean summed log-prob of the chosen responses of the newest step (nats)."),
    "rejected_logprob": Spec(Gauge, "Mean summed log-prob of the rejected responses of the newest step (nats)."),
    "kl_to_reference": Spec(Gauge, "Mean of log pi - log pi_ref over the newest step's responses (nats)."),
    "gradient_norm": Spec(Gauge, "Gradient norm of the newest step, before clipping."),
    "learning_rate": Spec(Gauge, "Learning rate of the newest step."),
    "non_finite_steps_total": Spec(Counter, "Steps skipped because the loss or gradient was not finite."),
    "staleness_versions": Spec(Histogram, "Staleness of trained examples, in weight versions.", (), _STALENESS),
    "checkpoint_timestamp_seconds": Spec(Gauge, "Unix time of the newest durable checkpoint."),
    "published_timestamp_seconds": Spec(Gauge, "Unix time of the newest published weight version."),
}


class Metrics:
    """One process's metrics. Every series carries the label `role`, so dashboards need no job names."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.registry = CollectorRegistry()
        self._series: dict[str, Counter | Gauge | Histogram] = {}
        for name, spec in SPECS.items():
            labels = ("role", *spec.labels)
            if spec.kind is Histogram:
                made: Counter | Gauge | Histogram = Histogram(
                    PREFIX + name, spec.help, labels, registry=self.registry, buckets=spec.buckets
                )
            else:
                made = spec.kind(PREFIX + name, spec.help, labels, registry=self.registry)
            self._series[name] = made
        self.time = TimeAccount(self)

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        self._labelled(name, Counter, labels).inc(amount)  # type: ignore[union-attr]

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._labelled(name, Gauge, labels).set(value)  # type: ignore[union-attr]

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._labelled(name, Histogram, labels).observe(value)  # type: ignore[union-attr]

    def value(self, name: str, **labels: str) -> float:
        """The present value of a counter or gauge (0 before its first change)."""
        return self.registry.get_sample_value(PREFIX + name, {"role": self.role, **labels}) or 0.0

    def _labelled(self, name: str, kind: type, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        series = self._series[name]
        assert isinstance(series, kind), f"{name} is a {type(series).__name__}"
        return series.labels(role=self.role, **labels)


class TimeAccount:
    """Accounts every second of a role as busy, waiting for input, blocked by back-pressure, or updating weights.

    Exactly one state holds at any moment, so the four add up to the role's life. A role with work in flight
    (generator, scorer) calls `enter`; a role that works in order uses `with account.spend("busy")`.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._state: State = "waiting"
        self._since = time.monotonic()
        self._seconds: dict[str, float] = dict.fromkeys(STATES, 0.0)

    def enter(self, state: State) -> State:
        """Change the state and return the one before."""
        with self._lock:
            self._settle()
            before, self._state = self._state, state
            return before

    @contextmanager
    def spend(self, state: State) -> Iterator[None]:
        """In `state` inside the block, then back in the state before it."""
        before = self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds in each state so far."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = time.monotonic()
        spent, self._since = now - self._since, now
        self._seconds[self._state] += spent
        self._metrics.count("role_seconds_total", spent, state=self._state)
