"""What must hold for the policies of a run: models and references are there and read the tokens of who samples."""

from pathlib import Path

from deploy.check_model import check_model_files, load_tokenizer
from deploy.config import Policy, RunConfig
from streaming.errors import NotReadyError


def check_policy(config: RunConfig, policy: Policy) -> str:
    """Its model, its tokenizer and its reference. Raises NotReadyError for the first that does not do."""
    check_model_files(policy.model)
    check_reference(policy.reference)
    if Path(policy.model) != Path(config.model):
        vocabularies = [load_tokenizer(config, model).get_vocab() for model in (config.model, policy.model)]
        if vocabularies[0] != vocabularies[1]:
            raise NotReadyError(
                f"its tokenizer has other tokens than that of {config.model}, whose samples it is to learn from",
                where=f"policies.{policy.name}.model {policy.model}",
                do="Take a model with the same tokenizer.",
            )
    return f"{policy.model}, reference {policy.reference}"


def check_reference(reference: str) -> str:
    """A reference needs no tokenizer; a hub name is looked up when the scorer starts. Raises NotReadyError."""
    path = Path(reference)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise NotReadyError(
            "is not a model directory: it has no config.json",
            where=reference,
            do="Give a directory in Hugging Face format, or leave it out.",
        )
    return reference
