import json
from pathlib import Path
from typing import Any

import pytest

from deploy.check_policies import check_policy
from deploy.config import RunConfig
from deploy.tiny_model import save_tiny_model
from streaming.errors import NotReadyError
from tests.builders import make_config


def config(folder: Path, **said: Any) -> RunConfig:
    save_tiny_model(folder / "model")
    return make_config(folder, model=str(folder / "model"), policies={"b": said})


def test_a_further_policy_with_the_same_tokenizer_may_learn_beside_the_runs_own(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "second", seed=7)
    settings = config(tmp_path, model=str(tmp_path / "second"))
    assert str(tmp_path / "second") in check_policy(settings, settings.every_policy[1])


def test_a_model_that_reads_other_tokens_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "second")
    path = tmp_path / "second" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    settings = config(tmp_path, model=str(tmp_path / "second"))
    with pytest.raises(NotReadyError, match="other tokens"):
        check_policy(settings, settings.every_policy[1])


@pytest.mark.parametrize("said", [{"model": "/nowhere/model"}, {"reference": "/nowhere/model"}])
def test_a_model_or_reference_that_is_not_there_is_named(tmp_path: Path, said: dict[str, str]) -> None:
    settings = config(tmp_path, **said)
    with pytest.raises(NotReadyError, match="/nowhere/model"):
        check_policy(settings, settings.every_policy[1])
