"""Two CPU processes against one: they must see the same characters and learn the same, whichever heads are silent."""

import shutil
from pathlib import Path

import pytest
import torch

from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run
from launched import train_with_two_processes
from tiny import TINY, losses, train, training_rows

STEPS = 100
FLAGS = [
    *TINY,
    "--model.num_layers=4",
    "--model.d_model=32",
    "--model.d_ff=64",
    f"--train.steps={STEPS}",
    "--train.batch_size=6",
    "--train.matmul_precision=highest",
    "--train.log_every=1",
    "--train.valid_every=50",
    "--train.clip_norm=1",
]
SETTINGS = {
    "adamw": ["--train.optimizer=adamw", "--train.weight_decay=0.1"],
    "adamw-accumulated": ["--train.optimizer=adamw", "--train.micro_batch_size=2"],
    "sgd": ["--train.optimizer=sgd", "--train.learning_rate=0.003"],
    # 3 + 2 windows: one process accumulates twice, the other once.
    "sgd-uneven": [
        "--train.optimizer=sgd",
        "--train.learning_rate=0.003",
        "--train.batch_size=5",
        "--train.micro_batch_size=2",
    ],
    "sgd-accumulated": ["--train.optimizer=sgd", "--train.learning_rate=0.003", "--train.micro_batch_size=1"],
    "ngrams": ["--model.ngrams=[2,3]", "--train.context_divisor=4", "--train.full_context_from=0.5"],
    "last-position": ["--aux.positions.schedule=cutoff", "--aux.positions.end=0.3", "--train.micro_batch_size=1"],
}


def flags_of(name: str, folder: Path, corpus: list[str]) -> list[str]:
    return [*FLAGS, *corpus, *SETTINGS[name], f"--run.dir={folder / name}"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, text_corpus_flags):
    """The runs of all settings, made by two processes that torchrun starts once."""
    folder = tmp_path_factory.mktemp("two")
    train_with_two_processes(folder / "plan.json", [flags_of(name, folder, text_corpus_flags) for name in SETTINGS])
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_learn_what_one_does(name, two_processes, tmp_path, text_corpus_flags):
    """Guards against wrong scaling of the loss by processes or micro-batches, a reducer that fails on silent heads or
    still moves them, and windows that depend on the number of processes."""
    alone = train(*flags_of(name, tmp_path, text_corpus_flags))
    rows_alone, rows_two = (training_rows(path) for path in (alone, two_processes / name))
    assert [row["step"] for row in rows_two] == list(range(1, STEPS + 1))
    for one, two in zip(rows_alone, rows_two, strict=True):
        assert one["terms"].keys() == two["terms"].keys()
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert rows_two[-1]["loss"] < rows_two[0]["loss"]
    assert len(rows_two[0]["terms"]) > len(rows_two[-1]["terms"]), "no head fell silent: the test would prove nothing"
    # The heads of layers 1, 2 and 3 of 4 fall silent at steps 13, 25 and 38.
    middle, end = (find_checkpoint(Run.open(two_processes / name), step).tensors() for step in (50, 100))
    silent = [parameter for parameter in middle if parameter.startswith("heads.exits.") and "layer4" not in parameter]
    assert len(silent) == 3 * (2 + 2 * 2)
    assert all(torch.equal(middle[parameter], end[parameter]) for parameter in silent)
    assert not torch.equal(middle["heads.exits.layer4.offset1.weight"], end["heads.exits.layer4.offset1.weight"])


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path, text_corpus_flags):
    """Guards against a checkpoint that can be continued only by as many processes as wrote it."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=20", "--train.keep_checkpoints=9"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    shutil.copytree(whole, tmp_path / "moved")
    moved = [*flags, f"--run.dir={tmp_path / 'moved'}", "--run.resume_from=20"]
    train_with_two_processes(tmp_path / "plan.json", [moved])
    assert losses(tmp_path / "moved") == pytest.approx(losses(whole), rel=1e-5)
