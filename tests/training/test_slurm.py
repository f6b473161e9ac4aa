"""The job templates, with stand-ins for srun and scontrol in place of a cluster."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from launched import ON_CPU, wait_until
from tiny import SCRIPTS, TINY

TEMPLATES = sorted((SCRIPTS / "slurm").glob("*.sbatch"))
SRUN = """#!/bin/bash
# As srun does: every task with its own number, and the worst exit code.
echo "$*" > "$REQUEUED.srun"
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
# More hosts than a pipe holds, so that reading only the first one breaks the pipe.
if [ "$1" = show ]; then echo localhost; seq 20000; else echo "$*" >> "$REQUEUED"; fi
"""


@pytest.fixture
def submit(tmp_path):
    """Run a template as a batch script of two tasks, which may be signalled once they train: its exit code, what it
    said, and whether it asked to be queued again."""

    def run(template, *flags, python=sys.executable, steps=3, signal_ranks=None):
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).write_text(script)
            (tmp_path / "bin" / name).chmod(0o755)
        requeued = tmp_path / "requeued"
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1"}
        slurm |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "REQUEUED": str(requeued)}
        choice = {"CONFIG": "configs/demo.yaml", "RUN": str(tmp_path / "run"), "STEPS": str(steps), "PYTHON": python}
        environment = os.environ | ON_CPU | slurm | choice | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(template), *flags]
        requeued.unlink(missing_ok=True)
        with subprocess.Popen(command, env=environment, cwd=SCRIPTS.parent, stderr=subprocess.PIPE, text=True) as job:
            if signal_ranks is not None:
                wait_until((tmp_path / "run" / "metrics.jsonl").exists, "training")
                for rank in psutil.Process(job.pid).children(recursive=True):
                    if "RANK" in rank.environ():
                        rank.send_signal(signal_ranks)
            said = job.communicate(timeout=800)[1]
        return job.returncode, said, requeued.exists() and requeued.read_text() == f"requeue {os.getpid()}\n"

    return run


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_bash_and_goes_back_into_the_queue_if_steps_are_left(template, submit, tmp_path):
    """Guards against bad bash, a preempted run that is not requeued, a failing one that is requeued for ever, tasks on
    one core, and a list of nodes that breaks the pipe."""
    for script in (template, TEMPLATES[0].with_name("run.sh")):
        assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    for directive in ("#SBATCH --requeue\n", "#SBATCH --signal=USR1@"):
        assert directive in template.read_text()
    code, _, requeued = submit(template, python="false")
    assert code == 1 and not requeued
    code, said, requeued = submit(template, python="true")
    assert code == 0 and requeued, said
    assert "--cpus-per-task=1 " in (tmp_path / "requeued.srun").read_text()


@pytest.mark.parametrize("flag", ["--run.dir=elsewhere", "--train.steps=9", "--train.steps"])
def test_flags_that_the_template_sets_are_refused(flag, submit, tmp_path):
    """Guards against a job that looks for its last checkpoint in the wrong place and is requeued for ever."""
    code, said, requeued = submit(TEMPLATES[0], "--train.seed=1", flag, python="true")
    assert (code, requeued) == (2, False)
    assert said == f"error: {flag}: set RUN and STEPS before sbatch instead; they tell, too, when the run is done\n"
    assert not (tmp_path / "requeued.srun").exists()


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_trains_to_the_end(template, submit, tmp_path, text_corpus_flags):
    """Guards against ranks that do not find each other, lost flags, and a finished run that is requeued."""
    flags = [flag for flag in (*TINY, *text_corpus_flags) if not flag.startswith("--train.steps")]
    code, said, requeued = submit(template, *flags)
    assert code == 0, said[-3000:]
    assert "2 x cpu" in said
    assert ("sharded by FSDP2" in said) == (template.stem == "fsdp2")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert not requeued


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signalled_job_saves_is_requeued_and_continues(number, submit, tmp_path, text_corpus_flags):
    """Guards against a job that is lost at its time limit or a preemption, or that starts over."""
    flags = [flag for flag in (*TINY, *text_corpus_flags) if not flag.startswith("--train.steps")]
    flags += ["--train.log_every=1", "--train.valid_every=1000000"]
    code, said, requeued = submit(TEMPLATES[0], *flags, steps=1_000_000, signal_ranks=number)
    assert code == 0 and requeued, said[-3000:]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    code, said, requeued = submit(TEMPLATES[0], *flags, steps=step + 2)
    assert code == 0 and not requeued, said[-3000:]
    assert f"resumed at step {step}" in said
