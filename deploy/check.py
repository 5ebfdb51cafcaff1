"""What must hold before a run starts, and what to mend where it does not.

`all_checks` is what `streamdpo check` goes through; `preflight` the cheap part of it, which `run` goes through too.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import streaming
from actors.prompts import Prompt, check_chat_template, read_eval_prompts, read_prompts
from deploy.config import RunConfig
from deploy.trial import try_reward
from streaming.errors import ConfigError, NotReadyError, StreamDPOError

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


def all_checks(config: RunConfig) -> Iterator[Finding]:
    """Every check, one after the other; a failed one does not stop the others."""
    from deploy.check_policies import check_policy

    prompts: list[Prompt] = []
    held_out: list[Prompt] = []

    def read() -> str:
        prompts.extend(read_prompts(config.prompts))
        held_out.extend(read_eval_prompts(config.prompts))
        return describe_prompts(prompts) + describe_held_out(prompts, held_out)

    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", check_packages),
        ("pipeline", lambda: describe_pipeline(config)),
        ("prompts", read),
        ("model", lambda: check_model(config, [*prompts, *held_out])),
        *((f"policy {policy.name}", partial(check_policy, config, policy)) for policy in config.every_policy[1:]),
        *((f"reward {source.name}", _reward_check(config, i, prompts)) for i, source in enumerate(config.rewards)),
        ("log", lambda: check_log(config)),
        ("disk", lambda: check_disk(config)),
        ("ports", lambda: check_ports(config)),
        ("engine", lambda: check_engine(config)),
        ("compiler", check_compiler),
        ("devices", lambda: check_devices(config)),
    ]
    for subject, check in checks:
        try:
            yield Finding(subject, check())
        except StreamDPOError as error:
            yield Finding(subject, "", error)


def preflight(config: RunConfig) -> None:
    """What a person gets wrong, found before anything starts. Raises the first error."""
    from deploy.check_policies import check_policy

    check_packages()
    prompts = read_prompts(config.prompts)
    held_out = read_eval_prompts(config.prompts)
    check_model_files(config.model)
    if any(prompt.messages for prompt in (*prompts, *held_out)):
        check_chat_template([*prompts, *held_out], load_tokenizer(config), model=config.model)
    for policy in config.every_policy[1:]:
        check_policy(config, policy)
    for source in config.rewards:
        if source.function is not None:
            try_reward(source, prompts[0])
        else:
            check_reward_model(str(source.model), config)
    check_log(config)
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


def check_model(config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """The model's files, its kind, its tokenizer, and that it can write these prompts."""
    check_model_files(config.model)
    settings = load_model_config(config.model, config)
    tokenizer = load_tokenizer(config)
    check_chat_template(prompts, tokenizer, model=config.model)
    notes = [f"{settings.model_type}, vocabulary {len(tokenizer)}"]
    if tokenizer.eos_token_id is None:
        raise NotReadyError(
            "the tokenizer has no end-of-sequence token, so no answer would ever end",
            where=config.model,
            do="Set eos_token in tokenizer_config.json.",
        )
    if prompts and tokenizer.chat_template and not any(prompt.messages for prompt in prompts):
        notes.append("text prompts are sampled as they are, without the model's chat template")
    if getattr(settings, "tie_word_embeddings", False):
        notes.append("tied embeddings")
    notes += _length_note(config, settings, tokenizer, prompts)
    return "; ".join(notes)


