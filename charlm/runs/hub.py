"""Models on the Hugging Face hub, pushed and downloaded by its own library. No code from the hub is run."""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from charlm.config import UserError
from charlm.config.errors import first_line
from charlm.runs.exported import CONFIG, FILES, save_model
from charlm.runs.trained import TrainedModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
"""OWNER/NAME or OWNER/NAME@REVISION."""


def push_to_hub(trained: TrainedModel, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Publish a model with its card as OWNER/NAME on the Hugging Face hub; `charlm.load(repo_id)` reads it back.

    Args:
        private: whether a new repository is private; by default as the owner's settings say.
        options: those of `huggingface_hub.HfApi.upload_folder`, such as commit_message, revision or token.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=options.get("token"))
    with TemporaryDirectory() as folder:
        exported = save_model(trained, Path(folder, "model"), repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        options = {"commit_message": "Upload model with charlm"} | options
        return api.upload_folder(repo_id=repo_id, folder_path=exported, **options).commit_url


def is_hub_id(name: str) -> bool:
    """Whether this is OWNER/NAME, with or without @REVISION, and not a mistyped path into an existing folder."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).parent.exists()


def download(hub_id: str) -> Path:
    """Download a model, OWNER/NAME or OWNER/NAME@REVISION, to the library's cache (HF_HOME); return its folder.

    Raises:
        UserError: there is no such model, it cannot be fetched, or it was not exported by charlm.
    """
    name, _, revision = hub_id.partition("@")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # the library's own, the network's, the disk's
        raise UserError(
            f"{hub_id} is no folder, and cannot be fetched from the hub ({first_line(error)}); check the name, log in "
            "with `hf auth login` for a model that is not public, and without a network bring the folder HF_HOME "
            "along, with HF_HUB_OFFLINE=1"
        ) from error
    if not (folder / CONFIG).exists():
        raise UserError(f"{hub_id} was not exported by charlm: it has no {CONFIG}")
    return folder
