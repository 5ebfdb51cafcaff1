from pathlib import Path
from typing import Any

import pytest

from deploy.remote import check_stores, remote_weights, weights_cache
from streaming.errors import ConfigError, NotReadyError, TooLargeError
from streaming.log.protocol import Log
from streaming.metrics import Metrics
from streaming.records import Version
from streaming.remote import RemoteFolder
from tests.builders import make_config, make_weights
from tests.s3_server import S3Server


def folder(url: str, pauses: list[float]) -> RemoteFolder:
    return RemoteFolder(url, setting="a.b", error=TooLargeError, pauses_s=(1.0, 2.0), wait=pauses.append)


def fails(*errors: Exception) -> Any:
    """Something that raises these, one a call, and then returns "done"."""
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_what_fails_for_a_while_is_tried_again(tmp_path: Path) -> None:
    pauses: list[float] = []
    assert folder(str(tmp_path), pauses).attempt("read", "x", fails(OSError("away"), RuntimeError("away"))) == "done"
    assert pauses == [1.0, 2.0]


def test_what_goes_on_failing_is_the_callers_error_with_verb_place_and_cause(tmp_path: Path) -> None:
    with pytest.raises(TooLargeError, match=rf"{tmp_path}/x: cannot read it: OSError: third"):
        folder(str(tmp_path), []).attempt("read", "x", fails(OSError("first"), OSError("second"), OSError("third")))


@pytest.mark.parametrize("error", [FileNotFoundError("no"), PermissionError("no")])
def test_what_no_further_try_mends_is_not_tried_again(tmp_path: Path, error: Exception) -> None:
    pauses: list[float] = []
    with pytest.raises((FileNotFoundError, TooLargeError)):
        folder(str(tmp_path), pauses).attempt("read", "x", fails(error))
    assert pauses == []


def test_a_url_of_no_known_kind_names_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"a\.b"):
        folder("nosuch://x", [])


def test_times_of_files_are_unix_times_whatever_the_file_system_calls_them(tmp_path: Path, s3: S3Server) -> None:
    for url in (str(tmp_path), f"memory://{tmp_path}", s3.make_bucket("times")):
        one = folder(url, [])
        one.write("x", lambda one=one: one.fs.pipe_file(one.path("x"), b"x"))
        (tmp_path / "now").write_bytes(b"")
        now_s = (tmp_path / "now").stat().st_mtime
        assert one.modified_s(one.fs.info(one.path("x"))) == pytest.approx(now_s, abs=60)


def test_stores_are_tried_out_and_left_as_they_were(tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.make_bucket("checked")
    config = make_config(log={"blobs": str(tmp_path / "blobs")}, learner={"publish": {"url": f"{bucket}/weights"}})
    assert check_stores(config) == f"{tmp_path}/blobs, {bucket}/weights"
    assert list((tmp_path / "blobs").iterdir()) == []


def test_without_a_store_nothing_is_tried_out() -> None:
    assert check_stores(make_config()).startswith("none")


def test_a_store_that_does_not_take_anything_is_found_before_the_run(s3: S3Server) -> None:
    with pytest.raises(NotReadyError, match="nothing to write it into"):
        check_stores(make_config(learner={"publish": {"url": "s3://no-such-bucket/weights"}}))


def test_every_run_and_policy_has_a_folder_of_its_own() -> None:
    policies = {"b": {"learner": {"optimizer": {}}}}
    config = make_config(learner={"publish": {"url": "memory://shared/"}}, policies=policies)
    found = [remote_weights(config, policy) for policy in config.every_policy]
    assert [one and one.url for one in found] == ["memory://shared/mine/policy", "memory://shared/mine/b"]
    assert remote_weights(make_config(), make_config().every_policy[0]) is None


def test_the_cache_is_one_per_run_and_policy(tmp_path: Path, log: Log) -> None:
    config = make_config(generation={"weights_cache": str(tmp_path)})
    record = make_weights(Version(1, 2), manifest_sha256="ab" * 32)
    place = weights_cache(config, log, Metrics("generator")).place(record)
    assert place == tmp_path / "mine" / "policy" / "1.2-abababababababab"
