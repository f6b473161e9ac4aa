"""The commands that scripts suggest work as they are printed, from the folder where they are printed."""

import shlex
import shutil
from pathlib import Path

import pytest

from tiny import SCRIPTS, TINY, run_script

DATA = ("--data.corpus=file", "--data.path=some text.txt", "--data.cache_dir=cache")


def followed(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The scripts that the output names after `Next:`, each of which has succeeded with its arguments."""
    lines = capfd.readouterr().out.partition("Next:")[2].splitlines()
    names = []
    for python, script, *arguments in filter(None, map(shlex.split, lines)):
        if not python.startswith("charlm."):
            assert shutil.which(python)
            assert Path(script).resolve().parent == SCRIPTS
            assert run_script(Path(script).stem, *arguments) == 0
            names.append(Path(script).stem)
    return names


@pytest.mark.parametrize(
    ("text", "flags", "names"),
    [
        ("lower case only\n" * 40, ["--data.vocabulary=characters", "--model.context_length=3"], "evaluate generate"),
        ("-x -y\n" * 100, ["--model.context_length=1", "--run.dir=-a"], "evaluate generate"),
        ("世界 你好\n" * 60, ["--data.vocabulary=sentencepiece", "--run.dir=a 'run'"], "evaluate generate"),
        ("世界" * 99, ["--model.context_length=2"], "evaluate"),
        ("--- -\n" * 99, [], "evaluate"),
    ],
)
def test_after_training(text, flags, names, tmp_path, monkeypatch, capfd):
    """Guards against a prompt that the vocabulary or the context does not hold, or that is taken for an option; paths
    that the shell splits; scripts that are looked for in another folder."""
    monkeypatch.chdir(tmp_path)
    Path("some text.txt").write_text(text)
    assert run_script("train", *TINY, "--train.steps=1", *DATA, "--data.valid_fraction=0.2", *flags) == 0
    assert followed(capfd) == names.split()


def test_after_preparation(tmp_path, monkeypatch, capfd):
    """Guards against options of the text that the suggested training lacks."""
    monkeypatch.chdir(tmp_path)
    Path("some text.txt").write_text("a few words " * 40)
    assert run_script("prepare", *TINY, *DATA, "--run.dir=a run") == 0
    assert followed(capfd) == ["train"]


def test_after_export(run_on_disk, tmp_path, monkeypatch, capfd):
    """Guards against an exported model that is to be scored on a text which it cannot find."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_script("export", str(run_on_disk), "--to", "a model") == 0
    assert followed(capfd) == ["evaluate"]
