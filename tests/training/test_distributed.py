"""Two CPU processes against one: they learn the same, as replicas or in shards, whatever the losses and their route."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from charlm.config.errors import shown
from charlm.config.load import settings_of
from launched import register_documented_task, train_with_two_processes
from tiny import SCRIPTS, TINY, checkpoint_folder, losses, train, training_rows, typed

FLAGS = [
    *TINY,
    *typed("--model.num_layers=4 --model.d_model=32 --model.d_ff=64 --train.steps=80 --train.batch_size=6"),
    *typed("--train.matmul_precision=highest --train.log_every=1 --train.valid_every=0.5 --train.clip_norm=1"),
]
SGD = typed("--train.optimizer=sgd --train.learning_rate=0.003")
UNEVEN = typed(
    "--train.batch_size=5 --train.micro_batch_size=2"
)  # 3 + 2 windows: one process accumulates, the other not
GROWING = typed("--train.context_divisor=4 --train.full_context_from=0.5")
SHARDED = ["--train.sharding=fsdp2"]
LAST_POSITION = typed("--aux.positions.schedule=cutoff --aux.positions.end=0.3")
ROUTE = [
    *typed("--train.steps=30 --train.optimizer=sgd --train.learning_rate=0.03 --train.momentum=0.9"),
    *typed("--aux.layers.schedule=linear --aux.layers.end=0.8"),
]
ROUTES = {
    "relay": ["--aux.route=relay"],
    "pairwise": ["--aux.route=pairwise"],
    "multiway": ["--aux.route=multiway"],
    "multiway-common": ["--aux.route=multiway", "--aux.step_sizes=common"],
}
SPLITS = {
    "even": [],
    "accumulated": ["--train.micro_batch_size=1"],
    "uneven": [*UNEVEN, "--train.clip_norm=0", "--model.ngrams=[2]"],
}
OWN = [
    *typed("--train.steps=30 --train.micro_batch_size=2 --model.context_length=32"),
    *typed("--aux.hedge.enabled=true --aux.hedge.beta=0.9 --aux.layers.hinge=2.5"),
    "--aux.tasks={order: {weight: 0.5, layer: 2, schedule: cutoff, end: 0.8}}",
]
GROUPS: dict[str, dict[str, list[str]]] = {
    "core": {  # these run in `make test` too
        "sgd-uneven": [*SGD, *UNEVEN],
        "ngrams": [*GROWING, "--model.ngrams=[2,3]"],
        "ema": ["--train.average=ema", "--train.average_every=3", "--train.weight_decay=0.1"],
        "last-position": [*LAST_POSITION, "--train.micro_batch_size=1"],
    },
    "replicas": {
        "adamw-accumulated": ["--train.micro_batch_size=2"],
        "sgd": SGD,
        "sgd-accumulated": [*SGD, "--train.micro_batch_size=1"],
        "ngrams": [*GROWING, "--model.ngrams=[2,3]"],
        "ngrams-dense": [*UNEVEN, "--model.ngrams=[2,3]", "--model.ngram_buckets=64"],
        "epochs": [*GROWING, *UNEVEN, "--data.order=epochs"],
    },
    "shards": {
        "adamw": [*SHARDED, "--train.weight_decay=0.1", "--model.d_ff=65"],  # rows that cannot be shared evenly
        "accumulated": [
            *(*SHARDED, *LAST_POSITION),
            *typed("--train.micro_batch_size=2 --train.activation_checkpointing=true"),
        ],
        "pre-norm": [*SHARDED, *GROWING, "--model.norm=pre", "--model.position_encoding=rotary"],
        "sgd": [*SHARDED, *SGD, *typed("--train.average=tail --train.average_tail=0.7 --train.average_every=3")],
        "ngrams": [*SHARDED, *GROWING, "--model.ngrams=[2,3]"],
        "ngrams-dense": [*SHARDED, *SGD, "--model.ngrams=[2]", "--model.ngram_buckets=64"],
        "muon": [*SHARDED, "--train.optimizer=muon", "--train.learning_rate=0.003", "--train.steps=40"],
    },
    "routes": {f"{route}-{split}": [*ROUTE, *ROUTES[route], *SPLITS[split]] for route in ROUTES for split in SPLITS},
    "heads": {
        f"{head}-{way}": [*OWN, f"--aux.layers.head={head}", f"--train.sharding={way}"]
        for head in ("shared", "shared_frozen", "tower")
        for way in ("no", "fsdp2")
    },
    "presets": {
        preset.stem: [
            *["--model.num_layers=6", "--train.steps=20", "--train.clip_norm=0"],
            *(f"--{name}={shown(setting.value)}" for name, setting in settings_of([preset], {}).items()),
            "--aux.layers.tower_dropout=0",  # two processes draw other noise
        ]
        for preset in sorted((SCRIPTS.parent / "configs" / "methods").glob("*.yaml"))
    },
}


def flags_of(group: str, name: str, folder: Path, corpus: list[str]) -> list[str]:
    short = ["--train.steps=40"] if group == "core" else []
    return [*FLAGS, *short, *corpus, *GROUPS[group][name], f"--run.dir={folder / name}"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, text_corpus_flags) -> Callable[[str], Path]:
    """`two_processes(group)`: the folder of the group's runs, made by two processes that torchrun starts once."""
    folders: dict[str, Path] = {}

    def run(group: str) -> Path:
        if group not in folders:
            folder = folders[group] = tmp_path_factory.mktemp(group)
            runs = [flags_of(group, name, folder, text_corpus_flags) for name in GROUPS[group]]
            said = train_with_two_processes(folder / "plan.json", runs)
            assert said.count("sharded by FSDP2") == sum("--train.sharding=fsdp2" in flags for flags in runs)
        return folders[group]

    return run


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of a checkpoint."""
    path = checkpoint_folder(run, step)
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=[] if group == "core" else pytest.mark.slow, id=f"{group}-{name}")
        for group in GROUPS
        for name in GROUPS[group]
    ],
)
def test_two_processes_learn_what_one_does(group, name, two_processes, tmp_path, text_corpus_flags):
    """Guards against losses or gradients that are scaled, averaged or clipped wrongly, of a shard or of some
    micro-batches only; silent heads that fail or still move; rows of n-grams that are lost on the way or move unread;
    text, terms, layer weights and checkpoints that depend on the number of processes."""
    register_documented_task(tmp_path)
    run = two_processes(group) / name
    whole = ["--train.micro_batch_size=null"] if group == "routes" else []
    alone = train(*flags_of(group, name, tmp_path, text_corpus_flags), *whole)
    one, two = training_rows(alone), training_rows(run)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["terms"].keys() for row in two] == [row["terms"].keys() for row in one]
    # The order of additions moves Muon, which orthogonalises in bf16, and rows with tiny gradients, which are divided
    # by their own size: one process that splits its batch otherwise is as far away.
    tolerance = 5e-3 if name in {"muon", "ngrams-dense", "multiway-common-uneven"} else 1e-5
    assert losses(run) == pytest.approx(losses(alone), rel=tolerance)
    assert two[-1]["bits_per_character"] < two[0]["bits_per_character"]

    end, middle = len(two), len(two) // 2
    expected, found = tensors(alone, end), tensors(run, end)
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }
    if group == "heads":
        torch.testing.assert_close(found["hedge.weights"], expected["hedge.weights"], rtol=1e-5, atol=0)
    if group in ("core", "replicas", "shards"):
        tables = [key for key in found if re.fullmatch(r".*ngram_embedding\.tables\.\d\.weight", key)]
        for key in (f"{table}.mean_square" for table in tables):  # rows that no batch read stay at zero
            assert torch.equal(found[key].any(dim=1), expected[key].any(dim=1))
            assert name == "ngrams-dense" or not found[key].any(dim=1).all()
        # The heads of layers 1, 2 and 3 of 4 fall silent at progress 1/8, 2/8 and 3/8.
        before = tensors(run, middle)
        silent = [key for key in before if key.startswith("heads.exits.") and "layer4" not in key]
        assert silent and all(torch.equal(before[key], found[key]) for key in silent)
        assert not torch.equal(before["heads.exits.layer4.offset1.weight"], found["heads.exits.layer4.offset1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("route", "sharding"), [("joint", "fsdp2"), ("multiway", "no")])
def test_a_run_moves_from_one_process_to_two_and_back(route, sharding, tmp_path, text_corpus_flags):
    """Guards against a checkpoint that can be continued only in the way it was written."""
    flags = [*FLAGS, *SGD, *text_corpus_flags, f"--aux.route={route}", "--train.average=ema", "--model.ngrams=[2]"]
    flags += ["--train.valid_every=20", "--train.keep_checkpoints=9", "--model.head_bias=false"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    moved = shutil.copytree(whole, tmp_path / "moved")
    flags += [f"--run.dir={moved}"]
    there = [[*flags, f"--train.sharding={sharding}", "--run.resume_from=20"]]
    there += [[*flags, "--train.sharding=no", "--run.resume_from=40"]]
    train_with_two_processes(tmp_path / "plan.json", there)
    train(*flags, "--run.resume_from=60")
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    assert json.loads((checkpoint_folder(moved, 60) / "state.json").read_text())["processes"] == 2
