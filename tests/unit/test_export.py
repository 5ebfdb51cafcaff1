import json
from pathlib import Path
from typing import Any

import pytest

from deploy.export import export
from streaming.config import SelectionConfig
from streaming.errors import ConfigError
from streaming.fencing import fence_at_the_end
from streaming.log.protocol import Log, Output
from streaming.records import Fence, Message, Pair, Version
from tests.builders import make_prompt, make_role, make_weights
from tests.recorded import append, record_request, record_step

WITH_SFT = SelectionConfig(rule="max_min", sft_floor=0.5)
CHAT: dict[str, Any] = {
    "text": None,
    "messages": [Message(role="system", content="Count."), Message(role="user", content="1+1?")],
}


def made(log: Log, number: int = 0, rewards: tuple[float, ...] = (1.0, 0.0), **request: Any) -> Pair:
    pair = record_request(log, number, rewards, settings=WITH_SFT, **request)
    assert pair is not None
    return pair


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trained_pair_is_a_row_by_trls_names(log: Log, tmp_path: Path) -> None:
    pair = made(log, 3)
    record_step(log, pair, step=9)
    found = export(log, "policy", tmp_path / "out.jsonl")
    assert found.files == {tmp_path / "out.jsonl": 1}
    [row] = lines(tmp_path / "out.jsonl")
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin", "pair_id", "step", "epoch")
    assert [row[name] for name in names] == ["3+1=", "answer-0", "answer-1", 1.0, 0.0, 1.0, pair.pair_id, 9, 1]
    assert row["chosen_versions"] == ["1.0"]


def test_only_what_was_trained_on_is_written_unless_every_pair_is_asked_for(log: Log, tmp_path: Path) -> None:
    pairs = [made(log, number) for number in range(4)]
    record_step(log, pairs[1])
    record_step(log, pairs[2], is_durable=False)
    found = export(log, "policy", tmp_path / "trained.jsonl")
    assert [row["request_number"] for row in lines(tmp_path / "trained.jsonl")] == [1]
    assert found.num_untrained == 3
    export(log, "policy", tmp_path / "every.jsonl", every=True)
    rows = {row["request_number"]: row["step"] for row in lines(tmp_path / "every.jsonl")}
    assert rows == {0: None, 1: 1, 2: None, 3: None}


def test_a_pair_written_twice_is_one_row(log: Log, tmp_path: Path) -> None:
    pair = made(log)
    append(log, "pairs.policy", pair.pair_id, pair)
    assert export(log, "policy", tmp_path / "out.jsonl", every=True).files == {tmp_path / "out.jsonl": 1}


def test_of_two_contents_of_one_request_the_trained_one_is_written(log: Log, tmp_path: Path) -> None:
    record_step(log, made(log, texts=["a", "b"]))
    made(log, texts=["c", "d"])
    export(log, "policy", tmp_path / "out.jsonl")
    assert [row["chosen"] for row in lines(tmp_path / "out.jsonl")] == ["a"]


def test_what_a_replaced_learner_says_it_trained_is_not_written(log: Log, tmp_path: Path) -> None:
    first, second = made(log, 0), made(log, 1)
    record_step(log, first)
    ends = [(partition, offset) for (_, partition), offset in log.end_offsets("feedback").items()]
    append(log, "weights", "policy/full", make_weights(Version(2, 0), fences=[Fence(epoch=2, ends=ends)]))
    record_step(log, second)
    export(log, "policy", tmp_path / "out.jsonl")
    assert [row["request_number"] for row in lines(tmp_path / "out.jsonl")] == [0]


def test_sft_examples_lie_in_a_file_of_their_own(log: Log, tmp_path: Path) -> None:
    for pair in (made(log, 0), made(log, 1, (1.0, 1.0))):
        record_step(log, pair)
    found = export(log, "policy", tmp_path / "out.jsonl")
    assert found.files == {tmp_path / "out.jsonl": 1, tmp_path / "out.sft.jsonl": 1}
    [row] = lines(tmp_path / "out.sft.jsonl")
    assert (row["prompt"], row["completion"], row["score"]) == ("1+1=", "answer-0", 1.0)
    only = export(log, "policy", tmp_path / "set", routes=frozenset({"sft"}))
    assert only.files == {tmp_path / "set" / "sft.parquet": 1}


