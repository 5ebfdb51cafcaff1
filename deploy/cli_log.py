"""The commands that look into the log of a run that has started, or change it: a row each, the work is elsewhere."""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from deploy.config import RunConfig, load_run, load_started, run_directory
from streaming.errors import ConfigError
from streaming.log.protocol import Log

Run = Annotated[Path, typer.Argument(help="The run's directory, or its YAML file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Another value for a setting.", show_default=False),
]


def forget(
    run: Run, prompt_id: Annotated[str, typer.Argument(help="The prompt's id, as `tail prompts` shows it.")]
) -> None:
    """Delete one prompt's data from a stopped run, never sample it again, and name what cannot be deleted."""
    from deploy.forget import forget as begin
    from deploy.forget import told

    with _opened(run) as (settings, log):
        print(told(begin(settings, prompt_id, log, run_directory(settings))))


def status(run: Run) -> None:
    """What each role is doing: health, idle time, lag, version, reward."""
    from deploy.status import read_status, table

    with _opened(run) as (settings, log):
        found = read_status(log, settings)
    if not found.roles:
        print(f"{settings.name}: no role has started yet")
        return
    _console().print(table(found))


def tail(
    topic: Annotated[str, typer.Argument(help="prompts, candidates, scored, pairs, feedback, weights, roles, ...")],
    run: Run,
    num: Annotated[int, typer.Option("--num", "-n", help="Newest entries to show first.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended.")] = False,
    field: Annotated[
        list[str] | None, typer.Option(help="Show only this field (a path like group.request.number).")
    ] = None,
) -> None:
    """Entries of a topic, one line of JSON each."""
    from deploy import inspect_log

    with _opened(run) as (settings, log):
        found = inspect_log.find_topic(topic, *(policy.name for policy in settings.every_policy))
        ends = log.end_offsets(found.name)
        for entry in inspect_log.newest_entries(log, ends, num):
            print(inspect_log.line(entry, found.record, fields=field or ()), flush=follow)
        if follow:
            stop = threading.Event()
            signal.signal(signal.SIGINT, lambda *_: stop.set())
            for entry in inspect_log.follow(log, ends, stop):
                print(inspect_log.line(entry, found.record, fields=field or ()), flush=True)


def audit(
    run: Run,
    final: Annotated[
        bool, typer.Option("--final", help="The data have come to their end, so what has not ended is lost.")
    ] = False,
) -> None:
    """Do the books balance? Every request ends exactly one way. Exit code 1 where they do not.

    A run that a limit or a signal ended has requests on their way: they are no loss, its next start goes on with them.
    """
    from deploy.balance import told
    from streaming.audit import audit_log

    with _opened(run) as (settings, log):
        balances = [audit_log(log, policy=policy.name) for policy in settings.every_policy]
    for balance in balances:
        print(told(balance, final=final))
    is_right = [balance.is_balanced or not (final or balance.ended_twice) for balance in balances]
    raise typer.Exit(0 if all(is_right) else 1)


def trace(
    run: Run,
    sought: Annotated[
        str, typer.Argument(metavar="ID", help="A pair id, a group id, the beginning of one, or a request number.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Every record, as JSON.")] = False,
) -> None:
    """Why was this pair trained on? From the gradient step back to the prompt."""
    from deploy import trace as tracing
    from deploy import trace_page

    with _opened(run) as (settings, log):
        found = tracing.trace(log, _policies(settings), sought)
    if as_json:
        print(json.dumps([trace_page.as_json(one) for one in found], indent=2))
        return
    made_with = {policy.name: policy.selection for policy in settings.every_policy}
    _console().print(trace_page.joined(trace_page.page(one, made_with.get(one.policy)) for one in found))


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="A .parquet or .jsonl file (sft examples beside it), or a directory.")],
    format_: Annotated[Literal["trl"], typer.Option("--format", help="TRL's preference format.")] = "trl",
    all_: Annotated[
        bool, typer.Option("--all", help="Every pair that was made, not only what was trained on.")
    ] = False,
    route: Annotated[Literal["dpo", "sft"] | None, typer.Option(help="Only this route.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Of several policies, which. Default: the one that samples.")
    ] = None,
) -> None:
    """Pairs as a data set for TRL: prompt, chosen and rejected (dpo), prompt and completion (sft)."""
    from deploy.export import export as write_out

    with _opened(run) as (settings, log):
        name = _policy(settings, policy)
        routes = frozenset({route} if route else {"dpo", "sft"})
        written = write_out(log, name, out, every=all_, routes=routes)
    for path, count in written.files.items():
        print(f"{path}: {count} rows")
    if written.num_untrained:
        print(f"left out: {written.num_untrained} pairs that no durable step has trained (--all takes them too)")
    if written.num_without_prompt:
        print(f"left out: {written.num_without_prompt} pairs whose prompt is past retention")
    if not written.files:
        print("nothing to write")


