"""The whole way from a text to generated text, for each vocabulary and kind of corpus: as a user types it."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import charlm
from charlm.config import Config, UserError
from charlm.data.corpus import load_corpus
from charlm.data.vocabulary import CharacterVocabulary
from charlm.objective.build import build_objective
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import take_snapshot
from tiny import TINY, run_script

VOCABULARIES = ("bytes", "characters", "sentencepiece")
PANGRAM = " the quick brown fox jumps over the lazy dog"
"""The 27 symbols of text8."""
GREEK = "Ἐν ἀρχῇ ἦν ὁ λόγος,\r\nκαὶ ὁ λόγος ἦν πρὸς τὸν θεόν \u2581 🎉.\n"  # noqa: RUF001


@pytest.fixture
def script(tmp_path, monkeypatch, capfd) -> Callable[..., str]:
    """`script(name, *arguments)`: what scripts/NAME.py prints to stdout, or to stderr if it exits with code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name: str, *arguments: str) -> str:
        code, printed = run_script(name, *arguments), capfd.readouterr()
        assert code in (0, 2), printed.err
        return printed.err if code else printed.out

    return run


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ["greek", "text8", "parquet"])
def test_prepare_train_evaluate_generate(kind, vocabulary, script, tmp_path):
    """Guards against a part of the way that takes symbols for bytes or characters, and against text that is changed."""
    if kind == "parquet":
        (tmp_path / "parquet").mkdir()
        documents = pyarrow.table({"text": [f"{number} {GREEK}" for number in range(60)]})
        pyarrow.parquet.write_table(documents, tmp_path / "parquet" / "train-0.parquet")
        data = ["--data.corpus=hub", "--data.hub_id=./parquet"]
        text = "\n".join(f"{number} {GREEK}" for number in range(60))
    else:
        text = (GREEK if kind == "greek" else PANGRAM) * 60
        (tmp_path / "text.txt").write_bytes(text.encode())
        data = ["--data.corpus=file", "--data.path=text.txt"]
    data.append(f"--data.vocabulary={vocabulary}")
    assert "train:" in script("prepare", *data)
    script("train", *TINY, *data)
    trained = charlm.load("runs/charlm", device="cpu")
    if kind == "text8":
        assert trained.vocabulary.size == {"bytes": 256, "characters": 27, "sentencepiece": 257 + 27}[vocabulary]
    corpus = load_corpus(trained.config.data, show_progress=False)
    splits = [corpus.vocabulary.decode(split.ids) for split in corpus.splits.values()]
    assert b"".join(splits) == text.encode()
    score = json.loads(script("evaluate", "runs/charlm", "--json"))
    assert (score["characters"], score["bytes"]) == (len(splits[2].decode()), len(splits[2]))
    assert score["bits_per_character"] * score["characters"] == pytest.approx(score["bits_per_byte"] * score["bytes"])
    prompt = text[:4]
    written = script("generate", "runs/charlm", f"--prompt={prompt}", "--length=12")
    assert written == f"{prompt}{charlm.generate(trained, prompt, length=12)}\n"


def config_on(folder: Path, vocabulary: str, *flags: str) -> Config:
    """A tiny run in a folder, on its text.txt."""
    data = ["--data.corpus=file", f"--data.path={folder / 'text.txt'}", f"--data.cache_dir={folder / 'cache'}"]
    data += [f"--data.vocabulary={vocabulary}", f"--run.dir={folder / 'run'}"]
    return charlm.load_config(overrides=[*TINY, *data, *flags])


