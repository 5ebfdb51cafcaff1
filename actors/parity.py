"""Are the engine's log-probs the learner's? The built-in probe of every published version.

It catches what a checksum cannot: right bytes that were put into the wrong place, or into half of the places.
"""

import math

from actors.engine import Engine
from streaming.errors import WeightsError
from streaming.metrics import Metrics
from streaming.records import Probe


async def max_difference(engine: Engine, probe: Probe) -> float:
    """The largest difference, in nats, between what engine and learner give to a token of the probe.

    What is beyond the engine's longest sequence is not compared.
    """
    room = engine.max_model_len - 1 - len(probe.prompt_tokens)
    response = probe.response_tokens[: max(0, room)]
    if not response:
        return 0.0
    found = await engine.logprobs(probe.prompt_tokens, response)
    differences = [abs(ours - theirs) for ours, theirs in zip(found, probe.logprobs[: len(found)], strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)  # max() may pass over a NaN


async def check(engine: Engine, probe: Probe, metrics: Metrics, *, tolerance: float) -> None:
    """Show `max_difference` as a metric; raises WeightsError where it is above `tolerance`, or not a number."""
    difference = await max_difference(engine, probe)
    metrics.set("parity_max_abs_difference", difference)
    if not difference <= tolerance:
        raise WeightsError(
            f"the engine's log-probs differ from the learner's by {difference:.3g} nats, above {tolerance:g}",
            where=f"version {engine.version}",
            do="The engine is restarted. If it stays so, raise generation.engine.parity_tolerance for low precision.",
        )
