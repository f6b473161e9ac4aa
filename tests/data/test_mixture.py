"""Mixtures: several sources as one corpus, with one vocabulary and the ids of each apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from charlm.config import Config, DataConfig
from charlm.data.corpus import load_corpus, prepared_corpus
from charlm.data.sources import check_outside, located
from charlm.data.vocabulary import CharacterVocabulary
from charlm.runs.exported import portable

TEXTS = {
    "greek": "αβγ δε\n" * 300,
    "latin": "the deep stack\n" * 200,
    "mixed": "naïve αβ\n" * 100,
}
SPLITS = ("train", "valid", "test")


@pytest.fixture
def mix(tmp_path) -> Callable[..., DataConfig]:
    """`mix(latin={...}, **options)`: a mixture of three files, with options of a source and of all."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)

    def build(**options) -> DataConfig:
        sources = {name: {"corpus": "file", "path": tmp_path / name} | options.pop(name, {}) for name in TEXTS}
        return DataConfig(**{"corpus": "mixture", "mixture": sources, "cache_dir": tmp_path / "cache"} | options)

    return build


@pytest.mark.parametrize("vocabulary", ["bytes", "characters", "sentencepiece"])
def test_a_mixture_holds_the_splits_of_its_sources(mix, vocabulary):
    """Guards against symbols that change their source or split, sizes of another source, and a vocabulary of one source
    alone or of held-out text. Each source has the splits that it has alone."""
    config = mix(vocabulary=vocabulary, latin={"valid_fraction": 0.2}, character_coverage=1.0)
    corpus = load_corpus(config, show_progress=False)
    alone = {name: load_corpus(text, show_progress=False) for name, text in config.texts.items()}
    assert list(corpus.sources) == sorted(TEXTS) == list(alone)
    for split in SPLITS:
        expected = {name: own.splits[split].ids.tobytes() for name, own in alone.items()}
        found = [corpus.vocabulary.decode(ids) for ids in corpus.texts(split)]
        assert dict(zip(corpus.sources, found, strict=True)) == expected
        whole = corpus.splits[split]
        assert corpus.vocabulary.decode(whole.ids) == b"".join(found)
        assert (whole.symbols, whole.bytes) == (len(whole.ids), sum(map(len, found)))
        assert whole.characters == sum(len(text.decode()) for text in found)
        for name, ids in zip(corpus.sources, corpus.texts(split), strict=True):
            text = expected[name]
            sizes = {"symbols": len(ids), "characters": len(text.decode()), "bytes": len(text)}
            assert corpus.sources[name]["splits"][split] == sizes
        assert [len(ids) for ids in corpus.texts(split, 35)] == [11, 11, 11]
        assert [len(ids) for ids in corpus.texts(split, 1)] == [1, 1, 1]
    assert corpus.sources["latin"]["splits"]["valid"]["bytes"] == 600
    assert {name: own["sha256"] for name, own in corpus.sources.items()} == {n: own.sha256 for n, own in alone.items()}
    symbols = set("".join(TEXTS.values()))
    if vocabulary == "characters":
        assert corpus.vocabulary == CharacterVocabulary("".join(sorted(symbols)))
    elif vocabulary == "sentencepiece":
        assert {symbol.decode() for symbol in corpus.vocabulary.symbols[257:]} == symbols
    assert all(isinstance(ids, np.memmap) for ids in corpus.texts("train"))


def test_characters_of_any_training_split_will_do_and_no_others(mix, tmp_path, refused):
    """Guards against a vocabulary without the rarer sources, and one that was chosen with held-out text."""
    (tmp_path / "greek").write_text("β" * 900 + "t" * 100)  # held-out text of characters that latin has
    load_corpus(mix(vocabulary="characters"), show_progress=False)
    (tmp_path / "greek").write_text("β" * 900 + "ж" * 100)
    with refused("data.mixture", "'ж' (U+0436)", "valid", "data.vocabulary=sentencepiece"):
        load_corpus(mix(vocabulary="characters"), show_progress=False)


def test_a_source_that_is_not_utf8(mix, tmp_path, refused):
    """Guards against half characters in a vocabulary, and characters counted in two ways in one mixture."""
    (tmp_path / "greek").write_bytes(bytes(range(256)) * 10)
    as_is = {"greek": {"as_is": True}}
    corpus = load_corpus(mix(**as_is), show_progress=False)
    for split in corpus.splits.values():
        assert split.characters == split.bytes == split.symbols
    with refused("data.mixture", "is not UTF-8", "data.vocabulary=bytes"):
        load_corpus(mix(**as_is, vocabulary="characters"), show_progress=False)


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_a_mixture_is_prepared_once_and_anew_when_a_source_changes(mix, tmp_path, vocabulary, monkeypatch):
    """Guards against a mixture of old text, one that is prepared at every start, and weights that need another."""
    config = mix(vocabulary=vocabulary)
    assert prepared_corpus(config) is None
    first = load_corpus(config, show_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("charlm.data.corpus._prepare", None)
        heavier = mix(vocabulary=vocabulary, latin={"weight": 5})
        for same in (load_corpus(heavier, show_progress=False), prepared_corpus(config)):
            assert same.model_dump() == first.model_dump()
    (tmp_path / "latin").write_text(TEXTS["latin"].replace("deep", "dark"))
    assert prepared_corpus(config) is None
    changed = load_corpus(config, show_progress=False)
    assert changed.sha256 != first.sha256
    differing = [name for name in TEXTS if changed.sources[name]["sha256"] != first.sources[name]["sha256"]]
    assert differing == ["latin"]


def test_ten_sources_at_once(tmp_path):
    """Guards against sources beyond the first few, or in another order, that get each other's text."""
    texts = {f"s{number}": f"{number}" * (200 + 20 * number) for number in range(10)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    sources = {name: {"corpus": "file", "path": tmp_path / name, "weight": 1 + int(name[1])} for name in texts}
    config = DataConfig(corpus="mixture", mixture=dict(reversed(sources.items())), cache_dir=tmp_path / "cache")
    assert config.shares == pytest.approx([number / 55 for number in range(1, 11)])
    corpus = load_corpus(config, show_progress=False)
    for split in SPLITS:
        found = [set(corpus.vocabulary.decode(ids).decode()) for ids in corpus.texts(split)]
        assert found == [{f"{number}"} for number in range(10)]


def test_places_of_sources(mix, tmp_path, monkeypatch, refused):
    """Guards against paths that change their meaning with the working folder, or leave this machine in an exported
    model, and against output that would become part of a source."""
    monkeypatch.chdir(tmp_path)
    config = Config(data=mix(latin={"path": Path("latin")}))
    assert located(config).data.mixture["latin"].path == tmp_path / "latin"
    assert {name: source.path for name, source in portable(config).data.mixture.items()} == {n: Path(n) for n in TEXTS}
    (tmp_path / "folder").mkdir()
    inside = mix(latin={"path": tmp_path / "folder"})
    with refused("data.path", "run.dir", "lies inside"):
        check_outside(inside, "run.dir", tmp_path / "folder" / "run")
    check_outside(inside, "run.dir", tmp_path / "run")
