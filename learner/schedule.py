"""The learning rate of a step: warm-up, then constant, cosine or linear. Values in, value out."""

import math

from learner.config import OptimizerConfig


def learning_rate(step: int, settings: OptimizerConfig, max_steps: int | None) -> float:
    """The learning rate of step number `step`, counted from 0.

    Rises in equal parts over the warm-up, whose last step already runs at the peak; falls to `final_ratio` of the
    peak at `max_steps` (without `max_steps` there is nothing to fall towards, and it stays).
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant" or max_steps is None:
        return settings.learning_rate
    progress = min(1.0, (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps))
    left = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.final_ratio + (1 - settings.final_ratio) * left)
