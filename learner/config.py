"""Settings of the training plane: loss, batches, optimizer, checkpoints, publishing."""

from typing import Literal

from pydantic import Field, model_validator

from streaming.config import Live, Section, Step

COEFFICIENTS: dict[str, dict[str, float]] = {
    "dpo": {},
    "cdpo": {"eps": 0.1},
    "robust": {"eps": 0.1, "max_margin": 10.0},  # at 10 nats DPO's own loss is 5e-5: nothing is left to learn there
    "ipo": {},
    "slic": {},
    "simpo": {"gamma": 0.5},
    "soft": {"sharpness": 1.0},
    "rdpo": {"beta_1": 0.1},  # the middle of those that stood swapped and noisy ratings (arXiv 2602.00603)
    "ripo": {"beta_1": 0.1},
    "ml_rdpo": {"variance": 1.0, "logit_scale": 1.0},
}
"""What each preference loss takes beside beta, with its defaults."""

NEED_RATINGS = {"soft", "rdpo", "ripo", "ml_rdpo"}
"""The losses that use a pair's rating gap."""


class LossConfig(Section):
    """What the learner minimises."""

    name: Step[Literal["dpo", "cdpo", "robust", "ipo", "slic", "simpo", "soft", "rdpo", "ripo", "ml_rdpo"]] = "dpo"
    """The loss of a pair; SFT examples have theirs. `d` is log pi - log pi_ref of the chosen minus that of the
    rejected response, `gap` their difference in external reward.
    dpo: the sigmoid loss of DPO.
    Against wrong labels: cdpo (`eps`) smooths them; robust (`eps`, `max_margin`) is rDPO, right on average under flips;
    ipo and slic are a square and a hinge.
    simpo (`gamma`): mean-token log-probs instead of a reference; its beta is about 2, not 0.1.
    From ratings: soft (`sharpness`) makes a soft label of the gap; rdpo (`beta_1`) is RDPO, and asks for a larger
    margin where the gap is larger; ripo (`beta_1`) is its squared form; ml_rdpo (`variance`, `logit_scale`) fits the
    gap.
    One loss at a time: RDPO's offset and soft labels from the same gap would count it twice.
    A pair without a rating falls back to the same loss without ratings, and is counted."""

    beta: Step[float] = Field(0.1, gt=0)
    """How strongly the policy is held to the reference, per nat of the margin."""

    eps: Step[float | None] = Field(None, ge=0, lt=0.5)
    """cdpo, robust: share of labels that are taken for flipped, from 0 to below 0.5. Default: 0.1."""

    max_margin: Step[float | None] = Field(None, gt=0)
    """robust: largest beta * d that lowers the loss, in nats: without it the loss has no lower bound. Default: 10."""

    gamma: Step[float | None] = Field(None, ge=0)
    """simpo: margin that is asked for, in nats; published: 0.3 to 1.6, with a beta of 2 to 2.5. Default: 0.5."""

    sharpness: Step[float | None] = Field(None, gt=0)
    """soft: logits of the label per typical gap, which is the running root mean square of the gaps. Default: 1."""

    beta_1: Step[float | None] = Field(None, gt=0)
    """rdpo, ripo: how far ratings are trusted. A typical gap, which is the running root mean square of the gaps, asks
    for beta / beta_1 nats; larger trusts less, and without bound is the loss without ratings. Default: 0.1."""

    variance: Step[float | None] = Field(None, gt=0)
    """ml_rdpo: variance of the noise of ratings, in squared logits; larger trusts ratings less. Default: 1."""

    logit_scale: Step[float | None] = Field(None, gt=0)
    """ml_rdpo: difference in external reward that makes one Bradley-Terry logit, in reward units: with twice as much
    the better response wins at odds of e^2. Default: 1, which is right for reward models trained on comparisons;
    for other rewards fit it: the slope of a logistic regression of known labels on gaps is 1 / logit_scale."""

    nll_weight: Step[float] = Field(0.0, ge=0)
    """Weight of the mean-token negative log-likelihood of the chosen response, added to the loss of a pair."""

    sft_weight: Step[float] = Field(1.0, ge=0)
    """Weight of an SFT example's mean-token negative log-likelihood."""

    @property
    def coefficients(self) -> dict[str, float]:
        """What the chosen loss takes: beta, and its own coefficients as set or by default."""
        own = {name: getattr(self, name) for name in COEFFICIENTS[self.name]}
        found = {name: default if own[name] is None else own[name] for name, default in COEFFICIENTS[self.name].items()}
        return {"beta": self.beta, **found}

    @model_validator(mode="after")
    def _has_effect(self) -> "LossConfig":
        known = {name for coefficients in COEFFICIENTS.values() for name in coefficients}
        idle = sorted(name for name in known - COEFFICIENTS[self.name].keys() if getattr(self, name) is not None)
        if idle:
            raise ValueError(
                f"{', '.join(idle)} has no effect on the loss {self.name}: leave it out, or set it to null"
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Step[float] = Field(1e-6, gt=0)
    """Peak learning rate. Typical: 5e-7 to 5e-6 for models of billions of parameters, 3e-4 for toy models."""

    weight_decay: Step[float] = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of its moment estimates."""

    warmup_steps: Step[int] = Field(10, ge=0)
    """Steps of linear warm-up from 0."""

    schedule: Step[Literal["constant", "cosine", "linear"]] = "constant"
    """Learning rate after the warm-up; cosine and linear fall to `final_ratio` at `max_steps`."""

    final_ratio: Step[float] = Field(0.1, ge=0, le=1)
    """Learning rate at `max_steps`, as a share of the peak."""

    gradient_clipping: Step[float] = Field(1.0, gt=0)
    """Largest gradient norm; a larger gradient is scaled down to it."""


class BatchConfig(Section):
    """Examples per step."""

    batch_size: Step[int] = Field(32, ge=1)
    """Examples per optimizer step, over all ranks."""

    micro_batch_tokens: int = Field(8192, ge=64)
    """Padded tokens per forward pass and rank; a longer example is a micro-batch of its own."""

    max_staleness: Live[int] = Field(16, ge=0)
    """Examples sampled more weight versions ago are dropped and counted (reason `stale`)."""

    max_length: int | None = Field(None, ge=8)
    """Prompt plus response tokens; a longer example is dropped (reason `too_long`). Default: what the model takes."""


class CheckpointConfig(Section):
    """Where training goes on after a crash."""

    every_steps: int = Field(50, ge=1)
    """Optimizer steps between two checkpoints."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints of the own epoch that stay."""


class PublishConfig(Section):
    """How weights reach the generators."""

    sync_every: Step[int] = Field(1, ge=1)
    """Optimizer steps between two published versions."""

    url: str | None = None
    """Where versions go for machines that do not see the run's directory: any fsspec URL (s3://BUCKET/PATH), below
    which every run and policy has a folder of its own. Default: generators read them in the run's directory."""

    keep: int = Field(3, ge=2)
    """Newest versions that stay on disk (and at `url`), beside those that a live role still names."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the published weights. Default: the learner's."""


class LearnerConfig(Section):
    """The learner."""

    world_size: int = Field(1, ge=1)
    """Ranks (processes); one GPU each where there are GPUs."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage: what the ranks share out (1 optimizer, 2 and gradients, 3 and parameters). bfloat16 takes
    at least 2."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters in the forward pass. bfloat16 keeps float32 master weights."""

    seed: int = 0
    """Seed of everything random in the learner."""

    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each rank. Default: what torch chooses."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which the run ends. Default: no limit; needed by the cosine and linear schedules."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    loss: LossConfig = LossConfig()
    """What the learner minimises."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""

    batch: BatchConfig = BatchConfig()
    """Examples per step."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Where training goes on after a crash."""

    publish: PublishConfig = PublishConfig()
    """How weights reach the generators."""

    @property
    def effective_zero_stage(self) -> int:
        """What DeepSpeed is told: from ZeRO 2 on it sums micro-batches of bfloat16 in float32.

        In ZeRO 1 it does so too, through another, slower optimizer.
        """
        return max(self.zero_stage, 2) if self.dtype == "bfloat16" else self.zero_stage
