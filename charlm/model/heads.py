"""Prediction heads map a layer's hidden states to logits of the characters at some offsets.

Shapes: B batch, T positions, D d_model, E input width of a classifier, K offsets, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from charlm.config import LayersConfig, ModelConfig, count_of


class Heads(nn.Module):
    """One untied linear classifier with bias per layer and offset (Al-Rfou et al. 2018, section 3).

    Under pre-norm the head of an intermediate layer begins with a layer norm. Classifiers start at
    zero: every loss starts at ln V, and no head disturbs the trunk before it has learned.

    Intermediate layers may have other kinds (`aux.layers.head`). Shared heads are the final norm and
    the last layer's classifiers (LayerSkip, section 4.1.2); frozen ones are constants. The hidden
    layer of a tower serves all offsets (GoogLeNet, section 5; PSPNet, section 4).
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        pairs: Iterable[tuple[int, int]],
        *,
        layers: LayersConfig | None = None,
        final_norm: nn.Module | None = None,
        last_tower: bool = False,
    ):
        """
        Args:
            pairs: (layer, offset) of each classifier, 1-based; offset 1 is the next character.
            layers: names the kind of intermediate heads; linear by default.
            final_norm: the transformer's; shared heads need it.
            last_tower: the last layer also has a tower, as in a model cut off above one.
        """
        super().__init__()
        layers = layers or LayersConfig()
        shared = layers.head in ("shared", "shared_frozen")
        self.last_layer = config.num_layers
        self.last_tower, self.has_bias = last_tower, config.head_bias
        self.frozen = layers.head == "shared_frozen"
        self._final_norm = (final_norm,)  # in a tuple, as its parameters belong to the transformer
        wanted = set(pairs)
        owned = {(self.last_layer, offset) for _, offset in wanted} if shared else wanted
        self.pairs = sorted(wanted | owned)
        self.layers = sorted({layer for layer, _ in self.pairs})
        self._homes = {layer: self.last_layer if shared else layer for layer in self.layers}
        self.exits = nn.ModuleDict()
        for layer in sorted(set(self._homes.values())):
            intermediate = layer < self.last_layer
            own_norm = config.norm == "pre" and intermediate
            width = config.d_model
            parts: dict[str, nn.Module] = {"norm": nn.LayerNorm(width) if own_norm else nn.Identity()}
            if layers.head == "tower" and (intermediate or last_tower):
                width = count_of(layers.tower_width or 1.0, config.d_model)
                parts["tower"] = _tower(config.d_model, width, layers.tower_dropout)
            for offset in sorted(offset for pair_layer, offset in owned if pair_layer == layer):
                classifier = nn.Linear(width, vocabulary_size, bias=config.head_bias)
                for parameter in classifier.parameters():
                    nn.init.zeros_(parameter)
                parts[f"offset{offset}"] = classifier
            self.exits[f"layer{layer}"] = nn.ModuleDict(parts)

    def norm(self, layer: int) -> nn.Module:
        """The norm that the head begins with; the identity if states are normalised."""
        return self._parts(layer)["norm"] if self._homes[layer] == layer else self._final_norm[0]

    def linears(self, layer: int, offsets: Sequence[int]) -> list[nn.Linear]:
        """The linear layers that predict `offsets`: a tower's, and the classifiers."""
        parts = self._parts(layer)
        tower = [parts["tower"].hidden] if "tower" in parts else []
        return tower + [parts[f"offset{offset}"] for offset in offsets]

    def classifiers(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The classifiers' input, [B, T, E], weights, [K * V, E], and biases, [K * V]."""
        parts = self._parts(layer)
        linears = [parts[f"offset{offset}"] for offset in offsets]
        weight = _stacked([linear.weight for linear in linears])
        bias = _stacked([linear.bias for linear in linears]) if self.has_bias else weight.new_zeros(len(weight))
        if self.frozen and layer < self.last_layer:
            norm = self.norm(layer)
            constants = {name: parameter.detach() for name, parameter in norm.named_parameters()}
            return functional_call(norm, constants, (hidden_BTD,)), weight.detach(), bias.detach()
        return self.states(hidden_BTD, layer), weight, bias

    def states(self, hidden_BTD: Tensor, layer: int) -> Tensor:
        """The hidden states after the norm and the tower of `layer`: [B, T, E]."""
        parts = self._parts(layer)
        states_BTD = self.norm(layer)(hidden_BTD)
        return parts["tower"](states_BTD) if "tower" in parts else states_BTD

    def forward(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int] = (1,)) -> Tensor:
        """Logits of `offsets` from the hidden states of `layer`: [B, T, K, V]."""
        logits = F.linear(*self.classifiers(hidden_BTD, layer, offsets))
        return logits.unflatten(-1, (len(offsets), -1))

    def _parts(self, layer: int) -> nn.ModuleDict:
        return self.exits[f"layer{self._homes[layer]}"]


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # spares generation a copy


def _tower(d_model: int, width: int, dropout: float) -> nn.Sequential:
    hidden = nn.Linear(d_model, width)
    nn.init.normal_(hidden.weight, std=d_model**-0.5)
    nn.init.zeros_(hidden.bias)
    parts = OrderedDict(hidden=hidden, activation=nn.ReLU(), dropout=nn.Dropout(dropout))
    return nn.Sequential(parts)
