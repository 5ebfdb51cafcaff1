"""The log's part of `streamdpo check`: a place to write to; on Kafka the cluster, the run's topics, and the rights."""

import os
from collections.abc import Callable, Iterator

from deploy.config import RunConfig, run_directory
from streaming.errors import ConfigError, NotReadyError
from streaming.topics import all_topics

Check = tuple[str, Callable[[], str]]
"""What is looked at, and a function that says what was found or raises what to mend."""


def check_log(config: RunConfig) -> None:
    """Everything about the log; raises the first error."""
    for _, check in log_checks(config):
        check()


def log_checks(config: RunConfig, *, create_topics: bool = False, role: str | None = None) -> Iterator[Check]:
    """The checks of the log, one after the other; nothing more of a cluster that cannot be used.

    Missing topics are created with `create_topics`; with `role`, only this role's rights are asked for.
    """
    usable: list[bool] = []

    def connection() -> str:
        note = _place(config)
        usable.append(True)
        return note

    yield "log", connection
    if usable and config.log.url.startswith("kafka://"):
        yield "topics", lambda: check_topics(config, create=create_topics)
        yield "rights", lambda: check_rights(config, role)


def _place(config: RunConfig) -> str:
    """The run's directory can be made and written; the log is of a kind that is there."""
    directory = run_directory(config)
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise NotReadyError(
            f"{nearest} cannot be written", where=str(directory), do="Set `directory` to another place."
        )
    scheme = config.log.url.partition("://")[0]
    if scheme == "sqlite":
        return f"{config.log.url} in {directory}"
    if scheme == "kafka":
        return _connection(config)
    do = "Write sqlite:///log.db or kafka://HOST:PORT,HOST:PORT."
    raise ConfigError(f"{config.log.url!r} is no log", where="log.url", do=do)


def _connection(config: RunConfig) -> str:
    from streaming.log.kafka_diagnosis import check_connection

    found = check_connection(config.log)
    silent = f"; WARNING: not all of log.url can be used:\n{chr(10).join(found.silent)}" if found.silent else ""
    return f"{config.log.url}: {len(found.brokers)} brokers, each reached from here{silent}"


def check_topics(config: RunConfig, *, create: bool) -> str:
    """The run's topics are there and as they have to be. Raises NotReadyError with every difference."""
    from streaming.log.kafka_topics import differences, wanted_topics

    policies = [policy.name for policy in config.every_policy]
    wanted = wanted_topics(all_topics(*policies), config.name, config.log)
    created, found = differences(config.log, wanted, create=create)
    made = f"created: {', '.join(created)}" if created else "none created"
    if found:
        missing = [one.topic for one in found if one.setting == "topic"]
        lines = [f"not there: {', '.join(missing)}"] * bool(missing)
        lines += [str(one) for one in found if one.setting != "topic"]
        do = "Run the commands above"
        if missing:
            do = "Create what is missing: streamdpo check CONFIG --create-topics" + "; then " * (len(lines) > 1)
            do += "run the commands above" * (len(lines) > 1)
        raise NotReadyError("\n".join(lines), where=f"topics {config.name}.*", do=f"{do}.")
    return f"{len(wanted)} as wanted, {made}"


def check_rights(config: RunConfig, role: str | None) -> str:
    """The configured user may do what the role does; what every role does where none is named."""
    from streaming.log import kafka_acls, kafka_diagnosis

    roles = _roles(role) if role else [name for name in kafka_acls.ROLES if name != "operator"]
    policies = [policy.name for policy in config.every_policy]
    wanted = dict.fromkeys(right for name in roles for right in kafka_acls.rights(name, policies))
    unknown = kafka_diagnosis.check_rights(config.log, config.name, list(wanted))
    note = f"; {len(unknown)} on topics that are not there yet were not asked for" if unknown else ""
    return f"{len(wanted)} for {role or 'every role'}{note}"


def _roles(role: str) -> list[str]:
    from streaming.log.kafka_acls import ROLES

    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}", where="--role", do=f"Name one of: {', '.join(ROLES)}.")
    return [role]


def acl_commands(config: RunConfig) -> Iterator[str]:
    """The commands of Kafka's own tool that give every role a user of its name, with exactly what it needs."""
    from streaming.log import kafka_acls
    from streaming.log.kafka_client import bootstrap_servers

    if not config.log.url.startswith("kafka://"):
        raise ConfigError(f"{config.log.url} knows no users", where="log.url", do="Ask this of a kafka:// log.")
    servers = ",".join(bootstrap_servers(config.log.url))
    policies = [policy.name for policy in config.every_policy]
    for role in kafka_acls.ROLES:
        yield f"# {role}"
        rights = kafka_acls.rights(role, policies)
        yield from kafka_acls.commands(rights, run=config.name, principal=role, servers=servers)
