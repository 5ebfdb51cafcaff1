"""Which example was it, of a pair that nobody can read? It ends as a dead letter, so that its request is not lost.

bytes -> a few fields of them, where these are still there -> else the request whose group the key names
"""

from streaming.dead_letters import request_under
from streaming.errors import RecordError
from streaming.log.outlines import PairOutline
from streaming.log.protocol import Entry, Log
from streaming.records import Margins, Pair, Response, decode

UNREADABLE = "record"
"""Why the example is dropped; its final ending is `dead_lettered`, as the stages before the learner say it."""


def known_of(log: Log, entry: Entry, *, policy: str) -> Pair | None:
    """A pair without content that says whose example these bytes were; None where nothing tells."""
    try:
        return _without_content(decode(PairOutline, entry.value, where=entry.where), policy)
    except RecordError:
        request = request_under(log, entry.key)
    if request is None:
        return None
    outline = PairOutline(
        request_number=request.number,
        group_id=request.group_id,
        prompt_id=request.prompt_id,
        content_hash="",
        settings_hash="",
    )
    return _without_content(outline, policy)


def _without_content(outline: PairOutline, policy: str) -> Pair:
    return Pair(
        policy=policy,
        request_number=outline.request_number,
        group_id=outline.group_id,
        prompt_id=outline.prompt_id,
        content_hash=outline.content_hash,
        settings_hash=outline.settings_hash,
        index=outline.index,
        num_examples=outline.num_examples,
        prompt_tokens=[],
        chosen=Response(candidate=0, tokens=[], reference_logprob=0.0, reward=None, sampled_logprob=None, spans=[]),
        rejected=None,
        route="drop",
        margins=Margins(),
        reference_version="",
    )
