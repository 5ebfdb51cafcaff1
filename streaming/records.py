"""What travels between the roles. Read this file first: everything else moves these structs about.

    PromptRequest -> Group -> ScoredGroup -> Pair -> (a gradient step) -> WeightVersion

Rules: fields are only ever added, always with a default; ids are computed, never drawn; tokens are
the truth and text is for people; a missing value is None with a reason beside it, never 0.
`wire.py` makes bytes of them.
"""

from typing import Any, Literal

import msgspec

from streaming.arrays import pack, total_logprob

# What each file needs beside the records comes from here too.
from streaming.wire import SCHEMA as SCHEMA
from streaming.wire import Outline as Outline
from streaming.wire import R as R
from streaming.wire import Record as Record
from streaming.wire import decode as decode
from streaming.wire import encode as encode
from streaming.wire import hashed
from streaming.wire import stable_id as stable_id

Purpose = Literal["train", "eval"]
Route = Literal["dpo", "sft", "drop"]
FinishReason = Literal["stop", "length", "abort"]
Ending = Literal["consumed", "trained", "evaluated", "dropped", "dead_lettered", "redriven"]

FINAL_ENDINGS: frozenset[str] = frozenset({"trained", "evaluated", "dropped", "dead_lettered"})
"""Endings after which an example is settled for ever; `consumed` is not: its checkpoint is not durable yet. Only a
`dead_lettered` one may be taken back, by `redriven`: its bytes are on their way once more, and end once more."""

SHARED_STAGES = frozenset({"scheduler", "generator", "scorer"})
"""What ends here ends for every policy: there are no candidates for any of them. Each policy has its own selector."""


class Version(msgspec.Struct, frozen=True, order=True):
    """A weight version: (epoch, number) orders versions of one policy.

    The epoch rises with every learner start, so a restarted learner's lower number is the newer version.
    """

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}"


class Source(Record, frozen=True, kw_only=True):
    """The log entry that a record was made from."""

    topic: str
    partition: int
    offset: int


class Message(Record, frozen=True, kw_only=True):
    """One chat turn."""

    role: str
    content: str


class Sampling(Record, frozen=True, kw_only=True):
    """How candidates are drawn; recorded with every request."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_tokens: int = 256
    stop: list[str] = []
    stop_token_ids: list[int] = []
    seed: int | None = None  # None: drawn by the engine


class PromptRequest(Record, frozen=True, kw_only=True):
    """Ask for `num_candidates` samples of one prompt. Written by the scheduler, numbered from 0 without gaps."""

    number: int
    prompt_id: str
    num_candidates: int
    text: str | None = None  # a plain prompt, or
    messages: list[Message] | None = None  # a conversation, rendered by the model's chat template
    sampling: Sampling = Sampling()
    purpose: Purpose = "train"
    golden: str | None = None  # a known good answer
    columns: dict[str, Any] = {}  # the data set's other columns, for reward functions (ground truth included)
    round: int | None = None  # evaluation round, with
    round_size: int | None = None  # how many requests belong to it
    min_version: Version | None = None  # do not sample before the engine holds this version (evaluation)
    config_version: int = 0
    ordinal: int | None = None  # training: how many training requests came before; with the seed it says which prompt
    claim: int | None = None  # of the scheduler's start that issued it; None: an older release's, or sent by a person
    schema: int = SCHEMA

    @property
    def group_id(self) -> str:
        """A request's group: known before a single token is sampled."""
        return stable_id("group", self.number, self.prompt_id)


class Span(Record, frozen=True, kw_only=True):
    """Response tokens [start, end) were sampled by `version`."""

    version: Version
    start: int
    end: int


