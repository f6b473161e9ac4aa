"""Reads and writes safetensors files; headers are size-limited before they are parsed."""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from charlm.config import UserError
from charlm.files import sync

MAX_HEADER_BYTES = 2**24
SPARE_BYTES = 2**20
"""Free space needed beyond the tensors, for headers and small files."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names safetensors gives to the types of parameters and buffers."""

Described = tuple[list[int], str | None]
"""Shape and type of a tensor."""


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless the folder's disk has room for tensors of so many bytes and the small files beside them."""
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
    """All tensors of a file by name, on the CPU. Raises UserError if the file is damaged."""
    with opened(path):
        return load_file(path)


def describe_tensors(path: Path) -> dict[str, Described]:
    """Shape and type of every tensor of a file; only its header is read. Raises UserError if it is damaged."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return {name: (tensor.get_shape(), tensor.get_dtype()) for name, tensor in slices.items()}


def check_model(path: Path, expected: Mapping[str, Tensor], config: str) -> dict[str, Described]:
    """Check that a file's tensors are those of a model with this `state_dict`; return their shapes and types.

    Args:
        config: name of the file that describes the model, for errors.

    Raises:
        UserError: the file has an extra tensor, lacks one, or has one of another shape or type.
    """
    wanted: dict[str, Described] = {
        name: (list(tensor.shape), DTYPES.get(tensor.dtype)) for name, tensor in expected.items()
    }
    found = describe_tensors(path)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{path} has no tensor {name}, which the model of {config} has")
        if name not in wanted:
            raise UserError(f"{path} has a tensor {name}, which the model of {config} has not")
        if found[name] != wanted[name]:
            raise UserError(
                f"{path}: its tensor {name} is {shown(found[name])}, and that of the model of {config} "
                f"{shown(wanted[name])}"
            )
    return wanted


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A file of tensors whose header has been read. Raises UserError if it is damaged."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise UserError(f"{path}: its header is said to have {header_bytes:,} bytes, more than any checkpoint's")
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def shown(described: Described) -> str:
    """For messages: `F32 [8, 8]`."""
    shape, dtype = described
    return f"{dtype} {shape}"
