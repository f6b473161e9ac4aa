"""Reading text step by step with a cache, a few symbols at a time, with as few operations as possible.

Half the time of such a step in a small model passes between operations, not in them. So query, key and value come from
one product with weights that are joined once, all layers' buffers are sliced at once, and no module is called.

This is a second forward pass beside `CharTransformer`: whoever adds an option to the model adds it here, too.
tests/inference/test_stepping.py compares the two for every option of `ModelConfig`.

Shapes: B texts, T symbols, D d_model, H heads, C = D / H head size, S positions up to the newest, I inputs, E outputs,
V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import zip_longest
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.model.cache import KVCache, Places
from charlm.model.heads import Heads
from charlm.model.kernels_cpu import exact_matmul
from charlm.model.transformer import Block, CharTransformer
from charlm.runs.trained import TrainedModel

FEW_SYMBOLS = 8
"""For more symbols than this a matrix product is faster than sums of rows."""
NUM_BAGS = 8
"""Threads share them. Eight are faster than four even with one thread; more are not."""
SUM = 0
"""The mode's number in `torch.embedding_bag`."""


def read(
    trained: TrainedModel,
    ids: Sequence[Sequence[int]],
    cache: KVCache,
    *,
    layer: int | None = None,
    num_last: int | None = None,
) -> Tensor:
    """Hidden states of `layer` (the last by default) at the last `num_last` of `ids` (all by default): [B, T, D].

    `ids` are equally many for each text and follow those that the cache holds.
    """
    layer = trained.config.model.num_layers if layer is None else layer
    ids_BT = torch.tensor(ids, device=trained.device)
    with exact_matmul(trained.device, ids_BT.numel()):
        return trained.transformer(ids_BT, [layer], cache, num_last)[layer]


def logits_after(trained: TrainedModel, hidden_BTD: Tensor) -> Tensor:
    """Logits of the next symbol from the last layer's hidden states, [B, T, V] on the CPU."""
    return trained.heads(hidden_BTD, trained.config.model.num_layers)[:, :, 0].cpu()


