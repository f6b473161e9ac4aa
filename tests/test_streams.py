"""Standard streams that nobody reads, that are full or that cannot encode: scripts do the same without them."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from charlm.process import lasting
from nano import write_nano
from tiny import SCRIPTS, TINY, run_script

STATES = list(product((0, 1, 2), ("closed", "full", "cut")))
"""A standard stream, and what is wrong with it."""
WORK = """
import os, sys
from charlm import cli
def main():
    with open("kept", "w") as file:
        file.write("one ")
        print("ä" * 100_000)
        print("é", file=sys.stderr)
        os.system("echo out; echo err >&2")
        file.write("two")
    raise cli.%s("the end")
cli.script(main)
"""
TEXT = ["--data.corpus=file", "--data.path={text}", "--data.cache_dir=cache"]
SCRIPT_LINES = {
    "ablate": [*TINY, *TEXT, "--run.dir=rows", "--seeds=1", "--row=a: --train.steps=1"],
    "benchmark": ["drafts", "--run={plain}", "--rounds=1", "--threads=1", "--json", "--picture=drafts.png"],
    "compress": ["{run}", "{text}", "-o", "small.clm", "--picture=sizes.png", "--streams=64"],
    "decompress": ["{run}", "{packed}", "-o", "text.txt"],
    "env": ["--json"],
    "evaluate": ["{run}", "--limit=200", "--early-exit", "--picture=exits.png", "--json"],
    "explain": ["--picture=weights.png"],
    "export": ["{run}", "--to=exported", "--depth=auto"],
    "generate": ["{run}", "--prompt=1", "--length=20"],
    "import": ["{nano}", "--to=imported"],
    "lens": ["{run}", "--to=page.html", "--text={text}"],
    "prepare": TEXT,
    "report": ["{run}", "-o", "page.html"],
    "train": [*TINY, *TEXT, "--run.report=true", "--run.dir=run"],
}


def run_with(stream: int | None, state: str, command: list, folder: Path) -> int:
    """The exit code of `command`, run in `folder` with one standard stream out of order."""
    folder.mkdir()
    streams = [subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL]
    kept, cut = os.pipe()
    os.close(kept if stream else cut)
    with open("/dev/full", "r+b", buffering=0) as full, open(cut if stream else kept, "wb" if stream else "rb") as end:
        if state == "closed":
            command = ["sh", "-c", f'exec "$@" {stream}>&-', "sh", *command]
        elif stream is not None:
            streams[stream] = full if state == "full" else end
        stdin, stdout, stderr = streams
        return subprocess.run(
            [*map(str, command)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            timeout=300,
        ).returncode


@pytest.mark.parametrize(("stream", "state"), STATES)
@pytest.mark.parametrize(("ending", "code"), [("Stopped", 0), ("UserError", 2)])
def test_work_is_done_where_nobody_reads(stream, state, ending, code, tmp_path):
    """Guards against work that a dead terminal, a full disk or a reader that leaves cuts off, and against a file that
    gets the number of a closed stream, so that words for the terminal land in it."""
    assert run_with(stream, state, [sys.executable, "-c", WORK % ending], tmp_path / "work") == code
    assert (tmp_path / "work" / "kept").read_text() == "one two"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_does_the_same(script, run_on_disk, text_corpus_flags, tmp_path):
    """Guards against a script that ends otherwise, or leaves other files, than at a healthy terminal."""
    text, packed = tmp_path / "text.txt", tmp_path / "packed.clm"
    if script == "decompress":
        words = [SCRIPTS / "compress.py", run_on_disk, text, "-o", packed, "--no-verify", "--streams=64"]
        assert run_with(None, "healthy", [sys.executable, *words], tmp_path / "packing") == 0
    plain = tmp_path / "plain"  # without heads to draft with, there is a single contestant
    if script == "benchmark":
        words = [*TINY, *text_corpus_flags, "--aux.layers.enabled=false", "--aux.targets.enabled=false"]
        assert run_script("train", *words, f"--run.dir={plain}") == 0
    write_nano(tmp_path / "nano")
    places = {"nano": tmp_path / "nano", "run": run_on_disk, "text": text, "packed": packed, "plain": plain}
    words = [word.format(**places) for word in SCRIPT_LINES[script]]
    ends = {}
    for stream, state in [(None, "healthy"), *STATES]:
        folder = tmp_path / f"{stream}-{state}"
        code = run_with(stream, state, [sys.executable, SCRIPTS / f"{script}.py", *words], folder)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        exact = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
        ends[stream, state] = code, names, exact
    healthy = ends.pop((None, "healthy"))
    assert healthy[0] == 0
    assert bool(healthy[1]) == (script not in ("env", "generate"))
    assert [where for where, end in ends.items() if end != healthy] == []


def test_what_cannot_be_encoded_is_spelt_out(tmp_path):
    """Guards against a traceback after the work is done, because of a name or a character that the output lacks."""
    code = "from charlm import cli\ncli.script(lambda: print('l\\xe4 \\udce4 \\N{SNOWMAN}'))"
    command = [sys.executable, "-c", code]
    for encoding, shown in (("ascii", rb"l\xe4 \udce4 \u2603"), ("utf-8", "lä \\udce4 ☃".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(SCRIPTS.parent)}
        assert subprocess.run(command, env=environment, capture_output=True).stdout == shown + b"\n"


def test_a_run_whose_name_is_not_utf8(run_on_disk, tmp_path, monkeypatch, capfd):
    """Guards against a traceback from the picture of a finished run, and checkpoints that cannot be read."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4d")
    text = ["--data.corpus=file", f"--data.path={tmp_path / 'text.txt'}", f"--data.cache_dir={bad} cache"]
    assert run_script("train", *TINY, "--run.report=true", *text, f"--run.dir={bad}") == 0
    assert (Path(bad) / "run.png").exists() and "b\\xE4d" in (Path(bad) / "report.html").read_text()
    for script, *words in (("evaluate", "--limit=100"), ("export", f"--to={bad} model"), ("report", f"-o={bad}.html")):
        assert run_script(script, bad, *words) == 0, capfd.readouterr().err


def test_a_pipe_that_does_not_block_gets_everything():
    """Guards against output that is lost, or ends the process, when the reader is slower than the writer."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    reader = subprocess.Popen(["wc", "-c"], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    with open(write, "w") as plain:
        print("x" * 1_000_000, file=lasting(plain), flush=True)
    assert int(reader.communicate()[0]) == 1_000_001
