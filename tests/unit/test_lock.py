import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import run_directory
from deploy.launcher import launch
from deploy.lock import only_launcher
from streaming.errors import NotReadyError
from tests.builders import make_config

HOLD = (
    "import sys, time; from pathlib import Path; from deploy.lock import only_launcher\n"
    "with only_launcher(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_a_second_launcher_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        only_launcher(tmp_path),
        pytest.raises(NotReadyError, match=rf"\(pid {os.getpid()} on"),
        only_launcher(tmp_path),
    ):
        pass
    with only_launcher(tmp_path):
        pass


def test_a_launcher_that_was_killed_locks_nobody_out(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(NotReadyError, match=f"pid {process.pid} on"), only_launcher(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with only_launcher(tmp_path):
        pass


def test_a_run_that_is_running_is_not_started_again_and_keeps_its_settings(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    directory = run_directory(config)
    with only_launcher(directory), pytest.raises(NotReadyError, match="running already"):
        launch(config, view=None)  # type: ignore[arg-type]  # it comes to no view
    assert not (directory / "config.yaml").exists()
