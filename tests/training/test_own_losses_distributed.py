"""Other kinds of heads, learned layer weights and a task of the user's own, on two processes against one."""

import json
import re
import sys
from pathlib import Path

import pytest

from charlm.runs.checkpoints import find_checkpoint
from charlm.runs.folder import Run
from launched import TORCHRUN, launch
from tiny import TINY

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
FLAGS = [
    *TINY,
    "--model.num_layers=3",
    "--train.steps=30",
    "--train.batch_size=6",
    "--train.optimizer=adamw",
    "--train.micro_batch_size=2",
    "--train.clip_norm=1",
    "--train.matmul_precision=highest",
    "--train.valid_every=15",
    "--train.log_every=1",
    "--model.context_length=32",
    "--aux.hedge.enabled=true",
    "--aux.hedge.beta=0.9",
    "--aux.layers.hinge=2.5",
    "--aux.tasks={order: {weight: 0.5, layer: 2, schedule: cutoff, end: 0.8}}",
]
SETTINGS = {
    "shared": ["--aux.layers.head=shared"],
    "shared-shards": ["--aux.layers.head=shared", "--train.sharding=fsdp2"],
    "frozen-shards": ["--aux.layers.head=shared_frozen", "--train.sharding=fsdp2"],
    "tower": ["--aux.layers.head=tower", "--aux.layers.tower_width=5"],
    "tower-shards": ["--aux.layers.head=tower", "--train.sharding=fsdp2"],
}
TRAIN_ALL = """
    import json, sys
    for flags in json.loads(sys.argv[1]):
        charlm.train(charlm.load_config(overrides=flags))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_corpus_flags) -> Path:
    """A folder with the runs of all settings, made by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    (code,) = re.findall(r"<!-- order\.py -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (folder / "train_all.py").write_text(code[: code.index("    cli.script")] + TRAIN_ALL)
    for number, launcher in (("one", (sys.executable,)), ("two", TORCHRUN)):
        flags = [
            [*FLAGS, *text_corpus_flags, *own, f"--run.dir={folder / number / name}"] for name, own in SETTINGS.items()
        ]
        done = launch([*launcher, folder / "train_all.py", json.dumps(flags)], PYTHONPATH=str(DOCUMENT.parents[1]))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("sharded by FSDP2") == (3 if number == "two" else 0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_learn_what_one_does(name, runs):
    """Guards against faults in shards or replicas of shared parameters, gradients of frozen ones, a reducer that waits
    for a task, and layer weights that each process learns from its own losses."""
    found = [Run.open(runs / number / name) for number in ("one", "two")]
    one, two = ([row for row in run.metrics() if "terms" in row] for run in found)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert len(two[-1]["terms"]) < len(two[0]["terms"]), "nothing fell silent: the test would prove nothing"
    weights = [find_checkpoint(run, "last").tensors()["hedge.weights"].tolist() for run in found]
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
    assert max(weights[0]) > 1.002 * min(weights[0])
