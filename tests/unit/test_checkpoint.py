import msgspec
import pytest
from msgspec.structs import replace

from learner.checkpoint import MANIFEST, STATE, Layout, State, check_layout, newest, newest_epoch, save
from learner.pairs import ReaderState
from streaming.errors import ConfigError
from streaming.records import Version
from tests.builders import make_feedback


class FileEngine:
    """An engine whose whole state is one file."""

    def __init__(self, content: bytes = b"parameters") -> None:
        self.content = content

    def save(self, directory):
        (directory / "engine").mkdir()
        (directory / "engine" / "state").write_bytes(self.content)
        return [directory / "engine" / "state"]


def make_state(step=1, *, epoch=1, dtype="float32", **fields):
    return State(
        step=step,
        version=Version(epoch, step),
        lineage=[],
        layout=Layout(1, 0, dtype),
        reader=ReaderState([("pairs.policy", 0, 10 * step)]),
        endings=[make_feedback(step)],
        **fields,
    )


def keep_all(root, ranks, *states):
    return [save(root, state, FileEngine(), ranks, keep=10) for state in states]


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(3))
    found = newest(tmp_path)
    assert found.state == make_state(3)
    assert (found.directory / "engine" / "state").read_bytes() == b"parameters"


def test_a_checkpoint_of_before_there_was_a_gap_scale_is_read(tmp_path, ranks):
    [directory] = keep_all(tmp_path, ranks, make_state(3))
    older = msgspec.msgpack.decode((directory / STATE).read_bytes())
    del older["gap_scale"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=State) == make_state(3)


def test_the_newest_epoch_wins_over_the_larger_step(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(20, epoch=1), make_state(3, epoch=10), make_state(4, epoch=9))
    assert newest(tmp_path).state.version == Version(10, 3)


def test_steps_are_compared_as_numbers(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(9), make_state(10))
    assert newest(tmp_path).state.step == 10


def test_a_step_that_is_saved_again_has_the_newer_state(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(5), make_state(5, probe=None, format=1), replace(make_state(5), endings=[]))
    assert newest(tmp_path).state.endings == []


def test_without_its_manifest_a_checkpoint_does_not_count(tmp_path, ranks):
    _, torn = keep_all(tmp_path, ranks, make_state(1), make_state(2))
    (torn / MANIFEST).unlink()
    assert newest(tmp_path).state.step == 1


@pytest.mark.parametrize("name", ["engine/state", "state.msgpack", "rank-0.msgpack", MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, ranks, name):
    _, damaged = keep_all(tmp_path, ranks, make_state(1), make_state(2))
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-3])
    with pytest.warns(UserWarning, match="step-2 is passed over"):
        assert newest(tmp_path).state.step == 1


def test_a_checkpoint_of_a_newer_release_is_passed_over(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(1), make_state(2, format=99))
    with pytest.warns(UserWarning, match="newer release"):
        assert newest(tmp_path).state.step == 1


def test_only_the_newest_of_the_own_epoch_stay(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(1, epoch=1))
    for step in (2, 3, 4):
        save(tmp_path, make_state(step, epoch=2), FileEngine(), ranks, keep=2)
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert kept == ["epoch-1/step-1", "epoch-2/step-3", "epoch-2/step-4"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest(tmp_path / "nothing") is None
    assert newest_epoch(tmp_path / "nothing") == 0


def test_an_epoch_that_committed_nothing_still_counts_as_started(tmp_path, ranks):
    [torn] = keep_all(tmp_path, ranks, make_state(1, epoch=4))
    (torn / MANIFEST).unlink()
    assert newest_epoch(tmp_path) == 4


@pytest.mark.parametrize("layout", [Layout(1, 2, "float32"), Layout(1, 0, "bfloat16")])
def test_another_layout_is_refused_before_anything_is_loaded(tmp_path, ranks, layout):
    keep_all(tmp_path, ranks, make_state(1))
    with pytest.raises(ConfigError, match="the settings say"):
        check_layout(newest(tmp_path), layout)


def test_the_number_of_ranks_may_not_change_in_bfloat16(tmp_path, ranks):
    """Its state is shared out whatever stage is set: DeepSpeed used to refuse the checkpoint in its own words."""
    keep_all(tmp_path, ranks, make_state(1, dtype="bfloat16"))
    check_layout(newest(tmp_path), Layout(1, 0, "bfloat16"))
    with pytest.raises(ConfigError, match="the settings say"):
        check_layout(newest(tmp_path), Layout(2, 0, "bfloat16"))


def test_the_number_of_ranks_may_change_where_nothing_is_shared_out(tmp_path, ranks):
    keep_all(tmp_path, ranks, make_state(1))
    check_layout(newest(tmp_path), Layout(2, 0, "float32"))
