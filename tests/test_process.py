"""What the process does with memory that it frees, seen from the system's side."""

import platform
import subprocess
import sys

import psutil
import pytest

from charlm.process import peak_memory
from launched import launch
from tiny import SCRIPTS, TINY

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
    assert 20 * 2**20 < before <= peak_memory() < psutil.virtual_memory().total


LIKE_WINDOWS = """
import os, psutil, runpy, signal, sys
sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"])
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"): delattr(signal, name)
for name in ("getuid", "sched_getaffinity", "set_blocking", "sysconf", "wait4"): delattr(os, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "words", "code", "said"),
    [
        ("evaluate", ["{folder}/run", "--limit=100"], 0, ""),
        pytest.param("train", [*TINY, "--run.dir={folder}/new"], 0, "no SIGUSR1 or SIGHUP", marks=pytest.mark.slow),
        pytest.param("ablate", [*TINY, "--run.dir={folder}/rows"], 2, "error: ", marks=pytest.mark.slow),
    ],
)
def test_where_unix_is_missing(script, words, code, said, run_on_disk, tmp_path):
    """Guards against a package that cannot be imported on Windows, and training that promises signals it never gets."""
    words, text = [word.format(folder=tmp_path) for word in words], tmp_path / "text.txt"
    if script != "evaluate":
        words += ["--data.corpus=file", f"--data.path={text}", f"--data.cache_dir={tmp_path / 'cache'}"]
    done = launch([sys.executable, "-c", LIKE_WINDOWS, SCRIPTS / f"{script}.py", *words])
    assert done.returncode == code, done.stderr
    assert said in done.stderr
