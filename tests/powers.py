"""Tests as a user without root's powers, also where they run as root."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

OTHER = 12345
"""The id of another user."""
AS_ROOT = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can make files of others")
_VERSION, _FILES = 0x20080522, 0b1111  # of linux/capability.h: chown, dac_override, dac_read_search, fowner


@contextmanager
def without_powers() -> Iterator[None]:
    """Inside, this thread may read and write only what its user and group may."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~_FILES
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0
