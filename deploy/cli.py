"""The command line: a row per command; the work is elsewhere.

Exit codes: 0 done, 2 bad usage, configuration or data, 3 something is missing or unreachable, 1 anything else.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from deploy.config import RunConfig, json_schema, load_config, load_run, load_started, run_directory
from streaming.errors import ConfigError, StreamDPOError
from streaming.log.protocol import Log

if TYPE_CHECKING:
    from streaming.audit import Balance

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Online DPO as a stream.",
)

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Run = Annotated[Path, typer.Argument(help="The run's directory, or its YAML file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Another value for a setting.", show_default=False),
]


@app.command()
def run(config: Config, set_: Set = None) -> None:
    """Run the main job: every role, until a limit passes or you press Ctrl-C. The same command goes on after a stop."""
    from deploy.check import preflight
    from deploy.launcher import launch
    from deploy.live import opened_view
    from deploy.report import write_report

    settings = load_config(config, set_ or [])
    preflight(settings)
    with opened_view() as view:
        outcome = launch(settings, view)
    directory = run_directory(settings)
    print(f"{settings.name}: {outcome.reason} after {outcome.elapsed_s:.0f} s")
    if outcome.best is not None:
        print(f"best version {outcome.best.version}: held-out reward {outcome.best.mean:.3f} ({directory / 'best'})")
    if (directory / "last").exists():
        print(f"last version: {directory / 'last'}")
    print(f"report: {write_report(directory)}")


@app.command()
def recover(config: Config, set_: Set = None) -> None:
    """Begin a new log from the newest checkpoint, where the whole log is lost. `run` goes on with it then."""
    from deploy.recover import recover as begin
    from deploy.recover import told

    print(told(begin(load_config(config, set_ or []))))
    print(f"go on: streamdpo run {config}")


@app.command()
def forget(
    run: Run, prompt_id: Annotated[str, typer.Argument(help="The prompt's id, as `tail prompts` shows it.")]
) -> None:
    """Delete one prompt's data from a stopped run, never sample it again, and name what cannot be deleted."""
    from deploy.forget import forget as begin
    from deploy.forget import told

    with _opened(run) as (settings, log):
        print(told(begin(settings, prompt_id, log, run_directory(settings))))


@app.command()
def demo() -> None:
    """Improve a tiny model that is trained on the spot: no network, no GPU, no settings."""
    from deploy.demo import run_demo

    raise typer.Exit(run_demo())


@app.command()
def check(
    config: Config,
    create_topics: Annotated[
        bool, typer.Option("--create-topics", help="Create the topics that a Kafka log lacks.")
    ] = False,
    role: Annotated[str | None, typer.Option(help="On Kafka, ask only for the rights of this role.")] = None,
    show_acls: Annotated[
        bool, typer.Option("--show-acls", help="Only print the commands that give each role its rights on Kafka.")
    ] = False,
    set_: Set = None,
) -> None:
    """Check settings, files, model, rewards, log, disk and devices, and say what to mend. Starts nothing."""
    from deploy.check import all_checks
    from deploy.check_log import acl_commands

    if show_acls:
        print("\n".join(acl_commands(load_config(config, set_ or []))))
        return
    console = Console(soft_wrap=True)
    codes = [0]
    for finding in all_checks(load_config(config, set_ or []), create_topics=create_topics, role=role):
        if finding.error is None:
            console.print(f"[green]ok[/]    {finding.subject}: {escape(finding.note)}", highlight=False)
        else:
            console.print(f"[red]mend[/]  {finding.subject}: {escape(str(finding.error))}", highlight=False)
            codes.append(finding.error.exit_code)
    raise typer.Exit(min((code for code in codes if code), default=0))


