"""The model in shards (FSDP2) on two CPU processes against one: the same losses, checkpoints and silent heads."""

import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import charlm
from charlm.config import Config, ModelConfig, TrainConfig, UserError
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run
from charlm.training.sharding import shard, wants_shards
from charlm.training.update import step_unless
from launched import TORCHRUN, launch, train_with_two_processes
from tiny import SCRIPTS, TINY, losses, train, training_rows

STEPS = 80
FLAGS = (
    *TINY,
    "--model.num_layers=4",
    "--model.d_model=32",
    "--model.d_ff=64",
    f"--train.steps={STEPS}",
    "--train.batch_size=6",
    "--train.matmul_precision=highest",
    "--train.log_every=1",
    "--train.valid_every=40",
    "--train.clip_norm=1",
    "--train.sharding=fsdp2",
)
SETTINGS = {
    "adamw": ["--train.weight_decay=0.1", "--model.d_ff=65"],  # rows that two processes cannot share evenly
    "accumulated": [
        "--train.micro_batch_size=2",
        "--train.activation_checkpointing=true",
        "--aux.positions.schedule=cutoff",
        "--aux.positions.end=0.3",
    ],
    "pre-norm": [
        "--model.norm=pre",
        "--model.position_encoding=rotary",
        "--train.context_divisor=4",
        "--train.full_context_from=0.5",
    ],
}
DYING = SCRIPTS.parent / "tests" / "training" / "train_and_die.py"
LAUNCH_FILES = SCRIPTS.parent / "configs" / "accelerate"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0")
ACCELERATE = (*LAUNCH, "--config_file", LAUNCH_FILES / "cpu_2_processes.yaml")
FSDP = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
"""Environment variables by which a launcher asks for shards."""


def tensors(run, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(Run.open(run), step).path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, text_corpus_flags):
    """The runs of all settings in shards, made by two processes that torchrun starts once."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = [[*FLAGS, *SETTINGS[name], *text_corpus_flags, f"--run.dir={folder / name}"] for name in SETTINGS]
    said = train_with_two_processes(folder / "plan.json", runs)
    assert said.count("sharded by FSDP2") == len(runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_shards_learn_what_one_process_does(name, sharded, tmp_path, text_corpus_flags):
    """Guards against gradients that are scaled or reduced wrongly, norms of gradients taken of one shard only, silent
    heads that move, validation that reads a shard for the whole, and checkpoints of another format."""
    flags = [*FLAGS, *SETTINGS[name], *text_corpus_flags, f"--run.dir={tmp_path / name}"]
    alone = train(*flags)
    rows_alone, rows_sharded = training_rows(alone), training_rows(sharded / name)
    assert [row["step"] for row in rows_sharded] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows_sharded] == pytest.approx([row["loss"] for row in rows_alone], rel=1e-5)
    assert len(rows_sharded[0]["terms"]) > len(rows_sharded[-1]["terms"]), "no head fell silent: nothing was proved"
    valid_alone, valid_sharded = (
        [row["valid"]["bits_per_character"] for row in Run.open(run).metrics() if "valid" in row]
        for run in (alone, sharded / name)
    )
    assert valid_sharded == pytest.approx(valid_alone, rel=1e-5)

    for file in ("model", "optimizer"):
        for step in (40, 80):
            one, two = tensors(alone, step, file), tensors(sharded / name, step, file)
            assert {key: (t.shape, t.dtype) for key, t in one.items()} == {
                key: (t.shape, t.dtype) for key, t in two.items()
            }
    # The heads of layers 1, 2 and 3 of 4 fall silent at steps 10, 20 and 30.
    for file in ("model", "optimizer"):
        middle, end = tensors(sharded / name, 40, file), tensors(sharded / name, 80, file)
        silent = [key for key in middle if key.startswith("heads.exits.") and "layer4" not in key]
        assert silent
        assert all(torch.equal(middle[key], end[key]) for key in silent)
        assert not all(torch.equal(middle[key], end[key]) for key in middle)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_other_optimizers_update_shards(optimizer, tmp_path, text_corpus_flags):
    """Guards against an update computed from each shard by itself, such as muon's orthogonalisation."""
    flags = [*FLAGS, f"--train.optimizer={optimizer}", "--train.learning_rate=0.003", *text_corpus_flags]
    flags += ["--train.steps=40"]
    train_with_two_processes(tmp_path / "plan.json", [[*flags, f"--run.dir={tmp_path / 'two'}"]])
    alone = train(*flags, f"--run.dir={tmp_path / 'one'}")
    # Muon orthogonalises in bf16, which the order of additions moves.
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-3 if optimizer == "muon" else 1e-5)


