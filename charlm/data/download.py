"""One file over HTTP: resumed when cut off, verified, and under its own name only once it is whole."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from charlm.config import UserError

CHUNK = 1 << 16
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as cut off."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds to wait after each attempt in a row that brought nothing; one more, and the download is given up."""


class _Failed(Exception):
    """The file cannot be had; the message says why."""


class _Interrupted(_Failed):
    """This attempt ended early; another may go on from there."""


def download(url: str, target: Path, *, size: int, sha256: str, progress: bool = True) -> None:
    """Fetch `url` to `target`. What comes before a failure stays as `target`.part, and the next call continues it.

    Two processes must not do so at once.

    Args:
        size: bytes of the file; no more are ever written.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UserError: the file cannot be fetched, or is not the one it should be.
    """
    if target.exists() and _sha256(target) == sha256:
        return
    part = target.with_name(target.name + ".part")
    resumed = _length(part) > 0
    elsewhere = f"Fetch this file elsewhere (SHA-256 {sha256}) and give it as --data.path=FILE"
    try:
        _receive(url, part, size, progress)
    except _Failed as error:
        raise UserError(f"{url}: cannot be fetched ({error}). {elsewhere}") from error
    if (received := _sha256(part)) != sha256:
        part.unlink()
        if resumed:  # perhaps it was the beginning of another file
            return download(url, target, size=size, sha256=sha256, progress=progress)
        raise UserError(f"{url}: its SHA-256 is {received}: changed there, or damaged on the way. {elsewhere}")
    os.replace(part, target)


def _receive(url: str, part: Path, size: int, progress: bool) -> None:
    """Attempt after attempt until `part` has `size` bytes, as long as they bring anything new."""
    pauses = iter(PAUSES)
    bar = tqdm(
        desc=url.rsplit("/", 1)[-1],
        total=size,
        initial=_length(part),
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )
    with bar:
        while (have := _length(part)) < size:
            try:
                _attempt(url, part, have, size, bar)
            except _Interrupted:
                if _length(part) > have:
                    pauses = iter(PAUSES)
                elif (pause := next(pauses, None)) is not None:
                    time.sleep(pause)
                else:
                    raise


def _attempt(url: str, part: Path, have: int, size: int, bar: tqdm) -> None:
    """Append to the first `have` bytes, or start over where the server does not know how to send the rest alone."""
    with _open(url, have) as response:
        start, total = _range(response)
        if total not in (None, size):
            raise _Failed(f"the server's file has {total:,} bytes, not {size:,}")
        if start not in (0, have):
            raise _Failed(f"asked for bytes from {have:,} on, the server sent those from {start:,} on")
        bar.update(start - bar.n)
        with part.open("ab" if start else "wb") as file:
            for block in _blocks(response, size - start):
                file.write(block)
                bar.update(len(block))


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "charlm"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        kind = _Interrupted if error.code >= 500 or error.code in (408, 429) else _Failed
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Interrupted(error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(repr(error)) from error


def _range(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's size if the server tells."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if content_range is None:
            raise _Failed("the server sent a part of the file and did not say which")
        start, total = content_range.groups()
        return int(start), None if total == "*" else int(total)
    return 0, response.length


def _blocks(response: http.client.HTTPResponse, length: int) -> Iterator[bytes]:
    """The next `length` bytes, block by block."""
    while length:
        try:
            block = response.read(min(CHUNK, length))
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(repr(error)) from error
        if not block:
            raise _Interrupted(f"the connection was closed {length:,} bytes before the end")
        yield block
        length -= len(block)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
