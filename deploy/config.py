"""A run's settings: the rooms' sections under one roof; loading, `--set`, and the JSON schema."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from actors.config import GenerationConfig, PromptsConfig, SchedulerConfig
from deploy.overrides import apply_override
from learner.config import LearnerConfig
from streaming.config import (
    Live,
    LogConfig,
    Reload,
    RewardSourceConfig,
    ScoringConfig,
    Section,
    SelectionConfig,
    load_section,
    reload_class,
)
from streaming.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)

POLICY_NAME = r"^[a-z][a-z0-9_]{0,31}$"
"""It stands in topics, groups, role ids and directories."""


class StopConfig(Section):
    """When the run ends by itself; the first limit that passes ends it. A run without any goes on until stopped."""

    heldout_reward: float | None = None
    """Mean held-out reward at which the run ends. Default: no target."""

    max_minutes: float | None = Field(None, gt=0)
    """Minutes after which the run ends, counted from this start. Default: no limit."""


class MetricsConfig(Section):
    """The Prometheus endpoint of every role."""

    host: str = "127.0.0.1"
    """Address that the endpoints bind. Loopback by default: they need no password."""

    port: int | None = Field(None, ge=1, le=65535)
    """First port; each further role takes the next one. Default: free ports, shown by `streamdpo status`."""


class PolicyConfig(Section):
    """A further model that learns from the candidates that the run's policy samples."""

    model: str | None = None
    """Initial model, with the same tokenizer as the run's. Default: the run's."""

    reference: str | None = None
    """Directory of the frozen reference model. Default: the run's where the model is the run's, else the model."""

    selection: SelectionConfig = SelectionConfig()
    """Which candidates become a training example; what is not said here is as in the run's own."""

    learner: LearnerConfig = LearnerConfig()
    """The learner; what is not said here is as in the run's own."""


class Policy(NamedTuple):
    """A model that learns in this run, with everything that is settled for it."""

    name: str
    model: str
    reference: str
    selection: SelectionConfig
    learner: LearnerConfig
    is_sampled: bool
    """Whether the generators sample from it: then its staleness counts its own versions, and it sets the pace."""


class RunConfig(Section):
    """Everything about a run, in one file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    """Name of the run: lower case letters, digits and dashes. Topics and groups carry it."""

    model: str
    """Initial model: a directory in Hugging Face format (or a hub name) with its tokenizer."""

    directory: str | None = None
    """Where the log, weights, checkpoints and report lie. Default: runs/NAME beside the configuration file."""

    policy: str = Field("policy", pattern=POLICY_NAME)
    """Name of the model being trained: the one that samples, sets the pace and is measured on held-out prompts."""

    prompts: PromptsConfig
    """Where prompts come from."""

    rewards: list[RewardSourceConfig] = Field(min_length=1)
    """External reward sources."""

    generation: GenerationConfig = GenerationConfig()
    """The generators."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """How prompts are paced."""

    scoring: ScoringConfig = ScoringConfig()
    """How the scorer works."""

    selection: SelectionConfig = SelectionConfig()
    """Which candidates become a training example."""

    learner: LearnerConfig = LearnerConfig()
    """The learner."""

    policies: dict[Annotated[str, Field(pattern=POLICY_NAME)], PolicyConfig] = {}
    """Further models, by name, that learn from the same candidates: each has a selector, a learner and weights of its
    own. They hold nobody up: what they are too slow for is dropped as `stale`, by their own `max_staleness`."""

    log: LogConfig = LogConfig()
    """Where the run's records lie."""

    metrics: MetricsConfig = MetricsConfig()
    """The Prometheus endpoint of every role."""

    stop: StopConfig = StopConfig()
    """When the run ends by itself."""

    log_level: Live[str] = Field("info", pattern="^(debug|info|warning|error)$")
    """How much the roles write to their log files."""

    trust_remote_code: bool = False
    """Run Python code that the model's directory brings. Only for models that you trust."""

    @model_validator(mode="after")
    def _holds_together(self) -> "RunConfig":
        names = [source.name for source in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"two reward sources have the same name: {sorted(names)}")
        if self.policy in self.policies:
            raise ValueError(f"policies.{self.policy} has the name of the run's own policy: give it another")
        for policy in self.every_policy:
            schedule = policy.learner.optimizer.schedule
            if schedule != "constant" and policy.learner.max_steps is None:
                raise ValueError(f"the {schedule} schedule of {policy.name} needs learner.max_steps")
        if self.scheduler.pipeline_depth <= self.learner.batch.batch_size:
            raise ValueError(
                f"scheduler.pipeline_depth ({self.scheduler.pipeline_depth}) must be larger than "
                f"learner.batch.batch_size ({self.learner.batch.batch_size}): a smaller one never fills a batch"
            )
        return self

    @field_validator("policies", mode="before")
    @classmethod
    def _inherit(cls, policies: Any, info: ValidationInfo) -> Any:
        """What a policy does not say is as the run says it. A section of the run that is wrong is told of once."""
        if not isinstance(policies, dict):
            return policies
        shared = {name: info.data[name].model_dump() for name in ("selection", "learner") if name in info.data}
        return {name: _merged(shared, {} if said is None else said) for name, said in policies.items()}

    @property
    def every_policy(self) -> list[Policy]:
        """Every policy that learns in this run, the one that samples first."""
        reference = self.scoring.reference or self.model
        own = Policy(self.policy, self.model, reference, self.selection, self.learner, is_sampled=True)
        others = [
            Policy(
                name,
                one.model or self.model,
                one.reference or one.model or reference,
                one.selection,
                one.learner,
                is_sampled=False,
            )
            for name, one in self.policies.items()
        ]
        return [own, *others]


