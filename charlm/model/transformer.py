"""A deep causal Transformer over characters that returns hidden states, never logits.

Shapes: B batch, T positions, D d_model, H heads, V vocabulary, L layers.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from charlm.config import ModelConfig
from charlm.model.attention import Attention, KVCache, LayerCache, Rotation
from charlm.model.embedding import NgramEmbedding


class ReluSquared(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021, Primer), with one tensor kept and one pass over it in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "relu_squared": ReluSquared.apply}
EMBEDDING_STD = 0.3
POSITION_STD = 0.02


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x_BTD))))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each with its residual connection and layer norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        if self.pre_norm:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, cache))
            return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, rotation, cache)))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


class CharTransformer(nn.Module):
    """Character ids to the hidden states of the layers asked for (Al-Rfou et al. 2018, section 3).

    Initialisation: matrices are normal with variance 1 / fan-in, biases zero, embeddings normal with standard deviation
    0.3, position tables with 0.02. The two matrices of each layer that write to the residual stream are scaled down by
    sqrt(2L) (Radford et al. 2019), so that 2L sublayers together add about as much variance as one unscaled one. Under
    post-norm the same factor keeps the product of the 2L norms' gradients bounded, whatever the depth. With
    `residual_init` "zero" they start at zero.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int):
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.activation_checkpointing = False
        L, T, D = config.num_layers, config.context_length, config.d_model
        self.embedding = nn.Embedding(vocabulary_size, D)
        self.ngram_embedding = NgramEmbedding(config) if config.ngrams else None
        num_tables = {"per_layer": L, "input": 1, "rotary": 0}[config.positions]
        self.position_tables = nn.ParameterList(nn.Parameter(torch.empty(T, D)) for _ in range(num_tables))
        self.blocks = nn.ModuleList(Block(config) for _ in range(L))
        self.final_norm = nn.LayerNorm(D) if config.norm == "pre" else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        residual_scale = 0.0 if self.config.residual_init == "zero" else (2 * self.config.num_layers) ** -0.5
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        for table in self.position_tables:
            nn.init.normal_(table, std=POSITION_STD)
        for block in self.blocks:
            for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
            for linear in (block.attention.out, block.feed_forward.down):
                linear.weight.data.mul_(residual_scale)

    def _rotation(self, start: int, end: int, device: torch.device) -> Rotation | None:
        """What turns queries and keys of the positions [start, end); None for learned positions."""
        if self.config.positions != "rotary":
            return None
        half = self.config.d_model // self.config.num_heads // 2
        frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
        return Rotation.by(torch.arange(start, end, device=device)[:, None] * frequencies)

    def forward(
        self, ids_BT: Tensor, layers: Iterable[int] | None = None, cache: KVCache | None = None
    ) -> dict[int, Tensor]:
        """Hidden states of `layers`.

        Args:
            ids_BT: character ids, at most `context_length` of them counting those that `cache` holds.
            layers: 1-based numbers of the layers wanted; by default the last. None above the highest is computed.
            cache: keys and values of earlier positions; it is advanced by T, and only for the layers that run: use one
                cache for one depth. Only in evaluation mode or without activation checkpointing.

        Returns:
            {layer: hidden_BTD}. Under pre-norm the last layer's states went through the final norm; those of an
            intermediate layer are the raw residual stream, which its head normalises.

        Raises:
            ValueError: no such layer, or the positions exceed the context.
        """
        wanted = {self.config.num_layers} if layers is None else set(layers)
        if not wanted or not wanted <= set(range(1, self.config.num_layers + 1)):
            raise ValueError(f"layers {sorted(wanted)}: name some of 1 to {self.config.num_layers}")
        start = cache.length if cache is not None else 0
        end = start + ids_BT.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} positions exceed the context of {self.config.context_length}")
        rotation = self._rotation(start, end, ids_BT.device)
        x_BTD = self.embedding(ids_BT)
        if cache is not None:
            cache.ids[:, start:end] = ids_BT
        if self.ngram_embedding is not None:
            seen_BS = ids_BT if cache is None else cache.ids[:, :end]
            x_BTD = x_BTD + self.ngram_embedding(seen_BS, ids_BT.shape[1])
        hidden_states = {}
        for layer, block in enumerate(self.blocks[: max(wanted)], start=1):
            if layer <= len(self.position_tables):
                x_BTD = x_BTD + self.position_tables[layer - 1][start:end]
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotation, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation, cache.layer(layer) if cache is not None else None)
            if layer in wanted:
                hidden_states[layer] = self.final_norm(x_BTD) if layer == self.config.num_layers else x_BTD
        if cache is not None:
            cache.length = end
        return hidden_states
