"""A person's data set becomes prompts: files of several formats, and whatever `datasets` loads.

file or hub name -> rows with their place -> Prompt (text or messages, golden answer, other columns)

Knows no tokenizer and no log. Every error names the file, the row and what to do.
"""

import csv
import datetime
import decimal
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from actors.config import PromptsConfig
from streaming.errors import DataError
from streaming.records import Message, stable_id

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""Files that are read here, with line numbers in their errors; everything else goes to `datasets`."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

LIKELY_COLUMNS = ("messages", "question", "instruction", "query", "input", "text", "problem")
"""Where other data sets keep the prompt: named in the advice when the prompt column is missing."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the data set. Exactly one of `text` and `messages` is set."""

    prompt_id: str
    text: str | None = None
    messages: list[Message] | None = None
    golden: str | None = None
    columns: dict[str, Any]


class Row(NamedTuple):
    """A row and where it stands, for errors."""

    where: str
    values: dict[str, Any]


class ChatTokenizer(Protocol):
    """What this file needs of a tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


def read_prompts(config: PromptsConfig) -> list[Prompt]:
    """The training prompts, in the data set's order. Raises DataError for the first thing that is wrong."""
    return _read(config.path, config.split, config)


def read_eval_prompts(config: PromptsConfig) -> list[Prompt]:
    """The held-out prompts (the first `max_eval_prompts`); empty where none are configured."""
    if config.eval_path is None:
        return []
    return _read(config.eval_path, config.eval_split, config)[: config.max_eval_prompts]


def check_chat_template(prompts: Sequence[Prompt], tokenizer: ChatTokenizer, *, model: str) -> None:
    """Raises DataError where the prompts are conversations and the model cannot render them.

    One prompt of every sequence of roles is rendered: some templates refuse a system turn.
    """
    by_roles = {tuple(m.role for m in prompt.messages): prompt for prompt in prompts if prompt.messages}
    if by_roles and not tokenizer.chat_template:
        raise DataError(
            "the prompts are messages, but the model's tokenizer has no chat template",
            where=model,
            do="Take an instruction-tuned model, put a chat_template.jinja into its directory, or write text prompts.",
        )
    for roles, prompt in by_roles.items():
        _render(prompt, tokenizer, roles=roles, model=model)


def _render(prompt: Prompt, tokenizer: ChatTokenizer, *, roles: tuple[str, ...], model: str) -> None:
    from jinja2 import TemplateError

    conversation = [{"role": m.role, "content": m.content} for m in prompt.messages or []]
    try:
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as cause:
        raise DataError(
            f"the model's chat template refuses messages with the roles {', '.join(roles)}: {cause}",
            where=model,
            do="Write the prompts with roles that this model knows (often only user and assistant).",
        ) from cause


def _read(path: str, split: str, config: PromptsConfig) -> list[Prompt]:
    prompts = [_prompt(row, config) for row in _rows(path, split, config)]
    if not prompts:
        raise DataError("holds no prompts", where=path, do=f"Write one row with {config.prompt_column!r} per prompt.")
    return prompts


def _rows(path: str, split: str, config: PromptsConfig) -> Iterator[Row]:
    file = Path(path)
    if file.is_file():
        readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
        if file.suffix == ".csv":
            return _csv_rows(file, config)
        if file.suffix in readers:
            return readers[file.suffix](file)
        raise DataError(
            f"has the suffix {file.suffix!r}", where=path, do=f"Give a file of these kinds: {', '.join(FILE_SUFFIXES)}."
        )
    if file.exists():
        return _datasets_rows(path, split)
    if file.suffix in FILE_SUFFIXES or not HUB_NAME.fullmatch(path):
        raise DataError("does not exist", where=path, do="Mend prompts.path (or prompts.eval_path).")
    return _datasets_rows(path, split)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield Row(where, _object(_parse(line.rstrip(b"\r\n"), where), where))


def _json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes()
    values = _parse(content, str(path)) if content.strip() else []
    if not isinstance(values, list):
        raise DataError(
            f"holds a JSON {type(values).__name__}, not a list of rows",
            where=str(path),
            do="Write [{...}, {...}], or one object per line in a file ending in .jsonl.",
        )
    for number, value in enumerate(values, start=1):
        where = f"{path}: row {number}"
        yield Row(where, _object(value, where))


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        place = f"line {cause.lineno}, column {cause.colno}" if text.count(b"\n") > 1 else f"column {cause.colno}"
        raise DataError(f"is not JSON ({place}): {cause.msg}", where=where, do=_JSON_HELP) from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"is not UTF-8: {cause.reason}", where=where, do="Save the file as UTF-8.") from cause


_JSON_HELP = "Mend or delete this line. (One object per line: the file's name ends in .jsonl; one list: in .json.)"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"is a JSON {type(value).__name__}, not an object", where=where, do='Write {"prompt": "..."} in each row.'
        )
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"is not a parquet file: {cause}", where=str(path), do="Write the file again.") from cause
    return _numbered(table.to_pylist(), path)


