"""An exported model sent to the Hugging Face hub by its own library, which reads HF_TOKEN and HF_ENDPOINT."""

from __future__ import annotations

import os
from pathlib import Path

from config.console import one_line
from pretrained.load import HUB_ID


def refuse_push(name: str) -> None:
    """Refuse a name that the hub does not take, and a missing token, before anything is loaded.

    Raises:
        ValueError: One of the two.
    """
    import huggingface_hub

    if not HUB_ID.fullmatch(name) or len(name) > 96 or "--" in name or ".." in name:
        raise ValueError(
            f"--push {name} is no name of a model on the hub; give OWNER/NAME, such as me/my-model"
        )
    if huggingface_hub.get_token() is None:
        raise ValueError("--push takes a token of the hub; set HF_TOKEN, or log in by `hf auth login`")


def push(path: Path, name: str) -> str:
    """Send a folder, or a file, to a model on the hub, and return its address.

    A model that is not there yet is made, and is private.

    Raises:
        ValueError: It cannot be sent; what was written stays.
    """
    import huggingface_hub

    token = huggingface_hub.get_token()
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        made = api.create_repo(name, private=True, exist_ok=True)
        message = f"Plumb: {path.name}"
        if path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path, commit_message=message)
        else:
            api.upload_file(
                repo_id=name, path_or_fileobj=path, path_in_repo=path.name, commit_message=message
            )
        return str(made)
    except Exception as error:  # The network and the hub have errors of many classes.
        said = one_line(str(error).replace(token, "***") if token else str(error))[:300]
        later = f"later `hf upload {name} {path}` sends it"
        raise ValueError(f"{path} is written, and cannot be sent to {name} ({said}); {later}") from None
