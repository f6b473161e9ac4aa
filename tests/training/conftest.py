"""A small text to train on."""

import random

import pytest


@pytest.fixture(scope="session")
def text_corpus_flags(tmp_path_factory) -> list[str]:
    """Flags for a corpus of 40,000 characters in which there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "deep", "stack", "learns", "to", "spell", "before", "it", "reads", "characters\n"]
    text = " ".join(random.Random(0).choices(words, k=8000))[:40_000]
    (folder / "words.txt").write_text(text)
    return ["--data.corpus=file", f"--data.path={folder / 'words.txt'}", f"--data.cache_dir={folder / 'cache'}"]
