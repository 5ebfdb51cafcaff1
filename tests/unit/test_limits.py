import math

import pytest
from msgspec.structs import replace

from learner.limits import Limits
from tests.builders import make_pair, make_response

LIMITS = Limits(max_length=12, vocabulary_size=90)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"chosen": make_response("2" * 7)}, None),
        ({"chosen": make_response("2" * 9)}, "too_long"),
        ({"rejected": make_response("2" * 9)}, "too_long"),
        ({"chosen": make_response(tokens=[5, 90])}, "bad_tokens"),
        ({"rejected": make_response(tokens=[-1])}, "bad_tokens"),
        ({"prompt_tokens": []}, "bad_tokens"),
        ({"chosen": make_response(reference_logprob=math.nan)}, "reference"),
        ({"rejected": make_response(reference_logprob=-math.inf)}, "reference"),
    ],
)
def test_a_pair_that_the_model_cannot_take_is_refused_with_the_reason(fields, reason):
    assert LIMITS.refuse(replace(make_pair(), **fields)) == reason


def test_a_model_without_a_length_limit_takes_any():
    assert Limits(None, 90).refuse(make_pair(chosen="2" * 500)) is None
