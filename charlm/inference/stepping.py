"""A faster forward pass for generation, which feeds new symbols to a model with a key/value cache.

On a CPU, a few symbols of one text take a fast path: one product gives query, key and value, and no
module or hook is called. tests/inference/test_stepping.py compares it with `CharTransformer`.

Shapes: B texts, T symbols, D d_model, H heads, C = D / H head size, S positions up to the newest,
I inputs, E outputs, K offsets, V vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import zip_longest
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.model.cache import KVCache, Places
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.model.transformer import Block
from charlm.runs.trained import TrainedModel

FEW_SYMBOLS = 8
"""For more symbols than this a matrix product is faster than sums of rows."""
NUM_BAGS = 8
"""Groups of rows that embedding_bag sums in parallel."""


class Reader:
    """A model that reads texts. It copies weights on first use: make one for each text."""

    def __init__(self, trained: TrainedModel):
        self.config = trained.config.model
        self.device = trained.device
        self.transformer = trained.transformer
        self.heads = trained.heads
        # The fast path is for CPUs, and ignores dropout and autocast.
        needs_modules = trained.transformer.training or torch.is_autocast_enabled("cpu")
        self.has_fast_path = self.device.type == "cpu" and not needs_modules
        self._classifiers: dict[tuple[int, ...], _Linear] = {}
        """By layer and offsets."""

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[list[int]], cache: KVCache) -> Tensor:
        """Logits after `ids`, which follow those in the cache: [B, V] on the CPU."""
        if len({len(own) for own in ids}) > 1:
            # All but the last symbol text by text, then the last of all together.
            for row, own in enumerate(ids):
                if len(own) > 1:
                    self.read([own[:-1]], cache.row(row), num_last=1)
            ids = [own[-1:] for own in ids]
        return self.logits(self.read(ids, cache, num_last=1))[:, 0, 0]

    @torch.inference_mode()
    def read(
        self, ids: Sequence[Sequence[int]], cache: KVCache, *, layer: int | None = None, num_last: int | None = None
    ) -> Tensor:
        """Hidden states of `layer` (or the last) at the last `num_last` (or all) of `ids`, [B, T, D]."""
        layer = layer or self.config.num_layers
        ids_BT = torch.tensor(ids, device=self.device)
        with full_fp32_matmul(self.device, ids_BT.numel()):
            if not self._takes_fast_path(ids_BT):
                return self.transformer(ids_BT, [layer], cache, num_last)[layer]
            places = self.transformer.places(ids_BT.shape[1], cache)
            x_1TD = self.transformer.embed(ids_BT, places, cache)
            hidden_1TD = self._run(x_1TD, 0, layer, places, cache)
            return hidden_1TD if num_last is None else hidden_1TD[:, -num_last:]

    @torch.inference_mode()
    def run_from(self, hidden_BTD: Tensor, layer: int, cache: KVCache, highest: int | None = None) -> Tensor:
        """From the hidden states of `layer` those of `highest`, by default the last.

        First set the lengths of `cache` back to before these positions.
        """
        highest = highest or self.config.num_layers
        places = self.transformer.places(hidden_BTD.shape[1], cache)
        with full_fp32_matmul(self.device, hidden_BTD.shape[1]):
            if self._takes_fast_path(hidden_BTD):
                return self._run(hidden_BTD, layer, highest, places, cache)
            return self.transformer.run(hidden_BTD, layer, {highest}, places, cache)[highest]

    @torch.inference_mode()
    def skip_from(self, hidden_1TD: Tensor, layer: int, cache: KVCache) -> None:
        """As `run_from`, but layers above `layer` only store keys and values of `hidden_1TD`."""
        places = self.transformer.places(hidden_1TD.shape[1], cache)
        inputs = [own.norms_before[0](own.at(hidden_1TD[0], places)) for own in self._layers[layer:]]
        rows_LDE, biases_L1E = (part[layer:] for part in self._keys_and_values)
        projected_LTE = torch.baddbmm(biases_L1E, torch.stack(inputs), rows_LDE)
        projected_LT2HC = projected_LTE.unflatten(-1, (2, self.config.num_heads, -1))
        keys_LHTC, values_LHTC = projected_LT2HC.permute(2, 0, 3, 1, 4)
        rotation = self.transformer.rotation(places)
        if rotation is not None:
            keys_LHTC = rotation(keys_LHTC)
        cache.keys[layer:, 0, :, places.positions] = keys_LHTC
        cache.values[layer:, 0, :, places.positions] = values_LHTC
        cache.lengths += len(hidden_1TD[0])

    @cached_property
    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The projections of all layers, [L, D, 2D], and their biases."""
        projections = [own.projection for own in self._layers]
        kept = slice(self.config.d_model, None)
        rows_LDE = torch.stack([own.rows_IE[:, kept] for own in projections])
        return rows_LDE, torch.stack([own.bias_E[None, kept] for own in projections])

    @torch.inference_mode()
    def logits(self, hidden_BTD: Tensor, layer: int | None = None, offsets: Sequence[int] = (1,)) -> Tensor:
        """Logits of `offsets` from hidden states of `layer`, [B, T, K, V] on the CPU."""
        layer = layer or self.config.num_layers
        if not self._takes_fast_path(hidden_BTD):
            return self.heads(hidden_BTD, layer, offsets).cpu()
        key = (layer, *offsets)
        if key not in self._classifiers:
            classifiers = self.heads.linears(layer, offsets)[-len(offsets) :]
            self._classifiers[key] = _Linear.of(*classifiers)
        logits_TR = self._classifiers[key](self.heads.states(hidden_BTD, layer)[0])
        return logits_TR.view(1, len(logits_TR), len(offsets), -1)

    def _takes_fast_path(self, input_BT: Tensor) -> bool:
        return self.has_fast_path and len(input_BT) == 1 and input_BT.shape[1] <= FEW_SYMBOLS

    @cached_property
    def _layers(self) -> list["_Layer"]:
        pairs = zip_longest(self.transformer.blocks, self.transformer.position_tables)
        return [_Layer(block, table_TD) for block, table_TD in pairs]

    def _run(self, x_1TD: Tensor, lowest: int, highest: int, places: Places, cache: KVCache) -> Tensor:
        """Hidden states of layer `highest` from those of `lowest`; 0 is the embedding."""
        x_TD = x_1TD[0]
        T, H = len(x_TD), self.config.num_heads
        rotation = self.transformer.rotation(places)
        buffers = cache.keys, cache.values
        past = [buffer[lowest:highest, 0, :, : places.end].unbind() for buffer in buffers]
        newest = [buffer[lowest:highest, 0, :, places.positions].unbind() for buffer in buffers]
        for layer, keys_HSC, values_HSC, new_keys_HTC, new_values_HTC in zip(
            self._layers[lowest:highest], *past, *newest, strict=True
        ):
            x_TD = layer.at(x_TD, places)
            projected_TE = layer.projection(layer.norms_before[0](x_TD))
            projected_3HTC = projected_TE.view(T, 3, H, -1).permute(1, 2, 0, 3)
            query_HTC, key_HTC, value_HTC = projected_3HTC.unbind()
            if rotation is not None:
                query_HTC, key_HTC = rotation(projected_3HTC[:2]).unbind()
            new_keys_HTC.copy_(key_HTC)
            new_values_HTC.copy_(value_HTC)
            mixed_1HTC = F.scaled_dot_product_attention(
                query_HTC[None], keys_HSC[None], values_HSC[None], attn_mask=places.visible_B1TS
            )
            mixed_TD = mixed_1HTC[0].transpose(0, 1).flatten(1)
            x_TD = layer.norms_after[0](x_TD + layer.out(mixed_TD))
            raised_TE = layer.activation(layer.up(layer.norms_before[1](x_TD)))
            x_TD = layer.norms_after[1](x_TD + layer.down(raised_TE))
        cache.lengths += T
        if highest == self.config.num_layers:
            x_TD = self.transformer.final_norm(x_TD)
        return x_TD[None]


