"""The project runs no code but its own: nothing in it turns data into code or arbitrary objects.

ruff's rules find most of that (pyproject.toml), and `make lint` applies them; arguments are searched for here.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("charlm", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
ARGUMENTS = re.compile(
    r"(trust_remote_code|allow_pickle) ?= ?(?!False)|weights_only ?= ?(?!True)|__import__|(?<![\w.])(?<!def )compile\("
)
FORBIDDEN = """
import pickle
import marshal
import shelve
import joblib
import cloudpickle
from six.moves import cPickle
from joblib import load
torch.load("x", weights_only=True)
torch.save({}, "x")
torch.hub.load("x", "y")
read_all = torch.load
eval("1")
exec("x = 1")
list(map(builtins.eval, ["1"]))
yaml.load("x", yaml.Loader)
yaml.load("x", Loader=yaml.UnsafeLoader)
yaml.load("x", Loader=yaml.FullLoader)
yaml.load_all("x", chosen)
yaml.unsafe_load("x")
subprocess.run("ls", shell=True)
os.system("ls")
os.popen("ls")
"""


def ruff(source: str) -> list[int]:
    """The lines of a file of the package in which ruff finds something it forbids."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=S,TID251", "--output-format=concise",
         "--stdin-filename=charlm/x.py", "-"],
        input=source, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return sorted({int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("charlm/x.py:")})


def test_ruff_finds_what_is_forbidden() -> None:
    """Guards against rules that are switched off, or see nothing."""
    imports = "import builtins, os, subprocess, torch, yaml"
    assert ruff(imports + FORBIDDEN) == list(range(2, 2 + len(FORBIDDEN.split("\n")[1:-1])))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_argument_lets_data_run(path: Path) -> None:
    """Guards against a checkpoint or a dataset of a stranger's that does as it likes."""
    if path != Path(__file__).resolve():
        assert ARGUMENTS.findall(path.read_text(encoding="utf-8")) == []
