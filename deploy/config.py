"""A run's settings: the rooms' sections under one roof; loading, `--set`, and the JSON schema."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from actors.config import GenerationConfig, PromptsConfig, SchedulerConfig
from learner.config import LearnerConfig
from streaming.config import Live, LogConfig, RewardSourceConfig, ScoringConfig, Section, SelectionConfig, load_section
from streaming.errors import ConfigError


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


class RunConfig(Section):
    """Everything about a run, in one file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    """Name of the run: lower case letters, digits and dashes. Topics and groups carry it."""

    model: str
    """Initial model: a directory in Hugging Face format (or a hub name) with its tokenizer."""

    directory: str | None = None
    """Where the log, weights, checkpoints and report lie. Default: runs/NAME beside the configuration file."""

    policy: str = Field("policy", pattern=r"^[a-z][a-z0-9_]{0,31}$")
    """Name of the model being trained."""

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
        if self.learner.optimizer.schedule != "constant" and self.learner.max_steps is None:
            raise ValueError(f"the {self.learner.optimizer.schedule} schedule needs learner.max_steps")
        if self.scheduler.pipeline_depth <= self.learner.batch.batch_size:
            raise ValueError(
                f"scheduler.pipeline_depth ({self.scheduler.pipeline_depth}) must be larger than "
                f"learner.batch.batch_size ({self.learner.batch.batch_size}): a smaller one never fills a batch"
            )
        return self


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """The run in this YAML file, with `a.b=c` overrides applied; relative paths in it are relative to the file.

    Raises ConfigError, naming the field, for anything that is not right.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as cause:
        raise ConfigError(
            f"cannot be read: {cause.strerror}", where=str(path), do="Give the path of a YAML file."
        ) from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"is not YAML: {cause}", where=str(path), do="Mend the file.") from cause
    if not isinstance(values, dict):
        raise ConfigError("holds no settings", where=str(path), do="Write `name: ...`, `model: ...` and so on.")
    for override in overrides or []:
        _apply(values, override)
    config = load_section(RunConfig, values, where=str(path))
    return _anchor(config, path.resolve().parent)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} has no value", where="command line", do="Write --set a.b=value.")
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        here = here[int(part)] if isinstance(here, list) and part.isdigit() else here.setdefault(part, {})
        if not isinstance(here, dict | list):
            raise ConfigError(
                f"--set {key}: {part!r} is a value, not a section", where="command line", do="Check the path."
            )
    value = yaml.safe_load(text)
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value


def _anchor(config: RunConfig, folder: Path) -> RunConfig:
    """Paths made absolute: those beside the file that exist there; names that do not exist stay as they are."""

    def beside(name: str) -> str:
        path, colon, attribute = name.partition(":") if ".py:" in name else (name, "", "")
        return str(folder / path) + colon + attribute if (folder / path).exists() else name

    prompts = config.prompts.model_copy(
        update={
            "path": beside(config.prompts.path),
            "eval_path": config.prompts.eval_path and beside(config.prompts.eval_path),
        }
    )
    rewards = [
        source.model_copy(
            update={
                "function": source.function and beside(source.function),
                "model": source.model and beside(source.model),
            }
        )
        for source in config.rewards
    ]
    scoring = config.scoring.model_copy(
        update={"reference": config.scoring.reference and beside(config.scoring.reference)}
    )
    directory = Path(config.directory) if config.directory else Path("runs") / config.name
    return config.model_copy(
        update={
            "model": beside(config.model),
            "directory": str(directory if directory.is_absolute() else folder / directory),
            "prompts": prompts,
            "rewards": rewards,
            "scoring": scoring,
        }
    )
