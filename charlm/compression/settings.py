"""The settings that, with the model, decide every probability of a compressed file."""

from typing import Annotated, Any, Self

import psutil
import torch
from pydantic import Field, model_validator

from charlm.config import Precision, Section, UserError
from charlm.config.types import Count
from charlm.data.windows import default_stride
from charlm.inference.scoring import AUTOCAST_DTYPES, check_precision
from charlm.runs.trained import TrainedModel

MAX_BLOCK = 2**26
SYMBOLS_PER_STREAM = 2**13
"""Default minimum: shorter streams, which begin without context, cost a few per cent."""
BLOCK_PER_STREAM = 2**16


class CodingSettings(Section):
    """Settings that the header of a compressed file holds for the decoder."""

    streams: Annotated[Count, Field(le=2**14)]
    """Parts of a block that are read side by side."""
    context: Count
    """The most symbols that a prediction sees."""
    stride: Count
    """Predictions between two times that the oldest symbols are forgotten."""
    block: Annotated[Count, Field(le=MAX_BLOCK)]
    """Symbols that are coded together; the last block may have fewer."""
    threads: Annotated[Count, Field(le=2**10)]
    precision: Precision

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride > self.context:
            raise self.mistake("stride", f"exceeds the context of {self.context:,}", "context")
        if self.block < self.streams:
            raise self.mistake("block", f"is less than the {self.streams:,} streams", "streams")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys and values."""
        return AUTOCAST_DTYPES[self.precision] or torch.float32


def choose_settings(trained: TrainedModel, num_symbols: int, **options: Any) -> CodingSettings:
    """The given `options`, with defaults in place of None; UserError if they cannot be."""
    given = {name: value for name, value in options.items() if value is not None}
    most = 512 if trained.device.type == "cuda" else 64
    streams = given.get("streams", min(max(1, num_symbols // SYMBOLS_PER_STREAM), most))
    context = given.get("context", trained.config.model.context_length)
    defaults = {
        "streams": streams,
        "context": context,
        "stride": max(1, context - default_stride(context) + 1),  # as in generation
        "block": min(BLOCK_PER_STREAM * max(1, streams), MAX_BLOCK),
        "threads": torch.get_num_threads(),
        "precision": "fp32",
    }
    settings = CodingSettings.read(defaults | given)
    check_settings(trained, settings)
    return settings


def check_settings(trained: TrainedModel, settings: CodingSettings) -> None:
    """Raise UserError if the model or the machine does not allow these settings."""
    model = trained.config.model
    if settings.context > model.context_length:
        problem = f"the model's is {model.context_length:,}"
        raise UserError(f"context={settings.context}: {problem}; give no more", "context")
    check_precision(settings.precision, trained.device)
    memory = psutil.virtual_memory().total
    if trained.device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(trained.device)
    symbols = settings.streams * model.context_length
    needed = 2 * symbols * model.num_layers * model.d_model * settings.dtype.itemsize
    if needed > memory:
        problem = f"their keys and values take {needed / 1e9:,.0f} GB of {memory / 1e9:,.0f} GB"
        raise UserError(f"streams={settings.streams}: {problem}; take fewer", "streams")