@pytest.mark.slow
def test_a_run_moves_from_one_process_to_shards_to_replicas_and_back(tmp_path, text_corpus_flags):
    """Guards against a checkpoint that can be continued only in the way it was written."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=20", "--train.keep_checkpoints=9"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    shutil.copytree(whole, tmp_path / "moved")
    moved = [*flags, f"--run.dir={tmp_path / 'moved'}"]
    said = train_with_two_processes(
        tmp_path / "plan.json",
        [[*moved, "--run.resume_from=20"], [*moved, "--run.resume_from=40", "--train.sharding=no"]],
    )
    assert said.count("sharded by FSDP2") == 1
    train(*moved, "--run.resume_from=60")
    assert len(losses(tmp_path / "moved")) == STEPS
    assert losses(tmp_path / "moved") == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    sharding, tmp_path, text_corpus_flags
):
    """Guards against processes that wait forever for one that was killed, and a checkpoint that it takes along."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=20", f"--train.sharding={sharding}"]
    flags += [f"--run.dir={tmp_path / 'run'}"]
    died = launch([*TORCHRUN, DYING, *flags])
    assert died.returncode != 0
    assert "[rank0]: Traceback" not in died.stderr
    assert died.stderr.count("error: another process of this run has ended") == 1, died.stderr
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step-00000040\n"
    train(*flags, "--run.resume=true")
    assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sharding"),
    [(TORCHRUN, "fsdp2"), (ACCELERATE, "no")],
    ids=["torchrun-shards", "accelerate"],
)
def test_a_launcher_that_restarts_processes_continues_the_run(launcher, sharding, tmp_path, text_corpus_flags):
    """Guards against a restart that refuses the run's own folder, or that waits for the earlier processes at addresses
    that the launcher remembers."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=20", f"--run.dir={tmp_path / 'run'}"]
    done = launch([*launcher, "--max_restarts=1", DYING, *flags, f"--train.sharding={sharding}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 40" in done.stderr
    assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_launcher_that_restarts_processes_goes_back_to_a_chosen_step_once(tmp_path, text_corpus_flags):
    """Guards against attempts that each go back to run.resume_from and remove what the one before has learned."""
    flags = [*FLAGS, *text_corpus_flags, "--train.valid_every=20", "--train.keep_checkpoints=9"]
    flags += ["--train.sharding=no", f"--run.dir={tmp_path / 'run'}"]
    train(*flags)
    done = launch([*TORCHRUN, "--max_restarts=1", DYING, *flags, "--run.resume_from=20"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("resumed at step 20\n") == done.stderr.count("resumed at step 40\n") == 1
    assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.fixture
def launcher_asks(monkeypatch):
    """`launcher_asks(NAME=value, ...)`: a launcher that sets these variables and no others of FSDP."""

    def arrange(**environment: str) -> None:
        for name in FSDP:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return arrange


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        ("auto", {}, False),
        ("fsdp2", {}, True),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True),
        ("no", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, False),
    ],
)
def test_shards_are_wanted_by_the_option_or_else_by_the_launcher(option, environment, expected, launcher_asks):
    """Guards against a launcher's setting that is ignored, or that wins over the configuration."""
    launcher_asks(**environment)
    assert wants_shards(TrainConfig(sharding=option)) is expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "fsdp_version=1: only FSDP2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--train.activation_checkpointing=true"),
    ],
)
def test_unsupported_settings_of_the_launcher_are_refused(environment, message, launcher_asks):
    """Guards against a launcher's setting without effect."""
    launcher_asks(ACCELERATE_USE_FSDP="true", **environment)
    with pytest.raises(UserError, match=message):
        wants_shards(TrainConfig())


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"ngrams": (2, 3)}, {}, "model.ngrams"),
        ({}, {"micro_batch_size": "auto"}, "train.micro_batch_size=auto"),
        ({}, {"batch_size": 5, "micro_batch_size": 2}, "train.batch_size=5"),
        ({}, {"batch_size": 5, "micro_batch_size": 2, "context_divisor": 4}, "train.batch_size=5"),
    ],
)
def test_options_that_cannot_be_sharded_are_refused(model, train, message):
    """Guards against a run that hangs or fails at its first step: 3 + 2 windows in micro-batches of 2 are 2 and 1."""
    small = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 32, "context_length": 8}
    config = Config(model=ModelConfig(**small, **model), train=TrainConfig(sharding="fsdp2", **train))
    with pytest.raises(UserError, match=message):
        shard(config, build_objective(config, vocabulary_size=11), num_processes=2)


@pytest.mark.slow
def test_the_launch_file_shards(tmp_path, text_corpus_flags):
    """Guards against accelerate's own FSDP, which would wrap the model a second time, and a file it cannot read."""
    command = [*LAUNCH, "--num_processes=2", "--config_file", LAUNCH_FILES / "fsdp2_bf16.yaml", SCRIPTS / "train.py"]
    flags = [*TINY, "--train.mixed_precision=auto", *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    done = launch([*command, *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stderr
    assert "sharded by FSDP2, precision bf16 (as accelerate was told)" in done.stderr
    assert charlm.load(tmp_path / "run", device="cpu").step == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        lambda parameters: torch.optim.Muon(parameters),
    ],
    ids=["adamw", "sgd", "muon"],
)
def test_an_update_that_is_skipped_on_the_device_leaves_shards_as_they_were(make):
    """Guards against a skip that works on whole tensors only. Shards exist in a group of one process, too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        linear = nn.Linear(4, 4, bias=False)
        fully_shard(linear)
        optimizer = make(linear.parameters())
        for skip in (True, False):
            before = linear.weight.full_tensor().clone()
            linear(torch.randn(2, 4)).sum().backward()
            step_unless(torch.tensor(skip), optimizer)
            assert torch.equal(linear.weight.full_tensor(), before) is skip
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("launch_file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_launch_file(launch_file):
    """Guards against a key that accelerate has dropped or never had, which it would refuse on a cluster first."""
    loaded = load_config_from_file(str(launch_file))
    flags = {flag.removeprefix("--") for action in launch_command_parser()._actions for flag in action.option_strings}
    assert set(loaded.fsdp_config) <= flags
