"""Completion in a shell: what it offers, and that it runs nothing else."""

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import SCRIPTS, run_script

SCRIPT_NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_what_is_offered_is_what_help_lists(name, capsys, monkeypatch) -> None:
    """Guards against an option that is offered and not accepted, one that is left out, and choices of another."""
    assert run_script(name, "--print-completion") == 0
    offered = dict(line.partition("=")[::2] for line in capsys.readouterr().out.split("\n") if line)
    monkeypatch.setenv("COLUMNS", "100")
    assert run_script(name, "--help") == 0
    rows = re.findall(r"^[│ ] (?:-\w(?: \w+)?, )?(--[a-z][\w.-]*)(?: (\S+))?", capsys.readouterr().out, re.MULTILINE)
    assert offered.keys() == {flag for flag, _ in rows}
    for flag, metavar in rows:
        choices = re.fullmatch(r"\[?\{([\w,-]+)\}(,\.\.\.\])?(\|null)?", metavar)
        if choices:
            assert offered[flag].split() == choices[1].split(","), flag
        elif "PATH" in metavar:
            assert offered[flag] == "/", flag


class Shell:
    """An interactive shell in a terminal, with completion.sh sourced."""

    def __init__(self, command: list[str], folder: Path):
        child, self.terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb", "HOME": str(folder), "INPUTRC": os.devnull})
        self.child = child
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 500, 0, 0))
        self.type(
            f"PS1='READY ' PATH={Path(sys.executable).parent}:$PATH; source {SCRIPTS}/completion.sh\n", "\nREADY "
        )

    def type(self, keys: str, until: str) -> str:
        """What the terminal shows after `keys`, once it shows `until`."""
        os.write(self.terminal, keys.encode())
        shown = ""
        while until not in shown:
            assert select.select([self.terminal], [], [], 60)[0], f"no {until!r} in {shown!r}"
            shown += os.read(self.terminal, 4096).decode(errors="replace").replace("\r", "")
        return shown

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.child, 0)


@pytest.fixture(scope="module", params=["bash --norc --noprofile -i", "zsh -f -i"], ids=["bash", "zsh"])
def shell(request, tmp_path_factory) -> Iterator[Shell]:
    command = request.param.split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    folder = tmp_path_factory.mktemp("folder")
    (folder / "scripts").symlink_to(SCRIPTS)
    (folder / "settings.yaml").touch()
    (folder / "train.py").write_text("open('ran', 'w')")
    shell = Shell(command, folder)
    shell.folder = folder
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("python scripts/train.py --train.mixed_p\tb\t", "python scripts/train.py --train.mixed_precision=bf16 "),
        ("python scripts/train.py --train.mixed_precision b\t", "--train.mixed_precision bf16 "),
        ("python scripts/train.py --config set\t--run.res", "--config settings.yaml --run.res"),
        ("python scripts/evaluate.py runs/x --spl\tt\t--all\t--js\t", "runs/x --split=test --all-layers --json "),
        ("accelerate launch --multi_gpu scripts/train.py --aux.tas\t", "scripts/train.py --aux.tasks="),
        ("python set\t", "python settings.yaml "),
    ],
)
def test_a_line_is_completed(shell, typed, completed) -> None:
    """Guards against values that repeat their option, a space after `=` or none after a word, and a lost file name."""
    shell.type(typed, completed)
    shell.type("\x15\n", "READY ")


def test_nothing_but_our_scripts_is_run(shell) -> None:
    """Guards against somebody else's train.py that trains when the tab key is pressed."""
    shell.type("python train.py --config\t", "--config")
    shell.type("\x15\n", "READY ")
    shell.type("python scripts/train.py --run.di\t", "--run.dir=")
    shell.type("\x15\n", "READY ")
    assert not (shell.folder / "ran").exists()
