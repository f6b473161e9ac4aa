"""N-gram embeddings against their definition, and inside the network."""

import pytest
import torch

from charlm.config import ConfigError, ModelConfig
from charlm.model.cache import KVCache
from charlm.model.embedding import NgramEmbedding
from charlm.model.transformer import CharTransformer

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


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [3, 1, 5]])
def test_cached_equals_uncached(randomise, chunks):
    """N-grams that end at the edge of what is given at once."""
    config = small()
    model = randomise(CharTransformer(config, V)).eval()
    ids_BT = some_ids()
    cache = KVCache(config, 2, torch.device("cpu"))
    parts = [model(part, cache=cache)[2] for part in ids_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids_BT)[2], rtol=1e-5, atol=1e-5)


def test_the_future_is_not_read(randomise):
    """An n-gram that looks ahead."""
    model = randomise(CharTransformer(small(), V)).eval()
    ids_BT = some_ids()
    for t in range(9):
        changed = ids_BT.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        before, after = model(ids_BT)[2], model(changed)[2]
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("ngrams", [(1,), (2, 2), (0, 3)])
def test_impossible_lengths_are_refused(ngrams):
    """A table of single characters beside the embedding of characters, or the same one twice."""
    with pytest.raises(ConfigError, match=r"model\.ngrams=.*from 2 to 64"):
        small(ngrams=ngrams)
