"""A small text to train on, and losses that break."""

import random
from collections.abc import Callable, Container

import pytest

from charlm.training import gradients


@pytest.fixture(scope="session")
def text_corpus_flags(tmp_path_factory) -> list[str]:
    """Flags for a corpus of 40,000 characters in which there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "deep", "stack", "learns", "to", "spell", "before", "it", "reads", "characters\n"]
    text = " ".join(random.Random(0).choices(words, k=8000))[:40_000]
    (folder / "words.txt").write_text(text)
    return ["--data.corpus=file", f"--data.path={folder / 'words.txt'}", f"--data.cache_dir={folder / 'cache'}"]


@pytest.fixture
def break_losses(monkeypatch) -> Callable[[Container[int], int], None]:
    """`break_losses(passes, term)`: in some passes over the windows, counted from 0, the total and one term are nan."""

    def arrange(passes: Container[int], term: int) -> None:
        plain, count = gradients.weighted_losses, iter(range(10_000))

        def breaking(reports):
            losses = plain(reports)
            if next(count) in passes:
                losses.row[0] = losses.row[1:][term] = float("nan")
            return losses

        monkeypatch.setattr(gradients, "weighted_losses", breaking)

    return arrange
