"""The folder of a run: made whole, or not at all and with one message."""

import errno
import json
import subprocess
import sys

import pytest

from charlm.config import Config, RunConfig, UserError
from charlm.files import MAX_JSON_BYTES, write_whole
from charlm.runs.folder import MAX_ROW_BYTES, Run
from storage import CORPUS, files_of_at_most


def config_in(folder) -> Config:
    return Config(run=RunConfig(dir=folder))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Guards against a traceback where a file is in the way, or the disk takes no new folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path}/file/run: cannot be made \(Not a directory\); mend that"):
        Run.create(config_in(tmp_path / "file" / "run"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_left_alone(there, tmp_path):
    """Guards against a run written over what is no run, and an empty folder being refused."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"run.dir={tmp_path / there}: exists and is not empty; choose another"):
        Run.create(config_in(tmp_path / there), {})
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert Run.open(Run.create(config_in(tmp_path / "empty"), {}).path).config() == config_in(tmp_path / "empty")


def test_a_machine_without_git(tmp_path, monkeypatch):
    """Guards against a traceback, and half a folder, where git is not installed, as in a container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run.create(config_in(tmp_path / "run"), CORPUS)
    assert (run.provenance()["git_commit"], run.provenance()["corpus"]) == (None, CORPUS)


DAMAGED = [
    "",
    "{",
    "\x00",
    "[" * 100_000,
    "9" * 10_000,
    " " * (MAX_JSON_BYTES + 1),
    "[]",
    "null",
    "{}",
    '{"corpus": 3}',
]


@pytest.mark.parametrize("content", [*DAMAGED, '{"corpus": {"name": "x", "sha256": 1}}'], ids=range(11))
def test_a_damaged_record_is_named(content, tmp_path):
    """Guards against a traceback from a JSON parser, and a KeyError from JSON that is no run's."""
    run = Run.create(config_in(tmp_path / "run"), CORPUS)
    assert json.loads(run.provenance_path.read_text())["corpus"] == run.provenance()["corpus"] == CORPUS
    run.provenance_path.write_text(content)
    with pytest.raises(UserError, match=r"provenance\.json"):
        run.provenance()


@pytest.mark.parametrize("made", [[], ["checkpoints"], ["checkpoints", "provenance.json", ".config.yaml.tmp", ".lock"]])
def test_a_folder_that_a_kill_left_unfinished_is_taken(made, tmp_path):
    """Guards against a queue's job that can neither begin nor go on, since its first try died in its first moment."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in made:
        (folder / name).mkdir() if name == "checkpoints" else (folder / name).write_text("half")
    assert Run.create(config_in(folder), CORPUS).provenance()["corpus"] == CORPUS
    Run.open(folder).config_path.unlink()
    (folder / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(UserError, match="exists and is not empty"):
        Run.create(config_in(folder), {})


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
    run = Run.create(config_in(tmp_path / "run"), {})
    run.append_metrics({"step": 1})
    for room in range(12):
        with pytest.raises(OSError) as caught, files_of_at_most(run.metrics_path.stat().st_size + room):
            run.append_metrics({"step": 2})
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert run.metrics_path.read_text() == '{"step": 1}\n'
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 3]


@pytest.mark.parametrize(
    "damage", [b"\x00\xff\n", b"[1]\n", b"{}\n", b'{"step": "2"}\n', b"[" * 5000 + b"\n", b"1" * MAX_ROW_BYTES]
)
def test_a_damaged_row_is_named_and_then_dropped(damage, tmp_path):
    """Guards against a traceback from a damaged row, and a run that cannot go on because of one."""
    run = Run.create(config_in(tmp_path / "run"), {})
    rows = [f'{{"step": {step}}}\n'.encode() for step in (1, 2, 3)]
    run.metrics_path.write_bytes(rows[0] + damage + (b"" if damage.endswith(b"\n") else b"\n") + rows[1] + rows[2])
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        list(run.metrics())
    assert run.forget_metrics_after(2)[0] == f"{run.metrics_path}, line 2 was damaged and has been dropped"
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_validation_that_the_checkpoint_does_not_know_is_dropped(tmp_path):
    """Guards against two rows of one validation: stopped before it, resumed, and killed after its row was written."""
    run = Run.create(config_in(tmp_path / "run"), {})
    rows = [{"step": 1}, {"step": 1, "valid": 8}, {"step": 2}, {"step": 2, "valid": 7}, {"step": 3}]
    for row in rows:
        run.append_metrics(row)
    run.forget_metrics_after(2, validated_step=1)
    assert list(run.metrics()) == rows[:3]
    run.append_metrics(rows[3])
    run.forget_metrics_after(1, validated_step=2)
    assert list(run.metrics()) == rows[:2]


TRAIN = """
import sys
from charlm.runs.folder import Run
with Run(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    """Guards against two jobs of a queue that write each other's checkpoints away; and a killed one holds no lock."""
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
        Run.create(config_in(run.path), {})
    (tmp_path / "file").touch()
    blocked = Run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"), blocked.lock():
        pass
