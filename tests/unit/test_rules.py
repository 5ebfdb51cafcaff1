from streaming.rewards.rules import exact_answer, last_number, matches_pattern, within_length

CHAT = [[{"role": "assistant", "content": " 4 "}], [{"role": "assistant", "content": "5"}]]


def test_an_exact_answer_counts_in_both_formats() -> None:
    assert exact_answer(["4 ", "4."], answer=[4, 4]) == [1.0, 0.0]
    assert exact_answer(CHAT, answer=["4", "4"]) == [1.0, 0.0]


def test_the_golden_answer_serves_where_there_is_no_answer_column() -> None:
    assert exact_answer(["4"], golden=["4"]) == [1.0]
    assert exact_answer(["4"], answer=[5], golden=["4"]) == [0.0]


def test_a_prompt_without_the_column_has_no_reward() -> None:
    assert exact_answer(["4"]) == [None]
    assert last_number(["4"]) == [None]
    assert matches_pattern(["4"]) == [None]
    assert within_length(["4"], completion_ids=[[1]]) == [None]


def test_the_last_number_counts_however_it_is_written() -> None:
    texts = ["So 3 + 997 = 1,000.", "1000.0", "about 1000 or 900", "none"]
    assert last_number(texts, answer=["#### 1000"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_the_whole_completion_has_to_match() -> None:
    assert matches_pattern(["<a>\nb</a>", "x<a></a>"], pattern=["<a>.*</a>"] * 2) == [1.0, 0.0]


def test_length_is_counted_in_tokens() -> None:
    assert within_length(["long text", "s"], completion_ids=[[1], [1, 2]], length_limit=[1, 1]) == [1.0, 0.0]
