"""A web server on the loopback interface in place of the corpora's own, and a little enwik8 for it to serve."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from charlm.data.sources import PUBLISHED, Published


class FileServer:
    """Serves one file. Tests set its faults from outside."""

    def __init__(self):
        self.content = b""
        self.cuts: list[int] = []
        """Bytes after which to close the connection, one entry per request; later requests are served whole."""
        self.statuses: list[int] = []
        """Errors to answer with, one entry per request, before any other answer."""
        self.requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/dc/some.zip"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                if server.statuses:
                    return self.send_error(server.statuses.pop(0))
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.content)))
                self.end_headers()
                self.wfile.write(server.content[: server.cuts.pop(0) if server.cuts else None])

            def log_message(self, *args):
                pass

        return Handler


@pytest.fixture
def server(monkeypatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)  # pauses between attempts
    file_server = FileServer()
    yield file_server
    file_server.stop()


@pytest.fixture
def zipped() -> Callable[..., bytes]:
    """`zipped(enwik8=b"...")` is a zip archive with that member."""

    def make(**members: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    return make


@pytest.fixture
def enwik8(monkeypatch, server, zipped) -> bytes:
    """A text of 500 bytes, 490 characters, in place of the real enwik8; split 450 / 25 / 25."""
    content = "".join(f"<page {number:04d}>\u00e9\n" + "x" * 36 for number in range(10)).encode()
    assert (len(content), len(content.decode())) == (500, 490)
    server.content = zipped(README=b"not this one", enwik8=content)
    little = Published(
        url=server.url,
        archive_sha256=hashlib.sha256(server.content).hexdigest(),
        member="enwik8",
        size=len(content),
        algorithm="sha256",
        digest=hashlib.sha256(content).hexdigest(),
        split_sizes=(450, 25, 25),
    )
    monkeypatch.setitem(PUBLISHED, "enwik8", little)
    return content
