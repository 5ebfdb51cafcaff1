"""What must hold before a run starts, and what to mend where it does not.

`all_checks` is what `streamdpo check` goes through; `preflight` the cheap part of it, which `run` goes through too.
"""

import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import streaming
from actors.prompts import Prompt, check_chat_template, read_eval_prompts, read_prompts
from deploy.check_log import Check, check_log, log_checks
from deploy.check_model import check_model, check_model_files, check_reward_model, load_model_config, load_tokenizer
from deploy.check_policies import check_policy, check_reference
from deploy.config import Policy, RunConfig, run_directory
from deploy.remote import check_stores
from deploy.trial import try_reward
from streaming.errors import NotReadyError, StreamDPOError

ROOT = Path(__file__).resolve().parent.parent

TRAINING_BYTES = 16
"""Bytes a parameter takes in a checkpoint at most: float32 weights, master weights and AdamW's two moments."""

VLLM_IMPORT_S = 120
"""A cold import of vLLM takes about 10 s; on a busy machine with a slow disk much more."""


class Finding(NamedTuple):
    """One line of a check: its subject, and either what was found or the error."""

    subject: str
    note: str
    error: StreamDPOError | None = None


def all_checks(config: RunConfig, *, create_topics: bool = False, role: str | None = None) -> Iterator[Finding]:
    """Every check, one after the other; a failed one does not stop the others.

    Missing topics of a Kafka log are created with `create_topics`; with `role`, only this role's rights are asked for.
    """
    prompts: list[Prompt] = []
    held_out: list[Prompt] = []

    def read() -> str:
        prompts.extend(read_prompts(config.prompts))
        held_out.extend(read_eval_prompts(config.prompts))
        return describe_prompts(prompts) + describe_held_out(prompts, held_out)

    first: list[Check] = [
        ("packages", check_packages),
        ("pipeline", lambda: describe_pipeline(config)),
        ("prompts", read),
        ("model", lambda: check_model(config, [*prompts, *held_out])),
        *(("reference", partial(check_reference, reference)) for reference in own_reference(config)),
        *((f"policy {policy.name}", partial(check_policy, config, policy)) for policy in config.every_policy[1:]),
        *((f"reward {source.name}", _reward_check(config, i, prompts)) for i, source in enumerate(config.rewards)),
    ]
    last: list[Check] = [
        ("disk", lambda: check_disk(config)),
        ("stores", lambda: check_stores(config)),
        ("ports", lambda: check_ports(config)),
        ("engine", lambda: check_engine(config)),
        ("compiler", check_compiler),
        ("devices", lambda: check_devices(config)),
    ]
    # A chain, not a list: what of the log is looked at depends on how its first check ends.
    for subject, check in itertools.chain(first, log_checks(config, create_topics=create_topics, role=role), last):
        try:
            yield Finding(subject, check())
        except StreamDPOError as error:
            yield Finding(subject, "", error)


def preflight(config: RunConfig) -> None:
    """What a person gets wrong, found before anything starts. Raises the first error."""
    check_packages()
    prompts = read_prompts(config.prompts)
    held_out = read_eval_prompts(config.prompts)
    check_model_files(config.model)
    if not Path(config.model).is_dir():
        load_model_config(config.model, config)  # from the hub, or not at all: before every role asks for it
    if any(prompt.messages for prompt in (*prompts, *held_out)):
        check_chat_template([*prompts, *held_out], load_tokenizer(config), model=config.model)
    for reference in own_reference(config):
        check_reference(reference)
    for policy in config.every_policy[1:]:
        check_policy(config, policy)
    for source in config.rewards:
        if source.function is not None:
            try_reward(source, prompts[0])
        else:
            check_reward_model(str(source.model), config, prompts)
    check_log(config)
    check_stores(config)
    check_ports(config)


def check_packages() -> str:
    """Another distribution is imported as `streaming` too (mosaicml-streaming): ours must be the one that is found."""
    found = Path(streaming.__file__ or "").resolve().parent.parent
    if found != ROOT:
        raise NotReadyError(
            f"`import streaming` finds {found}/streaming, not ours in {ROOT}",
            where="packages",
            do="Uninstall mosaicml-streaming, or install streamdpo into an environment of its own.",
        )
    return f"ours, in {ROOT}"


def own_reference(config: RunConfig) -> list[str]:
    """The reference of the run's own policy, where it is another model than the one that learns."""
    reference = config.every_policy[0].reference
    return [] if reference == config.model else [reference]


def describe_pipeline(config: RunConfig) -> str:
    """The configuration itself refuses a depth that deadlocks; this tells of one that leaves generators idle."""
    depth = config.scheduler.pipeline_depth
    wanted = config.learner.batch.batch_size + config.generation.num_generators * config.generation.concurrency
    if depth < wanted:
        return (
            f"{depth} requests deep; below batch_size + generators x concurrency = {wanted}, generators wait at times"
        )
    return f"{depth} requests deep"


