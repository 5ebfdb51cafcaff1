"""What a seed is about: how large the run is, and what happens to whom. Values only.

A role's first starts each have a fate; the start behind them has none, so every run comes to its end.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from deploy.config import RunConfig, load_config
from streaming import topics
from tests.light.fates import Fate
from tests.light.parts import JUDGES

POLICY = "policy"

HOUR_S = 3600.0

POISON = (
    b"",
    b"\xc1",  # no MessagePack
    b"\x81\xa6number",  # cut off
    b"\x81\xa6number\xa3two",  # of the wrong type
    b"\x82\xa6number\x01\xa9prompt_id\xa3\xff\xfe\xfd",  # invalid UTF-8
    b"\x91" * 2000,  # deeper than any record
)
"""Bytes that are no record of any topic."""

POISONED = topics.all_topics(POLICY)


class Timed(NamedTuple):
    """SIGKILL from outside, so long after the start."""

    after_s: float


Doom = Fate | Timed


class Jump(NamedTuple):
    """All clocks of the run are wrong by this from then on."""

    after_s: float
    by_s: float


class Poison(NamedTuple):
    """Bytes that somebody appends."""

    after_s: float
    topic: str
    value: bytes


class Plan(NamedTuple):
    """A seed's."""

    seed: int
    num_requests: int = 24
    num_held_out: int = 2
    num_generators: int = 1
    batch_size: int = 2
    checkpoint_every: int = 2
    max_staleness: int = 8
    dooms: Mapping[str, tuple[Doom, ...]] = {}  # role id -> of its first starts
    jumps: tuple[Jump, ...] = ()
    poison: tuple[Poison, ...] = ()

    @property
    def role_ids(self) -> list[str]:
        generators = [f"generator-{i}" for i in range(self.num_generators)]
        return [*generators, "learner-0", "scorer-0", "selector-0", "scheduler-0"]


LATEST = {"scheduler": 8, "learner": 120, "generator": 24, "scorer": 24, "selector": 24}
"""The moment at which a role dies at the latest: most of its starts come so far."""


def draw(seed: int) -> Plan:
    """Every role is killed one to three times, and about half of the other kinds of fault come."""
    chance = random.Random(f"light {seed}")
    bare = Plan(
        seed,
        num_generators=chance.randint(1, 2),
        batch_size=chance.randint(1, 3),
        checkpoint_every=chance.randint(1, 4),
        num_held_out=chance.choice([0, 2]),
    )
    dooms = {role_id: tuple(_doom(chance, role_id) for _ in range(chance.randint(1, 3))) for role_id in bare.role_ids}
    jumps = [Jump(chance.uniform(0.5, 4), chance.choice([-1, 1]) * HOUR_S) for _ in range(chance.choice([0, 1, 2]))]
    poison = [
        Poison(chance.uniform(0.5, 3), chance.choice(POISONED).name, chance.choice(POISON))
        for _ in range(chance.choice([0, 3]))
    ]
    return bare._replace(dooms=dooms, jumps=tuple(jumps), poison=tuple(poison))


def _doom(chance: random.Random, role_id: str) -> Doom:
    if chance.random() < 0.3:
        return Timed(chance.uniform(0.05, 1.5))
    return Fate("kill", chance.randint(1, LATEST[role_id.split("-")[0]]))


def settings(plan: Plan, folder: Path, model: Path, run: str) -> RunConfig:
    """The run's settings, as a person would write them, with its files beside them."""
    for name, num in (("prompts", 8), ("held-out", plan.num_held_out)):
        rows = [json.dumps({"prompt": f"{i}+{len(name)}="}) + "\n" for i in range(num)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "judges.py").write_text(JUDGES)
    text = {
        "name": run,
        "directory": str(folder),
        "model": str(model),
        "prompts": {"path": "prompts.jsonl"} | ({"eval_path": "held-out.jsonl"} if plan.num_held_out else {}),
        "rewards": [
            {"name": name, "function": f"judges.py:{name}", "weight": weight, "timeout_s": 0.2}
            for name, weight in (("judge", 1.0), ("liar", 0.5), ("sleeper", 0.5))
        ],
        "generation": {
            "concurrency": 4,
            "num_generators": plan.num_generators,
            "sampling": {"num_candidates": 2},
            "engine": {"kind": "transformers", "parity_tolerance": 1e9},  # its engine has no model to compare
        },
        "scheduler": {"pipeline_depth": 14, "max_requests": plan.num_requests, "eval_every": 4},
        "learner": {
            "num_threads": 1,
            "batch": {"batch_size": plan.batch_size, "max_staleness": plan.max_staleness},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
            "checkpoint": {"every_steps": plan.checkpoint_every},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(text))
    return load_config(folder / "run.yaml")
