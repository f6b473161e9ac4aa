"""The choice of the next symbol. Shapes: V vocabulary, K rows; `...` any dimensions."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from charlm.config import Section
from charlm.config.types import Count, NonNegative


class Sampling(Section):
    """How symbols are chosen from logits."""

    temperature: NonNegative = 1.0
    """Divides the logits; 0 always takes the likeliest symbol."""
    top_k: Count | None = None
    """Draw from the k likeliest symbols only."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the fewest with this share of what top_k leaves (Holtzman et al. 2020)."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities that the next symbol is drawn from, [..., V] in float64."""
        temperature, top_k = self.temperature, self.top_k
        if temperature == 0:
            temperature, top_k = 1.0, 1
        logits = logits.double()
        # So that a tiny temperature does not divide infinity by infinity.
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
        """A symbol for each row, and the distributions [K, V] if they were drawn."""
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
