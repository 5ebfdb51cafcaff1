"""The machinery of settings, and the settings of the log, of scoring and of selection.

A setting lives in the room that reads it. The docstring under a field is its manual, the text of the JSON
schema and the advice in an error. A field is `restart` (the default), `Live[T]` (takes effect at the next
batch) or `Step[T]` (at a learner step boundary); a reload refuses a change of any `restart` field.
"""

import difflib
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from streaming.errors import ConfigError
from streaming.records import stable_id


class Reload(StrEnum):
    """When a changed field takes effect."""

    LIVE = "live"
    STEP = "step"
    RESTART = "restart"


T = TypeVar("T")
Live = Annotated[T, Reload.LIVE]
Step = Annotated[T, Reload.STEP]


class Section(BaseModel):
    """Base of all settings: frozen, unknown keys refused, docstrings under fields are their documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def reload_class(field: Any) -> Reload:
    """Whether a pydantic field is live, step or restart."""
    return next((mark for mark in field.metadata if isinstance(mark, Reload)), Reload.RESTART)


S = TypeVar("S", bound=Section)


def load_section(kind: type[S], values: Any, *, where: str) -> S:
    """Validate `values` whole. Raises ConfigError naming every wrong field's path, value, rule and nearest name."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, detail) for detail in error.errors()]
        what = f"{len(lines)} setting{'s are' if len(lines) > 1 else ' is'} wrong\n" + "\n".join(lines)
        raise ConfigError(what, where=where, do="Nothing was changed. Mend these and run again.") from error


def _explain(root: type[Section], detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"]) or "(top)"
    lines = [f"{path}: {detail['msg']}"]
    if detail["type"] not in ("missing", "extra_forbidden") and not isinstance(detail["input"], dict):
        lines[0] += f" (found {detail['input']!r})"
    section = _section_at(root, detail["loc"][:-1])
    if section is None or not detail["loc"]:
        return lines[0]
    name = str(detail["loc"][-1])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.5)
        lines.append(
            f"Did you mean '{near[0]}'?" if near else f"Known here: {', '.join(sorted(section.model_fields))}."
        )
    elif name in section.model_fields and section.model_fields[name].description:
        lines.append(str(section.model_fields[name].description).replace("\n", " "))
    return "\n  ".join(lines)


def _section_at(root: type[Section], path: tuple[str | int, ...]) -> type[Section] | None:
    """The section that the path leads to, through lists, optional sections and sections by name."""
    section = root
    is_name = False  # of a section among others: {name: section}
    for part in path:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        if part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        found = _section_in(annotation)
        if found is None:
            return None
        section, is_name = found, get_origin(annotation) is dict
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


