"""Options of the text, the vocabulary and the order of windows."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from charlm.config.types import Mark, Positive, Section, Share

CorpusName = Literal["enwik8", "text8", "lm1b", "file", "hub", "python-stdlib"]
_DATASETS = ("lm1b", "hub")
_READ_BY = {
    "path": ("enwik8", "text8", "file"),
    "as_is": ("file",),
    **dict.fromkeys(("hub_id", "hub_config", "hub_revision", "text_column", "skip_null", "separator"), _DATASETS),
    **dict.fromkeys(("train_split", "valid_split", "test_split"), _DATASETS),
    **dict.fromkeys(("valid_fraction", "test_fraction"), (*_DATASETS, "file", "python-stdlib")),
}
"""Options that only some corpora read; for others they are refused."""


class TextConfig(Section):
    """A text, and the parts of it that are held out."""

    corpus: CorpusName
    """As data.corpus."""
    path: Annotated[Path | None, Mark.MAY_CHANGE, Mark.NO_EFFECT] = None
    """A copy of enwik8 or text8 (raw, .zip, .gz, .bz2, .xz), or the file or folder for corpus=file."""
    as_is: Annotated[bool, Mark.MAY_CHANGE] = False
    """Take files of corpus=file as they are, also hidden, packed and binary ones."""
    hub_id: Annotated[str | None, Mark.MAY_CHANGE, Mark.NO_EFFECT] = None
    """Dataset for corpus=hub, or a copy of lm1b: OWNER/NAME, or a folder of parquet files."""
    hub_config: str | None = None
    """Configuration of the dataset, if it has several."""
    hub_revision: str | None = None
    """Branch, tag or commit of the dataset. null: the main branch when the corpus is prepared."""
    text_column: str = "text"
    """Column of the dataset that holds the documents."""
    skip_null: bool = False
    """Skip the rows of the dataset that hold null in place of text."""
    train_split: str = "train"
    """Split of the dataset for training."""
    valid_split: str | None = None
    """Split for validation. null: validation if it exists, else the end of train_split."""
    test_split: str | None = None
    """Split for testing. null: test if it exists, else the end of train_split."""
    separator: Annotated[str, BeforeValidator(lambda text: "" if text is None else text), Mark.ESCAPES] = "\n"
    r"""Text between two documents; null: nothing. A flag may contain \n, \t, \\ and the like."""
    valid_fraction: Share = 0.05
    """Share of the text held out for validation if the corpus has no such split."""
    test_fraction: Share = 0.05
    """Share of the text, at its end, held out for testing if the corpus has no such split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.valid_fraction + self.test_fraction >= 1:
            text = f"with test_fraction={self.test_fraction} no text is left for training"
            raise self.mistake("valid_fraction", text, "test_fraction")
        if self.corpus == "file" and self.path is None:
            raise self.mistake("corpus", "needs --data.path=FILE_OR_FOLDER")
        if self.corpus == "hub" and not self.hub_id:
            raise self.mistake("corpus", "needs --data.hub_id=OWNER/NAME_OR_FOLDER")
        others = [self.train_split]
        for name in ("valid_split", "test_split"):
            split = getattr(self, name)
            if split is not None and split in others:
                text = "another split has this name; choose another, or null"
                raise self.mistake(name, text, "train_split")
            others.append(split)
        for name, corpora in _READ_BY.items():
            default = type(self).model_fields[name].default
            if self.corpus not in corpora and getattr(self, name) != default:
                choices = f"--data.corpus={' or '.join(corpora)}"
                text = f"corpus={self.corpus} has no use for it; choose {choices}"
                raise self.mistake(name, text, "corpus")
        return self


class SourceConfig(TextConfig):
    """A source of a mixture."""

    weight: Positive = 1.0
    """Its share of the windows is its weight divided by the sum of all."""


class DataConfig(TextConfig):
    """The text, how it becomes ids, and the order in which they are trained on."""

    corpus: Literal[CorpusName, "mixture"] = "enwik8"
    """enwik8 and text8 are downloaded once; lm1b is a dataset from the hub; file reads data.path; hub
    reads data.hub_id; python-stdlib needs no network; mixture reads data.mixture."""
    cache_dir: Annotated[Path, Mark.MAY_CHANGE, Mark.NO_EFFECT] = Field(
        default_factory=lambda: Path(os.environ.get("CHARLM_CACHE") or "~/.cache/charlm")
    )
    """Folder for prepared corpora. The environment variable CHARLM_CACHE changes the default."""
    vocabulary: Literal["bytes", "characters", "sentencepiece"] = "bytes"
    """bytes: always 256 symbols. characters: all characters of the training split; other splits must
    not have more. sentencepiece: its common characters; others are spelt in bytes."""
    characters: Annotated[str | None, Mark.ESCAPES] = None
    """The characters of the vocabulary. null: those of the training split."""
    character_coverage: Annotated[float, Field(ge=0.98, le=1)] = 0.9995
    """Share of the training text that the characters of sentencepiece cover."""
    order: Literal["uniform", "epochs"] = "uniform"
    """How training windows are drawn. uniform: independently (Al-Rfou et al. 2018, section 4). epochs:
    side by side, each once before any comes again; every epoch shifts and shuffles them anew (by a
    permutation as in Black and Rogaway 2002, section 4)."""
    # Sorted, so that the windows do not depend on how it was written down.
    mixture: Annotated[dict[str, SourceConfig], AfterValidator(lambda own: dict(sorted(own.items())))] = Field({})
    """Sources for corpus=mixture, by name: {wiki: {corpus: enwik8, weight: 2}, own: {corpus: file, path:
    my.txt}}. Each window is drawn from one, by weight (Brown et al. 2020, GPT-3, section 2.2). A source
    also has the options above that its corpus reads."""

    @model_validator(mode="after")
    def _check_vocabulary_and_mixture(self) -> Self:
        if self.characters is not None and self.vocabulary == "bytes":
            raise self.mistake("vocabulary", "has no use for data.characters; leave out one", "characters")
        if (self.corpus == "mixture") != bool(self.mixture):
            text = f"corpus={self.corpus}; name sources for --data.corpus=mixture, and only for it"
            raise self.mistake("mixture", text, "corpus")
        if self.order == "epochs" and self.mixture:
            raise self.mistake("order", "goes through one text; choose --data.order=uniform for a mixture", "mixture")
        return self

    @property
    def texts(self) -> dict[str, "DataConfig"]:
        """The sources of a mixture, each as if it were alone and in bytes."""
        sources = {name: source.model_dump(exclude={"weight"}) for name, source in self.mixture.items()}
        return {name: DataConfig(cache_dir=self.cache_dir, **own) for name, own in sources.items()}

    @property
    def shares(self) -> tuple[float, ...]:
        """The sources' shares of the windows, which add up to 1."""
        weights = [source.weight for source in self.mixture.values()] or [1.0]
        return tuple(weight / sum(weights) for weight in weights)