# Two lines of 12 characters and 22 bytes. Sentencepiece: the unknown piece, 256 bytes and 9 characters; not the tab,
# which is spelled in one byte, nor U+2581, which is spelled in three.
@pytest.mark.parametrize(
    ("vocabulary", "num_symbols", "size"), [("bytes", 44, 256), ("characters", 24, 11), ("sentencepiece", 28, 266)]
)
def test_bits_per_byte_of_a_uniform_model(vocabulary, num_symbols, size, tmp_path):
    """Guards against bits that are divided by symbols where characters or bytes are meant: a model without preferences
    spends log2 V bits on each symbol, whatever the text."""
    line = "né 世界 a\u2581🎉\t\r\n"  # 1 2 1 3 3 1 1 3 4 1 1 1 bytes
    assert (len(line), len(line.encode()), len(set(line))) == (12, 22, 11)
    (tmp_path / "text.txt").write_bytes((line * 20).encode())
    config = config_on(tmp_path, vocabulary, "--data.character_coverage=1", "--data.test_fraction=0.1")
    corpus = load_corpus(config.data, show_progress=False)
    assert (corpus.vocabulary.size, corpus.splits["test"].symbols) == (size, num_symbols)
    objective = build_objective(config, size)
    for parameter in objective.heads.parameters():
        torch.nn.init.zeros_(parameter)
    run = Run.create(config, corpus.model_dump())
    save_checkpoint(run, take_snapshot(objective, [], {"step": 1}), best=True, keep=1)
    score = charlm.bits_per_character(charlm.load(run.path, device="cpu"), corpus)
    assert score.bits_per_byte == pytest.approx(num_symbols * math.log2(size) / 44, rel=1e-6)
    assert score.bits_per_character == pytest.approx(num_symbols * math.log2(size) / 24, rel=1e-6)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run on two letters and a space, as training leaves it."""
    (tmp_path / "text.txt").write_text("ab ba " * 100)
    config = config_on(tmp_path, "characters")
    run = Run.create(config, load_corpus(config.data, show_progress=False).model_dump())
    save_checkpoint(run, take_snapshot(build_objective(config, 3), [], {"step": 1}), best=True, keep=1)
    return run


@pytest.mark.parametrize(
    ("vocabulary", "complaint"),
    [(CharacterVocabulary("abc").to_dict(), "another vocabulary"), ({"name": "bytes", "utf8": True}, r"float32 \[256")],
)
def test_a_vocabulary_that_is_not_the_models_is_refused(run, vocabulary, complaint):
    """Guards against a provenance.json of another run, whose vocabulary is sound and as large, and against a traceback
    about shapes, where the parameters name a vocabulary that they do not fit."""
    provenance = run.provenance()
    provenance["corpus"]["vocabulary"] = vocabulary
    run.provenance_path.write_text(json.dumps(provenance))
    if vocabulary["name"] == "bytes":
        save_checkpoint(run, take_snapshot(build_objective(run.config(), 3), [], {"step": 1}), best=True, keep=1)
    with pytest.raises(UserError, match=complaint):
        charlm.load(run.path)


def test_a_prompt_outside_the_vocabulary_is_refused(run, script):
    """Guards against a KeyError, and against a character that is silently left out."""
    message = script("generate", str(run.path), "--prompt=abc")
    assert message.startswith("error: prompt: not among the vocabulary's 3 characters: 'c' (U+0063) at byte 2")
    assert "not UTF-8 at byte 1" in script("generate", str(run.path), "--prompt=a" + os.fsdecode(bytes([255])))


def test_explain_knows_the_vocabulary_once_it_is_prepared(run, script):
    """Guards against parameters counted for 256 symbols where there are 3, and against an assumption left unsaid."""
    config = run.config()
    flags = [f"--config={run.config_path}"]
    known = json.loads(script("explain", *flags, "--json"))
    assert (known["vocabulary_size"], known["vocabulary_is_known"]) == (3, True)
    objective = build_objective(config, 3)
    assert known["parameters"]["training"] == sum(parameter.numel() for parameter in objective.parameters())
    assert "assumed" not in script("explain", *flags)
    elsewhere = [*flags, "--data.cache_dir=elsewhere"]
    assert "256 symbols assumed" in script("explain", *elsewhere)
    assert json.loads(script("explain", *elsewhere, "--json"))["vocabulary_is_known"] is False


def test_symbols_of_other_types_train(tmp_path):
    """Guards against windows of uint16 or uint32 ids that torch cannot read."""
    text = "".join(chr(0x4E00 + number) for number in range(400)) * 5
    (tmp_path / "text.txt").write_text(text)
    config = config_on(tmp_path, "characters")
    assert load_corpus(config.data, show_progress=False).splits["train"].ids.dtype == np.uint16
    trained = charlm.load(charlm.train(config), "last")
    assert trained.vocabulary.size == 400
