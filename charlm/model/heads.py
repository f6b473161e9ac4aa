"""Prediction heads: hidden states of a layer to logits of the characters at one or several offsets.

Shapes: B batch, T positions, D d_model, K offsets, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import ModelConfig


class Heads(nn.Module):
    """One linear classifier with bias per (layer, offset), tied to nothing (Al-Rfou et al. 2018, section 3).

    Under pre-norm an intermediate layer hands out the raw residual stream, so each exit owns a layer norm; the last
    layer's is the model's final norm. Classifiers start at zero: every loss starts at exactly ln V, and however many
    heads there are, none disturbs the trunk before it has learned anything itself.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, pairs: Iterable[tuple[int, int]]):
        """`pairs`: the (layer, offset) pairs that have a classifier; layers are 1-based, offset 1 is the next."""
        super().__init__()
        self.pairs = sorted(set(pairs))
        self.layers = sorted({layer for layer, _ in self.pairs})
        self.exits = nn.ModuleDict()
        for layer in self.layers:
            own_norm = config.norm == "pre" and layer < config.num_layers
            parts: dict[str, nn.Module] = {"norm": nn.LayerNorm(config.d_model) if own_norm else nn.Identity()}
            for offset in (offset for pair_layer, offset in self.pairs if pair_layer == layer):
                classifier = nn.Linear(config.d_model, vocabulary_size)
                nn.init.zeros_(classifier.weight)
                nn.init.zeros_(classifier.bias)
                parts[f"offset{offset}"] = classifier
            self.exits[f"layer{layer}"] = nn.ModuleDict(parts)

    def classifiers(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the classifiers of `layer` read, [B, T, D], and their weights [K * V, D] and biases [K * V] as of one.

        The offsets share one matrix product, but each keeps its own parameters: a classifier that is not asked for
        gets no gradient at all, so no optimizer moves it.
        """
        parts = self.exits[f"layer{layer}"]
        linears = [parts[f"offset{offset}"] for offset in offsets]
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        return parts["norm"](hidden_BTD), weight, bias

    def forward(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int] = (1,)) -> Tensor:
        """Logits of `offsets` from the hidden states of `layer`: [B, T, K, V]."""
        return F.linear(*self.classifiers(hidden_BTD, layer, offsets)).unflatten(-1, (len(offsets), -1))
