"""Datasets, read by the `datasets` library from the Hugging Face hub or a local folder of parquet files.

A dataset's own code is never run. Datasets of the hub are kept in the library's cache (HF_HOME), which works without a
network later on; files of a folder are read in place.
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

BATCH = 64
"""Documents read at once; each may be a whole book."""


def open_dataset(
    where: str | Path, config: str | None, revision: str | None, option: str, show_progress: bool
) -> "Splits":
    """The splits of a dataset by name. A dataset of the hub is downloaded first, unless it is in the cache.

    Args:
        where: OWNER/NAME on the hub, or a folder.
        config: one of its configurations, if it has several.
        option: the option that chose the dataset, for errors.

    Raises:
        UserError: it cannot be fetched or read, or needs code of its own.
    """
    import datasets

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it also raises what it logs
    show = show_progress and sys.stderr.isatty()
    (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()
    with _explained(option):
        return dict(datasets.load_dataset(str(where), config, revision=revision, streaming=isinstance(where, Path)))


def documents(splits: "Splits", split: str, column: str, separator: str, option: str) -> Generator[bytes]:
    """The text of a split in UTF-8: its documents in order, with the separator between them.

    Raises:
        UserError: no such split or column, or a row that holds no text.
    """
    if split not in splits:
        raise UserError(
            f"{option}: has no split {split!r}; name one of {', '.join(splits)} "
            "(--data.train_split, --data.valid_split, --data.test_split)"
        )
    with _explained(option):
        columns = splits[split].column_names
        if columns and column not in columns:
            raise UserError(
                f"{option}: has no column {column!r}; set --data.text_column to one of {', '.join(columns)}"
            )
        row = 0
        for batch in splits[split].select_columns([column]).iter(BATCH):
            texts = batch[column]
            for position, text in enumerate(texts, start=row):
                if not isinstance(text, str):
                    raise UserError(
                        f"{option}: row {position} of split {split!r} holds {type(text).__name__}, not text, in column "
                        f"{column!r}; set --data.text_column to one of text in every row"
                    )
            yield ((separator if row else "") + separator.join(texts)).encode()
            row += len(texts)


@contextmanager
def _explained(option: str) -> Iterator[None]:
    """Turn any exception of the library (its own, pyarrow's, the network's, the disk's) into a UserError."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except UserError:
        raise
    except DatasetNotFoundError as error:
        way_out = "check the name and --data.hub_revision; for one that is not public, log in with `hf auth login`"
        raise UserError(f"{option}: no such dataset ({first_line(error)}); {way_out}") from error
    except ConnectionError as error:
        raise UserError(
            f"{option}: cannot be fetched ({first_line(error)}). Without a network, give a folder with its parquet "
            "files as --data.hub_id=FOLDER, or fetch it where there is one and bring the folder HF_HOME along, with "
            "HF_HUB_OFFLINE=1"
        ) from error
    except Exception as error:
        if "scripts are no longer supported" in str(error):
            raise UserError(
                f"{option}: needs code of its own to be read ({first_line(error)}), which is never run; "
                "try --data.hub_revision=refs/convert/parquet, or another copy of it in parquet files"
            ) from error
        raise UserError(
            f"{option}: cannot be read ({first_line(error)}); check its files and --data.hub_config"
        ) from error
