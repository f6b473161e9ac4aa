"""Nothing heavy is imported before the arguments are understood, and every imported package is declared."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

import charlm

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "numpy", "accelerate", "datasets", "matplotlib", "sentencepiece"}
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def test_importing_charlm_loads_nothing_heavy() -> None:
    """Guards against an import in charlm/__init__.py that makes every command slow to answer."""
    program = "import sys, charlm, charlm.cli; charlm.load_config(); print(*sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert HEAVY.isdisjoint(printed.split())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [["--help"], ["RUN", "--no-such-option"]], ids=["help", "wrong"])
def test_script_answers_before_heavy_imports(script: str, arguments: list[str], tmp_path: Path) -> None:
    """Guards against torch being imported before the arguments are understood, and help wider than a terminal."""
    if "compress" in script and "RUN" in arguments:  # a positional argument that is missing is named first
        arguments = ["RUN", "FILE", "--no-such-option"]
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "scripts" / script), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )
    message, _, modules = done.stderr.rpartition("MODULES")
    assert HEAVY.isdisjoint(modules.split())
    if arguments == ["--help"]:
        assert (done.returncode, message) == (0, "")
        usage, *lines = done.stdout.splitlines()
        assert usage.startswith("usage: ") and max(map(len, lines)) <= 80
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert message.startswith("error: ")
        assert "--no-such-option" in message
        assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_public_names() -> None:
    """Guards against a name in __all__ whose home has moved, and a public function without a docstring."""
    assert dir(charlm) == charlm.__all__
    for name in charlm.__all__:
        assert getattr(charlm, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = charlm.nothing


def test_every_imported_package_is_declared_and_pinned() -> None:
    """Guards against a package that the tests' machine happens to have, and one that is installed unpinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w-]+", dependency)[0] for dependency in dependencies}
    files = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-hf.txt")]
    lines = [line.partition("#")[0].strip() for file in files for line in file.splitlines()]
    assert declared <= dict(line.split("==") for line in lines if line).keys()
    sources = "\n".join(path.read_text() for path in (ROOT / "charlm").rglob("*.py"))
    modules = set(re.findall(r"^ *(?:import|from) (\w+)(?:[\w.]* import)?", sources, re.M))
    installed = packages_distributions()
    packages = {name for module in modules for name in installed.get(module, [])}
    assert {name.lower() for name in packages} - {"charlm"} <= declared
