from collections import OrderedDict
from enum import IntEnum

import pytest
import torch

from learner.tree_file import read_tree, write_tree
from streaming.errors import WeightsError


def test_a_tree_of_tensors_comes_back_as_it_was(tmp_path):
    tree = {
        "module": OrderedDict(weight=torch.randn(3, 2), half=torch.ones(2, dtype=torch.bfloat16), none=None),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "empty": torch.zeros(0)}}, "groups": [{"lr": 1e-3}]},
        "plain": [1, "two", 3.5, True, (1, 2), {4}, torch.float16, torch.Size([2, 3])],
    }
    write_tree(tmp_path / "tree", tree)
    found = read_tree(tmp_path / "tree")
    assert found["plain"] == tree["plain"]
    assert found["optimizer"]["groups"] == [{"lr": 1e-3}]
    assert found["optimizer"]["state"][0]["empty"].shape == (0,)
    assert found["module"]["half"].dtype == torch.bfloat16
    torch.testing.assert_close(found["module"]["weight"], tree["module"]["weight"], rtol=0, atol=0)


def test_tied_tensors_are_written_once(tmp_path):
    weight = torch.zeros(1000)
    write_tree(tmp_path / "tied", {"a": weight, "b": weight})
    write_tree(tmp_path / "one", {"a": weight})
    assert (tmp_path / "tied").stat().st_size < (tmp_path / "one").stat().st_size + 200


def test_a_view_is_written_without_the_storage_behind_it(tmp_path):
    flat = torch.arange(100_000.0)
    write_tree(tmp_path / "views", {"a": flat[:2], "b": flat[2:4]})
    assert (tmp_path / "views").stat().st_size < 1000
    assert read_tree(tmp_path / "views")["b"].tolist() == [2.0, 3.0]


def test_an_enum_is_its_value(tmp_path):
    write_tree(tmp_path / "tree", {"stage": IntEnum("Stage", ["one", "two"]).two})
    assert read_tree(tmp_path / "tree") == {"stage": 2}


@pytest.mark.parametrize("foreign", [object(), torch.nn.Linear(1, 1), print])
def test_an_object_is_refused_because_reading_it_would_run_code(tmp_path, foreign):
    with pytest.raises(TypeError, match="cannot hold"):
        write_tree(tmp_path / "tree", {"x": foreign})


def test_a_file_that_is_no_tree_is_an_error(tmp_path):
    (tmp_path / "tree").write_bytes(b"\x80\x04pickle")
    with pytest.raises(WeightsError, match="not a tree"):
        read_tree(tmp_path / "tree")
