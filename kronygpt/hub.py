"""All that touches the network: models and data sets of the Hugging Face hub, and uploads to it.

huggingface_hub is imported where it is used: most runs need no network, and it takes a third of a second.
"""
from pathlib import Path

from kronygpt.tokenizer import TOKENIZER_FILES

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PARQUET = "refs/convert/parquet"  # the hub's own copy of a data set
HUB_SECONDS = 5  # that the hub has for its first answer


def reach_hub():
    """Ask the Hugging Face hub for an answer, once. Where there is none, use its local caches from now on, without minutes
    of retries. It is called before `datasets` is imported."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        answers = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code < 500
    except Exception:  # the errors of its HTTP clients have no class in common
        answers = False
    if not answers:
        constants.HF_HUB_OFFLINE = True


def hub_dataset(name, config=None, split="train", streaming=False):
    """A split of a data set of the hub, or from its local cache, as a datasets.Dataset; streaming: its rows as they are
    downloaded."""
    reach_hub()
    from datasets import load_dataset

    options = dict(name=config, split=split, streaming=streaming)
    try:
        return load_dataset(name, **options)
    except RuntimeError:  # the repository still holds a script, which datasets 4 and later refuses
        return load_dataset(name, revision=PARQUET, **options)


def download(name):
    """The directory of a model's data files, from the Hugging Face hub or its local cache; FileNotFoundError where there is
    no such model, or no network."""
    from huggingface_hub import snapshot_download

    reach_hub()
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            directory = Path(snapshot_download(name, allow_patterns=["config.json", weights, *TOKENIZER_FILES]))
            if any((directory / file).exists() for file in WEIGHTS):
                break
        return directory
    except Exception as error:  # the hub's errors have no class in common
        raise FileNotFoundError(f"no file or directory {name}, nor models/{name}, and no such model could be fetched from "
                                f"the Hugging Face hub ({type(error).__name__}): is there a network, and is "
                                "HF_HUB_OFFLINE unset?") from None


def upload(directory, name):
    """Upload a directory to a model repository of the hub, ORG/NAME, which is made where there is none, and return its
    address."""
    from huggingface_hub import HfApi

    address = HfApi().create_repo(name, exist_ok=True)
    HfApi().upload_folder(repo_id=name, folder_path=directory)
    return address
