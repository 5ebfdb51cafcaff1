import json
from pathlib import Path

import pytest

from actors.config import PromptsConfig
from actors.prompts import check_chat_template, read_eval_prompts, read_prompts
from deploy.tiny_model import build_tokenizer
from streaming.errors import DataError
from streaming.records import Message

ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2=", "answer": 4}]
CHAT = [{"prompt": [{"role": "user", "content": "Hi"}], "topic": "greeting"}]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_json(path: Path, rows: list) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def write_parquet(path: Path, rows: list) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_saved(path: Path, rows: list) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return str(path)


WRITERS = {"a.jsonl": write_jsonl, "a.json": write_json, "a.parquet": write_parquet, "saved": write_saved}


def error_of(path: Path | str, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(PromptsConfig(path=str(path), **settings))
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_text_prompts_keep_their_other_columns_in_every_format(tmp_path, name):
    path = WRITERS[name](tmp_path / name, ROWS)
    prompts = read_prompts(PromptsConfig(path=path))
    assert [(p.text, p.columns) for p in prompts] == [("1+1=", {"answer": 2}), ("2+2=", {"answer": 4})]


@pytest.mark.parametrize("name", WRITERS)
def test_conversations_become_messages_in_every_format(tmp_path, name):
    path = WRITERS[name](tmp_path / name, CHAT)
    (prompt,) = read_prompts(PromptsConfig(path=path))
    assert prompt.text is None
    assert prompt.messages == [Message(role="user", content="Hi")]
    assert prompt.columns == {"topic": "greeting"}


def test_csv_infers_numbers_but_leaves_the_prompt_and_the_golden_answer_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer,weight\n12,007,1.5\n"a, b\nc",8,2\n')
    prompts = read_prompts(PromptsConfig(path=str(path), golden_column="answer"))
    assert [p.text for p in prompts] == ["12", "a, b\nc"]
    assert [p.golden for p in prompts] == ["007", "8"]
    assert prompts[0].columns == {"answer": "007", "weight": 1.5}


def test_prompt_ids_depend_on_the_content_alone(tmp_path):
    one, two = read_prompts(PromptsConfig(path=write_jsonl(tmp_path / "a.jsonl", ROWS)))
    again = read_prompts(PromptsConfig(path=write_parquet(tmp_path / "b.parquet", ROWS[::-1])))
    assert [p.prompt_id for p in again] == [two.prompt_id, one.prompt_id]
    assert one.prompt_id != two.prompt_id


def test_the_same_question_with_another_answer_is_another_prompt(tmp_path):
    rows = [{"prompt": "1+1=", "answer": answer} for answer in (2, 3)]
    one, two = read_prompts(PromptsConfig(path=write_jsonl(tmp_path / "a.jsonl", rows)))
    assert one.prompt_id != two.prompt_id


def test_held_out_prompts_are_the_first_of_their_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert [p.text for p in read_eval_prompts(PromptsConfig(path="-", eval_path=path, max_eval_prompts=1))] == ["1+1="]
    assert read_eval_prompts(PromptsConfig(path="-")) == []


def test_dates_and_decimals_travel_as_json(tmp_path):
    import datetime
    import decimal

    rows = [{"prompt": "x", "day": datetime.date(2024, 1, 2), "price": decimal.Decimal("1.5"), "gap": float("nan")}]
    (prompt,) = read_prompts(PromptsConfig(path=write_parquet(tmp_path / "a.parquet", rows)))
    assert prompt.columns == {"day": "2024-01-02", "price": 1.5, "gap": None}


def test_a_wrong_path_is_named(tmp_path):
    text = error_of(tmp_path / "nowhere.jsonl")
    assert text.startswith(f"{tmp_path}/nowhere.jsonl: does not exist")
    assert "prompts.path" in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_an_empty_file_holds_no_prompts(tmp_path, name):
    (tmp_path / name).write_text("")
    assert error_of(tmp_path / name).startswith(f"{tmp_path}/{name}: holds no prompts")


def test_a_csv_file_with_only_a_header_holds_no_prompts(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    assert "holds no prompts" in error_of(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "1', "is not JSON (column 12): "),
        ('"text"', "is a JSON str, not an object"),
        ("\x00", "is not JSON"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, what):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "ok"}\n\n' + line + "\n")
    assert error_of(path).startswith(f"{path}:3: {what}")


def test_bytes_that_are_not_utf_8_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff"}\n')
    assert error_of(path).startswith(f"{path}:2: is not UTF-8")


def test_a_csv_line_with_a_field_too_many_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"two\nlines",1\nx,2,3\n')
    assert error_of(path).startswith(f"{path}:4: has 3 fields, but the header has 2")


def test_a_missing_prompt_column_lists_what_was_found(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1=", "answer": 2}])
    text = error_of(path)
    assert text.startswith(f"{path}:1: has no column 'prompt'; its columns are: question, answer")
    assert "prompts.prompt_column: question" in text


def test_a_row_without_the_golden_column_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "c"}])
    assert error_of(path, golden_column="answer").startswith(f"{path}:2: has no column 'answer'")


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        (5, "'prompt' holds 5, neither text nor a list of messages"),
        (None, "'prompt' holds missing, neither text nor a list of messages"),
        ("", "'prompt' is empty"),
        ([], "'prompt' is an empty list of messages"),
        (["Hi"], "prompt[0] is 'Hi', not a message"),
        ([{"role": "user"}], "prompt[0].content is missing, not text"),
        ([{"role": "", "content": "Hi"}], "prompt[0].role is '', not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "prompt[0].content is [{'type': 'image'}], not text"),
        ([{"role": "assistant", "content": "Hi"}], "'prompt' ends with a message of the assistant"),
    ],
)
def test_a_malformed_prompt_is_named_by_its_line(tmp_path, prompt, what):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt}])
    assert error_of(path).startswith(f"{path}:1: {what}")


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_work(tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    assert ".jsonl, .json, .parquet, .csv" in error_of(tmp_path / "a.txt")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("Hello")
    assert "a.parquet: is not a parquet file" in error_of(tmp_path / "a.parquet")


def test_a_missing_split_is_named(tmp_path):
    write_saved(tmp_path / "saved", ROWS)
    assert "`datasets` cannot load split 'other'" in error_of(tmp_path / "saved", split="other")


def test_messages_for_a_model_without_chat_template_are_refused(tmp_path):
    prompts = read_prompts(PromptsConfig(path=write_jsonl(tmp_path / "a.jsonl", CHAT)))
    with pytest.raises(DataError, match=r"base-model: the prompts are messages, .* has no chat template"):
        check_chat_template(prompts, build_tokenizer(chat_template=False), model="base-model")
    check_chat_template(prompts, build_tokenizer(), model="chat-model")


def test_text_prompts_need_no_chat_template(tmp_path):
    prompts = read_prompts(PromptsConfig(path=write_jsonl(tmp_path / "a.jsonl", ROWS)))
    check_chat_template(prompts, build_tokenizer(chat_template=False), model="base-model")


def test_a_template_that_refuses_a_role_is_named_before_the_run(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompts = read_prompts(PromptsConfig(path=write_jsonl(tmp_path / "a.jsonl", [*CHAT, {"prompt": turns}])))
    with pytest.raises(DataError, match="refuses messages with the roles system, user: no system"):
        check_chat_template(prompts, tokenizer, model="m")
