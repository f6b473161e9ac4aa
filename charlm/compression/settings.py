"""The settings that, besides the model, decide every probability of a compressed file."""

from dataclasses import dataclass

import torch

from charlm.config import UserError
from charlm.data.windows import default_stride
from charlm.inference.scoring import AUTOCAST_DTYPES
from charlm.process import physical_memory
from charlm.runs.trained import TrainedModel

PRECISIONS = ("fp32", "bf16", "fp16")
"""A file holds the index of one: keep the order."""
MAX_STREAMS = 2**14
MAX_BLOCK = 2**26
MAX_THREADS = 2**10
DEFAULT_MAX_STREAMS = {"cpu": 64, "cuda": 512}
"""By type of device."""
SYMBOLS_PER_STREAM = 2**13
"""Default minimum. Each stream begins without context, so shorter ones cost more than a few per cent."""
BLOCK_PER_STREAM = 2**16


@dataclass(frozen=True, kw_only=True)
class CodingSettings:
    """Encoder and decoder must agree on all of them; a compressed file holds them in its header.

    Raises:
        UserError: a value that no model and no machine allow.
    """

    streams: int
    """Parts of a block that are read side by side."""
    context: int
    """The most symbols that a prediction sees."""
    stride: int
    """Predictions between two times that the oldest symbols are forgotten."""
    block: int
    """Symbols that are coded together; the last block may have fewer."""
    precision: str
    threads: int

    def __post_init__(self):
        for name, most in (
            ("streams", MAX_STREAMS),
            ("stride", self.context),
            ("threads", MAX_THREADS),
            ("block", MAX_BLOCK),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name}={getattr(self, name)}: must lie between 1 and {most:,}")
        if self.block < self.streams:
            raise UserError(f"block={self.block}: must hold a symbol of each of the {self.streams:,} streams")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision={self.precision}: must be one of {', '.join(PRECISIONS)}")

    @property
    def kept(self) -> int:
        """Symbols that remain when the oldest are forgotten."""
        return self.context - self.stride + 1


def choose_settings(
    trained: TrainedModel,
    num_symbols: int,
    *,
    streams: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    block: int | None = None,
    precision: str = "fp32",
    threads: int | None = None,
) -> CodingSettings:
    """The given settings, with defaults for those that are None.

    Raises:
        UserError: a value out of range, or more streams than the machine's memory holds caches for.
    """
    if streams is None:
        most = DEFAULT_MAX_STREAMS.get(trained.device.type, DEFAULT_MAX_STREAMS["cpu"])
        streams = min(max(1, num_symbols // SYMBOLS_PER_STREAM), most)
    context = trained.config.model.context_length if context is None else context
    settings = CodingSettings(
        streams=streams,
        context=context,
        # Keeps as many symbols as generation does.
        stride=context - default_stride(context) + 1 if stride is None else stride,
        block=min(BLOCK_PER_STREAM * streams, MAX_BLOCK) if block is None else block,
        precision=precision,
        threads=torch.get_num_threads() if threads is None else threads,
    )
    check_settings(trained, settings)
    return settings


def check_settings(trained: TrainedModel, settings: CodingSettings) -> None:
    """Raise UserError if the model or the machine does not allow these settings."""
    model = trained.config.model
    if not 1 <= settings.context <= model.context_length:
        raise UserError(f"context={settings.context}: must lie between 1 and {model.context_length:,}")
    if settings.precision == "fp16" and trained.device.type == "cpu":
        raise UserError("precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    on_gpu = trained.device.type == "cuda"
    memory = torch.cuda.mem_get_info(trained.device)[1] if on_gpu else physical_memory()
    symbols = settings.streams * model.context_length
    needed = 2 * symbols * model.num_layers * model.d_model * cache_dtype(settings).itemsize
    if needed > memory:
        raise UserError(
            f"streams={settings.streams}: their keys and values take {needed / 1e9:,.0f} GB, and there are "
            f"{memory / 1e9:,.0f} GB of memory; take fewer streams"
        )


def cache_dtype(settings: CodingSettings) -> torch.dtype:
    """The dtype of keys and values."""
    return AUTOCAST_DTYPES[settings.precision] or torch.float32
