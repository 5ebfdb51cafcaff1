"""What all ranks do together: a step, a checkpoint, the weights for a new version.

Rank 0 calls `train`, `save`, `publish`; each tells the other ranks what comes (msgpack, never a pickle), and they do
the same in `follow`. Nothing here knows the log: what to train, and when, is decided on rank 0 by the learner.

    rank 0:  train | save | publish | idle ... -> finish
    others:  follow (returns at finish)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from learner import checkpoint
from learner.batch import Example, MicroBatch, plan, to_tensors
from learner.checkpoint import Checkpoint, Layout, ProbeTokens, State
from learner.config import LearnerConfig
from learner.engine import Engine
from learner.losses import Side, Signals, example_losses, preference_of
from learner.policy import price
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.schedule import learning_rate
from streaming.logprobs import sequence_logprobs
from streaming.metrics import Metrics
from streaming.records import Probe, Version


class Train(msgspec.Struct, frozen=True, tag=True):
    step: int
    examples: list[Example]
    gap_scale: float


class Save(msgspec.Struct, frozen=True, tag=True):
    pass


class Publish(msgspec.Struct, frozen=True, tag=True):
    probe: ProbeTokens | None


class Idle(msgspec.Struct, frozen=True, tag=True):
    pass


class Finish(msgspec.Struct, frozen=True, tag=True):
    pass


Command = Train | Save | Publish | Idle | Finish


class ExampleNumbers(msgspec.Struct, frozen=True):
    """One example of a step, before the update. Log-probs are summed over a response's tokens."""

    loss: float
    chosen_logprob: float
    rejected_logprob: float | None  # None on the sft route


class StepNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """A step in figures, over all ranks. Means are of the step's examples, before the update."""

    is_applied: bool  # False: a loss or gradient was not finite, and nothing changed
    learning_rate: float
    gradient_norm: float | None
    loss: float
    reward_accuracy: float | None  # None without pairs
    chosen_logprob: float
    rejected_logprob: float | None
    kl_to_reference: float
    num_tokens: int
    seconds: float
    examples: list[ExampleNumbers]  # in the order of the batch


class _Sums:
    """Sums over this rank's examples, and its rows of the table of all examples; on the device until the step is over.

    A row is (loss, chosen log-prob, rejected log-prob); other ranks' rows are zero, so the ranks' sum is the table.
    """

    NUM = 9

    def __init__(self, num_examples: int, device: torch.device) -> None:
        self.total = torch.zeros(self.NUM, dtype=torch.float64, device=device)
        self.rows = torch.zeros(num_examples, 3, dtype=torch.float64, device=device)

    def add(self, places: Sequence[int], batch: MicroBatch, losses_B: Tensor, chosen: Side, rejected: Side) -> None:
        is_broken = ~torch.isfinite(losses_B.detach()).all()
        if not batch.num_examples:
            self.total[0] += is_broken
            return
        columns = [losses_B.detach(), chosen.policy_B.detach(), rejected.policy_B.detach()]
        self.rows[list(places)] = torch.stack(columns, dim=1).to(self.rows)
        is_pair_B = batch.is_pair_B
        h_chosen_B, h_rejected_B = chosen.h_B.detach(), torch.where(is_pair_B, rejected.h_B.detach(), 0.0)
        parts = [
            is_broken,
            losses_B.detach().sum(),
            torch.tensor(batch.num_examples),
            is_pair_B.sum(),
            (is_pair_B & (h_chosen_B > h_rejected_B)).sum(),
            chosen.policy_B.detach().sum(),
            rejected.policy_B.detach().sum(),
            h_chosen_B.sum() + h_rejected_B.sum(),
            torch.tensor(batch.num_tokens),
        ]
        self.total += torch.stack([part.to(self.total) for part in parts])


