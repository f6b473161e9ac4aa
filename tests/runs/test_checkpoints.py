"""Checkpoints are whole or absent, verified when read, and pruned only when a newer one stands."""

import json

import pytest
import torch
from torch import nn

from charlm.config import Config, RunConfig, UserError
from charlm.runs import checkpoints
from charlm.runs.checkpoints import find_checkpoint, rewind, save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.snapshot import restore, take_snapshot


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(Config(run=RunConfig(dir=tmp_path / "run")), {"name": "none"})


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


def save(run: Run, step: int, *, best: bool = False, keep: int = 2):
    model, optimizer = model_and_optimizer()
    return save_checkpoint(run, take_snapshot(model, [optimizer], {"step": step}), best=best, keep=keep)


def steps(run: Run) -> list[int]:
    return [int(folder.name[5:]) for folder in checkpoints.checkpoint_folders(run)]


def test_what_was_saved_comes_back(run):
    """Guards against lost or renamed state; a parameter that never had a gradient has none."""
    model, optimizer = model_and_optimizer()
    saved = save_checkpoint(run, take_snapshot(model, [optimizer], {"step": 2}), best=True, keep=1)
    found = find_checkpoint(run, "best")
    assert found == saved
    other, fresh = model_and_optimizer(steps=0)
    restore(found.snapshot(), other, [fresh])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state, restored = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert state.keys() == restored.keys() == {0, 1}
    assert all(torch.equal(value, restored[index][key]) for index in state for key, value in state[index].items())


def test_the_newest_and_the_best_are_kept(run):
    """Guards against pruning the checkpoint that evaluation will ask for."""
    for step in range(1, 7):
        save(run, step, best=step == 2)
    assert steps(run) == [2, 5, 6]
    assert find_checkpoint(run, "best").step == 2
    assert find_checkpoint(run, "last").step == 6
    assert find_checkpoint(run, 5).step == find_checkpoint(run, "5").step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named(name, damage, run):
    """Guards against going on from weights that rotted."""
    path = save(run, 3).path / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        find_checkpoint(run, "last")


def test_a_write_that_fails_leaves_the_older_checkpoint(run, monkeypatch):
    """Guards against debris, and against a pointer to something half-written."""
    save(run, 1, best=True)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(run, 2)
    assert find_checkpoint(run, "last").step == 1
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["best", "last", "step-00000001"]


def test_rewinding_forgets_what_came_after(run):
    """Guards against pointers to another future, and against pruning what a resumed run has just written."""
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        save(run, step, best=step == 3, keep=9)
    rewind(run, find_checkpoint(run, 2))
    assert steps(run) == [1, 2]
    assert find_checkpoint(run, "last").step == find_checkpoint(run, "best").step == 2
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_pointer_cannot_lead_out_of_the_run(run, tmp_path):
    """Guards against a `best` that names a path."""
    save(run, 1)
    (run.checkpoints_path / "best").write_text("../../elsewhere\n")
    with pytest.raises(UserError, match="no checkpoint 'best'; its steps are: 1"):
        find_checkpoint(run, "best")


def test_metrics_survive_a_line_that_a_kill_cut_short(run):
    """Guards against a run that cannot be resumed or drawn because of its last line."""
    run.append_metrics({"step": 1})
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({"step": 2})[:-3])
    assert [row["step"] for row in run.metrics()] == [1]
    run.forget_metrics_after(1)
    run.append_metrics({"step": 2})
    assert [row["step"] for row in run.metrics()] == [1, 2]
