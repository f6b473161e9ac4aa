"""The choice of the next symbol. Shapes: V vocabulary, K rows; `...` any dimensions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from charlm.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How symbols are chosen from logits."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest symbol."""
    top_k: int | None = None
    """Draw from the k likeliest symbols only."""
    top_p: float | None = None
    """Draw from the fewest likeliest symbols with this share of what top_k leaves (Holtzman et al. 2020)."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature}: must be finite and at least 0",
                option="temperature",
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be at least 1", option="top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1", option="top_p")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest symbol is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities that the next symbol is drawn from, [..., V] in float64."""
        temperature, top_k = (1.0, 1) if self.temperature == 0 else (self.temperature, self.top_k)
        logits = logits.double()
        # Subtracting the largest first keeps a tiny temperature from dividing infinity by infinity.
        below_largest = logits - logits.amax(dim=-1, keepdim=True)
        probabilities = (below_largest / temperature).softmax(dim=-1)
        if top_k is None and self.top_p is None:
            return probabilities
        descending, symbols = probabilities.sort(descending=True, stable=True)
        if top_k is not None:
            descending[..., top_k:] = 0
            descending /= descending.sum(dim=-1, keepdim=True)
        if self.top_p is not None:
            before = descending.cumsum(dim=-1)[..., :-1]  # of all likelier symbols
            descending[..., 1:][before >= self.top_p] = 0
            descending /= descending.sum(dim=-1, keepdim=True)
        return probabilities.scatter_(-1, symbols, descending)

    def choose(self, logits_KV: Tensor, generator: torch.Generator) -> tuple[list[int], Tensor | None]:
        """A symbol for each row, and the distributions [K, V] if the symbols were drawn from them."""
        if self.is_greedy:
            return logits_KV.argmax(dim=-1).tolist(), None
        probabilities_KV = self.distribution(logits_KV)
        return draw(probabilities_KV, generator).tolist(), probabilities_KV


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A symbol for each row of `weights` [..., V], which need not sum to 1."""
    cumulative = weights.cumsum(dim=-1)
    uniform = torch.rand(weights.shape[:-1], dtype=torch.float64, generator=generator)
    thresholds = uniform[..., None] * cumulative[..., -1:]
    return (cumulative[..., :-1] <= thresholds).sum(dim=-1)
