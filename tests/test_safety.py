"""The project runs no code but its own: its syntax trees hold nothing that makes code or arbitrary objects of data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("charlm", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "__import__"}
FORBIDDEN = {"torch.load", "torch.save", "torch.hub", "torch.serialization.load", "builtins.compile"}
FORBIDDEN |= {"os.system", "os.popen"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
UNSAFE_YAML |= {"Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader"}
FLAGS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def findings(source: str) -> Iterator[str]:
    """What must not be there, each with its line."""
    tree = ast.parse(source)
    names = dict(_imports(tree))
    safe_loads = _safe_loads(tree, names)
    for name in names.values():
        if not MODULES.isdisjoint(name.split(".")) or (_is_forbidden(name) and name != "yaml.load"):
            yield f"import of {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in safe_loads:
            if _is_forbidden(dotted := _dotted(node, names)):
                yield f"line {node.lineno}: {dotted}"
        elif isinstance(node, ast.Call) and _dotted(node.func, names) == "compile":  # a variable may be called so
            yield f"line {node.lineno}: compile"
        elif isinstance(node, ast.keyword) and node.arg in FLAGS and not _is(node.value, not FLAGS[node.arg]):
            yield f"line {node.value.lineno}: {node.arg}"


def _is_forbidden(dotted: str) -> bool:
    module, _, last = dotted.rpartition(".")
    return (
        (module in ("", "builtins") and last in BUILTINS)
        or dotted in FORBIDDEN
        or (module == "yaml" and last in UNSAFE_YAML)
    )


def _is(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that imports bind, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                yield bound, alias.name if alias.asname else bound
                yield f"import {alias.name}", alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`torch.load` for an expression that means it, by whatever name; a call or the like in front reads `?`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _safe_loads(tree: ast.AST, names: dict[str, str]) -> set[int]:
    """The `yaml.load` of calls whose loader makes plain values only."""
    safe = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        loaders = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader")]
        if [_dotted(loader, names) for loader in loaders] in (["yaml.SafeLoader"], ["yaml.BaseLoader"]):
            safe.add(id(call.func))
    return safe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_of_the_project_runs_data(path: Path) -> None:
    """Guards against a checkpoint, a config or a dataset of somebody else's that does as it likes."""
    assert list(findings(path.read_text(encoding="utf-8"))) == []


def test_all_files_are_looked_at() -> None:
    """Guards against a walk that finds nothing because it looks at nothing."""
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"charlm/runs/checkpoints.py", "scripts/benchmarks/worker.py", "scripts/train.py", "tests/tiny.py"} <= names


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "import os, marshal",
        "from pickle import loads",
        "from six.moves import cPickle",
        "import torch.utils.data, shelve",
        "def f():\n    import dill",
        "from joblib import load",
        "import cloudpickle",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import load",
        "from torch import load as read\nread('x')",
        "import torch\ntorch.save({}, 'x')",
        "import torch\ntorch.serialization.load('x')",
        "import torch\ntorch.hub.load('x', 'y')",
        "import torch\nf = torch.load",
        "eval('1')",
        "exec('x = 1')",
        "compile('1', 'x', 'eval')",
        "list(map(eval, ['1']))",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pick' + 'le')",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "import yaml\nyaml.load('x', Loader=yaml.UnsafeLoader)",
        "import yaml\nyaml.load('x', Loader=yaml.FullLoader)",
        "import yaml\nyaml.load('x')",
        "import yaml\nyaml.load_all('x', chosen)",
        "import yaml\nyaml.unsafe_load('x')",
        "from yaml import full_load\nfull_load('x')",
        "from yaml import UnsafeLoader\nclass Mine(UnsafeLoader): pass",
        "load_dataset('x', trust_remote_code=True)",
        "load_dataset('x', trust_remote_code=maybe)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "read('x', weights_only=False)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
    ],
)
def test_what_must_not_be_there_would_be_found(source: str) -> None:
    """Guards against a check that passes because it sees nothing."""
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "block.compile()",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)",
        "import json\njson.load(file)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.load('x', yaml.SafeLoader)",
        "import yaml\nyaml.load('x', Loader=yaml.BaseLoader)",
        "import yaml\nyaml.safe_load('x')",
        "import yaml\nclass Mine(yaml.BaseLoader): pass",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from safetensors.torch import load_file, save_file",
        "'pickle and eval in a text'",
        "import torch\ntorch.distributed.checkpoint.state_dict",
    ],
)
def test_what_is_harmless_is_not_found(source: str) -> None:
    """Guards against a check that forbids what only bears a name."""
    assert list(findings(source)) == []