class _Linear(NamedTuple):
    """A linear layer for a few vectors: the transposed weight's rows, weighted by each and added.

    This is faster than a matrix product, and a result does not depend on the vectors beside it.
    """

    rows_IE: Tensor
    bias_E: Tensor

    @staticmethod
    def of(*linears: nn.Linear) -> "_Linear":
        """Layers with the same input, joined; their outputs follow one another."""
        weight_EI = torch.cat([linear.weight.detach() for linear in linears])
        biases = [torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
        return _Linear(weight_EI.t().contiguous(), torch.cat(biases).detach())

    def __call__(self, x_TI: Tensor) -> Tensor:
        T = len(x_TI)
        num_bags, indices, starts = _bags(*x_TI.shape)
        # Vectors lie side by side within a bag, so that its rows are read from memory once.
        weights = x_TI.view(T, num_bags, -1).transpose(0, 1).flatten()
        sums = torch.embedding_bag(self.rows_IE, indices, starts, per_sample_weights=weights)[0]
        return sums.view(num_bags, T, -1).sum(dim=0).add_(self.bias_E)


@lru_cache(maxsize=64)
def _bags(num_vectors: int, num_inputs: int) -> tuple[int, Tensor, Tensor]:
    """The number of bags, the rows in each bag of each vector, and where each begins."""
    num_bags = gcd(num_inputs, NUM_BAGS)
    rows = torch.arange(num_inputs).view(num_bags, 1, -1).expand(-1, num_vectors, -1).flatten()
    return num_bags, rows, torch.arange(0, len(rows), num_inputs // num_bags)


class _Layer:
    """A block's operations as plain functions; norms are pairs: attention's, feed-forward's."""

    def __init__(self, block: Block, table_TD: Tensor | None):
        attention = block.attention
        feed_forward = block.feed_forward
        self.table_TD = table_TD
        self.projection = _Linear.of(attention.query, attention.key, attention.value)
        self.out = _Linear.of(attention.out)
        self.up = _Linear.of(feed_forward.up)
        self.activation = feed_forward.activation
        self.down = _Linear.of(feed_forward.down)
        same = nn.Identity().forward
        norms = [block.attention_norm.forward, block.feed_forward_norm.forward]
        self.norms_before = norms if block.pre_norm else [same, same]
        self.norms_after = [same, same] if block.pre_norm else norms

    def at(self, x_TD: Tensor, places: Places) -> Tensor:
        """The layer's input with its positions, if it has a table of them."""
        return x_TD if self.table_TD is None else x_TD + self.table_TD[places.positions]
