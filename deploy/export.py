"""Pairs as a preference data set, as TRL reads it: `streamdpo export`.

    dpo:  prompt, chosen, rejected       sft:  prompt, completion       and columns that say where each row comes from

A prompt that was text gives text; a conversation gives lists of messages, the prompt's ending with the user's turn and
each side one turn of the assistant. TRL wants one kind in a data set, so a run that has both gets a file for each
(`.chat` in the name). Rows are written as they are read, in the order of the log; a file appears when it is whole.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from deploy.lookup import at
from streaming import topics
from streaming.errors import ConfigError
from streaming.fencing import read_fences, read_issuers
from streaming.history import records
from streaming.log.protocol import Log
from streaming.records import Feedback, Message, Pair, PromptRequest, Response, ScoredGroup, decode

SUFFIXES = (".parquet", ".jsonl")

_BATCH = 1024
"""Rows that go to a parquet file together: a row group of a few megabytes."""

Kind = tuple[Literal["dpo", "sft"], bool]
"""The route, and whether the prompts are conversations."""

Key = tuple[str, str]
"""Pair id and content hash: one pair of one sampling."""

Prompts = Mapping[int, list[Message] | None]
"""By request number: its messages, or None where it is text."""


class Exported(NamedTuple):
    """What was written."""

    files: dict[Path, int]  # rows of each
    num_untrained: int  # pairs left out because no durable step has trained them
    num_without_prompt: int  # pairs left out because their prompt is past retention


def export(
    log: Log, policy: str, out: Path, *, every: bool = False, routes: frozenset[str] = frozenset({"dpo", "sft"})
) -> Exported:
    """Write a policy's pairs to a file (the sft examples beside it) or a directory. What was there is replaced.

    By default what was trained on and is in a durable checkpoint; with `every` each pair that was made. Raises
    ConfigError for a file of another kind.
    """
    trained = _trained(log, policy)
    prompts = _prompts(log)
    num_untrained = num_without_prompt = 0
    with _Files(out) as files:
        for pair in _pairs(log, policy):
            step = trained.get((pair.pair_id, pair.content_hash))
            if pair.route not in routes:
                continue
            if step is None and not every:
                num_untrained += 1
                continue
            found = _messages_of(log, pair, prompts)
            if isinstance(found, _Unknown):
                num_without_prompt += 1
                continue
            files.write(("sft" if pair.rejected is None else "dpo", found is not None), row(pair, found, step))
        written = files.commit()
    return Exported(written, num_untrained, num_without_prompt)


def row(pair: Pair, messages: list[Message] | None, step: Feedback | None) -> dict[str, Any]:
    """A pair by TRL's names, then what we know beyond them. `messages`: its prompt, where that is a conversation."""
    is_chat = messages is not None
    example: dict[str, Any] = {
        "prompt": [_turn(message.role, message.content) for message in messages or []] if is_chat else pair.prompt_text
    }
    if pair.rejected is None:
        example |= {"completion": _said(pair.chosen, is_chat), "score": pair.chosen.reward}
    else:
        example |= {"chosen": _said(pair.chosen, is_chat), "rejected": _said(pair.rejected, is_chat)}
        example |= {"score_chosen": pair.chosen.reward, "score_rejected": pair.rejected.reward}
        example |= {"margin": pair.margins.external, "implicit_margin": pair.margins.implicit}
        example |= {"rejected_versions": _versions(pair.rejected), "rejected_end": pair.rejected.finish_reason}
    return example | {
        "chosen_versions": _versions(pair.chosen),
        "chosen_end": pair.chosen.finish_reason,
        "weight": pair.weight,
        "pair_id": pair.pair_id,
        "group_id": pair.group_id,
        "prompt_id": pair.prompt_id,
        "request_number": pair.request_number,
        "content_hash": pair.content_hash,
        "policy": pair.policy,
        "reference_version": pair.reference_version,
        "settings_hash": pair.settings_hash,
        "config_version": pair.config_version,
        "epoch": step.epoch if step else None,
        "step": step.step if step else None,
    }


# Reading


class _Unknown:
    """Nobody knows the prompt any more."""


def _trained(log: Log, policy: str) -> dict[Key, Feedback]:
    """How each pair ended that is in a durable checkpoint; what a learner said that had been replaced is void."""
    found: dict[Key, Feedback] = {}
    fences = read_fences(log)
    for entry, one in records(log, topics.FEEDBACK.name, Feedback):
        is_trained = one.policy == policy and one.ending == "trained" and not fences.is_void(one, entry)
        if is_trained and one.pair_id is not None:
            found.setdefault((one.pair_id, one.content_hash), one)
    return found


