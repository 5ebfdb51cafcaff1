import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from deploy.tiny_model import save_tiny_model
from learner.claim import Claim, newest_version
from learner.policy import load_model
from learner.publisher import Publisher, snapshot
from streaming import topics
from streaming.errors import NotReadyError, SupersededError
from streaming.kept import LIVE_S, leased, prunable
from streaming.log import open_log
from streaming.log.protocol import Output
from streaming.records import Probe, Version, WeightVersion, decode, encode
from streaming.remote_weights import RemoteWeights
from streaming.weights import verify
from tests.builders import make_role


@pytest.fixture
def log(tmp_path):
    with open_log(f"sqlite:///{tmp_path}/log.db", run="run", max_record_bytes=2**20, max_bytes=2**30) as log:
        yield log


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path_factory):
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=request.param)
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"old weights")
    (directory / "special_tokens_map.json").write_text("{}")
    return directory


@pytest.fixture
def model(source):
    (source / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    model = load_model(str(source), dtype="float32", gradient_checkpointing=False, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def publisher(tmp_path, log, source, **settings):
    defaults = {"policy": "policy", "keep": 2, "dtype": None, "announced": lambda record: None}
    claim = settings.pop("claim", None) or Claim(tmp_path / "checkpoints", log, "policy")
    return Publisher(tmp_path / "weights", log, claim, source=source, **{**defaults, **settings})


def weights_of(model):
    """Tied ones as one tensor."""
    return model.state_dict(keep_vars=True).items()


def publish(one, model, *versions, **fields):
    for version in versions:
        one.publish(
            model,
            model.state_dict(keep_vars=True).items(),
            version,
            **{"step": version.number, "lineage": [], "probe": None, **fields},
        )
    one.wait()


def announced(log):
    """The newest announcement of each epoch, by key."""
    return {entry.key: decode(WeightVersion, entry.value) for entry in log.newest(topics.WEIGHTS.name).values()}


def newest(log):
    return newest_version(log, "policy")


def test_a_published_version_loads_as_it_is(tmp_path, log, source, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    publish(publisher(tmp_path, log, source), model, Version(1, 0))
    location = newest(log).location
    loaded = AutoModelForCausalLM.from_pretrained(location)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], parameter, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(location).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert GenerationConfig.from_pretrained(location).eos_token_id == 1
    assert (Path(location) / "special_tokens_map.json").exists()


def test_old_weights_do_not_travel(tmp_path, log, source, model):
    (source / "model-00001-of-00002.safetensors").write_bytes(b"old weights")
    publish(publisher(tmp_path, log, source), model, Version(1, 0))
    assert [path.name for path in (tmp_path / "weights" / "1.0").glob("*.safetensors")] == ["model.safetensors"]


def test_a_version_is_announced_with_everything_that_a_generator_needs(tmp_path, log, source, model):
    probe = Probe(prompt_tokens=[5], response_tokens=[6], logprobs=[-1.5])
    publish(publisher(tmp_path, log, source), model, Version(2, 7), step=40, lineage=[Version(1, 6)], probe=probe)
    record = newest(log)
    assert (record.version, record.step, record.lineage, record.probe) == (Version(2, 7), 40, [Version(1, 6)], probe)
    assert Path(record.location).is_absolute()


def test_a_version_is_whole_before_it_is_announced(tmp_path, log, source, model):
    seen = []

    def check(record):
        seen.append(verify(Path(record.location), record.manifest_sha256).version)

    publish(publisher(tmp_path, log, source, announced=check), model, Version(1, 0), Version(1, 1))
    assert seen == [Version(1, 0), Version(1, 1)]


def test_weights_are_those_of_the_moment_of_the_call(tmp_path, log, source, model):
    """Training goes on while a version is written."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = publisher(tmp_path, log, source)
    one.publish(model, weights_of(model), Version(1, 0), step=0, lineage=[], probe=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    one.wait()
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "weights" / "1.0" / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_weights_may_be_published_in_another_type(tmp_path, log, source, model):
    publish(publisher(tmp_path, log, source, dtype="bfloat16"), model, Version(1, 0))
    record = newest(log)
    tensors = verify(Path(record.location), record.manifest_sha256).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    assert json.loads((Path(record.location) / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_a_failed_start_left_under_the_same_name_is_replaced(tmp_path, log, source, model):
    torn = tmp_path / "weights" / "1.0"
    torn.mkdir(parents=True)
    (torn / "torn.safetensors").write_bytes(b"torn")
    publish(publisher(tmp_path, log, source), model, Version(1, 0))
    record = newest(log)
    verify(Path(record.location), record.manifest_sha256)


@pytest.mark.fault("disk: while publishing")
def test_a_disk_that_fails_stops_the_learner_and_announces_nothing(tmp_path, log, source, model):
    (tmp_path / "weights").write_text("not a directory")
    with pytest.raises(NotReadyError, match=r"version 1\.0 could not be written"):
        publish(publisher(tmp_path, log, source), model, Version(1, 0))
    assert announced(log) == {}


def test_the_newest_versions_and_the_leased_ones_stay(tmp_path, log, source, model):
    publish(publisher(tmp_path, log, source), model, Version(1, 8), Version(1, 9))
    lease = make_role("generator", leases=[Version(1, 9)], time_s=1e12)
    log.append([Output(topics.ROLES.name, lease.role_id.encode(), encode(lease))])
    publish(publisher(tmp_path, log, source), model, Version(2, 3), Version(2, 4), Version(2, 5))
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["1.9", "2.4", "2.5"]


def test_only_a_live_role_leases():
    now_s = 1000.0
    states = [
        make_role("generator", index=0, leases=[Version(1, 0)], time_s=now_s - LIVE_S),
        make_role("generator", index=1, leases=[Version(1, 1)], time_s=now_s - LIVE_S - 1),
        make_role("generator", index=2, leases=[Version(1, 2)], time_s=now_s, health="stopped"),
    ]
    assert leased(states, now_s=now_s) == {Version(1, 0)}


def test_a_lower_number_of_a_newer_epoch_is_newer():
    versions = [Version(2, 3), Version(1, 9), Version(1, 8)]
    assert prunable(versions, set(), keep=1) == [Version(1, 8), Version(1, 9)]


def test_tied_weights_stay_one_tensor_in_a_snapshot():
    weight = torch.zeros(3)
    copies = snapshot([("a", weight), ("b", weight), ("c", torch.zeros(3))], torch.bfloat16)
    assert copies["a"] is copies["b"] is not copies["c"]
    assert copies["a"].dtype == torch.bfloat16


def test_versions_go_to_a_url_whole_and_are_announced_from_there(tmp_path, log, source, model):
    remote = RemoteWeights(f"file://{tmp_path}/remote")
    publish(publisher(tmp_path, log, source, remote=remote), model, Version(1, 0))
    record = newest(log)
    assert record.location == f"file://{tmp_path}/remote/1.0"
    remote.download(record.version, record.manifest_sha256, tmp_path / "fetched")
    verify(tmp_path / "fetched", record.manifest_sha256)


def test_what_goes_on_disk_goes_at_the_url_and_what_is_leased_stays_there_too(tmp_path, log, source, model):
    remote = RemoteWeights(f"memory://{tmp_path}/remote")
    one = publisher(tmp_path, log, source, remote=remote)
    publish(one, model, Version(1, 0), Version(1, 1))
    state = make_role("generator", leases=[Version(1, 0)], time_s=time.time())
    log.append([Output(topics.ROLES.name, b"generator-0", encode(state))])
    publish(one, model, Version(1, 2), Version(1, 3))
    assert sorted(remote.versions()) == [Version(1, 0), Version(1, 2), Version(1, 3)]
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {"1.0", "1.2", "1.3"}


def test_a_version_that_could_not_be_uploaded_is_not_announced(tmp_path, log, source, model):
    (tmp_path / "remote").write_bytes(b"a file where the folder should be")
    remote = RemoteWeights(f"file://{tmp_path}/remote", wait=lambda seconds: None)
    with pytest.raises(NotReadyError, match="cannot write it"):
        publish(publisher(tmp_path, log, source, remote=remote), model, Version(1, 0))
    assert announced(log) == {}


class OvertakenClaim(Claim):
    """Whose heir takes over just behind the next look, where `overtake` says how."""

    overtake = None

    def refuse_to_be_second(self):
        super().refuse_to_be_second()
        if self.overtake is not None:
            overtake, self.overtake = self.overtake, None
            overtake()


def test_a_learner_whose_heir_removes_the_same_version_says_that_it_was_overtaken(tmp_path, log, source, model):
    """It used to fail of the missing file."""
    claim = OvertakenClaim(tmp_path / "checkpoints", log, "policy")
    publish(publisher(tmp_path, log, source, claim=claim), model, Version(1, 0), Version(1, 1))

    def overtake():
        Claim(tmp_path / "checkpoints", log, "policy")
        shutil.rmtree(tmp_path / "weights" / "1.0")

    claim.overtake = overtake
    with pytest.raises(SupersededError, match="epoch 2 of this policy is running, this is epoch 1"):
        publisher(tmp_path, log, source, keep=1, claim=claim).prune(now_s=time.time())
