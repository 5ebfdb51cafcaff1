"""The main job on a tiny model that it trains itself: real vLLM, Ray, DeepSpeed and the log, no network, no GPU.

base model (cached) -> a run like any other (runs/demo/run-N) -> held-out reward before and after -> report
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.config import RunConfig, load_config, run_directory
from deploy.demo_task import NUM_HELDOUT, base_model, write_prompts
from streaming.evaluation import Measurement, merit

FOLDER = Path("runs/demo")
TARGET = 0.95
"""Held-out reward at which the demo ends."""

MIN_RISE = 0.3
"""Rise of the held-out reward below which the demo has failed."""

MAX_MINUTES = 3.5
"""Limit of the loop, so that the whole demo stays under six minutes on two cores."""


def settings(model: Path, train: Path, heldout: Path, *, name: str) -> dict[str, Any]:
    """The demo's run, as its YAML file says it: what a person would write for a model of their own."""
    return {
        "name": name,
        "model": str(model),
        "directory": ".",
        "prompts": {"path": str(train), "eval_path": str(heldout), "max_eval_prompts": NUM_HELDOUT},
        "rewards": [{"name": "correct", "function": "deploy.demo_task:correct"}],
        "generation": {
            "concurrency": 64,
            "sampling": {"num_candidates": 2, "max_tokens": 6},
            "engine": {"max_model_len": 32, "num_threads": 1, "kv_cache_bytes": 64 * 1024 * 1024},
        },
        "scheduler": {"pipeline_depth": 160, "eval_every": 3},
        "scoring": {"num_threads": 1},
        "selection": {"sft_floor": 1.0},
        "learner": {
            "num_threads": 1,
            "max_steps": 200,
            "loss": {"beta": 0.1, "nll_weight": 1.0},
            "optimizer": {"learning_rate": 4.0e-4, "warmup_steps": 5, "schedule": "cosine"},
            "batch": {"batch_size": 48},
            "checkpoint": {"every_steps": 25},
            "publish": {"sync_every": 2},
        },
        "stop": {"heldout_reward": TARGET, "max_minutes": MAX_MINUTES},
    }


def prepare(folder: Path) -> RunConfig:
    """Train or find the base model, and write the settings of a new run under `folder`."""
    started_s = time.monotonic()
    model = base_model(folder.resolve(), report=print)
    print(f"base model: ready after {time.monotonic() - started_s:.0f} s")
    train, heldout = write_prompts(folder.resolve() / "prompts")
    numbers = [int(path.name.removeprefix("run-")) for path in folder.glob("run-*") if path.name[4:].isdecimal()]
    directory = folder / f"run-{max(numbers, default=0) + 1}"
    directory.mkdir()
    path = directory / "demo.yaml"
    values = settings(model, train, heldout, name=f"demo-{directory.name}")
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    print(f"settings: {path}")
    return load_config(path)


def run_demo(folder: Path = FOLDER) -> int:
    """Run it and say what came of it; 0 where the held-out reward rose by at least MIN_RISE, 1 where it did not."""
    from deploy.check import preflight
    from deploy.launcher import BY_SIGNAL, launch
    from deploy.live import opened_view
    from deploy.report import write_report

    config = prepare(folder)
    preflight(config)
    with opened_view() as view:
        outcome = launch(config, view)
    print(f"\n{outcome.reason} after {outcome.elapsed_s:.0f} s")
    rise = describe(outcome.measured, run_directory(config))
    print(f"report:  {write_report(run_directory(config))}")
    if outcome.reason == BY_SIGNAL:
        print("stopped: before it was decided whether the held-out reward rises enough")
        return 1
    if rise is None or rise < MIN_RISE:
        print(f"FAILED: the held-out reward had to rise by {MIN_RISE:g}")
        return 1
    print(f"passed:  the held-out reward rose by {rise:.3f} (at least {MIN_RISE:g} was asked for)")
    return 0


def describe(measured: Sequence[Measurement], directory: Path) -> float | None:
    """Print before, after and best; the rise from before to after, None where one of them was not measured."""
    if len(measured) < 2:
        print(f"held-out reward: only {len(measured)} complete measurement")
        return None
    before, after = measured[0], measured[-1]
    best = max(measured, key=merit)
    for name, one, place in (
        ("before", before, ""),
        ("after", after, ""),
        ("best", best, directory / "best"),
    ):
        print(f"{name + ':':8} held-out reward {one.mean:.3f} over {one.count} samples, version {one.version}  {place}")
    print(f"last:    the newest version, trained a little further than any measurement  {directory / 'last'}")
    return after.mean - before.mean
