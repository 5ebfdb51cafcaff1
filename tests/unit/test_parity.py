import math

import msgspec
import pytest

from actors.parity import check, max_difference
from streaming.errors import WeightsError
from streaming.metrics import Metrics
from streaming.records import Probe, Version
from tests.scripted_engine import PROBE, Script, ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    """Gives -1 nat to everything; takes 64 tokens."""
    return ScriptedEngine(Script(), Version(1, 0))


@pytest.mark.parametrize(("logprobs", "difference"), [([-1.0, -1.0], 0.0), ([-1.0, -1.25], 0.25), ([-0.5, -1.25], 0.5)])
async def test_the_largest_difference_counts(engine: ScriptedEngine, logprobs: list[float], difference: float) -> None:
    assert await max_difference(engine, msgspec.structs.replace(PROBE, logprobs=logprobs)) == difference


async def test_what_the_engine_has_no_room_for_is_not_compared(engine: ScriptedEngine) -> None:
    probe = Probe(prompt_tokens=[3] * 60, response_tokens=[4] * 9, logprobs=[-1.0] * 3 + [-7.0] * 6)
    assert await max_difference(engine, probe) == 0.0
    too_long = Probe(prompt_tokens=[3] * 70, response_tokens=[4], logprobs=[-7.0])
    assert await max_difference(engine, too_long) == 0.0


@pytest.mark.parametrize("logprob", [-1.2, math.nan, -math.inf])
async def test_a_difference_above_the_tolerance_is_an_error_and_seen(engine: ScriptedEngine, logprob: float) -> None:
    metrics = Metrics("generator")
    probe = msgspec.structs.replace(PROBE, logprobs=[-1.0, logprob])
    with pytest.raises(WeightsError, match="differ from the learner's"):
        await check(engine, probe, metrics, tolerance=0.1)
    assert not metrics.value("parity_max_abs_difference") <= 0.1


async def test_a_difference_within_the_tolerance_is_shown(engine: ScriptedEngine) -> None:
    metrics = Metrics("generator")
    await check(engine, msgspec.structs.replace(PROBE, logprobs=[-1.0, -1.0625]), metrics, tolerance=0.1)
    assert metrics.value("parity_max_abs_difference") == 0.0625
