"""A learner dies at any file operation of a checkpoint: the one before is whole or the new one is, never neither."""

from pathlib import Path

import pytest

from learner import checkpoint
from learner.checkpoint import Layout, State
from learner.pairs import ReaderState
from learner.ranks import connect
from streaming.records import Version
from tests.builders import make_feedback
from tests.fault_rows import Injected
from tests.learner_process import CONTEXT, PATIENCE_S
from tests.light.fates import Fate, Moments

pytestmark = [pytest.mark.slow, pytest.mark.fault("kill: at a file operation of a checkpoint")]


class FileEngine:
    """An engine whose whole state is one file."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def save(self, directory: Path) -> list[Path]:
        (directory / "engine").mkdir()
        path = directory / "engine" / "state"
        path.write_bytes(self._content)
        return [path]


def save(root: Path, step: int, fate: Fate | None = None, *, epoch: int = 1) -> None:
    """Save a checkpoint of this step, and keep no other of its epoch."""
    if fate is not None:
        Moments(fate, file=None, awake=root / "awake").watch_files(root)
    state = State(
        step=step,
        version=Version(epoch, step),
        lineage=[],
        layout=Layout(1, 0, "float32"),
        reader=ReaderState([("pairs.policy", 0, 10 * step)]),
        endings=[make_feedback(step)],
    )
    with connect(1, {}) as ranks:
        checkpoint.save(root, state, FileEngine(b"%d" % step), ranks, keep=1)


def content(root: Path) -> bytes:
    """The parameters of the newest whole checkpoint."""
    found = checkpoint.newest(root)
    assert found is not None
    parameters = (found.directory / "engine" / "state").read_bytes()
    assert found.state.step == int(parameters)
    return parameters


@pytest.mark.filterwarnings("ignore:.*is passed over:UserWarning")
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, injected: Injected) -> None:
    found = []
    for at in range(1, 1000):
        root = tmp_path / str(at)
        save(root, 1)
        process = CONTEXT.Process(target=save, args=(root, 2, Fate("kill", at)))
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        found.append(content(root))
        save(root, 3, epoch=2)
        assert content(root) == b"3"
    injected(injected=len(found))
    assert found == sorted(found), "from some operation on it is the new one"
    assert set(found) == {b"1", b"2"}
    assert len(found) > 10
