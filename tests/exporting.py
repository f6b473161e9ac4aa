"""Helpers for tests of exported formats: vocabularies, and our own logits."""

import numpy as np
import torch

from charlm.data.vocabulary import (
    CODE_POINTS,
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
)
from charlm.runs.trained import TrainedModel

TEXT = "The end.\n\tÄé <pad> 日本 \u2581 <0x41>"
NGRAMS = {"ngrams": (2, 4), "ngram_buckets": 11, "ngram_width": 3}
SIX = {
    "the paper's": {"norm": "post"},
    "rotary": {"position_encoding": "rotary", "vocabulary": "characters", "head": "shared"},
    "n-grams": {**NGRAMS, "position_encoding": "input", "vocabulary": "sentencepiece"},
    "rotary n-grams": {**NGRAMS, "position_encoding": "rotary", "norm": "post", "activation": "gelu"},
    "a tower": {"vocabulary": "sentencepiece", "head": "tower", "activation": "relu_squared"},
    "n-grams of characters": {**NGRAMS, "vocabulary": "characters", "norm": "post"},
}
"""Positions, norm, n-grams, vocabulary and kind of head."""


def vocabulary_of(name: str) -> Vocabulary:
    """A vocabulary that can spell TEXT; sentencepiece spells most of it in bytes."""
    if name == "bytes":
        return ByteVocabulary()
    if name == "characters":
        return CharacterVocabulary("".join(sorted(set(TEXT) | set("abcdefgh"))))
    counts = np.zeros(CODE_POINTS, np.int64)
    counts[[ord(character) for character in "The end. pa"]] = 1000
    return SentencePieceVocabulary.train(counts, 0.9995)


@torch.no_grad()
def logits(trained: TrainedModel, ids_BT: torch.Tensor, layer: int | None = None, offset: int = 1) -> torch.Tensor:
    """Our own, [B, T, V]."""
    layer = layer or trained.config.model.num_layers
    return trained.heads(trained.transformer(ids_BT, [layer])[layer], layer, (offset,))[:, :, 0]


def some_ids(trained: TrainedModel, *shape: int) -> torch.Tensor:
    """Ids of the vocabulary, the same each time."""
    return torch.randint(trained.vocabulary.size, shape, generator=torch.Generator().manual_seed(3))
