"""The command line: a row per command; the work is elsewhere.

Exit codes: 0 done, 2 bad usage, configuration or data, 3 something is missing or unreachable, 1 anything else.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy import cli_log
from deploy.cli_log import Set
from deploy.config import json_schema, load_config, run_directory
from streaming.errors import StreamDPOError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Online DPO as a stream.",
)

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]


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
def schema() -> None:
    """The JSON schema of a run's YAML file, for editors: every setting with its meaning and default."""
    print(json.dumps(json_schema(), indent=2))


for command in (
    cli_log.status,
    cli_log.tail,
    cli_log.audit,
    cli_log.trace,
    cli_log.replay,
    cli_log.export,
    cli_log.redrive,
    cli_log.forget,
    cli_log.report,
):
    app.command()(command)


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
