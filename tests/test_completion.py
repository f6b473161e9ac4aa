"""Completion in a shell: what argcomplete offers for a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import SCRIPTS


def offered(line: str, folder: Path) -> set[str]:
    """The words that may stand at the end of a line of bash, which calls a script as a program or by a launcher."""
    out = folder / "out"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_WORDBREAKS": " ",
    }
    (script,) = [word for word in line.split() if word.endswith(".py")]
    subprocess.run([sys.executable, SCRIPTS / script], cwd=folder, env=environment, capture_output=True, timeout=120)
    return set(out.read_text().replace("\\", "").split("\n"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.py --train.mixed_p", {"--train.mixed_precision "}),
        ("train.py --train.mixed_precision ", {"fp32", "bf16", "fp16", "auto"}),
        ("train.py --train.mixed_precision=b", {"--train.mixed_precision=bf16"}),
        ("train.py --run.tracker tens", {"tensorboard "}),
        ("train.py --run.resume ", {"true", "false"}),
        ("train.py --config set", {"settings.yaml "}),
        ("evaluate.py runs/x --spl", {"--split "}),
        ("evaluate.py runs/x --split t", {"test "}),
        ("compress.py --no", {"--no-verify "}),
        ("accelerate launch --config_file x.yaml train.py --train.mixed_p", {"--train.mixed_precision "}),
        ("torchrun --nproc_per_node=2 train.py --train.seed=3 --run.resume ", {"true", "false"}),
    ],
)
def test_a_line_is_completed(line: str, words: set[str], tmp_path: Path) -> None:
    """Guards against options and words that are not offered, and a script that does its work when it is asked."""
    (tmp_path / "settings.yaml").touch()
    assert {word.strip() for word in offered(line, tmp_path)} == {word.strip() for word in words}
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml", "out"}


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_marked(script: Path) -> None:
    """Guards against a script that argcomplete does not take for one that answers."""
    assert "PYTHON_ARGCOMPLETE_OK" in script.read_text()[:1024]