def _length_note(config: RunConfig, settings: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """A warning where the longest prompt leaves no room for a whole answer."""
    limits = [config.generation.engine.max_model_len, getattr(settings, "max_position_embeddings", None)]
    limit = min((value for value in limits if value), default=None)
    texts = [prompt.text or "".join(m.content for m in prompt.messages or []) for prompt in prompts]
    if limit is None or not texts:
        return []
    longest = len(tokenizer(max(texts, key=len))["input_ids"])
    room, wanted = limit - longest, config.generation.sampling.max_tokens
    if room >= wanted:
        return []
    return [f"the longest prompt has {longest} tokens: {max(room, 0)} of {wanted} are left for its answer"]


def check_model_files(model: str) -> None:
    """A directory must hold a model; anything else must look like a hub name."""
    path = Path(model)
    if path.is_dir():
        missing = [] if (path / "config.json").is_file() else ["config.json"]
        missing += [] if any(path.glob("*.safetensors")) else ["*.safetensors"]
        missing += [] if any(path.glob("tokenizer*")) else ["tokenizer files"]
        if missing:
            raise NotReadyError(
                f"has no {', '.join(missing)}",
                where=model,
                do="Give a directory in Hugging Face format (save_pretrained of the model and of its tokenizer).",
            )
        for file in path.glob("*.safetensors"):
            check_weights_file(file)
    elif path.is_absolute() or path.exists() or model.count("/") > 1:
        raise NotReadyError("is not a directory", where=model, do="Mend `model` in the configuration.")


def check_weights_file(path: Path) -> None:
    """The file is as long as its own header says: a copy or download that broke off is found without loading it."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
        wanted = 8 + header_bytes + max(entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise NotReadyError("is not a safetensors file", where=str(path), do="Copy or download it again.") from cause
    if path.stat().st_size != wanted:
        raise NotReadyError(
            f"has {path.stat().st_size} bytes, its header says {wanted}",
            where=str(path),
            do="Copy or download it again: it has broken off.",
        )


_METADATA = "__metadata__"
"""The one entry of a safetensors header that is no tensor."""


def load_model_config(model: str, config: RunConfig) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig.from_pretrained, model, config)


def load_tokenizer(config: RunConfig, model: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, model or config.model, config)


def _load(from_pretrained: Callable[..., Any], model: str, config: RunConfig) -> Any:
    try:
        return from_pretrained(model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as cause:
        raise NotReadyError(
            f"does not load: {cause}",
            where=model,
            do="Give a directory in Hugging Face format, or a hub name that this machine can reach.",
        ) from cause


def _reward_check(config: RunConfig, index: int, prompts: list[Prompt]) -> Callable[[], str]:
    source = config.rewards[index]

    def check() -> str:
        if source.function is None:
            return check_reward_model(str(source.model), config)
        if not prompts:
            from streaming.rewards.loading import load_function

            return f"{load_function(source.function).version}, not tried: there are no prompts"
        return try_reward(source, prompts[0])

    return check


def check_reward_model(model: str, config: RunConfig) -> str:
    """Its files are there, and its own configuration says that it is a classifier with one output."""
    check_model_files(model)
    settings = load_model_config(model, config)
    kinds = list(settings.architectures or [])
    if kinds and not any("SequenceClassification" in kind for kind in kinds) and not config.trust_remote_code:
        raise NotReadyError(f"is a {', '.join(kinds)}, no sequence classifier", where=model, do=_REWARD_MODEL)
    if settings.num_labels != 1:
        raise NotReadyError(f"has {settings.num_labels} outputs, a reward model has 1", where=model, do=_REWARD_MODEL)
    return f"reward model {model}, {', '.join(kinds) or settings.model_type}"


_REWARD_MODEL = "Name a sequence-classification model that was trained as a reward model, with one output."


def check_log(config: RunConfig) -> str:
    """The run's directory can be made and written; the log is of a kind that is there."""
    directory = Path(config.directory or "")
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise NotReadyError(
            f"{nearest} cannot be written", where=str(directory), do="Set `directory` to another place."
        )
    if not config.log.url.startswith("sqlite:///"):
        raise ConfigError(f"{config.log.url!r} is no log", where="log.url", do="Write sqlite:///log.db.")
    return f"{config.log.url} in {directory}"


def check_disk(config: RunConfig) -> str:
    """Room for the published versions and checkpoints that stay at once, as far as the model's size is known."""
    directory = Path(config.directory or "")
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    weights = sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors"))
    if not weights:
        return f"{free / 1e9:.0f} GB free; the model's size is not known yet"
    learner = config.learner
    parameters = weights / _bytes_per_parameter(config)
    needed = weights * (learner.publish.keep + 2) + parameters * TRAINING_BYTES * (learner.checkpoint.keep + 1)
    if needed > free:
        raise NotReadyError(
            f"{needed / 1e9:.1f} GB are needed for versions and checkpoints, {free / 1e9:.1f} GB are free",
            where=str(directory),
            do="Free space, set `directory` to another disk, or lower learner.checkpoint.keep or learner.publish.keep.",
        )
    return f"{needed / 1e9:.1f} GB needed beside the log, {free / 1e9:.0f} GB free"


def _bytes_per_parameter(config: RunConfig) -> int:
    settings = json.loads((Path(config.model) / "config.json").read_text())
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

    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return f"no GPU; {os.cpu_count()} CPU cores"
    needed = config.generation.num_generators + sum(one.learner.world_size for one in config.every_policy)
    if needed > num_gpus and not os.environ.get("RAY_ADDRESS"):
        raise NotReadyError(
            f"{needed} GPUs are needed (one per generator and rank), {num_gpus} are here",
            where="generation.num_generators, learner.world_size",
            do="Lower one of them, or set RAY_ADDRESS to a cluster.",
        )
    return f"{num_gpus} GPUs, {needed} needed"