def describe_prompts(prompts: Sequence[Prompt]) -> str:
    num_chats = sum(prompt.messages is not None for prompt in prompts)
    kinds = [f"{num_chats} conversations"] * bool(num_chats) + [f"{len(prompts) - num_chats} texts"] * (
        num_chats < len(prompts)
    )
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    return f"{' and '.join(kinds)}, columns for rewards: {', '.join(columns) or 'none'}"


def describe_held_out(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    """How many prompts measure, and how many of them are trained on all the same."""
    if not held_out:
        return "; none held out, so no held-out reward is measured"
    trained = {prompt.prompt_id for prompt in prompts}
    num_both = sum(prompt.prompt_id in trained for prompt in held_out)
    warning = f" (WARNING: {num_both} of them are training prompts too, which flatters the measurement)"
    return f"; {len(held_out)} held out{warning if num_both else ''}"


def _reward_check(config: RunConfig, index: int, prompts: list[Prompt]) -> Callable[[], str]:
    source = config.rewards[index]

    def check() -> str:
        if source.function is None:
            return check_reward_model(str(source.model), config, prompts)
        if not prompts:
            from streaming.rewards.loading import load_function

            return f"{load_function(source.function).version}, not tried: there are no prompts"
        return try_reward(source, prompts[0])

    return check


def check_disk(config: RunConfig) -> str:
    """Room for every policy's versions and checkpoints that stay at once, as far as the models' sizes are known."""
    directory = run_directory(config)
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    sizes = {policy.model: _weights_bytes(policy.model) for policy in config.every_policy}
    unknown = ", ".join(model for model, size in sizes.items() if not size)
    needed = sum(_needed_bytes(policy, sizes[policy.model]) for policy in config.every_policy if sizes[policy.model])
    if needed > free:
        raise NotReadyError(
            f"{needed / 1e9:.1f} GB are needed for versions and checkpoints, {free / 1e9:.1f} GB are free",
            where=str(directory),
            do="Free space, set `directory` to another disk, or lower learner.checkpoint.keep or learner.publish.keep.",
        )
    note = f"{needed / 1e9:.1f} GB needed beside the log, {free / 1e9:.0f} GB free"
    return f"{note}; not counted, because its size is not known yet: {unknown}" if unknown else note


def _weights_bytes(model: str) -> int:
    """0 for a hub name."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def _needed_bytes(policy: Policy, weights_bytes: int) -> float:
    """Of the versions with `best` and `last`, and of the checkpoints with the one that is being written."""
    publish, checkpoint = policy.learner.publish, policy.learner.checkpoint
    num_parameters = weights_bytes / _bytes_per_parameter(policy.model)
    return weights_bytes * (publish.keep + 2) + num_parameters * TRAINING_BYTES * (checkpoint.keep + 1)


def _bytes_per_parameter(model: str) -> int:
    settings = json.loads((Path(model) / "config.json").read_text())
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return 4 if name == "float32" else 2


def check_ports(config: RunConfig) -> str:
    """Every role's port is free, where ports are fixed."""
    if config.metrics.port is None:
        return f"free ones on {config.metrics.host}"
    ports = range(config.metrics.port, config.metrics.port + num_processes(config))
    for port in ports:
        with socket.socket(socket.AF_INET6 if ":" in config.metrics.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.metrics.host, port))
            except (OSError, OverflowError) as cause:
                raise NotReadyError(
                    f"{config.metrics.host}:{port} cannot be listened on: {cause}",
                    where="metrics.port",
                    do="Choose another first port, or leave metrics.port out.",
                ) from cause
    return f"{ports[0]} to {ports[-1]} on {config.metrics.host}"


def num_processes(config: RunConfig) -> int:
    """Processes of a run: each has an endpoint."""
    from deploy.roles import processes

    return len(processes(config))


def check_engine(config: RunConfig) -> str:
    """vLLM really imports here, in a process of its own: half an installation shows only then."""
    if config.generation.engine.kind == "transformers":
        return "transformers generate"
    do = "Install the extra (pip install 'streamdpo[cpu]' or [gpu]), or set generation.engine.kind: transformers."
    if importlib.util.find_spec("vllm") is None:
        raise NotReadyError("vLLM is not installed", where="generation.engine.kind", do=do)
    command = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_IMPORT_S, check=False)
    except subprocess.TimeoutExpired as cause:
        raise NotReadyError(f"vLLM does not import in {VLLM_IMPORT_S} s", where="vllm", do=do) from cause
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotReadyError(f"vLLM does not import: {last}", where="vllm", do=do)
    return f"vLLM {done.stdout.strip().splitlines()[-1]}"


def check_compiler() -> str:
    """DeepSpeed compiles a small communication operator at its first start on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotReadyError(f"{compiler} is not there", where="compiler", do="Install g++ (Debian, Ubuntu) or gcc-c++.")
    return compiler


def check_devices(config: RunConfig) -> str:
    """A GPU for every generator and rank, where there are GPUs at all."""
    import torch

    from deploy.fleet import gpus_by_role, num_gpus_needed

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return f"no GPU; {os.cpu_count()} CPU cores"
    if not os.environ.get("RAY_ADDRESS"):
        gpus_by_role(config, num_gpus)
    return f"{num_gpus} GPUs, {num_gpus_needed(config)} needed"
