"""What the process does with memory that it frees, seen from the system's side."""

import platform
import subprocess
import sys

import pytest

from charlm.process import peak_memory, physical_memory

HELD_AFTER_FREEING = """
import os, sys
import torch
from charlm.process import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
torch.ones(2**24)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept():
    """Settings that glibc ignores: every large tensor is then fetched from the system anew, page by page."""
    held = {
        mode: int(
            subprocess.run([sys.executable, "-c", HELD_AFTER_FREEING, mode], capture_output=True, check=True).stdout
        )
        for mode in ("as it comes", "keep")
    }
    assert held["as it comes"] < 2**24
    assert held["keep"] >= 2**26


def test_peak_memory_is_in_bytes():
    """Fault: kilobytes called bytes, or what is free now for what was taken at most."""
    before = peak_memory()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert 20 * 2**20 < before <= peak_memory() < physical_memory()
