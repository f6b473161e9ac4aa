"""Datasets, read by the `datasets` library from the Hugging Face hub or a local folder of parquet files.

A dataset's own code is never run. Datasets of the hub are kept in the library's cache (HF_HOME), which works without a
network later on; files of a folder are read in place. Errors do not name the dataset; the caller adds it.
"""

import logging
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.config import UserError
from charlm.config.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Splits = dict[str, Dataset | IterableDataset]


def open_dataset(where: str | Path, config: str | None, revision: str | None, show_progress: bool) -> "Splits":
    """The splits of a dataset by name; `where` is OWNER/NAME on the hub, or a folder. UserError if it cannot be had."""
    import datasets

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it also raises what it logs
    show = show_progress and sys.stderr.isatty()
    (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()
    with _explained():
        return dict(datasets.load_dataset(str(where), config, revision=revision, streaming=isinstance(where, Path)))


def documents(splits: "Splits", split: str, column: str, separator: str) -> Generator[bytes]:
    """The text of a split in UTF-8: its documents in order, with the separator between them.

    Raises UserError if there is no such split or column, or a row holds no text.
    """
    if split not in splits:
        options = "--data.train_split, --data.valid_split, --data.test_split"
        raise UserError(f"has no split {split!r}; name one of {', '.join(splits)} ({options})")
    with _explained():
        columns = splits[split].column_names
        if columns and column not in columns:
            way_out = f"set --data.text_column to one of {', '.join(columns)}"
            raise UserError(f"has no column {column!r}; {way_out}", "data.text_column")
        rows = 0
        for batch in splits[split].select_columns([column]).iter(64):  # each document may be a whole book
            texts = batch[column]
            for row, text in enumerate(texts, start=rows):
                if not isinstance(text, str):
                    problem = (
                        f"row {row} of split {split!r} holds {type(text).__name__}, not text, in column {column!r}"
                    )
                    way_out = "set --data.text_column to one of text in every row"
                    raise UserError(f"{problem}; {way_out}", "data.text_column")
            yield ((separator if rows else "") + separator.join(texts)).encode()
            rows += len(texts)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn any exception of the library (its own, pyarrow's, the network's, the disk's) into a UserError."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, DatasetNotFoundError):
            problem = "no such dataset"
            way_out = "check the name and --data.hub_revision; for one that is not public, log in with `hf auth login`"
        elif isinstance(error, ConnectionError):
            problem = "cannot be fetched"
            way_out = (
                "without a network, give a folder with its parquet files as --data.hub_id=FOLDER, or fetch it where "
                "there is one and bring the folder HF_HOME along, with HF_HUB_OFFLINE=1"
            )
        elif "scripts are no longer supported" in str(error):
            problem = "needs code of its own, which is never run"
            way_out = "try --data.hub_revision=refs/convert/parquet, or another copy of it in parquet files"
        else:
            problem, way_out = "cannot be read", "check its files and --data.hub_config"
        raise UserError(f"{problem} ({first_line(error)}); {way_out}") from error