def _merged(under: Any, over: Any) -> Any:
    """Values of `over`, and of `under` where it has none."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {name: _merged(under.get(name), value) for name, value in over.items()}


SAVED = "config.yaml"
"""Name of the copy of a run's settings in its directory."""

FILE_LIKE = re.compile(r"^[.~/]|\.(jsonl|json|parquet|csv|py|safetensors)$")
"""What can only be a path, never a hub name or a module: it is anchored even where nothing lies there yet."""

SYSTEM_AUTHORITIES = "system"
"""The `ca_file` that is no file."""


class Change(NamedTuple):
    """A setting that differs between two starts of a run."""

    path: str
    old: Any
    new: Any
    reload: Reload


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in this YAML file, with `a.b=c` overrides applied; relative paths in it are relative to the file.

    Raises ConfigError, naming the field, for anything that is not right.
    """
    values = _read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return _anchor(load_section(RunConfig, values, where=str(path)), path.resolve().parent)


def load_run(place: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a run, from its directory or from the file that it was started with; with `a.b=c` applied."""
    if place.is_dir():
        saved = place / SAVED
        if not saved.exists():
            raise ConfigError(
                f"holds no {SAVED}, so it is not the directory of a run",
                where=str(place),
                do="Give a run's directory (runs/NAME) or its configuration file.",
            )
        # A directory that was moved or mounted elsewhere is where it lies now, not where it was made.
        return load_config(saved, overrides).model_copy(update={"directory": str(place.resolve())})
    return load_config(place, overrides)