def _prompts(log: Log) -> Prompts:
    found: dict[int, list[Message] | None] = {}
    issuers = read_issuers(log)
    for entry, request in records(log, topics.PROMPTS.name, PromptRequest):
        if not issuers.is_void(request.claim, entry):
            found[request.number] = request.messages
    return found


def _pairs(log: Log, policy: str) -> Iterator[Pair]:
    """Each pair once: a stage that crashed has written some twice."""
    seen: set[Key] = set()
    for _, pair in records(log, topics.pairs(policy).name, Pair):
        if (key := (pair.pair_id, pair.content_hash)) not in seen:
            seen.add(key)
            yield pair


def _messages_of(log: Log, pair: Pair, prompts: Prompts) -> list[Message] | _Unknown | None:
    """The prompt's messages, None for a text; from the scored group where the request itself is past retention."""
    if pair.request_number in prompts:
        return prompts[pair.request_number]
    entry = None if pair.source is None else at(log, pair.source)
    return _Unknown() if entry is None else decode(ScoredGroup, entry.value, where=entry.where).group.request.messages


def _said(response: Response, is_chat: bool) -> Any:
    return [_turn("assistant", response.text)] if is_chat else response.text


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _versions(response: Response) -> list[str]:
    return [str(span.version) for span in response.spans]


# Writing


class _Writer(Protocol):
    def write(self, example: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Files:
    """A file per kind of row, under its final name only after `commit`."""

    def __init__(self, out: Path) -> None:
        is_file = out.suffix in SUFFIXES and not out.is_dir()
        if not is_file and not out.is_dir() and (out.suffix or out.exists()):
            raise ConfigError(
                f"is neither a directory nor one of {', '.join(SUFFIXES)}", where=str(out), do="Name another --out."
            )
        self._folder = out.parent if is_file else out
        self._stem = out.stem if is_file else None
        self._suffix = out.suffix if is_file else ".parquet"
        self._writers: dict[Kind, _Writer] = {}
        self._counts: dict[Kind, int] = {}

    def write(self, kind: Kind, example: dict[str, Any]) -> None:
        if kind not in self._writers:
            self._folder.mkdir(parents=True, exist_ok=True)
            make = _Parquet if self._suffix == ".parquet" else _Lines
            self._writers[kind] = make(self._partial(kind), kind)
        self._writers[kind].write(example)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def commit(self) -> dict[Path, int]:
        """Every file under its name, and how many rows it has."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        written = {}
        for kind, count in sorted(self._counts.items()):
            self._partial(kind).replace(self._folder / self._name(kind))
            written[self._folder / self._name(kind)] = count
        return written

    def __enter__(self) -> "_Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for unfinished, writer in self._writers.items():
            writer.close()
            self._partial(unfinished).unlink()

    def _partial(self, kind: Kind) -> Path:
        return self._folder / f".{self._stem or 'export'}.{kind[0]}.{kind[1]:d}.partial"

    def _name(self, kind: Kind) -> str:
        route, is_chat = kind
        is_mixed = (route, not is_chat) in self._counts
        name = route if self._stem is None else self._stem + (".sft" if route == "sft" else "")
        return f"{name}{'.chat' if is_chat and is_mixed else ''}{self._suffix}"


class _Lines:
    """JSON lines."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, example: dict[str, Any]) -> None:
        self._file.write(json.dumps(example, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Row groups of one schema, whatever their rows happen to miss."""

    def __init__(self, path: Path, kind: Kind) -> None:
        from pyarrow import parquet

        self._schema = _schema(*kind)
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, example: dict[str, Any]) -> None:
        self._rows.append(example)
        if len(self._rows) >= _BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _schema(route: str, is_chat: bool) -> Any:
    import pyarrow

    text, number, count = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    said = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])) if is_chat else text
    versions = pyarrow.list_(text)
    sides = [("completion", said), ("score", number)]
    if route == "dpo":
        sides = [("chosen", said), ("rejected", said), ("score_chosen", number), ("score_rejected", number)]
        sides += [("margin", number), ("implicit_margin", number)]
        sides += [("rejected_versions", versions), ("rejected_end", text)]
    ids = ("pair_id", "group_id", "prompt_id", "request_number", "content_hash", "policy", "reference_version")
    return pyarrow.schema(
        [
            ("prompt", said),
            *sides,
            *[("chosen_versions", versions), ("chosen_end", text), ("weight", number)],
            *[(name, count if name == "request_number" else text) for name in ids],
            *[("settings_hash", text), ("config_version", count), ("epoch", count), ("step", count)],
        ]
    )