def _csv_rows(path: Path, config: PromptsConfig) -> Iterator[Row]:
    """Types are inferred as `datasets` infers them, except that the prompt and the golden answer stay text."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    _check_csv(path)
    text = {name: pyarrow.string() for name in (config.prompt_column, config.golden_column) if name}
    try:
        table = arrow_csv.read_csv(
            path,
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=text),
        )
    except pyarrow.ArrowException as cause:
        raise DataError(f"is not CSV: {cause}", where=str(path), do="Mend this row.") from cause
    return _numbered(table.to_pylist(), path)


def _check_csv(path: Path) -> None:
    """The number of the first line with too few or too many fields: pyarrow counts rows, people count lines."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"has {len(row)} fields, but the header has {len(header)}",
                        where=f"{path}:{rows.line_num}",
                        do="Mend this line (a comma inside a field needs quotes round it).",
                    )
    except csv.Error as cause:
        raise DataError(f"is not CSV: {cause}", where=f"{path}:{rows.line_num}", do="Mend this line.") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"is not UTF-8: {cause.reason}", where=str(path), do="Save the file as UTF-8.") from cause
    if not header:
        raise DataError("holds no prompts", where=str(path), do="Write a header line, then one line per prompt.")


def _numbered(rows: list[dict[str, Any]], path: Path) -> Iterator[Row]:
    return (Row(f"{path}: row {number}", values) for number, values in enumerate(rows, start=1))


def _datasets_rows(path: str, split: str) -> Iterator[Row]:
    """What `datasets` makes of a directory or hub name. Its errors differ by release, so all of them are caught."""
    import datasets

    try:
        if any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, split=split)
    except Exception as cause:
        first = cause.__cause__ or cause  # it wraps the error that says what is wrong
        raise DataError(
            f"`datasets` cannot load split {split!r} of it: {type(first).__name__}: {first}",
            where=path,
            do="Give an existing file or directory, or the name of a data set on the hub and one of its splits.",
        ) from cause
    return (Row(f"{path} [{split}]: row {number}", dict(row)) for number, row in enumerate(loaded, start=1))


def _prompt(row: Row, config: PromptsConfig) -> Prompt:
    if config.prompt_column not in row.values:
        raise _missing_column(row, config.prompt_column, setting="prompts.prompt_column")
    columns = {name: _plain(value, name, row.where) for name, value in row.values.items() if name is not None}
    value = columns.pop(config.prompt_column)
    golden = _golden(row, config, columns)
    text = value if isinstance(value, str) else None
    messages = None if text is not None else _messages(value, config.prompt_column, row.where)
    if text is not None and not text:
        raise DataError(f"{config.prompt_column!r} is empty", where=row.where, do="Delete the row or write a prompt.")
    content = json.dumps(
        [text, [(m.role, m.content) for m in messages or []], golden, columns], sort_keys=True, ensure_ascii=True
    )
    return Prompt(prompt_id=stable_id("prompt", content), text=text, messages=messages, golden=golden, columns=columns)


def _golden(row: Row, config: PromptsConfig, columns: dict[str, Any]) -> str | None:
    """The golden answer as text; its column stays with the others, because reward functions may name it too."""
    if config.golden_column is None:
        return None
    if config.golden_column not in columns:
        raise _missing_column(row, config.golden_column, setting="prompts.golden_column")
    value = columns[config.golden_column]
    if isinstance(value, dict | list):
        raise DataError(
            f"{config.golden_column!r} holds a {type(value).__name__}, not text",
            where=row.where,
            do="Write the golden answer as text.",
        )
    return None if value is None else str(value)


def _missing_column(row: Row, wanted: str, *, setting: str) -> DataError:
    found = [str(name) for name in row.values]
    near = difflib.get_close_matches(wanted, found, n=1, cutoff=0.6) or [n for n in LIKELY_COLUMNS if n in found]
    hint = f" (for instance {setting}: {near[0]})" if near else ""
    return DataError(
        f"has no column {wanted!r}; its columns are: {', '.join(found) or 'none'}",
        where=row.where,
        do=f"Rename the column, or set {setting} to the one that holds it{hint}.",
    )


def _messages(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise DataError(
            f"{column!r} holds {_short(value)}, neither text nor a list of messages", where=where, do=_MESSAGES_HELP
        )
    if not value:
        raise DataError(f"{column!r} is an empty list of messages", where=where, do=_MESSAGES_HELP)
    messages = [_message(turn, i, column, where) for i, turn in enumerate(value)]
    if messages[-1].role == "assistant":
        raise DataError(
            f"{column!r} ends with a message of the assistant: nothing is left to answer",
            where=where,
            do="Delete the last message (keep the answer in a column of its own, for instance prompts.golden_column).",
        )
    return messages


_MESSAGES_HELP = 'Write text, or [{"role": "user", "content": "..."}].'


def _message(turn: Any, index: int, column: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{column}[{index}] is {_short(turn)}, not a message", where=where, do=_MESSAGES_HELP)
    for field in ("role", "content"):
        if not isinstance(turn.get(field), str) or (field == "role" and not turn[field]):
            raise DataError(
                f"{column}[{index}].{field} is {_short(turn.get(field))}, not text", where=where, do=_MESSAGES_HELP
            )
    return Message(role=turn["role"], content=turn["content"])


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _plain(value: Any, column: str, where: str) -> Any:
    """The value as JSON knows it: parquet and `datasets` also have dates, decimals and bytes."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner, column, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, column, where) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise DataError(
        f"column {column!r} holds a {type(value).__name__}: only text, numbers, lists and objects travel in the log",
        where=where,
        do="Remove the column from the data set, or write it as text.",
    )
