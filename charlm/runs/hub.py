"""Models on the Hugging Face hub, written and read through its own library. None of their code is ever run."""

import sys
from pathlib import Path

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from charlm.config import UserError
from charlm.config.errors import first_line
from charlm.runs.exported import CONFIG, FILES, write_model
from charlm.runs.trained import TrainedModel


class HubModel(ModelHubMixin):
    """Gives a model the library's `push_to_hub`."""

    trained: TrainedModel

    @classmethod
    def of(cls, trained: TrainedModel) -> "HubModel":
        """Not by the constructor, which would copy the model into a config."""
        model = cls()
        model.trained = trained
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(self.trained, save_directory, "/".join(save_directory.parts[-2:]))


def download(hub_id: str) -> Path:
    """The folder in the library's cache (HF_HOME) that holds the model OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        UserError: there is no such model, it cannot be fetched, or it was not exported by charlm.
    """
    name, _, revision = hub_id.partition("@")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{hub_id} is no folder, and no model of the hub ({first_line(error)}); check the name, and log in with "
            "`hf auth login` for one that is not public"
        ) from error
    except Exception as error:  # the library's own, the network's, the disk's
        raise UserError(
            f"{hub_id} is no folder, and cannot be fetched from the hub ({first_line(error)}); without a network, "
            "bring the folder HF_HOME along, with HF_HUB_OFFLINE=1"
        ) from error
    if not (folder / CONFIG).exists():
        raise UserError(f"{hub_id} was not exported by charlm: it has no {CONFIG}")
    return folder
