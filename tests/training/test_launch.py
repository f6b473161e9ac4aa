"""The launch files, through accelerate's own launcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import charlm
import launched
from tiny import SCRIPTS, TINY

LAUNCH_FILES = SCRIPTS.parent / "configs" / "accelerate"


def launch(how: str, script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """scripts/SCRIPT.py under `accelerate launch` with a launch file and further options, which must succeed."""
    launch_file, *options = how.split()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0", *options, "--config_file"]
    command += [LAUNCH_FILES / launch_file, SCRIPTS / f"{script}.py", *arguments]
    done = launched.launch(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first_lines"),
    [
        ("cpu.yaml", ["1 x cpu", "precision no (as accelerate was told)"]),
        ("cpu_2_processes.yaml", ["2 x cpu", "precision no (as accelerate was told)"]),
        ("fsdp2_bf16.yaml --num_processes=2", ["2 x cpu", "sharded by FSDP2, precision bf16 (as accelerate was told)"]),
    ],
)
def test_a_launch_file_starts_what_it_says(how, first_lines, tmp_path, text_corpus_flags):
    """Guards against accelerate starting one CPU process in place of two, its own FSDP, which would wrap the model a
    second time, unreadable launch files, and processes that each print a score of their own."""
    flags = [*TINY, "--train.mixed_precision=auto", *text_corpus_flags]
    trained = launch(how, "train", *flags, f"--run.dir={tmp_path / 'run'}")
    for line in first_lines:
        assert line in trained.stderr
    assert trained.stdout.count("Next:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()

    score = json.loads(launch(how, "evaluate", tmp_path / "run", "--json").stdout)
    model = charlm.load(tmp_path / "run", device="cpu")
    alone = charlm.bits_per_character(model, charlm.load_corpus(model.config.data))
    assert score["bits_per_character"] == pytest.approx(alone.bits_per_character, abs=1e-6)
    assert score["symbols"] == alone.symbols == 2000


@pytest.mark.parametrize("launch_file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_launch_file(launch_file):
    """Guards against a key that accelerate has dropped or never had, which it would refuse on a cluster first."""
    loaded = load_config_from_file(str(launch_file))
    flags = {flag.removeprefix("--") for action in launch_command_parser()._actions for flag in action.option_strings}
    assert set(loaded.fsdp_config) <= flags
