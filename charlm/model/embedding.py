"""What the network reads at a position beside the character itself.

Shapes: B batch, S characters seen, T positions, D d_model.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import ModelConfig

TABLE_STD = 0.02
_MODULUS, _BASE = 2**31 - 1, 1_000_003


class NgramEmbedding(nn.Module):
    """Embeddings of the n-grams that end at each position, from hashed tables (Pagnoni et al. 2024, section 3.2.1).

    For each n the last n characters are hashed to one row of a table; the rows of all n, side by side, go through one
    matrix to the model's width. N-grams share rows by chance; context and depth tell them apart. A narrow table with a
    matrix after it (Lan et al. 2020, section 3.1) stands where the source has tables of full width. The gradients of
    the tables are sparse: a step costs the rows that it reads, however large the tables are.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.lengths = tuple(sorted(config.ngrams))
        width = config.ngram_width
        self.tables = nn.ModuleList(nn.Embedding(config.ngram_buckets, width, sparse=True) for _ in self.lengths)
        self.up = nn.Linear(len(self.lengths) * width, config.d_model, bias=False)
        for table in self.tables:
            nn.init.normal_(table.weight, std=TABLE_STD)
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)

    def forward(self, ids_BS: Tensor, num_positions: int) -> Tensor:
        """The embeddings of the last `num_positions` of the characters seen: [B, num_positions, D].

        An n-gram that begins before the first of them, or where the id is -1, holds in place of what it lacks a sign
        that is no character.
        """
        rows = [
            table(hashes_BS[:, -num_positions:] % table.num_embeddings)
            for table, hashes_BS in zip(self.tables, self._hashes(ids_BS), strict=True)
        ]
        return self.up(torch.cat(rows, dim=-1))

    def _hashes(self, ids_BS: Tensor) -> Iterator[Tensor]:
        """sum of (id + 1) * base^j over the last n characters, j steps back, modulo a prime: for each n, [B, S]."""
        signs_BS, hashes_BS, factor = ids_BS + 1, torch.zeros_like(ids_BS), 1
        for back in range(self.lengths[-1]):
            earlier_BS = F.pad(signs_BS[:, : max(0, signs_BS.shape[1] - back)], (min(back, signs_BS.shape[1]), 0))
            hashes_BS = (hashes_BS + earlier_BS * factor) % _MODULUS
            factor = factor * _BASE % _MODULUS
            if back + 1 in self.lengths:
                yield hashes_BS
