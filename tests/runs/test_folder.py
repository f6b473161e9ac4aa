"""The folder of a run: made whole, or not at all and with one message."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from charlm.config import Config, RunConfig, UserError
from charlm.files import MAX_JSON_BYTES, write_whole
from charlm.runs import folder
from charlm.runs.folder import MAX_ROW_BYTES, Run
from charlm.training.loop import CheckpointWriter
from storage import CORPUS, content, files_of_at_most, left_of, snapshot_of


def run_in(folder) -> Run:
    return Run.create(Config(run=RunConfig(dir=folder)), CORPUS)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Guards against a traceback where a file is in the way, or the disk takes no new folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path}/file/run: cannot be made \(Not a directory\); fix that"):
        run_in(tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_left_alone(there, tmp_path):
    """Guards against a run written over what is no run, and an empty folder being refused."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path / there}: exists and is not empty; choose another"):
        run_in(tmp_path / there)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert Run.open(run_in(tmp_path / "empty").path).config() == Config(run=RunConfig(dir=tmp_path / "empty"))


def test_a_machine_without_git(tmp_path, monkeypatch):
    """Guards against a traceback, and half a folder, where git is not installed, as in a container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = run_in(tmp_path / "run")
    assert (run.provenance()["git_commit"], run.provenance()["corpus"]) == (None, CORPUS)


NO_JSON = ("", "{", "\x00", "[" * 100_000, "9" * 10_000, " " * (MAX_JSON_BYTES + 1))
NO_RECORD = ("[]", "null", "{}", '{"corpus": 3}', '{"corpus": {"name": "x"}}', '{"corpus": {"name": "x", "sha256": 1}}')


@pytest.mark.parametrize("content", NO_JSON + NO_RECORD, ids=range(12))
def test_a_damaged_record_is_named(content, tmp_path):
    """Guards against a traceback from a JSON parser, and a KeyError from JSON that is no run's."""
    run = run_in(tmp_path / "run")
    assert json.loads(run.provenance_path.read_text())["corpus"] == run.provenance()["corpus"] == CORPUS
    run.provenance_path.write_text(content)
    with pytest.raises(UserError, match=r"provenance\.json"):
        run.provenance()


@pytest.mark.parametrize(
    "made",
    [
        [],
        ["checkpoints"],
        ["checkpoints", "provenance.json", left_of(Path("config.yaml")), ".lock"],
        ["checkpoints", "provenance.json", "config.yaml", left_of(Path("config.yaml")), ".lock", "trackers"],
    ],
)
def test_a_folder_in_which_nothing_was_trained_is_taken(made, tmp_path):
    """Guards against a command that can neither begin nor go on, since its first try died before its first step."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in made:
        (folder / name).mkdir() if name == "checkpoints" else (folder / name).write_text("half")
    assert run_in(folder).provenance()["corpus"] == CORPUS


@pytest.mark.parametrize(
    "made",
    [
        ["config.yaml"],
        ["provenance.json", "notes"],
        ["config.yaml", "provenance.json", "last"],
        ["metrics.jsonl"],
    ],
)
def test_a_folder_with_what_someone_may_need_is_not_taken(made, tmp_path):
    """Guards against options, notes, checkpoints and metrics that a new run would write over."""
    for name in made:
        (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match="exists and is not empty"):
        run_in(tmp_path)
    with pytest.raises(RuntimeError), Run(tmp_path).lock():
        raise RuntimeError
    assert content(tmp_path) == before | {".lock": b""}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Guards against a config.yaml cut short by a full disk, and against rubbish beside it."""
    path = tmp_path / "file"
    write_whole(path, "old é")
    with pytest.raises(OSError, match="File too large"), files_of_at_most(3):
        write_whole(path, "newer")
    assert path.read_bytes() == "old é".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_that_the_disk_does_not_take_leaves_the_others(tmp_path):
    """Guards against a row that goes on in the middle of the one that a full disk cut short."""
    run = run_in(tmp_path / "run")
    run.append_metrics({"step": 1})
    for room in range(12):
        with pytest.raises(OSError) as caught, files_of_at_most(run.metrics_path.stat().st_size + room):
            run.append_metrics({"step": 2})
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert run.metrics_path.read_text() == '{"step": 1}\n'
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 3]


