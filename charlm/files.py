"""Files written whole or not at all, and JSON files that are checked before they are used."""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
from filelock import FileLock
from pydantic import AfterValidator, JsonValue, TypeAdapter, ValidationError

from charlm.config.errors import UserError

MAX_JSON_BYTES = 2**24
JSON = TypeAdapter(JsonValue)
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
TEMPORARY = re.compile(rf"\.(.+)\.{HOST}-(\d{{1,9}})-[0-9a-f]{{8}}\.tmp", re.ASCII | re.DOTALL)
"""The temporary names of `replacing` on this machine: the target's name, the process's id, and chance."""
_being_written: set[str] = set()  # a killed process may have had the id of this one


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, kind: Any = Any) -> Any:
    """The content of a JSON file, as a `kind` that pydantic can check. Raises UserError if it is none."""
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
        raise UserError(f"{path} does not fit this version: {place}: {fault['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def parse_json(text: bytes) -> Any:
    """The value of a JSON text; numbers of more than 18 digits become floats. Raises ValueError."""
    try:
        value = json.loads(text.decode(), parse_int=lambda n: (int if len(n) < 19 else float)(n))
        return JSON.validate_python(value)  # bounds the depth
    except (RecursionError, ValidationError):
        raise ValueError("it is nested too deeply") from None


def check_output(path: Path) -> Path:
    """The file to write for `path`, of a link its target. Raises ValueError if it cannot be written."""
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError("a folder, a pipe or a device is there; name another place")
    folder = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror})"
        raise ValueError(f"{problem}; name another place") from None
    return target


OutputPath = Annotated[Path, AfterValidator(check_output)]
"""The type of an option that names a file or folder to make."""


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds either its old or its new content, whenever process or machine die."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`; the file or folder made there moves to `path` when the context ends.

    It is removed instead if there was an error. The content of a folder must be on disk by then, and
    no folder may stand at `path`. If several processes write the same `path` at once, the last file
    stays, or the first folder. What killed processes of this machine left for `path` is removed.
    """
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "a pipe or a device is there", str(path))
    for left in path.parent.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(left.name)
        if match and match[1] == path.name and left.name not in _being_written:
            writer = int(match[2])
            if writer == os.getpid() or not psutil.pid_exists(writer):
                with suppress(OSError):  # another user's, perhaps
                    remove(left)
    name = f".{path.name}.{HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = path.with_name(name)
    _being_written.add(name)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        remove(temporary)
        _being_written.remove(name)
    sync(path.parent)


def share(path: Path) -> None:
    """Let a group that may write the folder of `path` write `path` as well."""
    folder = path.parent.stat()
    mode = folder.st_mode
    if mode & stat.S_IWGRP and not mode & stat.S_ISVTX and path.stat().st_gid == folder.st_gid:
        with suppress(PermissionError):  # another user's
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode & (0o2070 if path.is_dir() else 0o060))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, and `share` what was made."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        share(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out, also other users'. Raises OSError if the lock cannot be read."""
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path))
            share(path)
        except PermissionError:  # another user made it; to hold it, reading is enough
            import fcntl  # not on Windows

            fcntl.flock(stack.enter_context(path.open("rb")), fcntl.LOCK_EX)
        yield


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
