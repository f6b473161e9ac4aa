"""The server of the lens: its answers, what it refuses, and its end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from charlm.config import AuxConfig, Config, DataConfig, LayersConfig, RunConfig, TargetsConfig, TrainConfig
from charlm.data.corpus import load_corpus
from charlm.lens import runs as runs_of_lens
from charlm.lens.answers import ANSWERS
from charlm.lens.lens import Lens
from charlm.lens.runs import Runs
from charlm.lens.server import create_app
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.exported import save_model
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import take_snapshot
from launched import ON_CPU
from tiny import SCRIPTS, refused, run_script, small_model

TOKEN, PORT = "a-token", 4321
TEXT = "12é 13é\n\udcff 14"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ facts }} \x1b[31m \u202e \0"


def make_run(folder: Path, text: Path, **model) -> Path:
    """A run of random models with three checkpoints, the second the best, whose layer 1 fell silent at step 20."""
    layers, targets = LayersConfig(schedule="staggered"), TargetsConfig(num_targets=2, layers="all")
    config = Config(
        data=DataConfig(corpus="file", path=text, cache_dir=text.parent / "cache"),
        model=small_model(context_length=16, ngrams=(2, 3), ngram_buckets=50, ngram_width=4, **model),
        aux=AuxConfig(layers=layers, targets=targets),
        train=TrainConfig(steps=40),
        run=RunConfig(dir=folder),
    )
    run = Run.create(config, load_corpus(config.data, show_progress=False).model_dump())
    torch.manual_seed(0)
    objective = build_objective(config, 256)
    for step in (0, 20, 40):
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.normal_(std=0.3)
        run.append_metrics({"step": step, "progress": step / 40})
        save_checkpoint(run, take_snapshot(objective, [], {"step": step}), best=step == 20, keep=9)
    return run.path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_bytes("".join(f"{number}é <b>&amp;\t</script>\n" for number in range(1500)).encode())
    return [make_run(folder / "first", text), make_run(folder / "second", text, num_layers=3)]


@pytest.fixture(scope="module")
def runs(folders) -> Runs:
    return Runs(folders, "cpu")


@pytest.fixture
def client(runs) -> TestClient:
    headers = {"X-Token": TOKEN, "Origin": f"http://127.0.0.1:{PORT}"}
    app = create_app(runs, TOKEN, PORT)
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", headers=headers, raise_server_exceptions=False)


def facts_in(page: str, name: str = "facts") -> dict:
    (data,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    return json.loads(data)


def test_the_page_says_what_the_runs_are(client, folders):
    """Guards against facts of another run, and a head whose silence is not told."""
    answer = client.get("/", params={"token": TOKEN})
    facts = facts_in(answer.text)
    first, second = facts["runs"]
    assert (first["name"], second["name"]) == ("first", "second") and facts["live"]
    assert first["heads"] == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert (first["context_length"], first["num_heads"], first["d_ff"], first["ngrams"]) == (16, 2, 16, [2, 3])
    assert first["checkpoint"] == "20" and [own["step"] for own in first["checkpoints"]] == [0, 20, 40]
    assert first["silent"] == {"1/1": 10, "1/2": 10} and second["silent"] == {"1/1": 7, "1/2": 7, "2/1": 14, "2/2": 14}
    assert facts["differs"] == [["model.num_layers", "2", "3"]]
    assert first["vocabulary"]["names"][10] == "↵" and first["vocabulary"]["texts"][0xC3] is None
    assert first["can_draft"] and first["corpus"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_answers_are_the_librarys(client, folders):
    """Guards against an answer about another text, checkpoint, layer or place than was asked for."""
    trained = load(folders[1], 40)
    lens = Lens(trained)
    reading, ids = lens.read(TEXT), lens.ids(TEXT).tolist()
    asked = {"run": 1, "checkpoint": "40", "text": TEXT}

    def ask(name: str, **more) -> dict:
        answer = client.post(name, content=json.dumps(asked | more))
        assert answer.status_code == 200, answer.text
        return answer.json()

    found = ask("/read", offset=2, since=0)
    assert found["symbols"] == ids and "".join(found["pieces"]) == TEXT and found["of"] == len(ids)
    assert np.array(found["bits"]) == pytest.approx(reading.bits, abs=1e-5)
    for layer, cells in reading.grid(2).items():
        cell = found["grid"][str(layer)]
        assert cell["symbol"] == [None, None, *cells.symbol[2:].tolist()]
        assert cell["probability"][2:] == pytest.approx(cells.probability[2:], abs=1e-5)
    assert found["decided"] == [None, None, *reading.decided(2)[2:].tolist()]
    assert found["next"]["symbol"] == int(reading.next_logits.argmax())
    assert found["total"]["bits_per_character"] == pytest.approx(reading.bits.sum() / (len(TEXT)))
    assert found["total"] | reading.sizes() == found["total"]
    later = ask("/read", since=3)  # in the middle of a character
    assert later["since"] == 2 and later["pieces"][:2] == ["é", ""] and later["symbols"] == ids[2:]
    spread = ask("/distribution", layer=2, offset=2, place=5)
    expected = lens.distribution(TEXT, 5, 2, 2)
    assert spread["symbols"] == np.argsort(-expected, kind="stable").tolist()
    assert spread["probabilities"] == pytest.approx(np.sort(expected)[::-1], abs=1e-5)
    followed = ask("/follow", symbol=ids[5], since=4)
    assert followed["since"] == 4 and list(followed["layers"]) == ["1", "2", "3"]
    assert followed["layers"]["2"] == pytest.approx(lens.follow(TEXT, ids[5], 1, 4)[2], abs=1e-5)
    assert ask("/attention", layer=2, head=1, place=6)["weights"] == pytest.approx(
        lens.attention(TEXT, 2, 1, 6), abs=1e-5
    )
    assert ask("/unit", layer=1, unit=3)["values"] == pytest.approx(lens.unit(TEXT, 1, 3), abs=1e-5)
    lengths = ask("/ngrams", place=6)["lengths"]
    assert [own["length"] for own in lengths] == [2, 3]
    assert lengths[1] == pytest.approx(lens.knockouts(TEXT, 6)[1]._asdict(), abs=1e-5)
    assert ask("/read", text="")["next"] is None
    learnt = ask("/adapted")
    assert (
        np.array(learnt["bits"]) == pytest.approx(lens.adapted(TEXT), abs=1e-5) and learnt["pieces"] == found["pieces"]
    )


def test_a_long_text_comes_in_parts(client):
    """Guards against a part that begins where the last did not end, or that shows half a character."""
    text, symbols, pieces, since = "é and é, é " * 5, [], [], 0
    for _ in range(50):
        found = client.post("/read", json={"text": text, "since": since, "most": 7}).json()
        assert len(found["symbols"]) <= 8  # with what is left of a character
        symbols[found["since"] :], pieces[found["since"] :] = found["symbols"], found["pieces"]
        since = len(symbols)
        if since == found["of"]:
            break
    assert bytes(symbols).decode() == "".join(pieces) == text


def test_a_stretch_of_the_corpus(client, runs):
    """Guards against characters cut in two, and a stretch that begins elsewhere than it says."""
    data = runs.corpora[0].splits["valid"].ids.tobytes()
    for start, length in ((0, 10), (1, 7), (2, 1), (3, 4), (len(data) - 5, 50), (len(data), 5)):
        found = client.post("/corpus", json={"start": start, "length": length}).json()
        text = found["text"].encode()
        assert data[found["start"] : found["start"] + len(text)] == text and found["of"] == len(data)
        assert len(text) <= length and (text.decode() or length < 3 or start == len(data))


def test_two_runs_are_compared_by_character(client, folders):
    """Guards against a difference with the wrong sign, or by symbols in place of characters."""
    found = client.post("/compare", content=json.dumps({"text": TEXT, "checkpoints": ["0", None]})).json()
    one, other = (
        Lens(load(folder, step)).read(TEXT).bits_by_character() for folder, step in zip(folders, (0, 20), strict=True)
    )
    assert found["difference"] == pytest.approx(other - one, abs=1e-5)
    assert found["bits"][0] == pytest.approx(one, abs=1e-5)
    assert found["pieces"] == list(TEXT)


def test_generation_is_streamed(client, folders):
    """Guards against symbols without their distributions, and a stream that does not say how it ended."""
    asked = {"text": "12", "length": 9, "seed": 3, "top_k": 4, "drafts": True, "temperature": 0.7}
    answer = client.post("/generate", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    drawn = list(Lens(load(folders[0])).generate("12", **{name: own for name, own in asked.items() if name != "text"}))
    assert [event["symbol"] for event in events] == [own.symbol for own in drawn]
    assert [event["draft"] for event in events] == [own.draft for own in drawn]
    assert last["done"] and last["symbols"] == 9 and last["passes"] == drawn[-1].passes
    written = "".join(event["piece"] for event in [*events, last])
    assert written.encode("utf-8", "surrogateescape") == bytes(event["symbol"] for event in events)
    assert all(len(event["before"]) == 8 and event["after"][4][1] == 0 for event in events)


def test_two_models_are_held_at_most(folders, monkeypatch):
    """Guards against memory that grows with every checkpoint that the slider passes."""
    loaded = []
    monkeypatch.setattr(runs_of_lens, "load", lambda *asked: loaded.append(asked[:2]) or load(*asked))
    runs = Runs(folders, "cpu")
    first = runs.lens(0)
    for checkpoint in ("0", "40", "20", "0", None):
        assert runs.lens(1, checkpoint).trained.step == int(checkpoint or 20)
        assert len(runs.held) <= 2
    assert runs.lens(0) is not first and len(loaded) == 2 + 4 + 2 - 1
    with refused("checkpoint"):
        runs.lens(0, "7")
    with refused("run"):
        runs.lens(2)


def test_an_exported_model_beside_a_run(folders, tmp_path):
    """Guards against an exported model that is not found again after the other run's checkpoints were looked at, and
    facts that only a run has."""
    save_model(load(folders[0]), tmp_path / "exported")
    runs = Runs([tmp_path / "exported", folders[1]], "cpu")
    facts = runs.facts(live=True)["runs"][0]
    assert facts["checkpoints"] == [{"name": "20", "step": 20}] and facts["silent"] == {}
    for checkpoint in ("0", "40"):
        runs.lens(1, checkpoint)
    assert runs.lens(0).trained.step == 20 == runs.lens(0, "20").trained.step
    with refused("checkpoint"):
        runs.lens(0, "40")


OVER = "x" * (2**20 + 1)
ASKED = {"text": "12"}
HOSTS = {"Host": "evil.example", "Origin": "http://evil.example"}
REFUSED = {
    "a page elsewhere": ("/read", {"headers": {"Origin": "http://evil.example"}}, 403),
    "another port's page": ("/read", {"headers": {"Origin": "http://127.0.0.1:80"}}, 403),
    "a page from a file": ("/read", {"headers": {"Origin": "null"}}, 403),
    "a name that leads here": ("/read", {"headers": HOSTS}, 403),
    "another port's name": ("/read", {"headers": {"Host": "127.0.0.1:80"}}, 403),
    "no token": ("/read", {"headers": {"X-Token": ""}}, 403),
    "a wrong token": ("/read", {"headers": {"X-Token": TOKEN + "x"}}, 403),
    "a token that is no ASCII": ("/read", {"headers": {"X-Token": "é".encode()}}, 403),
    "a token in the address alone": (f"/read?token={TOKEN}", {"headers": {"X-Token": ""}}, 403),
    "a huge body": ("/read", {"content": OVER}, 413),
    "no JSON": ("/read", {"content": b"{"}, 400),
    "deep JSON": ("/read", {"content": b"[" * 100_000}, 400),
    "no object": ("/read", {"content": b"[]"}, 400),
    "no UTF-8": ("/read", {"content": b'{"text": "\xff"}'}, 400),
    "a text too long": ("/read", {"json": {"text": "a" * 100_001}}, 400),
    "half a character": ("/read", {"content": b'{"text": "\\ud800"}'}, 400),
    "an unknown field": ("/read", {"json": ASKED | {HOSTILE: 1}}, 400),
    "a path": ("/../../etc/passwd", {"json": ASKED}, 404),
    "a path in code": ("/%2e%2e%2fetc%2fpasswd", {"json": ASKED}, 404),
    "a path to a private name": ("/__init__", {"json": ASKED}, 404),
    "a checkpoint that is a path": ("/read", {"json": ASKED | {"checkpoint": "../../other"}}, 400),
    "a checkpoint that is markup": ("/read", {"json": ASKED | {"checkpoint": HOSTILE}}, 400),
    "a run that is not there": ("/read", {"json": ASKED | {"run": 2}}, 400),
    "a negative run": ("/read", {"json": ASKED | {"run": -1}}, 400),
    "a huge place": ("/attention", {"json": ASKED | {"place": 10**30}}, 400),
    "a long generation": ("/generate", {"json": ASKED | {"length": 10_000}}, 400),
    "an endless temperature": ("/generate", {"content": b'{"text": "12", "temperature": Infinity}'}, 400),
    "nothing to go on from": ("/generate", {"json": {"text": ""}}, 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_requests_are_refused(client, name):
    """Guards against a page elsewhere that reads the model or the text, and against a request that takes the memory,
    the time or the files of this machine."""
    path, how, status = REFUSED[name]
    answer = client.post(path, **({"json": ASKED} if how.keys() <= {"headers"} else {}) | how)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json" and list(answer.json()) == ["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", f"/?token={TOKEN}x", "/?token=", f"/read?token={TOKEN}", "/?token=%ff"])
def test_the_page_needs_its_token(client, path):
    """Guards against a page, or an answer to a plain link, for whoever guesses the port."""
    answer = client.get(path, headers={"X-Token": TOKEN})
    assert answer.status_code == (405 if "/read" in path else 403) and list(answer.json()) == ["error"]


def test_markup_stays_text(folders, tmp_path, client):
    """Guards against a text, a run's name or a symbol that becomes markup of the page."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.symlink_to(folders[0])
    answer = client.post("/read", json={"text": HOSTILE})
    assert answer.headers["content-type"] == "application/json" and "".join(answer.json()["pieces"]) == HOSTILE
    (tmp_path / "text.txt").write_text(HOSTILE)
    page = tmp_path / "page.html"
    assert run_script("lens", str(folder), "--to", str(page), "--text", str(tmp_path / "text.txt")) == 0
    shown = page.read_text()
    assert "alert(" not in re.sub(r'<script type="application/json".*?</script>', "", shown, flags=re.S)
    assert "".join(facts_in(shown, "reading")["pieces"]) == HOSTILE


