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


def download(name: str) -> Path:
    """The folder of a model, downloaded if it can be a name on the hub and is no mistyped path.

    Raises UserError if the download fails, or is no model exported by charlm.
    """
    if not HUB_ID.fullmatch(name) or Path(name).parent.exists():
        return Path(name)
    repo_id, _, revision = name.partition("@")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        options = {"revision": revision or None, "allow_patterns": list(FILES)}
        folder = Path(snapshot_download(repo_id, **options))
    except Exception as error:  # the library's own, the network's, the disk's
        raise UserError(
            f"{name} is neither a folder nor a model that could be downloaded ({first_line(error)}); "
            "check it; for a private model run `hf auth login`; "
            "without a network, copy HF_HOME and set HF_HUB_OFFLINE=1"
        ) from error
    if not (folder / EXPORT_CONFIG).exists():
        raise UserError(f"{name} was not exported by charlm: it has no {EXPORT_CONFIG}")
    return folder
