"""A replay for people: routes side by side, rewards, margins, and the groups that come out otherwise; and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group as Page
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deploy.replay import Outcome, Replayed, Rewards
from deploy.status import short
from streaming.selection.roles import quantile_of

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

_MAX_SHOWN = 20
"""Groups that are shown one by one."""

_MAX_PROMPT = 60
"""Characters of a prompt in the table."""


def page(found: Replayed) -> RenderableType:
    """All of it, the sums first."""
    compared = found.num_groups - found.num_waiting
    kinds = _kinds(found)
    told = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items())) or "every group comes out the same"
    lines = [f"{compared} groups compared; {told}"]
    if found.num_waiting:
        lines.append(f"{found.num_waiting} more are scored and not selected yet")
    parts: list[RenderableType] = [Text("\n".join(lines)), Text(), _routes(found), Text()]
    if found.rewards_before != found.rewards_after:
        parts += [_rewards(found), Text()]
    parts += [_margins(found), Text()]
    if found.changes:
        parts.append(_changes(found))
    return Page(*parts)


def as_json(found: Replayed) -> dict[str, Any]:
    """Every number of the page, and every group that comes out otherwise."""
    return {
        "groups": found.num_groups,
        "waiting": found.num_waiting,
        "kinds": _kinds(found),
        "routes": [
            {"route": route, "reason": reason, "before": before, "after": after}
            for (route, reason), before, after in _route_rows(found)
        ],
        "margins": {
            name: {"before": _quantiles(found.before, name), "after": _quantiles(found.after, name)}
            for name in ("external", "implicit")
        },
        "rewards": {
            side: {name: {**one._asdict(), "mean": one.mean} for name, one in rewards.items()}
            for side, rewards in (("before", found.rewards_before), ("after", found.rewards_after))
        },
        "changes": [
            {**one._asdict(), "kind": one.kind, "before": one.before._asdict(), "after": one.after._asdict()}
            for one in found.changes
        ],
    }


def _kinds(found: Replayed) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for one in found.changes:
        kinds[one.kind] = kinds.get(one.kind, 0) + 1
    return kinds


def _route_rows(found: Replayed) -> list[tuple[tuple[str, str], int, int]]:
    before, after = found.counts(found.before), found.counts(found.after)
    order = {"dpo": 0, "sft": 1, "drop": 2}
    return [(key, before[key], after[key]) for key in sorted(before | after, key=lambda key: (order[key[0]], key[1]))]


def _routes(found: Replayed) -> Table:
    table = _table("route", "reason", "happened", "would", "change", numbers=3)
    for (route, reason), before, after in _route_rows(found):
        style = "" if before == after else "green" if (after > before) == (route != "drop") else "red"
        table.add_row(
            route, reason, str(before), str(after), f"{after - before:+d}" if after != before else "", style=style
        )
    return table


def _rewards(found: Replayed) -> Table:
    table = _table("reward source", "mean", "would be", "missing", "would be", numbers=4)
    nothing = Rewards(0, 0, 0.0)
    for name in sorted(found.rewards_before | found.rewards_after):
        before, after = found.rewards_before.get(name, nothing), found.rewards_after.get(name, nothing)
        table.add_row(name, _mean(before), _mean(after), str(before.num_missing), str(after.num_missing))
    return table


def _margins(found: Replayed) -> Table:
    names = ["least", *(f"{share:.0%}" for share in QUANTILES[1:-1]), "greatest"]
    table = _table("margins of dpo pairs", "", *names, numbers=len(names))
    for name in ("external", "implicit"):
        for title, outcomes in (("happened", found.before), ("would", found.after)):
            values = _quantiles(outcomes, name)
            table.add_row(name, title, *(short(value) for value in values or []), *([] if values else ["-"]))
    return table


def _changes(found: Replayed) -> RenderableType:
    table = _table("request", "what changes", "happened", "would", "prompt")
    for one in found.changes[:_MAX_SHOWN]:
        prompt = one.prompt.replace("\n", " ")
        cut = prompt if len(prompt) <= _MAX_PROMPT else prompt[: _MAX_PROMPT - 3] + "..."
        table.add_row(str(one.request_number), one.kind, _said(one.before), _said(one.after), Text(cut))
    rest = len(found.changes) - _MAX_SHOWN
    return Page(table, Text(f"... and {rest} more (--json has them all)")) if rest > 0 else table


def _said(one: Outcome) -> str:
    if not one.is_pair:
        return f"drop: {one.reason}"
    over = "" if one.rejected is None else f" over {one.rejected}"
    margin = "" if one.external is None else f", margin {short(one.external)}"
    return f"{one.route}: {one.chosen}{over}{margin}"


def _quantiles(outcomes: Sequence[Outcome], name: str) -> list[float] | None:
    values = [value for one in outcomes if (value := getattr(one, name)) is not None]
    return [quantile_of(values, share) for share in QUANTILES] if values else None


def _mean(rewards: Rewards) -> str:
    return "-" if rewards.mean is None else short(rewards.mean)


def _table(*names: str, numbers: int = 0) -> Table:
    """The last `numbers` columns are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(names):
        is_number = place >= len(names) - numbers > 0
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table
