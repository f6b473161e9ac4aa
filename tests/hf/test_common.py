"""transformers' own tests of causal models, which are in its source distribution and not in its wheel.

It has `ModelTesterMixin`. `GenerationTesterMixin` is in the repository alone: name the folder `tests` of a checkout in
TRANSFORMERS_TESTS to run that too. Without it, the table of test_transformers.py stands for it.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("transformers", reason="not installed, see requirements-hf.txt")
pytest.importorskip("parameterized", reason="not installed, see requirements-hf.txt")

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "generation/test_utils.py": "GenerationTesterMixin",
    "exporters/test_export.py": "ExportTesterMixin ExportGenerateTesterMixin",
}
"""Modules that the source distribution lacks, with the classes that its others import; no test of them is run."""


@pytest.fixture
def library_tests(tmp_path) -> Path:
    """A folder with the library's tests as the package `tests`."""
    package = tmp_path / "library" / "tests"
    if given := os.environ.get("TRANSFORMERS_TESTS"):
        shutil.copytree(given, package, ignore=lambda folder, names: ["models"] if folder == given else [])
    else:
        wanted = f"transformers=={version('transformers')}"
        how = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--quiet", "--dest", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *how, wanted], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"the source of {wanted} cannot be had: {done.stderr.strip()[-200:]}")
        (archive,) = tmp_path.glob("transformers-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path / "source", filter="data")
        shutil.copytree(next((tmp_path / "source").glob("*/tests")), package)
    for path, names in STUBS.items():
        if path.startswith("exporters") or not (package / path).exists():
            (package / path).parent.mkdir(exist_ok=True)
            (package / path).write_text("".join(f"class {name}: pass\n" for name in names.split()))
    for folder in (package, *(package / path for path in ("generation", "exporters"))):
        (folder / "__init__.py").touch()
    return package.parent


@pytest.mark.slow
def test_the_library_s_tests_pass(library_tests):
    """Guards against a model that loads, and then breaks what the library's users do: saving and loading, devices, meta
    tensors, types, batches, losses, caches. What does not apply is listed in common_suite.py, with the reason."""
    (library_tests / "pytest.ini").write_text("[pytest]\n")
    report = library_tests / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "no:cacheprovider", "-W", "ignore",
         f"--junitxml={report}", str(Path(__file__).with_name("common_suite.py"))],
        cwd=library_tests, capture_output=True, text=True, timeout=1800,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(library_tests), str(ROOT), *sys.path[1:]])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    passed = [case for case in cases if case.find("skipped") is None]
    assert len(passed) > 120, f"only {len(passed)} of {len(cases)} tests ran"
