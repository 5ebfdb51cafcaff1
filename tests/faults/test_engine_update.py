"""Engines that fail: a version whose bytes are as announced and yet do not load, and processes that are killed."""

import asyncio
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from safetensors.torch import load_file, save_file

from actors.config import EngineConfig
from actors.engine import Engine, start_engine
from actors.update import announced, apply_weights
from streaming.errors import EngineError, WeightsError
from streaming.log.protocol import Log
from streaming.records import Sampling, Version, WeightVersion
from streaming.weights import write_manifest
from tests.builders import make_prompt, tokens_of
from tests.engine_process import READY
from tests.published import publish
from tests.scripted_engine import announce, running

KINDS = ["transformers", pytest.param("vllm", marks=pytest.mark.slow)]
FILE = "model.safetensors"

pytestmark = pytest.mark.fault("weights or engine broken")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def leave_out_a_tensor(path: Path) -> None:
    state = load_file(path)
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})


def transpose_a_tensor(path: Path) -> None:
    state = load_file(path)
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()
    save_file(state, path, metadata={"format": "pt"})


DAMAGES: list[Callable[[Path], None]] = [truncate, leave_out_a_tensor, transpose_a_tensor]


def publish_damaged(folder: Path, version: Version, damage: Callable[[Path], None]) -> WeightVersion:
    """Announced with the checksum of the damaged bytes."""
    weights = publish(folder, version, seed=5)
    directory = Path(weights.location)
    (directory / "manifest.json").unlink()
    damage(directory / FILE)
    return msgspec.structs.replace(weights, manifest_sha256=write_manifest(directory, version))


def make_engine(kind: str) -> Callable[[Path, Version], "asyncio.Future[Engine]"]:
    config = EngineConfig(kind=kind, num_threads=1)  # type: ignore[arg-type]
    return functools.partial(start_engine, config, policy="policy")  # type: ignore[return-value]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_transformers_engine_stays_paused_until_it_is_closed(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    await check_that_it_stays_paused("transformers", tmp_path, damage)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [transpose_a_tensor])
async def test_a_vllm_engine_stays_paused_until_it_is_closed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    await check_that_it_stays_paused("vllm", tmp_path, damage)


async def check_that_it_stays_paused(kind: str, folder: Path, damage: Callable[[Path], None]) -> None:
    first = publish(folder, Version(1, 0))
    damaged = publish_damaged(folder, Version(1, 1), damage)
    engine = await make_engine(kind)(Path(first.location), first.version)
    sampling = Sampling(max_tokens=400)
    request = functools.partial(engine.generate, tokens_of("1+1="), num_candidates=4, sampling=sampling)
    await request(request_id="warm")
    under_way = [asyncio.create_task(request(request_id=str(i))) for i in range(4)]
    await asyncio.wait(under_way, timeout=0.02)
    with pytest.raises(WeightsError, match=r"1\.1"):
        await apply_weights(engine, announced(damaged))
    finished = {task for task in under_way if task.done()}
    later = asyncio.create_task(request(request_id="later"))
    done, _ = await asyncio.wait([*under_way, later], timeout=0.5)
    assert done == finished
    assert engine.version == Version(1, 0)
    await engine.close()
    outcomes = await asyncio.gather(*under_way, later, return_exceptions=True)
    assert isinstance(outcomes[-1], EngineError)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_goes_on_from_the_version_before_and_takes_the_next_one(
    log: Log, tmp_path: Path, kind: str
) -> None:
    weights = publish(tmp_path, Version(1, 0))
    with running(log, tmp_path, make_engine(kind), patience_s=120) as run:
        announce(log, weights)
        run.until(lambda: run.heartbeat.state.health == "ready")
        long = Sampling(max_tokens=300)
        run.ask(*(make_prompt(i, sampling=long) for i in range(40)))
        run.until(lambda: run.heartbeat.state.numbers.get("in_flight"))
        announce(log, publish_damaged(tmp_path, Version(1, 1), leave_out_a_tensor))
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="failed") == 1)
        groups = run.groups(40)
        assert {span.version for group in groups for c in group.candidates for span in c.spans} == {Version(1, 0)}
        announce(log, publish(tmp_path, Version(1, 2), seed=2))
        run.until(lambda: run.heartbeat.state.version == Version(1, 2))
        assert run.heartbeat.state.health == "ready"
        assert run.metrics.value("parity_max_abs_difference") < 1e-4


@pytest.mark.slow
def test_an_engine_process_that_is_killed_is_replaced(log: Log, tmp_path: Path) -> None:
    with running(log, tmp_path, make_engine("vllm"), patience_s=120) as run:
        announce(log, publish(tmp_path, Version(1, 0)))
        run.until(lambda: run.heartbeat.state.health == "ready")
        run.ask(*(make_prompt(i, sampling=Sampling(max_tokens=300)) for i in range(40)))
        run.until(lambda: run.heartbeat.state.numbers.get("in_flight"))
        for process in psutil.Process().children():
            if process.name() == "VLLM::EngineCore":
                process.kill()
        groups = run.groups(40)
    assert {len(group.candidates) for group in groups} == {2}


@pytest.mark.slow
def test_a_generator_that_is_killed_leaves_no_engine_behind(tmp_path: Path) -> None:
    """Its engine went on without it, and on a GPU kept the memory that the next one needs."""
    weights = publish(tmp_path, Version(1, 0))
    command = [sys.executable, "-m", "tests.engine_process", weights.location]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert any(line.strip() == READY for line in holder.stdout)
        processes = psutil.Process(holder.pid).children(recursive=True)
        holder.kill()
        assert len(processes) >= 2
        assert not psutil.wait_procs(processes, timeout=20)[1]