def test_a_conversation_is_a_list_of_messages(log: Log, tmp_path: Path) -> None:
    record_step(log, made(log, **CHAT))
    export(log, "policy", tmp_path / "out.jsonl")
    [row] = lines(tmp_path / "out.jsonl")
    assert row["prompt"] == [{"role": "system", "content": "Count."}, {"role": "user", "content": "1+1?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "answer-0"}]


def test_a_prompt_is_that_of_the_request_and_not_of_a_copy_that_counts_for_nothing(log: Log, tmp_path: Path) -> None:
    record_step(log, made(log, **CHAT))
    fence = fence_at_the_end(log, "prompts", 2)
    append(log, "roles", "scheduler-0/2", make_role("scheduler", epoch=2, fences=[fence]))
    append(log, "prompts", "p", make_prompt(0, claim=1, text="3+3="))
    export(log, "policy", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0]["prompt"][1]["content"] == "1+1?"


def test_texts_and_conversations_get_a_file_each(log: Log, tmp_path: Path) -> None:
    for pair in (made(log, 0), made(log, 1, **CHAT)):
        record_step(log, pair)
    found = export(log, "policy", tmp_path / "set")
    assert found.files == {tmp_path / "set" / "dpo.parquet": 1, tmp_path / "set" / "dpo.chat.parquet": 1}


def test_a_prompt_past_retention_is_taken_from_the_scored_group_or_the_pair_is_counted(
    log: Log, tmp_path: Path
) -> None:
    record_step(log, made(log, **CHAT))
    log.trim(log.end_offsets("prompts"))
    export(log, "policy", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0]["prompt"][1]["content"] == "1+1?"
    log.trim(log.end_offsets("scored"))
    found = export(log, "policy", tmp_path / "none.jsonl")
    assert (found.files, found.num_without_prompt) == ({}, 1)


def test_bytes_that_are_no_record_are_passed_over(log: Log, tmp_path: Path) -> None:
    log.append([Output(topic, b"k", b"junk") for topic in ("prompts", "feedback", "pairs.policy")])
    record_step(log, made(log))
    assert export(log, "policy", tmp_path / "out.jsonl").files == {tmp_path / "out.jsonl": 1}


def test_an_output_of_another_kind_is_refused_before_anything_is_written(log: Log, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a directory nor one of \.parquet, \.jsonl"):
        export(log, "policy", tmp_path / "out.csv")


def test_a_directory_may_have_a_name_with_a_point(log: Log, tmp_path: Path) -> None:
    """It was taken for a file of an unknown kind."""
    record_step(log, made(log, 0, (1.0, 0.0)))
    (tmp_path / "data.v2").mkdir()
    assert list(export(log, "policy", tmp_path / "data.v2").files) == [tmp_path / "data.v2" / "dpo.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_trl_trains_on_what_was_exported(log: Log, tmp_path: Path, chat: bool, suffix: str) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from deploy.tiny_model import save_tiny_model

    for number in range(4):
        record_step(log, made(log, number, (1.0, float(number % 2)), **(CHAT if chat else {})))
    files = export(log, "policy", tmp_path / f"out{suffix}").files
    assert list(files.values()) == [2, 2]
    model = str(save_tiny_model(tmp_path / "model", chat_template=True))
    kind = "parquet" if suffix == ".parquet" else "json"
    dpo, sft = (
        load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")) for path in files
    )
    common: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    for trainer, config, rows in ((DPOTrainer, DPOConfig, dpo), (SFTTrainer, SFTConfig, sft)):
        trained = trainer(
            AutoModelForCausalLM.from_pretrained(model),
            args=config(output_dir=str(tmp_path / "trl"), save_strategy="no", bf16=False, **common),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        assert trained.train().training_loss > 0
