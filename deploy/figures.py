"""The figures of the report: what each one draws, how to read it, and what to say where there is nothing yet."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from deploy import plots
from deploy.config import RunConfig
from deploy.plots import Ink, Series
from deploy.summary import HeldOut, Point, RunSummary
from streaming.metrics import STATES
from streaming.records import RoleState

TIME_INKS = (Ink.FIRST, Ink.QUIET, Ink.SECOND, Ink.THIRD)
"""Colours of busy, waiting, blocked, updating."""

TIME_WORDS = {
    "busy": "busy",
    "waiting": "waiting for input",
    "blocked": "blocked by back-pressure",
    "updating": "updating weights",
}


class Plot(NamedTuple):
    """A drawing with what a reader needs beside it; `svg` is None where there is nothing to draw yet."""

    title: str
    svg: Markup | None
    caption: str
    missing: str
    legend: tuple[tuple[Ink, str], ...] = ()


def figures(config: RunConfig, summary: RunSummary, states: Sequence[RoleState]) -> dict[str, Plot]:
    """Every figure of the page, by its name."""
    return {
        "held_out": _held_out(config, summary),
        "training": _training(summary),
        "external": _margins(
            summary, "external",
            "How much better the chosen response was than the rejected one, by the reward sources: bars further to the "
            "right are pairs with a clearer difference.",
        ),
        "implicit": _margins(
            summary, "implicit",
            "How much further the model that sampled them had moved from the reference towards the chosen response "
            "than towards the rejected one: pairs left of 0 are those that it had the wrong way round.",
        ),
        "staleness": _staleness(config, summary),
        "time": _time(states),
        "logprobs": _logprobs(summary),
        "loss": _loss(summary),
    }  # fmt: skip


def _held_out(config: RunConfig, summary: RunSummary) -> Plot:
    rounds = summary.held_out.complete()
    by_epoch: dict[int, list[Point]] = {}
    for one in rounds:
        by_epoch.setdefault(one.measured.version.epoch, []).append(_point(one))
    best = summary.held_out.best
    return Plot(
        "Held-out reward",
        plots.held_out(by_epoch, best=best and _point(best), target=config.stop.heldout_reward) if rounds else None,
        "Mean reward of the held-out prompts, one weight version per point; the band is one standard error either "
        "side, so a difference smaller than it means little.",
        "No held-out measurement is complete yet."
        if config.prompts.eval_path
        else "This run measures none: prompts.eval_path is not set.",
        ((Ink.FIRST, "mean with standard error"), (Ink.SECOND, "best version")),
    )


def _point(one: HeldOut) -> Point:
    return Point(one.measured.version.number, one.measured.mean, one.standard_error, one.measured.count)


def _training(summary: RunSummary) -> Plot:
    series = [
        Series(summary.training, Ink.FIRST, "one version"),
        Series(summary.mixed, Ink.SECOND, "spans an update", has_dots_only=True),
    ]
    return Plot(
        "Training reward",
        _trend("training", "Mean training reward by weight version", series, "weight version", "mean reward"),
        "Mean reward of all sampled candidates by the weight version that sampled them; candidates that span an update "
        "belong to no single version and stand apart, at the version that began them." + _per_point(series, "versions"),
        "No candidate has been scored yet.",
        _legend(series),
    )


def _margins(summary: RunSummary, kind: str, caption: str) -> Plot:
    values = summary.external if kind == "external" else summary.implicit
    units = "reward units" if kind == "external" else "nats"
    title = f"{kind.capitalize()} margin"
    return Plot(
        title,
        plots.histogram(kind, f"{title} of pairs", values, x_label=f"{kind} margin ({units})")
        if values.count
        else None,
        caption + (" The outermost bars hold everything beyond." if plots.has_tails(values) else ""),
        f"No pair with an {kind} margin has been made yet.",
    )


def _staleness(config: RunConfig, summary: RunSummary) -> Plot:
    bound = config.learner.batch.max_staleness
    counts = {"trained on": summary.trained_staleness, "dropped": summary.dropped_staleness}
    legend = [
        (ink, word) for ink, (word, one) in zip((Ink.FIRST, Ink.SECOND), counts.items(), strict=True) if one.count
    ]
    return Plot(
        "Staleness",
        plots.staleness(summary.trained_staleness, summary.dropped_staleness, bound=bound) if legend else None,
        "Weight versions between the sampling of an example's oldest token and the step that took it: further left is "
        f"fresher, and above {bound} an example is dropped.",
        "No staleness of an example that the learner took is recorded yet.",
        tuple(legend),
    )


def _time(states: Sequence[RoleState]) -> Plot:
    rows = [bar for state in states if (bar := _bar(state)) is not None]
    return Plot(
        "Where the time goes",
        plots.time_account(rows, TIME_INKS) if rows else None,
        "Every second of a role's life is one of four: the role with the most blue is the bottleneck, and grey is time "
        "it spent idle for want of input.",
        "No role has started yet.",
        tuple((ink, TIME_WORDS[state]) for ink, state in zip(TIME_INKS, STATES, strict=True)),
    )


def _bar(state: RoleState) -> plots.Bar | None:
    total = sum(state.seconds.get(one, 0.0) for one in STATES)
    return plots.Bar(state.role_id, [state.seconds.get(one, 0.0) / total for one in STATES]) if total > 0 else None


def _logprobs(summary: RunSummary) -> Plot:
    series = [
        Series(summary.chosen, Ink.FIRST, "chosen"),
        Series(summary.rejected, Ink.SECOND, "rejected"),
    ]
    return Plot(
        "Log-probs of chosen and rejected",
        _trend("logprobs", "Log-probs of chosen and rejected by learner step", series, "learner step",
               "mean log-prob of a response (nats)"),
        "Log-probs under the policy at the step that took the pair, summed over a response: the gap should open, and "
        "both lines falling together means that probability leaves the pairs altogether."
        + _per_point(series, "steps"),
        "No learner step with the log-probs of a pair is recorded yet.",
        _legend(series),
    )  # fmt: skip


def _loss(summary: RunSummary) -> Plot:
    series = [
        Series(summary.dpo_loss, Ink.FIRST, "DPO pairs"),
        Series(summary.sft_loss, Ink.SECOND, "SFT examples"),
    ]
    return Plot(
        "Loss",
        _trend("loss", "Loss by learner step", series, "learner step", "mean loss of an example"),
        "Loss of the examples of a step, to be read for each kind alone: DPO begins at 0.69 (no preference), and since "
        "every pair is new it need not fall to 0." + _per_point(series, "steps"),
        "No learner step with a loss is recorded yet.",
        _legend(series),
    )


def _trend(name: str, title: str, series: list[Series], x_label: str, y_label: str) -> Markup | None:
    if all(one.is_empty for one in series):
        return None
    return plots.trend(name, title, series, x_label=x_label, y_label=y_label)


def _legend(series: list[Series]) -> tuple[tuple[Ink, str], ...]:
    return tuple((one.ink, one.word) for one in series if not one.is_empty)


def _per_point(series: list[Series], what: str) -> str:
    width = plots.per_point(series)
    has_restarts = any(len(one.lines) > 1 for one in series)
    restarted = " Each start of the learner draws a line of its own." if has_restarts else ""
    return (f" A point is the mean of up to {width} {what}." if width > 1 else "") + restarted
