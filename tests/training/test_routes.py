"""Runs by other routes than joint: with skipped steps, compiled, and their checkpoints."""

import shutil
from pathlib import Path

import pytest
import setuptools  # noqa: F401  # torch.compile imports it, which fails after some other imports
import torch
from safetensors.torch import load_file

from charlm.config import UserError
from charlm.runs.folder import Run
from storage import forge, tensors
from tiny import TINY, checkpoint_bytes, checkpoint_folder, losses, train, typed

FLAGS = [
    *TINY,
    *typed("--model.num_layers=3 --train.steps=6 --train.batch_size=6 --train.log_every=1 --train.valid_every=2"),
    *typed("--train.keep_checkpoints=100 --aux.layers.schedule=constant"),
]


@pytest.fixture(scope="module")
def multiway(tmp_path_factory, text_corpus_flags) -> tuple[list[str], Path]:
    """Flags and folder of a run whose three losses have optimizers of their own."""
    flags = [*FLAGS, *text_corpus_flags, "--aux.route=multiway"]
    return flags, train(*flags, f"--run.dir={tmp_path_factory.mktemp('multiway') / 'run'}")


def test_each_loss_has_its_state_in_checkpoints(multiway):
    """Guards against keys that two losses share, and state of parameters that a loss never reaches."""
    state = load_file(checkpoint_folder(multiway[1], 2) / "optimizer.safetensors")
    for key in ("exp_avg", "exp_avg_sq", "step"):
        for layer in (1, 2, 3):
            own = {name for name in state if name.startswith(f"layer{layer}/") and name.endswith(f".{key}")}
            blocks = {name.split(".")[2] for name in own if ".blocks." in name}
            assert blocks == {str(number) for number in range(layer)}
            assert {name.split(".")[2] for name in own if ".exits." in name} == {f"layer{layer}"}
            assert f"layer{layer}/transformer.embedding.weight.{key}" in own
    moments = [state[f"layer{layer}/transformer.embedding.weight.exp_avg"] for layer in (1, 2, 3)]
    assert not torch.equal(moments[0], moments[1])


@pytest.mark.parametrize("prefix", ["layer9/", "", "layer1/layer1/"])
def test_state_of_an_unknown_loss_is_refused(prefix, multiway, tmp_path):
    """Guards against resuming with the state of another table of losses."""
    flags, run = multiway[0], shutil.copytree(multiway[1], tmp_path / "run")
    name = "transformer.embedding.weight.exp_avg"
    moment = load_file(checkpoint_folder(run, 6) / "optimizer.safetensors")[f"layer1/{name}"]
    renamed = tensors("optimizer.safetensors", **{f"layer1/{name}": None, f"{prefix}{name}": moment})
    forge(checkpoint_folder(run, 6), renamed)
    with pytest.raises(UserError, match=r"optimizer\.safetensors: its tensor"):
        train(*flags, f"--run.dir={run}", "--run.resume=true")


@pytest.mark.parametrize("way", ["pairwise", "multiway"])
def test_a_step_whose_last_loss_is_not_finite_leaves_nothing_behind(
    way, tmp_path, text_corpus_flags, break_losses, capfd
):
    """Guards against keeping the updates of the losses before it."""
    broken = {"pairwise": 3 + 2, "multiway": 1}[way]  # the third pass of the second step; the second step
    break_losses({broken}, term=-1)
    flags = [*FLAGS, *text_corpus_flags, f"--aux.route={way}", "--train.steps=3", "--train.valid_every=1"]
    run = train(*flags, f"--run.dir={tmp_path / 'run'}", "--aux.targets.enabled=false")
    assert f"gradients by {way}: " in capfd.readouterr().err
    assert checkpoint_bytes(run, 2) == checkpoint_bytes(run, 1)
    assert checkpoint_bytes(run, 3) != checkpoint_bytes(run, 2)
    (row,) = [row for row in Run.open(run).metrics() if "skipped" in row]
    assert (row["step"], row["reason"]) == (2, "the loss of layer3/offset1/all is nan")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="blocks are compiled by a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's, of torch's own code
@pytest.mark.parametrize("way", ["relay", "multiway"])
def test_compiled_blocks_take_several_backward_passes(way, tmp_path, text_corpus_flags):
    """Guards against compiled graphs that give their buffers away in the first of several backward passes."""
    flags = [*FLAGS, *text_corpus_flags, f"--aux.route={way}", "--train.steps=2", "--train.optimizer=sgd"]
    plain, compiled = (
        train(*flags, f"--train.compile={compile}", f"--run.dir={tmp_path / compile}") for compile in ("no", "yes")
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
