"""The process: its rank, its standard streams, the memory that it uses, and its processor."""

import contextlib
import ctypes
import io
import os
import platform
import select
import sys
from pathlib import Path
from typing import TextIO

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of `ru_maxrss`."""
NO_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def is_main_process() -> bool:
    """Whether this is the first process of a launch; known before torch is imported."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", ""))
    return not rank.isdecimal() or int(rank) == 0


class _Lasting(io.FileIO):
    complains = True

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:
                if (written := super().write(rest)) is None:  # a full pipe that does not block
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            if self.complains and not isinstance(error, BrokenPipeError):
                self.complains = False
                print(f"output is lost: {error.strerror}", file=sys.stderr)
        return len(data)


def lasting(stream: TextIO) -> TextIO:
    """`stream` with writes that never fail; what it cannot encode is spelt out, as \\xe9."""
    raw = getattr(stream, "buffer", None)
    raw = getattr(raw, "raw", raw)
    if type(raw) is not io.FileIO:  # a notebook's, or one that is lasting
        return stream
    raw = _Lasting(raw.fileno(), "w", closefd=False)
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **options)


def keep_streams() -> None:
    """Make the standard streams `lasting`. For scripts, not for libraries."""
    # Else a file that is opened later would get the number of a stream that is closed.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = lasting(sys.stdout or os.fdopen(1, "w", closefd=False))
    sys.stderr = lasting(sys.stderr or os.fdopen(2, "w", closefd=False))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, which the system would zero. For scripts, not for libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def is_about_memory(error: Exception) -> bool:
    """True if memory was used up, on a GPU or on the host."""
    import torch

    is_kind = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_kind or any(words in str(error) for words in NO_MEMORY)


def peak_memory() -> int:
    """Peak memory of this process in bytes: on its GPU, or resident memory if it uses none."""
    import psutil
    import torch

    module = torch.get_device_module()  # of the accelerator, if there is one
    if hasattr(module, "max_memory_allocated") and module.is_initialized():
        return module.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss starts at the parent's
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def processor_name() -> str:
    """Name of the processor if the system knows it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
