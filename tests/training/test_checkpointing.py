"""Checkpoints written in the background: in order, never two at once, and with a message if the disk is full."""

import errno
import os
import threading

import pytest

from charlm.config import UserError
from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run
from charlm.training import loop
from charlm.training.loop import CheckpointWriter
from storage import make_run, number_of, snapshot_of, steps
from tiny import TINY, train


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


def failing_at(*failing: int):
    """save_checkpoint on a disk that is full at some steps."""
    real = loop.save_checkpoint

    def save_checkpoint(run, snapshot, **options):
        if snapshot.state["step"] in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(run, snapshot, **options)

    return save_checkpoint


def test_the_loop_waits_for_the_previous_write_only(run, monkeypatch):
    """Guards against a write that blocks the loop, two writes at once, and writes in another order."""
    events, may_end = [], threading.Event()

    def slow(run, snapshot, *, best, keep) -> None:
        events.append(("begins", snapshot.state["step"], best, keep))
        assert may_end.wait(30)
        events.append(("ends", snapshot.state["step"]))

    monkeypatch.setattr(loop, "save_checkpoint", slow)
    writer = CheckpointWriter(run, keep=3, say=events.append)
    writer.save(snapshot_of(1), best=True)
    assert ("ends", 1) not in events
    threading.Timer(0.2, may_end.set).start()
    writer.save(snapshot_of(2), best=False)
    assert events[:2] == [("begins", 1, True, 3), ("ends", 1)]
    writer.wait()
    assert events[2:] == [("begins", 2, False, 3), ("ends", 2)]
    writer.close()


def test_all_checkpoints_are_on_disk_after_close(run):
    """Guards against a writer that ends before its thread does."""
    writer = CheckpointWriter(run, keep=2, say=print)
    for step in (1, 2, 3):
        writer.save(snapshot_of(step), best=step == 1)
    writer.close()
    assert steps(run) == [1, 2, 3]
    assert (number_of(find_checkpoint(run, "last")), number_of(find_checkpoint(run, "best"))) == (3.0, 1.0)


def test_a_mistake_in_the_thread_is_not_lost(run, monkeypatch):
    """Guards against a bug that is reported as a full disk."""

    def broken(*_, **__) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "save_checkpoint", broken)
    writer = CheckpointWriter(run, keep=5, say=print)
    writer.save(snapshot_of(1), best=True)
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_a_damaged_record_does_not_end_the_run(run):
    """Guards against a run of days that a damaged provenance.json ends."""
    run.provenance_path.write_text("{")
    said = []
    writer = CheckpointWriter(run, keep=5, say=said.append)
    writer.save(snapshot_of(1), best=True)
    writer.wait()
    assert "step 1: checkpoint not written" in said[0] and "provenance.json" in said[0]


@pytest.mark.parametrize("also_at_the_end", [False, True])
def test_a_run_goes_on_while_its_disk_is_full(also_at_the_end, tmp_path, text_corpus_flags, monkeypatch, capfd):
    """Guards against a run of days that a full disk ends, and an end that is silently lost."""
    flags = [*TINY, *text_corpus_flags, "--train.steps=20", "--train.valid_every=5", f"--run.dir={tmp_path / 'run'}"]
    full = (10, 20) if also_at_the_end else (10, 15)
    monkeypatch.setattr(loop, "save_checkpoint", failing_at(*full))
    if also_at_the_end:
        with pytest.raises(UserError, match=r"is missing: step 20: .*No space left .*--run.resume=true"):
            train(*flags)
    else:
        train(*flags)
    assert steps(Run(tmp_path / "run")) == ([5, 15] if also_at_the_end else [5, 20])
    said = capfd.readouterr().err
    assert "step 10: checkpoint not written (No space left on device); the run continues" in said
    monkeypatch.undo()
    if also_at_the_end:
        train(*flags, "--run.resume=true")
        assert steps(Run(tmp_path / "run"))[-1] == 20
