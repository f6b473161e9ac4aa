"""Models pushed to the hub and loaded from it: a server on the loopback interface stands in for it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from charlm.config import Config, ModelConfig
from charlm.data.vocabulary import ByteVocabulary
from charlm.model.transformer import CharTransformer
from charlm.objective.build import build_heads
from charlm.runs.share.export import save_model
from charlm.runs.trained import TrainedModel
from tiny import SCRIPTS

COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that pushing and loading a model takes; large files come by Git LFS, as there."""

    files: dict[str, dict[str, bytes]]
    uploads: dict[str, bytes]
    answered: list[str]

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.answered.append(path)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        held = self.files.get(name)
        if held is None:
            return self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
        if "/resolve/" in path:
            content = held.get(path.split("/", 5)[5])
            return self.answer(content) if content is not None else self.answer({}, 404, "EntryNotFound")
        if "/tree/" in path:
            return self.answer(
                [{"type": "file", "path": file, "size": len(content), "oid": "0"} for file, content in held.items()]
            )
        siblings = [{"rfilename": file} for file in held]
        return self.answer({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_GET

    def do_PUT(self):
        self.uploads[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        self.answered.append(self.path)
        lines = self.body().splitlines()
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, lines):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[name][line["value"]["path"]] = self.uploads[line["value"]["oid"]]
            return self.answer({"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        asked = json.loads(lines[0])
        if self.path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.files.setdefault(name, {})
            return self.answer({"url": f"{self.url}/{name}"})
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": modes[".safetensors" in file["path"]], "shouldIgnore": False}
                for file in asked["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [
                file | {"actions": {"upload": {"href": f"{self.url}/put/{file['oid']}"}}} for file in asked["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
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

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """`hub(code)` runs Python with the stand-in as its hub, of which `hub.files` are the models."""
    files, answered = {}, []
    handler = type("Handler", (Hub,), {"files": files, "uploads": {}, "answered": answered})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(SCRIPTS.parent),
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_TOKEN": "none",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
                "no_proxy": "127.0.0.1",
            }
            | environment,
        )

    run.files, run.answered = files, answered
    yield run
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path, randomise) -> Path:
    """An exported model."""
    config = Config(model=ModelConfig(num_layers=2, num_heads=2, d_model=8, d_ff=16, context_length=8))
    transformer = randomise(CharTransformer(config.model, 256))
    trained = TrainedModel(
        config=config,
        transformer=transformer.eval(),
        heads=randomise(build_heads(config, 256, [(1, 1), (2, 1)], transformer)).eval(),
        vocabulary=ByteVocabulary(),
        checkpoint="step-00000007",
        step=7,
        corpus={"name": "enwik8", "sha256": "abc", "splits": {}},
        device=torch.device("cpu"),
    )
    return save_model(replace(trained, scores=({"bits_per_character": 1.5, "split": "test"},)), tmp_path / "exported")


PUSH = """
import charlm
trained = charlm.load("exported", device="cpu")
print(charlm.push_to_hub(trained, "owner/model", private=True))
"""
LOAD = """
import charlm, torch
here, there = charlm.load("exported", device="cpu"), charlm.load("owner/model@main", device="cpu")
for part in ("transformer", "heads"):
    one, other = getattr(here, part).state_dict(), getattr(there, part).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
assert (here.config, here.vocabulary, here.scores) == (there.config, there.vocabulary, there.scores)
print(charlm.generate(there, "some ", length=5))
"""


@pytest.mark.slow
def test_round_trip(hub, folder):
    """Guards against a model that is not the one that was pushed, a card that says something else, files that are
    fetched beside those that are needed, and a network that is needed once the model is there."""
    pushed = hub(PUSH)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith(f"owner/model/commit/{COMMIT}")
    files = hub.files["owner/model"]
    assert set(files) == {"config.json", "model.safetensors", "vocabulary.json", "README.md"}
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        assert files[name] == (folder / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert files["README.md"].decode() == card.replace("# exported", "# owner/model").replace(
        'load("exported")', 'load("owner/model")'
    )
    files["hurt.py"] = files["pytorch_model.bin"] = b"raise SystemExit('it was run')"
    hub.answered.clear()
    loaded = hub(LOAD)
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert {path.rpartition("/")[2] for path in hub.answered if "/resolve/" in path} == {
        "config.json",
        "model.safetensors",
        "vocabulary.json",
    }
    hub.answered.clear()
    again = hub(LOAD, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, loaded.stdout), again.stderr
    assert hub.answered == []


@pytest.mark.slow
def test_what_cannot_be_had(hub, tmp_path):
    """Guards against tracebacks, a mistyped path that is asked for on the hub, and another's model taken for one."""
    hub.files["owner/other"] = {"pytorch_model.bin": b"x"}
    (tmp_path / "runs").mkdir()
    names = {
        "owner/nothing": "is no folder, and no model of the hub",
        "owner/other": "was not exported by charlm: it has no config.json",
        "runs/mistyped": "is not a run",
        "mistyped": "is not a run",
        "../owner/other": "is not a run",
    }
    done = hub(
        "import charlm\n"
        f"for name in {list(names)}:\n"
        "    try:\n"
        "        charlm.load(name)\n"
        "    except charlm.UserError as error:\n"
        "        print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    for (name, message), line in zip(names.items(), done.stdout.splitlines(), strict=True):
        assert name in line and message in line
    assert not any("mistyped" in path for path in hub.answered)
    offline = hub("import charlm; charlm.load('owner/nothing')", HF_HUB_OFFLINE="1")
    assert "UserError: owner/nothing is no folder, and cannot be fetched from the hub" in offline.stderr