def redrive(
    run: Run,
    stage: Annotated[str | None, typer.Option(help="Only letters of this stage: generator, scorer, ...")] = None,
    reason: Annotated[str | None, typer.Option(metavar="REGEX", help="Only where the reason has this.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Only of the last 90s, 30m, 2h, 7d.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would happen.")] = False,
) -> None:
    """Send dead letters back to where they came from, each once. Their requests are outstanding again."""
    from deploy import redrive as redriving
    from deploy.redrive_page import page

    wanted = redriving.Wanted(
        stage=stage,
        reason=redriving.parse_reason(reason) if reason else None,
        since_s=redriving.parse_since(since, time.time()) if since else 0.0,
        limit=limit,
    )
    with _opened(run) as (settings, log):
        planned = redriving.plan(log, _policies(settings), wanted)
        _console().print(page(planned))
        if not dry_run:
            print(f"sent: {redriving.carry_out(log, planned)}")


def replay(
    config: Annotated[Path, typer.Argument(help="Settings to try: a YAML file of the same run, or its directory.")],
    from_: Annotated[
        Literal["candidates", "scored"], typer.Option("--from", help="Ask the rewards again, or only select again.")
    ],
    set_: Set = None,
    policy: Annotated[str | None, typer.Option(help="Of several policies, which.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest so many groups.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers and all changes, as JSON.")] = False,
) -> None:
    """What if: score or select recorded groups again with other settings, beside what happened. Writes nothing."""
    from deploy import replay_page
    from deploy.replay import replay as replay_groups

    with _opened(config, set_ or []) as (settings, log):
        name = _policy(settings, policy)
        tried = next(one for one in settings.every_policy if one.name == name)
        found = replay_groups(log, settings, tried, load_run(run_directory(settings)), from_, limit)
    if as_json:
        print(json.dumps(replay_page.as_json(found), indent=2))
    else:
        _console().print(replay_page.page(found))


def report(run: Run) -> None:
    """Write one self-contained HTML page about a run, in progress or over."""
    from deploy.report import write_report

    print(write_report(run_directory(load_started(run))))


def _policy(settings: RunConfig, name: str | None) -> str:
    """A policy by its name. Raises ConfigError where the run has none of this name."""
    known = _policies(settings)
    if name is not None and name not in known:
        raise ConfigError(f"the run has no policy {name!r}", where="--policy", do=f"It has: {', '.join(known)}.")
    return name or known[0]


def _policies(settings: RunConfig) -> list[str]:
    """Every policy of a run, the one that samples first."""
    return [policy.name for policy in settings.every_policy]


def _console() -> Console:
    """The terminal. What goes to a pipe is for a file or a pager: it keeps its lines."""
    return Console(width=None if sys.stdout.isatty() else 180, highlight=False)


@contextmanager
def _opened(run: Path, overrides: Sequence[str] = ()) -> Iterator[tuple[RunConfig, Log]]:
    """A run's settings and its log. Raises ConfigError where nothing has run there yet."""
    from deploy.roles import open_run_log

    settings = load_started(run, overrides)
    with open_run_log(settings) as log:
        yield settings, log
