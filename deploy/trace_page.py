"""A trace as a page for people, and as JSON. Knows no log.

Read from top to bottom it answers: how did it end, what did the step see, why these two, what was asked, when.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Group as Page
from rich.console import RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.status import short
from deploy.trace import Trace
from streaming.config import SelectionConfig
from streaming.records import Candidate, Feedback, Group, Pair, ScoredGroup, SourceRewards, Span
from streaming.selection.margins import combined

_MAX_TEXT = 72
"""Characters of a response in the table of candidates; the chosen and the rejected one are shown whole below it."""

_GONE = "[dim]past retention, or not there yet[/]"


def page(trace: Trace, selection: SelectionConfig | None = None) -> RenderableType:
    """The whole story. `selection`: the run's settings, shown where they are those that made the pair."""
    parts = [_headline(trace), _facts(trace, selection)]
    scored, group = _group_of(trace)
    if group is not None:
        parts += [_candidates(group, scored, trace.pair.record if trace.pair else None)]
    parts += [_prompt(trace), _texts(trace), _way(trace)]
    return Page(*(part for part in parts if part is not None))


def as_json(trace: Trace) -> dict[str, Any]:
    """Every record of it, and the answer on top."""
    ending, step = trace.ending, trace.step
    pair = trace.pair.record if trace.pair else None
    return {
        "policy": trace.policy,
        "pair_id": pair.pair_id if pair else None,
        "group_id": trace.request.group_id,
        "request_number": trace.request.number,
        "ending": ending.ending if ending else None,
        "reason": ending.reason if ending else None,
        "epoch": step.epoch if step else None,
        "step": step.step if step else None,
        "loss": step.loss if step else None,
        "way": [{"hop": hop, "at": where, "time_s": time_s} for hop, where, time_s in _hops(trace)],
        "request": _plain(trace.request),
        "pair": _plain(pair),
        "scored": _plain(trace.scored.record if trace.scored else None),
        "group": _plain(trace.group.record if trace.group else None),
        "feedback": [_plain(one.record) for one in trace.feedback],
    }


def _plain(record: msgspec.Struct | None) -> Any:
    return None if record is None else msgspec.to_builtins(record, enc_hook=repr)


def _headline(trace: Trace) -> RenderableType:
    pair, ending, step = trace.pair, trace.ending, trace.step
    who = f"pair [bold]{pair.record.pair_id}[/]" if pair else f"request [bold]{trace.request.number}[/] (no pair)"
    if ending is not None and ending.ending == "trained":
        verdict = f"[bold green]trained[/] in epoch {ending.epoch}, step {ending.step}"
    elif ending is not None:
        why = escape(ending.reason or "no reason")
        verdict = f"[bold yellow]{ending.ending.replace('_', ' ')}[/] by the {ending.stage}: {why}"
    elif step is not None:
        verdict = f"[bold cyan]in step {step.step}[/] of epoch {step.epoch}, whose checkpoint is not durable yet"
    else:
        verdict = f"[bold cyan]on its way[/], last seen in {_hops(trace)[-1][0]}"
    lines = [f"{who} of policy {trace.policy}: {verdict}"]
    if step is not None:
        numbers = {
            "loss": step.loss,
            "log pi(chosen)": step.chosen_logprob,
            "log pi(rejected)": step.rejected_logprob,
            "staleness": step.staleness,
        }
        lines.append("   ".join(f"{name} {short(value)}" for name, value in numbers.items() if value is not None))
    return Panel("\n".join(lines), title="what became of it", title_align="left", border_style="cyan")


def _facts(trace: Trace, selection: SelectionConfig | None) -> RenderableType | None:
    if trace.pair is None:
        return None
    pair = trace.pair.record
    over = "" if pair.rejected is None else f" over {pair.rejected.candidate}"
    facts = {
        "route": f"{pair.route}: candidate {pair.chosen.candidate}{over}",
        "margin": _numbers(external=pair.margins.external, implicit=pair.margins.implicit, rating_gap=pair.rating_gap),
        "weight, spread": _numbers(weight=pair.weight, spread=pair.spread),
        "example": f"{pair.index + 1} of {pair.num_examples}" if pair.num_examples > 1 else "",
        "selected with": _settings(pair, selection),
        "reference": pair.reference_version,
        "configuration": f"version {pair.config_version}",
        "ids": f"group {pair.group_id}, content {pair.content_hash}",
    }
    return _two_columns("why it is a pair", {name: value for name, value in facts.items() if value})


def _settings(pair: Pair, selection: SelectionConfig | None) -> str:
    if selection is None or selection.settings_hash != pair.settings_hash:
        return f"settings {pair.settings_hash}, which are not the run's settings of now"
    values = selection.model_dump(exclude={"window"})
    return "  ".join(f"{name}={value}" for name, value in values.items())


