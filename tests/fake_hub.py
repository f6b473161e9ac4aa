"""A server on the loopback interface in place of the Hugging Face hub: the parts of its API that tests need."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from tiny import SCRIPTS

COMMIT = "0" * 39 + "1"
ROUTE = re.compile(r"(?:/api)?(?:/models|/datasets)?/([^/]*/?[^/]*)(?:/([^/]+))?(?:/[^/]+)?/?(.*)")
"""OWNER/NAME, action, and the path in the repository, behind a revision."""


class FakeHub:
    """Models and datasets by OWNER/NAME, and programs that run with this hub as theirs."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.files: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.answered: list[str] = []
        """The paths of all requests so far."""

    def run(self, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run Python code in the hub's folder."""
        settings = {
            "PYTHONPATH": str(SCRIPTS.parent),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_TOKEN": "none",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "CHARLM_CACHE": str(self.folder / "cache"),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | settings | environment
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment)

    def entries(self, name: str, folder: str = "") -> list[dict]:
        """What the API lists of a repository's files and folders below `folder`."""
        held = self.files[name]
        folders = {str(Path(file).parent) for file in held} - {"."}
        listed = [{"type": "file", "path": path, "size": len(held[path]), "oid": "0"} for path in held]
        listed += [{"type": "directory", "path": path, "oid": "0"} for path in folders]
        return [entry for entry in listed if entry["path"].startswith(folder)]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], **state) -> Iterator[ThreadingHTTPServer]:
    """A server on the loopback interface while the context is open; `state` and `url` are attributes of it."""
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(state, url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serve a hub while the context is open."""
    with serving(_Handler) as server:
        server.hub = FakeHub(folder, server.url)
        yield server.hub


class _Handler(BaseHTTPRequestHandler):
    """Large files come by Git LFS, as there."""

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.hub.answered.append(path)
        name, action, rest = ROUTE.match(path).groups()
        held = self.hub.files.get(name)
        if held is None:
            return self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
        if action == "resolve":
            return self.answer(held[rest]) if rest in held else self.answer({}, 404, "EntryNotFound")
        if action == "tree":
            below = self.hub.entries(name, rest)
            return self.answer(below) if below else self.answer({}, 404, "EntryNotFound")
        siblings = [{"rfilename": file} for file in held]
        return self.answer({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_GET

    def do_PUT(self):
        self.hub.uploads[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        self.hub.answered.append(self.path)
        body = self.body()
        if "/paths-info/" in self.path:
            name, asked = "/".join(self.path.split("/")[3:5]), parse_qs(body.decode())["paths"]
            return self.answer([entry for entry in self.hub.entries(name) if entry["path"] in asked])
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[name][line["value"]["path"]] = self.hub.uploads[line["value"]["oid"]]
            return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        asked = json.loads(body.splitlines()[0])
        if self.path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(name, {})
            return self.answer({"url": f"{self.hub.url}/{name}"})
        if "/preupload/" in self.path:
            for file in asked["files"]:
                mode = "lfs" if ".safetensors" in file["path"] else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
            return self.answer({"files": asked["files"]})
        if self.path.endswith("/objects/batch"):
            for file in asked["objects"]:
                file["actions"] = {"upload": {"href": f"{self.hub.url}/put/{file['oid']}"}}
            return self.answer({"transfer": "basic", "objects": asked["objects"]})
        return self.answer({"errors": [], "warnings": []})  # the check of a card's first lines

    def body(self) -> bytes:
        if (length := self.headers["Content-Length"]) is not None:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: bytes | dict | list, status: int = 200, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header(*(("X-Error-Code", error) if error else ("ETag", f'"{hashlib.sha256(body).hexdigest()}"')))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
