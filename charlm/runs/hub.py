"""Push models to the Hugging Face hub, and download them without running code."""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from charlm.config import UserError
from charlm.config.errors import first_line
from charlm.runs.exported import EXPORT_CONFIG, FILES, save_model
from charlm.runs.trained import TrainedModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
"""OWNER/NAME or OWNER/NAME@REVISION."""


def push_to_hub(trained: TrainedModel, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Publish a model as OWNER/NAME on the Hugging Face hub; return the address of the commit.

    `options` are those of `HfApi.upload_folder`, such as commit_message, revision or token.
    """
    api = HfApi(token=options.get("token"))
    with TemporaryDirectory() as folder:
        exported = save_model(trained, Path(folder, "model"), repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        options = {"commit_message": "Upload model with charlm"} | options
        return api.upload_folder(repo_id=repo_id, folder_path=exported, **options).commit_url


def is_hub_id(name: str) -> bool:
    """Whether this can be a name on the hub, and no path in an existing folder."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).parent.exists()


def download(hub_id: str) -> Path:
    """The folder to which a model was downloaded; UserError if that fails, or charlm did not export it."""
    name, _, revision = hub_id.partition("@")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # the library's own, the network's, the disk's
        raise UserError(
            f"{hub_id} is no folder, and could not be downloaded ({first_line(error)}); "
            "check the name; for a private model run `hf auth login`; "
            "without a network, copy HF_HOME and set HF_HUB_OFFLINE=1"
        ) from error
    if not (folder / EXPORT_CONFIG).exists():
        raise UserError(f"{hub_id} was not exported by charlm: it has no {EXPORT_CONFIG}")
    return folder