def _candidates(group: Group, scored: ScoredGroup | None, pair: Pair | None) -> RenderableType:
    rewards = scored.rewards if scored else []
    totals = combined(rewards, len(group.candidates))
    title = f"candidates of group {group.group_id}, sampled by {group.generator}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for name in ("", "#", "reward", *(_source_name(one) for one in rewards), "log pi", "log ref", "tokens by version"):
        table.add_column(name, justify="left" if name in ("", "tokens by version") else "right", no_wrap=True)
    table.add_column("end", no_wrap=True)
    table.add_column("text", ratio=1)
    for index, candidate in enumerate(group.candidates):
        role = _role(pair, index)
        table.add_row(
            role,
            str(index),
            _number(totals[index]),
            *(_value(one, index) for one in rewards),
            _number(candidate.logprob),
            _number(scored.reference_logprobs[index] if scored else None),
            _versions(candidate.spans),
            _end(candidate),
            Text(_one_line(candidate.text)),
            style={"chosen": "green", "rejected": "red"}.get(role, ""),
        )
    return _padded(table)


def _prompt(trace: Trace) -> RenderableType:
    request = trace.request
    lines = Text()
    for message in request.messages or []:
        lines.append(f"{message.role}: ", style="bold").append(message.content + "\n")
    lines.append(request.text or "")
    lines.rstrip()
    row = f"request {request.number}, data row {request.prompt_id}, {request.purpose}"
    sampling = request.sampling
    drawn = f"{request.num_candidates} candidates at temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
    notes = [f"{row}; {drawn}, at most {sampling.max_tokens} tokens; configuration {request.config_version}"]
    notes += [f"golden: {request.golden}"] if request.golden is not None else []
    notes += [f"columns: {msgspec.json.encode(request.columns, enc_hook=repr).decode()}"] if request.columns else []
    return Panel(Page(lines, Text("\n".join(notes), style="dim")), title="prompt", title_align="left")


def _texts(trace: Trace) -> RenderableType | None:
    """The two sides whole, where the table had to cut them."""
    if trace.pair is None:
        return None
    sides = [("chosen", "green", trace.pair.record.chosen), ("rejected", "red", trace.pair.record.rejected)]
    panels = [
        Panel(Text(side.text), title=name, title_align="left", border_style=colour)
        for name, colour, side in sides
        if side is not None and side.text != _one_line(side.text)
    ]
    return Page(*panels) if panels else None


def _way(trace: Trace) -> RenderableType:
    table = Table(
        title="its way through the log", title_justify="left", title_style="bold", header_style="dim", box=None,
        pad_edge=False,
    )  # fmt: skip
    for name in ("hop", "at", "time", "after"):
        table.add_column(name, justify="right" if name == "after" else "left", no_wrap=True)
    before: float | None = None
    for hop, where, time_s in _hops(trace):
        after = "" if before is None or time_s is None else f"+{time_s - before:.2f} s"
        table.add_row(escape(hop), where or _GONE, "" if time_s is None else _clock(time_s), after)
        before = time_s if time_s is not None else before
    return _padded(table)


def _hops(trace: Trace) -> list[tuple[str, str | None, float | None]]:
    """Every record of the way, the oldest first: what, where, when."""
    steps = [("asked", trace.asked), ("sampled", trace.group), ("scored", trace.scored), ("paired", trace.pair)]
    hops = [(name, stored.where if stored else None, stored.time_s if stored else None) for name, stored in steps]
    while hops and hops[-1][1] is None and trace.pair is None:
        hops.pop()  # it never came so far: that is no gap
    hops += [(_ending_name(one.record), one.where, one.time_s) for one in trace.feedback]
    return hops or [("asked", None, None)]


def _ending_name(one: Feedback) -> str:
    place = f", step {one.step}" if one.step is not None else ""
    return f"{one.ending.replace('_', ' ')}{f' ({one.reason})' if one.reason else ''}{place}"


def _group_of(trace: Trace) -> tuple[ScoredGroup | None, Group | None]:
    scored = trace.scored.record if trace.scored else None
    return scored, scored.group if scored else trace.group.record if trace.group else None


def _role(pair: Pair | None, index: int) -> str:
    if pair is None:
        return ""
    if pair.chosen.candidate == index:
        return "chosen"
    return "rejected" if pair.rejected is not None and pair.rejected.candidate == index else ""


def _source_name(source: SourceRewards) -> str:
    return source.source if source.weight == 1 else f"{source.source} x{source.weight:g}"


def _value(source: SourceRewards, index: int) -> str:
    value = source.values[index]
    if value is not None:
        return _number(value)
    return f"[dim]{escape(source.reasons[index] or 'missing') if source.reasons else 'missing'}[/]"


def _versions(spans: Sequence[Span]) -> str:
    if len(spans) == 1:
        return f"{spans[0].end} by {spans[0].version}"
    return ", ".join(f"{span.start}-{span.end} by {span.version}" for span in spans)


def _end(candidate: Candidate) -> str:
    return "eos" if candidate.has_eos else candidate.finish_reason


def _one_line(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 3] + "..."


def _number(value: float | None) -> str:
    return "[dim]-[/]" if value is None else short(value)


def _numbers(**values: float | None) -> str:
    return "   ".join(f"{name} {short(value)}" for name, value in values.items() if value is not None)


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s)) + f".{int(time_s % 1 * 100):02d}"


def _two_columns(title: str, facts: dict[str, str]) -> RenderableType:
    table = Table(show_header=False, box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return _padded(table)


def _padded(table: Table) -> RenderableType:
    return Page(table, Text())


def joined(pages: Iterable[RenderableType]) -> RenderableType:
    """Several traces below each other."""
    return Page(*pages)
