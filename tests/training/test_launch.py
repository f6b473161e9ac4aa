"""The launch files, through accelerate's own launcher."""

import os
import subprocess
import sys

import pytest

from tiny import SCRIPTS, TINY

LAUNCH_FILES = SCRIPTS.parent / "configs" / "accelerate"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch_file", "first_lines"),
    [
        ("cpu.yaml", ["1 x cpu", "precision no (as accelerate was told)"]),
        ("cpu_2_processes.yaml", ["2 x cpu", "precision no (as accelerate was told)"]),
    ],
)
def test_a_launch_file_starts_what_it_says(launch_file, first_lines, tmp_path, text_corpus_flags):
    """Guards against accelerate's habit of starting one CPU process where two were asked for, and against launch files
    that it cannot read."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(LAUNCH_FILES / launch_file), "--main_process_port=0"]
    done = subprocess.run(
        [
            *launch,
            str(SCRIPTS / "train.py"),
            *TINY,
            "--train.mixed_precision=auto",
            *text_corpus_flags,
            f"--run.dir={tmp_path / 'run'}",
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in first_lines:
        assert line in done.stderr
    assert done.stdout.count("Next:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
