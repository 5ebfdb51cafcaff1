"""The embedded log's own doors: its URL. Its promises are in contract/test_log.py."""

from pathlib import Path

import pytest

from streaming.errors import ConfigError, LogError
from streaming.log import open_log
from streaming.log.protocol import Output


def test_a_url_names_a_file(tmp_path: Path) -> None:
    for _ in range(2):
        with open_log(f"sqlite:///{tmp_path}/a.db", run="r", max_record_bytes=2**16, max_bytes=2**30) as log:
            log.append([Output("in", b"k", b"v")])
    assert (tmp_path / "a.db").exists()
    with open_log(f"sqlite:///{tmp_path}/a.db", run="r", max_record_bytes=2**16, max_bytes=2**30) as log:
        assert log.end_offsets("in") == {("in", 0): 2}


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite://log.db", "log.db", "", "redis://host/1", "kafka"])
def test_a_url_that_names_no_log_is_refused_with_its_form(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///FILE"):
        open_log(url, run="r", max_record_bytes=2**16, max_bytes=2**30)


def test_older_records_of_a_key_do_not_fill_a_compacted_topic(tmp_path: Path) -> None:
    with open_log(f"sqlite:///{tmp_path}/a.db", run="r", max_record_bytes=2**16, max_bytes=2**30) as log:
        for i in range(100):
            log.append([Output("roles", b"key%d" % (i % 3), b"%d" % i)])
        with log.assign({("roles", 0): 0}) as reader:
            assert [entry.offset for entry in reader.read(max_records=999, timeout_s=0)] == [97, 98, 99]


def test_a_closed_log_says_that_it_is_closed(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/a.db", run="r", max_record_bytes=2**16, max_bytes=2**30)
    log.append([Output("in", b"k", b"v")])
    log.close()
    with pytest.raises(LogError, match="was closed"):
        log.append([Output("in", b"k", b"v")])
