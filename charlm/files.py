"""Files written whole or not at all, and JSON files that are checked before they are used."""

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import JsonValue, TypeAdapter, ValidationError

from charlm.config.errors import UserError

MAX_JSON_BYTES = 2**24
JSON = TypeAdapter(JsonValue)
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
TEMPORARY = re.compile(rf"\.(.+)\.{HOST}-(\d{{1,9}})-[0-9a-f]{{8}}\.tmp", re.ASCII | re.DOTALL)
"""Name of what `replacing` writes on this machine: the target's name, the id of the process, and chance."""
_being_written: set[str] = set()
"""Names of what this process is writing; a killed one may have had the same id."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, kind: Any = Any) -> Any:
    """The content of a JSON file, as a `kind`: a model or another type that pydantic can check.

    Raises:
        UserError: it is missing, not a regular file, larger than `max_bytes`, damaged, nested too deeply,
            or no `kind`.
    """
    try:
        if not path.is_file():  # a reader of a pipe could wait for ever
            raise ValueError("it is missing or no regular file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        return TypeAdapter(kind).validate_python(parse_json(content))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))[:80]
        raise UserError(f"{path} is not one that this version of charlm writes: {place}: {fault['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def parse_json(text: bytes) -> Any:
    """The value of a JSON text; whole numbers of more than 18 digits become floats. Raises ValueError."""
    try:
        value = json.loads(text.decode(), parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
        return JSON.validate_python(value)  # bounds the depth
    except (RecursionError, ValidationError):
        raise ValueError("it is nested too deeply") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds either its old or its new content, whenever process or machine die."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`; the file or folder made there moves to `path` when the context ends.

    It is removed instead if there was an error. The content of a folder must be on disk by then, and
    no folder may stand at `path`. Every call has its own hidden path, so that threads, processes and
    machines may write the same `path` at once: the last file stays, or the first folder. What killed
    processes of this machine left for `path` is removed.
    """
    for left in path.parent.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(left.name)
        if match and match[1] == path.name and not _is_being_written(left.name, int(match[2])):
            with suppress(OSError):  # another user's, perhaps
                remove(left)
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _being_written.add(temporary.name)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        remove(temporary)
        _being_written.remove(temporary.name)
    sync(path.parent)


def _is_being_written(name: str, process: int) -> bool:
    return name in _being_written if process == os.getpid() else psutil.pid_exists(process)


def remove(path: Path) -> None:
    """Remove a file or folder if there is one; a folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on disk."""
    if os.name == "nt":  # needs files that are open for writing, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