class Candidate(Record, frozen=True, kw_only=True):
    """One sampled response. `tokens` ends with the end-of-sequence token where the model produced it."""

    tokens: list[int]
    logprobs: list[float]  # of the sampled tokens, raw model log-probs (before temperature), natural log
    text: str
    finish_reason: FinishReason
    has_eos: bool
    spans: list[Span]

    @property
    def version(self) -> Version | None:
        """The single version that sampled every token; None where an update fell inside."""
        return self.spans[0].version if len(self.spans) == 1 else None

    @property
    def logprob(self) -> float | None:
        """Of the whole response, under the versions that sampled it; None where some tokens have none."""
        return total_logprob(self.logprobs, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def packed_tokens(self) -> bytes:
        """`tokens` on the wire."""
        return pack(self.tokens)


class Group(Record, frozen=True, kw_only=True):
    """All candidates of one prompt request, with the very tokens that the engine saw."""

    request: PromptRequest
    prompt_tokens: list[int]
    candidates: list[Candidate]
    policy: str
    generator: str  # role id
    sampled_s: float  # Unix time when the last candidate finished
    source: Source | None = None
    schema: int = SCHEMA

    @property
    def group_id(self) -> str:
        return self.request.group_id

    @property
    def content_hash(self) -> str:
        """Tells apart two samplings of one request: a request sampled again after a crash has other content."""
        return hashed(pack(self.prompt_tokens), *(candidate.packed_tokens for candidate in self.candidates))


class SourceRewards(Record, frozen=True, kw_only=True):
    """One reward source's verdict on a group: a value per candidate, or None and the reason."""

    source: str
    weight: float
    values: list[float | None]
    reasons: list[str | None] = []  # one per candidate where any value is missing; empty where none is
    version: str = ""  # of the source itself (a model's hash, a function's name)


class Implicit(Record, frozen=True, kw_only=True):
    """h = log pi_model(y|x) - log pi_ref(y|x) per candidate, summed over its tokens (no beta)."""

    model: str  # "sampled": the version spans of the candidate itself
    h: list[float | None]


class Priced(Record, frozen=True, kw_only=True):
    """What a reference model says about the candidates of a group, and whose reference it is."""

    version: str
    logprobs: list[float]  # per candidate, summed over its tokens
    policies: list[str] = []


class ScoredGroup(Record, frozen=True, kw_only=True):
    """A group with every source's rewards and the references' log-probs."""

    group: Group
    rewards: list[SourceRewards]
    reference_logprobs: list[float]  # per candidate, summed over its tokens; for the policy that sampled
    reference_version: str
    implicit: list[Implicit] = []
    source: Source | None = None
    shared_by: list[str] = []  # other policies with the same reference
    further: list[Priced] = []  # by the references of other policies
    schema: int = SCHEMA

    def priced_for(self, policy: str) -> Priced | None:
        """What the policy's own reference says; None where it was not asked, or could not price this group."""
        own = [self.group.policy, *self.shared_by]
        first = Priced(version=self.reference_version, logprobs=self.reference_logprobs, policies=own)
        return next((priced for priced in (first, *self.further) if policy in priced.policies), None)


class Response(Record, frozen=True, kw_only=True):
    """One side of a training example."""

    candidate: int  # index into the group
    tokens: list[int]
    reference_logprob: float  # summed over the tokens
    reward: float | None
    sampled_logprob: float | None
    spans: list[Span]
    text: str = ""
    finish_reason: FinishReason = "stop"


class Margins(Record, frozen=True, kw_only=True):
    """Chosen minus rejected; None where it cannot be computed."""

    external: float | None = None
    implicit: float | None = None  # h(chosen) - h(rejected), no beta


class Pair(Record, frozen=True, kw_only=True):
    """One training example, with everything needed to trace it back to its samples."""

    policy: str
    request_number: int
    group_id: str
    prompt_id: str
    content_hash: str
    prompt_tokens: list[int]
    chosen: Response
    rejected: Response | None  # None on the sft route
    route: Route
    margins: Margins
    settings_hash: str  # of the selection settings that made it
    reference_version: str
    rating_gap: float | None = None
    weight: float = 1.0
    spread: float | None = None  # standard deviation of the group's rewards
    prompt_text: str = ""  # for people
    index: int = 0  # this example among
    num_examples: int = 1  # the examples of its group and policy
    config_version: int = 0
    sampled_by: str | None = None  # the policy of the spans' versions and sampled log-probs, where it is another one
    source: Source | None = None
    schema: int = SCHEMA

    @property
    def pair_id(self) -> str:
        """The same group, roles and settings always give the same id, so a duplicate is visible anywhere."""
        rejected = None if self.rejected is None else self.rejected.candidate
        return stable_id(self.policy, self.group_id, self.chosen.candidate, rejected, self.settings_hash, self.index)


class Feedback(Record, frozen=True, kw_only=True):
    """How an example ended, from whichever stage ended it. Read by the scheduler and the audit."""

    request_number: int
    group_id: str
    prompt_id: str
    policy: str
    ending: Ending
    stage: str
    reason: str = ""
    pair_id: str | None = None
    content_hash: str = ""
    route: Route | None = None
    index: int = 0
    num_examples: int = 1
    epoch: int | None = None  # consumed and trained: the learner's
    step: int | None = None
    staleness: int | None = None  # consumed: weight versions between the oldest token and the step
    loss: float | None = None  # consumed: of this example, at that step
    chosen_logprob: float | None = None  # consumed: under the policy at that step, summed over the tokens
    rejected_logprob: float | None = None
    margin: float | None = None
    spread: float | None = None
    mean_reward: float | None = None
    round: int | None = None  # evaluated: which round,
    round_size: int | None = None
    version: Version | None = None  # and which single version sampled it
    sampled_by: str | None = None  # another policy that sampled it: staleness counts that policy's versions
    told_by: int | None = None  # epoch of the learner that wrote this, where another one took the step
    time_s: float = 0.0
    schema: int = SCHEMA

    def ends_for(self, policy: str) -> bool:
        """Whether a policy counts this ending: it is its own, or fell before the policies' ways part."""
        return self.policy == policy or self.stage in SHARED_STAGES


class Probe(Record, frozen=True, kw_only=True):
    """A fixed sequence with the learner's log-probs under the published version: what the parity probe compares."""

    prompt_tokens: list[int]
    response_tokens: list[int]
    logprobs: list[float]


class Fence(Record, frozen=True, kw_only=True):
    """A start took over: what older ones append to its topic from here on is void. A scheduler's epoch is its claim."""

    epoch: int
    ends: list[tuple[int, int]]  # partition of `feedback` (learner) or `prompts`, its end when the epoch began


class WeightVersion(Record, frozen=True, kw_only=True):
    """A published version. `location` is a complete Hugging Face model directory with our manifest in it."""

    policy: str
    version: Version
    location: str
    manifest_sha256: str
    step: int  # learner steps taken
    lineage: list[Version] = []  # last version of each older epoch that this one descends from
    probe: Probe | None = None
    fences: list[Fence] = []  # of this epoch and older ones
    format: Literal["safetensors"] = "safetensors"
    kind: Literal["full", "delta", "adapter"] = "full"
    time_s: float = 0.0
    schema: int = SCHEMA


class RoleState(Record, frozen=True, kw_only=True):
    """A role's heartbeat: what it is doing, what it holds, what `status` shows."""

    role: str  # scheduler | generator | scorer | selector | learner; of a further policy "learner.POLICY"
    role_id: str  # role and index: "generator-0"
    pid: int
    host: str
    time_s: float
    epoch: int = 0  # starts of this role
    version: Version | None = None
    config_version: int = 0
    health: Literal["starting", "ready", "degraded", "stopping", "stopped", "failed"] = "ready"
    message: str = ""
    leases: list[Version] = []  # weight versions that must not be deleted
    fences: list[Fence] = []  # scheduler: of this start and older ones; the newest of them is its claim
    seconds: dict[str, float] = {}  # busy | waiting | blocked | updating, since this start
    numbers: dict[str, float] = {}  # the role's few headline figures, for status and the live view
    metrics_address: str | None = None
    schema: int = SCHEMA


class Ended(Record, frozen=True, kw_only=True):
    """The final ending of one example."""

    index: int
    ending: Ending
    reason: str = ""
    step: int | None = None  # of a learner's ending
    content_hash: str = ""  # of the sampling that ended so, where it is known


class Account(Record, frozen=True, kw_only=True):
    """What feedback has said about one request, for one policy."""

    number: int
    num_examples: int = 1
    is_consumed: bool = False
    ended: list[Ended] = []  # each example's first final ending


class CarriedBalance(Record, frozen=True, kw_only=True):
    """A policy's books up to some place in the log: what retention takes before that place stays counted."""

    policy: str
    places: list[tuple[str, int, int]] = []  # topic, partition, next offset: everything before is in here
    issued: list[tuple[int, int]] = []  # [first, end) of request numbers
    closed: list[tuple[int, int]] = []  # ended and counted, without an account
    endings: list[tuple[str, str, int]] = []  # ending, reason, closed requests
    accounts: list[Account] = []  # of the newest requests, and of those that have not ended
    ended_twice: list[int] = []
    next_ordinal: int = 0
    ordinals: list[tuple[int, int]] = []  # of the issued training requests; none: all below the next one
    is_whole: bool = True  # False: retention took what no balance before this one held, and this one lacks it too
    time_s: float = 0.0
    schema: int = SCHEMA


class DeadLetter(Record, frozen=True, kw_only=True):
    """Bytes that a stage could not process, untouched, and why."""

    stage: str
    source: Source
    key: bytes
    value: bytes
    reason: str
    attempts: int
    time_s: float
    schema: int = SCHEMA
