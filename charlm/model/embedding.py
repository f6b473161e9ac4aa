"""Embeddings that the first layer reads in addition to the character's.

Shapes: B batch, S characters seen, T positions, N characters of the longest n-gram, D d_model.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import ModelConfig

TABLE_STD = 0.02
_MODULUS, _BASE = 2**31 - 1, 1_000_003


class NgramEmbedding(nn.Module):
    """Embeddings of the n-grams that end at each position, from hashed tables (Pagnoni et al. 2024, section 3.2.1).

    For each n the last n characters are hashed to one row of a table. The rows of all n are concatenated and go through
    one matrix to the model's width. N-grams can share a row by chance; context and depth tell them apart. A narrow
    table and a matrix (Lan et al. 2020, section 3.1) replace the source's tables of full width. The gradients of the
    tables are sparse: the cost of a step depends on the rows that it reads, not on the size of the tables.
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
        """The embeddings of the last `num_positions` of the S characters: [B, num_positions, D].

        In an n-gram that begins before the first character, or at an id of -1, a symbol that is no character takes the
        place of the missing ones.
        """
        longest = self.lengths[-1]
        symbols_BS = F.pad(ids_BS + 1, (longest - 1, 0))
        newest_first_BTN = symbols_BS.unfold(1, longest, 1)[:, -num_positions:].flip(-1)
        hashes_BTN = (newest_first_BTN * _powers(longest, ids_BS.device)).cumsum(dim=-1) % _MODULUS
        rows = [
            table(hashes_BTN[..., n - 1] % table.num_embeddings)
            for n, table in zip(self.lengths, self.tables, strict=True)
        ]
        return self.up(torch.cat(rows, dim=-1))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or powers computed during generation could not be used in training
def _powers(count: int, device: torch.device) -> Tensor:
    """base^j modulo a prime, for j = 0 ... count - 1. The hash of an n-gram is the sum of (id + 1) * base^j over its
    characters, j steps back, modulo the same prime."""
    return torch.tensor([pow(_BASE, j, _MODULUS) for j in range(count)], device=device)