class KafkaConfig(Section):
    """How the log talks to a Kafka cluster. Secrets stand in files, which are read when the log is opened."""

    ca_file: str | None = None
    """PEM file of the authorities that sign the brokers' certificates. Turns TLS on. Default: no TLS; `system` takes
    the operating system's authorities."""

    certificate_file: str | None = None
    """PEM file of this client's certificate and its chain (mutual TLS)."""

    key_file: str | None = None
    """PEM file of the private key of `certificate_file`."""

    key_password_file: str | None = None
    """File that holds the password of `key_file`. Default: the key is not encrypted."""

    check_hostname: bool = True
    """Whether a broker's certificate has to name the host that was asked for."""

    sasl_mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN", "OAUTHBEARER"] | None = None
    """How the client proves who it is. Default: not at all, or by its certificate."""

    username: str | None = None
    """User of SCRAM or PLAIN."""

    password_file: str | None = None
    """File that holds the password of `username`; a newline at its end is not part of it."""

    token_file: str | None = None
    """File that holds the bearer token of OAUTHBEARER; read again at every connect, so it may be renewed."""

    partitions: int = Field(16, ge=1)
    """Partitions of prompts, candidates and scored when topics are created: as many as there can ever be generators,
    scorers or selectors, because a process without a partition has nothing to do."""

    replication_factor: int = Field(3, ge=1)
    """Copies of every partition when topics are created. 1 on a cluster of one broker."""

    min_insync_replicas: int = Field(2, ge=1)
    """Copies that have to hold a record before it counts as appended, when topics are created; below it appends wait.
    At most `replication_factor`."""

    compression: Literal["zstd", "lz4", "none"] = "zstd"
    """How batches of records are compressed. zstd is the smaller, lz4 the quicker."""

    linger_s: float = Field(0.0, ge=0, le=1)
    """How long an append waits for others to share its request, in seconds. Appends of one call, and those that
    arrive while a request is under way, share one anyway."""

    batch_bytes: int = Field(256 * 1024, ge=16 * 1024)
    """Largest batch of small records of one partition, in bytes before compression."""

    max_in_flight_bytes: int = Field(64 * 1024 * 1024, ge=1024 * 1024)
    """Bytes of records appended and not acknowledged, over all threads of a process. Above it appends wait."""

    delivery_timeout_s: float = Field(300.0, ge=5)
    """How long an append waits for a cluster that does not answer, in seconds, before it fails with LogError."""

    connect_timeout_s: float = Field(30.0, ge=1)
    """How long a start waits for the first broker that lets it in, in seconds, before it fails with exit code 3."""

    request_timeout_s: float = Field(30.0, ge=1)
    """How long one request waits for its answer before the connection is given up, in seconds."""

    session_timeout_s: float = Field(30.0, ge=1)
    """A group member that was not heard of for this long is dead, and its partitions go to others, in seconds.
    Brokers refuse less than their group.min.session.timeout.ms (6 s by default)."""

    max_poll_interval_s: float = Field(3600.0, ge=10)
    """A group member that reads nothing for this long is stuck, and its partitions go to others, in seconds. Longer
    than the longest batch of any stage."""

    fetch_bytes: int = Field(4 * 1024 * 1024, ge=64 * 1024)
    """Bytes of one partition that one request fetches ahead of the reader. A larger record is fetched alone."""

    @model_validator(mode="after")
    def _goes_together(self) -> "KafkaConfig":
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("'certificate_file' and 'key_file' belong together: set both or neither")
        if self.certificate_file is not None and self.ca_file is None:
            raise ValueError("a certificate needs TLS: set 'ca_file' ('system' for the operating system's authorities)")
        if self.key_password_file is not None and self.key_file is None:
            raise ValueError("'key_password_file' has no 'key_file' to open")
        if not self.check_hostname and self.ca_file is None:
            raise ValueError("'check_hostname' has no effect without TLS: set 'ca_file'")
        self._check_sasl()
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError("'min_insync_replicas' is above 'replication_factor': every append would wait for ever")
        if self.delivery_timeout_s < self.request_timeout_s + self.linger_s:
            raise ValueError("'delivery_timeout_s' is below 'request_timeout_s' plus 'linger_s'")
        return self

    def _check_sasl(self) -> None:
        given = {name for name in ("username", "password_file", "token_file") if getattr(self, name) is not None}
        by_token = self.sasl_mechanism == "OAUTHBEARER"
        needed = {"token_file"} if by_token else {"username", "password_file"} if self.sasl_mechanism else set()
        if given != needed:
            raise ValueError(
                f"sasl_mechanism {self.sasl_mechanism} needs {sorted(needed) or 'nothing'}, found {sorted(given)}"
            )