def test_what_a_page_gives_up_is_cancelled_and_nothing_else(runs, monkeypatch):
    """Guards against a queue of keystrokes, and against a page that cancels what another one reads."""
    begun = threading.Event()

    def work(lens: Lens, asked: Any, runs: Runs) -> dict[str, Any]:
        begun.set()
        for _ in range(1000 if asked.text == "given up" else 1):
            runs.watch()
            time.sleep(0.01)
        return {"text": asked.text}

    monkeypatch.setitem(ANSWERS, "read", work)
    app = create_app(runs, TOKEN, PORT)

    async def ask(text: str, gone: asyncio.Event) -> int:
        body = [{"type": "http.request", "body": json.dumps({"text": text}).encode()}]
        sent = []

        async def receive() -> dict[str, Any]:
            return body.pop() if body else await gone.wait() and {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", f"127.0.0.1:{PORT}".encode()), (b"x-token", TOKEN.encode())]
        scope = {"type": "http", "method": "POST", "path": "/read", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        return sent[0]["status"]

    async def ask_all() -> list[int]:
        given_up, kept = asyncio.Event(), asyncio.Event()
        asked = [ask("given up", given_up), ask("given up", given_up), ask("12", kept)]  # the second waits in vain
        answers = asyncio.gather(*asked)
        await asyncio.to_thread(begun.wait)
        given_up.set()
        return await answers

    assert asyncio.run(ask_all()) == [400, 400, 200]


def test_a_page_of_one_text(folders, tmp_path, script):
    """Guards against a page that lacks an offset, and options that are silently ignored."""
    (tmp_path / "text.txt").write_bytes("12é 13é".encode())
    page = tmp_path / "page.html"
    assert script("lens", folders[0], "--to", page, "--text", tmp_path / "text.txt")[0] == 0
    found, lens = facts_in(page.read_text(), "reading"), Lens(load(folders[0]))
    assert facts_in(page.read_text())["live"] is False
    reading = lens.read("12é 13é")
    assert found["bits"] == pytest.approx(reading.bits, abs=1e-5)
    assert found["others"]["2"]["grid"]["1"]["symbol"][2:] == reading.grid(2)[1].symbol[2:].tolist()
    for place in (1, 8):
        best = np.argsort(-lens.distribution("12é 13é", place), kind="stable")[:5]
        assert found["likeliest"]["symbols"][place] == best.tolist()
    for flags, option in ((["--to", page], "to"), (["--text", page], "text")):
        code, _, error = script("lens", folders[0], *flags)
        assert code == 2 and f"{option}=" in error
    assert script("lens", *folders, "--to", page, "--text", page)[0] == 2
    (tmp_path / "long.txt").write_text("a" * 100_001)
    code, _, error = script("lens", folders[0], "--to", tmp_path / "long.html", "--text", tmp_path / "long.txt")
    assert code == 2 and "text=" in error and not (tmp_path / "long.html").exists()
    for text in ("", "a"):
        (tmp_path / "short.txt").write_text(text)
        assert script("lens", folders[0], "--to", page, "--text", tmp_path / "short.txt")[0] == 0
        assert facts_in(page.read_text(), "reading")["pieces"] == list(text)
    assert script("lens", folders[0], "--to", page, "--text", tmp_path / "none.txt")[0] == 2


@pytest.fixture
def served(folders) -> Iterator[tuple[subprocess.Popen, str]]:
    """The script with its address, as a user starts it."""
    command = [sys.executable, str(SCRIPTS / "lens.py"), str(folders[0]), "--no-open"]
    environ = os.environ | ON_CPU | {"SSH_CONNECTION": "a b"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.communicate()


def endless(base: str, token: str) -> bytes:
    """What a server says to a request whose body does not end."""
    host, port = base.removeprefix("http://").split(":")
    head = f"POST /read HTTP/1.1\r\nHost: {host}:{port}\r\nX-Token: {token}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        with suppress(OSError):  # it hangs up
            connection.sendall(head.encode())
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
            raise AssertionError("it reads on")
        return connection.recv(2**16)


@pytest.mark.slow
def test_the_script_serves_a_page_until_ctrl_c(served, folders):
    """Guards against an address that does not answer, an open port after the end, a traceback, a thread that keeps the
    process alive, and files that are left."""
    process, address = served
    before = {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")}
    base, token = address.split("/?token=")
    assert httpx2.get(address).status_code == 200 and httpx2.get(base).status_code == 403
    assert endless(base, token).startswith(b"HTTP/1.1 413 ")
    how = {"headers": {"X-Token": token}, "timeout": 60}
    assert len(httpx2.post(f"{base}/read", json={"text": "12é " * 20_000}, **how).json()["symbols"]) == 4096
    with httpx2.stream("POST", f"{base}/generate", json={"text": "12", "length": 2000}, **how) as stream:
        next(stream.iter_lines())
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")
    assert {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")} == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((re.search(r"//(.*):", base)[1], int(base.rpartition(":")[2])))


@pytest.mark.slow
def test_a_stream_ends_with_its_connection(served):
    """Guards against text that is written for a page that is closed."""
    process, address = served
    base, token = address.split("/?token=")
    asked = {"json": {"text": "12", "length": 2000}, "headers": {"X-Token": token}, "timeout": 60}
    with httpx2.stream("POST", f"{base}/generate", **asked) as stream:
        next(stream.iter_lines())
    for _ in range(100):
        used = sum(os.times()[:2]), Path(f"/proc/{process.pid}/stat").read_text().split()[13]
        time.sleep(0.5)
        if used[1] == Path(f"/proc/{process.pid}/stat").read_text().split()[13]:
            return
    raise AssertionError("it goes on")
