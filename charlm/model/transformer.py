"""A deep causal Transformer over characters. It returns hidden states, never logits.

Shapes: B batch, T positions, S characters seen, N longest n-gram, D d_model, L layers.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from charlm.config import AttentionBackend, ModelConfig
from charlm.model.attention import Attention, RotaryTable, rotary_table
from charlm.model.cache import KVCache, LayerCache, Places
from charlm.model.kernels_cpu import apply_linear


class ReluSquared(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021, Primer). Keeps one tensor for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive  # autocast computes powers in fp32 on a GPU

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2; in place where no gradient is needed."""
    return ReluSquared.apply(x) if torch.is_grad_enabled() else F.relu(x).square_()


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "relu_squared": relu_squared}
HASH_BASE, HASH_MODULUS = 1_000_003, 2**31 - 1


class NgramEmbedding(nn.Module):
    """Embeddings of the n-grams that end at each position (Pagnoni et al. 2024, section 3.2.1).

    For each n the last n characters are hashed to a row of a table, with a sparse gradient. Narrow
    tables and one matrix (Lan et al. 2020, section 3.1) replace the paper's full-width tables.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.lengths = tuple(sorted(config.ngrams))
        width = config.ngram_width
        self.tables = nn.ModuleList(nn.Embedding(config.ngram_buckets, width, sparse=True) for _ in self.lengths)
        self.up = nn.Linear(len(self.lengths) * width, config.d_model, bias=False)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)

    def forward(self, ids_BS: Tensor, num_positions: int) -> Tensor:
        """The embeddings of the last `num_positions` of the S characters: [B, num_positions, D].

        Positions before the first character, and ids of -1, are one extra symbol.
        """
        longest = self.lengths[-1]
        symbols_BS = F.pad(ids_BS + 1, (longest - 1, 0))
        newest_first_BTN = symbols_BS.unfold(1, longest, 1)[:, -num_positions:].flip(-1)
        hashes_BTN = (newest_first_BTN * _powers(longest, ids_BS.device)).cumsum(dim=-1) % HASH_MODULUS
        tables = zip(self.lengths, self.tables, strict=True)
        rows = [table(hashes_BTN[..., n - 1] % table.num_embeddings) for n, table in tables]
        return self.up(torch.cat(rows, dim=-1))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # for the reason given at `rotary_table`
def _powers(count: int, device: torch.device) -> Tensor:
    """base^j modulo a prime: the factor of the character j steps back."""
    powers = [pow(HASH_BASE, j, HASH_MODULUS) for j in range(count)]
    return torch.tensor(powers, device=device)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner = self.activation(apply_linear(self.up, x_BTD))
        return apply_linear(self.down, self.dropout(inner))


class Block(nn.Module):
    """Attention, then feed-forward, each with its residual connection and layer norm."""

    def __init__(self, config: ModelConfig, attention: AttentionBackend):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config, attention)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: RotaryTable | None = None,
        cache: LayerCache | None = None,
        num_last: int | None = None,
    ) -> Tensor:
        kept_BTD = x_BTD if num_last is None else x_BTD[:, -num_last:]
        if self.pre_norm:
            attended_BTD = self.attention(self.attention_norm(x_BTD), rotation, cache, num_last)
            x_BTD = kept_BTD + self.dropout(attended_BTD)
            return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        attended_BTD = self.attention(x_BTD, rotation, cache, num_last)
        x_BTD = self.attention_norm(kept_BTD + self.dropout(attended_BTD))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


class CharTransformer(nn.Module):
    """Maps character ids to the hidden states of chosen layers (Al-Rfou et al. 2018, section 3).

    Matrices start normal with variance 1 / fan-in, biases at zero, embeddings with standard
    deviation 0.3, position tables with 0.02. Those that write to the residual stream are divided by
    sqrt(2L) (Radford et al. 2019): all 2L add about the variance of one, and under post-norm the
    product of the norms' gradients is bounded.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        *,
        attention: AttentionBackend = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.activation_checkpointing = activation_checkpointing
        L, T, D = config.num_layers, config.context_length, config.d_model
        self.embedding = nn.Embedding(vocabulary_size, D)
        self.ngram_embedding = NgramEmbedding(config) if config.ngrams else None
        num_tables = {"per_layer": L, "input": 1, "rotary": 0}[config.position_encoding]
        self.position_tables = nn.ParameterList(nn.Parameter(torch.empty(T, D)) for _ in range(num_tables))
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(L))
        self.final_norm = nn.LayerNorm(D) if config.norm == "pre" else nn.Identity()
        residual_scale = 0.0 if config.residual_init == "zero" else (2 * L) ** -0.5
        nn.init.normal_(self.embedding.weight, std=0.3)
        for table in self.position_tables:
            nn.init.normal_(table, std=0.02)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    nn.init.zeros_(module.bias)
            for linear in (block.attention.out, block.feed_forward.down):
                linear.weight.data.mul_(residual_scale)

    def forward(
        self,
        ids_BT: Tensor,
        layers: Iterable[int] | None = None,
        cache: KVCache | None = None,
        num_last: int | None = None,
    ) -> dict[int, Tensor]:
        """Hidden states of `layers`.

        Args:
            ids_BT: character ids, with those in `cache` at most `context_length`.
            layers: those wanted, from 1; by default the last. Higher ones do not run.
            cache: the earlier positions. It advances by T in the layers that run: use it for one
                depth only, and not with activation checkpointing.
            num_last: number of last positions to return, at least 1; by default all.

        Returns {layer: hidden_BTD}. Under pre-norm only the last went through the final norm.
        Raises ValueError if the positions exceed the context.
        """
        wanted = {self.config.num_layers} if layers is None else set(layers)
        places = self.places(ids_BT.shape[1], cache)
        return self.run(self.embed(ids_BT, places, cache), 0, wanted, places, cache, num_last)

    def places(self, num_new: int, cache: KVCache | None) -> Places:
        """Slots for new positions. Raises ValueError if they exceed the context."""
        places = Places(slice(0, num_new), num_new, None) if cache is None else cache.places(num_new)
        if places.end > self.config.context_length:
            raise ValueError(f"{places.end} positions exceed the context of {self.config.context_length}")
        return places

    def embed(self, ids_BT: Tensor, places: Places, cache: KVCache | None) -> Tensor:
        """The first layer's input without positions, [B, T, D]; stores ids in `cache`."""
        x_BTD = self.embedding(ids_BT)
        if self.ngram_embedding is None:
            return x_BTD
        num_earlier = self.ngram_embedding.lengths[-1] - 1
        seen_BS = ids_BT if cache is None else cache.extend_ids(ids_BT, places, num_earlier)
        return x_BTD + self.ngram_embedding(seen_BS, ids_BT.shape[1])

    def rotation(self, places: Places) -> RotaryTable | None:
        """The rotation of queries and keys; None where positions are learned."""
        if self.config.position_encoding != "rotary":
            return None
        head_size = self.config.d_model // self.config.num_heads
        table = rotary_table(self.config.context_length, head_size, self.embedding.weight.device)
        return table.at(places.positions)

    def run(
        self,
        x_BTD: Tensor,
        lowest: int,
        wanted: set[int],
        places: Places,
        cache: KVCache | None,
        num_last: int | None = None,
    ) -> dict[int, Tensor]:
        """As `forward`, from the output `x_BTD` of layer `lowest`; layer 0 is the embedding."""
        rotation = self.rotation(places)
        T = x_BTD.shape[1]
        hidden_states = {}
        highest = max(wanted)
        for layer, block in enumerate(self.blocks[lowest:highest], start=lowest + 1):
            if layer <= len(self.position_tables):
                x_BTD = x_BTD + self.position_tables[layer - 1][places.positions]
            inputs = (rotation, cache and cache.layer(layer, places), num_last if layer == highest else None)
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, *inputs, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, *inputs)
            if layer in wanted:
                kept_BTD = x_BTD if num_last is None else x_BTD[:, -num_last:]
                is_last = layer == self.config.num_layers
                hidden_states[layer] = self.final_norm(kept_BTD) if is_last else kept_BTD
        if cache is not None:
            cache.lengths += T
        return hidden_states
