"""A run on a mixture reads its sources by weight, and the same ones however it is stopped and shared out."""

import json
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import charlm
from charlm.config.load import load_config
from charlm.data.corpus import Split, load_corpus
from charlm.data.windows import training_windows
from charlm.inference.evaluation import score_at
from charlm.inference.scoring import negative_log_likelihoods
from charlm.runs.folder import Run
from launched import TORCHRUN, launch
from tiny import SCRIPTS, TINY, assert_ended_like, history, train, typed

STEPS = 12
FLAGS = [
    *TINY,
    *typed(f"--train.steps={STEPS} --train.batch_size=6 --train.log_every=1 --train.valid_every=3"),
    "--train.matmul_precision=highest",  # its validations score as `evaluate` does
]
GROWING = typed("--train.context_divisor=4 --train.full_context_from=0.5")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[str]:
    """Flags for a mixture of three texts."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, letters in {"a": "abcd ", "b": "bcdé\n", "c": "αβγδ"}.items():
        (folder / name).write_text("".join(random.Random(name).choices(letters, k=3000)))
    sources = {name: {"corpus": "file", "path": str(folder / name)} for name in "abc"}
    sources["a"]["weight"], sources["c"]["valid_fraction"] = 3, 0.02
    return ["--data.corpus=mixture", f"--data.mixture={json.dumps(sources)}", f"--data.cache_dir={folder / 'cache'}"]


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ([sys.executable], []),
        pytest.param([sys.executable], GROWING, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, GROWING, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, ["--data.vocabulary=characters"], marks=pytest.mark.slow),
    ],
    ids=["one process", "growing windows", "two processes", "two processes, characters"],
)
def test_stopped_at_random_steps(launcher, more, mixture, tmp_path):
    """Guards against sources that are drawn from a state which is lost, or by each process for itself: a run that is
    stopped three times reads the windows of a plain computation, and ends in the bytes of one that never was."""
    stops = sorted(random.Random(str(more)).sample(range(1, STEPS), 3))
    noted = {}
    for name, at in {"whole": "", "stopped": ",".join(map(str, stops))}.items():
        (tmp_path / f"{name}-notes").mkdir()
        flags = [*FLAGS, *mixture, *more, "--run.auto_resume=true", f"--run.dir={tmp_path / name}"]
        program = SCRIPTS.parent / "tests" / "training" / "train_and_note.py"
        done = launch([*launcher, program, tmp_path / f"{name}-notes", at, *flags])
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("resumed at step") == (3 if at else 0)
        files = sorted((tmp_path / f"{name}-notes").glob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        noted[name] = [ids for _, ids in sorted(rows, key=lambda row: row[0])]  # of a step, by process
    assert_ended_like(tmp_path / "stopped", tmp_path / "whole")
    config = load_config(overrides=flags)
    texts, expected = load_corpus(config.data).texts("train"), []
    for step in range(STEPS):
        divisor = 4 if more == GROWING and step < STEPS / 2 else 1
        how = {"batch_size": 6 * divisor, "window_length": 16 // divisor + 2}
        expected += training_windows(texts, shares=(0.6, 0.2, 0.2), seed=0, step=step, **how).tolist()
    assert noted["stopped"] == noted["whole"] == expected


def test_a_validation_by_source(mixture, tmp_path):
    """Guards against figures of another source, text of one that is the context of the next, and a best checkpoint by a
    figure that is not the weighted one. Each source is scored as if it were alone, on a third of the symbols."""
    run = train(*FLAGS, *mixture, "--train.valid_symbols=300", f"--run.dir={tmp_path / 'run'}")
    rows = [row for row in history(run) if "valid" in row]
    trained = charlm.load(run, "last", device="cpu")
    corpus = load_corpus(trained.config.data)
    assert [len(ids) for ids in corpus.texts("valid")] == [150, 180, 120]
    bits = {}
    for name, ids in zip("abc", corpus.texts("valid"), strict=True):
        (nats,) = negative_log_likelihoods(trained.transformer, trained.heads, ids[:100], stride=8).values()
        characters = np.count_nonzero(ids[:100] & 0xC0 != 0x80)
        bits[name] = (nats.sum() / np.log(2) / characters, nats.sum() / np.log(2) / 100)
    valid = rows[-1]["valid"]
    assert list(valid) == ["bits_per_character", "bits_per_byte", *(f"bits_per_character/{name}" for name in "abc")]
    for name in "abc":
        assert valid[f"bits_per_character/{name}"] == pytest.approx(bits[name][0], abs=1e-6)
    for unit, figure in enumerate(("bits_per_character", "bits_per_byte")):
        mean = 0.6 * bits["a"][unit] + 0.2 * bits["b"][unit] + 0.2 * bits["c"][unit]
        assert valid[figure] == pytest.approx(mean, abs=1e-6)
    best = min(rows, key=lambda row: row["valid"]["bits_per_character"])["step"]
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best:08d}"


def test_training_bits_are_weighted(mixture, tmp_path):
    """Guards against bits per character that count the characters of a source as often as those of another."""
    run = train(*FLAGS, *mixture, f"--run.dir={tmp_path / 'run'}")
    splits = [own["splits"]["train"] for own in load_corpus(load_config(overrides=mixture).data).sources.values()]
    ratio = sum(w * own["symbols"] / own["characters"] for w, own in zip((0.6, 0.2, 0.2), splits, strict=True))
    row = next(row for row in history(run) if "terms" in row)
    loss = row["terms"]["layer2/offset1/all"]["loss"]
    assert row["bits_per_character"] == pytest.approx(loss * ratio / np.log(2), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"a": {"weight": 2}}, "data.mixture.a.weight"),
        ({"c": None}, "data.mixture.c.corpus"),
        ({"b": {"valid_fraction": 0.1}}, "data.mixture.b.valid_fraction"),
    ],
)
def test_what_a_resumed_run_may_not_change(change, option, mixture, tmp_path):
    """Guards against a run that goes on with other windows or another text, and against one that may not go on since
    its sources were written down in another order, or were moved."""
    flags = [*FLAGS, *mixture, "--train.steps=3", f"--run.dir={tmp_path / 'run'}"]
    train(*flags)
    sources = json.loads(mixture[1].partition("=")[2])
    moved = tmp_path / "b"
    moved.write_text(Path(sources["b"]["path"]).read_text())
    same = dict(reversed(sources.items())) | {"b": {"corpus": "file", "path": str(moved)}}
    train(*flags, "--run.resume=true", "--train.steps=4", f"--data.mixture={json.dumps(same)}")
    other = {name: own | (change.get(name) or {}) for name, own in sources.items() if change.get(name, {}) is not None}
    with pytest.raises(charlm.UserError) as caught:
        train(*flags, "--run.resume=true", "--train.steps=4", f"--data.mixture={json.dumps(other)}")
    assert caught.value.option == option


@pytest.fixture(scope="module")
def finished(mixture, tmp_path_factory) -> Path:
    """The folder of a run on the mixture in characters."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(*FLAGS, *mixture, "--data.vocabulary=characters", f"--run.dir={folder}")