class LogConfig(Section):
    """Where the run's records lie."""

    url: str = "sqlite:///log.db"
    """The log: sqlite:///FILE (one machine; a relative FILE lies in the run's directory) or
    kafka://HOST:PORT,HOST:PORT (a cluster; two or three of its brokers are enough)."""

    max_record_bytes: int = Field(8 * 1024 * 1024, ge=64 * 1024)
    """Largest record that lies in the log itself, in bytes. The value of a larger one lies beside it, in `blobs`."""

    blobs: str | None = None
    """Where values above `max_record_bytes` lie: a directory that every role sees, or any fsspec URL (s3://BUCKET/PATH).
    They go when the log has forgotten the records that name them. Default: blobs/ in the run's directory."""

    max_blob_bytes: int = Field(256 * 1024 * 1024, ge=0)
    """Largest value of all, in bytes. A larger one is refused whole, and its request ends as a dead letter."""

    max_bytes: int = Field(20 * 1024**3, ge=1024 * 1024)
    """Size at which the embedded log trims its oldest records, in bytes. Kafka's topics have their own retention."""

    kafka: KafkaConfig = KafkaConfig()
    """How a kafka:// log is reached."""


class RewardSourceConfig(Section):
    """One external reward source: a Python function or a reward model."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    """Name of the source in records and metrics: lower case letters, digits and underscores."""

    function: str | None = None
    """Python function as `package.module:function` or `file.py:function`, with the signature of TRL's reward
    functions: prompts, completions and the prompt's own columns as keywords; returns a list of floats or None."""

    model: str | None = None
    """Directory (or hub name) of a Hugging Face sequence-classification reward model."""

    weight: Live[float] = 1.0
    """Weight in the combined external reward."""

    timeout_s: Live[float] = Field(60.0, gt=0)
    """A call that takes longer gives missing rewards with the reason `timeout`, in seconds."""

    max_concurrency: int = Field(16, ge=1)
    """Calls of this source under way at once."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardSourceConfig":
        if (self.function is None) == (self.model is None):
            raise ValueError("a reward source is either a 'function' or a 'model': set exactly one of them")
        return self


class ScoringConfig(Section):
    """How the scorer works."""

    num_processes: int = Field(1, ge=1)
    """Scorer processes: they share the candidates by partitions. Each loads the reference and the reward models."""

    reference: str | None = None
    """Directory of the frozen reference model. Default: the run's initial model."""

    batch_tokens: int = Field(16384, ge=64)
    """Padded tokens per forward pass of the reference and of reward models."""

    max_groups: int = Field(64, ge=1)
    """Groups read and scored together at most; the scorer never waits to fill it."""

    missing_eos_penalty: Live[float | None] = None
    """Subtracted from the reward of a candidate that was cut off before its end of sequence. Default: none."""

    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the reference model. Default: what torch chooses."""


class SelectionConfig(Section):
    """Which candidates become a training example."""

    num_processes: int = Field(1, ge=1)
    """Selector processes: they share the scored groups by partitions. What each shows of running shares and
    correlations is of its own part; the examples do not depend on their number."""

    rule: Live[Literal["max_min", "sweet_spot", "quantile"]] = "sweet_spot"
    """How the rejected candidate is picked: the worst, the one nearest to mu - num_sigmas sigma of the group, or the
    one at `quantile`. For N <= 8 and normal rewards all three are the worst (arXiv 2502.16825)."""

    num_sigmas: Live[float] = Field(2.0, gt=0)
    """Distance below the group's mean at which `sweet_spot` looks for the rejected candidate."""

    quantile: Live[float] = Field(0.023, ge=0, le=0.5)
    """Quantile of the group's rewards at which `quantile` looks for the rejected candidate."""

    min_margin: Live[float] = Field(0.0, ge=0)
    """Smallest external margin of a DPO pair, in reward units. A pair at or below it counts as a tie."""

    chosen_floor: Live[float | None] = None
    """Smallest reward of a chosen candidate, in reward units. Below it nothing is trained on. Default: no floor."""

    sft_floor: Live[float | None] = None
    """Ties and small margins whose best reward is at least this become SFT examples. Default: they are dropped."""

    window: Live[int] = Field(1024, ge=16)
    """Newest groups that running shares and correlations are computed over."""

    @property
    def settings_hash(self) -> str:
        """Changes whenever a field does that can make another example of the same group."""
        return stable_id(type(self).__name__, self.model_dump_json(exclude={"num_processes"}))
