"""The text, and how it becomes ids."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from charlm.config.types import Mark, Section, Share

_DATASETS = ("lm1b", "hub")
_READ_BY = {
    "path": ("enwik8", "text8", "file"),
    **dict.fromkeys(("hub_id", "hub_config", "hub_revision", "text_column", "separator"), _DATASETS),
    **dict.fromkeys(("train_split", "valid_split", "test_split"), _DATASETS),
    **dict.fromkeys(("valid_fraction", "test_fraction"), (*_DATASETS, "file", "python-stdlib")),
}
"""Options that only some corpora have. Set for another one, they would be ignored without a word."""


class DataConfig(Section):
    """The text, and how it becomes ids."""

    corpus: Literal["enwik8", "text8", "lm1b", "file", "hub", "python-stdlib"] = "enwik8"
    """enwik8 and text8 are downloaded once and verified; file reads data.path; hub reads data.hub_id; lm1b is a
    dataset of the hub, too; python-stdlib needs no network."""
    path: Annotated[Path | None, Mark.MAY_CHANGE, Mark.NO_EFFECT] = None
    """A local copy of enwik8 or text8 (raw, .zip, .gz, .xz), or the file or folder for corpus=file."""
    cache_dir: Annotated[Path, Mark.MAY_CHANGE, Mark.NO_EFFECT] = Field(
        default_factory=lambda: Path(os.environ.get("CHARLM_CACHE") or "~/.cache/charlm")
    )
    """Folder for prepared corpora. The environment variable CHARLM_CACHE changes the default."""
    vocabulary: Literal["bytes", "characters", "sentencepiece"] = "bytes"
    """How text becomes ids. bytes: always 256 symbols. characters: those of the training split; the other splits must
    not have more. sentencepiece: the common characters of the training split; the others are spelt in bytes."""
    character_coverage: Annotated[float, Field(ge=0.98, le=1)] = 0.9995
    """Share of the training split that the characters of vocabulary=sentencepiece cover."""
    hub_id: Annotated[str | None, Mark.MAY_CHANGE, Mark.NO_EFFECT] = None
    """The dataset for corpus=hub: OWNER/NAME, or a local folder of parquet files. For lm1b: another copy of it."""
    hub_config: str | None = None
    """The dataset's configuration, if it has several."""
    hub_revision: str | None = None
    """Branch, tag or commit of the dataset. By default its main branch at the time of preparation."""
    text_column: str = "text"
    """The column of the dataset that holds the documents."""
    train_split: str = "train"
    """The dataset's split to train on."""
    valid_split: str | None = None
    """The dataset's split for validation. By default validation if there is one, else the end of the training split."""
    test_split: str | None = None
    """The dataset's split for testing. By default test if there is one, else the end of the training split."""
    separator: str = "\n"
    """Text to put between two documents of a dataset."""
    valid_fraction: Share = 0.05
    """Share of the text to hold out for validation if the corpus has no validation split."""
    test_fraction: Share = 0.05
    """Share of the text, at its end, to hold out for testing if the corpus has no test split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.valid_fraction + self.test_fraction >= 1:
            text = f"leaves no training text beside test_fraction={self.test_fraction}; lower one"
            raise self.mistake("valid_fraction", text, "test_fraction")
        if self.corpus == "file" and self.path is None:
            raise self.mistake("corpus", "needs --data.path=FILE_OR_FOLDER")
        if self.corpus == "hub" and not self.hub_id:
            raise self.mistake("corpus", "needs --data.hub_id=OWNER/NAME_OR_FOLDER")
        for name, others in (("test_split", ("train_split", "valid_split")), ("valid_split", ("train_split",))):
            if getattr(self, name) is not None and getattr(self, name) in map(self.__getattribute__, others):
                text = "another split has this name, too; choose another, or null for the end of the training split"
                raise self.mistake(name, text, *others)
        for name, corpora in _READ_BY.items():
            if self.corpus not in corpora and getattr(self, name) != type(self).model_fields[name].default:
                choices = " or ".join(corpora)
                text = f"corpus={self.corpus} has no use for it; leave it out, or choose --data.corpus={choices}"
                raise self.mistake(name, text, "corpus")
        return self
