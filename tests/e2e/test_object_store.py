"""A whole run whose weights and large records travel through an object store."""

from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from deploy.config import load_run
from deploy.roles import open_run_log
from streaming import topics
from streaming.audit import audit_log
from streaming.history import entries
from streaming.log import open_log
from streaming.records import Feedback, decode
from streaming.wire import decode_reference
from tests.e2e.test_run import SETTINGS, run, write_run
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

STEPS = 3


def test_weights_and_large_groups_travel_through_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.make_bucket("run")
    sampling = {"num_candidates": 192, "max_tokens": 96}
    generation = {**SETTINGS["generation"], "sampling": sampling, "concurrency": 2}
    path = write_run(
        tmp_path,
        generation={**generation, "weights_cache": str(tmp_path / "cache")},
        scheduler={"pipeline_depth": 8},
        log={"blobs": f"{bucket}/blobs", "max_record_bytes": 65536},
        learner={
            **SETTINGS["learner"],
            "max_steps": STEPS,
            "batch": {"batch_size": 2},
            "publish": {"url": f"{bucket}/weights", "keep": 2},
        },
    )
    code, out, err = run(path)
    assert code == 0, out + err
    config = load_run(path)
    with open_run_log(config) as log:
        audit = audit_log(log, policy="policy")
        assert audit.ended_twice == []
        trained = [decode(Feedback, entry.value) for entry in entries(log, topics.FEEDBACK.name)]
        assert sum(one.ending == "trained" for one in trained) == 2 * STEPS
        assert not list(entries(log, topics.DEAD_LETTER.name))
    with open_log(f"sqlite:///{config.directory}/log.db", run=config.name, max_blob_bytes=0) as bare:
        groups = [decode_reference(entry.value) for entry in entries(bare, topics.CANDIDATES.name)]
    assert any(groups), "no group was large enough to leave the log"
    fs, root = url_to_fs(f"{bucket}/weights/{config.name}/policy")
    assert len(fs.ls(root)) <= 4  # the newest two, and what a generator still named at the end
    cached = list((tmp_path / "cache" / config.name / "policy").glob("1.*"))
    assert 1 <= len(cached) <= 4
