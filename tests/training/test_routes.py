"""Runs by every route: in micro-batches, on two processes, resumed, with skipped steps, and their checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import charlm
from charlm.config import UserError
from charlm.runs.folder import Run
from launched import train_with_two_processes
from storage import manifest_for
from tiny import TINY, checkpoint_bytes, checkpoint_folder, losses, train

STEPS = 12
FLAGS = [
    *TINY,
    "--model.num_layers=3",
    f"--train.steps={STEPS}",
    "--train.batch_size=6",
    "--train.warmup=4",
    "--train.lr_schedule=cosine",
    "--train.log_every=1",
    "--train.valid_every=3",
    "--train.keep_checkpoints=100",
]
WAYS = {
    "relay": ["--aux.route=relay"],
    "pairwise": ["--aux.route=pairwise"],
    "multiway": ["--aux.route=multiway"],
    "multiway-common": ["--aux.route=multiway", "--aux.step_sizes=common"],
}
DROPOUT = ["--model.attention_dropout=0.1", "--model.activation_dropout=0.2", "--model.residual_dropout=0.1"]
BF16 = ["--train.mixed_precision=bf16", "--train.micro_batch_size=4", "--train.clip_norm=1"]
SETTINGS = {
    "relay": [*DROPOUT, *BF16],
    "pairwise": [*DROPOUT, *BF16, "--model.ngrams=[2]"],
    "multiway": [*DROPOUT, *BF16, "--train.activation_checkpointing=true", "--train.weight_decay=0.1"],
    "multiway-common": ["--train.optimizer=muon", "--model.ngrams=[2]"],
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way == "multiway-common" else way for way in WAYS]
)
def test_resuming_ends_in_the_same_bytes(way, tmp_path, text_corpus_flags, capfd):
    """Guards against optimizer state that is lost or given to another loss, and dropout noise that depends on earlier
    steps."""
    flags = [*FLAGS, *text_corpus_flags, *WAYS[way], *SETTINGS[way]]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    assert f"gradients by {way.partition('-')[0]}: " in capfd.readouterr().err
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    train(*flags, f"--run.dir={resumed}", "--run.resume_from=3")  # heads are silent from steps 2 and 4 on
    assert checkpoint_bytes(resumed, STEPS) == checkpoint_bytes(whole, STEPS)
    assert losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    assert charlm.load(whole, "last", device="cpu").step == STEPS


@pytest.fixture(scope="module")
def multiway(tmp_path_factory, text_corpus_flags) -> tuple[list[str], Path]:
    """Flags and folder of a run whose three losses have optimizers of their own."""
    flags = [*FLAGS, *text_corpus_flags, *WAYS["multiway"], "--train.steps=6", "--train.valid_every=2"]
    flags += ["--aux.layers.schedule=constant"]
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
    path = checkpoint_folder(run, 6) / "optimizer.safetensors"
    state = load_file(path)
    state[f"{prefix}transformer.embedding.weight.exp_avg"] = state.pop("layer1/transformer.embedding.weight.exp_avg")
    save_file(state, path)
    (path.parent / "manifest.json").write_text(manifest_for(path.parent))
    with pytest.raises(UserError, match="which belongs to no parameter"):
        train(*flags, f"--run.dir={run}", "--run.resume=true")


def test_the_route_of_a_run_cannot_change(multiway):
    """Guards against resuming by another route, whose optimizers are others."""
    flags, run = multiway
    with pytest.raises(UserError) as caught:
        train(*flags, f"--run.dir={run}", "--run.resume=true", *WAYS["pairwise"])
    assert caught.value.option == "aux.route"


@pytest.mark.parametrize("way", ["pairwise", "multiway"])
def test_a_step_whose_last_loss_is_not_finite_leaves_nothing_behind(way, tmp_path, text_corpus_flags, break_losses):
    """Guards against keeping the updates of the losses before it."""
    broken = {"pairwise": 3 + 2, "multiway": 1}[way]  # the third pass of the second step; the second step
    break_losses({broken}, term=-1)
    flags = [*FLAGS, *text_corpus_flags, *WAYS[way], "--aux.layers.schedule=constant", "--train.steps=3"]
    flags += ["--train.valid_every=1"]
    run = train(*flags, f"--run.dir={tmp_path / 'run'}", "--aux.targets.enabled=false")
    assert checkpoint_bytes(run, 2) == checkpoint_bytes(run, 1)
    assert checkpoint_bytes(run, 3) != checkpoint_bytes(run, 2)
    (row,) = [row for row in Run.open(run).metrics() if "skipped" in row]
    assert (row["step"], row["reason"]) == (2, "the loss of layer3/offset1/all is nan")


TWO_STEPS, RATE = 30, 0.03
ROUNDING = TWO_STEPS * 5 * 16 * torch.finfo(torch.float32).eps
"""The relative difference that another order of additions makes at most in the weights: each update adds up a gradient
over at least 5 windows of 16 positions, and each addition rounds."""
TWO = [
    *FLAGS,
    f"--train.steps={TWO_STEPS}",
    "--train.warmup=0",
    "--train.valid_every=15",
    "--train.optimizer=sgd",
    f"--train.learning_rate={RATE}",
    "--train.momentum=0.9",
    "--train.matmul_precision=highest",
    "--aux.layers.schedule=linear",
    "--aux.layers.end=0.8",
]
SPLITS = {
    "even": ["--train.clip_norm=1"],
    "accumulated": ["--train.micro_batch_size=1"],
    # 3 + 2 windows: one process accumulates twice, the other once.
    "uneven": ["--train.batch_size=5", "--train.micro_batch_size=2", "--model.ngrams=[2]"],
}


def flags_of(way: str, split: str, folder: Path, corpus: list[str]) -> list[str]:
    return [*TWO, *corpus, *WAYS[way], *SPLITS[split], f"--run.dir={folder / f'{way}-{split}'}"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, text_corpus_flags) -> Path:
    """The runs of all ways, made by two processes that torchrun starts once."""
    folder = tmp_path_factory.mktemp("two")
    runs = [flags_of(way, split, folder, text_corpus_flags) for way in WAYS for split in SPLITS]
    train_with_two_processes(folder / "plan.json", runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_and_micro_batches_learn_what_one_does(way, split, two_processes, tmp_path, text_corpus_flags):
    """Guards against gradients that are averaged twice or not at all, of one loss before those of another, or of some
    micro-batches only; against heads that fall silent on one process, and against other text."""
    alone = train(*flags_of(way, split, tmp_path, text_corpus_flags), "--train.micro_batch_size=null")
    assert losses(two_processes / f"{way}-{split}") == pytest.approx(losses(alone), rel=1e-5)
    one, two = (
        load_file(checkpoint_folder(run, TWO_STEPS) / "model.safetensors")
        for run in (alone, two_processes / f"{way}-{split}")
    )
    assert two.keys() == one.keys()
    for name, weight in one.items():
        # A key bias has no scale of its own: its gradient is zero but for rounding. Its scale is the learning rate's.
        assert (two[name] - weight).norm() <= ROUNDING * (weight.norm() + RATE), name


@pytest.mark.slow
def test_a_run_moves_from_one_process_to_two_and_back(tmp_path, text_corpus_flags):
    """Guards against a checkpoint that can be continued only by as many processes as wrote it."""
    flags = [*TWO, *text_corpus_flags, *WAYS["multiway"], "--train.valid_every=10", "--train.keep_checkpoints=9"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    moved = shutil.copytree(whole, tmp_path / "moved")
    here = [*flags, f"--run.dir={moved}"]
    train_with_two_processes(tmp_path / "plan.json", [[*here, "--run.resume_from=10"]])
    train(*here, "--run.resume_from=20")
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    assert json.loads((checkpoint_folder(moved, 20) / "state.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="blocks are compiled by a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's, of torch's own code
@pytest.mark.parametrize("way", ["relay", "multiway"])
def test_compiled_blocks_take_several_backward_passes(way, tmp_path, text_corpus_flags):
    """Guards against compiled graphs that give their buffers away in the first of several backward passes."""
    flags = [*TWO, *text_corpus_flags, *WAYS[way], "--train.steps=2", "--model.num_layers=2"]
    plain, compiled = (
        train(*flags, f"--train.compile={compile}", f"--run.dir={tmp_path / compile}") for compile in ("no", "yes")
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
