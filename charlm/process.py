"""The process: its rank, the memory that it uses, and its processor."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that one unit of `ru_maxrss` stands for."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def is_main_process() -> bool:
    """Whether this is the only process of a launch or the first; known before torch is imported."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def keep_freed_memory() -> None:
    """Make the process keep memory that it frees. For scripts, not for libraries.

    glibc returns large freed blocks to the system, which zeroes them before it hands them out again, here
    hundreds of times a step. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def peak_memory() -> int:
    """Peak memory of this process so far, in bytes: on its GPU, or resident memory if it uses none."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss starts at the parent's
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def physical_memory() -> int:
    """The machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor_name() -> str:
    """Name of the processor if the system knows it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
