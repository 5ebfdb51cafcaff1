"""A run of the demo's task that is measured: what the benchmarks `loop` and `busy` share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import demo
from deploy.config import RunConfig, load_config
from deploy.demo_task import base_model, write_prompts
from deploy.launcher import Outcome, launch
from deploy.roles import open_run_log
from streaming import topics
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.records import Group, Version, decode

CACHE = Path("runs/demo")
"""The demo's base model is used where it is there already."""


class Quiet:
    """A view that shows nothing."""

    def update(self, progress: object) -> None:
        """Nobody watches a benchmark."""

    def event(self, text: str) -> None:
        print(f"  {text}", flush=True)


@dataclass
class Accounts:
    """Every role's seconds by state, from the first training step to the last look before the end."""

    first: dict[str, dict[str, float]]
    last: dict[str, dict[str, float]]

    def shares(self) -> dict[str, dict[str, float]]:
        """Per role, the share of its time in each state."""
        found = {}
        for role_id, last in self.last.items():
            spent = {state: last[state] - self.first.get(role_id, {}).get(state, 0.0) for state in last}
            found[role_id] = {state: seconds / max(sum(spent.values()), 1e-9) for state, seconds in spent.items()}
        return found


def prepare(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """The demo's settings, changed at dotted paths, for a run in `folder`."""
    import yaml

    model = base_model(CACHE.resolve(), report=print)
    train, heldout = write_prompts(CACHE.resolve() / "prompts")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(demo.settings(model, train, heldout, name="bench")))
    return load_config(path, [f"{key}={value}" for key, value in changes.items()])


def measured_run(config: RunConfig) -> tuple[Outcome, Accounts]:
    """Run it to its end, and account for the roles' time from the learner's first step on."""
    accounts = Accounts({}, {})
    with _accounting(config, accounts):
        outcome = launch(config, Quiet())
    return outcome, accounts


@contextmanager
def _accounting(config: RunConfig, accounts: Accounts) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=_account, args=(config, accounts, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _account(config: RunConfig, accounts: Accounts, over: threading.Event) -> None:
    with open_run_log(config) as log:
        while not over.wait(0.5):
            states = role_states(log)
            learner = states.get("learner-0")
            if learner is None or learner.numbers.get("step", 0) < 1 or learner.health != "ready":
                continue
            now = {role_id: dict(state.seconds) for role_id, state in states.items()}
            accounts.first = accounts.first or now
            accounts.last = now


@dataclass(frozen=True)
class Reach:
    """What it took to reach a held-out reward."""

    samples: int
    seconds: float  # held-out evaluation left out


def reach(config: RunConfig, outcome: Outcome, target: float) -> Reach | None:
    """From the first group sampled to the first one of the version that reached `target`; None where none did.

    Samples are training candidates. While held-out prompts are sampled the engine is theirs, so that time is left
    out, as it is on the peer's side.
    """
    reached = next((one.version for one in outcome.measured if one.mean >= target), None)
    if reached is None:
        return None
    groups = sorted(_groups(config), key=lambda group: group.sampled_s)
    begin = groups[0].sampled_s
    end = min(group.sampled_s for group in groups if _newest_version(group) >= reached)
    rounds: dict[int, list[float]] = {}
    for group in groups:
        if group.request.round is not None and group.sampled_s <= end:
            rounds.setdefault(group.request.round, []).append(group.sampled_s)
    evaluating = sum(max(times) - min(times) for times in rounds.values())
    training = [group for group in groups if group.request.purpose == "train" and group.sampled_s <= end]
    samples = sum(len(group.candidates) for group in training)
    return Reach(samples, end - begin - evaluating)


def _newest_version(group: Group) -> Version:
    return max(span.version for candidate in group.candidates for span in candidate.spans)


def _groups(config: RunConfig) -> list[Group]:
    with open_run_log(config) as log:
        return [decode(Group, entry.value, where=entry.where) for entry in entries(log, topics.CANDIDATES.name)]