class Trainer:
    """The engine and the ranks, ready to train. Every rank has one."""

    def __init__(self, engine: Engine, ranks: Ranks, config: LearnerConfig, checkpoints: Path) -> None:
        self._engine = engine
        self._ranks = ranks
        self._config = config
        self._checkpoints = checkpoints
        self._is_under_way = False

    @property
    def layout(self) -> Layout:
        return Layout(self._config.world_size, self._config.zero_stage, self._config.dtype)

    def restore(self, origin: Checkpoint | None) -> Checkpoint | None:
        """Every rank: go on from the checkpoint that rank 0 names, if any. Called once, before anything else."""
        shared = self._ranks.share(msgspec.msgpack.encode(origin, enc_hook=str))
        restored = msgspec.msgpack.decode(shared, type=Checkpoint | None, dec_hook=lambda kind, value: kind(value))
        if restored is not None:
            checkpoint.check_layout(restored, self.layout)
            self._engine.load(restored.directory)
            checkpoint.restore_random_state(restored, self._ranks.rank)
        return restored

    def train(self, step: int, examples: Sequence[Example], *, gap_scale: float) -> StepNumbers:
        """Rank 0: one optimizer step on these examples, number `step` counted from 0."""
        with self._together(Train(step, list(examples), gap_scale)):
            return self._train(step, examples, gap_scale)

    def save(self, state: State, still_ours: Callable[[], None]) -> None:
        """Rank 0: commit a checkpoint, unless `still_ours` raises just before."""
        with self._together(Save()):
            self._save(state, still_ours)

    def publish(
        self, publisher: Publisher, version: Version, *, step: int, lineage: list[Version], tokens: ProbeTokens | None
    ) -> None:
        """Rank 0: hand the present weights to the publisher."""
        publisher.wait()
        with self._together(Publish(tokens)):
            probe = self._probe(tokens)
            model, weights = self._engine.model.module, self._engine.full_weights()
            publisher.publish(model, weights, version, step=step, lineage=lineage, probe=probe)

    def idle(self) -> None:
        """Rank 0: nothing to do yet; the others see that it lives."""
        self._tell(Idle())

    def finish(self) -> None:
        """Rank 0: the others may return. If something went wrong half-way they cannot hear it: they see it end."""
        if not self._is_under_way:
            self._tell(Finish())

    def follow(self, metrics: Metrics) -> None:
        """Other ranks: do what rank 0 does, until it finishes."""
        while True:
            with metrics.time.spend("waiting"):
                command = msgspec.msgpack.decode(self._ranks.share(None), type=Command)
            match command:
                case Train(step, examples, gap_scale):
                    self._train(step, examples, gap_scale)
                case Save():
                    self._save(None)
                case Publish(tokens):
                    self._probe(tokens)
                    for _ in self._engine.full_weights():
                        continue  # rank 0 writes what all ranks hold together
                case Idle():
                    continue  # rank 0 waits for pairs
                case Finish():
                    return

    @contextmanager
    def _together(self, command: Command) -> Iterator[None]:
        self._is_under_way = True
        self._tell(command)
        yield
        self._is_under_way = False

    def _tell(self, command: Command) -> None:
        if self._ranks.world_size > 1:
            self._ranks.share(msgspec.msgpack.encode(command))

    def _train(self, step: int, examples: Sequence[Example], gap_scale: float) -> StepNumbers:
        started_s = time.monotonic()
        sums = _Sums(len(examples), self._ranks.device)
        shares = plan(examples, world_size=self._ranks.world_size, max_tokens=self._config.batch.micro_batch_tokens)[
            self._ranks.rank
        ]
        for place, share in enumerate(shares):
            batch = to_tensors([examples[i] for i in share], self._ranks.device)
            losses_B, chosen, rejected = self._losses(batch, gap_scale)
            self._engine.accumulate(losses_B.sum() / len(examples), is_last=place == len(shares) - 1)
            sums.add(share, batch, losses_B, chosen, rejected)
        totals = self._ranks.total([*sums.total.tolist(), *sums.rows.flatten().tolist()])
        rate = learning_rate(step, self._config.optimizer, self._config.max_steps)
        result = self._engine.step(
            learning_rate=rate, weight_decay=self._config.optimizer.weight_decay, is_vetoed=totals[0] > 0
        )
        return _numbers(examples, totals, result.applied, rate, result.gradient_norm, time.monotonic() - started_s)

    def _losses(self, batch: MicroBatch, gap_scale: float) -> tuple[Tensor, Side, Side]:
        settings = self._config.loss
        chosen, rejected = price(self._engine.model, batch)
        losses_B = example_losses(
            chosen,
            rejected,
            Signals(batch.gap_B, gap_scale),
            is_pair_B=batch.is_pair_B,
            weight_B=batch.weight_B,
            preference=preference_of(settings.name, **settings.coefficients),
            nll_weight=settings.nll_weight,
            sft_weight=settings.sft_weight,
        )
        return losses_B, chosen, rejected

    def _save(self, state: State | None, still_ours: Callable[[], None] = lambda: None) -> None:
        checkpoint.save(
            self._checkpoints,
            state,
            self._engine,
            self._ranks,
            keep=self._config.checkpoint.keep,
            still_ours=still_ours,
        )

    def _probe(self, tokens: ProbeTokens | None) -> Probe | None:
        """The learner's log-probs of the probe's response, by a forward pass of the weights as they are."""
        if tokens is None:
            return None
        [logprobs] = sequence_logprobs(self._engine.model, [(tokens.prompt, tokens.response)])
        return Probe(prompt_tokens=tokens.prompt, response_tokens=tokens.response, logprobs=logprobs)


def _numbers(
    examples: Sequence[Example],
    totals: list[float],
    is_applied: bool,
    rate: float,
    gradient_norm: float | None,
    seconds: float,
) -> StepNumbers:
    _, loss, num_examples, num_pairs, num_correct, chosen, rejected, h, num_tokens = totals[: _Sums.NUM]
    rows = zip(*[iter(totals[_Sums.NUM :])] * 3, strict=True)
    return StepNumbers(
        is_applied=is_applied,
        learning_rate=rate,
        gradient_norm=gradient_norm,
        loss=loss / num_examples,
        reward_accuracy=num_correct / num_pairs if num_pairs else None,
        chosen_logprob=chosen / num_examples,
        rejected_logprob=rejected / num_pairs if num_pairs else None,
        kl_to_reference=h / (num_examples + num_pairs),
        num_tokens=int(num_tokens),
        seconds=seconds,
        examples=[
            ExampleNumbers(row[0], row[1], None if example.rejected_tokens is None else row[2])
            for example, row in zip(examples, rows, strict=True)
        ],
    )
