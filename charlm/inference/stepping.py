"""One symbol of one text at a time, with as few operations as there can be.

Half of such a step of a small model is spent between operations, not in them. So query, key and value come from one
product of weights that are joined once, all layers' buffers are cut at once, and no module is called on the way.

Shapes: D d_model, T positions, H heads, C = D / H head size, S positions up to the new one, I inputs, E outputs.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.model.attention import KVCache
from charlm.model.transformer import Block, CharTransformer
from charlm.runs.trained import TrainedModel

NUM_BAGS = 8
"""Threads share them out. Eight are faster than four even for one thread, more are not."""
SUM = 0
"""torch's number of the mode."""


class _Linear(NamedTuple):
    """A linear layer of one vector: the sum of the rows of its weight's transpose, weighted by the vector.

    Memory is its limit, and of what torch has for it such a sum reads fastest: measured with two threads of an AMD EPYC
    (Zen 5), in half the time of dot products and a third of that of a product of matrices.
    """

    rows_IE: Tensor
    bias_E: Tensor
    indices_I: Tensor
    bags: Tensor
    """Where each begins: rows are summed in several bags at once."""

    @staticmethod
    def of(*linears: nn.Linear) -> "_Linear":
        """That of several layers with the same input, their outputs one behind the other."""
        rows_IE = torch.cat([linear.weight.detach() for linear in linears]).t().contiguous()
        indices_I = torch.arange(len(rows_IE))
        bias_E = torch.cat([linear.bias.detach() for linear in linears])
        return _Linear(rows_IE, bias_E, indices_I, indices_I[:: -(-len(rows_IE) // NUM_BAGS)].contiguous())

    def __call__(self, x_I: Tensor) -> Tensor:
        sums = torch.embedding_bag(self.rows_IE, self.indices_I, self.bags, False, SUM, False, x_I)[0]
        return sums.sum(dim=0).add_(self.bias_E)


class _Layer(NamedTuple):
    """A block's parameters."""

    table_TD: Tensor | None
    """The positions that are added to its input."""
    attention_norm: tuple[Any, ...]
    """The arguments of torch.layer_norm after its input."""
    projection: _Linear
    """To queries, keys and values, one below the other."""
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


class SteppingTransformer(nn.Module):
    """A transformer that reads single symbols of one text the short way, and everything else as it does by itself.

    The short way is for inference: without gradients, dropout and autocast, past all hooks of the blocks, and with
    copies of their matrices as they are at the first such symbol. Make a new one for each text.
    """

    def __init__(self, transformer: CharTransformer):
        super().__init__()
        self.transformer, self.config = transformer, transformer.config

    @cached_property
    def layers(self) -> list[_Layer]:
        """All of them; built when first needed, as a text may be read to its end without."""
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
        if ids_BT.numel() == 1 and cache is not None and len(wanted) == 1 and self._is_inference():
            (layer,) = wanted
            if 1 <= layer <= self.config.num_layers:
                return {layer: self._step(ids_BT, layer, cache)}
        return self.transformer(ids_BT, wanted, cache, num_last)

    def _is_inference(self) -> bool:
        return not (torch.is_grad_enabled() or self.transformer.training or torch.is_autocast_enabled("cpu"))

    def _step(self, ids_11: Tensor, highest: int, cache: KVCache) -> Tensor:
        transformer, config = self.transformer, self.config
        places = transformer.places(1, cache)
        x_D = transformer.embed(ids_11, places, cache)[0, 0]
        rotation = transformer.rotation(places)
        pre_norm, activation = config.norm == "pre", transformer.blocks[0].feed_forward.activation
        past = [buffer[:, 0, :, : places.end].unbind() for buffer in (cache.keys, cache.values)]
        newest = [buffer[:, 0, :, places.end - 1].unbind() for buffer in (cache.keys, cache.values)]
        for layer, keys_HSC, values_HSC, key_HC, value_HC in zip(self.layers[:highest], *past, *newest, strict=False):
            if layer.table_TD is not None:
                x_D = x_D + layer.table_TD[places.end - 1]
            states_D = torch.layer_norm(x_D, *layer.attention_norm) if pre_norm else x_D
            projected_3HC = layer.projection(states_D).view(3, config.num_heads, -1)
            if rotation is None:
                new_query_HC, new_key_HC, new_value_HC = projected_3HC.unbind()
            else:
                new_query_HC, new_key_HC = rotation(projected_3HC[:2]).unbind()
                new_value_HC = projected_3HC[2]
            key_HC.copy_(new_key_HC)
            value_HC.copy_(new_value_HC)
            mixed_1H1C = F.scaled_dot_product_attention(new_query_HC[None, :, None], keys_HSC[None], values_HSC[None])
            x_D = x_D + layer.out(mixed_1H1C.flatten())
            if not pre_norm:
                x_D = torch.layer_norm(x_D, *layer.attention_norm)
            states_D = torch.layer_norm(x_D, *layer.feed_forward_norm) if pre_norm else x_D
            x_D = x_D + layer.down(activation(layer.up(states_D)))
            if not pre_norm:
                x_D = torch.layer_norm(x_D, *layer.feed_forward_norm)
        cache.lengths += 1
        return (transformer.final_norm(x_D) if highest == config.num_layers else x_D)[None, None]


def stepping(trained: TrainedModel) -> TrainedModel:
    """The same model, whose transformer reads single symbols the short way; on a GPU, which has faster ones, itself."""
    if trained.device.type != "cpu":
        return trained
    return replace(trained, transformer=SteppingTransformer(trained.transformer))
