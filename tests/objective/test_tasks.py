"""Tasks of the user's own: their registry, and the example of the documentation, run as it stands there."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import charlm
from charlm.config import Config, UserError
from charlm.objective import tasks
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run
from launched import documented_task
from tiny import TINY, refused, run_script

OFFERED = "--aux.tasks={order: 0.5}"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """One for each test."""
    monkeypatch.setattr(tasks, "_builders", {})


@pytest.fixture
def program(tmp_path) -> Path:
    """The example, as a file."""
    return documented_task(tmp_path)


def order_task(program: Path, vocabulary_size: int = 5) -> torch.nn.Module:
    runpy.run_path(str(program))
    config = charlm.load_config(overrides=[*TINY, OFFERED])
    return build_objective(config, vocabulary_size).tasks["order"]


def test_the_example_learns_and_its_run_loads_without_it(program, tmp_path, text_corpus_flags, monkeypatch, capsys):
    """A document whose code does not run, a task that nobody can learn or that is not saved, a run that needs it."""
    flags = [*TINY, *text_corpus_flags, OFFERED, "--model.position_encoding=rotary", "--train.optimizer=adamw"]
    flags += ["--train.learning_rate=0.01", "--model.context_length=32", "--train.steps=60", "--train.log_every=1"]
    flags += ["--aux.layers.enabled=false", f"--run.dir={tmp_path / 'run'}"]
    assert run_script(program.with_suffix(""), *flags) == 0
    rows = [row for row in Run.open(tmp_path / "run").metrics() if "terms" in row]
    losses = [row["terms"]["layer2/task/order"]["loss"] for row in rows]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-10:]) / 10 < 0.6 * math.log(2)
    assert rows[0]["loss"] == pytest.approx(1.5 * math.log(256) + 0.5 * math.log(2), rel=1e-5)
    saved = load_file(find_checkpoint(Run.open(tmp_path / "run"), "last").path / "model.safetensors")
    assert saved["tasks.order.stretches.weight"].shape == (16, 16, 8)

    monkeypatch.setattr(tasks, "_builders", {})
    trained = charlm.load(tmp_path / "run", "last", device="cpu")
    assert torch.equal(trained.transformer.embedding.weight, saved["transformer.embedding.weight"])
    with refused("aux.tasks", "'order' is not registered"):
        charlm.train(charlm.load_config(overrides=[*flags, "--run.resume=true", "--train.steps=61"]))
    assert run_script(program.with_suffix(""), *flags, "--run.resume=true", "--train.steps=61") == 0
    assert "resumed at step 60" in capsys.readouterr().err


def test_the_example_sees_no_answer(program, randomise):
    """A stretch that knows its place, or a state that has read what it is asked about."""
    task = randomise(order_task(program))
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(2, 16, 16, generator=generator)
    windows_BW = torch.randint(5, (2, 17), generator=generator)
    losses = task(hidden_BTD, windows_BW)
    assert losses.shape == (2, 1)  # only the first position has sixteen characters after it
    swapped = torch.cat([windows_BW[:, :1], windows_BW[:, 9:], windows_BW[:, 1:9]], dim=1)
    # The same two stretches in the other order: the probabilities of the two orders sum to 1.
    total = (-losses).exp() + (-task(hidden_BTD, swapped)).exp()
    torch.testing.assert_close(total, torch.ones(2, 1))
    other = windows_BW.clone()
    other[:, 0] = (other[:, 0] + 1) % 5
    assert torch.equal(task(hidden_BTD, other), losses)


def test_what_is_not_registered_is_named():
    """A task left out without a word."""
    charlm.auxiliary_task("zebra")(lambda config, vocabulary_size: torch.nn.Identity())
    charlm.auxiliary_task("ant")(lambda config, vocabulary_size: torch.nn.Identity())
    with refused("aux.tasks", "ant, zebra"):
        build_objective(charlm.load_config(overrides=[*TINY, OFFERED]), 5)
    with refused("aux.tasks"):  # before the corpus is looked for
        charlm.train(charlm.load_config(overrides=[*TINY, OFFERED, "--data.corpus=file", "--data.path=nowhere"]))
    monkeys = charlm.load_config(overrides=[*TINY, "--aux.tasks={zebra: 1, ant: 2}"])
    assert list(build_objective(monkeys, 5).tasks) == ["ant", "zebra"]
    assert build_objective(monkeys, 5, training=False).tasks is None
    assert build_objective(Config(), 5).tasks is None


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "training", "forward", "9a", "x" * 65])
def test_names_that_no_module_can_have(name):
    """A task that fails when a run begins, with a message about modules."""
    with pytest.raises(UserError, match="auxiliary task"):
        charlm.auxiliary_task(name)


def test_the_same_seed_builds_the_same_model_with_and_without_a_task(program):
    """A task that changes what the model starts from: runs with and without it could not be compared."""
    runpy.run_path(str(program))
    states = []
    for flags in ([OFFERED], [OFFERED], []):
        torch.manual_seed(0)
        states.append(build_objective(charlm.load_config(overrides=[*TINY, *flags]), 5).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[2].items())
    assert {name.split(".")[0] for name in states[0].keys() - states[2].keys()} == {"tasks"}
