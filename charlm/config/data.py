"""Which text, and how it becomes ids."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from charlm.config.errors import require

CorpusName = Literal["enwik8", "text8", "lm1b", "file", "hub", "python-stdlib"]

_DATASETS = ("lm1b", "hub")
_READ_BY = {
    "path": ("enwik8", "text8", "file"),
    **dict.fromkeys(("hub_id", "hub_config", "hub_revision", "text_column", "separator"), _DATASETS),
    **dict.fromkeys(("train_split", "valid_split", "test_split"), _DATASETS),
    **dict.fromkeys(("valid_fraction", "test_fraction"), (*_DATASETS, "file", "python-stdlib")),
}
"""Options of some corpora only. Set for another one, they would be ignored without a word."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes ids."""

    corpus: CorpusName = "enwik8"
    """enwik8 and text8 are downloaded once and verified; file is data.path; hub is data.hub_id; lm1b is a dataset of
    the hub, too; python-stdlib needs no network."""
    path: Path | None = None
    """A local copy of enwik8 or text8 (raw, .zip, .gz, .xz), or the file or folder of corpus=file."""
    cache_dir: Path = field(default_factory=lambda: Path(os.environ.get("CHARLM_CACHE") or "~/.cache/charlm"))
    """Where prepared corpora are kept. The environment variable CHARLM_CACHE changes the default."""
    vocabulary: Literal["bytes", "characters", "sentencepiece"] = "bytes"
    """How text becomes ids: bytes has always 256 symbols; characters has those of the training split, which the other
    splits must not exceed; sentencepiece has its common characters, and spells the others in bytes."""
    character_coverage: float = 0.9995
    """Share of the training split that the characters of vocabulary=sentencepiece make up, in [0.98, 1]."""
    hub_id: str | None = None
    """The dataset of corpus=hub, OWNER/NAME, or a local folder of parquet files. For lm1b: another copy of it."""
    hub_config: str | None = None
    """Which of the dataset's configurations, where it has several."""
    hub_revision: str | None = None
    """Branch, tag or commit of the dataset; default its main branch at the time of preparation."""
    text_column: str = "text"
    """The dataset's column that holds the documents."""
    train_split: str = "train"
    """The dataset's split to train on."""
    valid_split: str | None = None
    """Its split for validation; by default validation if there is one, else the end of the training split."""
    test_split: str | None = None
    """Its split for testing; by default test if there is one, else the end of the training split."""
    separator: str = "\n"
    """What is put between two documents of a dataset."""
    valid_fraction: float = 0.05
    """Share of the text that is held out for validation, where a corpus has no such split of its own."""
    test_fraction: float = 0.05
    """Share of the text that is held out for testing, at the end, where a corpus has no such split of its own."""

    def __post_init__(self):
        for name in ("valid_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 1, f"data.{name}", getattr(self, name), "must lie between 0 and 1")
        total = self.valid_fraction + self.test_fraction
        require(total < 1, "data.valid_fraction + data.test_fraction", total, "leaves no training text; lower one")
        require(
            self.corpus != "file" or self.path is not None, "data.corpus", "file", "needs --data.path=FILE_OR_FOLDER"
        )
        require(self.corpus != "hub" or self.hub_id, "data.corpus", "hub", "needs --data.hub_id=OWNER/NAME_OR_FOLDER")
        require(
            0.98 <= self.character_coverage <= 1,
            "data.character_coverage",
            self.character_coverage,
            "must lie in [0.98, 1]",
        )
        splits = [name for name in (self.train_split, self.valid_split, self.test_split) if name is not None]
        require(
            len(set(splits)) == len(splits),
            "data.train_split, valid_split, test_split",
            ", ".join(splits),
            "a split is named twice; name another, or none to hold out the end of the training split",
        )
        for name, corpora in _READ_BY.items():
            require(
                self.corpus in corpora or getattr(self, name) == getattr(DataConfig, name),
                f"data.{name}",
                getattr(self, name),
                f"corpus={self.corpus} has no use for it; leave it out, or choose --data.corpus={' or '.join(corpora)}",
            )
