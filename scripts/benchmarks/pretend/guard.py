"""Compiles and loads `guard.cpp`. Imports no torch: the guard must be loaded before it."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from charlm.config import UserError
from charlm.files import make_folder, replacing

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILER = "g++"


def missing() -> str | None:
    """What is missing here, if anything is."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER}, a C++ compiler"
    if any((_torch() / "lib").glob("*torch_cuda*")):
        return "a build of torch without CUDA"
    return None


def compiled_guard() -> Path:
    """The shared library, compiled once for each installed torch: it names the folder of the libraries that it needs.

    Raises:
        UserError: something is missing.
    """
    if lacks := missing():
        raise UserError(f"benchmark=pretend: needs {lacks}; install it", "benchmark")
    installed = f"{importlib.metadata.version('torch')} {_torch()}"
    key = hashlib.sha256(SOURCE.read_bytes() + installed.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("CHARLM_CACHE") or "~/.cache/charlm").expanduser()
    target = cache / f"pretended-gpu-{key}.so"
    if not target.exists():
        make_folder(cache)
        with replacing(target) as new:
            subprocess.run(_command(new), check=True)
    return target


def _command(target: Path) -> list[str]:
    include, library = _torch() / "include", _torch() / "lib"
    includes = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = [f"-L{library}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{library}"]
    return [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(target), *libraries]


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def load_guard() -> None:
    """Make torch, which must not be imported yet, accept tensors on "cuda"."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already")
    ctypes.CDLL(str(compiled_guard()), ctypes.RTLD_GLOBAL)
