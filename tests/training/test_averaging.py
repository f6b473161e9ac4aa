"""Averages of the weights, against plain means of the weights of every step."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import charlm
from charlm.config import TrainConfig
from charlm.training.optimizers import decay_of
from launched import train_with_two_processes
from tiny import TINY, assert_ended_like, checkpoint_folder, history, refused, run_script, train, typed

STEPS = 12
FLAGS = [
    *TINY,
    *typed(f"--train.steps={STEPS} --train.valid_every=1 --train.keep_checkpoints=100 --train.learning_rate=0.01"),
    *typed("--model.ngrams=[2] --model.ngram_buckets=64"),
    "--train.matmul_precision=highest",  # its validations score as `evaluate` does
]


def raw(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folder(run, step) / "model.safetensors")


def averaged(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint that belong to an average, without its words in their names."""
    tensors = load_file(checkpoint_folder(run, step) / "optimizer.safetensors")
    named = {name: own for name, own in tensors.items() if name.startswith("average/")}
    return {name.removeprefix("average/").removesuffix(".mean"): own for name, own in named.items()}


def test_factors_by_hand():
    """Guards against a decay counted per entry in place of per step, a first step that never fades, and a tail that
    begins too early or forgets its last step."""
    ema = TrainConfig(steps=110, average="ema", average_decay=0.5, average_every=20)
    # Above 0.5 is (1 + t) / (10 + t) from 8 steps on; entries are 20 steps apart, and the last 10.
    assert {step: decay_of(ema, step) for step in range(1, 111) if decay_of(ema, step) is not None} == {
        **dict.fromkeys((20, 40, 60, 80, 100), 0.5**20),
        110: 0.5**10,
    }
    slow = TrainConfig(steps=110, average="ema", average_decay=0.999, average_every=2)
    assert decay_of(slow, 2) == (3 / 12) ** 2 and decay_of(slow, 110) == (111 / 120) ** 2
    tail = TrainConfig(steps=11, average="tail", average_tail=0.5, average_every=2)
    # round(5.5) = 6 steps: 6 to 11, of which 6, 8, 10 and 11 enter.
    assert [decay_of(tail, step) for step in range(1, 12)] == [*[None] * 5, 0, None, 1 / 2, None, 1 - 1 / 3, 3 / 4]
    assert {decay_of(TrainConfig(steps=11), step) for step in range(12)} == {None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_corpus_flags) -> dict[str, Path]:
    """The same run without an average and with each kind."""
    folder = tmp_path_factory.mktemp("averages")
    kinds = {
        "no": [],
        "ema": typed("--train.average=ema --train.average_decay=0.6 --train.average_every=1"),
        "tail": typed("--train.average=tail --train.average_tail=5 --train.average_every=1"),
    }
    return {
        kind: train(*FLAGS, *text_corpus_flags, *flags, f"--run.dir={folder / kind}") for kind, flags in kinds.items()
    }


def test_averages_are_means_of_the_weights(runs):
    """Guards against parameters that are left out, such as sparse tables, and averages that training itself uses."""
    weights = [raw(runs["no"], step) for step in range(1, STEPS + 1)]
    expected = {name: tensor.double() for name, tensor in weights[0].items()}
    for step in range(1, STEPS + 1):
        assert all(
            torch.equal(raw(runs[kind], step)[name], own) for kind in runs for name, own in weights[step - 1].items()
        )
        decay = min(0.6, (1 + step) / (10 + step))
        if step > 1:
            expected = {name: decay * own + (1 - decay) * weights[step - 1][name] for name, own in expected.items()}
        found = averaged(runs["ema"], step)
        assert found.keys() == expected.keys()
        for name, own in found.items():
            torch.testing.assert_close(own.double(), expected[name], rtol=0, atol=1e-6)
        tail = averaged(runs["tail"], step)
        assert bool(tail) is (step > 7)
        for name, own in tail.items():
            mean = sum(weights[before][name].double() for before in range(7, step)) / (step - 7)
            torch.testing.assert_close(own.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_scores_and_models_are_of_the_average(kind, runs, tmp_path, capfd, monkeypatch):
    """Guards against a best checkpoint chosen by other weights than those that are exported and scored."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = runs[kind]
    corpus = charlm.load_corpus(charlm.load_config(run / "config.yaml").data)
    by_step = {row["step"]: row["valid"]["bits_per_character"] for row in history(run) if "valid" in row}
    plain = {row["step"]: row["valid"]["bits_per_character"] for row in history(runs["no"]) if "valid" in row}
    for step in (6, STEPS):
        scores = {
            weights: charlm.bits_per_character(
                charlm.load(run, step, "cpu", weights), corpus, split="valid", limit=100
            ).bits_per_character
            for weights in ("average", "raw")
        }
        assert scores["average"] == pytest.approx(by_step[step], abs=1e-5)
        assert scores["raw"] == pytest.approx(plain[step], abs=1e-5)
        assert (abs(scores["raw"] - scores["average"]) > 1e-3) is (kind == "ema" or step == STEPS)
    best = charlm.load(run, device="cpu")
    assert best.scores[0]["bits_per_character"] == min(by_step.values())
    assert charlm.load(run, device="cpu", weights="raw").scores == ()
    for weights in ("average", "raw"):
        assert run_script("export", str(run), "--to", str(tmp_path / weights), "--weights", weights) == 0
        exported = load_file(tmp_path / weights / "model.safetensors")
        expected = averaged(run, best.step) if weights == "average" else raw(run, best.step)
        assert all(torch.equal(own, expected[name]) for name, own in exported.items())
    assert run_script("generate", str(run), "--prompt", "the", "--length", "2", "--weights", "raw") == 0
    capfd.readouterr()
    with refused("weights"):
        charlm.load(tmp_path / "average", weights="raw")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_two_processes_resume_averages_to_the_same_bytes(kind, sharding, tmp_path, text_corpus_flags):
    """Guards against means that are missing from checkpoints, or given to another process's shard."""
    flags = [*FLAGS, *text_corpus_flags, f"--train.average={kind}", f"--train.sharding={sharding}"]
    flags += typed("--train.average_every=2 --train.average_tail=8")
    runs = [[*flags, f"--run.dir={tmp_path / name}"] for name in ("whole", "resumed")]
    steps = random.Random(kind + sharding).sample(range(1, STEPS), 3)
    runs += [[*runs[1], f"--run.resume_from={step}"] for step in sorted(steps, reverse=True)]
    train_with_two_processes(tmp_path / "plan.json", runs)
    assert averaged(tmp_path / "whole", STEPS)
    assert_ended_like(tmp_path / "resumed", tmp_path / "whole")
