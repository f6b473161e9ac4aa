"""Reads and writes safetensors files. The library limits their headers to 100 MB and checks every offset."""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from charlm.config import UserError
from charlm.files import sync

SPARE_BYTES = 2**20
"""Free space needed beyond the tensors, for headers and small files."""


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless the folder's disk has room for tensors of `num_bytes` and the small files beside them."""
    needed, free = num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        complaint = f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, complaint, str(folder))


def save_tensors(tensors: dict[str, Tensor], path: Path, like: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file with the access rights of the file `like`. Raises OSError if the disk is full or fails."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if cause := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
        raise
    shutil.copymode(like, path)  # safetensors creates files that only their owner may read
    sync(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, memory-mapped. Raises UserError if the file is damaged."""
    with opened(path):
        return load_file(path)


def check_model(path: Path, expected: Mapping[str, Tensor], config: str) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names, shapes and types of this `state_dict`.

    Args:
        config: name of the file that describes the model, for errors.

    Raises:
        UserError: the file has an extra tensor, lacks one, or has one of another shape or type.
    """
    found = load_tensors(path)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{path} has no tensor {name}, which the model of {config} has")
        if name not in expected:
            raise UserError(f"{path} has a tensor {name}, which the model of {config} has not")
        if shown(found[name]) != shown(expected[name]):
            raise UserError(
                f"{path}: its tensor {name} is {shown(found[name])}, and that of the model of {config} "
                f"{shown(expected[name])}"
            )
    return found


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A file of tensors whose header has been read. Raises UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def shown(tensor: Tensor) -> str:
    """Type and shape of a tensor: `float32 [8, 8]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
