"""charlm as `pip install .` leaves it, and its command `charlm`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest

import charlm
from charlm.__main__ import Command
from launched import ON_CPU
from nano import write_nano
from tiny import SCRIPTS, TINY

ROOT = SCRIPTS.parent
SMALL = shlex.join([*TINY, "--model.ngrams=[]"])
TEXT = "--data.corpus=file --data.path=my.txt --data.cache_dir=cache"
LAUNCH = "python -m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 -m"
LINES = [
    f"charlm prepare {SMALL} {TEXT} --run.dir=prepared",
    f"charlm explain --config demo --config methods/keras {TEXT}",
    f"charlm train --config demo {SMALL} {TEXT} --run.dir=run --run.report=true",
    f"{LAUNCH} charlm train --config demo {SMALL} {TEXT} --run.dir=two",
    "charlm evaluate run --limit=100",
    "charlm generate run --prompt=a --length=5",
    "charlm lens run --to=lens.html --text=few.txt",
    "charlm report run --records-only -o page.html",
    "charlm export run --to exported",
    "charlm import nano --to imported",
    "charlm compress run few.txt -o few.clm",
    "charlm decompress run few.clm -o few.copy",
    f"charlm ablate --config demo {SMALL} {TEXT} --run.dir=rows --seeds=1 --row='a: --train.momentum=0'",
]


def run(line: str, folder: Path, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    """The finished command, which finds programs in `path` first, and charlm only where it is installed."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_CPU | environment
    environ["PATH"] = os.pathsep.join([*map(str, path), environ["PATH"]])
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environ, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    pytest.importorskip("pip")
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("charlm", "scripts", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    how = "wheel --quiet --no-index --no-deps --no-build-isolation"
    done = run(f"{sys.executable} -m pip {how} --wheel-dir {folder} {source}", folder)
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


@pytest.mark.slow
def test_the_wheel_holds_what_the_commands_need(wheel: Path) -> None:
    """Guards against a folder that the list of packages lacks, configs, styles or scripts that are left behind, and
    files of the checkout that nobody can use there."""
    expected = {f"charlm/{file.relative_to(ROOT / 'charlm')}" for file in (ROOT / "charlm").rglob("*.*")}
    expected |= {f"charlm/shipped/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    expected |= {f"charlm/shipped/scripts/{name}.py" for name in get_args(Command)}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in expected if "__pycache__" not in name}


@pytest.mark.slow
def test_every_command_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Guards against a command that finds its script, its config or its text only in a checkout, and suggestions that
    an installed charlm does not understand. Other packages are those of the tests."""
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    python, programs = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin"
    how = "install --quiet --no-index --no-deps"
    assert run(f"{sys.executable} -m pip --python {python} {how} {wheel}", tmp_path).returncode == 0
    work = tmp_path / "work"
    work.mkdir()
    (work / "my.txt").write_text("a few words " * 200)
    (work / "few.txt").write_text("a few words")
    write_nano(work / "nano")
    assert {line.partition("charlm ")[2].split()[0] for line in LINES} | {"env"} == {*get_args(Command)}
    for line in LINES:
        done = run(line, work, programs)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        suggested = [text for text in done.stdout.partition("Next:")[2].splitlines() if "push_to_hub" not in text]
        if line.startswith("charlm export"):
            suggested = []  # the text's place is another there
        for text in suggested:
            assert text.split()[0] == "charlm"
            assert run(text, work, programs).returncode == 0
    record = json.loads((work / "run" / "provenance.json").read_text())
    found = json.loads(run("charlm env --json", work, programs, CHARLM_CACHE="there").stdout)
    assert record["command"][:3] == ["charlm train", "--config", "demo"]
    assert record["versions"]["charlm"] == found["charlm"] == charlm.__version__
    assert record["git_commit"] is None is found["git_commit"]
    assert found["variables"]["CHARLM_CACHE"] == "there" and found["python"] == str(python)


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ("--version", 0, f"charlm {charlm.__version__}\n", ""),
        ("--help", 0, "usage: charlm [-h] [--version] COMMAND", ""),
        ("explain --help", 0, "usage: charlm explain [--config FILE ...]", ""),
        ("", 2, "", "error: the following arguments are required: COMMAND"),
        ("trian", 2, "", "error: command=trian: should be 'prepare'"),
        ("--verison", 2, "", "error: unrecognized arguments: --verison; did you mean --version"),
        ("explain --confg x", 2, "", "error: unrecognized arguments: --confg; did you mean --config"),
        ("explain --config dmeo", 2, "", "error: config file dmeo does not exist; did you mean demo?"),
    ],
)
def test_the_command_line(words: str, code: int, out: str, err: str, tmp_path: Path) -> None:
    """Guards against a traceback or a silent success where a command is missing, mistyped or only asked about."""
    done = run(f"{sys.executable} -m charlm {words}", tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout[: len(out)], done.stderr[: len(err)]) == (code, out, err)
    assert bool(done.stdout) == bool(out) and bool(done.stderr) == bool(err)
