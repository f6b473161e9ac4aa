"""Datasets of the `datasets` library: on the hub, or in a local folder of parquet files."""

import logging
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from charlm.config import UserError
from charlm.config.errors import first_line
from charlm.config.types import expanded

Splits = dict[str, Any]  # a Dataset or IterableDataset each, whose import takes a second


def open_dataset(where: str | Path, config: str | None, revision: str | None, show_progress: bool) -> Splits:
    """The splits of OWNER/NAME on the hub or of a folder. UserError if they cannot be read."""
    try:
        expanded(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~")
    except ValueError as error:  # the library would make a folder called ~
        raise UserError(f"HF_HOME: {error}") from None
    import datasets

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it also raises what it logs
    if show_progress and sys.stderr.isatty():
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    in_place = isinstance(where, Path)
    with _explained():
        return dict(datasets.load_dataset(str(where), config, revision=revision, streaming=in_place))


def documents(splits: Splits, split: str, column: str, separator: str, skip_null: bool = False) -> Generator[bytes]:
    """The documents of a split in UTF-8. Raises UserError if it does not exist, or a row has no text."""
    if split not in splits:
        options = "--data.train_split, --data.valid_split, --data.test_split"
        raise UserError(f"has no split {split!r}; name one of {', '.join(splits)} ({options})")
    with _explained():
        rows, before = 0, ""
        for batch in splits[split].select_columns([column]).iter(64):  # each document may be a whole book
            texts = batch[column]
            for row, text in enumerate(texts, start=rows):
                if not isinstance(text, str) and not (text is None and skip_null):
                    kind = "null" if text is None else type(text).__name__
                    problem = f"row {row} of split {split!r} holds {kind}, not text"
                    way_out = "choose another --data.text_column, or --data.skip_null=true"
                    raise UserError(f"{problem}; {way_out}", "data.text_column")
            rows += len(texts)
            if kept := [text for text in texts if text is not None]:
                yield (before + separator.join(kept)).encode()
                before = separator


@contextmanager
def _explained() -> Iterator[None]:
    """Turn any exception of the library, the network or the disk into a UserError."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, DatasetNotFoundError):
            way_out = "check --data.hub_revision, or log in with `hf auth login`"
        elif isinstance(error, ConnectionError):
            way_out = "give its parquet files as --data.hub_id=FOLDER"
            way_out += ", or copy HF_HOME from elsewhere and set HF_HUB_OFFLINE=1"
        elif "scripts are no longer supported" in str(error):
            way_out = "it needs code of its own, which is never run; "
            way_out += "try --data.hub_revision=refs/convert/parquet"
        else:
            way_out = "check its files, --data.hub_config and --data.text_column"
        raise UserError(f"cannot be read ({first_line(error)}); {way_out}") from error
