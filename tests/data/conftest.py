"""A web server on the loopback interface in place of the corpora's own, and a little enwik8 for it to serve."""

import bz2
import gc
import gzip
import hashlib
import io
import lzma
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from charlm.config import UserError
from charlm.data.sources import PUBLISHED, Published
from fake_hub import serving


class OneFile(BaseHTTPRequestHandler):
    """Serves the `content` of its server. Tests set the server's faults, one entry per request:

    errors to answer with (`statuses`), and bytes after which to close the connection (`cuts`).
    """

    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: server.cuts.pop(0) if server.cuts else None])


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)  # pauses between attempts
    with serving(OneFile, content=b"", cuts=[], statuses=[], requests=0) as server:
        yield server
    with warnings.catch_warnings():  # pooch leaves the connection of a download that failed to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def refused() -> Callable[..., object]:
    """`with refused(option, *parts)`: the block must raise a UserError about the option whose message has the parts."""

    @contextmanager
    def refuse(option: str | None, *parts: str) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        assert caught.value.option == option
        for part in parts:
            assert part in str(caught.value)

    return refuse


def zipped(text: bytes) -> bytes:
    """A zip archive of enwik8, behind another file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README", b"not this one")
        archive.writestr("enwik8", text)
    return buffer.getvalue()


@pytest.fixture(
    params=[bytes, gzip.compress, bz2.compress, lzma.compress, zipped], ids=["raw", "gzip", "bzip2", "xz", "zip"]
)
def pack(request) -> Callable[[bytes], bytes]:
    """Packs a copy of enwik8, in each way that a user may have one."""
    return request.param


@pytest.fixture
def enwik8(monkeypatch, server) -> bytes:
    """A text of 500 bytes, 490 characters, in place of the real enwik8; split 450 / 25 / 25."""
    content = "".join(f"<page {number:04d}>\u00e9\n" + "x" * 36 for number in range(10)).encode()
    assert (len(content), len(content.decode())) == (500, 490)
    server.content = zipped(content)
    little = Published(
        url=f"{server.url}/dc/some.zip",
        archive_sha256=hashlib.sha256(server.content).hexdigest(),
        member="enwik8",
        size=len(content),
        algorithm="sha256",
        digest=hashlib.sha256(content).hexdigest(),
        split_sizes=(450, 25, 25),
    )
    monkeypatch.setitem(PUBLISHED, "enwik8", little)
    return content