def load_started(place: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_run`; raises ConfigError too where nothing has run there yet."""
    config = load_run(place, overrides)
    if not (run_directory(config) / SAVED).exists():
        where = str(run_directory(config))
        raise ConfigError("nothing has run there yet", where=where, do="Start it: streamdpo run.")
    return config


def run_directory(config: RunConfig) -> Path:
    """Where a run lies whose settings were loaded."""
    assert config.directory is not None, "load_config fills it in"
    return Path(config.directory)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the settings as a file that `load_config` reads; whole or not at all, also by several processes at once."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every setting whose value differs, by its path."""
    return list(_changes(old, new, ""))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run's file; every setting says in `x-reload` when a change of it takes effect."""
    schema = RunConfig.model_json_schema()
    for name, kind in _sections(RunConfig).items():
        properties = schema["properties"] if kind is RunConfig else schema["$defs"][name]["properties"]
        for field, info in kind.model_fields.items():
            if "$ref" not in properties[field]:
                properties[field]["x-reload"] = str(reload_class(info))
    return schema


def _sections(kind: type[Section]) -> dict[str, type[Section]]:
    found = {kind.__name__: kind}
    for info in kind.model_fields.values():
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found |= _sections(part)
    return found


def _changes(old: Section, new: Section, prefix: str) -> Iterator[Change]:
    for name, info in type(new).model_fields.items():
        yield from _change(getattr(old, name), getattr(new, name), prefix + name, reload_class(info))


def _change(before: Any, after: Any, path: str, reload: Reload) -> Iterator[Change]:
    if isinstance(before, Section) and isinstance(after, Section):
        yield from _changes(before, after, f"{path}.")
    elif isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _change(before.get(name), after.get(name), f"{path}.{name}", reload)
    elif before != after:
        yield Change(path, before, after, reload)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(
            f"cannot be read: {cause.strerror}", where=str(path), do="Give the path of a YAML file."
        ) from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"is not YAML: {cause}", where=str(path), do="Mend the file.") from cause
    if not isinstance(values, dict):
        raise ConfigError("holds no settings", where=str(path), do="Write `name: ...`, `model: ...` and so on.")
    return values


def _anchor(config: RunConfig, folder: Path) -> RunConfig:
    """Paths made absolute, because the roles and later commands work in other directories.

    What is read is looked for beside the file, then in the working directory; what lies in neither and can be no path
    (a hub name, `package.module:function`) stays as it is. What is written lies beside the file, where it is no URL.
    """

    def named(name: str) -> str:
        path, colon, attribute = name.partition(":") if ".py:" in name else (name, "", "")
        found = _found(path, folder)
        if found is None and FILE_LIKE.search(path):
            found = _beside(path, folder)
        return name if found is None else f"{found}{colon}{attribute}"

    def file(name: str) -> str:
        return name if name == SYSTEM_AUTHORITIES else _found(name, folder) or _beside(name, folder)

    def place(name: str) -> str:
        return name if "://" in name else _beside(name, folder)

    def stores(learner: LearnerConfig) -> LearnerConfig:
        return learner.model_copy(update={"publish": _with(learner.publish, place, "url")})

    log = _with(config.log, place, "blobs")
    kafka_files = [name for name in type(log.kafka).model_fields if name.endswith("_file")]
    policies = {name: _with(one, named, "model", "reference") for name, one in config.policies.items()}
    return _with(config, named, "model").model_copy(
        update={
            "directory": _beside(config.directory or f"runs/{config.name}", folder),
            "prompts": _with(config.prompts, named, "path", "eval_path"),
            "rewards": [_with(source, named, "function", "model") for source in config.rewards],
            "scoring": _with(config.scoring, named, "reference"),
            "generation": _with(config.generation, place, "weights_cache"),
            "log": log.model_copy(update={"kafka": _with(log.kafka, file, *kafka_files)}),
            "learner": stores(config.learner),
            "policies": {
                name: one.model_copy(update={"learner": stores(one.learner)}) for name, one in policies.items()
            },
        }
    )


def _found(name: str, folder: Path) -> str | None:
    """What is there under this name, beside the file or in the working directory."""
    expanded = Path(name).expanduser()
    return next((os.path.abspath(base / expanded) for base in (folder, Path.cwd()) if (base / expanded).exists()), None)


def _beside(name: str, folder: Path) -> str:
    return os.path.abspath(folder / Path(name).expanduser())


def _with(section: SectionT, absolute: Callable[[str], str], *names: str) -> SectionT:
    """The section with the paths in these fields made absolute, where it has any there."""
    values = {name: absolute(value) for name in names if (value := getattr(section, name))}
    return section.model_copy(update=values)
