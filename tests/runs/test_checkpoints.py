"""Checkpoints are whole or absent, verified when read, and pruned only when a newer one stands."""

import errno
import os

import pytest
import torch
from torch import nn

from charlm.config import UserError
from charlm.runs import checkpoints
from charlm.runs.checkpoints import find_checkpoint, newest_whole_checkpoint, rewind, save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import check_tensors, load_tensors, save_tensors, take_snapshot
from storage import make_run, manifest_for, names, number_of, save, steps


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


def model_and_optimizer(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, of which the second never had a gradient."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model[0](torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_what_was_saved_comes_back(run):
    """Guards against lost or renamed state; a parameter that never had a gradient has none."""
    model, optimizer = model_and_optimizer()
    saved = save_checkpoint(run, take_snapshot(model, [optimizer], {"step": 2}), best=True, keep=1)
    found = find_checkpoint(run, "best")
    assert found == saved
    other, fresh = model_and_optimizer(steps=0)
    found.restore(other, [fresh])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state, restored = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert state.keys() == restored.keys() == {0, 1}
    assert all(torch.equal(value, restored[index][key]) for index in state for key, value in state[index].items())


def test_the_newest_and_the_best_are_kept(run):
    """Guards against pruning the checkpoint that evaluation will ask for."""
    for step in range(1, 7):
        save(run, step, best=step == 2, keep=2)
    assert steps(run) == [2, 5, 6]
    assert find_checkpoint(run, "best").step == 2
    assert find_checkpoint(run, "last").step == 6
    assert find_checkpoint(run, 5).step == find_checkpoint(run, "5").step == 5


@pytest.mark.parametrize("discard", [False, True])
def test_rewinding_forgets_what_came_after(discard, run):
    """Guards against pointers to another future, and against pruning what a resumed run has just written."""
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        save(run, step, best=step == 3)
    rewind(run, find_checkpoint(run, 2), discard=discard)
    assert steps(run) == [1, 2]
    assert (".step-00000003.damaged" in names(run)) is not discard
    assert find_checkpoint(run, "last").step == find_checkpoint(run, "best").step == 2
    assert [row["step"] for row in run.metrics()] == [1, 2]


@pytest.mark.parametrize("pointer", [b"", b"step-00000009\n", b"../../elsewhere\n", b"\xff\x00", b"a" * 10_000, None])
def test_a_damaged_pointer_costs_nothing(pointer, run):
    """Guards against a run that cannot go on, forgets its best, or is left, because of a file of 14 bytes."""
    for step in (1, 2, 3):
        save(run, step, best=step == 2, best_step=min(step, 2))
    for name in ("last", "best"):
        path = run.checkpoints_path / name
        path.unlink() if pointer is None else path.write_bytes(pointer)
        with pytest.raises(UserError, match=f"has no checkpoint '{name}'; its steps are: 1, 2, 3"):
            find_checkpoint(run, name)
    checkpoint, warnings = newest_whole_checkpoint(run)
    assert (checkpoint.step, warnings) == (3, [])
    rewind(run, checkpoint)
    assert (find_checkpoint(run, "last").step, find_checkpoint(run, "best").step) == (3, 2)


def test_the_newest_whole_checkpoint_is_found_past_damaged_ones(run):
    """Guards against a run that cannot go on, or goes on from damage, and against damage that is not said."""
    folders = [save(run, step, best=step == 3).path for step in (1, 2, 3, 4)]
    (folders[3] / "model.safetensors").write_bytes(b"rotten")
    (folders[2] / "state.json").unlink()
    checkpoint, warnings = newest_whole_checkpoint(run)
    assert number_of(checkpoint) == 2.0
    faults = ["model.safetensors is damaged: it does not match", "state.json is damaged: it is missing"]
    for step, fault, warning in zip((4, 3), faults, warnings, strict=True):
        assert f"checkpoint of step {step} skipped: {folders[step - 1]}/{fault}" in warning
    with pytest.raises(UserError, match=r"state.json is damaged: .*; whole checkpoints are at the steps: 1, 2"):
        find_checkpoint(run, "best")
    aside = [run.checkpoints_path / f".step-0000000{step}.damaged" for step in (4, 3)]
    assert rewind(run, checkpoint) == [
        f"checkpoint of step {step} put aside as {path}" for step, path in zip((4, 3), aside, strict=True)
    ]
    assert steps(run) == [1, 2]
    assert (aside[0] / "model.safetensors").read_bytes() == b"rotten"
    save(run, 3)  # which tidies up
    rewind(run, find_checkpoint(run, 2), discard=True)
    assert all(path.is_dir() for path in aside)
    assert find_checkpoint(run, "best").step == 2
    for folder in folders[:2]:
        (folder / "manifest.json").unlink()
    assert newest_whole_checkpoint(run)[0] is None
    with pytest.raises(UserError, match="whole checkpoints are at the steps: none"):
        find_checkpoint(run, "last")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_what_cannot_be_read_for_a_moment_is_kept(code, run, monkeypatch):
    """Guards against the newest checkpoint being removed, whole as it is, because a disk stumbled."""
    for step in (1, 2):
        save(run, step)
    with monkeypatch.context() as patch:

        def stumble(path, real=checkpoints.sha256_of):
            if path.parent.name == "step-00000002":
                raise OSError(code, os.strerror(code))
            return real(path)

        patch.setattr(checkpoints, "sha256_of", stumble)
        checkpoint, warnings = newest_whole_checkpoint(run)
    assert (checkpoint.step, len(warnings)) == (1, 1)
    assert f"step-00000002 cannot be read ({os.strerror(code)})" in warnings[0]
    rewind(run, checkpoint)  # by now it could be read
    (run.checkpoints_path / ".step-00000002.damaged").rename(run.checkpoints_path / "step-00000002")
    assert number_of(newest_whole_checkpoint(run)[0]) == 2.0


def test_what_is_damaged_is_kept_when_an_older_one_is_asked_for(run):
    """Guards against the removal of what may be sound behind one bad moment of the disk."""
    paths = [save(run, step).path for step in (1, 2, 3)]
    (paths[1] / "stray").touch()
    rewind(run, find_checkpoint(run, 1), discard=True)
    assert {"step-00000001", ".step-00000002.damaged"} == {name for name in names(run) if "step" in name}
    save(run, 2, 2.5)
    (run.checkpoints_path / "step-00000002" / "stray").mkdir()
    rewind(run, find_checkpoint(run, 1))
    assert (run.checkpoints_path / ".step-00000002.damaged" / "stray").is_dir(), "two of one step"


def test_rewinding_keeps_the_best_that_the_checkpoint_knows(run):
    """Guards against a `best` that a kill kept from being set, and one that is worse than it could be."""
    for step in (1, 2, 3):
        save(run, step, best=True, best_step=step)
    (run.checkpoints_path / "best").write_text("step-00000002\n")  # killed before it was set to 3
    rewind(run, find_checkpoint(run, 3))
    assert find_checkpoint(run, "best").step == 3
    save(run, 4, best=False, best_step=3)
    save(run, 5, best=True, best_step=5)
    rewind(run, find_checkpoint(run, 4))
    assert find_checkpoint(run, "best").step == 3


def test_steps_are_ordered_as_numbers(run):
    """Guards against step 100,000,000 being older than step 20,000,000."""
    for step in (10**8, 2 * 10**7):
        save(run, step)
    assert newest_whole_checkpoint(run)[0].step == 10**8
    assert find_checkpoint(run, "100000000").name == "step-100000000"


def test_everyone_may_read_who_may_read_the_run(run):
    """Guards against weights that colleagues cannot load: safetensors writes files for their owner alone."""
    modes = {path.stat().st_mode for path in save(run, 1).path.iterdir()}
    assert modes == {run.config_path.stat().st_mode}


def test_reading_changes_nothing(run):
    """Guards against an evaluation that tidies up in the middle of a training's write."""
    folder = save(run, 1, best=True).path
    folder.rename(folder.with_name(".step-00000001.old"))
    (run.checkpoints_path / ".step-00000001.tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert find_checkpoint(run, "best").name == "step-00000001"
    assert number_of(newest_whole_checkpoint(run)[0]) == 1.0
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_the_manifest_names_sizes_and_digests(run):
    """Guards against a format other than documented, the manifest's own entry included."""
    folder = save(run, 1).path
    assert (folder / "manifest.json").read_text() == manifest_for(folder)


TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.bfloat16, torch.bool)


def test_buffers_of_every_type_come_back(tmp_path):
    """Guards against a task of one's own whose run is saved and cannot be resumed."""
    path = tmp_path / "model.safetensors"
    written = {str(dtype): torch.tensor([0, 1, 1], dtype=dtype) for dtype in TYPES}
    save_tensors(written, path, like=tmp_path)
    read, _ = load_tensors(path)
    assert all(read[name].dtype == written[name].dtype and read[name].equal(written[name]) for name in written)
    with pytest.raises(UserError, match=r"its tensor torch.uint8 is uint8 \[3\]; in .* int8 \[3\]"):
        check_tensors(path, read, written | {"torch.uint8": torch.zeros(3, dtype=torch.int8)}, "config.yaml")