@torch.inference_mode()
def next_logits(trained: TrainedModel, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
    """Logits after `ids`, which follow those that the cache holds of each text: [B, V] on the CPU."""
    if len({len(own) for own in ids}) > 1:  # all but the last symbol text by text, then the last of all together
        for row, own in enumerate(ids):
            if len(own) > 1:
                read(trained, [own[:-1]], cache.row(row), num_last=1)
        ids = [own[-1:] for own in ids]
    return logits_after(trained, read(trained, ids, cache, num_last=1))[:, 0]


def stepping(trained: TrainedModel) -> TrainedModel:
    """The same model, but it reads a few symbols at a time the short way. A GPU has faster ways: there it is returned
    as it is."""
    if trained.device.type != "cpu":
        return trained
    return replace(trained, transformer=SteppingTransformer(trained.transformer), heads=SteppingHeads(trained.heads))


class SteppingTransformer(nn.Module):
    """A transformer that reads a few symbols of one text the short way, and leaves everything else to the original.

    The short way is for inference: without gradients, dropout and autocast. It passes all hooks of the blocks, and uses
    copies of their matrices, made at the first such symbol. Make a new one for each text.
    """

    def __init__(self, transformer: CharTransformer):
        super().__init__()
        self.transformer, self.config = transformer, transformer.config

    @cached_property
    def layers(self) -> list["_Layer"]:
        """The parameters of all layers; copied when first needed, as a text may be read to its end without."""
        tables = zip_longest(self.transformer.blocks, self.transformer.position_tables)
        return [_Layer.of(block, table_TD) for block, table_TD in tables]

    def forward(
        self,
        ids_BT: Tensor,
        layers: Iterable[int] | None = None,
        cache: KVCache | None = None,
        num_last: int | None = None,
    ) -> dict[int, Tensor]:
        """See `CharTransformer`."""
        wanted = {self.config.num_layers} if layers is None else set(layers)
        if cache is not None and _is_for_short_way(ids_BT, self.transformer) and len(wanted) == 1:
            (layer,) = wanted
            if 1 <= layer <= self.config.num_layers:
                places = self.transformer.places(ids_BT.shape[1], cache)
                x_TD = self.transformer.embed(ids_BT, places, cache)[0]
                hidden_1TD = self._run(x_TD, 0, layer, places, cache)
                return {layer: hidden_1TD if num_last is None else hidden_1TD[:, -num_last:]}
        return self.transformer(ids_BT, wanted, cache, num_last)

    def resume(self, hidden_BTD: Tensor, layer: int, cache: KVCache) -> Tensor:
        """See `CharTransformer`."""
        if not _is_for_short_way(hidden_BTD, self.transformer):
            return self.transformer.resume(hidden_BTD, layer, cache)
        places = self.transformer.places(hidden_BTD.shape[1], cache)
        return self._run(hidden_BTD[0], layer, self.config.num_layers, places, cache)

    def _run(self, x_TD: Tensor, lowest: int, highest: int, places: Places, cache: KVCache) -> Tensor:
        transformer, config = self.transformer, self.config
        T, H = len(x_TD), config.num_heads
        rotation = transformer.rotation(places)
        pre_norm, activation = config.norm == "pre", transformer.blocks[0].feed_forward.activation
        past = [buffer[lowest:highest, 0, :, : places.end].unbind() for buffer in (cache.keys, cache.values)]
        newest = [buffer[lowest:highest, 0, :, places.positions].unbind() for buffer in (cache.keys, cache.values)]
        for layer, keys_HSC, values_HSC, new_keys_HTC, new_values_HTC in zip(
            self.layers[lowest:highest], *past, *newest, strict=True
        ):
            if layer.table_TD is not None:
                x_TD = x_TD + layer.table_TD[places.positions]
            states_TD = torch.layer_norm(x_TD, *layer.attention_norm) if pre_norm else x_TD
            projected_3HTC = layer.projection(states_TD).view(T, 3, H, -1).permute(1, 2, 0, 3)
            query_HTC, key_HTC, value_HTC = projected_3HTC.unbind()
            if rotation is not None:
                query_HTC, key_HTC = rotation(projected_3HTC[:2]).unbind()
            new_keys_HTC.copy_(key_HTC)
            new_values_HTC.copy_(value_HTC)
            mixed_1HTC = F.scaled_dot_product_attention(
                query_HTC[None], keys_HSC[None], values_HSC[None], attn_mask=places.visible_B1TS
            )
            x_TD = x_TD + layer.out(mixed_1HTC[0].transpose(0, 1).flatten(1))
            if not pre_norm:
                x_TD = torch.layer_norm(x_TD, *layer.attention_norm)
            states_TD = torch.layer_norm(x_TD, *layer.feed_forward_norm) if pre_norm else x_TD
            x_TD = x_TD + layer.down(activation(layer.up(states_TD)))
            if not pre_norm:
                x_TD = torch.layer_norm(x_TD, *layer.feed_forward_norm)
        cache.lengths += T
        return (transformer.final_norm(x_TD) if highest == config.num_layers else x_TD)[None]


class SteppingHeads(nn.Module):
    """Heads that read a few symbols of one text the short way; see `SteppingTransformer`."""

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads, self.pairs, self.layers = heads, heads.pairs, heads.layers
        self._linears: dict[tuple[int, ...], _Linear] = {}
        """By layer and offsets."""

    def forward(self, hidden_BTD: Tensor, layer: int, offsets: Sequence[int] = (1,)) -> Tensor:
        """See `Heads`."""
        if not _is_for_short_way(hidden_BTD, self.heads):
            return self.heads(hidden_BTD, layer, offsets)
        key = (layer, *offsets)
        if key not in self._linears:
            self._linears[key] = _Linear.of(*self.heads.linears(layer, offsets)[-len(offsets) :])
        logits_TR = self._linears[key](self.heads.states(hidden_BTD, layer)[0])
        return logits_TR.view(1, len(logits_TR), len(offsets), -1)


def _is_for_short_way(input_BT: Tensor, module: nn.Module) -> bool:
    B, T = input_BT.shape[:2]
    is_inference = not (torch.is_grad_enabled() or module.training or torch.is_autocast_enabled("cpu"))
    return is_inference and B == 1 and T <= FEW_SYMBOLS


class _Linear(NamedTuple):
    """A linear layer for a few vectors: for each, the sum of the transposed weight's rows, weighted by the vector.

    Memory bandwidth is the limit, and of torch's operations such sums read fastest: with two threads of an AMD EPYC
    (Zen 5), one vector takes half the time of dot products and a third of that of a matrix product. The bits of a
    vector's result do not depend on the vectors beside it.
    """

    rows_IE: Tensor
    bias_E: Tensor

    @staticmethod
    def of(*linears: nn.Linear) -> "_Linear":
        """Several layers with the same input as one; their outputs follow one another."""
        weight_EI = torch.cat([linear.weight.detach() for linear in linears])
        return _Linear(weight_EI.t().contiguous(), torch.cat([linear.bias.detach() for linear in linears]))

    def __call__(self, x_TI: Tensor) -> Tensor:
        T = len(x_TI)
        num_bags, indices, starts = _bags(*x_TI.shape)
        # The vectors lie side by side within a bag, so that its rows are read from memory once.
        weights = x_TI.view(T, num_bags, -1).transpose(0, 1).flatten()
        sums = torch.embedding_bag(
            weight=self.rows_IE,
            indices=indices,
            offsets=starts,
            scale_grad_by_freq=False,
            mode=SUM,
            sparse=False,
            per_sample_weights=weights,
        )[0]
        return sums.view(num_bags, T, -1).sum(dim=0).add_(self.bias_E)


@lru_cache(maxsize=64)
def _bags(num_vectors: int, num_inputs: int) -> tuple[int, Tensor, Tensor]:
    """The number of bags that the rows are split into, the rows in each bag of each vector, and where each begins."""
    num_bags = gcd(num_inputs, NUM_BAGS)
    rows = torch.arange(num_inputs).view(num_bags, 1, -1).expand(-1, num_vectors, -1).flatten()
    return num_bags, rows, torch.arange(0, len(rows), num_inputs // num_bags)


class _Layer(NamedTuple):
    """A block's parameters."""

    table_TD: Tensor | None
    """Position embeddings that are added to its input."""
    attention_norm: tuple[Any, ...]
    """The arguments of `torch.layer_norm` after its input."""
    projection: _Linear
    """To queries, keys and values."""
    out: _Linear
    feed_forward_norm: tuple[Any, ...]
    up: _Linear
    down: _Linear

    @staticmethod
    def of(block: Block, table_TD: Tensor | None) -> "_Layer":
        attention, feed_forward = block.attention, block.feed_forward
        return _Layer(
            table_TD,
            _norm(block.attention_norm),
            _Linear.of(attention.query, attention.key, attention.value),
            _Linear.of(attention.out),
            _norm(block.feed_forward_norm),
            _Linear.of(feed_forward.up),
            _Linear.of(feed_forward.down),
        )


def _norm(norm: nn.LayerNorm) -> tuple[Any, ...]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps
