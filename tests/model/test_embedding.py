"""N-gram embeddings against their definition. tests/model/test_transformer.py has them inside the network."""

import pytest
import torch

from charlm.config import ConfigError, ModelConfig
from charlm.model.transformer import NgramEmbedding

V = 7


def small(**options) -> ModelConfig:
    options = {"ngrams": (2, 4), "ngram_buckets": 11, "ngram_width": 3} | options
    return ModelConfig(num_layers=2, num_heads=2, d_model=8, d_ff=16, context_length=9, **options)


def some_ids(length: int = 9) -> torch.Tensor:
    return torch.randint(V, (2, length), generator=torch.Generator().manual_seed(0))


def test_rows_are_those_of_the_hashed_ngrams():
    """An n-gram read in the wrong order or of the wrong length, a table of another n, a start that is not padded."""
    embedding = NgramEmbedding(small())
    ids_BS = some_ids()
    result_BTD = embedding(ids_BS, 9)
    for b in range(2):
        for t in range(9):
            rows = []
            for n, table in zip((2, 4), embedding.tables, strict=True):
                ngram = [ids_BS[b, t - j].item() + 1 if t >= j else 0 for j in range(n)]
                rows.append(table.weight[sum(sign * 1_000_003**j for j, sign in enumerate(ngram)) % (2**31 - 1) % 11])
            torch.testing.assert_close(result_BTD[b, t], embedding.up(torch.cat(rows)))


def test_only_the_last_positions_are_embedded():
    """Decoding one character at a time that embeds another position, or does not see the characters before it."""
    embedding, ids_BS = NgramEmbedding(small()), some_ids()
    whole = embedding(ids_BS, 9)
    for length in (1, 2, 3, 9):
        for positions in range(1, length + 1):
            part = embedding(ids_BS[:, :length], positions)
            torch.testing.assert_close(part, whole[:, length - positions : length])


@pytest.mark.parametrize("ngrams", [(1,), (2, 2), (0, 3)])
def test_impossible_lengths_are_refused(ngrams):
    """A table of single characters beside the embedding of characters, or the same one twice."""
    with pytest.raises(ConfigError, match=r"ngrams"):
        ModelConfig().replace(ngrams=ngrams)