@app.command()
def role(
    role: Annotated[
        str,
        typer.Argument(help="generator, scorer, selector, learner or scheduler; learner.POLICY of a further policy."),
    ],
    config: Config,
    index: Annotated[
        int, typer.Option(help="Which of several, or the learner's rank. A further one joins the run.")
    ] = 0,
    set_: Set = None,
) -> None:
    """Be one role, as a plain process. Ctrl-C and SIGTERM end it cleanly."""
    from deploy.launcher import prepare
    from deploy.roles import Process, may_join, role_environment, run_role

    settings = load_config(config, set_ or [])
    if may_join(settings, Process(role, index)):  # run_role tells what there is where it is not
        prepare(settings)
    for name, value in role_environment(settings, role, has_gpu=Path("/dev/nvidiactl").exists()).items():
        os.environ.setdefault(name, value)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    run_role(settings, role, index, stop)


@app.command()
def status(run: Run) -> None:
    """What each role is doing: health, idle time, lag, version, reward."""
    from deploy.status import read_status, table

    with _opened(run) as (settings, log):
        found = read_status(log, settings)
    if not found.roles:
        print(f"{settings.name}: no role has started yet")
        return
    _console().print(table(found))


@app.command()
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


@app.command()
def audit(
    run: Run,
    final: Annotated[
        bool, typer.Option("--final", help="The data have come to their end, so what has not ended is lost.")
    ] = False,
) -> None:
    """Do the books balance? Every request ends exactly one way. Exit code 1 where they do not.

    A run that a limit or a signal ended has requests on their way: they are no loss, its next start goes on with them.
    """
    from streaming.audit import audit_log

    with _opened(run) as (settings, log):
        balances = [audit_log(log, policy=policy.name) for policy in settings.every_policy]
    for balance in balances:
        _print_balance(balance, final=final)
    is_right = [balance.is_balanced or not (final or balance.ended_twice) for balance in balances]
    raise typer.Exit(0 if all(is_right) else 1)


def _print_balance(balance: "Balance", *, final: bool) -> None:
    print(f"{balance.num_requests} requests of {balance.policy}")
    for (ending, reason), count in sorted(balance.endings.items()):
        print(f"  {ending}{f' ({reason})' if reason else ''}: {count}")
    under_way = len(balance.not_ended) - len(balance.consumed)
    print(f"  in a step whose checkpoint is not durable yet: {len(balance.consumed)}")
    print(f"  on their way: {under_way}{_some(balance.not_ended) if final else ''}")
    print(f"  ended twice: {len(balance.ended_twice)}{_some(balance.ended_twice)}")
    if balance.unreadable:
        places = f"{', '.join(balance.unreadable[:10])}{' ...' if len(balance.unreadable) > 10 else ''}"
        print(f"  bytes that are no record, and dead letters: {len(balance.unreadable)} ({places})")
    if balance.carried_s is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(balance.carried_s))
        print(f"  part of the log is past retention: this goes on from the balance carried at {at}")
    if not balance.is_whole:
        print("  part of the log is past retention and in no carried balance: what ended there is not counted")


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


def _some(numbers: Sequence[int]) -> str:
    more = " ..." if len(numbers) > 10 else ""
    return f" (requests {', '.join(map(str, numbers[:10]))}{more})" if numbers else ""


@app.command()
def report(run: Run) -> None:
    """Write one self-contained HTML page about a run, in progress or over."""
    from deploy.report import write_report

    print(write_report(run_directory(load_started(run))))


@app.command()
def schema() -> None:
    """The JSON schema of a run's YAML file, for editors: every setting with its meaning and default."""
    print(json.dumps(json_schema(), indent=2))


@contextmanager
def _opened(run: Path, overrides: Sequence[str] = ()) -> Iterator[tuple[RunConfig, Log]]:
    """A run's settings and its log. Raises ConfigError where nothing has run there yet."""
    from deploy.roles import open_run_log

    settings = load_started(run, overrides)
    with open_run_log(settings) as log:
        yield settings, log


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run a command (that of this process where `arguments` is None) and return its exit code.

    Errors that we raise on purpose are printed as text, without a traceback.
    """
    try:
        app(arguments)
    except StreamDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return 0


def main() -> None:
    """The entry point."""
    sys.exit(execute())
