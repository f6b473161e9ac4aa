"""How the process holds on to its memory, and whether a model fits into it."""

import ctypes
import os
import resource
import sys

from charlm.config import ConfigError, ModelConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, for the rest of its life.

    glibc hands every freed block of some size back to the system and has it zeroed when it asks for it again, which
    training and evaluation do hundreds of times a step. Elsewhere than under glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def peak_memory() -> int:
    """The most that this process has had so far, in bytes: allocated on its GPU, or resident where it uses none."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def physical_memory() -> int:
    """The machine's, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(config: ModelConfig, vocabulary_size: int) -> None:
    """Raise ConfigError, before anything is allocated, if the parameters alone need more memory than the machine has.

    Four bytes each; gradients, optimizer and activations come on top, so what passes may still be too large.
    """
    L, T, D = config.num_layers, config.context_length, config.d_model
    num_tables = {"per_layer": L, "input": 1, "rotary": 0}[config.positions]
    ngrams = len(config.ngrams) * config.ngram_width * (config.ngram_buckets + D)
    parameters = L * (4 * D * D + 2 * D * config.d_ff) + num_tables * T * D + 2 * vocabulary_size * D + ngrams
    memory = physical_memory()
    if 4 * parameters > memory:
        raise ConfigError(
            f"model.num_layers={L}, d_model={D}, d_ff={config.d_ff}, context_length={T}, "
            f"ngrams={list(config.ngrams)} of {config.ngram_buckets} buckets: make "
            f"{parameters:.3g} parameters, {4 * parameters / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB "
            "of memory; make them smaller"
        )