SCORE = {"bits_per_character": 8.0, "bits_per_byte": 8.0}
NO_VALID, HUGE = b'{"step": 1, "valid": null}', b'{"step": 1' + b"0" * 400 + b"}"
DAMAGE = (b"\x00\xff", b"[1]", b"{}", b'{"step": "2"}', NO_VALID, HUGE, b"[" * 5000)


@pytest.mark.parametrize("damage", [*DAMAGE, b"1" * MAX_ROW_BYTES], ids=range(8))
def test_a_damaged_row_is_named_and_then_dropped(damage, tmp_path):
    """Guards against a traceback from a damaged row, or from a last one that a kill cut short, and a run that cannot go
    on because of one."""
    run = run_in(tmp_path / "run")
    rows = [f'{{"step": {step}}}\n'.encode() for step in (1, 2, 3)]
    run.metrics_path.write_bytes(rows[0] + damage + b"\n" + rows[1] + rows[2] + b'{"step": 4')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        list(run.metrics())
    assert run.forget_metrics_after(2)[0] == f"{run.metrics_path}, line 2 was damaged and has been dropped"
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_validation_that_the_checkpoint_does_not_know_is_dropped(tmp_path):
    """Guards against two rows of one validation: stopped before it, resumed, and killed after its row was written."""
    run = run_in(tmp_path / "run")
    rows = [{"step": 1}, {"step": 1, "valid": SCORE}, {"step": 2}, {"step": 2, "valid": SCORE}, {"step": 3}]
    for row in rows:
        run.append_metrics(row)
    run.forget_metrics_after(2, validated_step=1)
    assert list(run.metrics()) == rows[:3]
    run.append_metrics(rows[3])
    run.forget_metrics_after(1, validated_step=2)
    assert list(run.metrics()) == rows[:2]


def replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    run_in(folder)


LOSSES = {
    "removed": shutil.rmtree,
    "replaced": replaced,
    "moved": lambda folder: folder.rename(folder.with_name("moved")),
    "without its lock": lambda folder: (folder / ".lock").unlink(),
    "with another lock": lambda folder: write_whole(folder / ".lock", ""),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_lost_its_folder_writes_no_more(loss, tmp_path):
    """Guards against two runs in one folder: a lock that is removed with it keeps nobody out."""
    run = Run(tmp_path / "run")
    with run.lock():
        run_in(run.path)
        run.append_metrics({"step": 1})
        LOSSES[loss](run.path)
        before = content(tmp_path)
        with pytest.raises(UserError, match=r"run.dir=.*run: was removed, moved or replaced"):
            run.append_metrics({"step": 2})
        writer = CheckpointWriter(run, keep=1, say=print)
        writer.save(snapshot_of(2), best=True)
        with pytest.raises(UserError, match=r"run.dir=.*run: was removed, moved or replaced"):
            writer.close()
    assert content(tmp_path) == before


TRAIN = """
import sys
from charlm.runs.folder import Run
with Run(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_train_into_one_folder(tmp_path, monkeypatch):
    """Guards against two jobs of a queue that write each other's checkpoints away; and a killed one holds no lock."""
    monkeypatch.setattr(folder, "PATIENCE", 0)
    run = Run(tmp_path / "run")
    refusal = rf"run.dir={run.path}: another process is training into it; let it end"
    with run.lock(), pytest.raises(UserError, match=refusal), run.lock():
        pass
    command = [sys.executable, "-c", TRAIN, str(run.path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=refusal), run.lock():
            pass
    finally:
        other.kill()
        other.communicate()
    with run.lock():
        run_in(run.path)
    monkeypatch.undo()
    ending = FileLock(run.path / ".lock", thread_local=False)
    ending.acquire()
    threading.Timer(0.1, ending.release).start()
    with run.lock():  # once the process that ends has ended
        assert not ending.is_locked
    (tmp_path / "file").touch()
    blocked = Run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"), blocked.lock():
        pass
