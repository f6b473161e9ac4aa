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

    def forward(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int] = (1,)) -> Tensor:
        """Logits of `offsets` from the hidden states of `layer`: [B, T, K, V].

        The offsets share one matrix product, but each keeps its own parameters: a classifier that is not asked for
        gets no gradient at all, so no optimizer moves it.
        """
        parts = self.exits[f"layer{layer}"]
        classifiers = [parts[f"offset{offset}"] for offset in offsets]
        weight = torch.cat([classifier.weight for classifier in classifiers])
        bias = torch.cat([classifier.bias for classifier in classifiers])
        return F.linear(parts["norm"](hidden_BTD), weight, bias).unflatten(-1, (len(classifiers), -1))
