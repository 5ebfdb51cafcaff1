"""The learner, as a role: pairs in; steps, checkpoints and weight versions out.

    connected ranks -> model -> engine -> newest checkpoint -> rank 0 leads, the others follow -> all return

A start takes a new epoch, so nothing that it publishes can be mistaken for what an earlier start published after its
last checkpoint.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

from learner.claim import Claim
from learner.config import LearnerConfig
from learner.engine import Engine
from learner.lead import Lead
from learner.limits import Limits
from learner.policy import load_model, max_length, vocabulary_size
from learner.publisher import Publisher
from learner.ranks import connect
from learner.trainer import Trainer
from streaming import topics
from streaming.errors import ConfigError
from streaming.heartbeat import NO_HISTORY, Beats, Heartbeat
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.records import WeightVersion
from streaming.remote_weights import RemoteWeights


class Learner:
    """One rank of the learner; all ranks are in `run` together. Rank 0 alone reads and writes the log.

    `model` is the initial model's directory; weights and checkpoints go below `directory`, which all ranks share.
    `sampled_by`: the policy whose candidates this one learns from, where it does not sample itself.
    """

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        heartbeat: Heartbeat | None,
        *,
        config: LearnerConfig,
        model: str,
        directory: Path,
        policy: str,
        trust_remote_code: bool = False,
        history: Beats = NO_HISTORY,
        sampled_by: str | None = None,
        remote: RemoteWeights | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._config = config
        self._model = Path(model)
        self._checkpoints = directory / "checkpoints" / policy
        self._weights = directory / "weights" / policy
        self._policy = policy
        self._trust_remote_code = trust_remote_code
        self._history = history
        self._sampled_by = sampled_by
        self._remote = remote
        self._environment = environment

    def run(self, stop: threading.Event) -> None:
        """Train until `stop` or `max_steps`; then commit a checkpoint and return.

        Raises NonFiniteError after three steps in a row whose loss or gradient was not finite, ConfigError where the
        newest checkpoint does not fit the settings, NotReadyError where the model or a rank is missing,
        SupersededError where a newer start of the learner has taken over.
        """
        self._metrics.time.enter("busy")
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        torch.manual_seed(self._config.seed)
        with connect(self._config.world_size, self._environment) as ranks:
            model = load_model(
                str(self._model),
                dtype=self._config.dtype,
                gradient_checkpointing=self._config.gradient_checkpointing,
                trust_remote_code=self._trust_remote_code,
            )
            limits = Limits(self._max_length(max_length(model)), vocabulary_size(model))
            with closing(Engine(model, self._config, ranks)) as engine:
                trainer = Trainer(engine, ranks, self._config, self._checkpoints)
                if ranks.is_first:
                    with closing(self._claim()) as claim:
                        trainer.restore(claim.origin)
                        self._lead(trainer, claim, limits, stop)
                else:
                    trainer.restore(None)
                    self._follow(trainer)

    def _claim(self) -> Claim:
        started = self._heartbeat.state.epoch if self._heartbeat else 1
        return Claim(self._checkpoints, self._log, self._policy, at_least=started)

    def _lead(self, trainer: Trainer, claim: Claim, limits: Limits, stop: threading.Event) -> None:
        publisher = Publisher(
            self._weights,
            self._log,
            claim,
            policy=self._policy,
            source=self._model,
            keep=self._config.publish.keep,
            dtype=self._config.publish.dtype,
            announced=self._show_version,
            remote=self._remote,
        )
        lead = Lead(
            self._log,
            self._metrics,
            self._heartbeat,
            trainer=trainer,
            publisher=publisher,
            limits=limits,
            config=self._config,
            policy=self._policy,
            claim=claim,
            history=self._history,
            sampled_by=self._sampled_by,
        )
        try:
            with closing(publisher):
                lead.run(stop)
        finally:
            trainer.finish()

    def _show_version(self, published: WeightVersion) -> None:
        """Metrics and heartbeat name the newest version that generators may use."""
        self._metrics.count("records_written_total", topic=topics.WEIGHTS.name)
        self._metrics.set("published_timestamp_seconds", published.time_s)
        self._metrics.set("weights_epoch", published.version.epoch)
        self._metrics.set("weights_number", published.version.number)
        if self._heartbeat is not None:
            self._heartbeat.tell(version=published.version)

    def _follow(self, trainer: Trainer) -> None:
        if self._heartbeat is not None:
            self._heartbeat.tell(health="ready", at_once=True)
        trainer.follow(self._metrics)

    def _max_length(self, model_max: int | None) -> int | None:
        wanted = self._config.batch.max_length
        if wanted is not None and model_max is not None and wanted > model_max:
            raise ConfigError(
                f"{wanted} is more than the model takes ({model_max})",
                where="learner.batch.max_length",
                do="Leave it out to use what the model takes.",
            )
        return wanted or model_max
