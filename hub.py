"""An exported folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

NOT_PUSHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
"""Pickles run code when they are loaded; an export has none, and others that lie in its folder stay there."""


class PushError(ValueError):
    """The folder did not reach the hub. It is whole where it was, and the message says how to push it later."""


def check_push(repo: str) -> None:
    """ValueError if a push to this repository cannot succeed, as far as that can be told without asking the hub."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub` must be `name` or `owner/name`, but got {repo!r}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"`push_to_hub` {repo!r} needs the hub, but HF_HUB_OFFLINE is set: unset it, or push later.")
    if get_token() is None:
        raise ValueError(f"`push_to_hub` {repo!r} needs a token: run `hf auth login`, or set HF_TOKEN.")


def push(folder: str | Path, repo: str, private: bool = True) -> str:
    """Upload a folder to a model repository, which is created if it is not there; returns its address.

    Args:
        folder: an exported model, whole.
        repo: `owner/name`, or `name` for the token's owner.
        private: of a new repository; one that is there stays what it is.

    Raises:
        PushError: whatever went wrong.
    """
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message="Model exported by lightning-rlhf",
            ignore_patterns=NOT_PUSHED,
        )
    except Exception as error:  # of the network, the hub, the disk: the folder is safe in any case
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        command = f"hf upload {repo} {folder}{' --private' if private else ''}"
        raise PushError(f"`{folder}` was not pushed to the hub ({reason}). Push it later with `{command}`.") from error
    return str(created)
