"""The training loop, and the files of a run."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

import charlm
from charlm.data.corpus import load_corpus
from charlm.data.windows import training_windows
from charlm.objective.build import build_objective
from charlm.objective.objective import Objective
from charlm.runs.folder import Run
from charlm.training import loop
from launched import TORCHRUN, launch
from storage import steps
from tiny import SCRIPTS, TINY, refused, train, training_rows, typed

CONFIGS = SCRIPTS.parent / "configs"
FLAGS = [
    *TINY,
    *typed("--model.num_layers=3 --model.d_model=32 --model.d_ff=64 --train.steps=60 --train.log_every=1"),
    *typed("--train.valid_every=20 --train.valid_symbols=500"),
]


@pytest.mark.parametrize(("positions", "layers", "targets"), list(itertools.product(["true", "false"], repeat=3)))
def test_every_combination_of_the_losses_trains(positions, layers, targets, tmp_path, text_corpus_flags):
    """Guards against a switch that breaks training or leaves its rows in the run."""
    switches = typed(
        f"--aux.positions.enabled={positions} --aux.layers.enabled={layers} --aux.targets.enabled={targets}"
    )
    run = train(*FLAGS, *text_corpus_flags, *switches, f"--run.dir={tmp_path / 'run'}")
    rows = training_rows(run)
    names = list(rows[0]["terms"])
    assert all(name.endswith("all" if positions == "true" else "last") for name in names)
    assert any(name.startswith("layer1/") for name in names) == (layers == "true")
    assert any("offset2" in name for name in names) == (targets == "true")
    first, last = (sum(row["bits_per_character"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < first - 0.1
    # Layer 1 of 3 stops at 1/6 and layer 2 at 2/6 of 60 steps: the updates after 10 and 20 completed ones lack them.
    for layer, last_step in (("layer1/", 10), ("layer2/", 20), ("layer3/", 60)):
        steps = [row["step"] for row in rows if any(name.startswith(layer) for name in row["terms"])]
        assert steps == list(range(1, last_step + 1 if layers == "true" or layer == "layer3/" else 1))


def test_the_first_step_is_what_the_config_says(tmp_path, text_corpus_flags):
    """Guards against a loop that combines windows, initialisation, weights, update or learning rate wrongly. A step of
    SGD without momentum is computed by hand, from two micro-batches."""
    flags = [
        *FLAGS,
        *text_corpus_flags,
        *typed("--train.steps=1 --train.optimizer=sgd --train.momentum=0 --train.learning_rate=0.5"),
        *typed("--train.micro_batch_size=3 --train.matmul_precision=highest --train.seed=7 --aux.reduction=mean"),
    ]
    config = charlm.load_config(overrides=[*flags, f"--run.dir={tmp_path / 'run'}"])
    trained = charlm.load(charlm.train(config), "last", device="cpu")
    torch.manual_seed(7)
    objective = build_objective(config, 256)
    ids = load_corpus(config.data).splits["train"].ids
    windows = torch.from_numpy(training_windows([ids], seed=7, step=0, batch_size=4, window_length=18))
    report = objective(windows, 0.0)
    report.total.backward()
    expected = {
        name: parameter - 0.5 * parameter.grad if parameter.grad is not None else parameter
        for name, parameter in objective.transformer.named_parameters()
    }
    for name, parameter in trained.transformer.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
    head = objective.heads.exits["layer3"]["offset1"]
    torch.testing.assert_close(trained.heads.exits["layer3"]["offset1"].weight, head.weight - 0.5 * head.weight.grad)
    (row,) = [row for row in Run.open(tmp_path / "run").metrics() if "terms" in row]
    # Untrained heads are uniform: three layers, averaged, of ln 256 + ln 256 / 2 each.
    assert row["loss"] == pytest.approx(1.5 * math.log(256), rel=1e-6)
    assert row["terms"]["layer2/offset2/all"] == {"loss": pytest.approx(math.log(256)), "weight": pytest.approx(1 / 6)}


def test_windows_grow_to_the_full_context(tmp_path, text_corpus_flags, monkeypatch):
    """Guards against short windows that stay or end at another step, or change how many characters a step sees."""
    shapes = []
    forward = Objective.forward
    monkeypatch.setattr(
        Objective,
        "forward",
        lambda self, windows, *more: shapes.append(windows.shape) or forward(self, windows, *more),
    )
    growing = ["--train.steps=5", "--train.context_divisor=4", "--train.full_context_from=0.6"]
    flags = [*FLAGS, *text_corpus_flags, *growing, "--train.micro_batch_size=2", f"--run.dir={tmp_path / 'run'}"]
    train(*flags)
    assert shapes == [(8, 4 + 2)] * 2 * 3 + [(2, 16 + 2)] * 2 * 2


GROWING = typed("--train.context_divisor=4 --train.full_context_from=0.45")
THREE_EPOCHS = {
    "one process": ("", [sys.executable], []),
    "stops": ("3,4,11", [sys.executable], ["--train.micro_batch_size=4"]),
    "two processes, stops": ("2,9", TORCHRUN, []),
    "growing windows": ("5,13", [sys.executable], GROWING),
    "growing windows, two processes": ("7", TORCHRUN, GROWING),
}
"""Steps after which the run is stopped, how it is started, and flags."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "growing windows" else pytest.mark.slow) for case in THREE_EPOCHS]
)
def test_three_epochs_read_everything_three_times(case, tmp_path):
    """Guards against windows that depend on stops, on processes or micro-batches: in 20 steps of 6 windows of 16, 40
    windows that stand side by side come three times, once in each epoch; windows of 4 read the same."""
    stops, launcher, flags = THREE_EPOCHS[case]
    text = bytes(random.Random(0).choices(range(256), k=660 + 2 * 66))  # every window occurs once
    (tmp_path / "text").write_bytes(text)
    flags = [*TINY, *flags, *typed("--train.steps=20 --train.batch_size=6 --data.order=epochs --run.auto_resume=true")]
    flags += typed("--data.corpus=file --data.as_is=true --data.valid_fraction=0.08334 --data.test_fraction=0.08334")
    flags += [f"--data.path={tmp_path / 'text'}", f"--data.cache_dir={tmp_path}", f"--run.dir={tmp_path / 'run'}"]
    done = launch([*launcher, SCRIPTS.parent / "tests/training/train_and_note.py", tmp_path, stops, *flags])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resumed at step") == len(stops.split(",")) * bool(stops)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 1 + (launcher is TORCHRUN)
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    windows = [ids for _, ids in sorted(rows, key=lambda row: row[0])]  # of a step, by process
    starts = [text.index(bytes(ids)) for ids in windows]
    read = [symbol for start, ids in zip(starts, windows, strict=True) for symbol in range(start, start + len(ids) - 2)]
    assert len(read) == 3 * 640
    strides = Counter()
    for epoch in (read[:640], read[640:1280], read[1280:]):
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 640))
        strides.update((symbol - min(epoch)) // 16 for symbol in epoch)
    assert strides == dict.fromkeys(range(40), 3 * 16)


def test_a_run_records_what_it_was_made_from(tmp_path, text_corpus_flags):
    """Guards against a run folder without provenance, that cannot be reloaded, or that contains pickle."""
    config = charlm.load_config(overrides=[*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"])
    run = Run.open(charlm.train(config))
    assert run.config() == config
    provenance = run.provenance()
    assert provenance["corpus"] == load_corpus(config.data).model_dump()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CONFIGS, capture_output=True, text=True).stdout.strip()
    assert (provenance["git_commit"] or "").removesuffix("-dirty") == head
    assert provenance["versions"]["torch"] == torch.__version__
    assert {path.suffix for path in run.path.rglob("*") if path.is_file()} <= {
        ".yaml", ".json", ".jsonl", ".safetensors", ".png", ""
    }  # fmt: skip
    rows = list(run.metrics())
    assert [row["step"] for row in rows if "valid" in row] == [20, 40, 60]
    best = min((row for row in rows if "valid" in row), key=lambda row: row["valid"]["bits_per_character"])
    assert (run.checkpoints_path / "best").read_text().strip() == f"step-{best['step']:08d}"
    assert json.loads((run.checkpoints_path / "step-00000060" / "state.json").read_text())["step"] == 60
    kept = sorted(path.name for path in run.checkpoints_path.glob("step-*"))
    assert kept == ["step-00000040", "step-00000060"], "keep_checkpoints is 2"


@pytest.mark.parametrize("config_file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs_at_another_size(config_file, tmp_path, text_corpus_flags, capfd, monkeypatch):
    """Guards against a config that assumes its own length or depth, and against attention that is unfused silently."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    smaller = ["--model.num_layers=2", "--model.d_model=32", "--model.d_ff=64", "--model.context_length=16"]
    smaller += ["--model.ngram_buckets=64", "--train.compile=no"]  # compiling takes longer than the rest
    flags = [*smaller, "--train.steps=60", "--train.batch_size=4", "--train.valid_symbols=200", *text_corpus_flags]
    config = charlm.load_config(config_file, [*flags, f"--run.dir={tmp_path / 'run'}"])
    run = Run.open(charlm.train(config))
    rows = list(run.metrics())
    last = rows[-1]
    assert (last["step"], last["progress"]) == (60, 1.0)
    assert [row["step"] for row in rows if "terms" in row] == list(range(1, 61)), "too few rows to see the loss fall"
    assert 0 < last["valid"]["bits_per_character"] < 8.5
    assert ("attention unfused" in capfd.readouterr().err) == (config.model.attention_dropout > 0)


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ("--train.micro_batch_size=auto", "train.micro_batch_size"),
        ("--train.batch_size=1000000000000", "train.batch_size"),
    ],
)
def test_refusals_come_before_anything_is_written(flags, option, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against an incomplete run folder that blocks the corrected command."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with refused(option):
        train(*FLAGS, *text_corpus_flags, *typed(flags), f"--run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_parameters_that_are_not_finite_are_not_saved(values, tmp_path, text_corpus_flags, monkeypatch):
    """Guards against a broken checkpoint that takes the place of a good one, and against numbers that cancel out."""
    plain = loop.take_snapshot

    def broken_at_40(*arguments):
        snapshot = plain(*arguments)
        if snapshot.state["step"] == 40:
            snapshot.model["transformer.embedding.weight"].view(-1)[: len(values)] = torch.tensor(values)
        return snapshot

    monkeypatch.setattr("charlm.training.loop.take_snapshot", broken_at_40)
    run = train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.keep_checkpoints=3")
    assert steps(Run(run)) == [20, 60]