@pytest.mark.parametrize("limit", [None, 90])
def test_a_score_by_source(finished, limit):
    """Guards against means by length in place of weight, of scores of other sources, and figures per byte and errors
    that are those of all text together. The reference scores each source as a corpus by itself."""
    trained = charlm.load(finished, device="cpu")
    corpus = load_corpus(trained.config.data)
    score = charlm.bits_per_character(trained, corpus, stride=4, limit=limit, all_layers=True)
    alone = {}
    for name, ids in zip("abc", corpus.texts("test", limit), strict=True):
        text = corpus.vocabulary.decode(ids)
        split = Split(ids=ids, symbols=len(ids), characters=len(text.decode()), bytes=len(text))
        parts = {"splits": {"test": split}, "sources": {}, "sha256": corpus.sources[name]["sha256"]}
        alone[name] = charlm.bits_per_character(trained, corpus.model_copy(update=parts), stride=4, all_layers=True)
        assert alone[name].sources is None
    assert score.sources == {name: own.bits_per_character for name, own in alone.items()}

    def mean(figure: str) -> float:
        return sum(w * getattr(own, figure) for w, own in zip((0.6, 0.2, 0.2), alone.values(), strict=True))

    assert score.bits_per_character == pytest.approx(mean("bits_per_character"), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(mean("bits_per_byte"), rel=1e-12)
    errors = [w * own.standard_error for w, own in zip((0.6, 0.2, 0.2), alone.values(), strict=True)]
    assert score.standard_error == pytest.approx(sum(error**2 for error in errors) ** 0.5, rel=1e-12)
    for unit in ("symbols", "characters", "bytes"):
        assert getattr(score, unit) == sum(getattr(own, unit) for own in alone.values())
    layer = sum(w * own.layers["1"] for w, own in zip((0.6, 0.2, 0.2), alone.values(), strict=True))
    assert score.layers["1"] == pytest.approx(layer, rel=1e-12)
    at_layer = score_at(score, 1)
    assert "sources" not in at_layer and "bits_per_byte" not in at_layer


def test_scripts_know_sources(finished, mixture, tmp_path, script):
    """Guards against a source that is not named where a mixture is scored, written about or shared, and an exported
    model whose sources cannot be found again."""
    _, printed, _ = script("evaluate", finished, "--json", "--yardsticks")
    score = json.loads(printed)
    assert list(score["sources"]) == ["a", "b", "c"] and "gzip" in score["yardsticks"]
    _, printed, _ = script("evaluate", finished)
    assert re.findall(r"source (\w): ([\d.]+) bits", printed) == [(n, f"{x:.4f}") for n, x in score["sources"].items()]
    code, printed, _ = script("evaluate", finished, "--source=b", "--json", "--early-exit")
    assert code == 0 and json.loads(printed)["bits_per_character"] == pytest.approx(score["sources"]["b"], abs=1e-6)
    for words in ("--early-exit", "--source=d"):
        code, _, complaint = script("evaluate", finished, *words.split())
        assert code == 2 and "source" in complaint and complaint.count("\n") == 1
    assert script("evaluate", finished, "--as-compressor", "--limit=60")[0] == 0
    _, printed, _ = script("prepare", *mixture)
    assert re.findall(r"^source (\w): file", printed, re.MULTILINE) == ["a", "b", "c"]
    code, printed, complaint = script("export", finished, "--to", tmp_path / "exported")
    assert code == 0, complaint
    card = (tmp_path / "exported" / "README.md").read_text()
    assert re.findall(r"^- (\w), weight (\S+): SHA-256 [0-9a-f]{64}$", card, re.MULTILINE) == [
        ("a", "3"), ("b", "1"), ("c", "1")
    ]  # fmt: skip
    place = Path(json.loads(mixture[1].partition("=")[2])["a"]["path"]).parent
    assert str(place) not in (tmp_path / "exported" / "config.json").read_text()
    command = shlex.split(re.search(r"Next: .*evaluate.py (.*)", printed)[1])
    code, printed, complaint = script("evaluate", *command, "--json")
    assert code == 0 and json.loads(printed)["sources"] == score["sources"], complaint
    code, _, complaint = script("evaluate", *command, "--data.mixture={d: {path: x}}")
    assert code == 2 and "mixture.d.corpus" in complaint
    assert script("report", finished, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    for name, share in {"a": "60.0%", "b": "20.0%", "c": "20.0%"}.items():
        assert re.search(rf"source {name}</dt><dd>{share} of the windows, file \(SHA-256 [0-9a-f]{{64}}\), \d", page)
    assert list(Run.open(finished).provenance()["corpus"]["sources"]) == ["a", "b", "c"]
